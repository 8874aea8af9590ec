#!/usr/bin/env bash
# keras 3.15.1, jax 0.10.2, numpy 2.4.6 (any backend does the same).
#
# `keras.distillation.LogitsDistillation()` has `loss="kl_divergence"`, and its docstring says that
# the teacher's knowledge is transferred by softened probabilities. Only an instance of
# `keras.losses.KLDivergence` gets a softmax before it: the name, the default, becomes the function
# `keras.losses.kl_divergence`, which reads the logits themselves as if they were probabilities,
# clipped to between 1e-7 and 1. A student that answers every class alike, with logits of 9, is then
# better than one that repeats the teacher: the loss is below zero, which no divergence is.
#
# Output seen:
#   default: repeats the teacher 0.000000, answers all alike -0.270312
#   KLDivergence(): repeats the teacher 0.000000, answers all alike 4.002136
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "keras==3.15.1" "jax==0.10.2" "numpy==2.4.6"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np
from keras.distillation import LogitsDistillation

teacher = np.array([[6.0, -3.0, 2.0]], "float32")
alike = np.full_like(teacher, 9.0)
found = {}
for name, loss in (
    ("default", LogitsDistillation()),
    ("KLDivergence()", LogitsDistillation(loss=keras.losses.KLDivergence())),
):
    found[name] = [float(loss.compute_loss(teacher, student)) for student in (teacher, alike)]
    print(
        f"{name}: repeats the teacher {found[name][0]:.6f}, answers all alike {found[name][1]:.6f}"
    )
assert found["default"][0] == 0 > found["default"][1], "the behavior has changed"
assert found["KLDivergence()"][1] > 1, "the behavior has changed"
PYTHON
