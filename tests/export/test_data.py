import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from keras_kd.export.signature import Signature, TensorInfo
from keras_kd.export.source import data

X = np.random.default_rng(0).random((10, 4, 3)).astype("float32")
Y = np.arange(10) % 3
ONE = Signature("single", (TensorInfo("x", (None, 4, 3), "float32"),), ())
TWO = Signature(
    "dict",
    (TensorInfo("ids", (None, 5), "int32"), TensorInfo("x", (None, 4, 3), "float32")),
    (),
)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


def read(value, **kwargs):
    return data.read(value, "evaluation", **{"several_inputs": False, **kwargs})


@pytest.mark.parametrize(
    "make",
    [
        lambda: (X, Y),
        lambda: (X, Y, np.ones(10)),
        lambda: (X.tolist(), Y.tolist()),
        lambda: (tf.constant(X), tf.constant(Y)),
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(4),
        lambda: ((X[i : i + 3], Y[i : i + 3]) for i in range(0, 10, 3)),
        lambda: Batches(),
    ],
    ids=["tuple", "weighted", "lists", "tensors", "tf.data", "generator", "PyDataset"],
)
def test_every_form_gives_the_same_samples(make):
    samples = read(make())
    np.testing.assert_array_equal(samples.x, X)
    np.testing.assert_array_equal(samples.y, Y)
    assert samples.count == 10


def test_inputs_without_labels_and_dicts():
    assert read(X).y is None
    assert read(tf.constant(X)).count == 10
    by_name = read({"x": X, "ids": np.ones((10, 5), int)}, several_inputs=True)
    arrays = data.by_name(by_name.x, TWO, "evaluation")
    assert arrays["ids"].dtype == np.int32
    stream = tf.data.Dataset.from_tensor_slices({"x": X, "ids": np.ones((10, 5))}).batch(3)
    np.testing.assert_array_equal(read(stream, several_inputs=True).x["x"], X)


def test_limit_spreads_over_arrays_and_ends_streams():
    assert read(X, limit=3).x.shape == (3, 4, 3)
    np.testing.assert_array_equal(read(X, limit=4).x, X[[0, 3, 6, 9]])

    def endless():
        while True:
            yield X

    assert read(endless(), limit=25).count == 25


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X[:0], "is empty"),
        (tf.data.Dataset.from_tensor_slices(X).batch(2).take(0), "yielded no batch"),
        (iter(()), "yielded no batch"),
        ((X, Y[:5]), r"different lengths, \[5, 10\]"),
        (tf.data.Dataset.from_tensor_slices((X, Y)).batch(2).repeat(), "repeats without end"),
        (tf.data.Dataset.from_tensor_slices(Y), "yields scalars"),
        ((X, Y, Y, Y), "4 entries"),
    ],
)
def test_unusable_data_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read(value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:, :3], r"samples of shape \(3, 3\), the model takes \(4, 3\)"),
        (X[0], r"samples of shape \(3,\)"),
        (
            np.where(np.arange(10)[:, None, None] == 7, np.nan, X),
            "in 1 of 10 samples, the first in ",
        ),
        (np.where(np.arange(10)[:, None, None] > 7, np.inf, X), "in 2 of 10 samples"),
        ({"y": X}, "not an input of the model"),
        ([X, X], r"2 array\(s\) and the model 1 input"),
        (X.astype(str), "numbers are needed"),
        (np.where(X > 0.9, 1e39, X.astype("float64")), r"`x` holds 1e\+39, more than float32"),
        ({"ids": np.full((10, 5), 2**31), "x": X}, r"`ids` holds values from .*model takes int32"),
        ({"ids": np.full((10, 5), 0.5), "x": X}, "`ids` holds values that are not whole"),
        ({"ids": np.full((10, 5), np.nan), "x": X}, "`ids` holds values that are not whole"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        data.by_name(x, TWO if isinstance(x, dict) and "ids" in x else ONE, "calibration")


def test_missing_and_misspelled_inputs_are_named():
    with pytest.raises(ValueError, match=r"lacks the inputs \['ids'\]"):
        data.by_name({"x": X}, TWO, "calibration")
    with pytest.raises(ValueError, match="Did you mean `ids`"):
        data.by_name({"x": X, "idss": X}, TWO, "calibration")


@pytest.mark.parametrize(
    "other",
    [255 * X, X - 3, (X - X.mean()) / X.std(), np.full_like(X, 0.5)],
    ids=["0..255", "shifted", "standardized", "constant"],
)
def test_calibration_of_another_scale_is_refused(other):
    data.check_same_scale({"x": X[::-1]}, {"x": X})
    with pytest.raises(ValueError, match="another scale"):
        data.check_same_scale({"x": other}, {"x": X})


def _sets():
    rng = np.random.default_rng(0)
    digits = load_digits().images[..., None] / 16
    rows = rng.uniform(0.3, 1, (600, 1)) * rng.random((600, 16))
    return {
        "digits": digits,
        "uniform": rng.random((600, 8, 8, 1)),
        "gaussian": rng.normal(size=(600, 4)),
        "one feature": rng.normal(3, 2, (600, 1)),
        "bright and dark": rows,
        "heavy tails": rng.standard_t(3, (600, 8)),
        "mostly zeros": np.where(rng.random((600, 50)) < 0.015, 1.0, 0.0),
    }


@pytest.mark.parametrize(("name", "whole"), _sets().items(), ids=_sets())
def test_honest_subsets_of_32_rows_are_of_the_same_scale(name, whole):
    rng = np.random.default_rng(1)
    for _ in range(60):
        rows = rng.permutation(len(whole))
        for evaluation in (whole, whole[rows[32:64]]):
            data.check_same_scale({"x": whole[rows[:32]]}, {"x": evaluation})


@pytest.mark.parametrize("name", ["digits", "uniform", "gaussian", "bright and dark"])
@pytest.mark.parametrize(
    "change",
    [lambda x: 2 * x, lambda x: 0.45 * x, lambda x: 2 * x - 1, lambda x: (x + 1) / 2],
    ids=["doubled", "x 0.45", "[0, 1] to [-1, 1]", "and back"],
)
def test_another_scale_of_a_subset_is_refused(name, change):
    whole = _sets()[name]
    with pytest.raises(ValueError, match=r"another scale.*bring both to \[-1, 1\]"):
        data.check_same_scale({"x": change(whole[:200])}, {"x": whole[200:]})


def test_a_moved_range_is_refused():
    x = _sets()["uniform"]
    with pytest.raises(ValueError, match="another scale"):
        data.check_same_scale({"x": x[:200] - 0.5}, {"x": x[200:]})


def test_integer_inputs_have_no_scale():
    data.check_same_scale({"ids": np.arange(10)}, {"ids": 1000 * np.arange(10)})
