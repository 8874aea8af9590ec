#!/usr/bin/env bash
# keras 3.15.1, jax 0.10.2, numpy 2.4.6 (any backend does the same).
#
# A Functional model made of a dict of inputs, `keras.Model({"a": a, "c": c}, ...)`, does not look up
# its inputs by name in a dict of data that holds one array more: the arrays are flattened in the
# order of the alphabet and the first ones are taken. With data of `a`, `b` and `c` the input `c` reads
# `b`, with nothing but a warning on the structure, in calls, `predict` and `fit`. The same model made of
# the list `[a, c]` takes what it names, and says nothing.
#
# Output seen:
#   10 a + c of a = 1, b = 2, c = 3: made of a list 13, made of a dict 12; warnings 0 and 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "keras==3.15.1" "jax==0.10.2" "numpy==2.4.6"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import warnings

import keras
import numpy as np

a, c = (keras.Input((1,), name=name) for name in "ac")
data = {name: np.full((1, 1), value, "float32") for name, value in (("a", 1), ("b", 2), ("c", 3))}
found, said = [], []
for inputs in ([a, c], {"a": a, "c": c}):
    model = keras.Model(inputs, 10 * a + c)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.append(int(np.asarray(model(data))[0, 0]))
    said.append(sum("structure" in str(warning.message) for warning in caught))
print(
    f"10 a + c of a = 1, b = 2, c = 3: made of a list {found[0]}, made of a dict {found[1]}; "
    f"warnings {said[0]} and {said[1]}"
)
assert found == [13, 12], "the behavior has changed"
PYTHON
