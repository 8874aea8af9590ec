"""Live values over time, balanced losses, and checkpoints that hold no teacher."""

from keras_kd.callbacks.annealing import (
    AlphaAnnealing,
    TemperatureAnnealing,
    TransferWeightAnnealing,
)
from keras_kd.callbacks.balancing import LossBalancing
from keras_kd.callbacks.checkpoint import StudentCheckpoint
from keras_kd.callbacks.resume import ResumableBackup

__all__ = [
    "AlphaAnnealing",
    "LossBalancing",
    "ResumableBackup",
    "StudentCheckpoint",
    "TemperatureAnnealing",
    "TransferWeightAnnealing",
]
