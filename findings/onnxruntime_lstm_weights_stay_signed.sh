#!/usr/bin/env bash
# quantize_dynamic(weight_type=QUInt8) leaves the weights of LSTM layers signed.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, sympy 1.14.0, Python 3.11.
#
# Unsigned weights are asked for so that products do not saturate in 16 bits on x86 processors
# without VNNI (ONNX Runtime's own advice). MatMul gets them; LSTM becomes DynamicQuantizeLSTM with
# int8 weights and no word. quantize_static(quant_format=QOperator, per_channel=True,
# weight_type=QUInt8) does the same with Conv: QLinearConv has int8 weights.
#
# Seen here: "DynamicQuantizeLSTM int8, asked for uint8" and "QLinearConv int8, asked for uint8".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6 sympy==1.14.0
cat > seen.py <<'PY'
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static,
)

rng = np.random.default_rng(0)


def save(nodes, shape, out, values, path):
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in values],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )


def kind(path, operator):
    model = onnx.load(path)
    values = {e.name: numpy_helper.to_array(e) for e in model.graph.initializer}
    (node,) = [n for n in model.graph.node if n.op_type == operator]
    found = str(values[node.input[3 if operator == "QLinearConv" else 1]].dtype)
    print(f"{operator} {found}, asked for uint8")
    return found


save(
    [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=4)],
    [5, 1, 3], [5, 1, 1, 4], [("w", (1, 16, 3)), ("r", (1, 16, 4))], "lstm.onnx",
)
quantize_dynamic("lstm.onnx", "lstm8.onnx", weight_type=QuantType.QUInt8)


class Reader(CalibrationDataReader):
    def __init__(self):
        self.rows = iter([{"x": rng.normal(size=(1, 2, 6, 6)).astype(np.float32)}])

    def get_next(self):
        return next(self.rows, None)


save(
    [helper.make_node("Conv", ["x", "w"], ["y"])],
    [1, 2, 6, 6], [1, 4, 4, 4], [("w", (4, 2, 3, 3))], "conv.onnx",
)
quantize_static(
    "conv.onnx", "conv8.onnx", Reader(), quant_format=QuantFormat.QOperator, per_channel=True,
    activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8,
)
found = {kind("lstm8.onnx", "DynamicQuantizeLSTM"), kind("conv8.onnx", "QLinearConv")}
sys.exit(0 if found == {"int8"} else 1)
PY
venv/bin/python seen.py
