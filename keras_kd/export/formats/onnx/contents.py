"""What is inside an ONNX file: operators, weights, constants and the tensors between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.formats.onnx.graph import MOVERS
from keras_kd.export.rows import Contents
from keras_kd.export.signature import Arrays

if TYPE_CHECKING:
    import onnx
    import onnxruntime


_PAIR = ("QuantizeLinear", "DequantizeLinear")
_HEAVY = {"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "Attention"}


def check(blob: bytes) -> None:
    """Refuse a file that is not valid ONNX, even if ONNX Runtime takes it.

    Args:
        blob: The file.

    Raises:
        ValueError: If `onnx.checker` with full inference of shapes refuses it.
    """
    import onnx

    try:
        onnx.checker.check_model(blob, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"the file is not valid ONNX: {'; '.join(lines[:2])[:300]}") from error


def inspect(path: Path) -> Contents:
    """Look into a file; of float operators those with weights count, the others are fused."""
    import onnx

    model = onnx.load(path)
    operators: Counter[str] = Counter()
    floats: set[str] = set()
    widths: Counter[int] = Counter()

    def visit(graph: onnx.GraphProto) -> None:
        producers = {name: node for node in graph.node for name in node.output}
        initializers = {entry.name: entry.data_type for entry in graph.initializer}
        for entry in graph.initializer:
            size = int(np.prod(entry.dims, dtype=np.int64)) if entry.dims else 1
            width = _ONNX_BITS.get(entry.data_type)
            if width is not None:
                widths[width] += -(-size * width // 8)
        for node in graph.node:
            operators[node.op_type] += 1
            if node.op_type in _HEAVY:
                ends = list(node.input)[:2]
                quantized = all(_is_dequantized(name, producers) for name in ends)
                if not quantized and any(
                    initializers.get(name, onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
                    for name in ends
                ):
                    floats.add(node.op_type)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g)

    visit(model.graph)
    return Contents(
        dict(sorted(operators.items())),
        tuple(sorted(floats)),
        {str(width): size for width, size in sorted(widths.items())},
    )


def _is_dequantized(name: str, producers: dict[str, Any]) -> bool:
    # Operators that only move values stand between a quantized tensor and its user.
    node = producers.get(name)
    while node is not None and node.op_type in MOVERS:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


# onnx.TensorProto.DataType to bits; integers of 32 and 64 bits are biases, indices and shapes.
_ONNX_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 10: 16, 11: 32, 16: 16, 21: 4, 22: 4}


def tensors(path: Path, feed: Arrays) -> tuple[Arrays, dict[str, list[str]]]:
    """Return the tensors that nodes make, and for each those that its node reads."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    nodes = model.graph.node
    readings = {
        made: [name for name in node.input if name] for node in nodes for made in node.output
    }
    have = {entry.name for entry in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in have:
                # Without a type, the runtime infers it.
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    # What the next layer reads: an activation such as ReLU may live in the quantization alone.
    readers = {node.input[0]: node for node in model.graph.node if node.op_type in _PAIR}
    order = [name for node in model.graph.node for name in node.output if name]
    values = _all_values(session, feed)
    result = {}
    for name in order:
        quantize = readers.get(name)
        read = readers.get(quantize.output[0]) if quantize is not None else None
        value = values.get(name if read is None else read.output[0])
        if isinstance(value, np.ndarray) and value.dtype == np.float32:
            result[name] = value
    return result, readings


def _all_values(session: onnxruntime.InferenceSession, feed: Arrays) -> dict[str, Any]:
    names = [row.name for row in session.get_outputs()]
    if not any(isinstance(row.shape[0], int) for row in session.get_inputs() if row.shape):
        return dict(zip(names, session.run(None, feed), strict=True))
    # A file of one sample; what its loops make of different length is no tensor of a layer.
    parts = [
        session.run(None, {name: x[i : i + 1] for name, x in feed.items()})
        for i in range(len(next(iter(feed.values()))))
    ]
    return {
        name: np.stack(rows)
        for name, rows in zip(names, map(list, zip(*parts, strict=True)), strict=True)
        if all(isinstance(row, np.ndarray) for row in rows) and _same_shape(rows)
    }


def _same_shape(arrays: Sequence[np.ndarray]) -> bool:
    return len({array.shape for array in arrays}) == 1


def constants(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the constants of a file by name."""
    import onnx
    from onnx import numpy_helper

    for entry in onnx.load(path).graph.initializer:
        yield entry.name, numpy_helper.to_array(entry)


def readers(path: Path) -> dict[str, str]:
    """Return for each tensor of a file the name of the first result that is computed from it."""
    import onnx

    found: dict[str, str] = {}
    for node in onnx.load(path).graph.node:
        for name in node.input:
            found.setdefault(name, node.output[0])
    return found
