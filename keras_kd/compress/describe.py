"""What has been done to a model, in words."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_kd.compress.cluster import ClusteredLayer
from keras_kd.compress.fake_quantize import FakeQuantize
from keras_kd.compress.float_regions import FloatRegions
from keras_kd.compress.masking import masked_layers
from keras_kd.compress.observers import has_activation_quantization
from keras_kd.compress.operators import INT8_ACTIVATIONS
from keras_kd.compress.prune import PrunedLayer
from keras_kd.compress.quantize import is_quantize_aware
from keras_kd.compress.quantized import Quantized
from keras_kd.compress.quantized_layers import QuantizedLayer
from keras_kd.compress.quantized_model import FloatBorder
from keras_kd.compress.selection import require_graph
from keras_kd.compress.treatment import several_outputs
from keras_kd.models.folding import require_built
from keras_kd.models.graph import Graph, is_graph
from keras_kd.models.weight_wrapper import WeightWrapper, effective_weights, kernels


def summary(model: keras.Model) -> str:
    """What was done to each layer, as a table of at most 80 columns.

    Args:
        model: Result of `quantize_aware`, `prune` or `cluster`, or a plain model, for which it says
            what `quantize_aware` would do.

    Returns:
        Lines of text: layer, weights, activations, remarks.

    Raises:
        ValueError: If the model is not built, or its `call` is Python code.

    Examples:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
        >>> "head" in summary(quantize_aware(model))
        True
    """
    require_built(model)
    require_graph(model, "summarize")
    rows = [("layer", "weights", "output", "remarks")]
    regions = FloatRegions(model, masked_layers(model))
    # Of a model with rounded weights alone everything is computed in float.
    rounds = has_activation_quantization(model)
    rows.extend(_rows(model, "", is_quantize_aware(model), rounds, regions, True))
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
    model: keras.Model,
    prefix: str,
    quantized: bool,
    rounds: bool,
    regions: FloatRegions,
    outermost: bool,
) -> list[tuple[str, str, str, str]]:
    graph = Graph(model, outermost=outermost)
    rows = []
    for name, layer in graph.layers.items():
        if isinstance(layer, (FakeQuantize, FloatBorder, keras.layers.Identity)):
            continue
        path = prefix + name
        if is_graph(layer):
            rows.extend(_rows(layer, path + "/", quantized, rounds, regions, False))
        elif isinstance(layer, keras.layers.InputLayer):
            output = _output(layer, graph, regions) if quantized else "float"
            rows.append((path, "", output, "input"))
        elif quantized:
            rows.append(_quantized_row(path, layer, graph, rounds, regions))
        else:
            rows.append(_plain_row(path, layer, graph, regions))
    return rows


def _plain_row(
    path: str, layer: keras.Layer, graph: Graph, regions: FloatRegions
) -> tuple[str, str, str, str]:
    reason = regions.treatment(layer, graph).reason
    remarks = [*_remarks(layer), reason and f"stays float: {reason}"]
    return path, "float" if _weights(layer) else "", "float", "; ".join(filter(None, remarks))


def _quantized_row(
    path: str, layer: keras.Layer, graph: Graph, rounds: bool, regions: FloatRegions
) -> tuple[str, str, str, str]:
    output = _output(layer, graph, regions)
    remarks = _remarks(layer)
    weights = "float" if _weights(layer) else ""
    if isinstance(layer, Quantized):
        weights = f"int{layer.weight_bits}" if layer.weight_bits else ""
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
        elif rounds and not regions.reads_integers(layer):
            remarks.append("the file computes it in float, since its input is not rounded")
        return path, weights, output, "; ".join(remarks)
    chosen = regions.treatment(layer, graph)
    if chosen.kind == "float":
        remarks.append(f"stays float: {chosen.reason}")
    elif weights:
        remarks.append("stays float: left so by its annotation or by activation_bits=None")
    if output != "float" and (chosen.kind == "float" or weights):
        # What the layer gives is float; the integers come from an operator behind it.
        remarks[-1] += f" (rounded to {output} behind it)"
        output = "float"
    return path, weights, output, "; ".join(remarks)


def _activation_reason(layer: QuantizedLayer) -> str:
    """Why the activation of a quantized layer runs in float; empty if it does not."""
    if layer.activation is None or layer.activation_bits is None:
        return ""
    name = keras.activations.serialize(layer.activation)
    if not isinstance(name, str):
        return "its custom activation runs in float"
    return "" if name in INT8_ACTIVATIONS else f"activation {name} runs in float"


def _output(layer: keras.Layer, graph: Graph, regions: FloatRegions) -> str:
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
            if isinstance(graph.layers[r], (FloatBorder, keras.layers.Identity))
            or regions.treatment(graph.layers[r], graph).fusable
        ]
        if not moving:
            break
        names = moving
    return "int8" if regions.gives_integers(layer) else "float"


def _remarks(layer: keras.Layer) -> list[str]:
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
            rest = {v.name for v in kernels(inner)} - {v.name for v in wanted}
            remarks.extend(f"{name} dense" for name in sorted(rest))
        inner = inner.layer
    return remarks


def _weights(layer: keras.Layer) -> bool:
    return bool(kernels(layer)) if isinstance(layer, keras.layers.Layer) else False


def _cut(text: str, width: int) -> str:
    return (text if len(text) <= width else "…" + text[-(width - 1) :]).ljust(width)


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
