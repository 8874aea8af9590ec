"""What is measured against labels, against scikit-learn and NumPy written out here."""

import judging
import keras
import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import spearmanr
from sklearn import metrics as sk

from keras_kd.export.signature import Signature, TensorInfo
from keras_kd.export.verification import chosen_metrics, counting, metrics, output_meaning, scores

rng = np.random.default_rng(7)
LOGITS = rng.normal(size=(300, 4)).astype("float32")
LABELS = np.where(rng.random(300) < 0.6, LOGITS.argmax(1), rng.integers(0, 4, 300))
WEIGHTS = rng.uniform(0.1, 2, 300).astype("float32")
ONE = rng.normal(size=(300, 1)).astype("float32")
TRUTH = (ONE[:, 0] + rng.normal(size=300) > 1).astype(int)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_classes_are_those_of_scikit_learn(weights):
    found = scores.scores(LOGITS, LABELS, "classes", False, weights)
    said = LOGITS.argmax(1)
    given = {"sample_weight": weights}
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(LABELS, said, **given), 1e-6)
    assert found["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(LABELS, said, **given), 1e-6
    )
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(LABELS, said, average="macro", **given), 1e-6
    )
    share = softmax(LOGITS.astype("float64"), axis=1)
    one = [sk.roc_auc_score(k == LABELS, share[:, k], **given) for k in range(4)]
    assert found["auc"] == pytest.approx(np.mean(one), 1e-6)
    if weights is None:
        assert found["auc"] == pytest.approx(
            sk.roc_auc_score(LABELS, share, multi_class="ovr"), 1e-6
        )
    table = sk.classification_report(LABELS, said, output_dict=True, **given)
    for k in range(4):
        for mine, theirs in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score")):
            assert found["per_class"][mine][k] == pytest.approx(table[str(k)][theirs], 1e-6)
        assert found["per_class"]["support"][k] == pytest.approx(table[str(k)]["support"], 1e-6)
        assert found["per_class"]["auc"][k] == pytest.approx(one[k], 1e-6)
    probable = scores.scores(share, LABELS, "classes", True, weights)
    assert probable["auc"] == pytest.approx(found["auc"], 1e-6)


def test_two_classes_and_one_unit_have_one_ranking():
    both = np.concatenate([-ONE / 2, ONE / 2], axis=1)
    want = sk.roc_auc_score(TRUTH, ONE[:, 0], sample_weight=WEIGHTS)
    assert scores.scores(both, TRUTH, "classes", False, WEIGHTS)["auc"] == pytest.approx(want)
    found = scores.scores(ONE, TRUTH, "binary", False, WEIGHTS)
    assert found["auc"] == pytest.approx(want)
    said = ONE[:, 0] > 0
    assert found["f1"] == pytest.approx(sk.f1_score(TRUTH, said, sample_weight=WEIGHTS))
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(TRUTH, said, average="macro", sample_weight=WEIGHTS)
    )
    same = scores.scores(expit(ONE), TRUTH, "binary", True, WEIGHTS)
    assert same["f1"] == pytest.approx(found["f1"])


def test_labels_of_their_own_each_have_a_row():
    truth = (LOGITS + rng.normal(size=LOGITS.shape) > 0.5).astype(int)
    truth[:40, 2] = -1  # nobody looked
    found = scores.scores(LOGITS, truth, "multilabel", False, WEIGHTS)
    for k in range(4):
        kept = truth[:, k] >= 0
        given = {"sample_weight": WEIGHTS[kept]}
        y, score = truth[kept, k], LOGITS[kept, k]
        assert found["per_class"]["auc"][k] == pytest.approx(sk.roc_auc_score(y, score, **given))
        assert found["per_class"]["f1"][k] == pytest.approx(sk.f1_score(y, score > 0, **given))
    assert found["auc"] == pytest.approx(np.mean(found["per_class"]["auc"]))
    counted = (truth >= 0) * WEIGHTS[:, None]
    right = (truth == (LOGITS > 0)) * counted
    assert found["accuracy"] == pytest.approx(right.sum() / counted.sum(), 1e-6)
    assert metrics.accuracy(LOGITS, truth, "multilabel", False, WEIGHTS) == pytest.approx(
        found["accuracy"]
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_numbers_have_errors_and_ranks_and_no_accuracy(weights):
    want = LOGITS * 3 + rng.normal(size=LOGITS.shape)
    found = scores.scores(LOGITS, want, "values", False, weights)
    given = {"sample_weight": weights}
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(want, LOGITS, **given), 1e-6)
    errors = sk.mean_squared_error(want, LOGITS, multioutput="raw_values", **given)
    assert found["rmse"] == pytest.approx(np.sqrt(errors.mean()), 1e-6)
    assert found["r2"] == pytest.approx(sk.r2_score(want, LOGITS, **given), 1e-6)
    ranks = [spearmanr(want[:, k], LOGITS[:, k]).statistic for k in range(4)]
    assert found["spearman"] == pytest.approx(np.mean(ranks))
    np.testing.assert_allclose(found["per_unit"]["rmse"], np.sqrt(errors), 1e-6)
    np.testing.assert_allclose(found["per_unit"]["spearman"], ranks)
    assert "accuracy" not in found
    assert "ndcg@10" not in found


def test_long_rows_are_lists_to_be_ranked():
    items = rng.normal(size=(40, 25)).astype("float32")
    gains = rng.integers(0, 5, (40, 25)).astype("float32")
    want = sk.ndcg_score(gains, items, k=10)
    assert scores.scores(items, gains, "values", False)["ndcg@10"] == pytest.approx(want)
    short = scores.scores(items[:, :4], gains[:, :4], "values", False, ranks=True)
    assert short["ndcg@10"] == pytest.approx(sk.ndcg_score(gains[:, :4], items[:, :4], k=10))
    weights = np.where(np.arange(40) < 30, 1.0, 0.0)
    found = scores.scores(items, gains, "values", False, weights)
    assert found["ndcg@10"] == pytest.approx(sk.ndcg_score(gains[:30], items[:30], k=10))
    assert scores.scores(items, -gains, "values", False)["ndcg@10"] is None


def test_what_cannot_be_measured_is_none():
    assert scores.scores(LOGITS, None, "classes", False) == {}
    assert scores.scores(LOGITS, np.full(300, 2), "classes", False)["auc"] is None
    constant = scores.scores(ONE, np.ones((300, 1)), "values", False)
    assert constant["spearman"] is None
    assert constant["r2"] is None


def test_rows_of_no_weight_and_without_label_count_nowhere():
    other = LOGITS + rng.normal(size=LOGITS.shape).astype("float32")
    kept = rng.random(300) < 0.7
    weights = np.where(kept, WEIGHTS, 0)
    labels = np.where(rng.random(300) < 0.8, LABELS, -1)
    both = kept & (labels >= 0)
    names = {"a": {"kind": "classes", "probabilities": False}}
    found = judging.compare({"a": LOGITS}, {"a": other}, {"a": labels}, names, {"a": weights})
    said, asked = other.argmax(1), LOGITS.argmax(1)
    assert found["accuracy"] == pytest.approx(
        np.average(said[both] == labels[both], weights=weights[both])
    )
    assert found["agreement"] == pytest.approx(
        np.average(said[kept] == asked[kept], weights=weights[kept])
    )
    assert found["sqnr"] == pytest.approx(metrics.sqnr(LOGITS[kept], other[kept]))
    row = found["outputs"]["a"]
    assert row["variation"] == pytest.approx(metrics.variation(LOGITS[kept], other[kept]))
    assert row["kappa"] == pytest.approx(
        sk.cohen_kappa_score(asked[kept], said[kept], sample_weight=weights[kept])
    )
    broken = np.where(kept[:, None], other, np.nan)
    again = judging.compare({"a": LOGITS}, {"a": broken}, {"a": labels}, names, {"a": weights})
    assert again["finite"]
    assert again["worst"] == pytest.approx(np.abs(other - LOGITS)[kept].max())


def test_tokens_count_one_by_one():
    tokens = rng.normal(size=(20, 6, 5)).astype("float32")
    labels = rng.integers(0, 5, (20, 6))
    mask = rng.random((20, 6)) < 0.6
    rows = rng.uniform(0.5, 2, 20).astype("float32")
    info = Signature("single", (), (TensorInfo("a", (None, 6, 5), "float32"),))
    given = counting.sample_weights(rows, info, {"a": tokens})
    # The padding has a label that no class has, and the class 4 is ignored.
    labels[~mask] = 99
    truth, weights = counting.count({"a": labels}, given, {"a": mask}, {"a": {4}}, {"a": tokens})
    heavy = rows[:, None] * mask * (labels != 4)
    np.testing.assert_allclose(weights["a"], heavy)
    assert output_meaning.kind_of(tokens, truth["a"]) == "classes"
    right = tokens.argmax(-1) == labels
    want = (right * heavy).sum() / heavy.sum()
    assert metrics.accuracy(tokens, truth["a"], "classes", False, weights["a"]) == pytest.approx(
        want, 1e-6
    )
    counted = heavy > 0
    found = scores.scores(tokens, truth["a"], "classes", False, weights["a"])
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(
            labels[counted],
            tokens.argmax(-1)[counted],
            average="macro",
            sample_weight=heavy[counted],
        ),
        1e-6,
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(5), r"have shape \(5,\)"),
        (-np.ones(300), "none is negative"),
        (np.full(300, np.nan), "finite"),
        (np.zeros(300), "above 0"),
        ({"b": np.ones(300)}, r"name the outputs \['b'\]"),
        ([np.ones(300)] * 2, "are 2 arrays"),
        (np.full(300, "x"), "dtype"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    info = Signature("single", (), (TensorInfo("a", (None, 4), "float32"),))
    with pytest.raises(ValueError, match=message):
        counting.sample_weights(weights, info, {"a": LOGITS})


def test_minus_one_is_no_label_and_other_numbers_are_refused():
    labels = np.where(np.arange(300) < 20, -1, LABELS)
    assert output_meaning.kind_of(LOGITS, labels) == "classes"
    with pytest.raises(ValueError, match=r"from -2 to 3.*ignore_class"):
        output_meaning.kind_of(LOGITS, np.where(labels < 0, -2, labels))
    with pytest.raises(ValueError, match="All evaluation labels are -1"):
        output_meaning.kind_of(LOGITS, np.full(300, -1))
    # One unit: -1 is a number like others, unless the loss says yes or no.
    signs = np.where(np.arange(300) < 20, -1, TRUTH)
    assert output_meaning.kind_of(ONE, signs) == "values"
    assert output_meaning.kind_of(ONE, signs, "binary") == "binary"
    assert output_meaning.kind_of(ONE, TRUTH, "values") == "values"
    kept = signs >= 0
    assert metrics.accuracy(ONE, signs, "binary", False) == pytest.approx(
        np.mean((ONE[:, 0] > 0)[kept] == signs[kept])
    )


def _measure(asked, outputs, labels, kind, weights=None, probabilities=False, judges=True):
    kinds = {"a": {"kind": kind, "probabilities": probabilities}}
    heavy = {} if weights is None else {"a": weights}
    found = chosen_metrics.resolve(
        chosen_metrics.by_output(asked, ["a"]),
        {"a": outputs},
        {"a": labels},
        kinds,
        heavy,
        judges=judges,
    )
    values = chosen_metrics.measure(found, {"a": outputs}, {"a": labels}, heavy)["a"]
    return [(each.name, each.direction, values[each.name]) for each in found["a"]]


def _misses(y_true, y_pred, sample_weight=None):
    return np.average(y_true != y_pred.argmax(-1), weights=sample_weight)


def _each_miss(y_true, y_pred):
    return keras.ops.cast(keras.ops.not_equal(y_true, keras.ops.argmax(y_pred, -1)), "float32")


def _one_number(y_true, y_pred):
    return float(np.mean(y_true == y_pred.argmax(-1)))


def test_metrics_of_every_form_are_weighted():
    kept = np.arange(300) % 3 > 0
    weights = np.where(kept, WEIGHTS, 0).astype("float32")
    wrong = np.average(LOGITS.argmax(1) != LABELS, weights=weights)
    metric = keras.metrics.SparseCategoricalCrossentropy(from_logits=True)
    metric.update_state(LABELS, LOGITS, sample_weight=weights)
    want = float(metric.result())
    found = _measure(
        ["acc", metric, (_misses, "min"), (_each_miss, "min"), "macro_f1"],
        *(LOGITS, LABELS, "classes", weights),
    )
    assert [row[:2] for row in found] == [
        ("accuracy", "max"),
        ("sparse_categorical_crossentropy", "min"),
        ("_misses", "min"),
        ("_each_miss", "min"),
        ("macro_f1", "max"),
    ]
    np.testing.assert_allclose([row[2] for row in found[:4]], [1 - wrong, want, wrong, wrong], 1e-5)
    # One number for all rows is right where weights only choose rows.
    (row,) = _measure((_one_number, "max"), LOGITS, LABELS, "classes", kept.astype("float32"))
    assert row[2] == pytest.approx(np.mean((LOGITS.argmax(1) == LABELS)[kept]))
    with pytest.raises(ValueError, match="one number for all rows, and there are weights"):
        _measure((_one_number, "max"), LOGITS, LABELS, "classes", weights)


def test_rows_without_label_reach_no_metric():
    labels = np.where(np.arange(300) % 5 == 0, -1, LABELS)
    kept = labels >= 0
    want = np.mean((LOGITS.argmax(1) == labels)[kept])
    metric = keras.metrics.SparseCategoricalAccuracy()
    found = _measure([metric, (_one_number, "max")], LOGITS, labels, "classes")
    np.testing.assert_allclose([row[2] for row in found], want, 1e-6)


def test_columns_of_one_unit_are_not_compared_with_every_other():
    values = ONE[:, 0] * 2 + 1
    want = np.mean(np.abs(values - ONE[:, 0]))

    def gap(y_true, y_pred):
        return np.mean(np.abs(y_true - y_pred))

    found = _measure(
        [(gap, "min"), "mae", keras.metrics.MeanAbsoluteError()], ONE, values, "values"
    )
    np.testing.assert_allclose([row[2] for row in found], want, 1e-5)
    r2 = _measure(keras.metrics.R2Score(), ONE, values, "values")[0]
    assert r2[2] == pytest.approx(sk.r2_score(values, ONE[:, 0]), abs=1e-5)
    assert _measure(sk.r2_score, ONE, values, "values")[0][1] == "max"
    assert _measure(sk.mean_absolute_error, ONE, values, "values")[0][1:] == (
        "min",
        pytest.approx(want, 1e-5),
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("acuracy", "Did you mean `accuracy`"),
        ("mae", "no figure of these answers"),
        (keras.metrics.AUC(), "reads probabilities.*from_logits=True"),
        (keras.metrics.F1Score(), "fails on the Keras model's answers"),
        (lambda y, z: np.mean(z), "Nothing says whether more"),
        (lambda y, z: float("nan"), "gives nan"),
        ({"b": "auc"}, "names the output `b`"),
        (["auc", "roc_auc"], "two metrics of the name `auc`"),
    ],
)
def test_metrics_that_do_not_work_are_refused_at_once(asked, message):
    with pytest.raises(ValueError, match=message):
        _measure(asked, LOGITS, LABELS, "classes")
    with pytest.raises(TypeError, match="Received: 3"):
        _measure(3, LOGITS, LABELS, "classes")


def test_several_outputs_say_which_one_is_meant():
    with pytest.raises(ValueError, match="does not say which"):
        chosen_metrics.by_output("auc", ["a", "b"])
    assert chosen_metrics.by_output(["auc", None], ["a", "b"]) == {"a": ["auc"]}
    assert chosen_metrics.by_output({"b": ["mae", "rmse"]}, ["a", "b"]) == {"b": ["mae", "rmse"]}


@pytest.mark.parametrize(
    ("direction", "before", "after", "share"),
    [
        ("max", 0.9, 0.85, 0.05),
        ("max", 0.9, 0.95, -0.05),
        ("max", 40.0, 38.0, 0.05),
        ("min", 2.0, 2.1, 0.05),
        ("min", 200.0, 190.0, -0.05),
        ("min", 0.0, 0.0, 0.0),
        ("min", 0.0, 0.1, np.inf),
        ("max", 0.9, np.nan, np.inf),
    ],
)
def test_losses_are_shares_in_the_right_direction(direction, before, after, share):
    assert chosen_metrics.lost(direction, before, after) == pytest.approx(share)


def test_a_metric_that_counts_in_integers_loses_no_weight():
    want = sk.jaccard_score(LABELS, LOGITS.argmax(1), average="macro", sample_weight=WEIGHTS)
    metric = keras.metrics.MeanIoU(4, sparse_y_pred=False, dtype="float32")
    found = _measure(metric, LOGITS, LABELS, "classes", WEIGHTS)
    assert found[0][1:] == ("max", pytest.approx(want, 1e-5))
    whole = keras.metrics.MeanIoU(4, sparse_y_pred=False)
    with pytest.raises(ValueError, match="weights have fractions"):
        _measure(whole, LOGITS, LABELS, "classes", WEIGHTS)
    kept = (np.arange(300) % 3 > 0).astype("float32")
    want = sk.jaccard_score(LABELS, LOGITS.argmax(1), average="macro", sample_weight=kept)
    assert _measure(whole, LOGITS, LABELS, "classes", kept)[0][2] == pytest.approx(want, 1e-5)


def test_directions_come_from_keras_or_from_the_name():
    for metric, direction in (
        (keras.metrics.MeanAbsoluteError(), "min"),
        (keras.metrics.AUC(from_logits=True), "max"),
        (keras.metrics.CosineSimilarity(), "max"),
        (keras.metrics.MeanMetricWrapper(lambda y, z: y, name="dice"), "max"),
        (keras.metrics.MeanMetricWrapper(lambda y, z: y, name="word_error"), "min"),
        (keras.metrics.MeanMetricWrapper(lambda y, z: y, name="error_accuracy"), ""),
    ):
        assert chosen_metrics._ready(metric, "", ONE, {"kind": "values"}).direction == direction


def test_quantiles_and_kappa_are_those_of_libraries():
    from sklearn.metrics import cohen_kappa_score

    from keras_kd.export.verification import timing

    for count in (1, 2, 7, 30):
        times = rng.random(count)
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            assert timing.quantile(times, share) == pytest.approx(np.quantile(times, share), 1e-12)
    reference, got = rng.normal(size=(2, 50, 4)).astype("float32")
    got += reference
    weights = rng.integers(0, 3, 50).astype("float64")
    found = metrics.kappa(reference, got, "classes", False, weights)
    expected = cohen_kappa_score(reference.argmax(-1), got.argmax(-1), sample_weight=weights)
    assert found == pytest.approx(expected)
    assert metrics.kappa(reference[:, :1], got[:, :1], "binary", False) == pytest.approx(
        cohen_kappa_score(reference[:, 0] > 0, got[:, 0] > 0)
    )
