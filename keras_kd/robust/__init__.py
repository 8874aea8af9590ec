"""Students that stand up to a bad day: adversarial training, corruptions, calibration, reports."""

from keras_kd.robust.adversaries import ARD, IAD, RSLAD, TRADES, AdaAD, PGDTraining
from keras_kd.robust.adversary import Adversary, kept_decisions
from keras_kd.robust.attacks import attack
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
    "Threat",
    "attack",
    "kept_decisions",
]
