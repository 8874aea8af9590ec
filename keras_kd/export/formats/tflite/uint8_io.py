"""An int8 TFLite file with unsigned bytes at its borders, as image libraries pass pixels."""

from __future__ import annotations

from typing import Any

import numpy as np


def unsigned(blob: bytes, normalization: dict[str, dict[str, list[float]]]) -> bytes:
    """Put a `QUANTIZE` operator between uint8 borders and the int8 network.

    An output becomes `uint8 = int8 + 128`, with the same scale. So does an input, unless its
    normalization is known: then `real = (uint8 - mean) / std`, so that pixels go in as they are.
    The converter itself takes the scale from the calibration data, whose darkest and brightest
    values need not be 0 and 255.

    Args:
        blob: A TFLite file with int8 inputs and outputs.
        normalization: `mean` and `std` of pixels 0..255 by input name.

    Returns:
        The file; borders that are no int8 stay as they are.

    Raises:
        ValueError: If the channels of an input are normalized differently, which one scale for all
            of them cannot say, or its mean is no pixel value.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
    (definition,) = model.signatureDefs
    graph = model.subgraphs[definition.subgraphIndex]
    kind = schema.TensorType

    def border(index: int, scale: float | None, zero: int) -> int:
        # A new tensor takes over the name; the int8 one goes on as an inner tensor.
        inner = graph.tensors[index]
        outer = schema.TensorT()
        outer.name, outer.type, outer.buffer = inner.name, kind.UINT8, inner.buffer
        outer.shape, outer.shapeSignature = inner.shape, inner.shapeSignature
        outer.quantization = schema.QuantizationParametersT()
        outer.quantization.scale = [inner.quantization.scale[0] if scale is None else scale]
        outer.quantization.zeroPoint = [
            inner.quantization.zeroPoint[0] + 128 if scale is None else zero
        ]
        inner.name = inner.name + b"_int8"
        graph.tensors.append(outer)
        return len(graph.tensors) - 1

    def is_int8(index: int) -> bool:
        return bool(graph.tensors[index].type == kind.INT8)

    def quantize(source: int, target: int) -> Any:
        operator = schema.OperatorT()
        operator.opcodeIndex = _code(model, schema)
        operator.inputs, operator.outputs = [source], [target]
        return operator

    first, last = [], []
    for entry in definition.inputs:
        old = entry.tensorIndex
        if is_int8(old):
            name = entry.name.decode()
            scale, zero = _pixels(name, normalization[name]) if name in normalization else (None, 0)
            entry.tensorIndex = border(old, scale, zero)
            graph.inputs = [entry.tensorIndex if i == old else i for i in graph.inputs]
            first.append(quantize(entry.tensorIndex, old))
    for entry in definition.outputs:
        old = entry.tensorIndex
        if is_int8(old):
            entry.tensorIndex = border(old, None, 0)
            graph.outputs = [entry.tensorIndex if i == old else i for i in graph.outputs]
            last.append(quantize(old, entry.tensorIndex))
    graph.operators = [*first, *graph.operators, *last]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _pixels(name: str, normalization: dict[str, list[float]]) -> tuple[float, int]:
    (mean, *means), (std, *stds) = normalization["mean"], normalization["std"]
    if any(value != mean for value in means) or any(value != std for value in stds):
        raise ValueError(
            f"input `{name}` is normalized differently in each channel, which the one scale of a "
            "uint8 input cannot say; move the normalization into the model as a "
            "`keras.layers.Normalization`, and pass mean 0 and std 1"
        )
    if not 0 <= mean <= 255:
        raise ValueError(f"input `{name}` has the mean {mean:g}, which is no pixel value 0..255")
    # A mean between two pixel values, such as 127.5, is off by half a step at most.
    return 1 / std, int(np.rint(mean))


def _code(model: Any, schema: Any) -> int:
    quantize = schema.BuiltinOperator.QUANTIZE
    for index, code in enumerate(model.operatorCodes):
        if code.builtinCode == quantize:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = quantize
    # What TensorFlow's converter writes for the same use.
    code.version = 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
