#!/usr/bin/env bash
# onnxruntime 1.31.1 (onnxruntime.transformers.float16), onnx 1.23.2, numpy 2.4.6, Python 3.11.
#
# convert_float_to_float16 writes a file that is no valid ONNX where two operators of its default
# list of those that stay float32 (Min, Max, TopK, CumSum and others) read the same tensor, as the
# positive and negative half of an activation do: each gets a Cast of its own in front of it, and
# all of these have one output name. No step fails or warns; the checker and ONNX Runtime itself
# refuse the result. With one such operator the file is right.
#
# Output seen:
#   one reader: 1 Cast to float32 of 1 name; the checker takes it, ONNX Runtime takes it
#   two readers: 2 Casts to float32 of 1 name; the checker refuses it, ONNX Runtime refuses it
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
ORT_DISABLE_TELEMETRY=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel


def halves(kinds):
    """A tensor, and the larger or smaller of it and zero."""
    border = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", *kinds)
    ]
    nodes = [helper.make_node("Neg", ["x"], ["middle"])]
    nodes += [helper.make_node(kind, ["middle", "zero"], [kind]) for kind in kinds]
    zero = numpy_helper.from_array(np.zeros(4, "float32"), "zero")
    graph = helper.make_graph(nodes, "halves", border[:1], border[1:], [zero])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def taken(call):
    try:
        call()
    except Exception:
        return False
    return True


def seen(*kinds):
    model = halves(kinds)
    onnx.checker.check_model(model, full_check=True)
    made = convert_float_to_float16(model, keep_io_types=True)
    casts = [node for node in made.graph.node if node.op_type == "Cast"]
    names = [node.output[0] for node in casts if node.input[0] == "middle"]
    if len(names) == 1:
        # It leaves the nodes unsorted, which is another matter; sorting drops no node here.
        OnnxModel(made).topological_sort()
    valid = taken(lambda: onnx.checker.check_model(made))
    loads = taken(lambda: onnxruntime.InferenceSession(made.SerializeToString()))
    return len(names), len(set(names)), valid, loads


found = {"one reader": seen("Max"), "two readers": seen("Max", "Min")}
for what, (casts, names, valid, loads) in found.items():
    print(f"{what}: {casts} Cast{'s' if casts > 1 else ''} to float32 of {names} name;", end=" ")
    print(f"the checker {'takes' if valid else 'refuses'} it,", end=" ")
    print(f"ONNX Runtime {'takes' if loads else 'refuses'} it")
sys.exit(list(found.values()) != [(1, 1, True, True), (2, 1, False, False)])
PYTHON
