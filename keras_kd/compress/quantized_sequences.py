"""Layers quantized at each step: LayerNormalization, attention, LSTM and GRU."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_kd.compress.cluster import is_clustered
from keras_kd.compress.fake_quantize import (
    FIXED_RANGES,
    FakeQuantize,
    bounded,
    quantized_weights,
)
from keras_kd.compress.quantized import Quantized, Treatment
from keras_kd.compress.quantized_layers import per_channel_affine
from keras_kd.compress.quantized_operations import mean_of_rows
from keras_kd.compress.tflite_rounding import (
    ReadsIntegers,
    channel_steps,
    inverse_root,
    rounded_bias,
    rounded_twice,
    rounds,
)
from keras_kd.models.graph import Graph
from keras_kd.models.weight_wrapper import base_layer, kernels
from keras_kd.utils.types import Tensor

MOST_STEPS = 64
"""Unrolled steps beyond which the file of a recurrent layer grows out of proportion."""


class _Stepwise(ReadsIntegers, Quantized):
    """A wrapper that computes the layer itself, with an observer after each step.

    Args:
        layer: Layer to compute.
        weight_bits: Integer width of the weights.
        activation_bits: Integer width of what stands between the steps.
        steps: Names of the steps, where the class has none for all its layers.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    takes_widths = True

    steps: tuple[str, ...] = ()
    """Names of the steps, each with a range of its own."""

    seconds: tuple[str, ...] = ()
    """Those that are the second factor of a product of two activations."""

    def __init__(
        self,
        layer: keras.Layer,
        weight_bits: int = 8,
        activation_bits: int = 8,
        steps: tuple[str, ...] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(layer, **kwargs)
        self.weight_bits: int = weight_bits
        self.activation_bits = activation_bits
        if steps is not None:
            self.steps = steps
        self.observers = [
            FakeQuantize(
                activation_bits, uneven=step in self.seconds, name=step, dtype=self.dtype_policy
            )
            for step in self.steps
        ]

    def observer(self, step: str) -> FakeQuantize:
        """What rounds the values of a step."""
        return self.observers[self.steps.index(step)]

    def observe(
        self, step: str, value: Tensor, training: bool | None, seen: Tensor | None = None
    ) -> Tensor:
        """Quantize what a step gives with the step's own range, which follows `seen` if given."""
        observer = self.observer(step)
        if seen is not None and (training or observer.calibrating):
            observer.follow(seen)
        return observer(value, training=training, observe=seen is None)

    def observe_product(
        self, step: str, value: Tensor, training: bool | None, factors: tuple[str, str]
    ) -> Tensor:
        """Quantize a product of two quantized tensors as TFLite's kernel does.

        Args:
            step: Name of the step.
            value: The product.
            training: As in `call`; in training it is rounded to the nearest.
            factors: The two tensors: names of steps, or of a bounded activation.
        """
        observer = self.observer(step)
        if not training and not observer.calibrating:
            one, other = (self._step_size(name) for name in factors)
            value = rounded_twice(value, one * other, observer.step)
        return self.observe(step, value, training)

    def _step_size(self, name: str) -> Any:
        if name in self.steps:
            return self.observer(name).step
        low, high = FIXED_RANGES[name]
        return (high - low) / (2**self.activation_bits - 1)

    def bounded(self, kind: str, value: Tensor) -> Tensor:
        """Apply softmax, sigmoid or tanh and quantize to the range TFLite prescribes."""
        return bounded(kind, value, self.activation_bits)

    def weight(
        self, variable: keras.Variable, values: dict[int, Tensor], shape: tuple[int, ...]
    ) -> Tensor:
        """A kernel as a matrix, rounded with a step for each output."""
        value = values.get(id(variable))
        if value is None:
            value = ops.convert_to_tensor(variable)
        # Shared values stay as few as they are with one step for all.
        limit = ops.max(ops.abs(value)) if is_clustered(self.layer) else None
        return quantized_weights(ops.reshape(value, shape), self.weight_bits, (-1,), limit)

    def bias(self, bias: Tensor | None, input_step: Tensor, matrix: Tensor) -> Tensor | None:
        """A bias as the file has it, behind a matrix whose inputs have the given step."""
        if bias is None or is_clustered(self.layer):
            return bias
        return rounded_bias(bias, input_step, channel_steps(matrix, (-1,)))

    def matrix_shape(self, variable: keras.Variable) -> tuple[int, int]:
        """The shape in which a kernel is a matrix `(inputs, outputs)`."""
        return int(variable.shape[0]), -1

    def final_pairs(self) -> list[tuple[Any, Tensor]]:
        """The kernels and what they are rounded to at inference."""
        values = {id(variable): tensor for variable, tensor in self.effective(False)}
        return [
            (v, ops.reshape(self.weight(v, values, self.matrix_shape(v)), v.shape))
            for v in kernels(self.layer)
        ]

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

    `y = x * a + b` with `a = gamma / sigma`, `b = beta - gamma * mean / sigma` and
    `sigma**2 = |x - mean|**2 / n` over the `n` values of a row. Mean, `a` and `b` are products with
    constants and the sum of squares is a product of the row with itself, so that all of them add
    up in 32 bits and only `x * a` and `y` are rounded at full range. The sum is bounded from below
    by its quantization step (and by `n * epsilon`) in place of adding `epsilon`, so that its
    integer is never zero.

    Args:
        layer: `keras.layers.LayerNormalization` with `axis=-1`.
        weight_bits: As elsewhere; gamma is exact at any width.
        activation_bits: Integer width of the intermediate values.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    kind = "layer norm"
    stands_for = (keras.layers.LayerNormalization,)
    steps = ("mean", "centered", "energy", "inverse", "offset", "scale", "scaled", "shift")
    seconds = ("centered",)

    @classmethod
    def treat(
        cls, layer: keras.Layer, config: dict[str, Any], name: str, graph: Graph, masked: bool
    ) -> Treatment:
        """As in `Quantized`."""
        shape = graph.input_shape(name) or ()
        rank = len(shape) if graph.called_once(name) else 0
        axis = config["axis"]
        last = [a % rank for a in ([axis] if isinstance(axis, int) else axis)] if rank else []
        if rank not in (2, 3, 4) or last != [rank - 1]:
            return Treatment("float", "normalizes over other axes than the last")
        if config.get("rms_scaling"):
            return Treatment("float", "RMS scaling has no int8 form here")
        return Treatment("layer norm")

    def call(  # type: ignore[override]
        self, inputs: Tensor, training: bool | None = None
    ) -> Tensor:
        """Normalize."""
        layer, size = self.layer, inputs.shape[-1]
        rows = ops.reshape(inputs, (-1, size))
        mean = self.observe("mean", mean_of_rows(rows), training)
        centered = self.observe("centered", rows - mean, training)
        energy = ops.matmul(
            ops.reshape(centered, (-1, 1, size)), ops.reshape(centered, (-1, size, 1))
        )
        energy = ops.reshape(energy, (-1, 1))
        varies = energy > 0.0
        energy = self.observe_product("energy", energy, training, ("centered", "centered"))
        high = self.observer("energy").maximum
        step = ops.convert_to_tensor(high) / (2**self.activation_bits - 1) if rounds() else 0.0
        floor = ops.stop_gradient(ops.maximum(step, size * layer.epsilon))
        inverse = ops.rsqrt(ops.maximum(energy, ops.cast(floor, rows.dtype)))
        # A constant row, such as padding, has no deviation; its bound would widen the range of all.
        seen = ops.where(varies, inverse, ops.zeros_like(inverse))
        observer = self.observer("inverse")
        if rounds() and not training and not observer.calibrating:
            inverse = inverse_root(inverse, step, observer.step)
        inverse = self.observe("inverse", inverse, training, seen)
        offset = self.observe("offset", mean * inverse, training)
        wide = ops.full((1, size), math.sqrt(size), dtype=rows.dtype)
        gamma = wide if layer.gamma is None else wide * layer.gamma
        scale = self.observe("scale", ops.matmul(inverse, gamma), training)
        shift = ops.matmul(offset, -gamma)
        if layer.beta is not None:
            beta = ops.convert_to_tensor(layer.beta)
            shift = shift + self.bias(beta, self._step_size("offset"), gamma)
        shift = self.observe("shift", shift, training)
        outputs = self.observe("scaled", rows * scale, training) + shift
        shape = tuple(inputs.shape[1:])
        if None in shape:
            shape = tuple(ops.shape(inputs)[1:])
        return ops.reshape(outputs, (-1, *shape))


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

    kind = "attention"
    stands_for = (keras.layers.MultiHeadAttention,)
    steps = ("query", "key", "value", "scores", "context")
    seconds = ("key", "value")

    def __init__(
        self, layer: keras.Layer, weight_bits: int = 8, activation_bits: int = 8, **kwargs: Any
    ) -> None:
        super().__init__(layer, weight_bits, activation_bits, **kwargs)
        self.seeds = keras.random.SeedGenerator(self.base.get_config().get("seed"))

    @classmethod
    def treat(
        cls, layer: keras.Layer, config: dict[str, Any], name: str, graph: Graph, masked: bool
    ) -> Treatment:
        """As in `Quantized`."""
        if not graph.called_once(name):
            return Treatment("float", "called more than once")
        call = graph.calls[name][0]
        given = {key for key, value in call["kwargs"].items() if value not in (None, False)}
        if given - {"value", "key", "query"} or masked:
            return Treatment("float", "masks and returned scores have no int8 form")
        if len(call["args"]) + len(given) > 3:
            return Treatment("float", "masks have no int8 form")
        shape = graph.input_shape(name) or ()
        if len(shape) != 3 or None in shape[1:]:
            return Treatment("float", "its length is not fixed, or it attends over other axes")
        return Treatment("attention")

    def call(  # type: ignore[override]
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

        def project(
            step: str,
            dense: keras.Layer,
            inputs: Tensor,
            factor: float = 1.0,
            bias: Tensor | None = None,
        ) -> Tensor:
            kernel = self.weight(dense.kernel, values, (inputs.shape[-1], -1)) * factor
            bias = self.bias(bias, self.input_step, kernel)
            outputs = self.observe(step, _matmul(inputs, kernel, bias), training)
            outputs = ops.reshape(outputs, (-1, *inputs.shape[1:-1], heads, dense.kernel.shape[-1]))
            return ops.transpose(outputs, (0, 2, 1, 3))

        factor = 1.0 / math.sqrt(key_dim)
        bias = base.query_dense.bias
        bias = None if bias is None else ops.reshape(bias, (-1,)) * factor
        queries = project("query", base.query_dense, query, factor, bias)
        # The key's bias adds the same to all scores of a query, which softmax takes away; the
        # value's goes through unchanged, since the weights of a query sum to one. Without them
        # the two ranges are narrower.
        bias = base.key_dense.bias
        # In training it takes part as zero, or Keras would warn of a weight without a gradient.
        bias = ops.reshape(bias, (-1,)) * 0.0 if training and bias is not None else None
        keys = project("key", base.key_dense, key, bias=bias)
        contents = project("value", base.value_dense, value)
        scores = ops.matmul(queries, ops.transpose(keys, (0, 1, 3, 2)))
        scores = self.observe_product("scores", scores, training, ("query", "key"))
        weights = self.bounded("softmax", scores)
        if training and config["dropout"] > 0.0:
            weights = keras.random.dropout(weights, config["dropout"], seed=self.seeds)
        context = ops.matmul(weights, contents)
        context = self.observe_product("context", context, training, ("softmax", "value"))
        context = ops.transpose(context, (0, 2, 1, 3))
        context = ops.reshape(context, (-1, query.shape[1], heads * contents.shape[-1]))
        dense = base.output_dense
        kernel = self.weight(dense.kernel, values, (context.shape[-1], -1))
        bias = dense.bias
        if base.value_dense.bias is not None:
            passed = ops.reshape(base.value_dense.bias, (1, -1))
            passed = ops.reshape(ops.matmul(passed, kernel), (-1,))
            bias = passed if bias is None else passed + bias
        return _matmul(context, kernel, self.bias(bias, self._step_size("context"), kernel))

    def matrix_shape(self, variable: keras.Variable) -> tuple[int, int]:
        """The output kernel has its two inputs, heads and values, in front."""
        if variable is self.base.output_dense.kernel:
            return -1, int(variable.shape[-1])
        return super().matrix_shape(variable)

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

    kind = "recurrent"
    stands_for = (keras.layers.LSTM, keras.layers.GRU)

    def __init__(
        self, layer: keras.Layer, weight_bits: int = 8, activation_bits: int = 8, **kwargs: object
    ) -> None:
        steps: tuple[str, ...] = (
            "input",
            "recurrent",
            "gates",
            "new",
            "kept",
            "distance",
            "cell",
            "state",
        )
        if type(base_layer(layer)) is keras.layers.LSTM:
            steps = tuple(step for step in steps if step != "distance")
        super().__init__(layer, weight_bits, activation_bits, steps=steps, **kwargs)

    @classmethod
    def treat(
        cls, layer: keras.Layer, config: dict[str, Any], name: str, graph: Graph, masked: bool
    ) -> Treatment:
        """As in `Quantized`."""
        if not graph.called_once(name):
            return Treatment("float", "called more than once")
        shape = graph.input_shape(name) or ()
        if len(shape) != 3 or shape[1] is None or graph.fixed_argument(name, "initial_state"):
            return Treatment("float", "its number of steps is not fixed, or it is given a state")
        steps = shape[1]
        if steps < 2:
            return Treatment("float", "a single step")
        if steps > MOST_STEPS:
            return Treatment("float", f"unrolling {steps} steps; int8 up to {MOST_STEPS}")
        if masked:
            return Treatment("float", "masks have no int8 form")
        usual = config["activation"] == "tanh" and config["recurrent_activation"] == "sigmoid"
        if not usual or not config.get("reset_after", True):
            return Treatment(
                "float", "other activations than tanh and sigmoid, or reset_after=False"
            )
        if config["stateful"]:
            return Treatment("float", "keeps its state")
        if config["dropout"] or config["recurrent_dropout"]:
            return Treatment("float", "has dropout inside; put a Dropout layer before it")
        return Treatment("recurrent")

    def call(  # type: ignore[override]
        self, inputs: Tensor, training: bool | None = None
    ) -> Tensor:
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
            biases = (
                self.bias(biases[0], self.input_step, kernel),
                self.bias(biases[1], self._step_size("state"), recurrent),
            )
        projected = self.observe("input", _matmul(inputs, kernel, biases[0]), training)
        order = range(inputs.shape[1])
        step = self._lstm if lstm else self._gru
        state: tuple[Tensor, ...] = ()
        outputs = []
        seen: dict[str, list[Tensor]] = {name: [] for name in self.steps}
        for index in reversed(order) if config["go_backwards"] else order:
            state = step(projected[:, index], state, recurrent, biases[1], seen)
            outputs.append(state[0])
        for observer in self.observers:
            # A range holds for all time steps, so it follows all of them at once.
            if seen[observer.name] and (training or observer.calibrating):
                observer.follow(ops.concatenate(seen[observer.name], axis=-1))
        return ops.stack(outputs, axis=1) if config["return_sequences"] else outputs[-1]

    def _held(self, name: str, value: Tensor, seen: dict[str, list[Tensor]]) -> Tensor:
        """Quantize with the range as it is, and note the value for its next move."""
        seen[name].append(value)
        return self.observer(name)(value, observe=False)

    def _lstm(
        self,
        inputs: Tensor,
        state: tuple[Tensor, ...],
        recurrent: Tensor,
        bias: Tensor | None,
        seen: dict[str, list[Tensor]],
    ) -> tuple[Tensor, ...]:
        gates = inputs
        if state:
            past = self._held("recurrent", ops.matmul(state[0], recurrent), seen)
            gates = self._held("gates", inputs + past, seen)
        enter, forget, candidate, leave = ops.split(gates, 4, axis=-1)
        new = self.bounded("sigmoid", enter) * self.bounded("tanh", candidate)
        cell = self._held("new", new, seen)
        if state:
            kept = self._held("kept", self.bounded("sigmoid", forget) * state[1], seen)
            cell = self._held("cell", kept + cell, seen)
        output = self.bounded("sigmoid", leave) * self.bounded("tanh", cell)
        return self._held("state", output, seen), cell

    def _gru(
        self,
        inputs: Tensor,
        state: tuple[Tensor, ...],
        recurrent: Tensor,
        bias: Tensor | None,
        seen: dict[str, list[Tensor]],
    ) -> tuple[Tensor, ...]:
        update_in, reset_in, new_in = ops.split(inputs, 3, axis=-1)
        if not state:
            # Of a state of zeros only the biases are left, and they go in as exact 1x1 products:
            # a sum with a constant has no int8 form.
            biases = [None] * 3 if bias is None else ops.split(bias, 3)
            update = self._gate(update_in, biases[0], seen)
            new_past = None
            if bias is not None:
                reset = self._gate(reset_in, biases[1], seen)
                new_past = per_channel_affine(reset, biases[2], ops.zeros_like(biases[2]))
                new_past = self._held("kept", new_past, seen)
            new = new_in if new_past is None else new_in + new_past
            new = self.bounded("tanh", self._held("new", new, seen))
            change = self._held("cell", update * new, seen)
            return (self._held("state", new - change, seen),)
        past = state[0]
        product = ops.matmul(past, recurrent)
        product = self._held("recurrent", product if bias is None else product + bias, seen)
        update_past, reset_past, new_past = ops.split(product, 3, axis=-1)
        update = self.bounded("sigmoid", self._held("gates", update_in + update_past, seen))
        reset = self.bounded("sigmoid", self._held("gates", reset_in + reset_past, seen))
        kept = self._held("kept", reset * new_past, seen)
        new = self.bounded("tanh", self._held("new", new_in + kept, seen))
        # update * past + (1 - update) * new, without the constant.
        distance = self._held("distance", past - new, seen)
        change = self._held("cell", update * distance, seen)
        return (self._held("state", new + change, seen),)

    def _gate(self, inputs: Tensor, bias: Tensor | None, seen: dict[str, list[Tensor]]) -> Tensor:
        if bias is not None:
            inputs = per_channel_affine(inputs, ops.ones_like(bias), bias)
            inputs = self._held("gates", inputs, seen)
        return self.bounded("sigmoid", inputs)


def _matmul(inputs: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A Dense layer's product as TFLite has it: leading axes in one, bias before the reshape."""
    outputs = ops.matmul(ops.reshape(inputs, (-1, inputs.shape[-1])), kernel)
    outputs = outputs if bias is None else outputs + bias
    if len(inputs.shape) == 2:
        return outputs
    return ops.reshape(outputs, (-1, *inputs.shape[1:-1], kernel.shape[-1]))
