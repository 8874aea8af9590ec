"""ONNX matrix products with 4-bit weights, as ONNX Runtime's operator `MatMulNBits`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


BLOCK = 32
"""Weights of one column that share a scale; ONNX Runtime takes powers of two from 16."""


def pack_int4(model: onnx.ModelProto) -> int:
    """Replace `MatMul` by a constant matrix with `MatMulNBits`.

    ONNX Runtime's own tool needs one more package for what is a rounding and a packing.
    Convolutions have no such operator and stay as they are.

    Args:
        model: An `onnx.ModelProto`, changed in place.

    Returns:
        How many products were replaced.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    values = {entry.name: entry for entry in graph.initializer}
    count = 0
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in values:
            continue
        matrix = numpy_helper.to_array(values[node.input[1]])
        if matrix.ndim != 2 or matrix.dtype != np.float32:
            continue
        count += 1
        packed, scales = blocks(matrix)
        names = [f"{node.input[1]}__{node.output[0]}__{part}" for part in ("steps", "scales")]
        for name, array in zip(names, (packed, scales), strict=True):
            graph.initializer.append(numpy_helper.from_array(array, name))
        rows, columns = matrix.shape
        new = helper.make_node(
            "MatMulNBits",
            [node.input[0], *names],
            list(node.output),
            domain="com.microsoft",
            K=rows,
            N=columns,
            bits=4,
            block_size=BLOCK,
        )
        node.CopyFrom(new)
    if count and not any(entry.domain == "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return count


def blocks(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix to 4 bits, in blocks of `BLOCK` weights along each column.

    `q = round(w / s) + 8` in 0..15, `w' = (q - 8) s`. A column that lies on the grid of
    quantization-aware training, multiples of `max|w| / 7` of the column or of the matrix, keeps the
    scale it was trained with, and its values. In others `s = w_extreme / -8`, where `w_extreme` is
    the weight of largest magnitude in the block, so that it is met exactly.

    Args:
        matrix: `(rows, columns)`, float32.

    Returns:
        Steps `(columns, blocks, BLOCK / 2)`, two in a byte, the earlier one in the low half, and
        scales `(columns * blocks,)`.
    """
    rows, columns = matrix.shape
    count = -(-rows // BLOCK)
    padded = np.zeros((count * BLOCK, columns), np.float32)
    padded[:rows] = matrix
    parts = padded.T.reshape(columns, count, BLOCK)
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(axis=-1)[..., None], axis=-1)
    trained = _trained(matrix)
    scales = np.where(trained[:, None, None] > 0, trained[:, None, None], extreme / -8)
    steps = np.round(np.divide(parts, scales, out=np.zeros_like(parts), where=scales != 0)) + 8
    steps = np.clip(steps, 0, 15).astype(np.uint8)
    return steps[..., 0::2] | (steps[..., 1::2] << 4), scales.reshape(-1)


def _trained(matrix: np.ndarray) -> np.ndarray:
    # The step of each column `(columns,)` that lies on a 4-bit grid; 0 for the others.
    result = np.zeros(matrix.shape[1], np.float32)
    widest = np.abs(matrix).max(axis=0)
    # A column may be narrower than the matrix whose scale it was trained with.
    for limit in (np.broadcast_to(widest.max(), widest.shape), widest):
        scale = limit / np.float32(7)
        steps = np.divide(matrix, scale, out=np.zeros_like(matrix), where=scale > 0)
        fits = (np.abs(steps - np.round(steps)).max(axis=0) < 0.02) & (scale > 0)
        result = np.where(fits, scale, result)
    return result.astype(np.float32)
