"""Quantized layers without weights that are more than one operator in the file."""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_kd.compress.fake_quantize import swish
from keras_kd.compress.quantized import Quantized
from keras_kd.compress.tflite_rounding import where_run
from keras_kd.utils.types import Tensor

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
class QuantizedSwish(Quantized):
    """`x * sigmoid(x)` with the sigmoid in int8, since TFLite has no swish.

    Args:
        layer: `keras.layers.Activation` with swish.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    kind = "swish"

    def call(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Activate."""
        return swish(inputs, 8)


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedMean(Quantized):
    """Global average pooling as an exact product, as `mean_of_rows` has it.

    Args:
        layer: `keras.layers.GlobalAveragePooling1D` or `2D`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    kind = "mean"

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


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedRepeat(Quantized):
    """Each value several times over, as the resizing of an image to the nearest pixel.

    Keras repeats by TILE, whose int8 form is written in a version that LiteRT 2.3 does not have.

    Args:
        layer: `keras.layers.UpSampling1D`, `UpSampling2D` with `interpolation="nearest"`, or
            `RepeatVector`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    kind = "repeats"

    def call(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Repeat."""
        base = self.base
        return where_run(lambda: base(inputs), lambda: self._resized(inputs))

    def _resized(self, inputs: Tensor) -> Tensor:
        base, shape = self.base, inputs.shape
        if isinstance(base, keras.layers.RepeatVector):
            image = ops.reshape(inputs, (-1, 1, 1, shape[-1]))
            repeated = _nearest(image, 1, base.n)
            return ops.reshape(repeated, (-1, base.n, shape[-1]))
        if isinstance(base, keras.layers.UpSampling1D):
            return ops.squeeze(_nearest(ops.expand_dims(inputs, 1), 1, base.size), 1)
        if base.data_format == "channels_first":
            image = _nearest(ops.transpose(inputs, (0, 2, 3, 1)), *base.size)
            return ops.transpose(image, (0, 3, 1, 2))
        return _nearest(inputs, *base.size)


def _nearest(image: Tensor, rows: int, columns: int) -> Tensor:
    height, width = ops.shape(image)[1:3]
    return ops.image.resize(
        image,
        (height * rows, width * columns),
        interpolation="nearest",
        data_format="channels_last",
    )
