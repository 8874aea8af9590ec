#!/usr/bin/env bash
# tract 0.23.9 (onnx 1.23.2, onnxruntime 1.31.1): a Softmax between two pairs of QuantizeLinear and
# DequantizeLinear, as every quantizer of ONNX writes it, gives the same value for all classes. No
# error, no warning. The same Softmax without the first pair is right, and so is the file in ONNX
# Runtime.
#
# Seen:
#   pairs around:  ONNX Runtime [0.65 0.24 0.09 0.03], tract [1. 1. 1. 1.]
#   pair behind:   ONNX Runtime [0.65 0.24 0.09 0.03], tract [0.65 0.24 0.09 0.03]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tract==0.23.9 onnx==1.23.2 onnxruntime==1.31.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
import tract
from onnx import TensorProto, helper, numpy_helper

x = np.array([[3.0, 2.0, 1.0, 0.0]], "float32")


def model(path, before):
    constants = {
        "scale_in": np.float32(4 / 255),
        "zero_in": np.uint8(0),
        "scale_out": np.float32(1 / 255),
        "zero_out": np.uint8(0),
    }
    node = helper.make_node
    nodes = []
    if before:
        nodes += [
            node("QuantizeLinear", ["x", "scale_in", "zero_in"], ["q"]),
            node("DequantizeLinear", ["q", "scale_in", "zero_in"], ["d"]),
        ]
    nodes += [
        node("Softmax", ["d" if before else "x"], ["s"], axis=-1),
        node("QuantizeLinear", ["s", "scale_out", "zero_out"], ["p"]),
        node("DequantizeLinear", ["p", "scale_out", "zero_out"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, path)
    right = onnxruntime.InferenceSession(path).run(None, {"x": x})[0][0]
    found = tract.onnx().load(path).into_model().into_runnable().run([x])[0].to_numpy()[0]
    return right, found


np.set_printoptions(precision=2, suppress=True)
right, found = model("around.onnx", True)
print(f"pairs around:  ONNX Runtime {right}, tract {found}")
other, same = model("behind.onnx", False)
print(f"pair behind:   ONNX Runtime {other}, tract {same}")
wrong = np.ptp(found) == 0 and np.ptp(right) > 0.5 and np.abs(same - other).max() < 0.01
sys.exit(0 if wrong else "the behavior has changed")
PYTHON
