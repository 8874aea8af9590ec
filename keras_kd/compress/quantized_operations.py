"""Quantized layers without weights that are more than one operator in the file."""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_kd.compress.fake_quantize import swish
from keras_kd.compress.wrap import WeightWrapper
from keras_kd.typing import Tensor

MOST_POSITIONS = 64
"""Positions up to which a mean is computed as a product."""


def mean_of_rows(rows: Tensor) -> Tensor:
    """Mean over the last axis as a product with equal weights.

    Of `n` values TFLite's own mean is one integer off in `2 / n` of all cases (where XNNPACK does
    not compute it). Equal weights are all the largest integer, so the product is exact.

    Args:
        rows: Tensor `(rows, n)`.

    Returns:
        Tensor `(rows, 1)`.
    """
    size = rows.shape[-1]
    return ops.matmul(rows, ops.full((size, 1), 1.0 / size, dtype=rows.dtype))


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedSwish(WeightWrapper):
    """`x * sigmoid(x)` with the sigmoid in int8, since TFLite has no swish.

    Args:
        layer: `keras.layers.Activation` with swish.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def call(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Activate."""
        return swish(inputs, 8)


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedMean(WeightWrapper):
    """Global average pooling as an exact product, as `mean_of_rows` has it.

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
        mean = mean_of_rows(ops.reshape(inputs, (-1, size)))
        shape = [channels]
        if self.base.keepdims:
            ones = [1] * (rank - 2)
            shape = [channels, *ones] if first else [*ones, channels]
        return ops.reshape(mean, (-1, *shape))
