#!/usr/bin/env bash
# TensorFlow 2.21.0, TFLiteConverter, int8; ai-edge-litert 2.3.0; numpy 2.4.6; Python 3.11.
#
# OpResolverType.BUILTIN_REF, the reference kernels that are there to check others by, computes an
# int8 SUM otherwise than the optimized kernels: those are right to a step, the reference is off by
# a large part of the range. Whoever takes it for the truth takes the right file for a wrong one.
#
# Output seen:
#   AUTO                               at most 0.5 steps from the sum
#   BUILTIN_WITHOUT_DEFAULT_DELEGATES  at most 0.5 steps from the sum
#   BUILTIN_REF                        at most 151.9 steps from the sum
#   as described
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow==2.21.0 ai-edge-litert==2.3.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType

samples = np.random.default_rng(0).normal(0.3, 1, size=(50, 1, 8, 3)).astype("float32")


@tf.function(input_signature=[tf.TensorSpec((1, 8, 3))])
def total(x):
    return tf.reduce_sum(x, axis=1)


converter = tf.lite.TFLiteConverter.from_concrete_functions(
    [total.get_concrete_function()], total
)
converter.optimizations = [tf.lite.Optimize.DEFAULT]
converter.representative_dataset = lambda: ([sample] for sample in samples)
converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
converter.inference_input_type = converter.inference_output_type = tf.int8
blob = converter.convert()

worst = {}
for name in ("AUTO", "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "BUILTIN_REF"):
    runtime = Interpreter(
        model_content=blob, experimental_op_resolver_type=OpResolverType[name]
    )
    runtime.allocate_tensors()
    (given,), (made,) = runtime.get_input_details(), runtime.get_output_details()
    (scale, zero), (step, start) = given["quantization"], made["quantization"]
    worst[name] = 0.0
    for sample in samples:
        steps = np.clip(np.round(sample / scale) + zero, -128, 127).astype(np.int8)
        runtime.set_tensor(given["index"], steps)
        runtime.invoke()
        want = np.sum((steps.astype(float) - zero) * scale, axis=1)
        got = (runtime.get_tensor(made["index"]).astype(float) - start) * step
        # What lies beyond the range is cut off, by right.
        want = np.clip(want, (-128 - start) * step, (127 - start) * step)
        worst[name] = max(worst[name], float(np.abs(got - want).max() / step))
    print(f"{name:34} at most {worst[name]:.1f} steps from the sum")
if worst["BUILTIN_REF"] < 20 or max(worst["AUTO"], list(worst.values())[1]) > 2:
    raise SystemExit("no longer as described")
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
