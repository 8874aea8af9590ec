"""What quantization does with each kind of layer, and why some stay float.

A layer with a class of its own in its place is that class's to judge, see `quantized`. What is
looked up by name here are Keras's operations, whose classes have no public name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras

from keras_kd.compress.fake_quantize import FIXED_RANGES
from keras_kd.compress.operators import INT8_ACTIVATIONS, PARTS, repeats, same_scale
from keras_kd.compress.quantized import BY_LAYER, Treatment
from keras_kd.compress.quantized_layers import CHANNEL_AXES, FUSED_ACTIVATIONS
from keras_kd.compress.quantized_operations import MOST_POSITIONS
from keras_kd.models.graph import Graph
from keras_kd.models.weight_wrapper import base_layer

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


def treatment(layer: keras.Layer, graph: Graph, masked: frozenset[int] = frozenset()) -> Treatment:
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
    own = BY_LAYER.get(type(base))
    keras_own = type(base).__module__.split(".")[0] == "keras"
    if not keras_own and own is None:
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
    if own is not None:
        return own.treat(base, config, layer.name, graph, id(base) in masked)
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


def _weighted(layer: keras.Layer, config: dict[str, Any]) -> Treatment:
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


def _activation(layer: keras.Layer, kind: str, config: dict[str, Any]) -> Treatment:
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


def several_outputs(layer: keras.Layer) -> bool:
    """Whether a layer or operation of a graph gives more than a single tensor."""
    return not isinstance(layer.output, keras.KerasTensor)


def _few_positions(layer: keras.Layer, graph: Graph) -> bool:
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


def _all_tensors(arguments: Iterable[object]) -> bool:
    return all(
        _all_tensors(item) if isinstance(item, (list, tuple)) else isinstance(item, dict)
        for item in arguments
    )
