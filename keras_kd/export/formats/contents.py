"""What is inside an exported file: its operators, and how its weights are stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

_HEAVY = {"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "Attention"}
_BORDER = {"QUANTIZE", "DEQUANTIZE", "DENSIFY"}

MOVERS = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "MaxPool"}
"""ONNX operators whose output values are input values."""


def inspect(path: Path) -> dict[str, Any]:
    """Look into a file.

    Args:
        path: A `.tflite` or `.onnx` file.

    Returns:
        `operators` (name to count), `float_operators` (those that compute in float; for ONNX only
        the ones with weights, since the runtime fuses the others), `weight_bits` (bits to bytes
        stored at that width), `flex` (operators that need TensorFlow).
    """
    return _tflite(path) if path.suffix == ".tflite" else _onnx(path)


def check_onnx(blob: bytes) -> None:
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


def _tflite(path: Path) -> dict[str, Any]:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(path)
    kinds = {value: name for name, value in vars(schema.TensorType).items() if name.isupper()}
    bits = {"INT4": 4, "INT2": 2, "INT8": 8, "UINT8": 8, "FLOAT16": 16, "INT16": 16}
    operators: Counter[str] = Counter()
    floats: set[str] = set()
    flex: set[str] = set()
    widths: Counter[int] = Counter()
    for graph in model.subgraphs:
        weights = set()
        for index, tensor in enumerate(graph.tensors):
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data):
                weights.add(index)
                kind = kinds[tensor.type]
                # Integers of 32 bits are biases and shapes, not weights.
                if kind not in ("INT32", "INT64", "BOOL", "STRING"):
                    widths[bits.get(kind, 32)] += len(data)
        for operator in graph.operators or []:
            code = model.operatorCodes[operator.opcodeIndex]
            name = flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) or "CUSTOM"
            if code.customCode:
                name = code.customCode.decode()
                if name.startswith("Flex"):
                    flex.add(name)
            operators[name] += 1
            if name in _BORDER:
                continue
            ends = [i for i in (*operator.inputs, *operator.outputs) if i >= 0 and i not in weights]
            if any(kinds[graph.tensors[i].type] == "FLOAT32" for i in ends):
                floats.add(name)
    return {
        "operators": dict(sorted(operators.items())),
        "float_operators": sorted(floats),
        "weight_bits": {str(width): size for width, size in sorted(widths.items())},
        "flex": sorted(flex),
    }


def _onnx(path: Path) -> dict[str, Any]:
    import onnx

    model = onnx.load(path)
    operators: Counter[str] = Counter()
    floats: set[str] = set()
    widths: Counter[int] = Counter()

    def visit(graph: Any) -> None:
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
    return {
        "operators": dict(sorted(operators.items())),
        "float_operators": sorted(floats),
        "weight_bits": {str(width): size for width, size in sorted(widths.items())},
        "flex": [],
    }


def _is_dequantized(name: str, producers: dict[str, Any]) -> bool:
    # Operators that only move values stand between a quantized tensor and its user.
    node = producers.get(name)
    while node is not None and node.op_type in MOVERS:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


# onnx.TensorProto.DataType to bits; integers of 32 and 64 bits are biases, indices and shapes.
_ONNX_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 10: 16, 11: 32, 16: 16, 21: 4, 22: 4}
