"""What TFLite's files and kernels round besides weights and activations, computed in Keras.

Biases are 32-bit integers whose step is that of the input times that of the weights. Some kernels
round otherwise than to the nearest; what says so here stays out of graphs made for conversion,
which hold the operator alone.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_kd.utils.types import Tensor

_STATE = threading.local()

_DEVICES = ("CPU", "GPU")

_LEVELS = 127
"""Integers above zero that TFLite's weights have, whatever width they were trained for."""


@contextlib.contextmanager
def plain_rounding(*, onnx: bool = False) -> Iterator[None]:
    """Within it, graphs are traced without the rounding of TFLite's kernels.

    For conversion by others than TFLite's converter, which leaves it out by itself.

    Args:
        onnx: Whether the graph becomes ONNX, whose `QuantizeLinear` takes halves to the even
            integer: where halves are frequent, the graph moves them to where the model does.
    """
    before = getattr(_STATE, "plain", False), getattr(_STATE, "onnx", False)
    _STATE.plain, _STATE.onnx = True, onnx
    try:
        yield
    finally:
        _STATE.plain, _STATE.onnx = before


def when_run(plain: Tensor, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """`exact(plain)` where the model runs, `plain` in what is converted.

    On TensorFlow the choice is made by `DeviceIndex`, the operator by which a graph holds one
    implementation for each kind of device: it is known on CPU and GPU, while TFLite's converter
    (and XLA) take the last branch, the one for no device in particular.

    Args:
        plain: Tensor.
        exact: Gives a tensor of the same shape and dtype.

    Returns:
        Tensor of the same shape and dtype, with the gradient of `plain`.
    """
    if not rounds() or not for_tflite():
        return plain

    def run() -> Tensor:
        return plain + ops.stop_gradient(exact(plain) - plain)

    if keras.backend.backend() != "tensorflow":
        return run()
    import tensorflow as tf

    if tf.executing_eagerly():
        return run()
    index = tf.raw_ops.DeviceIndex(device_names=list(_DEVICES))
    return tf.switch_case(index, [run] * len(_DEVICES) + [lambda: tf.identity(plain)])


def for_tflite() -> bool:
    """Whether a graph traced now may be TFLite's: not one of `plain_rounding` or ONNX export."""
    return not getattr(_STATE, "plain", False) and not traced_for_onnx()


def where_run(run: Callable[[], Tensor], converted: Callable[[], Tensor]) -> Tensor:
    """One computation where the model runs, an equal one of other operators in what is converted.

    Args:
        run: Gives a tensor.
        converted: Gives the same tensor by operators that converters know how to translate. It is
            not run on CPU and GPU, where TensorFlow may have no kernels for it.

    Returns:
        The tensor.
    """
    if keras.backend.backend() != "tensorflow":
        return run()
    import tensorflow as tf

    if tf.executing_eagerly():
        return run()
    if not for_tflite():
        return converted()
    index = tf.raw_ops.DeviceIndex(device_names=list(_DEVICES))
    return tf.switch_case(index, [run] * len(_DEVICES) + [converted])


def as_float(values: Tensor) -> Tensor:
    """The identity, across which TFLite's converter hands on no scale.

    An operator whose tensors share one scale the converter makes int8 as soon as it knows the scale
    of one of them. Beyond `relu(x) - relu(-x)`, which is `x`, it knows none.

    Args:
        values: Tensor.

    Returns:
        The same values.
    """
    return where_run(
        lambda: ops.convert_to_tensor(values), lambda: ops.relu(values) - ops.relu(-values)
    )


@contextlib.contextmanager
def without_rounding() -> Iterator[None]:
    """Within it, models that are run eagerly round no activations."""
    before = getattr(_STATE, "exact", False)
    _STATE.exact = True
    try:
        yield
    finally:
        _STATE.exact = before


def rounds() -> bool:
    """Whether activations are rounded: everywhere but within `without_rounding`."""
    return not getattr(_STATE, "exact", False)


def traced_for_onnx() -> bool:
    """Whether `keras.Model.export(format="onnx")` is at work, which tells its layers nothing."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "export_onnx":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def rounded_twice(product: Tensor, factor: Tensor, step: Tensor) -> Tensor:
    """Shift a sum of products so that rounding it once gives what rounding twice gives.

    `BATCH_MATMUL` multiplies its 32-bit sum by `factor / step = m * 2**-k`, `m` in [0.5, 1),
    rounds, divides by `2**k` and rounds again, halves away from zero. The first rounding makes a
    half of what is less than `2**-(k + 1)` short of one; so much is added here.

    Args:
        product: Tensor, a product of dequantized values.
        factor: Product of the two steps, a scalar.
        step: Step that the product is rounded to, a scalar.

    Returns:
        Tensor of the same shape and dtype.
    """
    return when_run(product, lambda value: _moved_out(value, factor, step))


def _moved_out(value: Tensor, factor: Tensor, step: Tensor) -> Tensor:
    ratio = ops.cast(factor, "float32") / ops.cast(step, "float32")
    shift = ops.cast(step, "float32") * 2.0 ** ops.floor(ops.log2(ratio))
    return value + ops.sign(value) * ops.cast(shift, value.dtype)


def inverse_root(values: Tensor, input_step: Tensor, step: Tensor) -> Tensor:
    """Shift inverse roots so that rounding them once gives what `RSQRT` gives.

    The kernel rounds `2**20 / sqrt(q)` for the integer `q` to an integer, and multiplies that by
    `1 / (2**20 sqrt(input_step) step)`, which rounds twice. Where the largest value is that of
    `q = 1` its 255 steps make exact halves of the roots of 4, 36, 100.

    Args:
        values: Tensor, `1 / sqrt(q * input_step)`.
        input_step: Step of what the root is taken of, a scalar.
        step: Step that the values are rounded to, a scalar.

    Returns:
        Tensor of the same shape and dtype.
    """

    def exact(plain: Tensor) -> Tensor:
        unit = 2.0**-20 * ops.rsqrt(ops.cast(input_step, "float32"))
        whole = ops.round(ops.cast(plain, "float32") / unit) * unit
        return ops.cast(_moved_out(whole, unit, step), plain.dtype)

    return when_run(values, exact)


def halves_from_zero(values: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Move halves between two integers so that rounding takes them away from zero.

    `AVERAGE_POOL_2D` rounds halves away from the integer zero, as an int8 has it. A float mean may
    lie on either side of the half.

    Args:
        values: Tensor, means of dequantized values.
        low: Least value of the range, a scalar.
        step: Its step, a scalar.

    Returns:
        Tensor of the same shape and dtype.
    """

    def exact(means: Tensor) -> Tensor:
        zero = (128.0 - ops.round(-low / step)) * step
        out = ops.where(ops.cast(means, "float32") < zero, -1e-3 * step, 1e-3 * step)
        return means + ops.cast(out, means.dtype)

    return exact(values) if _becomes_onnx() else when_run(values, exact)


def halves_up(values: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Move halves between two integers so that rounding takes them up.

    `RESIZE_BILINEAR` does so in XNNPACK. A float sum may lie on either side of the half.

    Args:
        values: Tensor, means of dequantized values.
        low: Least value of the range, a scalar; it plays no part.
        step: Its step, a scalar.

    Returns:
        Tensor of the same shape and dtype.
    """

    def exact(means: Tensor) -> Tensor:
        return means + ops.cast(1e-3 * step, means.dtype)

    return exact(values) if _becomes_onnx() else when_run(values, exact)


def leaky(values: Tensor, input_step: Tensor, step: Tensor, slope: float) -> Tensor:
    """Round a leaky ReLU as XNNPACK's `LEAKY_RELU` does, whose factors have eight binary places.

    `q' = floor((m q + 128) / 256)` with `m = round(256 input_step / step)` for `q >= 0`, times the
    slope below: up to a step off at the ends of the range.

    Args:
        values: Tensor, the ReLU of dequantized values.
        input_step: Step of its input, a scalar.
        step: Step that the values are rounded to, a scalar.
        slope: Of the ReLU below zero, above 0.

    Returns:
        Tensor of the same shape and dtype.
    """

    def exact(plain: Tensor) -> Tensor:
        value = ops.cast(plain, "float32")
        number = ops.round(ops.where(value < 0, value / slope, value) / input_step)
        ratio = 256.0 * input_step / step
        factor = ops.where(value < 0, ops.round(slope * ratio), ops.round(ratio))
        return ops.cast(ops.floor((factor * number + 128.0) / 256.0) * step, plain.dtype)

    return when_run(values, exact)


def _becomes_onnx() -> bool:
    return rounds() and (getattr(_STATE, "onnx", False) or traced_for_onnx())


class ReadsIntegers:
    """Mixin for a layer that knows the step of the integers that come in.

    The step is that of the `FakeQuantize` from which the input came, through layers that only move
    values, when the layer was joined to a graph. It is the graph's, so no configuration holds it:
    a loaded model is joined anew.
    """

    _sources: tuple[Any, ...] = ()

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Join the layer to a graph, or run it."""
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, keras.KerasTensor):
            source = quantizer_behind(first)
            # Weak, or Keras would count another layer's weights as this one's.
            found = None if source is None else weakref.ref(source)
            if found not in self._sources:
                self._sources = (*self._sources, found)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @property
    def input_step(self) -> Tensor | None:
        """Step of the first input; None if unknown, or not the same at all places of use."""
        (source,) = self._sources if len(self._sources) == 1 else (None,)
        quantizer = None if source is None else source()
        return None if quantizer is None else quantizer.step


def quantizer_behind(tensor: Tensor) -> Any | None:
    """The `FakeQuantize` on whose grid a symbolic tensor lies.

    Args:
        tensor: `KerasTensor` of a graph.

    Returns:
        The layer from which the tensor came through layers that only move values; None if there is
        none.
    """
    operation = source_of(tensor)
    return operation if getattr(operation, "only_rounds", False) else None


def quantizer_before(tensor: Tensor) -> Any | None:
    """The `FakeQuantize` on whose grid the activation reads that made a symbolic tensor.

    Args:
        tensor: `KerasTensor` of a graph.

    Returns:
        The layer; None if there is none, or not a single one.
    """
    history = tensor._keras_history
    inner = getattr(history.operation, "linear_quantizer", None)
    if inner is not None:
        return inner
    given = history.operation._inbound_nodes[history.node_index].input_tensors
    return quantizer_behind(given[0]) if len(given) == 1 else None


def source_of(tensor: Tensor) -> Any:
    """The operation that made a symbolic tensor, looked at through those that only move values.

    Args:
        tensor: `KerasTensor` of a graph.

    Returns:
        Layer or operation.
    """
    from keras_kd.compress.operators import same_scale
    from keras_kd.models.weight_wrapper import base_layer

    while True:
        # The only place where Keras says which layer made a symbolic tensor.
        history = tensor._keras_history
        operation = history.operation
        if getattr(operation, "only_rounds", False):
            return operation
        if same_scale(base_layer(operation)) not in ("moves", "keeps", "average"):
            return operation
        inputs = operation._inbound_nodes[history.node_index].input_tensors
        if not inputs:
            return operation
        tensor = inputs[0]


def channel_steps(kernel: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The steps of a kernel's integers in the file.

    Args:
        kernel: Rounded kernel.
        axes: Axes that count output channels.

    Returns:
        Tensor `(channels,)`.
    """
    rank = len(kernel.shape)
    kept = {axis % rank for axis in axes}
    others = [axis for axis in range(rank) if axis not in kept]
    largest = ops.max(ops.abs(ops.cast(kernel, "float32")), axis=others)
    return ops.reshape(largest, (-1,)) / _LEVELS


def rounded_bias(bias: Tensor, input_step: Tensor | None, steps: Tensor) -> Tensor:
    """A bias as the integers that the file has for it.

    Args:
        bias: Tensor `(channels,)`.
        input_step: Scalar; None to leave the bias as it is.
        steps: Steps of the weights, `(channels,)`.

    Returns:
        Tensor like `bias`, with its gradient.
    """
    if input_step is None or not rounds():
        return bias
    step = ops.stop_gradient(ops.maximum(input_step * steps, 1e-30))
    value = ops.cast(ops.stop_gradient(bias), "float32")
    return bias + ops.cast(ops.round(value / step) * step - value, bias.dtype)
