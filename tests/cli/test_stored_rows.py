"""Files with splits, `x_train` and the rest, whatever kind of rows they hold."""

import re

import keras
import numpy as np
import pytest

from keras_kd.cli import inputs, robust, stored_rows
from keras_kd.datasets import load_task

rng = np.random.default_rng(3)
CLASSES = np.arange(60) % 3

KINDS = {
    "table": ((5,), rng.normal(size=(60, 5))),
    "bytes": ((5,), rng.integers(0, 256, (60, 5), dtype="uint8")),
    "sequences": ((7, 3), rng.normal(size=(60, 7, 3)).astype("float32")),
    "sequences of bytes": ((7, 3), rng.integers(0, 256, (60, 7, 3), dtype="uint8")),
    "words": ((4,), rng.integers(0, 30, (60, 4), dtype="int32")),
    "waveforms": ((16, 1), rng.integers(-999, 999, (60, 16), dtype="int16")),
    "volumes": ((2, 3, 4, 1), rng.normal(size=(60, 2, 3, 4, 1))),
}


def model(*shapes, units=3):
    names = [keras.Input(shape, name=f"in{i}") for i, shape in enumerate(shapes)]
    flat = [keras.layers.Flatten()(each) for each in names]
    joined = flat[0] if len(flat) == 1 else keras.layers.Concatenate()(flat)
    return keras.Model(names, keras.layers.Dense(units)(joined))


def saved(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tested", [True, False])
def test_rows_are_taken_as_they_stand_in_the_file(tmp_path, kind, tested):
    shape, x = KINDS[kind]
    more = {"x_test": x[40:], "y_test": CLASSES[40:]} if tested else {}
    path = saved(tmp_path / "a.npz", x_train=x[:40], y_train=CLASSES[:40], **more)
    reader = model(shape)
    trained, none, note = inputs.read_samples(path, "calibration", reader)
    assert none is None
    assert f"training rows of {path}" in note
    judged, y, note = inputs.read_samples(path, "evaluation", reader)
    assert f"{len(y)} validation rows of {path}" in note
    # The split is that of `keras-kd distill`, so that no validation row was trained on.
    wanted = load_task(path)
    rows = x[:40]
    np.testing.assert_array_equal(trained, rows[wanted.train.index])
    np.testing.assert_array_equal(judged, rows[wanted.validation.index])
    np.testing.assert_array_equal(y, wanted.validation.y)
    assert trained.dtype == judged.dtype == x.dtype
    attacked, told = robust._labeled(path, "test", robust._shapes(reader))
    np.testing.assert_array_equal(attacked, x[40:] if tested else rows[wanted.test.index])
    np.testing.assert_array_equal(told, CLASSES[40:] if tested else wanted.test.y)


def test_images_of_classes_are_scaled_as_before(tmp_path):
    images = rng.integers(0, 256, (60, 6, 6), dtype="uint8")
    path = saved(tmp_path / "a.npz", x_train=images, y_train=CLASSES, x_test=images, y_test=CLASSES)
    x, _, note = inputs.read_samples(path, "calibration", model((6, 6, 1)))
    assert (x.shape[1:], x.max() <= 1) == ((6, 6, 1), True)
    assert note == f"Calibration: the training images of {path}."
    # To a model of rows of pixels they are rows, and images with numbers to learn are no classes.
    x, _, _ = inputs.read_samples(path, "calibration", model((6, 6)))
    assert (x.shape[1:], x.dtype) == ((6, 6), np.uint8)
    y = rng.normal(size=(60, 2))
    path = saved(tmp_path / "b.npz", x_train=images, y_train=y)
    x, found, _ = inputs.read_samples(path, "evaluation", model((6, 6, 1), units=2))
    assert (x.shape[1:], found.shape, x.max() <= 1) == ((6, 6, 1), (len(x), 2), True)
    wanted = load_task(path, "regression").validation
    np.testing.assert_array_equal(x, wanted.x)
    np.testing.assert_allclose(found, wanted.y, rtol=1e-6)


def test_labels_of_other_tasks_stay_with_their_rows(tmp_path):
    x = np.arange(60.0)[:, None] * np.ones(4)
    for task, y in (
        ("regression", np.arange(60.0)),
        ("multilabel", (np.arange(60)[:, None] >> np.arange(6)) & 1),
        ("tokens", np.where(np.arange(60)[:, None] % 7, np.arange(60)[:, None] % 5, -1) + x * 0),
        ("classification", np.eye(3)[CLASSES]),
    ):
        y = y.astype("int64") if task == "tokens" else y
        path = saved(tmp_path / f"{task}.npz", x_train=x, y_train=y)
        got, labels, _ = inputs.read_samples(path, "evaluation", model((4,)))
        rows = got[:, 0].astype(int)
        np.testing.assert_array_equal(labels, y[rows])
        np.testing.assert_array_equal(rows, load_task(path, task).validation.index)
    path = saved(tmp_path / "none.npz", x_train=x)
    got, labels, _ = inputs.read_samples(path, "evaluation", model((4,)))
    assert (len(got), labels) == (5, None)
    assert len(inputs.read_samples(path, "calibration", model((4,)))[0]) == 60


def test_several_inputs_by_their_names(tmp_path):
    both = model((4,), (3, 2))
    a, b = rng.normal(size=(60, 4)), rng.normal(size=(60, 3, 2))
    path = saved(tmp_path / "a.npz", in0_train=a, in1_train=b, y_train=CLASSES)
    x, y, _ = inputs.read_samples(path, "evaluation", both)
    wanted = load_task(path).validation
    np.testing.assert_array_equal(x["in0"], a[wanted.index])
    np.testing.assert_array_equal(x["in1"], b[wanted.index])
    np.testing.assert_array_equal(y, wanted.y)
    own = {"in0_validation": a[:7], "in1_validation": b[:7], "y_validation": CLASSES[:7]}
    path = saved(tmp_path / "b.npz", in0_train=a, in1_train=b, y_train=CLASSES, **own)
    x, y, _ = inputs.read_samples(path, "evaluation", both)
    np.testing.assert_array_equal(x["in1"], b[:7])
    np.testing.assert_array_equal(y, CLASSES[:7])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x_train": np.ones((6, 4)), "y_train": np.ones(5)}, "have 5 and 6 rows"),
        ({"x_train": np.float32(1), "y_train": np.ones(5)}, "have no and 5 rows"),
        ({"x_train": np.ones((1, 4)), "y_train": np.ones(1)}, "too few training rows"),
        ({"in0_train": np.ones((0, 4))}, "too few training rows"),
    ],
)
def test_splits_that_cannot_be_used(tmp_path, arrays, reason):
    path = saved(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(reason)):
        inputs.read_samples(path, "evaluation", model((4,)))


def test_images_that_nobody_reads_yet():
    arrays = {"x_train": np.ones((4, 2, 2)), "y_train": CLASSES, "x_test": 0, "y_test": 0}
    assert stored_rows.are_images(arrays, {})
    assert not stored_rows.are_images({**arrays, "x_train": np.ones((4, 2))}, {})
