#!/usr/bin/env bash
# tflite-micro 0.dev20261023182759 (ai-edge-litert 2.3.0): DEQUANTIZE of int8 weights with a scale
# for each channel takes the first scale for all of them. It loads the file and answers wrongly,
# without a word; LiteRT computes what the format says. Weight-only int8 files are of that kind.
#
# Seen, for int8 values of 10 in four channels with scales 0.1, 0.2, 0.3 and 0.4:
#   LiteRT [1. 2. 3. 4.], TensorFlow Lite for Microcontrollers [1. 1. 1. 1.]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tflite-micro==0.dev20261023182759 ai-edge-litert==2.3.0
cd "$folder"
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from tflite_micro import runtime

kinds, operators = schema.TensorType, schema.BuiltinOperator
model, graph = schema.ModelT(), schema.SubGraphT()
model.version, model.subgraphs, model.buffers = 3, [graph], []
graph.tensors, graph.operators, graph.inputs, graph.outputs = [], [], [0], [3]
model.operatorCodes = []


def tensor(name, kind, shape, values=None, scales=None):
    made, buffer = schema.TensorT(), schema.BufferT()
    if values is not None:
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    model.buffers.append(buffer)
    made.name, made.type, made.shape = name.encode(), kind, shape
    made.buffer = len(model.buffers) - 1
    if scales is not None:
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale, made.quantization.zeroPoint = scales, [0] * len(scales)
        made.quantization.quantizedDimension = 1
    graph.tensors.append(made)


def operator(name, inputs, output, version):
    code, made = schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(operators, name)
    code.version = version
    model.operatorCodes.append(code)
    made.opcodeIndex = len(model.operatorCodes) - 1
    made.inputs, made.outputs = inputs, [output]
    graph.operators.append(made)
    return made


model.buffers.append(schema.BufferT())
tensor("x", kinds.FLOAT32, [1, 4])
tensor("w", kinds.INT8, [1, 4], np.full((1, 4), 10, np.int8), [0.1, 0.2, 0.3, 0.4])
tensor("d", kinds.FLOAT32, [1, 4])
tensor("y", kinds.FLOAT32, [1, 4])
operator("DEQUANTIZE", [1], 2, 5)
add = operator("ADD", [0, 2], 3, 1)
add.builtinOptionsType, add.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
blob = bytes(flatbuffer_utils.convert_object_to_bytearray(model))

x = np.zeros((1, 4), "float32")
litert = Interpreter(model_content=blob)
litert.allocate_tensors()
litert.set_tensor(0, x)
litert.invoke()
right = litert.get_tensor(3)[0]
micro = runtime.Interpreter.from_bytes(blob)
micro.set_input(x, 0)
micro.invoke()
found = np.array(micro.get_output(0))[0]
print(f"LiteRT {right}, TensorFlow Lite for Microcontrollers {found}")
wrong = np.allclose(right, [1, 2, 3, 4]) and np.allclose(found, 1)
sys.exit(0 if wrong else "the behavior has changed")
PYTHON
