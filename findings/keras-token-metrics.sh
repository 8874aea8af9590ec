#!/usr/bin/env bash
# keras 3.15.1, jax 0.10.2, numpy 2.4.6 (any backend does the same).
#
# A metric of tokens is no mean over tokens: `keras.metrics.Mean`, and with it every accuracy, takes
# the mean over the positions of each sample first, of values and of weights alike, and then the
# mean over samples. So a token of a batch that is padded to 8 counts a quarter of one of a batch
# padded to 2, also with `sample_weight` of 0 and 1 for what is padding: the accuracy depends on how
# the data were batched. Here 4 right tokens of 20 are an accuracy of 0.5, not 0.2.
#
# Output seen:
#   without weights 0.5, with a weight for each token 0.5; right tokens 4 of 20, 0.2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "keras==3.15.1" "jax==0.10.2" "numpy==2.4.6"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np

metric = keras.metrics.SparseCategoricalAccuracy()
right, tokens, found = 0, 0, []
for weighted in (False, True):
    metric.reset_state()
    for length, answer in ((2, 0), (8, 1)):
        labels = np.zeros((2, length), "int32")
        scores = np.zeros((2, length, 2), "float32")
        scores[..., answer] = 1.0
        metric.update_state(labels, scores, np.ones((2, length)) if weighted else None)
        right += 0 if weighted else int((scores.argmax(-1) == labels).sum())
        tokens += 0 if weighted else labels.size
    found.append(float(metric.result()))
print(
    f"without weights {found[0]}, with a weight for each token {found[1]}; "
    f"right tokens {right} of {tokens}, {right / tokens}"
)
assert found == [0.5, 0.5] and (right, tokens) == (4, 20), "the behavior has changed"
PYTHON
