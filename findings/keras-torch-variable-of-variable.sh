#!/usr/bin/env bash
# keras 3.15.1 on the PyTorch backend (torch 2.13.0, numpy 2.4.6, Python 3.11).
#
# `keras.Variable(variable)` makes no copy there: both hold the same Parameter, so what is assigned
# to the one is the value of the other. On TensorFlow and JAX the same line copies, as the word
# `initializer` of its argument says. So a snapshot of weights, as for a moving average or a student
# that begins as its teacher, follows the training and stays equal to it for ever, without an error.
# `keras.Variable(keras.ops.copy(variable))` is a copy everywhere.
#
# Output seen:
#   Variable(variable) after the original got 5: 5
#   Variable(ops.copy(variable)) after that: 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 torch==2.13.0 numpy==2.4.6
cd "$folder"
KERAS_BACKEND=torch "$folder/venv/bin/python" - <<'PYTHON'
import sys

import keras

variable = keras.Variable([1.0])
taken, copied = keras.Variable(variable), keras.Variable(keras.ops.copy(variable))
variable.assign([5.0])
shared, own = (float(keras.ops.convert_to_numpy(v)[0]) for v in (taken, copied))
print(f"Variable(variable) after the original got 5: {shared:.0f}")
print(f"Variable(ops.copy(variable)) after that: {own:.0f}")
sys.exit((shared, own) != (5.0, 1.0))
PYTHON
