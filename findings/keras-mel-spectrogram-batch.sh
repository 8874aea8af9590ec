#!/usr/bin/env bash
# keras 3.15.1, jax 0.10.2, numpy 2.4.6 (any backend does the same).
#
# `keras.layers.MelSpectrogram` with its defaults gives a recording other values beside a louder one.
# Its decibels are cut at `top_db` = 80 below the largest value of the whole batch, not of each
# recording (`log_spec = maximum(log_spec, max(log_spec) - top_db)` without an axis). A model trained
# on batches reads other numbers of the same sound when it is asked about one sound at a time, as a
# device does. `power_to_db=False` and a logarithm of one's own does not.
#
# Output seen:
#   quiet tone alone: from -83.1 to -3.1 dB; beside one 40 dB louder: from -43.1 to -3.1 dB; values
#   that changed: 892 of 1024
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "keras==3.15.1" "jax==0.10.2" "numpy==2.4.6"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np

time = np.arange(8000) / 8000
tone = np.sin(2 * np.pi * 440 * time).astype("float32")[None]
quiet, loud = 0.01 * tone, tone
layer = keras.layers.MelSpectrogram(
    fft_length=256, sequence_stride=256, sampling_rate=8000, num_mel_bins=32
)
alone = np.asarray(layer(quiet))[0]
beside = np.asarray(layer(np.concatenate([quiet, loud])))[0]
changed = int((abs(alone - beside) > 0.1).sum())
print(
    f"quiet tone alone: from {alone.min():.1f} to {alone.max():.1f} dB; beside one 40 dB louder: "
    f"from {beside.min():.1f} to {beside.max():.1f} dB; values that changed: {changed} of "
    f"{alone.size}"
)
assert changed > alone.size / 4 and beside.min() > alone.min() + 20, "the behavior has changed"
PYTHON
