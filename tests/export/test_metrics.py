import math

import numpy as np
import pytest

from keras_kd.export import metrics

rng = np.random.default_rng(3)
LOGITS = rng.normal(size=(50, 4)).astype("float32")


@pytest.mark.parametrize(
    ("reference", "labels", "kind"),
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
        (LOGITS, None, "classes"),
        (LOGITS[:, :1], None, "values"),
        (rng.normal(size=(5, 7, 4)), rng.integers(0, 4, (5, 7)), "classes"),
        (rng.normal(size=(5, 8, 8, 3)), None, "values"),
    ],
)
def test_kind_is_read_from_outputs_and_labels(reference, labels, kind):
    assert metrics.kind_of(reference, labels) == kind


def test_labels_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"from 0 to 4, but the model has 4 outputs"):
        metrics.kind_of(LOGITS, np.array([0, 4] * 25))
    with pytest.raises(ValueError, match=r"shape \(50, 3\)"):
        metrics.kind_of(LOGITS, np.zeros((50, 3)))


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


def test_compare_averages_decisions_and_keeps_the_worst_error():
    outputs = {"a": LOGITS + 0.5, "b": np.float32([[1.0], [9.0]])}
    references = {"a": LOGITS, "b": np.float32([[1.0], [10.0]])}
    kinds = {
        "a": {"kind": "classes", "probabilities": False},
        "b": {"kind": "values", "probabilities": False},
    }
    labels = {"a": LOGITS.argmax(1)}
    result = metrics.compare(references, outputs, labels, kinds)
    assert result["accuracy"] == result["agreement"] == 1.0
    assert result["worst"] == pytest.approx(1.0)
    assert result["relative"] == pytest.approx(max(0.5 / np.abs(LOGITS).max(), 0.1), rel=1e-5)
    assert result["sqnr"] == pytest.approx(
        min(metrics.sqnr(references[name], outputs[name]) for name in "ab")
    )
    broken = metrics.compare(references, {**outputs, "b": np.full((2, 1), np.nan)}, labels, kinds)
    assert broken["finite"] is False
    assert broken["worst"] == math.inf
