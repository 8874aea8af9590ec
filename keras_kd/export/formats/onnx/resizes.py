"""ONNX's `Resize` gives the sizes that it was made for, and its answers are rounded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def settle(model: onnx.ModelProto) -> None:
    """Mend factors by which a size comes out one too small.

    ONNX makes `floor(size * factor)` of a size, and tf2onnx writes the factor `wanted / size` as a
    32-bit float: of 6 and 5 it is 0.83333331, and 6 times that is 4.9999999. Interpolating ones
    become the next larger float, which moves nothing by more than a ten-millionth; those that take
    the nearest value give their sizes instead, for the same factor decides which one that is.

    Args:
        model: An `onnx.ModelProto`, changed in place.
    """
    import onnx
    from onnx import helper, numpy_helper

    found = [node for node in model.graph.node if node.op_type == "Resize" and _factors(node)]
    if not found:
        return
    known = _shapes(onnx.shape_inference.infer_shapes(_without_shapes(model)))
    values = {entry.name: entry for entry in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "Constant"}
    added: dict[str, list[Any]] = {}
    for number, node in enumerate(found):
        name, shape = node.input[2], known.get(node.input[0])
        if name in values:
            factors = numpy_helper.to_array(values[name])
        elif name in made:
            factors = numpy_helper.to_array(made[name].attribute[0].t)
        else:
            continue
        if shape is None or len(shape) != len(factors):
            continue
        wanted = [None if n is None else round(n * float(f)) for n, f in zip(shape, factors)]
        short = [n is not None and _size(n, f) != w for n, f, w in zip(shape, factors, wanted)]
        if not any(short):
            continue
        base = f"{node.output[0]}__resized_{number}"
        if interpolates(node):
            factors = np.where(short, np.nextafter(factors, np.float32(np.inf)), factors)
            model.graph.initializer.append(numpy_helper.from_array(factors, base))
            node.input[2] = base
            continue
        if None in wanted[1:]:
            continue
        node.input[2] = ""
        node.input.append(f"{base}_all")
        sizes = [np.array(wanted[1:], np.int64), np.array([0]), np.array([1])]
        if wanted[0] is not None:
            sizes = [np.array(wanted, np.int64)]
        names = (
            [f"{base}_{part}" for part in ("sizes", "from", "to")] if sizes[1:] else [f"{base}_all"]
        )
        for part, array in zip(names, sizes, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(array, part))
        if sizes[1:]:
            added[node.output[0]] = [
                helper.make_node("Shape", [node.input[0]], [f"{base}_shape"]),
                helper.make_node("Slice", [f"{base}_shape", *names[1:]], [f"{base}_first"]),
                helper.make_node("Concat", [f"{base}_first", names[0]], [f"{base}_all"], axis=0),
            ]
    _insert(model, added)


def interpolates(node: onnx.NodeProto) -> bool:
    """Whether a node resizes by computing values that were not there."""
    if node.op_type != "Resize":
        return False
    return any(entry.name == "mode" and entry.s != b"nearest" for entry in node.attribute)


def keep_rounding(model: onnx.ModelProto, floats: Any = None) -> int:
    """Let quantized values be interpolated as real numbers and rounded, as the file says.

    Between a `DequantizeLinear` and a `QuantizeLinear` of one scale, ONNX Runtime drops the two and
    interpolates bytes: 1.17 and 1.20 cut them off instead of rounding them, so that an image comes
    out half a step too dark. It leaves alone what is dequantized by a scale for each channel. All
    channels get the one that they have.

    Args:
        model: An `onnx.ModelProto`, changed in place.
        floats: The model before it was quantized, for shapes behind operators of ONNX Runtime.

    Returns:
        How many operators were kept from it.
    """
    import onnx
    from onnx import helper, numpy_helper

    rounded = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    found = [n for n in model.graph.node if interpolates(n) and n.output[0] in rounded]
    if not found:
        return 0
    known = {} if floats is None else _shapes(floats)
    known.update(_shapes(onnx.shape_inference.infer_shapes(_without_shapes(model))))
    values = {entry.name: entry for entry in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    added: dict[str, Any] = {}
    for number, node in enumerate(found):
        source = made.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        # So ONNX Runtime's tool calls what it quantized.
        names = (node.input[0], source.input[0].removesuffix("_quantized"))
        shape = next((known[name] for name in names if name in known), [])
        axis = next((i for i, size in enumerate(shape) if i and size is not None), None)
        ends = [values.get(name) for name in source.input[1:]]
        if axis is None or None in ends or len(ends) < 2:
            continue
        arrays = [numpy_helper.to_array(entry) for entry in ends]
        if any(array.size != 1 for array in arrays):
            continue
        base = f"{node.input[0]}__channels_{number}"
        both = [f"{base}_scale", f"{base}_zero"]
        for name, array in zip(both, arrays, strict=True):
            all_alike = np.full(shape[axis], array.reshape(()))
            model.graph.initializer.append(numpy_helper.from_array(all_alike, name))
        added[node.output[0]] = helper.make_node(
            "DequantizeLinear", [source.input[0], *both], [base], axis=axis
        )
        node.input[0] = base
    _insert(model, {name: [node] for name, node in added.items()})
    return len(added)


def _insert(model: onnx.ModelProto, added: dict[str, list[Any]]) -> None:
    """Put nodes before those that their name is an output of."""
    if added:
        ordered = [one for node in model.graph.node for one in (*added.get(_name(node), ()), node)]
        copies = [type(one).FromString(one.SerializeToString()) for one in ordered]
        del model.graph.node[:]
        model.graph.node.extend(copies)


def _name(node: onnx.NodeProto) -> str:
    return str(node.output[0])


def _factors(node: onnx.NodeProto) -> bool:
    return len(node.input) == 3 and bool(node.input[2])


def _size(size: int, factor: np.float32) -> int:
    # Of the exact product: in 32 bits it may be rounded to the whole number, and who checks or runs
    # the file is free to compute with more.
    return math.floor(size * float(factor))


def _without_shapes(model: onnx.ModelProto) -> Any:
    # What tf2onnx says of shapes contradicts the factors, and inference stops at that.
    copy = type(model).FromString(model.SerializeToString())
    del copy.graph.value_info[:]
    for entry in copy.graph.output:
        entry.type.tensor_type.ClearField("shape")
    return copy


def _shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    entries = (*model.graph.value_info, *model.graph.input)
    return {
        entry.name: [
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in entry.type.tensor_type.shape.dim
        ]
        for entry in entries
        if entry.type.tensor_type.HasField("shape")
    }
