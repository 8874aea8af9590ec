"""The scales in a quantized file: those of its inputs, and those that no arithmetic survives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats.contents import MOVERS

LEAST = 1e-30
"""The smallest scale that is taken for one: products of two smaller ones vanish in float32, and
calibration gives such a scale to what was 0 in all samples."""

_SHOWN = 10


def inspect(path: Path) -> dict[str, Any]:
    """Look at the scales of a file.

    Args:
        path: A `.tflite` or `.onnx` file.

    Returns:
        `inputs`: scale by the name of each input that is quantized, at once or behind a shift;
        `broken`: rows of `tensor`, `scale` (as text, since JSON has no infinity) and `finite` for
        tensors that are computed and whose scale is not finite, not positive or below 1e-30, at
        most ten; `reader` is the first result computed from the tensor, since constants lose the
        name of their layer.
    """
    found = _tflite(path) if path.suffix == ".tflite" else _onnx(path)
    if found["broken"]:
        first = readers(path)
        found["broken"] = [{**row, "reader": first.get(row["tensor"])} for row in found["broken"]]
    return found


def readers(path: Path) -> dict[str, str]:
    """Return for each tensor of a file the name of the first result that is computed from it."""
    found: dict[str, str] = {}
    if path.suffix == ".onnx":
        import onnx

        for node in onnx.load(path).graph.node:
            for name in node.input:
                found.setdefault(name, node.output[0])
        return found
    from ai_edge_litert.tools import flatbuffer_utils

    for graph in flatbuffer_utils.read_model(path).subgraphs:
        names = [tensor.name.decode() for tensor in graph.tensors]
        for operator in graph.operators or []:
            for index in operator.inputs:
                if index >= 0 and len(operator.outputs):
                    found.setdefault(names[index], names[operator.outputs[0]])
    return found


def _row(tensor: str, scale: float) -> dict[str, Any]:
    return {"tensor": tensor, "scale": f"{scale:.3g}", "finite": math.isfinite(scale)}


def _broken(scale: float) -> bool:
    return not math.isfinite(scale) or scale < LEAST


def _tflite(path: Path) -> dict[str, Any]:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(path)
    integers = (
        schema.TensorType.INT8,
        schema.TensorType.UINT8,
        schema.TensorType.INT16,
    )
    inputs, broken = {}, []
    for number, graph in enumerate(model.subgraphs):
        for index, tensor in enumerate(graph.tensors):
            quantization = tensor.quantization
            scales = None if quantization is None else quantization.scale
            data = model.buffers[tensor.buffer].data
            constant = data is not None and len(data) > 0
            if scales is None or not len(scales) or tensor.type not in integers:
                continue
            name = tensor.name.decode()
            if number == 0 and index in graph.inputs:
                inputs[name] = float(scales[0])
            # A channel of zeros may have any scale, but no infinite one.
            bad = [
                float(scale)
                for scale in scales
                if (not math.isfinite(scale) if constant else _broken(float(scale)))
            ]
            if bad:
                broken.append(_row(name, bad[0]))
    return {"inputs": inputs, "broken": broken[:_SHOWN]}


def _onnx(path: Path) -> dict[str, Any]:
    import onnx
    from onnx import numpy_helper

    from keras_kd.export.formats.metadata import border_scales

    model = onnx.load(path)
    borders = border_scales(model)
    inputs = {
        entry.name: float(borders[entry.name]["scale"])
        for entry in model.graph.input
        if entry.name in borders
    }
    constants = {entry.name: entry for entry in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    free = {entry.name for entry in model.graph.input} - set(inputs)
    broken: dict[str, dict[str, Any]] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 2:
            continue
        scale, name = constants.get(node.input[1]), node.input[0]
        if scale is None or node.input[1] in broken:
            continue
        values = np.ravel(numpy_helper.to_array(scale)).astype(np.float64)
        start = _origin(name, producers, constants)
        if node.op_type == "QuantizeLinear" and start in free and start not in inputs:
            inputs[start] = float(values[0])
        bad = [
            value
            for value in values
            if (not math.isfinite(value) if name in constants else _broken(float(value)))
        ]
        if bad:
            broken[node.input[1]] = _row(name, float(bad[0]))
    return {"inputs": inputs, "broken": list(broken.values())[:_SHOWN]}


def _origin(name: str, producers: dict[str, Any], constants: dict[str, Any]) -> str:
    # What only moves or shifts values leaves their reach as it is: a mean is taken off in float.
    while name in producers:
        node = producers[name]
        rest = [part for part in node.input if part not in constants]
        shifts = node.op_type in ("Add", "Sub") and len(rest) == 1
        if not rest or not (node.op_type in MOVERS or shifts):
            return name
        name = rest[0]
    return name
