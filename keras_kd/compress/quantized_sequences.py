"""Layers of several products, quantized at each step: LayerNormalization, attention, LSTM and GRU."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_kd.compress.fake_quantize import FIXED_RANGES, FakeQuantize, quantized_weights
from keras_kd.compress.quantized_layers import per_channel_affine
from keras_kd.compress.wrap import WeightWrapper
from keras_kd.typing import Tensor


class _Stepwise(WeightWrapper):
    """A wrapper that computes the layer itself, with an observer after each step.

    Args:
        layer: Layer to compute.
        weight_bits: Integer width of the weights.
        activation_bits: Integer width of what stands between the steps.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    steps: tuple[str, ...] = ()

    def __init__(
        self, layer: Any, weight_bits: int = 8, activation_bits: int = 8, **kwargs: Any
    ) -> None:
        super().__init__(layer, **kwargs)
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.observers = [FakeQuantize(activation_bits, name=step) for step in self.steps]

    def observe(self, step: str, value: Tensor, training: bool | None) -> Tensor:
        """Quantize what a step gives with the step's own range."""
        return self.observers[self.steps.index(step)](value, training=training)

    def bounded(self, kind: str, value: Tensor) -> Tensor:
        """Apply softmax, sigmoid or tanh and quantize to the range TFLite prescribes."""
        quantize = FakeQuantize(self.activation_bits, fixed=FIXED_RANGES[kind])
        return quantize(keras.activations.get(kind)(value))

    def weight(self, variable: Any, values: dict[int, Tensor], shape: tuple[int, ...]) -> Tensor:
        """A kernel as a matrix, rounded with a step for each output."""
        value = values.get(id(variable))
        if value is None:
            value = ops.convert_to_tensor(variable)
        return quantized_weights(ops.reshape(value, shape), self.weight_bits, (-1,))

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
        }


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedLayerNormalization(_Stepwise):
    """LayerNormalization over the last axis, every intermediate value in int8.

    `y = gamma * (x - mean) / sqrt(variance) + beta`. The variance is bounded from below by its
    quantization step (and by `epsilon`) in place of adding `epsilon`, so that its integer is never
    zero.

    Args:
        layer: `keras.layers.LayerNormalization` with `axis=-1`.
        weight_bits: As elsewhere; gamma is exact at any width.
        activation_bits: Integer width of the intermediate values.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    steps = ("mean", "centered", "square", "variance", "inverse", "unit")

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Normalize."""
        layer = self.layer
        mean = self.observe("mean", ops.mean(inputs, axis=-1, keepdims=True), training)
        centered = self.observe("centered", inputs - mean, training)
        square = self.observe("square", centered * centered, training)
        variance = self.observe("variance", ops.mean(square, axis=-1, keepdims=True), training)
        high = self.observers[self.steps.index("variance")].maximum
        step = ops.convert_to_tensor(high) / (2**self.activation_bits - 1)
        floor = ops.cast(ops.stop_gradient(ops.maximum(step, layer.epsilon)), inputs.dtype)
        inverse = ops.rsqrt(ops.maximum(variance, floor))
        inverse = self.observe("inverse", inverse, training)
        unit = self.observe("unit", centered * inverse, training)
        if layer.gamma is None and layer.beta is None:
            return unit
        wide = ops.ones((inputs.shape[-1],), dtype=inputs.dtype)
        scale = wide if layer.gamma is None else ops.convert_to_tensor(layer.gamma)
        shift = wide * 0.0 if layer.beta is None else ops.convert_to_tensor(layer.beta)
        return per_channel_affine(unit, scale, shift)


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedAttention(_Stepwise):
    """MultiHeadAttention over the second of three axes, without masks, every product in int8.

    `softmax(Q K^T / sqrt(key_dim)) V`, projected; the factor is multiplied into the query's kernel.

    Args:
        layer: `keras.layers.MultiHeadAttention`, or a wrapper of it.
        weight_bits: Integer width of the four projections.
        activation_bits: Integer width of the intermediate values.
        **kwargs: Arguments of `keras.layers.Layer`.

    Reference:
        - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762), section 3.2
    """

    steps = ("query", "key", "value", "scores", "context")

    def __init__(
        self, layer: Any, weight_bits: int = 8, activation_bits: int = 8, **kwargs: Any
    ) -> None:
        super().__init__(layer, weight_bits, activation_bits, **kwargs)
        self.seeds = keras.random.SeedGenerator(self.base.get_config().get("seed"))

    def build(
        self,
        query_shape: Any,
        value_shape: Any,
        key_shape: Any | None = None,
    ) -> None:
        """Build the attention layer."""
        if not self.layer.built:
            self.layer.build(query_shape, value_shape, key_shape)

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        training: bool | None = None,
    ) -> Tensor:
        """Attend."""
        base = self.base
        config = base.get_config()
        heads, key_dim = config["num_heads"], config["key_dim"]
        values = {id(variable): tensor for variable, tensor in self.effective(training)}
        key = value if key is None else key

        def project(step: str, dense: Any, inputs: Tensor, factor: float = 1.0) -> Tensor:
            kernel = self.weight(dense.kernel, values, (inputs.shape[-1], -1)) * factor
            bias = None if dense.bias is None else ops.reshape(dense.bias, (-1,)) * factor
            outputs = self.observe(step, _matmul(inputs, kernel, bias), training)
            outputs = ops.reshape(outputs, (-1, *inputs.shape[1:-1], heads, dense.kernel.shape[-1]))
            return ops.transpose(outputs, (0, 2, 1, 3))

        queries = project("query", base.query_dense, query, 1.0 / math.sqrt(key_dim))
        keys = project("key", base.key_dense, key)
        contents = project("value", base.value_dense, value)
        scores = ops.matmul(queries, ops.transpose(keys, (0, 1, 3, 2)))
        weights = self.bounded("softmax", self.observe("scores", scores, training))
        if training and config["dropout"] > 0.0:
            weights = keras.random.dropout(weights, config["dropout"], seed=self.seeds)
        context = self.observe("context", ops.matmul(weights, contents), training)
        context = ops.transpose(context, (0, 2, 1, 3))
        context = ops.reshape(context, (-1, query.shape[1], heads * contents.shape[-1]))
        dense = base.output_dense
        kernel = self.weight(dense.kernel, values, (context.shape[-1], -1))
        return _matmul(context, kernel, dense.bias)

    def compute_mask(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Masks are not supported, so none goes on."""
        return None


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedRecurrent(_Stepwise):
    """LSTM or GRU over a fixed number of steps, unrolled, every product in int8.

    Args:
        layer: `keras.layers.LSTM` or `keras.layers.GRU` (or a wrapper of one) with tanh and
            sigmoid; the GRU with `reset_after=True`.
        weight_bits: Integer width of the kernels.
        activation_bits: Integer width of the intermediate values.
        **kwargs: Arguments of `keras.layers.Layer`.

    Reference:
        - [Hochreiter and Schmidhuber, 1997](https://doi.org/10.1162/neco.1997.9.8.1735)
        - [Cho et al., 2014](https://arxiv.org/abs/1406.1078)
    """

    steps = ("input", "recurrent", "gates", "new", "kept", "cell", "state")

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Run all steps."""
        base = self.base
        config = base.get_config()
        cell = base.cell
        values = {id(variable): tensor for variable, tensor in self.effective(training)}
        kernel = self.weight(cell.kernel, values, (inputs.shape[-1], -1))
        recurrent = self.weight(cell.recurrent_kernel, values, (config["units"], -1))
        lstm = type(base) is keras.layers.LSTM
        biases = (None, None)
        if config["use_bias"]:
            bias = ops.convert_to_tensor(cell.bias)
            biases = (bias, None) if lstm else (bias[0], bias[1])
        projected = self.observe("input", _matmul(inputs, kernel, biases[0]), training)
        order = range(inputs.shape[1])
        step = self._lstm if lstm else self._gru
        state: tuple[Tensor, ...] = ()
        outputs = []
        for index in reversed(order) if config["go_backwards"] else order:
            state = step(projected[:, index], state, recurrent, biases[1], training)
            outputs.append(state[0])
        return ops.stack(outputs, axis=1) if config["return_sequences"] else outputs[-1]

    def _lstm(
        self,
        inputs: Tensor,
        state: tuple[Tensor, ...],
        recurrent: Tensor,
        bias: Tensor | None,
        training: bool | None,
    ) -> tuple[Tensor, ...]:
        gates = inputs
        if state:
            past = self.observe("recurrent", ops.matmul(state[0], recurrent), training)
            gates = self.observe("gates", inputs + past, training)
        enter, forget, candidate, leave = ops.split(gates, 4, axis=-1)
        new = self.bounded("sigmoid", enter) * self.bounded("tanh", candidate)
        cell = self.observe("new", new, training)
        if state:
            kept = self.observe("kept", self.bounded("sigmoid", forget) * state[1], training)
            cell = kept + cell
        cell = self.observe("cell", cell, training)
        output = self.bounded("sigmoid", leave) * self.bounded("tanh", cell)
        return self.observe("state", output, training), cell

    def _gru(
        self,
        inputs: Tensor,
        state: tuple[Tensor, ...],
        recurrent: Tensor,
        bias: Tensor | None,
        training: bool | None,
    ) -> tuple[Tensor, ...]:
        past = state[0] if state else ops.zeros_like(inputs[:, : recurrent.shape[0]])
        product = ops.matmul(past, recurrent)
        product = self.observe("recurrent", product if bias is None else product + bias, training)
        update_in, reset_in, new_in = ops.split(inputs, 3, axis=-1)
        update_past, reset_past, new_past = ops.split(product, 3, axis=-1)
        update = self.bounded("sigmoid", self.observe("gates", update_in + update_past, training))
        reset = self.bounded("sigmoid", self.observe("gates", reset_in + reset_past, training))
        kept = self.observe("kept", reset * new_past, training)
        new = self.bounded("tanh", self.observe("new", new_in + kept, training))
        # update * past + (1 - update) * new, without the constant.
        change = self.observe("cell", update * self.observe("cell", past - new, training), training)
        return (self.observe("state", new + change, training),)


def _matmul(inputs: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A Dense layer's product as TFLite has it: the leading axes in one, bias before the reshape."""
    outputs = ops.matmul(ops.reshape(inputs, (-1, inputs.shape[-1])), kernel)
    outputs = outputs if bias is None else outputs + bias
    if len(inputs.shape) == 2:
        return outputs
    return ops.reshape(outputs, (-1, *inputs.shape[1:-1], kernel.shape[-1]))
