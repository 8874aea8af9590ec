"""Why XNNPACK, with which LiteRT runs a file by default, does not take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MOST = 2.0**8
"""What the sum of an operator must be multiplied by less than, for integers of its output."""

_PRODUCTS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"}
"""Operators that XNNPACK's delegate takes over before it looks at that; others it leaves."""


def refused(model: Path | bytes, error: BaseException) -> str | None:
    """Say which operators have scales that XNNPACK does not take; `None` where it is not that.

    Args:
        model: The file, or its bytes.
        error: What LiteRT raised.
    """
    if "XNNPack" not in str(error) and "XNNPACK" not in str(error):
        return None
    from ai_edge_litert.tools import flatbuffer_utils

    found = []
    if isinstance(model, bytes):
        content = flatbuffer_utils.read_model_from_bytearray(bytearray(model))
    else:
        content = flatbuffer_utils.read_model(str(model))
    for graph in content.subgraphs:
        for operator in graph.operators or []:
            kind = flatbuffer_utils.opcode_to_name(content, operator.opcodeIndex) or "CUSTOM"
            name = graph.tensors[operator.outputs[0]].name.decode()
            factor = _factor(graph, operator, kind) if kind in _PRODUCTS else 0.0
            if factor >= _MOST:
                found.append(
                    f"`{kind}` at `{name}` multiplies its sums by {factor:.3g}, and XNNPACK takes "
                    f"less than {_MOST:g}"
                )
    if not found:
        return (
            "XNNPACK, with which LiteRT runs files by default, does not take it "
            f"({' '.join(str(error).split())[:150]})"
        )
    return (
        f"LiteRT cannot run it: {'; '.join(found[:3])}. Its scales are of very different size: "
        "scale the inputs outside the model, or keep that layer float"
    )


def _factor(graph: Any, operator: Any, kind: str) -> float:
    """What the sum of an operator is multiplied by for integers of its output; 0 of floats."""
    made = _scale(graph.tensors[operator.outputs[0]])
    given = [_scale(graph.tensors[index]) if index >= 0 else 0.0 for index in operator.inputs]
    # A transposed convolution reads its shape first.
    pair = given[1:3] if kind == "TRANSPOSE_CONV" else given[:2]
    return pair[0] * pair[1] / made if made and len(pair) == 2 else 0.0


def _scale(tensor: Any) -> float:
    """The greatest scale of a tensor; 0 without any."""
    scales = None if tensor.quantization is None else tensor.quantization.scale
    return 0.0 if scales is None or not len(scales) else float(max(scales))
