"""Distillation losses: `loss(teacher, student, sample_weight=None)`, one value per sample."""

from keras_kd.losses.base import DistillationLoss
from keras_kd.losses.classes import DIST, DecoupledKD
from keras_kd.losses.contrast import CRD
from keras_kd.losses.divergences import (
    BinarySoftTargets,
    JensenShannon,
    ReverseKL,
    SoftTargets,
    TotalVariation,
)
from keras_kd.losses.features import FSP, ICKD, NST, AttentionTransfer, Hint
from keras_kd.losses.learned import VID, FactorTransfer, ReviewKD, SimKD
from keras_kd.losses.logits import LogitHuber, LogitMSE
from keras_kd.losses.relations import PKT, RKD, CorrelationCongruence, SimilarityPreserving
from keras_kd.losses.temperatures import CWSM, FLSW
from keras_kd.losses.tokens import PKD, AttentionScores, HiddenState, MiniLM

__all__ = [
    "CRD",
    "CWSM",
    "DIST",
    "FLSW",
    "FSP",
    "ICKD",
    "NST",
    "PKD",
    "PKT",
    "RKD",
    "VID",
    "AttentionScores",
    "AttentionTransfer",
    "BinarySoftTargets",
    "CorrelationCongruence",
    "DecoupledKD",
    "DistillationLoss",
    "FactorTransfer",
    "HiddenState",
    "Hint",
    "JensenShannon",
    "LogitHuber",
    "LogitMSE",
    "MiniLM",
    "ReverseKL",
    "ReviewKD",
    "SimKD",
    "SimilarityPreserving",
    "SoftTargets",
    "TotalVariation",
]
