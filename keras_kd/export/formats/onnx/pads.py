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
