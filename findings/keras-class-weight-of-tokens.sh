#!/usr/bin/env bash
# keras 3.15.1, jax 0.10.2, numpy 2.4.6 (any backend does the same).
#
# `class_weight` weighs no tokens: of labels (batch, length), as a token classifier has them, Keras
# takes the place of the greatest label in each row for the class of the row, and its weight for all
# tokens of it, without a word. Flags (batch, units) of a multi-label classifier are read the same
# way. Here class 1 has the weight 10, and both rows hold three tokens of class 0 and one of class
# 1, at the place 1 or 2: the loss of one row is 10 times that of the other.
#
# Output seen:
#   losses of the two rows 10.0 and 1.0; weighed token by token 3.25 and 3.25
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "keras==3.15.1" "jax==0.10.2" "numpy==2.4.6"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np

labels = np.array([[0, 1, 0, 0], [0, 0, 1, 0]])
weights = {0: 1.0, 1: 10.0}
inputs = keras.Input((4, 1))
model = keras.Model(inputs, keras.layers.Dense(2, kernel_initializer="zeros")(inputs))
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.SGD(0.0), loss)
x = np.zeros((2, 4, 1), "float32")
found, wanted = [], []
for row in (slice(0, 1), slice(1, 2)):
    by_token = np.vectorize(weights.get)(labels[row])
    for options, rows in (({"class_weight": weights}, found), ({"sample_weight": by_token}, wanted)):
        value = model.fit(x[row], labels[row], verbose=0, **options).history["loss"][0]
        rows.append(round(float(value) / np.log(2.0), 3))
print(
    f"losses of the two rows {found[0]} and {found[1]}; weighed token by token {wanted[0]} and "
    f"{wanted[1]}"
)
assert found == [10.0, 1.0] and wanted == [3.25, 3.25], "the behavior has changed"
PYTHON
