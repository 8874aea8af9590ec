"""What of a network float16 cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats.scales import readers
from keras_kd.export.signature import Arrays
from keras_kd.export.verification.layer_noise import onnx_tensors, tflite_tensors

GREATEST = 65_504.0
LEAST = 2.0**-25
"""The greatest number of float16, and the one below which numbers round to 0."""

_SHOWN = 5
_SAMPLES = 4
"""Samples whose inner results are looked at; every one of them is held in memory."""


def beyond(half: Path, full: Path, inputs: Arrays) -> list[dict[str, Any]]:
    """Find what a float16 file lost since float16 cannot hold it.

    Args:
        half: The float16 file.
        full: The float32 file of the same format.
        inputs: Samples by input name.

    Returns:
        At most five rows of `tensor`, `reader` (the first result computed from it), `value` (its
        greatest magnitude, or for constants that vanish the greatest of what was there),
        `constant` and `vanishes`: constants of the float32 file above 65,504, those all of whose
        numbers round to 0, those that the converter cut off at less, and results of the float32
        file above 65,504.
    """
    kept = {name: array for name, array in _constants(half) if array.dtype == np.float16}
    rows: list[dict[str, Any]] = []
    for name, array in _constants(full):
        if array.dtype != np.float32 or not array.size or not np.isfinite(array).all():
            continue
        peak = float(np.abs(array).max())
        cut = name in kept and kept[name].size and float(np.abs(kept[name]).max()) < 0.99 * peak
        if peak > GREATEST or (peak > 1 and cut):
            rows.append(_row(name, peak, constant=True))
        elif 0 < peak < LEAST:
            rows.append({**_row(name, peak, constant=True), "vanishes": True})
    read = onnx_tensors if full.suffix == ".onnx" else tflite_tensors
    tensors, _ = read(full, {name: x[:_SAMPLES] for name, x in inputs.items()})
    for name, array in tensors.items():
        peak = float(np.abs(array).max(initial=0.0))
        if peak > GREATEST:
            rows.append(_row(name, peak, constant=False))
    first = readers(full) if rows else {}
    return [{**row, "reader": first.get(row["tensor"])} for row in rows[:_SHOWN]]


def _row(tensor: str, value: float, *, constant: bool) -> dict[str, Any]:
    # As text, since JSON has no infinity.
    return {"tensor": tensor, "value": f"{value:.3g}", "constant": constant, "vanishes": False}


def _constants(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    if path.suffix == ".onnx":
        import onnx
        from onnx import numpy_helper

        for entry in onnx.load(path).graph.initializer:
            yield entry.name, numpy_helper.to_array(entry)
        return
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(path)
    types = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.FLOAT16: np.float16}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data) and tensor.type in types and tensor.sparsity is None:
                blob = np.asarray(data, np.uint8).tobytes()
                yield tensor.name.decode(), np.frombuffer(blob, types[tensor.type])
