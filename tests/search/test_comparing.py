"""Errors by row, paired bounds, and what is chosen by them, against SciPy and scikit-learn."""

import keras
import numpy as np
import pytest
from scipy import optimize, special, stats
from sklearn import metrics

from keras_kd.distill.method_choice import Method, MethodChoice
from keras_kd.distill.row_errors import RowErrors, row_errors, row_weights
from keras_kd.search import task
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


def test_lists_are_compared_by_their_first_ten():
    scores = rng.normal(size=(30, 25))
    gains = np.where(rng.uniform(size=(30, 25)) < 0.3, rng.integers(1, 6, (30, 25)), 0)
    gains[4] = 0
    hard = LOSSES.CategoricalCrossentropy(from_logits=True)
    kept = gains.sum(1) > 0
    wanted = 1 - metrics.ndcg_score(gains[kept], scores[kept], k=10)
    shares = gains / np.maximum(gains.sum(1, keepdims=True), 1)
    assert mean(["classes"], [scores], [shares], [hard]) == pytest.approx(wanted)
    # One item to be found is an exclusive class, and so are smoothed labels.
    y = rng.integers(0, 25, 30)
    one_hot, wanted = np.eye(25)[y], np.mean(scores.argmax(1) != y)
    for labels in (one_hot, 0.9 * one_hot + 0.1 / 25):
        assert mean(["classes"], [scores], [labels], [hard]) == pytest.approx(wanted)


def test_any_of_the_greatest_shares_is_right():
    logits = np.array([[2.0, 1, 0], [0, 2, 1], [0, 1, 2], [1, 2, 0]])
    shares = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]])
    found = row_errors(["classes"], [logits], [shares], ["categorical_crossentropy"])
    np.testing.assert_array_equal(found.errors * found.weights, [0, 0, 1, 0])
    np.testing.assert_array_equal(found.weights, [1, 1, 1, 0])


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


def judged(**given):
    """Methods by `(errors, log losses)`, `(seeds, rows)` each."""
    from keras_kd.distill.candidates import Made

    return MethodChoice(
        [
            Method(
                name,
                Made({"alpha": 0.1}),
                runs={
                    seed: RowErrors(wrong, np.ones(len(wrong)), loss)
                    for seed, (wrong, loss) in enumerate(zip(errors, losses, strict=True))
                },
            )
            for name, (errors, losses) in given.items()
        ],
        False,
    )


def test_a_lower_log_loss_decides_where_errors_are_too_coarse():
    wrong = (rng.uniform(size=(3, 200)) < 0.3).astype("float64")
    base = rng.uniform(0.3, 1.5, size=(3, 200))
    less = base - 0.05 + rng.normal(0, 0.1, size=(3, 200))
    # Equal errors are a tie, whatever the log loss.
    assert judged(plain=(wrong, base), default=(wrong, less)).best == "plain"
    fewer = wrong.copy()
    fewer[0, np.argmax(wrong[0])] = 0
    found = judged(plain=(wrong, base), default=(fewer, less))
    assert found.best == "default"
    assert "which may be chance, and a log loss lower by" in found.verdict
    row = found.rows()[1]
    gains, of_rows = (base - less).mean(1), (base - less).mean(0)
    of_seeds = gains.mean() - stats.t.ppf(0.95, 2) * gains.std(ddof=1) / 3**0.5
    spread = of_rows.mean() - stats.norm.ppf(0.95) * of_rows.std() / 200**0.5
    assert row["loss_gain"] == pytest.approx(gains.mean())
    assert row["loss_bound"] == pytest.approx(min(of_seeds, spread))
    assert row["bound"] < 0
    # Wrong more often, however slightly: no.
    worse = wrong.copy()
    worse[0, np.argmin(wrong[0])] = 1
    assert judged(plain=(wrong, base), default=(worse, less)).best == "plain"
    # Lower with every seed, by a few rows that all seeds share: no.
    few = base.copy()
    few[:, :2] -= 1.0
    assert judged(plain=(wrong, base), default=(fewer, few)).best == "plain"
    # Of two that are better the one that is wrong less often.
    right = wrong * (rng.uniform(size=(3, 200)) < 0.8)
    both = judged(plain=(wrong, base), default=(fewer, less - 1), dist=(right, less))
    assert both.best == "dist"


def test_log_losses_are_those_of_scikit_learn():
    logits, y, weight = rng.normal(size=(40, 5)), rng.integers(0, 5, 40), rng.uniform(size=40)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = metrics.log_loss(y, p, sample_weight=weight, labels=range(5))
    for output in (logits, p):
        for label in (y, np.eye(5)[y]):
            found = row_errors(["classes"], [output], [label], [None], weight)
            assert np.average(found.losses, weights=weight) == pytest.approx(wanted)
    z, y = rng.normal(size=(40, 1)), rng.integers(0, 2, 40)
    wanted = metrics.log_loss(y, 1 / (1 + np.exp(-z[:, 0])))
    logits = LOSSES.BinaryCrossentropy(from_logits=True)
    for output, hard in ((z, logits), (1 / (1 + np.exp(-z)), "binary_crossentropy")):
        found = row_errors(["independent"], [output], [y], [hard])
        assert found.losses.mean() == pytest.approx(wanted)
    tokens, tags = rng.normal(size=(4, 6, 3)), rng.integers(-1, 3, (4, 6))
    tags[:, 0] = 1
    found = row_errors(["classes"], [tokens], [tags], [None])
    logs = tokens - np.log(np.exp(tokens).sum(-1, keepdims=True))
    row = [-logs[2, j, tag] for j, tag in enumerate(tags[2]) if tag >= 0]
    assert found.losses[2] == pytest.approx(np.mean(row))


def test_the_default_wins_ties_among_what_is_better_than_plain_training():
    plain = [0.40, 0.44, 0.42]
    given = {"plain": plain, "default": [0.30, 0.34, 0.32], "dist": [0.28, 0.33, 0.32]}
    assert choice(**given).best == "default"
    assert choice(**{**given, "dist": [0.20, 0.24, 0.23]}).best == "dist"
    # What gains nothing over plain training itself is no measure.
    assert choice(**{**given, "default": [0.41, 0.44, 0.42]}).best == "dist"


def test_what_was_given_up_after_the_first_seed_is_never_chosen():
    found = MethodChoice([method("plain", [0.5, 0.5]), method("dist", [0.1])], False)
    assert found.best == "plain"


def test_a_single_seed_is_judged_by_the_rows():
    assert choice(plain=[0.5], default=[0.48]).best == "plain"
    found = choice(plain=[0.5], default=[0.2])
    assert found.best == "default"
    assert "the rows alone" in found.verdict


def refined(told, output, label, hard, weight=None):
    return row_errors([told], [output], [label], [hard], weight, refine=True)


def test_refined_log_losses_are_those_at_the_best_temperature():
    logits, y, weight = rng.normal(size=(60, 5)), rng.integers(0, 5, 60), rng.uniform(size=60)
    logits[np.arange(60), y] += 1.5

    def least(loss):
        return optimize.minimize_scalar(loss, bounds=(0.01, 100), method="bounded").fun

    def of_classes(sharpness):
        p = special.softmax(sharpness * logits, -1)
        return metrics.log_loss(y, p, sample_weight=weight, labels=range(5))

    wanted = least(of_classes)
    # However sure of itself: the same, from logits and from probabilities.
    for output in (logits, 7 * logits, 0.2 * logits, special.softmax(logits, -1)):
        for label in (y, np.eye(5)[y]):
            found = refined("classes", output, label, None, weight)
            assert np.average(found.refined, weights=weight) == pytest.approx(wanted, abs=1e-4)
            assert found.proper is found.refined
    z, y = rng.normal(size=(50, 1)), rng.integers(0, 2, 50)
    z[:, 0] += y
    wanted = least(lambda sharpness: metrics.log_loss(y, special.expit(sharpness * z[:, 0])))
    hard = LOSSES.BinaryCrossentropy(from_logits=True)
    for output, loss in ((z, hard), (5 * z, hard), (special.expit(z), "binary_crossentropy")):
        found = refined("independent", output, y, loss)
        assert found.refined.mean() == pytest.approx(wanted, abs=1e-4)
    # Of what is wrong throughout the best is to be unsure; numbers have no temperature.
    found = refined("classes", -np.eye(4), np.arange(4), None)
    assert found.refined.mean() == pytest.approx(np.log(4), abs=0.05)
    found = refined("values", z, y[:, None], "mse")
    np.testing.assert_array_equal(found.refined, found.errors)


def test_a_part_of_many_rows_finds_the_best_temperature(monkeypatch):
    y = np.arange(4000) % 4
    logits = 3 * (np.eye(4)[y] + rng.normal(size=(4000, 4)))
    whole = refined("classes", logits, y, None).refined
    monkeypatch.setattr("keras_kd.distill.row_errors._FITTED", 4000)
    part = refined("classes", logits, y, None).refined
    assert not np.array_equal(part, whole)
    assert part.shape == (4000,)
    assert part.mean() == pytest.approx(whole.mean(), abs=2e-3)
    assert row_weights(["classes"], [(None, 4)], [None], [None]).shape == (0,)


def test_refined_log_losses_of_tokens_leave_out_what_counts_nowhere():
    logits, tags = rng.normal(size=(5, 6, 3)), rng.integers(0, 3, (5, 6))
    tags[:, 4:] = -1
    found = refined("classes", 3 * logits, tags, None)
    short = refined("classes", logits[:, :4], tags[:, :4], None)
    np.testing.assert_allclose(found.refined, short.refined, atol=1e-4)


def test_rows_that_count_are_known_without_answers():
    y = rng.integers(-1, 3, 20)
    weight = rng.integers(0, 2, 20).astype("float64")
    hard = LOSSES.SparseCategoricalCrossentropy(ignore_class=-1)
    found = row_weights(["classes"], [(None, 3)], [y], [hard], weight)
    np.testing.assert_array_equal(found, weight * (y >= 0))
    shares = np.eye(3)[y] * (y >= 0)[:, None]
    found = row_weights(["classes"], [(None, 3)], [shares], [None])
    np.testing.assert_array_equal(found, y >= 0)
    assert row_weights(["values"], [(None, 1)], [y], ["mse"]).sum() == 20
    for label, shape in ((y, (20, 3)), (shares, (20, 3)), (y.reshape(4, 5), (4, 5, 3))):
        full = row_errors(["classes"], [rng.normal(size=shape)], [label], [hard])
        found = row_weights(["classes"], [(None, *shape[1:])], [label], [hard])
        np.testing.assert_array_equal(full.weights, found)


def of_rows(name, runs, folds=False):
    from keras_kd.distill.candidates import Made

    return Method(name, Made({"alpha": 0.1}), runs=dict(enumerate(runs)), folds=folds)


def test_few_rows_that_all_seeds_share_decide_nothing():
    """Two of 100 messages, right with every seed: that the seeds agree says nothing of the rows."""
    wrong = np.zeros((2, 100))
    wrong[0, :5], wrong[1, :3] = 1, 1
    plain, other = ([RowErrors(each, np.ones(100))] * 3 for each in wrong)
    found = MethodChoice([of_rows("plain", plain), of_rows("soft", other)], False)
    row = found.rows()[1]
    assert row["bound"] == pytest.approx(0.02)
    difference = wrong[0] - wrong[1]
    bound = 0.02 - stats.norm.ppf(0.95) * difference.std() / 10
    assert row["row_bound"] == pytest.approx(bound)
    assert bound < 0
    assert found.best == "plain"
    assert "which may be chance" not in found.verdict
    # As many of three times as many rows, and of more: that is another thing.
    plain, other = ([RowErrors(each, np.ones(100))] * 3 for each in wrong)
    apart = [of_rows("plain", plain, folds=True), of_rows("soft", other, folds=True)]
    found = MethodChoice(apart, False)
    bound = 0.02 - stats.norm.ppf(0.95) * difference.std() / 300**0.5
    assert found.rows()[1]["row_bound"] == pytest.approx(bound)
    assert found.best == "soft"


def test_a_method_that_knows_less_is_not_chosen_for_being_lucky():
    wrong = (rng.uniform(size=(3, 400)) < 0.4).astype("float64")
    right = wrong * (rng.uniform(size=(3, 400)) < 0.7)
    base = rng.uniform(0.3, 1.5, size=(3, 400))

    def runs(errors, losses, refined):
        each = zip(errors, losses, refined, strict=True)
        return [RowErrors(error, np.ones(400), *both) for error, *both in each]

    plain = of_rows("plain", runs(wrong, base, base))
    # A loss of another scale is no less knowledge.
    hot = of_rows("dist", runs(right, base + 1, base - 0.2))
    assert MethodChoice([plain, hot], False).best == "dist"
    found = MethodChoice([plain, of_rows("dist", runs(right, base - 1, base + 0.2))], False)
    assert found.best == "plain"
    assert "a log loss that is higher by 0.2" in found.verdict


drawn = np.random.default_rng(11)


@pytest.mark.parametrize(
    ("labels", "end", "wanted"),
    [
        (drawn.dirichlet(np.ones(3), 9), "softmax", keras.losses.CategoricalCrossentropy),
        (drawn.dirichlet(np.ones(3), 9), None, "probabilities of classes or numbers"),
        (drawn.normal(size=(9, 3)), None, keras.losses.MeanSquaredError),
        (drawn.integers(0, 2, (9, 1)).astype("float32"), None, "decides or answers a number"),
        (drawn.integers(0, 2, 9).astype("float32"), "sigmoid", keras.losses.BinaryCrossentropy),
        (drawn.integers(0, 2, 9), None, keras.losses.BinaryCrossentropy),
        (drawn.random(9), None, keras.losses.MeanSquaredError),
    ],
)
def test_a_loss_that_labels_and_output_do_not_tell_is_asked_for(labels, end, wanted):
    units = 1 if labels.ndim == 1 else labels.shape[1]
    student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation=end)])
    rows = task.rows_of((np.zeros((9, 4), "float32"), labels), "train")
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            task.hard_loss(student, rows)
    else:
        assert type(task.hard_loss(student, rows)) is wanted


def test_a_tuple_of_inputs_is_read_as_a_list_of_them():
    # In an export a tuple is inputs and labels.
    x = (np.zeros((4, 2)), np.ones((4, 3)))
    assert isinstance(task.rows_of((x, np.arange(4)), "train").x, list)
