"""Quantized layers without weights that are more than one operator in the file."""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_kd.compress.fake_quantize import FIXED_RANGES, fake_quantized
from keras_kd.compress.wrap import WeightWrapper
from keras_kd.typing import Tensor

MOST_POSITIONS = 64
"""Positions up to which a mean is computed as a product."""


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedSwish(WeightWrapper):
    """`x * sigmoid(x)` with the sigmoid in int8, since TFLite has no swish.

    Args:
        layer: `keras.layers.Activation` with swish.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def call(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Activate."""
        low, high = FIXED_RANGES["sigmoid"]
        return inputs * fake_quantized(ops.sigmoid(inputs), low, high, 8)


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedMean(WeightWrapper):
    """Global average pooling as a product with equal weights.

    Of `n` positions TFLite's own mean is one integer off in `2 / n` of all values (where XNNPACK
    does not compute it). Equal weights are all the largest integer, so the product is exact.

    Args:
        layer: `keras.layers.GlobalAveragePooling1D` or `2D`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def call(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Average over all positions."""
        first = self.base.data_format == "channels_first"
        rank = len(inputs.shape)
        if not first:
            inputs = ops.transpose(inputs, (0, rank - 1, *range(1, rank - 1)))
        channels, size = inputs.shape[1], math.prod(inputs.shape[2:])
        rows = ops.reshape(inputs, (-1, size))
        mean = ops.matmul(rows, ops.full((size, 1), 1.0 / size, dtype=rows.dtype))
        shape = [channels]
        if self.base.keepdims:
            ones = [1] * (rank - 2)
            shape = [channels, *ones] if first else [*ones, channels]
        return ops.reshape(mean, (-1, *shape))
