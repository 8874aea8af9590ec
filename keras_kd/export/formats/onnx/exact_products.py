"""Integer products of ONNX files whose sums are the same on every x86 processor, proved.

ONNX Runtime multiplies unsigned bytes by signed ones with `vpmaddubsw` wherever a processor has no
VNNI: the sum of two neighboring products is kept in 16 bits and saturates. `255 * 128` fits in,
`255 * 129` does not. All its other kernels for x86 widen first: unsigned by unsigned bytes, all of
VNNI and AMX. So a product is the same everywhere if its weights are unsigned, or if no two weights
of one sign that are added in one output are further than 128 from zero together. Which two are
neighbors differs from kernel to kernel, so here any two may be.

Float weights between a `DequantizeLinear` and a `QuantizeLinear` are no way around it: ONNX Runtime
rounds them to signed bytes by itself, with one scale for all channels (`WeightBiasQuantization`).
It does so for inputs with one scale in all, and leaves alone those with a scale for each channel.

Reference:
    - [ONNX Runtime: quantization on CPU](
      https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html)
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.formats.onnx.graph import MOVERS, graphs

if TYPE_CHECKING:
    import onnx


PAIR = 128
"""Greatest magnitude of the sum of two weights that 255 can be multiplied by within 16 bits."""

PROVEN = ("AVX2", "AVX-512", "AVX-VNNI", "AVX-512 VNNI", "AMX")
"""Extensions of x86 for which `prove` says that a file gives the same sums."""

# Inputs of the operators with integer kernels: both factors, and the zero point of the second.
_INTEGER = {
    "QLinearConv": ((0, 3, 5),),
    "QLinearMatMul": ((0, 3, 5),),
    "QGemm": ((0, 3, 5),),
    "ConvInteger": ((0, 1, 3),),
    "MatMulInteger": ((0, 1, 3),),
    "MatMulIntegerToFloat": ((0, 1, 5),),
    "DynamicQuantizeMatMul": ((0, 1, 3),),
    "DynamicQuantizeLSTM": ((0, 1, 9), (0, 2, 11)),
    "QAttention": ((0, 1, 7),),
}
_FLOAT = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class Product:
    """An operator that ONNX Runtime may compute in integers.

    Args:
        output: Name of its first output.
        operator: Its type.
        weights: `"uint8"`, `"int8"`, or `"float32"` for weights that ONNX Runtime rounds by itself.
        fault: Why sums can differ between processors; empty if they cannot.
    """

    output: str
    operator: str
    weights: str
    fault: str


def saturating_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply as processors without VNNI do: sums of two neighboring products in 16 bits.

    `c = sum_p sat16(a_2p b_2p + a_(2p+1) b_(2p+1))`, what `vpmaddubsw` and `vpmaddwd` give.

    Args:
        a: Activations `(rows, depth)`, uint8.
        b: Weights `(depth, columns)`, int8 as they are stored, before any zero point.

    Returns:
        Sums `(rows, columns)`, int32.
    """
    depth = a.shape[1] + a.shape[1] % 2
    left = np.zeros((a.shape[0], depth), np.int32)
    right = np.zeros((depth, b.shape[1]), np.int32)
    left[:, : a.shape[1]], right[: b.shape[0]] = a, b
    pairs = (left[:, :, None] * right[None]).reshape(len(a), depth // 2, 2, -1).sum(axis=2)
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1, dtype=np.int32)


def fits(weights: np.ndarray, axis: int) -> bool:
    """Say whether no order of the weights lets a sum of two products leave 16 bits.

    Args:
        weights: int8, as stored.
        axis: The axis of output channels.
    """
    return not _saturates(_by_output(weights, axis)).any()


def fitting_scales(weights: np.ndarray, axis: int) -> np.ndarray:
    """The finest symmetric scale of each channel whose signed bytes `fits`.

    `s = max(|w|_1 / 127, (|w|_1 + |w|_2) / 128)` with the two largest magnitudes of one sign. It
    lies between that of 8 bits, where one weight is far from all others, and that of 7.

    Args:
        weights: Float weights.
        axis: The axis of output channels.

    Returns:
        Scales `(channels,)`, float32.
    """
    rows = _by_output(weights, axis).astype(np.float64)
    pair = np.abs(_ends(rows).reshape(len(rows), 2, -1).sum(axis=2)).max(axis=1)
    scales = np.maximum(np.abs(rows).max(axis=1) / 127, pair / PAIR)
    scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
    # Two halves may both be rounded away from zero.
    while (over := _saturates(rounded(rows, scales[:, None]))).any():
        scales[over] *= np.float32(1.001)
    return scales


def rounded(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Weights over their scale, as signed bytes."""
    return np.clip(np.round(weights / scale), -127, 127).astype(np.int8)


def _by_output(weights: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)


def _ends(rows: np.ndarray) -> np.ndarray:
    """The two weights furthest above zero, or 0, and the two below, `(channels, 4)`."""
    padded = np.concatenate([np.zeros((len(rows), 2), rows.dtype), rows], axis=1)
    ordered = np.sort(padded, axis=1)
    return np.concatenate([ordered[:, -2:].clip(0), ordered[:, :2].clip(None, 0)], axis=1)


def _saturates(rows: np.ndarray) -> np.ndarray:
    """Which outputs `(channels,)` saturate where the furthest weights stand side by side."""
    ends = _ends(rows)
    largest = np.full((1, ends.shape[1]), 255, np.uint8)
    exact = 255 * ends.sum(axis=1, dtype=np.int32)
    return np.asarray(saturating_product(largest, ends.T)[0] != exact)


def products(model: onnx.ModelProto) -> list[Product]:
    """Find what ONNX Runtime may multiply in integers, and whether each sum is the same everywhere.

    Args:
        model: An `onnx.ModelProto`.

    Returns:
        One entry for each pair of factors, in the order of the nodes.
    """
    return [found for graph in graphs(model.graph) for found in _products(graph)]


def prove(model: onnx.ModelProto) -> dict[str, int]:
    """Make sure that the file gives the same sums of products on every x86 processor.

    Args:
        model: An `onnx.ModelProto`.

    Returns:
        How many products there are by the type of their weights, such as `{"int8": 3}`.

    Raises:
        ValueError: If a sum can leave 16 bits.
    """
    found = products(model)
    faults = [f"`{product.output}` ({product.fault})" for product in found if product.fault]
    if faults:
        raise ValueError(
            "the file would answer otherwise on x86 processors without VNNI: at "
            f"{', '.join(faults[:3])}. Please report this model; the precisions float32, float16 "
            "and weight_int4 are not concerned"
        )
    kinds = [product.weights for product in found]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def make_unsigned(model: onnx.ModelProto) -> int:
    """Store signed weights of integer operators that do not `fits` as unsigned ones around 128.

    Their values stay. ONNX Runtime's tool makes those of `DynamicQuantizeLSTM` signed whatever it
    is asked for.

    Args:
        model: An `onnx.ModelProto`, changed in place.

    Returns:
        How many weights were changed.
    """
    from onnx import numpy_helper

    count = 0
    for graph in graphs(model.graph):
        known = _Known(graph)
        for node in graph.node:
            for _, second, zero in _INTEGER.get(node.op_type, ()):
                weights = known.array(node.input[second])
                point = known.array(node.input[zero]) if zero < len(node.input) else None
                if weights is None or point is None or weights.dtype != np.int8:
                    continue
                if fits(weights, _channels(node, weights)):
                    continue
                for position, array in ((second, weights), (zero, point)):
                    name = f"{node.input[position]}__unsigned"
                    if name not in known.values:
                        moved = (array.astype(np.int16) + 128).astype(np.uint8)
                        entry = numpy_helper.from_array(moved, name)
                        graph.initializer.append(entry)
                        known.values[name] = entry
                    node.input[position] = name
                count += 1
    return count


def this_processor() -> str:
    """Name the extension of x86 that ONNX Runtime multiplies with here, or the kind of machine."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        flags = []
    known = ("avx2", "avx512bw", "avx_vnni", "avx512_vnni", "amx_int8")
    found = [name for flag, name in zip(known, PROVEN, strict=True) if flag in flags]
    return found[-1] if found else platform.machine()


def keep_float(model: onnx.ModelProto) -> int:
    """Give the inputs of float products a scale for each channel, so that they stay float.

    The values are the same: all channels get the scale that they had together.

    Args:
        model: An `onnx.ModelProto` with its activations between `QuantizeLinear` and
            `DequantizeLinear`, changed in place.

    Returns:
        How many products ONNX Runtime would have rounded by itself.
    """
    count = 0
    for graph in graphs(model.graph):
        known = _Known(graph)
        added: dict[int, list[Any]] = {}
        for index, node in enumerate(graph.node):
            weights = known.float_weights(node)
            if weights is not None:
                added[index] = _by_channel(graph, node, known, weights)
                count += 1
        if added:
            nodes = [new for i, node in enumerate(graph.node) for new in (*added.get(i, ()), node)]
            copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
            del graph.node[:]
            graph.node.extend(copies)
    return count


class _Known:
    """What a graph says about its tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.values = {entry.name: entry for entry in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}

    def array(self, name: str) -> np.ndarray | None:
        from onnx import numpy_helper

        entry = self.values.get(name)
        return None if entry is None else np.asarray(numpy_helper.to_array(entry))

    def dequantize(self, name: str) -> Any:
        """The `DequantizeLinear` behind operators that only move values; or None."""
        node = self.producers.get(name)
        while node is not None and node.op_type in MOVERS:
            node = self.producers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def type_of(self, name: str, zero_point: str) -> str:
        """`"uint8"` or `"int8"`, as a tensor or its zero point says; `"unknown"` if none does."""
        array = self.array(name)
        array = self.array(zero_point) if array is None else array
        if array is not None:
            return str(array.dtype)
        made = self.producers.get(zero_point)
        # Without a zero point, and where ranges are found while running, bytes are unsigned.
        unsigned = not zero_point or (made is not None and made.op_type == "DynamicQuantizeLinear")
        return "uint8" if unsigned else "unknown"

    def float_weights(self, node: onnx.NodeProto) -> np.ndarray | None:
        """The constant matrix of a float product that reads integers by one scale; or None."""
        if node.op_type not in _FLOAT or node.domain or len(node.input) < 2:
            return None
        weights = self.array(node.input[1])
        source = self.dequantize(node.input[0])
        if weights is None or weights.dtype != np.float32 or source is None:
            return None
        scale = self.array(source.input[1])
        return None if scale is not None and scale.size > 1 else weights


def _products(graph: onnx.GraphProto) -> Iterator[Product]:
    known = _Known(graph)
    for node in graph.node:
        if node.op_type in _INTEGER:
            for first, second, zero in _INTEGER[node.op_type]:
                point = node.input[zero] if zero < len(node.input) else ""
                yield _product(node, known, node.input[first], node.input[second], point)
        elif known.float_weights(node) is not None:
            fault = "ONNX Runtime rounds its float weights by itself"
            yield Product(node.output[0], node.op_type, "float32", fault)
        elif node.op_type in _FLOAT and len(node.input) > 1:
            one, other = (known.dequantize(name) for name in list(node.input)[:2])
            if one is not None and other is not None:
                point = other.input[2] if len(other.input) > 2 else ""
                yield _product(node, known, one.input[0], other.input[0], point)


def _product(node: onnx.NodeProto, known: _Known, first: str, second: str, point: str) -> Product:
    left, weights = known.array(first), known.array(second)
    kind = known.type_of(second, point)
    fault = ""
    if weights is not None and weights.dtype == np.int8:
        if not fits(weights, _channels(node, weights)):
            fault = _SATURATES
    elif weights is None and left is not None and left.dtype == np.int8:
        # A constant on the left of a matrix product, whose rows are the outputs.
        kind = "int8"
        if not fits(left, max(left.ndim - 2, 0)):
            fault = _SATURATES
    elif kind != "uint8":
        fault = "a factor of signed bytes that is no constant"
    return Product(node.output[0], node.op_type, kind, fault)


_SATURATES = "two of its signed weights exceed 16 bits together"


def _channels(node: onnx.NodeProto, weights: np.ndarray) -> int:
    if node.op_type in ("Conv", "QLinearConv", "ConvInteger"):
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    transposed = any(a.name == "transB" and a.i == 1 for a in node.attribute)
    return weights.ndim - 2 if transposed else weights.ndim - 1


def _by_channel(
    graph: onnx.GraphProto, node: onnx.NodeProto, known: _Known, weights: np.ndarray
) -> list[Any]:
    from onnx import helper, numpy_helper

    if node.op_type == "Conv":
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        size, axis = weights.shape[1] * group, 1
    elif node.op_type == "ConvTranspose":
        size, axis = weights.shape[0], 1
    else:
        last = _channels(node, weights) == weights.ndim - 1
        size, axis = weights.shape[-2 if last else -1], 1 if node.op_type == "Gemm" else -1
    source = known.dequantize(node.input[0])
    base = f"{node.input[0]}__{node.output[0]}"
    names = [f"{base}__scale", f"{base}__zero"]
    scale, zero = (known.array(name) for name in list(source.input)[1:3])
    if scale is None or zero is None:
        raise ValueError(f"the scale of `{node.input[0]}` is no constant")
    for name, array in zip(names, (scale, zero), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.full(size, array.reshape(())), name))
    nodes = []
    steps = source.input[0]
    if source is not known.producers[node.input[0]]:
        # Something between moves the values: they are rounded again, to what they are.
        steps = f"{base}__steps"
        ends = [node.input[0], *list(source.input)[1:3]]
        nodes.append(helper.make_node("QuantizeLinear", ends, [steps]))
    nodes.append(
        helper.make_node("DequantizeLinear", [steps, *names], [f"{base}__value"], axis=axis)
    )
    node.input[0] = f"{base}__value"
    return nodes
