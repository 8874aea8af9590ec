#!/usr/bin/env bash
# ONNX Runtime rounds float weights to 8 bits by itself where activations are quantized.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, Python 3.11.
#
# A Gemm with float32 weights stands between DequantizeLinear and QuantizeLinear. Nothing in the
# file asks for quantized weights. At the default optimization level (from "basic" on) ONNX Runtime
# (WeightBiasQuantization) makes the weights int8, with one scale for all output channels and 127
# for the largest weight: channels of small weights lose everything. Keras and tf2onnx write such
# files for models trained with fake quantization of their activations.
#
# Seen here: largest error 0.0 of one step with optimization off, and at "basic" the channel of
# small weights is constant. A scale for each channel of the input, all equal, stops it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
cat > seen.py <<'PY'
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(0)
# Two output channels, one with weights a thousand times smaller.
weights = (rng.normal(size=(8, 2)) * [1e-3, 1.0]).astype(np.float32)
x = rng.normal(size=(6, 8)).astype(np.float32)


def model(by_channel):
    step, zero = np.float32(0.03), np.uint8(128)
    fine = np.float32(1e-4)
    own = np.full(8, step) if by_channel else np.array(step)
    values = {
        "step": np.array(step), "zero": np.array(zero), "own": own,
        "own_zero": np.full(own.shape, zero), "fine": np.array(fine), "w": weights,
        "pick": np.array([0]),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "own", "own_zero"], ["d"], axis=1),
        helper.make_node("Gemm", ["d", "w"], ["p"]),
        helper.make_node("QuantizeLinear", ["p", "fine", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "fine", "zero"], ["s"]),
        helper.make_node("Gather", ["s", "pick"], ["y"], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(a, n) for n, a in values.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return made.SerializeToString()


def run(blob, level):
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].ravel()


off = run(model(False), "ORT_DISABLE_ALL")
basic = run(model(False), "ORT_ENABLE_BASIC")
channel = run(model(True), "ORT_ENABLE_BASIC")
print("channel of small weights, optimization off:   ", off)
print("the same file at basic:                       ", basic)
print("basic, the input with a scale for each channel:", channel)
same = np.abs(off - basic).max() < 1e-3 * np.abs(off).max()
sys.exit(1 if same or np.abs(off - channel).max() > 2e-4 else 0)
PY
venv/bin/python seen.py
