#!/usr/bin/env bash
# ai-edge-quantizer 0.10.0 (ai-edge-litert 2.3.0) and tflite-runtime 2.14.0: a file quantized with
# `dynamic_wi8_afp32` has a scale for each channel, which FULLY_CONNECTED takes since version 12; the
# file goes on saying version 1. TensorFlow Lite 2.14, which knows versions up to 11, would refuse
# version 12, believes the file, and answers wrongly without a word: of y = Wx + b it gives b.
#
# Seen:
#   FULLY_CONNECTED version 1, 32 scales, min_runtime_version as before
#   LiteRT 2.3.0: within 1 % of float; TensorFlow Lite 2.14.0: the bias alone (all ones)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ai-edge-quantizer==0.10.0 ai-edge-litert==2.3.0
python3 -m venv "$folder/old"
"$folder/old/bin/pip" install --quiet tflite-runtime==2.14.0 numpy==1.26.4
cd "$folder"
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter
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
tool = quantizer.Quantizer(bytearray(blob), recipe.dynamic_wi8_afp32())
made = bytes(tool.quantize().quantized_model)
open("m.tflite", "wb").write(made)
x = np.random.default_rng(1).normal(size=(1, 64)).astype("float32")
np.save("x.npy", x)
np.save("float.npy", x @ weights.T.astype("float32") + 1)
new = Interpreter(model_content=made)
new.allocate_tensors()
new.set_tensor(new.get_input_details()[0]["index"], x)
new.invoke()
np.save("new.npy", new.get_tensor(new.get_output_details()[0]["index"]))
model = flatbuffer_utils.read_model_from_bytearray(bytearray(made))
scales = max(
    len(tensor.quantization.scale)
    for tensor in model.subgraphs[0].tensors
    if tensor.quantization is not None and tensor.quantization.scale is not None
)
print(f"FULLY_CONNECTED version {model.operatorCodes[0].version}, {scales} scales")
sys.exit(0 if model.operatorCodes[0].version < 12 else "the behavior has changed")
PYTHON
"$folder/old/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import numpy as np
from tflite_runtime.interpreter import Interpreter

old = Interpreter(model_path="m.tflite")
old.allocate_tensors()
old.set_tensor(old.get_input_details()[0]["index"], np.load("x.npy"))
old.invoke()
found = old.get_tensor(old.get_output_details()[0]["index"])
right, new = np.load("float.npy"), np.load("new.npy")
apart = [float(np.abs(answer - right).max() / np.abs(right).max()) for answer in (new, found)]
print(f"LiteRT 2.3.0: {apart[0]:.1g} from float; TensorFlow Lite 2.14.0: {apart[1]:.1g}")
print(f"TensorFlow Lite 2.14.0 answers {np.unique(found)}")
sys.exit(0 if apart[0] < 0.03 and apart[1] > 0.3 else "the behavior has changed")
PYTHON
