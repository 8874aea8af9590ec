"""What quantization does with each kind of layer, and why some stay float."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras

from keras_kd.compress.fake_quantize import FIXED_RANGES
from keras_kd.compress.operators import PARTS, repeats, same_scale
from keras_kd.compress.quantized_layers import CHANNEL_AXES, FUSED_ACTIVATIONS
from keras_kd.compress.quantized_operations import MOST_POSITIONS
from keras_kd.models.graph import Graph
from keras_kd.models.weight_wrapper import base_layer

MOST_RECURRENT_STEPS = 64
"""Unrolled steps beyond which the file of a recurrent layer grows out of proportion."""

OBSERVED = {
    "Add",
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "InputLayer",
    "Matmul",
    "Mean",
    "Multiply",
    "Subtract",
}
"""Layers and operations with an int8 form whose output has a range of its own."""

ARITHMETIC = {"Add", "Subtract", "Multiply"}
"""Those into which TFLite fuses a ReLU, and which need two tensors."""

INT8_ACTIVATIONS = {
    "gelu",
    "hard_swish",
    "hard_silu",
    "leaky_relu",
    "linear",
    "log_softmax",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "softmax",
    "swish",
    "tanh",
}
"""Activations for which the converter has an int8 form."""

ACTIVATION_LAYERS = {
    "ReLU": "relu",
    "LeakyReLU": "leaky_relu",
    "Softmax": "softmax",
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Gelu": "gelu",
    "Silu": "silu",
    "HardSilu": "hard_silu",
    "LeakyRelu": "leaky_relu",
    "LogSoftmax": "log_softmax",
}


@dataclasses.dataclass(frozen=True)
class Treatment:
    """How a layer is quantized.

    Args:
        kind: `"weights"`, `"separable"`, `"embedding"`, `"affine"`, `"layer norm"`, `"attention"`,
            `"recurrent"`, `"activation"`, `"swish"`, `"mean"`, `"observed"`, `"moves"`,
            `"repeats"`, `"keeps"`, `"average"`, `"joins"`, `"model"` or `"float"`.
        reason: Why a layer stays float; empty otherwise.
        range: Range of the output that TFLite prescribes.
        fuses: Whether TFLite computes a ReLU after it in the same operator.
        fusable: Whether it is such a ReLU.
    """

    kind: str
    reason: str = ""
    range: tuple[float, float] | None = None
    fuses: bool = False
    fusable: bool = False


def treatment(layer: Any, graph: Graph, masked: frozenset[int] = frozenset()) -> Treatment:
    """How `quantize_aware` treats a layer or operation.

    Args:
        layer: Layer of the graph, wrapped (pruned, clustered) or not.
        graph: The graph it stands in.
        masked: The layers of the whole model that read a mask, from `masked_layers`.

    Returns:
        The treatment, with the reason where it is `"float"`.
    """
    base = base_layer(layer)
    kind = type(base).__name__
    if isinstance(base, keras.Model):
        return Treatment("model")
    keras_own = type(base).__module__.split(".")[0] == "keras"
    if not keras_own:
        return Treatment("float", "custom layer; annotate it to round its weights")
    if several_outputs(layer) and kind not in PARTS:
        return Treatment("float", "gives several tensors")
    config = base.get_config()
    if type(base) in CHANNEL_AXES:
        return _weighted(base, config)
    if type(base) in (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D):
        if layer is not base:
            return Treatment("float", "pruned or clustered separable convolution")
        activation = config["activation"]
        return Treatment(
            "separable",
            range=FIXED_RANGES.get(activation),
            fuses=activation == "linear",
        )
    if type(base) in _SPECIAL:
        return _SPECIAL[type(base)](base, config, layer.name, graph, id(base) in masked)
    if kind == "Activation" or kind in ACTIVATION_LAYERS:
        return _activation(base, kind, config)
    passes = same_scale(base)
    if passes == "keeps" and kind == "Pad" and _padded_with(graph, layer.name):
        # The constant has the input's scale, whose range must hold it.
        passes = "joins"
    if repeats(base):
        return Treatment("repeats")
    if passes:
        return Treatment(passes)
    if kind in OBSERVED:
        if kind in ARITHMETIC and not _tensors_only(graph, layer.name):
            return Treatment("float", "a constant operand has no int8 form; use Rescaling")
        if kind.startswith("GlobalAverage"):
            if id(base) in masked:
                return Treatment("float", "the mask makes it a weighted mean")
            if _few_positions(base, graph):
                return Treatment("mean")
        return Treatment("observed", fuses=kind in ARITHMETIC)
    return Treatment("float", f"no int8 form of {kind} is known")


def _weighted(layer: Any, config: dict[str, Any]) -> Treatment:
    if type(layer) is keras.layers.Embedding:
        return Treatment("embedding")
    if config.get("lora_rank"):
        return Treatment("float", "LoRA is enabled; merge it first")
    if not isinstance(layer.dtype_policy.name, str) or type(layer.dtype_policy) is not (
        keras.dtype_policies.DTypePolicy
    ):
        return Treatment("float", "its kernel is quantized by Keras already")
    activation = config["activation"]
    if not isinstance(activation, str):
        return Treatment("weights", "its custom activation runs in float")
    reason = ""
    if activation not in FUSED_ACTIVATIONS | INT8_ACTIVATIONS:
        reason = f"activation {activation} runs in float"
    return Treatment(
        "weights", reason, range=FIXED_RANGES.get(activation), fuses=activation == "linear"
    )


def _activation(layer: Any, kind: str, config: dict[str, Any]) -> Treatment:
    name = config.get("activation") if kind == "Activation" else ACTIVATION_LAYERS[kind]
    if not isinstance(name, str) or name not in INT8_ACTIVATIONS:
        shown = name if isinstance(name, str) else "a custom activation"
        return Treatment("float", f"{shown} has no int8 form in the converter")
    plain = True
    if kind == "ReLU":
        plain = config["max_value"] in (None, 6, 6.0) and not (
            config["negative_slope"] or config["threshold"]
        )
        if not plain:
            return Treatment("float", "this ReLU is no operator of TFLite")
    if name == "linear":
        return Treatment("moves")
    if kind in ("Softmax", "LogSoftmax") and config.get("axis", -1) != -1:
        return Treatment("float", "softmax over an axis other than the last")
    if name in ("silu", "swish") and isinstance(layer, keras.layers.Layer):
        return Treatment("swish")
    return Treatment("activation", range=FIXED_RANGES.get(name), fusable=name in ("relu", "relu6"))


def _affine(layer: Any, config: dict[str, Any], name: str, graph: Graph, masked: bool) -> Treatment:
    shape = graph.input_shape(name) or ()
    rank = len(shape) if graph.called_once(name) else 0
    if rank not in (2, 3, 4):
        return Treatment("float", "called more than once, or its input is not of rank 2 to 4")
    axis = config.get("axis", -1)
    axes = [axis] if isinstance(axis, int) else list(axis or [])
    if type(layer) is not keras.layers.Rescaling and [a % rank for a in axes] != [rank - 1]:
        return Treatment("float", "normalizes over another axis than the last")
    if config.get("invert") or not isinstance(shape[-1], int):
        return Treatment("float", "no int8 form of this normalization is known")
    if type(layer) is keras.layers.Rescaling and not all(
        isinstance(config[key], (int, float)) for key in ("scale", "offset")
    ):
        return Treatment("float", "rescales by arrays; use Normalization")
    return Treatment("affine", fuses=type(layer) is keras.layers.BatchNormalization)


def _layer_norm(
    layer: Any, config: dict[str, Any], name: str, graph: Graph, masked: bool
) -> Treatment:
    shape = graph.input_shape(name) or ()
    rank = len(shape) if graph.called_once(name) else 0
    axis = config["axis"]
    last = [a % rank for a in ([axis] if isinstance(axis, int) else axis)] if rank else []
    if rank not in (2, 3, 4) or last != [rank - 1]:
        return Treatment("float", "normalizes over other axes than the last")
    if config.get("rms_scaling"):
        return Treatment("float", "RMS scaling has no int8 form here")
    return Treatment("layer norm")


def _attention(
    layer: Any, config: dict[str, Any], name: str, graph: Graph, masked: bool
) -> Treatment:
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


def _recurrent(
    layer: Any, config: dict[str, Any], name: str, graph: Graph, masked: bool
) -> Treatment:
    if not graph.called_once(name):
        return Treatment("float", "called more than once")
    shape = graph.input_shape(name) or ()
    if len(shape) != 3 or shape[1] is None or graph.fixed_argument(name, "initial_state"):
        return Treatment("float", "its number of steps is not fixed, or it is given a state")
    steps = shape[1]
    if steps < 2:
        return Treatment("float", "a single step")
    if steps > MOST_RECURRENT_STEPS:
        return Treatment("float", f"unrolling {steps} steps; int8 up to {MOST_RECURRENT_STEPS}")
    if masked:
        return Treatment("float", "masks have no int8 form")
    usual = config["activation"] == "tanh" and config["recurrent_activation"] == "sigmoid"
    if not usual or not config.get("reset_after", True):
        return Treatment("float", "other activations than tanh and sigmoid, or reset_after=False")
    if config["stateful"]:
        return Treatment("float", "keeps its state")
    if config["dropout"] or config["recurrent_dropout"]:
        return Treatment("float", "has dropout inside; put a Dropout layer before it")
    return Treatment("recurrent")


_SPECIAL = {
    keras.layers.BatchNormalization: _affine,
    keras.layers.Rescaling: _affine,
    keras.layers.Normalization: _affine,
    keras.layers.LayerNormalization: _layer_norm,
    keras.layers.MultiHeadAttention: _attention,
    keras.layers.LSTM: _recurrent,
    keras.layers.GRU: _recurrent,
}


def several_outputs(layer: Any) -> bool:
    """Whether a layer or operation of a graph gives more than a single tensor."""
    return not isinstance(layer.output, keras.KerasTensor)


def _few_positions(layer: Any, graph: Graph) -> bool:
    shape = graph.input_shape(layer.name) if graph.called_once(layer.name) else None
    first = layer.data_format == "channels_first"
    sizes = (shape or (None,))[2:] if first else (shape or (None,))[1:-1]
    if not shape or None in shape[1:]:
        return False
    return 1 <= math.prod(int(size or 0) for size in sizes) <= MOST_POSITIONS


def _padded_with(graph: Graph, name: str) -> bool:
    """Whether a `Pad` is given something other than zero to pad with."""
    return any(
        any(value not in (None, 0, 0.0) for value in [*call["args"][1:], *call["kwargs"].values()])
        for call in graph.calls[name]
    )


def _tensors_only(graph: Graph, name: str) -> bool:
    """Whether all arguments of a call are tensors of the graph."""
    return all(_all_tensors(call["args"]) for call in graph.calls[name])


def _all_tensors(arguments: Any) -> bool:
    return all(
        _all_tensors(item) if isinstance(item, (list, tuple)) else isinstance(item, dict)
        for item in arguments
    )
