"""4-bit weights of ONNX files: what training rounded stays as it was trained."""

import numpy as np
import pytest

from keras_kd.export.formats.onnx import int4

RNG = np.random.default_rng(0)


def unpacked(matrix):
    """`w' = (q - 8) s` from what the file holds."""
    packed, scales = int4.blocks(matrix)
    steps = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    values = (steps.astype("float32") - 8) * scales.reshape(steps.shape[0], -1, 1)
    return values.reshape(len(values), -1).T[: len(matrix)]


@pytest.mark.parametrize("axis", [0, None], ids=["by column", "by matrix"])
def test_weights_on_a_trained_grid_keep_their_values(axis):
    raw = RNG.normal(size=(70, 5)).astype("float32")
    raw[:, 3] = 0
    scale = np.abs(raw).max(axis=axis, keepdims=True) / np.float32(7)
    trained = np.round(raw / np.maximum(scale, 1e-9)) * scale
    np.testing.assert_allclose(unpacked(trained), trained, rtol=1e-6)


def test_other_weights_meet_the_extreme_of_each_block():
    raw = RNG.normal(size=(70, 5)).astype("float32")
    got = unpacked(raw)
    for start in (0, 32, 64):
        block, rounded = raw[start : start + 32], got[start : start + 32]
        row = np.abs(block).argmax(axis=0)
        np.testing.assert_allclose(rounded[row, range(5)], block[row, range(5)], rtol=1e-6)
        # The far end of the other sign, +8 steps, does not exist: it is met within a whole step.
        assert (np.abs(rounded - block) <= np.abs(block).max(axis=0) / 8 * 1.001).all()
