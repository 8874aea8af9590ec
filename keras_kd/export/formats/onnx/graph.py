"""Editing ONNX graphs: names, dimensions, leftovers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

from keras_kd.export.signature import Signature
from keras_kd.export.tensor_names import shorten, unique

if TYPE_CHECKING:
    import onnx


MOVERS = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "MaxPool"}
"""Operators whose output values are input values."""


def before_convolutions(graph: onnx.GraphProto, kind: str) -> list[str]:
    """Return the names of the operators of a kind whose values convolutions read as they are.

    Args:
        graph: An `onnx.GraphProto`.
        kind: Such as `"Gather"`.
    """
    producers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            source = producers.get(node.input[0])
            while source is not None and source.op_type in MOVERS:
                source = producers.get(source.input[0])
            if source is not None and source.op_type == kind:
                found.append(source.name)
    return found


def name_borders(model: onnx.ModelProto, signature: Signature, batch: int | None = None) -> None:
    """Give inputs and outputs their Keras names, and their first dimension the name `batch`.

    Args:
        model: An `onnx.ModelProto` whose inputs and outputs are in the signature's order.
        signature: Of the Keras model.
        batch: The first dimension, if it is fixed.
    """
    wanted = {}
    for entries, infos in (
        (model.graph.input, signature.inputs),
        (model.graph.output, signature.outputs),
    ):
        for entry, info in zip(entries, infos, strict=True):
            wanted[entry.name] = info.name
            dims = entry.type.tensor_type.shape.dim
            if len(dims) != len(info.shape):
                # tf2onnx lost the rank, as it does behind some loops.
                del dims[:]
                for _ in info.shape:
                    dims.add()
            for axis, (dim, size) in enumerate(zip(dims, info.shape, strict=True)):
                dim.Clear()
                if axis == 0 and batch is not None:
                    dim.dim_value = batch
                elif axis == 0:
                    dim.dim_param = "batch"
                elif size is None:
                    dim.dim_param = f"{info.name}_{axis}"
                else:
                    dim.dim_value = size
    inner = {name: f"{name}__inner" for name in set(wanted.values()) - set(wanted)}
    rename(model.graph, lambda name: wanted.get(name) or inner.get(name) or name)


def name_inside(model: onnx.ModelProto, layers: Collection[str]) -> None:
    """Name the inner tensors after the layers they come from, and drop what only takes space.

    Args:
        model: An `onnx.ModelProto`, changed in place.
        layers: Names of the Keras model's layers.
    """
    fixed = borders(model)
    mapping: dict[str, str] = {}
    used = set(fixed)
    shared = _order_constants(model.graph)
    for name in _tensors(model.graph):
        if name in fixed or name in mapping:
            continue
        mapping[name] = unique("const" if name in shared else shorten(name, layers), used)
    rename(model.graph, lambda name: mapping.get(name, name))
    strip(model)


def _order_constants(graph: onnx.GraphProto) -> set[str]:
    # tf2onnx merges equal constants in an order that differs from run to run, and with it the name
    # that is left: in the order of their use, shapes and axes all called alike, the same model
    # gives the same bytes. Returns the names of those.
    first: dict[str, int] = {}
    for inner in graphs(graph):
        for node in inner.node:
            for name in node.input:
                first.setdefault(name, len(first))
    ordered = sorted(graph.initializer, key=lambda entry: first.get(entry.name, len(first)))
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in ordered]
    del graph.initializer[:]
    graph.initializer.extend(copies)
    return {entry.name for entry in copies if entry.data_type in _WHOLE or sum(entry.dims) <= 1}


# onnx.TensorProto.DataType of integers of 32 and 64 bits.
_WHOLE = (6, 7)


def slim(model: onnx.ModelProto, keep: Collection[str]) -> None:
    """Shorten every name outside a set to a few letters, and drop what only takes space.

    Args:
        model: An `onnx.ModelProto`, changed in place.
        keep: Names that stay, besides those of inputs and outputs.
    """
    fixed = borders(model) | set(keep)
    mapping: dict[str, str] = {}
    for name in _tensors(model.graph):
        if name and name not in fixed and name not in mapping:
            mapping[name] = f"q{len(mapping)}"
    rename(model.graph, lambda name: mapping.get(name, name))
    strip(model)


def strip(model: onnx.ModelProto) -> None:
    """Sort the nodes; drop their names, notes, inferred shapes, what is unused."""
    sort(model)
    domains = set()
    for graph in graphs(model.graph):
        used = {name for node in graph.node for name in node.input}
        used |= {entry.name for entry in graph.output}
        used |= {name for inner in graphs(graph) for node in inner.node for name in node.input}
        kept = [entry for entry in graph.initializer if entry.name in used]
        if len(kept) < len(graph.initializer):
            copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
            del graph.initializer[:]
            graph.initializer.extend(copies)
        del graph.value_info[:]
        graph.doc_string = ""
        graph.name = "model"
        for node in graph.node:
            node.name = ""
            node.doc_string = ""
            domains.add(node.domain)
    for i in reversed(range(len(model.opset_import))):
        if model.opset_import[i].domain not in domains | {""}:
            del model.opset_import[i]
    del model.metadata_props[:]
    model.doc_string = ""
    model.producer_name, model.producer_version = "keras_kd", ""


def sort(model: onnx.ModelProto) -> None:
    """Put the nodes of every graph into an order in which each tensor is made before it is read.

    Args:
        model: An `onnx.ModelProto`, changed in place.
    """
    for graph in list(graphs(model.graph)):
        producers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
        needs = {
            i: {producers[name] for name in _read(node) if name in producers}
            for i, node in enumerate(graph.node)
        }
        if any(need >= i for i, row in needs.items() for need in row):
            copies = [type(node).FromString(node.SerializeToString()) for node in graph.node]
            del graph.node[:]
            graph.node.extend(copies[i] for i in TopologicalSorter(needs).static_order())


def _read(node: onnx.NodeProto) -> set[str]:
    """What a node reads, for itself and for the graphs inside it."""
    inner = (g for a in node.attribute for g in (a.g, *a.graphs) if g.node or g.output)
    return {*node.input, *(name for g in inner for part in graphs(g) for name in _used(part))}


def _used(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.input} | {e.name for e in graph.output}


def borders(model: onnx.ModelProto) -> set[str]:
    """Return the names of inputs and outputs."""
    return {entry.name for entry in (*model.graph.input, *model.graph.output)}


def rename(graph: onnx.GraphProto, new: Callable[[str], str]) -> None:
    """Rename all tensors of a graph and of the graphs inside it."""
    for inner in graphs(graph):
        for node in inner.node:
            node.input[:] = [new(name) for name in node.input]
            node.output[:] = [new(name) for name in node.output]
        for entries in (inner.input, inner.output, inner.value_info, inner.initializer):
            for entry in entries:
                entry.name = new(entry.name)


def graphs(graph: onnx.GraphProto) -> Iterator[Any]:
    """Yield a graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)
            for inner in attribute.graphs:
                yield from graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[str]:
    for inner in graphs(graph):
        for entry in (*inner.input, *inner.initializer):
            yield entry.name
        for node in inner.node:
            yield from (name for name in node.output if name)


def border_scales(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Return how the inputs and outputs of a quantized ONNX file map to integers.

    Args:
        model: An `onnx.ModelProto`.

    Returns:
        For each input that is quantized first, and each output that is dequantized last, `scale`,
        `zero_point` and `dtype`, with `real = (integer - zero_point) * scale`.
    """
    from onnx import numpy_helper

    constants = {entry.name: entry for entry in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    inputs = {entry.name for entry in model.graph.input}

    def origin(name: str) -> str:
        # Images are turned to channels first before they are quantized.
        while name in producers and producers[name].op_type in MOVERS:
            name = producers[name].input[0]
        return name

    borders = [
        (origin(node.input[0]), node)
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and origin(node.input[0]) in inputs
    ]
    for entry in model.graph.output:
        last = producers.get(origin(entry.name))
        if last is not None and last.op_type == "DequantizeLinear":
            borders.append((entry.name, last))
    found = {}
    for name, node in borders:
        if len(node.input) == 3 and all(part in constants for part in node.input[1:]):
            scale, zero = (numpy_helper.to_array(constants[part]) for part in node.input[1:])
            found[name] = {
                "scale": float(scale),
                "zero_point": int(zero),
                "dtype": zero.dtype.name,
            }
    return found
