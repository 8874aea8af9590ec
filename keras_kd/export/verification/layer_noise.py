"""How much noise quantization leaves in each layer, measured in the exported files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.signature import Arrays
from keras_kd.export.tensor_names import layer_of
from keras_kd.export.verification.metrics import sqnr

SAMPLES = 32
"""Samples that the noise is measured on."""

_PAIR = ("QuantizeLinear", "DequantizeLinear")


def layer_noise(
    reference: Path, quantized: Path, inputs: Arrays, layers: Collection[str]
) -> list[dict[str, Any]]:
    """Compare the output of each layer in a quantized file with the same layer in the float file.

    Both files run on the same samples, one after the other, with every inner tensor kept; no
    delegate or graph optimization takes layers away. The noise of a layer includes what it inherits
    from the layers before it.

    Args:
        reference: The float32 file.
        quantized: The quantized file of the same format.
        inputs: Samples by input name; the first 32 are used.
        layers: Names of the Keras model's layers.

    Returns:
        `{"layer", "tensor", "sqnr", "reads", "covers"}` for each layer that both files keep, in the
        order in which they run; the SQNR in dB is `None` where there is no noise. `reads` names the
        layers of this list whose outputs the layer works on, `covers` those between that have no
        row of their own, since the quantized file computes them in one step with the layer: a
        convolution and its BatchNorm before a ReLU.
    """
    feed = {name: array[:SAMPLES] for name, array in inputs.items()}
    read = tflite_tensors if reference.suffix == ".tflite" else onnx_tensors
    (want, readings), (got, _) = read(reference, feed), read(quantized, feed)
    rows: dict[str, dict[str, Any]] = {}
    for name, array in want.items():
        layer = layer_of(name, layers)
        if layer is None or name not in got or got[name].shape != array.shape:
            continue
        # A later tensor of the same layer takes the place of an earlier one.
        noise = sqnr(array, got[name])
        value = noise if np.isfinite(noise) else None
        rows.pop(layer, None)
        rows[layer] = {"layer": layer, "tensor": name, "sqnr": value}
    for layer, row in rows.items():
        row["reads"], row["covers"] = _layers_before(layer, readings, layers, rows)
    return list(rows.values())


def _layers_before(
    layer: str,
    readings: dict[str, list[str]],
    layers: Collection[str],
    known: Collection[str],
) -> tuple[list[str], list[str]]:
    """The nearest known layers that a layer's tensors are computed from, and those between."""
    waiting = [name for name in readings if layer_of(name, layers) == layer]
    found: dict[str, None] = {}
    between: dict[str, None] = {}
    seen = set(waiting)
    while waiting:
        for name in readings[waiting.pop()]:
            owner = layer_of(name, layers)
            if owner is not None and owner != layer:
                if owner in known:
                    if name in readings:
                        found[owner] = None
                    continue
                # A weight tells the layer of an operator whose output has lost its name; the
                # model's input, which has no path, is no operator.
                if name in readings or "/" in name:
                    between[owner] = None
            if name in readings and name not in seen:
                seen.add(name)
                waiting.append(name)
    return sorted(found, key=list(known).index), list(reversed(between))


def tflite_tensors(path: Path, feed: Arrays) -> tuple[Arrays, dict[str, list[str]]]:
    """Return the tensors that operators make, and for each those that its operator reads."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType
    from ai_edge_litert.tools import flatbuffer_utils

    interpreter = Interpreter(
        model_path=str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    inputs = {row["name"]: row for row in interpreter.get_input_details()}
    rows = {row["index"]: row for row in interpreter.get_tensor_details()}
    # Only what an operator made, in running order: weights go by the name of their layer, too.
    graph = flatbuffer_utils.read_model(path).subgraphs[0]
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


def onnx_tensors(path: Path, feed: Arrays) -> tuple[Arrays, dict[str, list[str]]]:
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


def _all_values(session: Any, feed: Arrays) -> dict[str, Any]:
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
