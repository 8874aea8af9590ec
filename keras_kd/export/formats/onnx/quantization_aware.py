"""ONNX graphs of quantization-aware models: weights and biases as integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.formats.onnx.exact_products import fits, rounded
from keras_kd.export.formats.onnx.graph import MOVERS

if TYPE_CHECKING:
    import onnx


# Steps on each side of zero that training with 8, 7, ... 2 bits leaves.
_LIMITS = tuple(2 ** (bits - 1) - 1 for bits in range(8, 1, -1))

_CHANNEL = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}


def quantize_on_grid(model: onnx.ModelProto) -> int:
    """Store weights that lie on the grid of 2 to 8 bits as integers behind `DequantizeLinear`.

    A channel with largest magnitude `m` lies on the grid of `b` bits if all of its weights are
    multiples of `m / (2**(b - 1) - 1)`. Its values do not change. They are signed where their
    products fit 16 bits, see `onnx_exact`, which those of 3 to 7 bits always do, else unsigned
    around 128. Biases of operators whose input
    is dequantized too become 32-bit integers with the scale `input scale * weight scale`, which is
    what integer kernels add.

    Args:
        model: An `onnx.ModelProto` with its activations between `QuantizeLinear` and
            `DequantizeLinear`, changed in place.

    Returns:
        How many weights were stored as integers.
    """
    graph = model.graph
    values = {entry.name: entry for entry in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    count = 0
    before: list[tuple[Any, list[Any]]] = []
    for node in graph.node:
        axis = channel_axis(node)
        if axis is None or len(node.input) < 2 or node.input[1] not in values:
            continue
        weights = _array(values[node.input[1]])
        scale = _grid(weights, axis)
        if scale is None:
            continue
        count += 1
        added = [_weights(graph, node, weights, scale, axis)]
        if len(node.input) > 2 and node.input[2] in values:
            step = _input_scale(producers.get(node.input[0]), producers, values)
            if step is not None:
                added.append(_bias(graph, node, _array(values[node.input[2]]), step * scale))
        before.append((node, added))
    _insert(graph, before)
    return count


def channel_axis(node: onnx.NodeProto) -> int | None:
    """The axis of the second input that counts outputs; `None` for operators without weights."""
    if node.op_type == "Gemm":
        transposed = any(a.name == "transB" and a.i == 1 for a in node.attribute)
        return 0 if transposed else 1
    return _CHANNEL.get(node.op_type)


def _grid(weights: np.ndarray, axis: int) -> np.ndarray | None:
    if weights.dtype != np.float32 or weights.ndim < 2:
        return None
    others = tuple(i for i in range(weights.ndim) if i != axis % weights.ndim)
    widest = np.abs(weights).max(axis=others)
    for limit in _LIMITS:
        # A channel without weights is on every grid.
        scale = np.where(widest > 0, widest / limit, 1.0).astype(np.float32)
        steps = weights / _along(scale, axis, weights.ndim)
        if np.abs(steps - np.round(steps)).max() < 0.02:
            return scale
    return None


def _weights(
    graph: onnx.GraphProto, node: onnx.NodeProto, weights: np.ndarray, scale: np.ndarray, axis: int
) -> Any:
    axis %= weights.ndim
    steps = rounded(weights, _along(scale, axis, weights.ndim))
    zero = np.zeros(scale.shape, np.int8)
    if not fits(steps, axis):
        # Unsigned around 128, since signed products would saturate on x86 without VNNI.
        steps, zero = ((values.astype(np.int16) + 128).astype(np.uint8) for values in (steps, zero))
    return _dequantize(graph, node, 1, steps, scale, zero, axis)


def _bias(graph: onnx.GraphProto, node: onnx.NodeProto, bias: np.ndarray, scale: np.ndarray) -> Any:
    steps = np.clip(np.round(bias / scale), -(2**31), 2**31 - 1).astype(np.int32)
    return _dequantize(graph, node, 2, steps, scale, np.zeros(scale.shape, np.int32), 0)


def _dequantize(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    position: int,
    steps: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    axis: int,
) -> Any:
    from onnx import helper, numpy_helper

    # Several operators may share one weight; each gets a copy under its own name.
    base = f"{node.input[position]}__{node.output[0]}"
    names = [f"{base}__{part}" for part in ("steps", "scale", "zero")]
    for name, array in zip(names, (steps, scale.astype(np.float32), zero), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    node.input[position] = f"{base}__value"
    return helper.make_node("DequantizeLinear", names, [f"{base}__value"], axis=axis)


def _input_scale(
    producer: onnx.NodeProto, producers: dict[str, Any], values: dict[str, Any]
) -> np.ndarray | None:
    while producer is not None and producer.op_type in MOVERS:
        producer = producers.get(producer.input[0])
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return _array(values[producer.input[1]]) if producer.input[1] in values else None


def _along(scale: np.ndarray, axis: int, rank: int) -> np.ndarray:
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)


def _array(entry: onnx.TensorProto) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(entry)


def _insert(graph: onnx.GraphProto, before: list[tuple[Any, list[Any]]]) -> None:
    # Nodes stay in an order in which every tensor is made before it is used.
    added = {node.output[0]: nodes for node, nodes in before}
    ordered: list[Any] = []
    for node in graph.node:
        ordered.extend(added.get(node.output[0], []))
        ordered.append(node)
    copies = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)
