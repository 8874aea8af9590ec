"""Errors by row, paired bounds, and what is chosen by them, against SciPy and scikit-learn."""

import keras
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from keras_kd.distill.method_choice import Method, MethodChoice
from keras_kd.distill.row_errors import RowErrors, row_errors
from keras_kd.utils import paired

rng = np.random.default_rng(0)
LOSSES = keras.losses


def mean(*args):
    return row_errors(*args).mean


def test_errors_of_classes_are_those_of_scikit_learn():
    logits, y, weight = rng.normal(size=(40, 5)), rng.integers(0, 5, 40), rng.uniform(size=40)
    hard = LOSSES.SparseCategoricalCrossentropy(from_logits=True)
    wanted = 1 - metrics.accuracy_score(y, logits.argmax(1), sample_weight=weight)
    assert mean(["classes"], [logits], [y], [hard], weight) == pytest.approx(wanted)
    assert mean(["classes"], [logits], [y[:, None]], [hard], weight) == pytest.approx(wanted)
    one_hot = np.eye(5)[y]
    assert mean(["classes"], [logits], [one_hot], [None], weight) == pytest.approx(wanted)


def test_rows_without_a_label_count_nowhere():
    logits, y = rng.normal(size=(30, 4)), rng.integers(0, 4, 30)
    y[::3] = -1
    known = y >= 0
    wanted = 1 - metrics.accuracy_score(y[known], logits[known].argmax(1))
    assert mean(["classes"], [logits], [y], ["sparse_categorical_crossentropy"]) == pytest.approx(
        wanted
    )
    ignoring = LOSSES.SparseCategoricalCrossentropy(ignore_class=2)
    kept = known & (y != 2)
    wanted = 1 - metrics.accuracy_score(y[kept], logits[kept].argmax(1))
    assert mean(["classes"], [logits], [y], [ignoring]) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="No row counts"):
        row_errors(["classes"], [logits], [np.full(30, -1)], [None])


def test_tokens_are_averaged_within_their_row():
    logits, y = rng.normal(size=(6, 7, 3)), rng.integers(0, 3, (6, 7))
    weight = rng.uniform(size=(6, 7))
    found = row_errors(["classes"], [logits], [y], [None], weight)
    wrong = logits.argmax(-1) != y
    np.testing.assert_allclose(found.errors, (wrong * weight).sum(1) / weight.sum(1))
    np.testing.assert_allclose(found.weights, 1)


def test_independent_units_have_the_threshold_of_their_form():
    z, y = rng.normal(size=(50, 3)), rng.integers(0, 2, (50, 3))
    wanted = metrics.hamming_loss(y, z > 0)
    logits = LOSSES.BinaryCrossentropy(from_logits=True)
    assert mean(["independent"], [z], [y], [logits]) == pytest.approx(wanted)
    p = 1 / (1 + np.exp(-z))
    assert mean(["independent"], [p], [y], ["binary_crossentropy"]) == pytest.approx(wanted)


def test_numbers_have_their_squared_error_and_outputs_are_averaged():
    a, b = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    wanted = metrics.mean_squared_error(b, a)
    assert mean(["values"], [a], [b], ["mse"]) == pytest.approx(wanted)
    logits, y = rng.normal(size=(20, 4)), rng.integers(0, 4, 20)
    other = 1 - metrics.accuracy_score(y, logits.argmax(1))
    both = mean(["values", "classes"], [a, logits], [b, y], ["mse", None])
    assert both == pytest.approx((wanted + other) / 2)
    with pytest.raises(ValueError, match="NaN"):
        row_errors(["values"], [a * np.nan], [b], ["mse"])


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_bound_of_seeds_is_that_of_a_one_sided_t_interval(n):
    differences = rng.normal(0.4, 1, n)
    test = stats.ttest_1samp(differences, 0, alternative="greater")
    low = test.confidence_interval(0.95).low
    assert paired.lower_bound(differences) == pytest.approx(low)
    with pytest.raises(ValueError, match="no spread"):
        paired.lower_bound([1.0])


def test_the_bound_of_rows_covers_the_truth_as_often_as_it_says():
    def bound():
        worse = generator.uniform(size=400) < 0.3
        better = generator.uniform(size=400) < 0.2
        return paired.lower_bound_of_rows(better, worse, np.ones(400))

    generator = np.random.default_rng(1)
    share = np.mean([bound() <= 0.1 for _ in range(600)])
    assert 0.92 < share < 0.98
    errors = rng.uniform(size=9)
    assert paired.lower_bound_of_rows(errors, errors, np.ones(9)) == 0


def method(name, errors, rows=50):
    runs = {}
    for seed, error in enumerate(errors):
        wrong = np.zeros(rows)
        wrong[: round(error * rows)] = 1
        runs[seed] = RowErrors(wrong, np.ones(rows))
    from keras_kd.distill.candidates import Made

    return Method(name, Made({"alpha": 0.1}), runs=runs)


def choice(**methods):
    return MethodChoice([method(name, errors) for name, errors in methods.items()], False)


def test_plain_training_wins_ties_and_what_may_be_chance():
    plain = [0.40, 0.44, 0.42]
    assert choice(plain=plain, default=plain).best == "plain"
    # Better with every seed, but not by more than the seeds differ.
    found = choice(plain=plain, default=[0.38, 0.30, 0.40])
    assert found.best == "plain"
    assert found.verdict.startswith("keep plain training: the best of the others, default, has 6")
    found = choice(plain=plain, default=[0.38, 0.42, 0.40], dist=[0.34, 0.40, 0.38])
    assert found.best == "dist"
    assert found.arguments == {"alpha": 0.1}
    row = next(row for row in found.rows() if row["method"] == "dist")
    gains = np.array([0.06, 0.04, 0.04])
    assert row["gain"] == pytest.approx(gains.mean())
    assert row["bound"] == pytest.approx(
        gains.mean() - stats.t.ppf(0.95, 2) * gains.std(ddof=1) / 3**0.5
    )
    assert found.verdict.startswith("use dist: 4.67 points less error than plain training")
    assert "* dist" in found.table()


def test_what_was_given_up_after_the_first_seed_is_never_chosen():
    found = MethodChoice([method("plain", [0.5, 0.5]), method("dist", [0.1])], False)
    assert found.best == "plain"


def test_a_single_seed_is_judged_by_the_rows():
    assert choice(plain=[0.5], default=[0.48]).best == "plain"
    found = choice(plain=[0.5], default=[0.2])
    assert found.best == "default"
    assert "the rows alone" in found.verdict
