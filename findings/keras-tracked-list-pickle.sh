#!/usr/bin/env bash
# keras 3.15.1, jax 0.10.2, numpy 2.4.6, cloudpickle 3.1.2 (any backend does the same).
#
# A list of integers that is given to a Keras layer as an attribute is another one when it is read: a
# `TrackedList`, which is a list by `isinstance`, prints as one, and goes through `json` and `copy`. It
# cannot be sent to another process: `pickle` refuses it, as it holds a lambda of the layer, and
# `cloudpickle`, which Ray and Dask send with, writes it and fails to read it, where it arrives. So a
# result in which one such list is left, as the shape of an input, is lost on the way back. `list(it)`
# is a plain one.
#
# Output seen:
#   a list: True, type TrackedList, json [28, 28, 1]
#   pickle writes it: False
#   cloudpickle writes it: True, and reads it: False ('TrackedList' object has no attribute 'tracker')
#   cloudpickle of list(it): [28, 28, 1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    "keras==3.15.1" "jax==0.10.2" "numpy==2.4.6" "cloudpickle==3.1.2"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import json
import pickle

import cloudpickle
import keras


class Scaled(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.sizes = [28, 28, 1]


sizes = Scaled().sizes
print(f"a list: {isinstance(sizes, list)}, type {type(sizes).__name__}, json {json.dumps(sizes)}")
assert type(sizes) is not list and json.loads(json.dumps(sizes)) == [28, 28, 1]

written = True
try:
    pickle.dumps(sizes)
except (AttributeError, pickle.PicklingError):
    written = False
print(f"pickle writes it: {written}")

data, why = cloudpickle.dumps(sizes), ""
try:
    pickle.loads(data)
except AttributeError as error:
    why = str(error)
print(f"cloudpickle writes it: True, and reads it: {not why} ({why})")
print(f"cloudpickle of list(it): {pickle.loads(cloudpickle.dumps(list(sizes)))}")
assert not written and "tracker" in why, "That is no longer so."
PYTHON
