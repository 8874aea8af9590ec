#!/usr/bin/env bash
# keras 3.15.1, tensorflow 2.21.0 (tensorflow-cpu), numpy 2.4.6.
#
# With a seed set, `fit(x, y, shuffle=True)` from arrays trains in one and the same order in every
# epoch on the TensorFlow backend: the rows are permuted once by the seed, not anew for each epoch.
# The permutation is drawn by `tf.random.shuffle` within a function that `tf.data` sets up anew for
# each epoch's iterator, and with a seed set its generator then begins where it did before. Without
# a seed each epoch has an order of its own. Whoever seeds a run to be able to repeat it gets batches
# that never change, and no word of it.
#
# Output seen:
#   with a seed: 1 order in 4 epochs; without: 4 orders
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "keras==3.15.1" "tensorflow-cpu==2.21.0" "numpy==2.4.6"
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np
import tensorflow as tf

EPOCHS, ROWS = 4, 64


class Seeing(keras.Model):
    """Notes the rows of each batch, in the order in which they come."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.seen = []

    def call(self, x):
        tf.py_function(lambda rows: self.seen.extend(rows.numpy()[:, 0].tolist()), [x], [])
        return self.dense(x)


def orders():
    model = Seeing()
    model.compile("sgd", "mse", jit_compile=False)
    x = np.arange(ROWS, dtype="float32")[:, None]
    model(x)
    model.seen.clear()
    model.fit(x, np.zeros((ROWS, 1)), batch_size=16, epochs=EPOCHS, shuffle=True, verbose=0)
    rows = np.array(model.seen[-EPOCHS * ROWS :]).reshape(EPOCHS, ROWS)
    assert (np.sort(rows) == np.arange(ROWS)).all()
    return len(np.unique(rows, axis=0))


without = orders()
keras.utils.set_random_seed(0)
with_seed = orders()
print(f"with a seed: {with_seed} order in {EPOCHS} epochs; without: {without} orders")
assert (with_seed, without) == (1, EPOCHS), "the behavior has changed"
PYTHON
