#!/usr/bin/env bash
# TensorFlow 2.21.0, TFLiteConverter, int16 activations with int8 weights
# (EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8); numpy 2.4.6; Python 3.11.
#
# An input that is 0 in all calibration samples, as the start state of an unrolled recurrent cell
# is, gets a scale of about 4e-43, a number that float32 holds only as a denormal. Where a matrix
# product with a bias reads it, the converter then stores infinity as the scale of the weights and
# of the bias. No step warns or fails, and the file answers something else: the product of zeros
# hides the bias. The int8 file of the same model and the same samples takes 7.8e-09 as the scale
# and is right to its rounding.
#
# Output seen:
#   int8     smallest scale 1.86e-10, infinite scales 0, worst error 0.029
#   int16x8  smallest scale 3.59e-43, infinite scales 6, worst error 0.921
#   as described
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow==2.21.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf

rng = np.random.default_rng(0)
kernel = tf.constant(rng.normal(size=(4, 3)).astype("float32"))
recurrent = tf.constant(rng.normal(size=(3, 3)).astype("float32"))
bias = tf.constant(np.float32([0.5, -0.3, 0.2]))
zero = np.zeros((1, 3), "float32")
samples = rng.normal(size=(50, 1, 4)).astype("float32")


@tf.function(input_signature=[tf.TensorSpec((1, 4)), tf.TensorSpec((1, 3))])
def step(x, state):
    product = tf.nn.bias_add(tf.matmul(state, recurrent), bias)
    return tf.tanh(tf.matmul(x, kernel) + product)


ops = tf.lite.OpsSet
kinds = {
    "int8": ops.TFLITE_BUILTINS_INT8,
    "int16x8": ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
}
found = {}
for name, kind in kinds.items():
    converter = tf.lite.TFLiteConverter.from_concrete_functions([step.get_concrete_function()])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x, zero] for x in samples)
    converter.target_spec.supported_ops = [kind]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    inputs = {tuple(row["shape"]): row["index"] for row in interpreter.get_input_details()}
    output = interpreter.get_output_details()[0]["index"]
    worst = 0.0
    for x in samples:
        interpreter.set_tensor(inputs[1, 4], x)
        interpreter.set_tensor(inputs[1, 3], zero)
        interpreter.invoke()
        apart = interpreter.get_tensor(output) - step(x, zero).numpy()
        worst = max(worst, float(np.abs(apart).max()))
    rows = [row["quantization_parameters"]["scales"] for row in interpreter.get_tensor_details()]
    scales = np.concatenate([np.ravel(row) for row in rows])
    found[name] = (scales.min(), int(np.isinf(scales).sum()), worst)
    print(
        f"{name:8} smallest scale {scales.min():.3g}, infinite scales {found[name][1]}, "
        f"worst error {worst:.3f}"
    )
(small, none, right), (tiny, infinite, wrong) = found["int8"], found["int16x8"]
same = small > 1e-12 and none == 0 and right < 0.1 and tiny < 1e-38 and infinite and wrong > 0.5
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
