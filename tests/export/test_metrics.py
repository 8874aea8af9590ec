import math

import judging
import keras
import numpy as np
import pytest

from keras_kd.export.verification import keras_answers, metrics, output_meaning

rng = np.random.default_rng(3)
LOGITS = rng.normal(size=(50, 4)).astype("float32")


@pytest.mark.parametrize(
    ("outputs", "labels", "kind"),
    [
        (LOGITS, rng.integers(0, 4, 50), "classes"),
        (LOGITS, rng.integers(0, 4, (50, 1)), "classes"),
        (LOGITS, rng.integers(0, 4, 50).astype("float32"), "classes"),
        (LOGITS, np.eye(4)[rng.integers(0, 4, 50)], "classes"),
        (LOGITS, rng.dirichlet(np.ones(4), 50), "classes"),
        (LOGITS, np.tile([1, 1, 0, 0], (50, 1)), "multilabel"),
        (LOGITS, rng.normal(size=(50, 4)), "values"),
        (LOGITS[:, :1], rng.integers(0, 2, 50), "binary"),
        (LOGITS[:, :1], rng.integers(0, 2, (50, 1)), "binary"),
        (LOGITS[:, :1], rng.normal(size=50), "values"),
        (LOGITS, None, "unknown"),
        (np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True), None, "classes"),
        (LOGITS[:, :1], None, "values"),
        (rng.normal(size=(5, 7, 4)), rng.integers(0, 4, (5, 7)), "classes"),
        (rng.normal(size=(5, 8, 8, 3)), None, "values"),
    ],
)
def test_kind_is_read_from_outputs_and_labels(outputs, labels, kind):
    assert output_meaning.kind_of(outputs, labels) == kind


def test_labels_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"from 0 to 4, but the model has 4 outputs"):
        output_meaning.kind_of(LOGITS, np.array([0, 4] * 25))
    with pytest.raises(ValueError, match=r"shape \(50, 3\)"):
        output_meaning.kind_of(LOGITS, np.zeros((50, 3)))
    with pytest.raises(ValueError, match=r"hold 1\.5, but class numbers are whole.* 0 to 3"):
        output_meaning.kind_of(LOGITS, np.array([0, 1.5] * 25))


def test_sqnr_is_the_ratio_of_energies_in_decibels():
    got = LOGITS + 0.01 * rng.normal(size=LOGITS.shape)
    ratio = np.square(LOGITS.astype("float64")).sum() / np.square(LOGITS - got).sum()
    assert metrics.sqnr(LOGITS, got) == pytest.approx(10 * np.log10(ratio), rel=1e-6)
    assert metrics.sqnr(LOGITS, LOGITS) == math.inf


def test_accuracy_and_agreement_of_every_kind():
    labels = rng.integers(0, 4, 50)
    other = LOGITS[::-1].copy()
    top = other.argmax(1)
    assert metrics.accuracy(other, labels, "classes", False) == np.mean(top == labels)
    assert metrics.accuracy(other, np.eye(4)[labels], "classes", False) == np.mean(top == labels)
    assert metrics.agreement(LOGITS, other, "classes", False) == np.mean(top == LOGITS.argmax(1))
    truth = rng.integers(0, 2, 50)
    one = LOGITS[:, :1]
    assert metrics.accuracy(one, truth, "binary", False) == np.mean((one[:, 0] > 0) == truth)
    chance = 1 / (1 + np.exp(-one))
    assert metrics.accuracy(chance, truth, "binary", True) == np.mean((one[:, 0] > 0) == truth)
    assert metrics.accuracy(one, truth, "values", False) is None
    many = rng.integers(0, 2, (50, 4))
    assert metrics.accuracy(LOGITS, many, "multilabel", False) == np.mean((LOGITS > 0) == many)


def test_what_is_known_of_the_model_decides_without_labels():
    assert output_meaning.kind_of(LOGITS, None, "values") == "values"
    assert output_meaning.kind_of(LOGITS, rng.integers(0, 4, 50), "values") == "classes"
    outputs = {"a": LOGITS, "b": LOGITS[:, :1]}
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    for loss, kind in (
        ("mse", "values"),
        (keras.losses.Huber(), "values"),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), "classes"),
        (lambda y, z: z, None),
        (None, None),
    ):
        model.compile("sgd", loss)
        assert keras_answers._hints(model, {"a": LOGITS}, False).get("a") == kind
    model.loss = {"a": keras.losses.categorical_crossentropy, "b": "binary_crossentropy"}
    assert keras_answers._hints(model, outputs, False) == {"a": "classes", "b": "binary"}
    model.loss = "mse"
    assert keras_answers._hints(model, outputs, True) == {"a": "classes"}


def test_a_constant_part_hides_no_noise():
    values = np.float32([[100.0], [101.0], [102.0]])
    assert metrics.sqnr(values, np.full_like(values, 101)) > 40
    assert metrics.variation(values, np.full_like(values, 101)) == pytest.approx(0)
    assert metrics.variation(values, values + 0.1) == pytest.approx(10 * math.log10(2 / 0.03), 1e-3)
    assert metrics.variation(values, values) == math.inf
    assert metrics.variation(np.ones((3, 2)), np.zeros((3, 2))) is None


def test_compare_averages_decisions_and_keeps_the_worst_error():
    outputs = {"a": LOGITS + 0.5, "b": np.float32([[1.0], [9.0]])}
    references = {"a": LOGITS, "b": np.float32([[1.0], [10.0]])}
    kinds = {
        "a": {"kind": "classes", "probabilities": False},
        "b": {"kind": "values", "probabilities": False},
    }
    labels = {"a": LOGITS.argmax(1)}
    result = judging.compare(references, outputs, labels, kinds)
    assert result["accuracy"] == result["agreement"] == 1.0
    assert result["worst"] == pytest.approx(1.0)
    assert result["relative"] == pytest.approx(max(0.5 / np.abs(LOGITS).max(), 0.1), rel=1e-5)
    assert result["sqnr"] == pytest.approx(
        min(metrics.sqnr(references[name], outputs[name]) for name in "ab")
    )
    broken = judging.compare(references, {**outputs, "b": np.full((2, 1), np.nan)}, labels, kinds)
    assert broken["finite"] is False
    assert broken["worst"] == math.inf
