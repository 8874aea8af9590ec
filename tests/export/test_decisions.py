"""Outputs that are decisions already, such as those of `argmax`, are judged as decisions."""

import judging
import keras
import numpy as np
import pytest
from keras import layers, ops
from sklearn import metrics as sk

import keras_kd.export
from keras_kd.export.verification import keras_answers, metrics, output_meaning, scores
from keras_kd.export.verification.decisions import whole_numbers

rng = np.random.default_rng(4)


class Best(layers.Layer):
    def call(self, inputs):
        return ops.argmax(inputs, axis=-1)


class Bytes(layers.Layer):
    def call(self, inputs):
        return ops.cast(inputs, "uint8")


def test_whole_numbers_are_choices_or_quantities_by_what_makes_them():
    image = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 1)(image)
    inner = keras.Model(image, {"a": ops.argmax(x, -1), "b": x})
    choices = {
        "argmax": ops.argmax(x, -1),
        "as bytes": ops.cast(ops.argmax(x, -1), "uint8"),
        "from one": ops.argmax(x, -1) + 1,
        "once floats": ops.cast(ops.cast(ops.argmax(x, -1), "float32"), "int32"),
        "moved": ops.reshape(ops.argmax(x, -1), (-1, 36)),
        "or none": ops.where(ops.max(x, -1) > 0.3, ops.argmax(x, -1), -1),
        "yes": x > 0.5,
        "yes as 1": ops.cast(x > 0.5, "int32"),
        "first": ops.top_k(x, 2)[1],
        "nested": inner(image)["a"],
        "own": Best()(x),
        "chain": keras.Sequential([keras.Input((6, 6, 4)), Best()])(x),
    }
    quantities = {
        "pixels": ops.cast(ops.clip(255 * x, 0, 255), "uint8"),
        "years": ops.cast(ops.round(x[:, 0, 0, 0]), "int32"),
        "count": ops.sum(ops.cast(x > 0, "int32"), axis=(1, 2, 3)),
        "own bytes": Bytes()(x),
    }
    floats = {"scores": x, "top": ops.top_k(x, 2)[0]}
    made = {**choices, **quantities, **floats}
    model = keras.Model(image, made)
    answers = {k: np.zeros(1, v.dtype) for k, v in sorted(made.items())}
    found = whole_numbers(model, answers)
    assert found == {**dict.fromkeys(choices, "decisions"), **dict.fromkeys(quantities, "values")}


def row(before, after, labels=None, weights=None, precision="int8", max_drop=0.01):
    kinds = {"y": {"kind": "decisions", "probabilities": False}}
    given = {} if labels is None else {"y": labels}
    weights = {} if weights is None else {"y": weights}
    found = judging.compare({"y": before}, {"y": after}, given, kinds, weights, scores=True)
    entry = {
        "format": "tflite",
        "precision": precision,
        "status": "passed",
        "stage": None,
        "reason": "",
        "bytes": 10,
        "latency_low_ms": 1.0,
        "metrics": found,
        "contents": {"flex": [], "weight_bits": {"8": 9}, "float_operators": []},
    }
    figures = judging.compare({"y": before}, {"y": before}, given, kinds, weights, scores=True)
    judging.judge([entry], max_drop, False, figures["outputs"])
    return entry


def changed(before, count, classes=5):
    after = before.copy()
    after[:count] = (after[:count] + 1) % classes
    return after


CHOICES = rng.integers(0, 5, 1000)


def test_figures_are_those_of_decisions():
    labels = np.where(rng.random(1000) < 0.7, CHOICES, rng.integers(0, 5, 1000))
    after, weights = changed(CHOICES, 200), rng.uniform(0, 2, 1000)
    labels[5:25] = -1
    counted = weights * (labels >= 0)
    figures = row(CHOICES, after, labels, weights)["metrics"]
    output = figures["outputs"]["y"]
    right = sk.accuracy_score(labels, after, sample_weight=counted)
    assert figures["accuracy"] == pytest.approx(right)
    assert figures["agreement"] == pytest.approx(
        sk.accuracy_score(CHOICES, after, sample_weight=weights)
    )
    assert output["kappa"] == pytest.approx(
        sk.cohen_kappa_score(after, CHOICES, sample_weight=weights)
    )
    assert output["changed"] == 200
    assert output["decided"] == 1000
    known = labels >= 0
    heavy = {"sample_weight": weights[known]}
    macro = sk.f1_score(labels[known], after[known], average="macro", **heavy)
    assert output["scores"]["macro_f1"] == pytest.approx(macro)
    recall = sk.recall_score(
        labels[known], after[known], average=None, sample_weight=weights[known]
    )
    np.testing.assert_allclose(output["scores"]["per_class"]["recall"], recall)
    assert output["scores"]["auc"] is None


@pytest.mark.parametrize(
    ("count", "precision", "max_drop", "status"),
    [
        (0, "float32", 0.01, "passed"),
        # Near ties may fall the other way.
        (2, "float32", None, "passed"),
        (11, "float32", None, "failed"),
        (30, "float16", None, "passed"),
        (60, "float16", None, "failed"),
        (9, "int8", 0.01, "passed"),
        (11, "int8", 0.01, "failed"),
        (300, "int8", None, "passed"),
        (600, "int8", None, "failed"),
    ],
)
def test_files_are_judged_by_the_decisions_that_change(count, precision, max_drop, status):
    entry = row(CHOICES, changed(CHOICES, count), precision=precision, max_drop=max_drop)
    assert entry["status"] == status
    if status == "failed" and precision == "float32":
        assert "11 of 1000 decisions at output `y` are not the Keras model's" in entry["reason"]


def test_one_answer_for_all_is_of_no_use_however_rare_the_others():
    choices = (np.arange(2000) % 40 == 0).astype(int)
    entry = row(choices, np.zeros(2000, int), max_drop=None)
    assert entry["status"] == "failed"
    assert "50 of its 2000 decisions" in entry["reason"]
    assert "0 % of what is beyond chance" in entry["reason"]
    # Three rare ones that change are an accident.
    rare = (np.arange(2000) < 3).astype(int)
    assert row(rare, np.zeros(2000, int), max_drop=None)["status"] == "passed"


def test_a_class_that_is_lost_is_named():
    labels = np.repeat([0, 1], [985, 15])
    entry = row(labels, np.zeros(1000, int), labels, max_drop=0.02)
    assert "class 1 keeps 0.0 % of its 15 rows" in entry["reason"] or (
        "which leaves 0 %" in entry["reason"]
    )
    assert entry["status"] == "failed"


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (CHOICES, np.eye(5)[CHOICES], r"argmax\(axis=-1\)"),
        (CHOICES, CHOICES + 0.5, "decisions are whole numbers"),
        (CHOICES, np.full(1000, -1), "All evaluation labels are -1"),
        (CHOICES - 1, CHOICES - 1, "whole numbers from -1"),
        (CHOICES, CHOICES[:10], r"one decision in each place of \(1000,\)"),
    ],
)
def test_labels_that_do_not_fit_decisions_are_refused(outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        output_meaning.kind_of(outputs, labels, "decisions")


def test_labels_of_decisions_may_be_columns():
    assert output_meaning.kind_of(CHOICES, CHOICES[:, None], "decisions") == "decisions"
    assert metrics.accuracy(CHOICES, CHOICES[:, None], "decisions", False) == 1.0


def test_numbers_beyond_float32_are_compared_exactly():
    a = np.array([2**24, 2**24 + 1] * 10)
    b = a.copy()
    b[:10] = 2**24
    figures = judging.compare(
        {"y": a}, {"y": b}, {}, {"y": {"kind": "decisions", "probabilities": False}}
    )
    assert figures["agreement"] == 0.75
    assert scores.scores(b, a, "decisions", False) == {"accuracy": 0.75}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A segmentation of three classes that ends in argmax, and its export in two formats."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("the graphs are those of TensorFlow")
    keras.utils.set_random_seed(3)
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(3, 3, padding="same", name="scores")(image)
    model = keras.Model(image, ops.argmax(x, axis=-1), name="segmenter")
    x = rng.normal(size=(40, 8, 8, 3)).astype("float32")
    y = model.predict(x, verbose=0)
    y = np.where(rng.random(y.shape) < 0.8, y, (y + 1) % 3)
    y[:, 0] = -1
    report = keras_kd.export(
        model,
        tmp_path_factory.mktemp("decisions") / "out",
        precisions=("float16", "int8"),
        calibration=x,
        evaluation=(x, y),
        max_drop=0.05,
        labels=["sky", "road", "car"],
    )
    return report, model, x, y


def test_an_export_of_decisions_is_judged_and_proven_as_such(made):
    report, model, x, y = made
    said = model.predict(x, verbose=0)
    known = y >= 0
    assert report.manifest["keras"]["accuracy"] == pytest.approx(np.mean((said == y)[known]))
    for artifact in report.artifacts:
        assert artifact.passed, artifact.reason
        got = keras_kd.export.load(artifact.path)(x)
        assert np.issubdtype(got.dtype, np.integer)
        assert artifact.agreement == pytest.approx(np.mean(got == said))
        assert artifact.accuracy == pytest.approx(np.mean((got == y)[known]))
        assert artifact.agreement > 0.95
    table = report.scorecard().classes()
    assert [entry["support"] for entry in table] == [(y == k).sum() for k in range(3)]
    assert keras_kd.export.verify(report.folder).ok
    assert "agree" in report.table()


def test_too_few_names_of_decisions_are_refused(made, tmp_path):
    _, model, x, _ = made
    with pytest.raises(ValueError, match="must name each number that output .* goes up to 2"):
        keras_kd.export(
            model, tmp_path / "few", evaluation=x, precisions="float32", labels=["sky", "road"]
        )


def test_outputs_without_an_axis_of_units_are_one_number_a_row():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1), layers.Flatten()])
    inputs = keras.Input((4,))
    flat = keras.Model(inputs, ops.squeeze(model(inputs), -1))
    flat.compile(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    x = rng.normal(size=(30, 4)).astype("float32")
    assert next(iter(keras_answers.answer(flat, x, None).kinds.values()))["kind"] == "binary"


def test_files_without_any_noise_are_proven_again(tmp_path):
    """What is equal to the last bit has no decibels in JSON."""
    inputs = keras.Input((4,), name="x")
    model = keras.Model(inputs, layers.Rescaling(0.5, name="half")(inputs))
    # Halves of whole numbers are exact in every precision.
    x = rng.integers(-100, 100, (30, 4)).astype("float32")
    report = keras_kd.export(
        model, tmp_path / "exact", formats="onnx", precisions="float32", evaluation=x
    )
    assert report.best.sqnr is None
    assert report.best.worst == 0
    assert keras_kd.export.verify(report.folder).ok
