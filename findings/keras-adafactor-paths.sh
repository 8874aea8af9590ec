#!/usr/bin/env bash
# keras 3.15.1, jax 0.10.2, numpy 2.4.6 (any backend does the same).
#
# The path of an optimizer's variable is no name for it: Adafactor calls the row and the column
# average of every kernel by the last part of the weight's own name, so that all of them are
# `adafactor/kernel`, whatever the layer. Of Adam each slot has a path of its own. Who keeps or moves
# the state of an optimizer by path, as one does with the weights of a model, keeps one of them and
# loses the others without an error. Here 14 variables have 8 paths, and four averages share one.
#
# Output seen:
#   Adam: 10 variables, 10 paths
#   Adafactor: 14 variables, 8 paths; adafactor/kernel of shapes [(8,), (4,), (4,), (3,)]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "keras==3.15.1" "jax==0.10.2" "numpy==2.4.6"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import keras

model = keras.Sequential(
    [
        keras.Input((8,)),
        keras.layers.Dense(4, name="hidden"),
        keras.layers.Dense(3, name="logits"),
    ]
)
counts = []
for optimizer in (keras.optimizers.Adam(), keras.optimizers.Adafactor()):
    optimizer.build(model.trainable_variables)
    paths = [variable.path for variable in optimizer.variables]
    counts.append((len(paths), len(set(paths))))
    shared = [tuple(v.shape) for v in optimizer.variables if v.path == "adafactor/kernel"]
    print(
        f"{type(optimizer).__name__}: {len(paths)} variables, {len(set(paths))} paths"
        + (f"; adafactor/kernel of shapes {shared}" if shared else "")
    )
assert counts == [(10, 10), (14, 8)], "the behavior has changed"
PYTHON
