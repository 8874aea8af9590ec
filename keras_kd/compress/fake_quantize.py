"""Rounding to integers that gradients pass through, for weights and for activations."""

from __future__ import annotations

import weakref
from typing import Any

import keras
from keras import ops

from keras_kd.compress.tflite_rounding import (
    halves_from_zero,
    halves_up,
    leaky,
    quantizer_before,
    rounds,
    traced_for_onnx,
)
from keras_kd.utils.types import Shape, Tensor

FIXED_RANGES = {
    "log_softmax": (-255.0 / 16.0, 0.0),
    "softmax": (0.0, 255.0 / 256.0),
    "sigmoid": (0.0, 255.0 / 256.0),
    "tanh": (-1.0, 127.0 / 128.0),
}
"""Ranges that TFLite prescribes for the int8 output of an operator: scale 1/16, 1/256, 1/128."""


def quantized_weights(
    weights: Tensor, bits: int = 8, axes: tuple[int, ...] = (), limit: Tensor | None = None
) -> Tensor:
    """Round weights to a symmetric integer grid; the gradient passes as if nothing had happened.

    `step = max|w| / (2**(bits-1) - 1)`, `w' = round(w / step) * step`, with the maximum taken for
    each channel. Zero stays zero and the largest weight keeps its value.

    Args:
        weights: Float tensor of any shape.
        bits: Integer width, 2 to 8.
        axes: Axes that count channels, each with its own step; empty for one step in all.
        limit: Tensor that broadcasts against `weights` and takes the place of `max|w|`.

    Returns:
        Tensor of the shape and dtype of `weights`.

    Examples:
        >>> import numpy as np
        >>> float(quantized_weights(np.array([0.5, 1.0], "float32"), bits=2)[1])
        1.0

    Reference:
        - [Jacob et al., 2018](https://arxiv.org/abs/1712.05877), section 3
        - [Bengio et al., 2013](https://arxiv.org/abs/1308.3432), straight-through estimator
    """
    weights = ops.convert_to_tensor(weights)
    levels = 2 ** (bits - 1) - 1
    value = ops.cast(ops.stop_gradient(weights), "float32")
    if limit is None:
        rank = len(value.shape)
        kept = {axis % rank for axis in axes}
        others = [axis for axis in range(rank) if axis not in kept]
        limit = ops.max(ops.abs(value), axis=others, keepdims=True)
    # A channel pruned away has no largest weight; any step rounds its zeros to zero.
    step = ops.maximum(ops.stop_gradient(limit), 1e-12) / levels
    rounded = ops.clip(ops.round(value / step), -levels, levels) * step
    # Plain arithmetic and no fake quantization operator: on constants the TFLite converter folds
    # it, for every kind of kernel, while it fails on the operator per channel for Dense.
    return weights + ops.cast(rounded - value, weights.dtype)


@keras.saving.register_keras_serializable(package="keras_kd")
class FakeQuantize(keras.layers.Layer):
    """Round activations to the integers of a range that follows the data.

    In training the range follows the minimum and maximum of each batch,
    `m' = momentum * m + (1 - momentum) * min(x)`, starting from the first batch, and always holds
    zero. `x' = round((clip(x) - zero) / step) * step + zero` with `step = (max - min) / (2**bits -
    1)`. The gradient is 1 within the range and 0 outside.

    Args:
        bits: Integer width, 2 to 16.
        momentum: Weight of the past in the moving range, 0 to 1.
        fixed: Pair `(minimum, maximum)` of a range that never moves; None to follow the data.
        uneven: Whether zero is kept off the middle integer. It picks the kernel: XNNPACK takes a
            product of two activations only if the second has its zero there, and rounds once where
            all others round twice.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Float tensor of any shape. Integer tensors pass unchanged.
        training: Whether the range follows this batch.
        observe: False to quantize with the range as it is, also in training.
        halves: Which way halves go at inference, for means of few integers, among which halves are
            frequent: `"out"` from the integer zero, as in TFLite's pooling; `"up"`, as in its
            resizing; None for the nearest even or odd, as it comes.
        slope: Of the leaky ReLU that gives the values, which XNNPACK rounds in its own way; None
            for others.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ValueError: If `bits`, `momentum` or `fixed` is out of range.

    Examples:
        >>> layer = FakeQuantize(bits=2, fixed=(0.0, 3.0))
        >>> [float(v) for v in layer([0.4, 1.2, 9.0])]
        [0.0, 1.0, 3.0]

    Reference:
        - [Jacob et al., 2018](https://arxiv.org/abs/1712.05877), section 3
    """

    only_rounds = True
    """Taps look through the layer for what made the values."""

    def __init__(
        self,
        bits: int = 8,
        momentum: float = 0.99,
        fixed: tuple[float, float] | None = None,
        uneven: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(bits, int) or not 2 <= bits <= 16:
            raise ValueError(f"`bits` must be an integer from 2 to 16. Received: bits={bits!r}.")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(
                f"`momentum` must lie in [0, 1), e.g. 0.99. Received: momentum={momentum!r}."
            )
        if fixed is not None and not fixed[0] <= 0.0 <= fixed[1] > fixed[0]:
            raise ValueError(
                "`fixed` must be a pair (minimum, maximum) that holds zero. "
                f"Received: fixed={fixed!r}."
            )
        self.bits = bits
        self.momentum = momentum
        self.fixed = None if fixed is None else (float(fixed[0]), float(fixed[1]))
        self.uneven = uneven
        self.supports_masking = True
        # What the leaky ReLU before it reads: known in a graph, in which a loaded one is put anew.
        self._read: tuple[Any, ...] = ()
        self.calibrating = False
        self.built = True
        if self.fixed is None:
            # -6 and 6, the range before any data, is that of ReLU6 on both sides.
            self.minimum = self._state("minimum", -6.0)
            self.maximum = self._state("maximum", 6.0)
            self.seen = self._state("observer_seen", 0.0)
            self.frozen = self._state("observer_frozen", 0.0)

    def _state(self, name: str, value: float) -> Any:
        return self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(value),
            trainable=False,
            autocast=False,
            dtype="float32",
            aggregation="mean",
            name=name,
        )

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Join the layer to a graph, or run it."""
        if kwargs.get("slope") and args and isinstance(args[0], keras.KerasTensor):
            found = quantizer_before(args[0])
            reference = None if found is None else weakref.ref(found)
            if reference not in self._read:
                self._read = (*self._read, reference)
        return super().__call__(*args, **kwargs)

    def call(
        self,
        inputs: Tensor,
        training: bool | None = None,
        observe: bool = True,
        halves: str | None = None,
        slope: float | None = None,
    ) -> Tensor:
        """Quantize, after following the batch where training."""
        if not rounds() or "float" not in keras.backend.standardize_dtype(inputs.dtype):
            return inputs
        if self.fixed is not None:
            low, high = self.fixed
            return fake_quantized(inputs, low, high, self.bits)
        low, high = ops.convert_to_tensor(self.minimum), ops.convert_to_tensor(self.maximum)
        if observe and (training or self.calibrating):
            low, high = self.follow(inputs)
        if halves and not training and not self.calibrating:
            shift = halves_from_zero if halves == "out" else halves_up
            inputs = shift(inputs, low, self.step)
        if slope and not training and not self.calibrating:
            (source,) = self._read if len(self._read) == 1 else (None,)
            quantizer = None if source is None else source()
            if quantizer is not None and self.bits == 8:
                inputs = leaky(inputs, quantizer.step, self.step, slope)
        # Two quantization steps at least: a constant zero has no range.
        return fake_quantized(inputs, low, ops.maximum(high, low + 1e-6), self.bits)

    def follow(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Move the range towards that of a batch, unless it is frozen; calibrating, widen it to.

        Args:
            inputs: Float tensor of any shape.

        Returns:
            The new minimum and maximum, scalars.
        """
        low, high = ops.convert_to_tensor(self.minimum), ops.convert_to_tensor(self.maximum)
        values = ops.cast(ops.stop_gradient(inputs), "float32")
        batch_low = ops.minimum(ops.min(values), 0.0)
        batch_high = ops.maximum(ops.max(values), 0.0)
        first = ops.convert_to_tensor(self.seen) == 0.0
        # The range before any data is worth nothing, and calibration is asked for: no hold on them.
        held = ops.logical_and(ops.convert_to_tensor(self.frozen) > 0.0, ops.logical_not(first))
        frozen = ops.logical_and(held, not self.calibrating)
        if self.calibrating:
            # The data is read once, so the range is that of all of it.
            next_low, next_high = ops.minimum(low, batch_low), ops.maximum(high, batch_high)
        else:
            next_low = self.momentum * low + (1.0 - self.momentum) * batch_low
            next_high = self.momentum * high + (1.0 - self.momentum) * batch_high
        low = ops.where(frozen, low, ops.where(first, batch_low, next_low))
        high = ops.where(frozen, high, ops.where(first, batch_high, next_high))
        if self.uneven:
            # A hundredth more moves zero by more than one integer.
            width = ops.maximum(high - low, 1e-6)
            middle = ops.abs(-low / width * (2**self.bits - 1) - 2 ** (self.bits - 1)) < 0.51
            high = ops.where(middle, high + 0.01 * width, high)
        self.minimum.assign(low)
        self.maximum.assign(high)
        self.seen.assign(ops.ones(()))
        return low, high

    @property
    def step(self) -> Tensor:
        """The distance between neighboring integers, a scalar."""
        if self.fixed is not None:
            return ops.convert_to_tensor((self.fixed[1] - self.fixed[0]) / (2**self.bits - 1))
        low, high = ops.convert_to_tensor(self.minimum), ops.convert_to_tensor(self.maximum)
        return ops.maximum(high - low, 1e-6) / (2**self.bits - 1)

    def limits(self) -> tuple[float, float]:
        """The range in force, as Python numbers."""
        if self.fixed is not None:
            return self.fixed
        return float(self.minimum), float(self.maximum)

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """That of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "bits": self.bits,
            "momentum": self.momentum,
            "fixed": self.fixed,
            "uneven": self.uneven,
        }


def fake_quantized(inputs: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """`keras.quantizers.fake_quant_with_min_max_vars` with a range that takes no gradient.

    Args:
        inputs: Float tensor.
        low: Scalar, not above 0.
        high: Scalar, above `low`.
        bits: Integer width.

    Returns:
        Tensor of the same shape and dtype.
    """
    if not rounds():
        return inputs
    low, high = (
        ops.stop_gradient(ops.convert_to_tensor(value, "float32")) for value in (low, high)
    )
    if traced_for_onnx():
        return _in_arithmetic(inputs, low, high, bits)
    # On TensorFlow this is the operator from which the TFLite converter reads the range.
    return keras.quantizers.fake_quant_with_min_max_vars(inputs, low, high, num_bits=bits)


def _in_arithmetic(inputs: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The same rounding without an operator that says so.

    Where ONNX Runtime sees a float kernel between quantized activations it rounds that kernel to
    8 bits by itself, with one step for all channels, and multiplies it by instructions that
    saturate in 16 bits on processors without VNNI. Plain arithmetic stays in float everywhere.
    """
    levels = 2.0**bits - 1.0
    step = (high - low) / levels
    zero = ops.clip(ops.floor(0.5 - low / step), 0.0, levels)
    bottom = -zero * step
    values = ops.clip(ops.cast(inputs, "float32"), bottom, (levels - zero) * step)
    # Halves go up, as in the operator.
    steps = ops.floor((values - bottom) / step + 0.5)
    return ops.cast((steps - zero) * step, inputs.dtype)


def bounded(kind: str, inputs: Tensor, bits: int) -> Tensor:
    """Apply softmax, sigmoid or tanh and quantize to the range that TFLite prescribes.

    Args:
        kind: A key of `FIXED_RANGES`.
        inputs: Float tensor.
        bits: Integer width.

    Returns:
        Tensor of the same shape and dtype.
    """
    low, high = FIXED_RANGES[kind]
    return fake_quantized(keras.activations.get(kind)(inputs), low, high, bits)


def swish(inputs: Tensor, bits: int) -> Tensor:
    """`x * sigmoid(x)` as a quantized sigmoid and a product, since TFLite has no swish."""
    return inputs * bounded("sigmoid", inputs, bits)
