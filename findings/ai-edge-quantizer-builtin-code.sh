#!/usr/bin/env bash
# ai-edge-quantizer 0.10.0 (ai-edge-litert 2.3.0): the DEQUANTIZE operators that it adds to a file
# carry `builtin_code` 6 and `deprecated_builtin_code` 0, which is ADD. TensorFlow's converter writes
# both fields, and readers of the older one take the operator for an ADD with one input: OpenVINO
# 2026.4.1 refuses such a file ("Chosen Builtin Option is not accessible for this node").
#
# Seen:
#   float file:        FULLY_CONNECTED builtin_code 9, deprecated_builtin_code 9
#   weight-only file:  DEQUANTIZE builtin_code 6, deprecated_builtin_code 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ai-edge-quantizer==0.10.0 ai-edge-litert==2.3.0
cd "$folder"
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from ai_edge_quantizer import quantizer, recipe

kinds, operators = schema.TensorType, schema.BuiltinOperator
model, graph = schema.ModelT(), schema.SubGraphT()
model.version, model.subgraphs, model.buffers = 3, [graph], [schema.BufferT()]
graph.name, graph.tensors, graph.inputs, graph.outputs = b"main", [], [0], [3]


def tensor(name, shape, values=None):
    made, buffer = schema.TensorT(), schema.BufferT()
    if values is not None:
        buffer.data = np.frombuffer(values.astype("float32").tobytes(), np.uint8)
    model.buffers.append(buffer)
    made.name, made.type, made.shape = name.encode(), kinds.FLOAT32, shape
    made.buffer = len(model.buffers) - 1
    graph.tensors.append(made)


weights = np.random.default_rng(0).normal(size=(32, 64))
tensor("x", [1, 64])
tensor("w", [32, 64], weights)
tensor("b", [32], np.ones(32))
tensor("y", [1, 32])
code, operator = schema.OperatorCodeT(), schema.OperatorT()
code.builtinCode = code.deprecatedBuiltinCode = operators.FULLY_CONNECTED
code.version = 1
operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 1, 2], [3]
operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
operator.builtinOptions = schema.FullyConnectedOptionsT()
model.operatorCodes, graph.operators = [code], [operator]
blob = flatbuffer_utils.convert_object_to_bytearray(model)
tool = quantizer.Quantizer(bytearray(blob), recipe.weight_only_wi8_afp32())
made = bytes(tool.quantize().quantized_model)
found = {}
for code in flatbuffer_utils.read_model_from_bytearray(bytearray(made)).operatorCodes:
    found[code.builtinCode] = code.deprecatedBuiltinCode
print(f"FULLY_CONNECTED: deprecated_builtin_code {found[operators.FULLY_CONNECTED]}")
print(f"DEQUANTIZE: deprecated_builtin_code {found[operators.DEQUANTIZE]}")
sys.exit(0 if found[operators.DEQUANTIZE] == operators.ADD else "the behavior has changed")
PYTHON
