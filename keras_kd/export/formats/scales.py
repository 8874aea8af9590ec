"""The scales in a quantized file: those of its inputs, and those that no arithmetic survives."""

from __future__ import annotations

import math

from keras_kd.export.rows import BadScale

LEAST = 1e-30
"""The smallest scale that is taken for one: products of two smaller ones vanish in float32, and
calibration gives such a scale to what was 0 in all samples."""

SHOWN = 10


def bad_scale(tensor: str, scale: float) -> BadScale:
    """Return the row of a scale with which nothing can be computed."""
    return BadScale(tensor, f"{scale:.3g}", math.isfinite(scale))


def broken(scale: float) -> bool:
    """Whether no arithmetic survives the scale of a tensor that is computed."""
    return not math.isfinite(scale) or scale < LEAST
