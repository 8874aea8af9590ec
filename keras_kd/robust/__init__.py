"""Students that stand up to a bad day: adversarial training, corruptions, calibration, reports."""

from keras_kd.robust.adversaries import ARD, IAD, RSLAD, TRADES, AdaAD, PGDTraining
from keras_kd.robust.adversary import Adversary, kept_decisions
from keras_kd.robust.attacks import attack
from keras_kd.robust.calibration import calibrate, expected_calibration_error
from keras_kd.robust.corruption import corrupt, corruptions
from keras_kd.robust.evaluation import evaluate
from keras_kd.robust.noise import noisy_labels
from keras_kd.robust.report import RobustReport
from keras_kd.robust.threats import L2, Linf, Threat

__all__ = [
    "ARD",
    "IAD",
    "L2",
    "RSLAD",
    "TRADES",
    "AdaAD",
    "Adversary",
    "Linf",
    "PGDTraining",
    "RobustReport",
    "Threat",
    "attack",
    "calibrate",
    "corrupt",
    "corruptions",
    "evaluate",
    "expected_calibration_error",
    "kept_decisions",
    "noisy_labels",
]
