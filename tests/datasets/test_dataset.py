"""The common form: what is checked, scaled, split and said."""

import numpy as np
import pytest

from keras_kd import datasets
from keras_kd.datasets.dataset import assemble, stratified


def pair(samples=40, shape=(4, 4, 1), classes=4, dtype="uint8", seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (samples, *shape)).astype(dtype)
    return images, np.arange(samples) % classes


def test_integers_become_floats_between_zero_and_one():
    x, y = pair()
    data = assemble("set", (x, y), test=(x, y), validation=(x, y))
    assert data.x_train.dtype == np.float32
    np.testing.assert_allclose(data.x_train, x / 255.0, rtol=1e-6)
    assert data.y_test.dtype == np.int32
    assert data.notes == ("Integer images were scaled from [0, 255] to [0, 1].",)
    assert data.class_names == ("0", "1", "2", "3")
    assert (data.input_shape, data.num_classes) == ((4, 4, 1), 4)


def test_floats_stay_as_they_are():
    x, y = pair(dtype="float32")
    data = assemble("set", (x, y), test=(x / 255, y))
    np.testing.assert_array_equal(data.x_test, (x / 255).astype("float32"))
    assert any("divide by 255" in note for note in data.notes)
    quiet = assemble("set", (x / 255, y), test=(x / 255, y))
    assert not any("divide by 255" in note for note in quiet.notes)


def test_missing_channel_axis_and_label_axis_are_mended_and_said():
    x, y = pair()
    data = assemble("set", (x[..., 0], y[:, None]), test=(x, y), validation=(x, y))
    np.testing.assert_array_equal(data.x_train, data.x_test)
    np.testing.assert_array_equal(data.y_train, y)
    assert any("channel axis" in note for note in data.notes)
    assert any("last axis was dropped" in note for note in data.notes)


def test_missing_splits_are_carved_disjoint_stratified_and_repeatable():
    x = np.arange(200, dtype="float32").reshape(200, 1, 1, 1) / 200
    y = np.repeat([0, 1, 1, 1], 50)
    first = assemble("set", (x, y))
    again = assemble("set", (x, y))
    parts = [first.x_train, first.x_validation, first.x_test]
    together = np.sort(np.concatenate([part.ravel() for part in parts]))
    np.testing.assert_array_equal(together, x.ravel())
    assert first.sizes == {"train": 144, "validation": 16, "test": 40}
    for labels in (first.y_train, first.y_validation, first.y_test):
        assert np.mean(labels == 0) == 0.25
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(first, f"x_{split}"), getattr(again, f"x_{split}"))
    assert sum("fixed seed" in note for note in first.notes) == 2


def test_images_keep_their_labels_through_the_split():
    y = np.arange(60) % 3
    x = np.broadcast_to(y[:, None, None, None] / 4, (60, 2, 2, 1)).astype("float32")
    data = assemble("set", (x, y))
    for split in ("train", "validation", "test"):
        images, labels = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        np.testing.assert_array_equal(images[:, 0, 0, 0] * 4, labels)


def test_stratified_takes_and_leaves_at_least_one_of_each_class():
    labels = np.array([0, 0, 1, 1, 1, 2])
    for fraction in (0.01, 0.99):
        chosen = stratified(labels, fraction)
        assert 1 <= chosen[labels == 0].sum() <= 1
        assert 1 <= chosen[labels == 1].sum() <= 2
        assert chosen[labels == 2].sum() == 0


X, Y = pair()
NAN = X.astype("float32")
NAN[7, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        ((X, Y[:-1]), (X, Y), None, "40 samples and `y_train` has 39"),
        ((X[:0], Y[:0]), (X, Y), None, "`x_train` of `set` is empty"),
        ((X, Y), (X[:0], Y[:0]), None, "`x_test` of `set` is empty"),
        ((NAN, Y), (NAN, Y), None, "NaN or infinite values, first in sample 7"),
        ((X.reshape(40, 16), Y), (X, Y), None, r"shape \(40, 16\)"),
        ((X.astype(str), Y), (X, Y), None, "images are numbers"),
        ((X.astype("int32") + 300, Y), (X.astype("int32"), Y), None, "from 0 to 255"),
        ((X, Y.astype("float32")), (X, Y), None, r"y.astype\('int32'\)"),
        ((X, np.eye(4)[Y]), (X, Y), None, r"np.argmax\(y, axis=1\)"),
        ((X, Y - 1), (X, Y), None, "holds the label -1"),
        ((X, Y), (X, Y + 1), None, "`y_test` of `set` holds the label 4"),
        ((X, Y), (X, Y), ["a", "b", "c"], "holds the label 3, but the class names"),
        ((X, Y), (X[:, :2], Y), None, r"images of shape \(2, 4, 1\)"),
        ((X, Y), (X / 255, Y), None, "scaled differently"),
        ((X, 0 * Y), (X, 0 * Y), None, "has 1 class"),
        ((X[:4], Y[:4]), None, None, "too few training samples"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(train, test, names, message):
    with pytest.raises(ValueError, match=message):
        assemble("set", train, test=test, class_names=names)


def test_digits_are_the_same_every_time():
    data = datasets.load("digits")
    assert data.sizes == {"train": 1222, "validation": 216, "test": 359}
    assert data.input_shape == (8, 8, 1)
    assert data.class_names == tuple("0123456789")
    assert (data.x_train.min(), data.x_train.max()) == (0.0, 1.0)
    # The split is part of every printed figure: a change of it must not pass unseen.
    assert data.y_test[:12].tolist() == [2, 6, 8, 5, 6, 5, 7, 0, 0, 7, 2, 7]
    assert float(data.x_test.sum()) == pytest.approx(7038.1875, rel=1e-6)


def test_digits_are_the_source_and_no_sample_is_lost_or_shared():
    from sklearn.datasets import load_digits

    data = datasets.load("digits")
    parts = [data.x_train, data.x_validation, data.x_test]
    rows = np.concatenate(parts).reshape(1797, 64)
    source = (load_digits().data / 16).astype("float32")
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], source[np.lexsort(source.T)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "`tfds:mnist`"),
        ("digit s", "Expected `digits`, `tfds:NAME` or the path"),
        (__file__, "only `.npz` files are read"),
    ],
)
def test_unknown_names_say_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(name)


@pytest.mark.parametrize("option", [{"data_dir": "x"}, {"image_size": (8, 8)}])
def test_options_of_tfds_are_refused_elsewhere(option):
    with pytest.raises(ValueError, match="applies only to `tfds:` names"):
        datasets.load("digits", **option)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.array([0, 1, 2**32 + 1]), "holds the label 4294967297"),
        (np.array([0, 1, 2**31]), "holds the label 2147483648"),
        (np.array([0, 1, 2**64 - 1], "uint64"), "holds the label 18446744073709551615"),
        (np.array([0, 1, 1_000_000]), "holds the label 1000000"),
        (np.array([0, 1, -(2**32)]), "holds the label -4294967296"),
        (np.array([0, 1, -1], "int8"), "holds the label -1"),
        (np.array([0.0, 1.0, 2.0]), "dtype float64"),
        (np.array([0.0, 1.0, np.nan], "float32"), "dtype float32"),
        (np.array(["0", "1", "2"]), "dtype <U1"),
        (np.array([0, 1, 2], object), "dtype object"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_labels_that_are_no_class_numbers_are_refused_before_they_are_cast(labels, reason, split):
    x, y = pair(3, classes=3)
    splits = {"train": (x, y), "test": (x, y), "validation": (x, y), split: (x, labels)}
    train = splits.pop("train")
    with pytest.raises(ValueError, match=f"`y_{split}` of `set` .*{reason}"):
        assemble("set", train, **splits)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64", "int64", "bool"])
def test_labels_of_every_integer_type(dtype):
    x, _ = pair(4)
    y = np.array([0, 1, 1, 0], dtype)
    data = assemble("set", (x, y), test=(x, y), validation=(x, y))
    assert data.y_train.dtype == np.int32
    np.testing.assert_array_equal(data.y_train, [0, 1, 1, 0])


def test_images_beyond_float32():
    x, y = pair(dtype="float64")
    x[3, 0, 0, 0] = -1e300
    with pytest.raises(ValueError, match="beyond 3.403e\\+38, which float32 does not hold"):
        assemble("set", (x, y), test=(x, y))
