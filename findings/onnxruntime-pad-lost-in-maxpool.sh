#!/usr/bin/env bash
# onnxruntime 1.20.1 and 1.31.1 (onnx 1.23.2, numpy 2.4.6, Python 3.11).
#
# At its default optimization level (from "basic" on) ONNX Runtime makes a Pad with zeros part of the
# MaxPool behind it. MaxPool pads with nothing, so where all values of a window are negative the
# zero, which is the largest, is lost: the answer is wrong, without a word. It is the stem of ResNet
# (ZeroPadding2D, MaxPooling2D) with an activation other than ReLU. Right are 1.17.3, 1.32.0, and all
# of them with optimization off. A Pad with 1e-38 in place of 0 is left alone.
#
# Output seen, of a Pad of [[-1, -2]] by one and a MaxPool of 3 over it, where 0 is right:
#   onnxruntime 1.20.1: [-1. -1.], with optimization off [0. 0.]
#   onnxruntime 1.31.1: [-1. -1.], with optimization off [0. 0.]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > run.py <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
graph = helper.make_graph(
    [
        node("Pad", ["x", "pads"], ["padded"]),
        node("MaxPool", ["padded"], ["y"], kernel_shape=[3]),
    ],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2])],
    [numpy_helper.from_array(np.array([0, 0, 1, 0, 0, 1], "int64"), "pads")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)


def answer(level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": np.array([[[-1, -2]]], "float32")})[0].ravel()


levels = onnxruntime.GraphOptimizationLevel
default, off = answer(levels.ORT_ENABLE_ALL), answer(levels.ORT_DISABLE_ALL)
print(f"onnxruntime {onnxruntime.__version__}: {default}, with optimization off {off}")
sys.exit(default.tolist() != [-1, -1] or off.tolist() != [0, 0])
PYTHON
for version in 1.20.1 1.31.1; do
  python3 -m venv "venv-$version"
  "venv-$version/bin/pip" install --quiet "onnxruntime==$version" onnx==1.23.2 numpy==2.4.6
  ORT_DISABLE_TELEMETRY=1 "venv-$version/bin/python" run.py
done
