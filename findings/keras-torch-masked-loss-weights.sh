#!/usr/bin/env bash
# keras 3.15.1 on the PyTorch backend (torch 2.13.0, numpy 2.4.6, Python 3.11).
#
# A loss of Keras that gets a masked prediction and `sample_weight` as a tensor multiplies the mask
# into the caller's tensor: `sample_weight *= mask` is in place for a tensor of PyTorch, and not for
# those of TensorFlow and JAX, with which the same code is right. The mask counts as total / valid
# for means, so with the second call on the same tensor what counts does so twice over: the loss
# grows from call to call, and so it does between two losses that share their weights.
#
# Output seen:
#   first call 1, second 2, third 4; the weights are now [0. 0. 8. 8.]
#   with NumPy weights 1, 1, 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 torch==2.13.0 numpy==2.4.6
cd "$folder"
KERAS_BACKEND=torch "$folder/venv/bin/python" - <<'PYTHON'
import sys

import keras
import numpy as np

tokens = np.array([[0, 0, 1, 2]])
masked = keras.Sequential(
    [
        keras.layers.Embedding(3, 2, embeddings_initializer="zeros", mask_zero=True),
        keras.layers.Dense(1, bias_initializer="ones"),
    ]
)
loss = keras.losses.MeanSquaredError()
target = np.zeros((1, 4, 1), "float32")


def thrice(weights):
    return [float(loss(target, masked(tokens), sample_weight=weights).detach()) for _ in range(3)]


weights = keras.ops.ones((1, 4))
calls = thrice(weights)
now = keras.ops.convert_to_numpy(weights)[0]
print("first call {:.0f}, second {:.0f}, third {:.0f}".format(*calls), end="; ")
print(f"the weights are now {now}")
arrays = thrice(np.ones((1, 4), "float32"))
print("with NumPy weights {:.0f}, {:.0f}, {:.0f}".format(*arrays))
sys.exit(calls != [1, 2, 4] or now.tolist() != [0, 0, 8, 8] or arrays != [1, 1, 1])
PYTHON
