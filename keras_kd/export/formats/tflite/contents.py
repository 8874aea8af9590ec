"""What is inside a TFLite file: operators, weights, constants and the tensors between them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats.base import OUTSIDE
from keras_kd.export.rows import Contents
from keras_kd.export.signature import Arrays
from keras_kd.utils import archives

_BORDER = {"QUANTIZE", "DEQUANTIZE", "DENSIFY"}


def read(path: Path) -> Any:
    """Return a file as the objects of its schema, which nobody changes: it is read once."""
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size, about.st_ino)


@functools.lru_cache(maxsize=2)
def _read(path: Path, *_: int) -> Any:
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model(str(path))


def inspect(path: Path) -> Contents:
    """Look into a file."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = read(path)
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
    return Contents(
        dict(sorted(operators.items())),
        tuple(sorted(floats)),
        {str(width): size for width, size in sorted(widths.items())},
        tuple(sorted(flex)),
    )


def tensors(path: Path, feed: Arrays) -> tuple[Arrays, dict[str, list[str]]]:
    """Return the tensors that operators make, and for each those that its operator reads."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_path=str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    inputs = {row["name"]: row for row in interpreter.get_input_details()}
    rows = {row["index"]: row for row in interpreter.get_tensor_details()}
    # Only what an operator made, in running order: weights go by the name of their layer, too.
    graph = read(path).subgraphs[0]
    made = [index for operator in graph.operators for index in operator.outputs]
    tensors = {index: rows[index] for index in made if index in rows}
    names = [tensor.name.decode() for tensor in graph.tensors]
    # An index of -1 stands for an operand that was left out.
    readings = {
        names[index]: [names[read] for read in operator.inputs if read >= 0]
        for operator in graph.operators
        for index in operator.outputs
    }
    parts: dict[str, list[np.ndarray]] = {}
    for i in range(len(next(iter(feed.values())))):
        for name, row in inputs.items():
            interpreter.set_tensor(row["index"], _encode(feed[name][i : i + 1], row))
        interpreter.invoke()
        for index, row in tensors.items():
            try:
                array = interpreter.get_tensor(index)
            except ValueError:
                # A tensor that this run did not fill, such as one in a branch not taken.
                continue
            if array.dtype.kind in "fi" and array.ndim:
                parts.setdefault(row["name"], []).append(_decode(array, row))
    arrays = {name: np.stack(rows) for name, rows in parts.items() if _same_shape(rows)}
    return arrays, readings


def _encode(x: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    scale, zero = row["quantization"]
    if scale and np.issubdtype(row["dtype"], np.integer):
        limits = np.iinfo(row["dtype"])
        x = np.clip(np.round(x / scale) + zero, limits.min, limits.max)
    return x.astype(row["dtype"], copy=False)


def _decode(array: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    scale, zero = row["quantization"]
    if scale and array.dtype.kind == "i":
        return (array.astype(np.float32) - zero) * np.float32(scale)
    return np.array(array)


def _same_shape(arrays: Sequence[np.ndarray]) -> bool:
    return len({array.shape for array in arrays}) == 1


def constants(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the float constants of a file by name."""
    from ai_edge_litert import schema_py_generated as schema

    model = read(path)
    types = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.FLOAT16: np.float16}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data) and tensor.type in types and tensor.sparsity is None:
                blob = np.asarray(data, np.uint8).tobytes()
                yield tensor.name.decode(), np.frombuffer(blob, types[tensor.type])


def readers(path: Path) -> dict[str, str]:
    """Return for each tensor of a file the name of the first result that is computed from it."""
    found: dict[str, str] = {}

    for graph in read(path).subgraphs:
        names = [tensor.name.decode() for tensor in graph.tensors]
        for operator in graph.operators or []:
            for index in operator.inputs:
                if index >= 0 and len(operator.outputs):
                    found.setdefault(names[index], names[operator.outputs[0]])
    return found


def outside(path: Path) -> str:
    """Say why a file cannot be proven by its own bytes, see `Format.outside`."""
    from ai_edge_litert import schema_py_generated as schema

    with archives.opened(path) as stream:
        blob = stream.read()
    try:
        model = schema.Model.GetRootAs(blob, 0)
        found = model.ExternalBuffersLength() or model.ExternalBufferGroupsLength()
    except Exception:
        # Offsets that lead out of the bytes: the runtime says that this is no file of its own.
        found = 0
    return OUTSIDE if found else ""
