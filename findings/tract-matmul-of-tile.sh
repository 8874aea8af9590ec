#!/usr/bin/env bash
# tract 0.23.9 (onnx 1.23.2, onnxruntime 1.31.1): MatMul of what Tile repeated along the axis that is
# summed answers wrongly, without a word: the sum is over what was there before it was repeated.
# Repeated along another axis, as Keras's RepeatVector before a Dense layer is, the file is refused
# ("Trying to substitute a 1,3,5,F32 by 1,1,5,F32"). A Relu between the two makes both right.
#
# Seen (largest difference from ONNX Runtime over the largest answer):
#   repeated along the last axis: wrong by 0.95, along the axis before it: refused
#   with a Relu between: 0, 0
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


def found(shape, times, relu):
    rng = np.random.default_rng(0)
    constants = {"times": np.array(times), "w": rng.random((8, 5)).astype("float32")}
    nodes = [helper.make_node("Tile", ["x", "times"], ["t"])]
    if relu:
        nodes.append(helper.make_node("Relu", ["t"], ["p"]))
    nodes.append(helper.make_node("MatMul", ["p" if relu else "t", "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 5])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "m.onnx")
    x = rng.random(shape).astype("float32")
    right = onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0]
    try:
        made = tract.onnx().load("m.onnx").into_model().into_runnable().run([x])[0].to_numpy()
    except Exception as error:
        return "refused" if "Trying to substitute" in str(error) else str(error)
    return float(np.abs(made - right).max() / np.abs(right).max())


last, before = ([1, 3, 1], [1, 1, 8]), ([1, 1, 8], [1, 3, 1])
seen = [found(*place, relu=relu) for relu in (False, True) for place in (last, before)]
print("repeated along the last axis:", seen[0], "before it:", seen[1], "with Relu:", seen[2:])
wrong = seen[0] != "refused" and seen[0] > 0.05 and seen[1] == "refused"
sys.exit(0 if wrong and max(seen[2:]) < 1e-5 else "the behavior has changed")
PYTHON
