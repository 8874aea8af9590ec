"""What the evaluation data says of the task reaches every figure of an export."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy.stats import spearmanr
from sklearn import metrics as sk

import keras_kd.export

rng = np.random.default_rng(9)


def find(report, name):
    return next(a for a in report.artifacts if f"{a.format} {a.precision}" == name)


@pytest.fixture(scope="module")
def linear():
    """A classifier of four classes with weights written down, and data: (model, x, y)."""
    model = keras.Sequential([keras.Input((5,), name="x"), layers.Dense(4, name="y")])
    model.set_weights([rng.normal(size=(5, 4)), np.zeros(4)])
    x = rng.normal(size=(200, 5)).astype("float32")
    said = model.predict(x, verbose=0).argmax(1)
    return model, x, np.where(rng.random(200) < 0.5, said, rng.integers(0, 4, 200))


@pytest.mark.parametrize("form", ["arrays", "batches"])
def test_sample_weights_weigh_every_figure(linear, form, tmp_path):
    model, x, y = linear
    said = model.predict(x, verbose=0).argmax(1)
    # The rows that the model gets wrong weigh nothing.
    weights = np.where(said == y, rng.uniform(1, 3, 200), 0)
    given = {
        "arrays": (x, y, weights),
        "batches": [(x[i : i + 30], y[i : i + 30], weights[i : i + 30]) for i in range(0, 200, 30)],
    }[form]
    report = keras_kd.export(
        model,
        tmp_path / "weighted",
        formats="tflite",
        precisions="float32",
        evaluation=iter(given) if form == "batches" else given,
    )
    assert report.manifest["keras"]["accuracy"] == 1.0
    assert report.best.accuracy == 1.0
    assert np.mean(said == y) < 0.8
    (row,) = [r for r in report.scorecard().rows() if r["name"] == "keras"]
    assert row["macro_f1"] == 1.0
    table = report.scorecard().classes()
    supports = [weights[y == k].sum() for k in range(4)]
    np.testing.assert_allclose([entry["support"] for entry in table], supports, 1e-5)
    assert keras_kd.export.verify(report.folder).ok


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """Tags of padded words, with a mask of Keras and labels that are no classes: (model, x, y,
    report)."""
    words = keras.Input((7,), dtype="int32", name="words")
    embedded = layers.Embedding(20, 6, mask_zero=True, name="table")(words)
    tags = layers.Dense(3, name="tags")(embedded)
    model = keras.Model(words, tags)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=9)
    )
    x = rng.integers(1, 20, (90, 7))
    x[np.arange(7) >= rng.integers(1, 8, (90, 1))] = 0
    said = model.predict(x, verbose=0).argmax(-1)
    y = np.where(rng.random(x.shape) < 0.6, said, rng.integers(0, 3, x.shape))
    y[x == 0] = 77  # padding
    y[rng.random(x.shape) < 0.1] = 9  # ignored by the loss
    y[rng.random(x.shape) < 0.1] = -1  # nobody looked
    y[x == 0] = np.where(y[x == 0] < 0, 77, y[x == 0])
    weights = rng.uniform(0.5, 2, 90).astype("float32")
    report = keras_kd.export(
        model,
        tmp_path_factory.mktemp("tags") / "tags",
        formats="tflite",
        precisions="float32",
        evaluation=(x, y, weights),
        metrics=[keras.metrics.SparseCategoricalAccuracy(), "macro_f1"],
        labels=["noun", "verb", "rest"],
    )
    return model, x, y, weights, report


def test_masks_ignored_labels_and_missing_ones_count_nowhere(tagger):
    model, x, y, weights, report = tagger
    said = model.predict(x, verbose=0).argmax(-1)
    heavy = weights[:, None] * ((x > 0) & (y >= 0) & (y < 3))
    want = ((said == y) * heavy).sum() / heavy.sum()
    counted = heavy > 0
    assert report.manifest["keras"]["accuracy"] == pytest.approx(want, 1e-6)
    figures = report.manifest["keras"]["outputs"]["tags"]
    assert figures["chosen"]["sparse_categorical_accuracy"] == pytest.approx(want, 1e-5)
    f1 = sk.f1_score(y[counted], said[counted], average="macro", sample_weight=heavy[counted])
    assert figures["chosen"]["macro_f1"] == pytest.approx(f1, 1e-6)
    assert report.scorecard().name == "sparse_categorical_accuracy"
    row = find(report, "tflite float32")
    assert row.score == pytest.approx(want, 1e-5)
    assert [entry["class"] for entry in report.scorecard().classes()] == ["noun", "verb", "rest"]
    # Labels that are missing are no reason to leave the row out of the comparison.
    kept = weights[:, None] * ((x > 0) & (y != 9))
    agreement = row.details["metrics"]["outputs"]["tags"]["agreement"]
    assert agreement == 1.0
    with np.load(report.folder / "evaluation.npz") as arrays:
        np.testing.assert_allclose(arrays["w0"], kept, 1e-6)


def test_pixels_of_an_ignored_class_count_nowhere(tmp_path):
    layer = layers.Conv2D(3, 3, padding="same", name="mask")
    model = keras.Sequential([keras.Input((8, 8, 2), name="image"), layer])
    x = rng.normal(size=(40, 8, 8, 2)).astype("float32")
    said = model.predict(x, verbose=0).argmax(-1)
    y = np.where(rng.random(said.shape) < 0.7, said, rng.integers(0, 3, said.shape))
    y[rng.random(y.shape) < 0.2] = 255
    report = keras_kd.export(
        model,
        tmp_path / "mask",
        formats="tflite",
        precisions="int8",
        calibration=x,
        evaluation=tf.data.Dataset.from_tensor_slices((x, y)).batch(7),
        metrics=keras.metrics.MeanIoU(3, ignore_class=255, sparse_y_pred=False),
        max_drop=0.05,
    )
    counted = y != 255
    got = keras_kd.export.load(report.best.path)(x).argmax(-1)
    (row,) = report.best.details["metrics"]["outputs"]["mask"]["chosen"]
    for value, answers in ((row["before"], said), (row["value"], got)):
        want = sk.jaccard_score(y[counted], answers[counted], average="macro")
        assert value == pytest.approx(want, abs=1e-4)
    assert report.best.accuracy == pytest.approx(np.mean((got == y)[counted]), abs=1e-3)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    """Ratings and a class, with metrics of their own: (model, x, y, report)."""
    inputs = keras.Input((6,), name="x")
    hidden = layers.Dense(16, activation="relu", name="hidden")(inputs)
    model = keras.Model(
        inputs,
        {"rating": layers.Dense(1, name="r")(hidden), "kind": layers.Dense(3, name="k")(hidden)},
    )
    x = rng.normal(size=(150, 6)).astype("float32")
    answers = model.predict(x, verbose=0)
    y = {
        "rating": answers["rating"][:, 0] + rng.normal(0, 0.3, 150),
        "kind": rng.integers(0, 3, 150),
    }

    def misses(y_true, y_pred):
        return (y_true != y_pred.argmax(-1)).astype("float32")

    report = keras_kd.export(
        model,
        tmp_path_factory.mktemp("ratings") / "ratings",
        precisions=("float32", "int8"),
        calibration=x[:100],
        evaluation=(x, y),
        metrics={
            "rating": [keras.metrics.MeanAbsoluteError(name="gap"), "spearman"],
            "kind": (misses, "min"),
        },
        max_drop=1e-5,
        mixed=False,
    )
    return model, x, y, report


@pytest.mark.parametrize("fmt", ["tflite", "onnx"])
def test_chosen_metrics_judge_in_their_own_direction(ratings, fmt):
    model, x, y, report = ratings
    file = find(report, f"{fmt} int8")
    got = keras_kd.export.load(file.path)(x)
    want = model.predict(x, verbose=0)
    rows = file.details["metrics"]["outputs"]
    gap, ranks = rows["rating"]["chosen"]
    before, after = (np.abs(a["rating"][:, 0] - y["rating"]).mean() for a in (want, got))
    assert (gap["name"], gap["direction"]) == ("gap", "min")
    assert gap["before"] == pytest.approx(before, 1e-5)
    assert gap["value"] == pytest.approx(after, 1e-3)
    assert gap["lost"] == pytest.approx((gap["value"] - gap["before"]) / gap["before"])
    assert ranks["value"] == pytest.approx(
        spearmanr(got["rating"][:, 0], y["rating"]).statistic, abs=1e-3
    )
    (missed,) = rows["kind"]["chosen"]
    assert missed["before"] == pytest.approx(np.mean(want["kind"].argmax(1) != y["kind"]))
    # One part in a hundred thousand: int8 keeps it by accident alone.
    losses = [gap["lost"], missed["lost"]]
    assert file.passed == all(loss <= 1e-5 for loss in losses)
    if gap["lost"] > 1e-5:
        assert "gap" in file.reason
        assert "above the Keras model's" in file.reason
    assert find(report, f"{fmt} float32").passed


def test_a_regression_has_errors_and_ranks_and_no_accuracy(linear, tmp_path):
    _, x, _ = linear
    model = keras.Sequential([keras.Input((5,), name="x"), layers.Dense(1, name="price")])
    model.set_weights([rng.normal(size=(5, 1)), np.array([20.0])])
    y = model.predict(x, verbose=0)[:, 0] + rng.normal(0, 0.5, 200)
    report = keras_kd.export(
        model,
        tmp_path / "price",
        formats="tflite",
        precisions=("float32", "int8"),
        calibration=x,
        evaluation=(x, y),
    )
    got = model.predict(x, verbose=0)[:, 0]
    row = report.scorecard().rows()[0]
    assert row["mae"] == pytest.approx(np.abs(got - y).mean(), 1e-5)
    assert row["rmse"] == pytest.approx(np.sqrt(np.square(got - y).mean()), 1e-5)
    assert row["spearman"] == pytest.approx(spearmanr(got, y).statistic)
    assert report.rows()[0]["score"] == row["rmse"]
    documents = (
        report.table(),
        report.table(60),
        report.save_html(tmp_path / "r.html").read_text(),
        report.save_card(tmp_path / "c.md").read_text(),
    )
    for text in documents:
        assert "accuracy" not in text
        assert " acc" not in text
        assert "RMSE" in text
        assert "Spearman" in text or "spearman" in text
    assert report.best is not None
    with pytest.raises(ValueError, match="`labels` names classes.*plain numbers"):
        keras_kd.export(
            model, tmp_path / "x", evaluation=(x, y), precisions="float32", labels=["no", "yes"]
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluation": "weights"}, r"have shape \(3,\)|different lengths"),
        ({"metrics": "acuracy"}, "Did you mean `accuracy`"),
        ({"metrics": "mae"}, "no figure of these answers"),
        ({"metrics": {"z": "auc"}}, "names the output `z`"),
    ],
)
def test_bad_evaluations_are_refused_before_anything_is_written(linear, given, message, tmp_path):
    model, x, y = linear
    if given.get("evaluation"):
        given = {"evaluation": (x, y, np.ones(3))}
    with pytest.raises(ValueError, match=message):
        keras_kd.export(
            model, tmp_path / "x", precisions="float32", **{"evaluation": (x, y), **given}
        )
    assert not (tmp_path / "x").exists()
