"""Distillation losses: `loss(teacher, student, sample_weight=None)`, one value per sample."""

from keras_kd.losses.base import DistillationLoss
from keras_kd.losses.classes import DIST, DecoupledKD
from keras_kd.losses.features import FSP, ICKD, NST, AttentionTransfer, Hint
from keras_kd.losses.learned import VID, FactorTransfer, ReviewKD, SimKD
from keras_kd.losses.logits import (
    BinarySoftTargets,
    JensenShannon,
    LogitHuber,
    LogitMSE,
    ReverseKL,
    SoftTargets,
    TotalVariation,
)
from keras_kd.losses.temperatures import CWSM, FLSW

__all__ = [
    "CWSM",
    "DIST",
    "FLSW",
    "FSP",
    "ICKD",
    "NST",
    "VID",
    "AttentionTransfer",
    "BinarySoftTargets",
    "DecoupledKD",
    "DistillationLoss",
    "FactorTransfer",
    "Hint",
    "JensenShannon",
    "LogitHuber",
    "LogitMSE",
    "ReverseKL",
    "ReviewKD",
    "SimKD",
    "SoftTargets",
    "TotalVariation",
]
