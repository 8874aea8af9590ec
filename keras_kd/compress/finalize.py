"""Back to a plain Keras model, and what has been done to it in words."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.compress.cluster import ClusteredLayer, zero_share
from keras_kd.compress.fake_quantize import FakeQuantize
from keras_kd.compress.fold import folded_weights, require_built, scale_and_shift
from keras_kd.compress.masking import masked_layers
from keras_kd.compress.prune import PrunedLayer
from keras_kd.compress.quantize import QUANTIZED, is_quantize_aware
from keras_kd.compress.quantized_layers import QuantizedLayer
from keras_kd.compress.quantized_sequences import _Stepwise
from keras_kd.compress.selection import require_graph
from keras_kd.compress.support import INT8_ACTIVATIONS, several_outputs, treatment
from keras_kd.compress.wrap import (
    WeightWrapper,
    base_layer,
    effective_weights,
    every_layer,
    kernels,
)
from keras_kd.graph import Graph, copy_built, is_graph, rebuild
from keras_kd.typing import Tensor


def finalize(model: keras.Model) -> keras.Model:
    """Make a plain Keras model with the final weights of a compressed one.

    Masks, clusters and rounded weights are written into layers of Keras's own classes, folded
    BatchNormalization into the weights before it. Zeros stay zeros. The outputs are those of
    `model`; of a quantization-aware model, those without the rounding of activations, which no
    layer of Keras does (export the quantization-aware model itself to keep its ranges).

    Args:
        model: Result of `quantize_aware`, `prune` or `cluster`, trained or not. It is not changed.

    Returns:
        New Functional model, not compiled, that loads without this package.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If its graph is not known.

    Examples:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> [type(layer).__name__ for layer in finalize(prune(model)).layers]
        ['InputLayer', 'Dense']
    """
    require_built(model)
    require_graph(model, "finalize")
    dropped: set[int] = set()

    def make(layer: Any, graph: Graph) -> Any:
        if isinstance(layer, FakeQuantize):
            dropped.add(id(layer))
            return keras.layers.Identity(name=layer.name)
        return baked(layer) if isinstance(layer, WeightWrapper) else copy_built(layer)

    def call(
        layer: Any, new: Any, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return args[0] if id(layer) in dropped else new(*args, **kwargs)

    return rebuild(model, make, call)


def baked(layer: WeightWrapper) -> Any:
    """A plain layer that computes what a wrapper does at inference.

    Args:
        layer: Built wrapper, such as a `PrunedLayer` or `QuantizedLayer`.

    Returns:
        Built layer of the innermost layer's class.
    """
    base = base_layer(layer)
    config = base.get_config()
    norm = layer.norm if isinstance(layer, QuantizedLayer) else None
    if norm is not None:
        config["use_bias"] = True
    if isinstance(layer, QuantizedLayer) and layer.activation is not None:
        config["activation"] = keras.activations.serialize(layer.activation)
    regularizer = layer.regularizer if isinstance(layer, QuantizedLayer) else None
    regularizer = regularizer or layer.activity_regularizer
    if regularizer is not None:
        config["activity_regularizer"] = keras.regularizers.serialize(regularizer)
    plain = type(base).from_config(config)
    plain.build_from_config(base.get_build_config())
    if norm is None:
        pairs = _final_pairs(layer)
        values = {id(v): ops.convert_to_numpy(t) for v, t in pairs}
        plain.set_weights(
            [values.get(id(v), ops.convert_to_numpy(v)).astype("float32") for v in base.weights]
        )
        return plain
    bias = folded_weights(base, norm)[-1]
    scale, _ = scale_and_shift(norm)
    scale = np.where(np.abs(scale) < 1e-6, 1e-6, scale).astype("float32")
    scaled = layer.quantized_pairs(False, ops.convert_to_tensor(scale))
    values = {id(v): ops.convert_to_numpy(t) for v, t in scaled}
    kept = [v for v in base.weights if not (base.use_bias and v is base.bias)]
    plain.set_weights([*(values.get(id(v), ops.convert_to_numpy(v)) for v in kept), bias])
    return plain


def _final_pairs(layer: WeightWrapper) -> list[tuple[Any, Tensor]]:
    if isinstance(layer, QuantizedLayer):
        return layer.quantized_pairs(False)
    if isinstance(layer, _Stepwise):
        return layer.rounded_pairs()
    return layer.effective(False)


def summary(model: keras.Model) -> str:
    """What was done to each layer, as a table of at most 80 columns.

    Args:
        model: Result of `quantize_aware`, `prune` or `cluster`, or a plain model, for which it says
            what `quantize_aware` would do.

    Returns:
        Lines of text: layer, weights, activations, remarks.

    Examples:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
        >>> "head" in summary(quantize_aware(model))
        True
    """
    require_built(model)
    require_graph(model, "summarize")
    rows = [("layer", "weights", "output", "remarks")]
    rows.extend(_rows(model, "", is_quantize_aware(model), masked_layers(model)))
    widths = [min(max(len(row[i]) for row in rows), most) for i, most in enumerate((28, 12, 6))]
    lines = []
    for row in rows:
        cells = [_cut(cell, width) for cell, width in zip(row[:3], widths, strict=True)]
        room = 80 - sum(widths) - 6
        parts = _wrap(row[3], room) or [""]
        lines.append("  ".join([*cells, parts[0]]).rstrip())
        lines.extend(" " * (80 - room) + part for part in parts[1:])
    lines.insert(1, "-" * 80)
    return "\n".join(lines)


def _rows(
    model: keras.Model, prefix: str, quantized: bool, masked: frozenset[int]
) -> list[tuple[str, str, str, str]]:
    graph = Graph(model)
    rows = []
    for name, layer in graph.layers.items():
        if isinstance(layer, (FakeQuantize, keras.layers.Identity)):
            continue
        path = prefix + name
        if is_graph(layer):
            rows.extend(_rows(layer, path + "/", quantized, masked))
            continue
        if isinstance(layer, keras.layers.InputLayer) or not quantized:
            row = _plain_row(path, layer, graph, quantized, masked)
        else:
            row = _quantized_row(path, layer, graph, masked)
        rows.append(row)
    return rows


def _plain_row(
    path: str, layer: Any, graph: Graph, quantized: bool, masked: frozenset[int]
) -> tuple[str, str, str, str]:
    if isinstance(layer, keras.layers.InputLayer):
        return path, "", _output(layer, graph) if quantized else "float", "input"
    chosen = treatment(layer, graph, masked)
    remarks = [*_remarks(layer), chosen.reason and f"stays float: {chosen.reason}"]
    return path, "float" if _weights(layer) else "", "float", "; ".join(filter(None, remarks))


def _quantized_row(
    path: str, layer: Any, graph: Graph, masked: frozenset[int]
) -> tuple[str, str, str, str]:
    output = _output(layer, graph)
    remarks = _remarks(layer)
    weights = "float" if _weights(layer) else ""
    if isinstance(layer, QUANTIZED):
        weights = (
            f"int{layer.weight_bits}" if isinstance(layer, (QuantizedLayer, _Stepwise)) else ""
        )
        if isinstance(layer, QuantizedLayer):
            kinds = {"channel" if axes else "tensor" for axes in layer.axes.values()}
            weights += "/" + "+".join(sorted(kinds))
            if layer.norm is not None:
                remarks.append(f"{layer.norm.name} folded in")
            reason = _activation_reason(layer)
            if reason:
                remarks.append(reason)
        if not isinstance(layer, QuantizedLayer):
            remarks.append("int8 inside")
        if several_outputs(layer):
            remarks.append("its several outputs stay float")
    else:
        chosen = treatment(layer, graph, masked)
        if chosen.kind == "float":
            remarks.append(f"stays float: {chosen.reason}")
        elif weights:
            remarks.append("stays float: left so by its annotation or by activation_bits=None")
    return path, weights, output, "; ".join(remarks)


def _activation_reason(layer: QuantizedLayer) -> str:
    """Why the activation of a quantized layer runs in float; empty if it does not."""
    if layer.activation is None or layer.activation_bits is None:
        return ""
    name = keras.activations.serialize(layer.activation)
    if not isinstance(name, str):
        return "its custom activation runs in float"
    return "" if name in INT8_ACTIVATIONS else f"activation {name} runs in float"


def _output(layer: Any, graph: Graph) -> str:
    """Whether what follows the layer is rounded, and to what width."""
    names = [layer.name]
    for _ in range(len(graph.layers)):
        readers = [r for name in names for r in graph.consumers[name] if r]
        found = [graph.layers[r] for r in readers if isinstance(graph.layers[r], FakeQuantize)]
        if found:
            return f"int{found[0].bits}"
        moving = [
            r
            for r in readers
            if isinstance(graph.layers[r], keras.layers.Identity)
            or treatment(graph.layers[r], graph).fusable
        ]
        if not moving:
            break
        names = moving
    producers = [graph.layers[p] for p in graph.producers[layer.name]]
    moves = treatment(layer, graph).kind in ("moves", "model")
    if moves and any(
        isinstance(p, FakeQuantize) or _output(p, graph) != "float" for p in producers
    ):
        return "int8"
    return "int8" if isinstance(base_layer(layer), keras.layers.Embedding) else "float"


def _remarks(layer: Any) -> list[str]:
    remarks = []
    inner = layer
    while isinstance(inner, WeightWrapper):
        if isinstance(inner, ClusteredLayer):
            remarks.append(f"{inner.clusters} clusters")
        if isinstance(inner, PrunedLayer):
            wanted = kernels(inner, inner.weight_names)
            values = {id(v): ops.convert_to_numpy(t) for v, t in effective_weights(inner, False)}
            size = sum(int(np.prod(v.shape)) for v in wanted)
            zeros = sum(int(np.sum(values[id(v)] == 0.0)) for v in wanted)
            remarks.append(f"{100.0 * zeros / max(size, 1):.0f} % zeros")
        inner = inner.layer
    return remarks


def _weights(layer: Any) -> bool:
    return bool(kernels(layer)) if isinstance(layer, keras.layers.Layer) else False


def _cut(text: str, width: int) -> str:
    return (text if len(text) <= width else "…" + text[-(width - 1) :]).ljust(width)


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def sparsity(model: keras.Model) -> float:
    """The fraction of a model's kernels that is zero, masks counted.

    Args:
        model: Built Keras model.

    Returns:
        Fraction from 0 to 1 over all kernels, weighted by size.
    """
    zeros = total = 0.0
    seen: set[int] = set()
    for _, layer in every_layer(model):
        if id(base_layer(layer)) in seen or isinstance(layer, keras.Model):
            continue
        seen.add(id(base_layer(layer)))
        for kernel in kernels(layer):
            size = int(np.prod(kernel.shape))
            total += size
            zeros += zero_share(layer, kernel) * size
    return zeros / max(total, 1.0)
