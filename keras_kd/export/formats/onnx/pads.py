"""Padding of ONNX files that ONNX Runtime leaves as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def keep_zeros(model: onnx.ModelProto) -> int:
    """Let the greatest value be taken of padded zeros too, as the file says.

    ONNX Runtime from 1.20 to 1.31 makes a `Pad` with zeros part of the `MaxPool` behind it, which
    pads with nothing: where all values of a window are negative, the zero is lost. It leaves alone
    what is padded with another number, and the least normal one is as good as zero.

    Args:
        model: An `onnx.ModelProto`, changed in place.

    Returns:
        How many operators were kept from it.
    """
    from onnx import numpy_helper

    pooled = {node.input[0] for node in model.graph.node if node.op_type == "MaxPool"}
    values = {entry.name: entry for entry in model.graph.initializer}
    count = 0
    for node in model.graph.node:
        if node.op_type != "Pad" or node.output[0] not in pooled:
            continue
        if any(entry.name == "mode" and entry.s != b"constant" for entry in node.attribute):
            continue
        given = node.input[2] if len(node.input) > 2 else ""
        if given and (given not in values or numpy_helper.to_array(values[given]).any()):
            continue
        name = f"{node.output[0]}__least"
        least = np.array(np.finfo(np.float32).tiny, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(least, name))
        if len(node.input) > 2:
            node.input[2] = name
        else:
            node.input.append(name)
        count += 1
    return count


def end_transposed(model: onnx.ModelProto) -> int:
    """Say what a transposed convolution has beyond its sums as padding of the output.

    tf2onnx writes it as a negative padding, half of it at the start, which ONNX does not allow and
    which TensorFlow has at the end alone: where strides are longer than the kernel, and for
    `output_padding`.

    Args:
        model: An `onnx.ModelProto`, changed in place.

    Returns:
        How many operators were changed.
    """
    from onnx import helper

    count = 0
    for node in model.graph.node:
        pads = next((a for a in node.attribute if a.name == "pads"), None)
        if node.op_type != "ConvTranspose" or pads is None or min(pads.ints) >= 0:
            continue
        half = len(pads.ints) // 2
        totals = [a + b for a, b in zip(pads.ints[:half], pads.ints[half:], strict=True)]
        more = [max(-total, 0) for total in totals]
        for axis in range(half):
            if more[axis]:
                pads.ints[axis] = pads.ints[axis + half] = 0
        node.attribute.append(helper.make_attribute("output_padding", more))
        count += 1
    return count


def count_groups(model: onnx.ModelProto) -> int:
    """Say how many groups the convolutions over volumes have, which tf2onnx takes for one.

    Args:
        model: An `onnx.ModelProto`, changed in place.

    Returns:
        How many operators were changed.
    """
    import onnx

    kernels = {entry.name: entry.dims for entry in model.graph.initializer if len(entry.dims) == 5}
    nodes = [n for n in model.graph.node if n.op_type == "Conv" and n.input[1] in kernels]
    if not nodes:
        return 0
    known = onnx.shape_inference.infer_shapes(model).graph
    shapes = {e.name: e.type.tensor_type.shape.dim for e in (*known.input, *known.value_info)}
    count = 0
    for node in nodes:
        dims, width = shapes.get(node.input[0], ()), kernels[node.input[1]][1]
        channels = dims[1].dim_value if len(dims) == 5 else 0
        group = next((a for a in node.attribute if a.name == "group"), None)
        if group is None or group.i != 1 or channels <= width or channels % width:
            continue
        group.i = channels // width
        count += 1
    return count
