"""An export with all that reports show, verified: every figure measured, every claim compared."""

import re
import shutil

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.metrics import f1_score

import keras_kd.export
from keras_kd.cli import main as command_line
from keras_kd.export import manifest
from keras_kd.export.formats import registry
from keras_kd.export.report import card, html_page

NAMES = ["ant", "bee", "cat"]
PIXELS = {"mean": [127.5], "std": [63.1]}


def far(labels, outputs):
    """A metric that only this program has."""
    return np.abs(labels - outputs).max()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights, metrics, a target, two outputs; inputs named as no parameter of Python is."""
    keras.utils.set_random_seed(0)
    image = keras.Input((6, 6, 3), name="in")
    more = keras.Input((4,), name="my input")
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(image), more])
    x = layers.Dense(12, activation="relu", name="hidden")(x)
    model = keras.Model(
        [image, more],
        {"kind": layers.Dense(3, name="kind")(x), "size": layers.Dense(1, name="size")(x)},
        name="both",
    )
    model.compile(
        loss={
            "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "size": "mse",
        }
    )
    rng = np.random.default_rng(0)
    x = {
        "in": rng.normal(size=(90, 6, 6, 3)).astype("float32"),
        "my input": rng.normal(size=(90, 4)).astype("float32"),
    }
    answers = model.predict(x, verbose=0)
    y = {"kind": rng.integers(0, 3, 90), "size": answers["size"] + rng.normal(size=(90, 1))}
    y["kind"][:60] = answers["kind"].argmax(-1)[:60]
    weights = {"kind": rng.uniform(0.1, 2, 90)}
    folder = tmp_path_factory.mktemp("made") / "export"
    report = keras_kd.export(
        model,
        folder,
        precisions=("float32", "int8"),
        calibration=x,
        evaluation=(x, y, weights),
        metrics={"kind": ["macro_f1"], "size": ["mae", far]},
        max_drop=0.2,
        targets=["tflite-2.14"],
        labels=NAMES,
        normalization={"in": (PIXELS["mean"], PIXELS["std"])},
    )
    return model, x, y, weights, folder, report


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[4], tmp_path / "copy")


def resealed(folder, change):
    content = manifest.read(folder)
    change(content)
    manifest.write(content, folder / manifest.FILE)


def test_inputs_of_any_name_become_files(made):
    model, x, *_, report = made
    assert all(artifact.passed for artifact in report.artifacts)
    expected = model.predict(x, verbose=0)
    for artifact in report.artifacts:
        tensors = artifact.details["signature"]["inputs"]
        assert {tensor["name"] for tensor in tensors} == {"in", "my input"}
        got = keras_kd.export.load(artifact.path)(x)
        error = 1e-5 if artifact.precision == "float32" else 0.2
        for name, array in expected.items():
            np.testing.assert_allclose(got[name], array, atol=error)


def test_a_file_says_what_is_recorded_of_it(made):
    *_, report = made
    for artifact in report.artifacts:
        labels, pixels = registry.of_file(artifact.path).says(artifact.path)
        assert labels == NAMES
        assert list(pixels) == ["in"]
        np.testing.assert_allclose(pixels["in"]["mean"], PIXELS["mean"])
        np.testing.assert_allclose(pixels["in"]["std"], PIXELS["std"], rtol=1e-6)


def test_what_verify_shows_is_measured_on_the_stored_samples(copy, made):
    *_, report = made

    def lie(content):
        content["keras"]["outputs"]["kind"]["chosen"]["macro_f1"] = 0.99
        content["keras"]["outputs"]["kind"]["scores"]["auc"] = 1.0
        content["evaluation"]["weighted"] = ["size", "kind"]
        for row in content["artifacts"]:
            row["metrics"]["outputs"]["kind"]["chosen"][0].update(value=0.99, before=0.99, lost=0.0)
            row["metrics"]["outputs"]["kind"]["scores"]["macro_f1"] = 0.99

    honest = keras_kd.export.verify(copy)
    resealed(copy, lie)
    proof = keras_kd.export.verify(copy)
    assert honest.ok
    assert proof.ok
    with np.load(copy / "evaluation.npz") as arrays:
        order = [info["name"] for info in report.manifest["model"]["outputs"]]
        kind, size = order.index("kind"), order.index("size")
        y, labels, weights = (arrays[f"{key}{kind}"] for key in "ytw")
        assert f"w{size}" not in arrays
    expected = f1_score(labels, y.argmax(-1), average="macro", sample_weight=weights)
    rows = {(row["name"], row["output"]): row for row in proof.scorecard().rows()}
    assert rows["keras", "kind"]["macro_f1"] == pytest.approx(expected)
    # What is judged by is the first output that has a chosen metric.
    assert proof.scorecard().name == report.scorecard().name
    for now, was in zip(proof.artifacts, report.artifacts, strict=True):
        assert now.score == pytest.approx(was.score, abs=1e-6)
        assert now.drop == pytest.approx(was.drop, abs=1e-6)
    assert proof.manifest["evaluation"]["weighted"] == ["kind"]
    # All samples are stored: the file to take for the target is the same one.
    assert proof.best.file == report.best.file
    assert proof.manifest["targets"] == report.manifest["targets"]


def test_what_cannot_be_measured_again_is_left_out_and_said(copy, capsys):
    proof = keras_kd.export.verify(copy)
    assert proof.manifest["evaluation"]["not_measured"] == {"size": ["far"]}
    assert proof.manifest["settings"]["max_drop"] is None
    assert all("far" not in row for row in proof.scorecard().rows())
    assert command_line(["verify", str(copy), "--quiet"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Not measured again, and no limit on it: far of output `size`" in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": ["ant", "cat", "bee"]}, 'its class names are ["ant", "bee", "cat"], and'),
        ({"labels": None}, 'its class names are ["ant", "bee", "cat"], and none are recorded'),
        ({"normalization": {}}, "its normalization of pixels are"),
        ({"normalization": {"in": {"mean": [0.0], "std": [63.1]}}}, "[0.0]"),
    ],
)
def test_names_and_pixels_that_a_file_does_not_carry_are_a_problem(copy, change, reason):
    resealed(copy, lambda content: content["model"].update(change))
    problems = keras_kd.export.verify(copy).problems
    assert len(problems) == 4
    assert all(reason in problem for problem in problems)


def test_the_file_for_the_targets_is_called_so(made):
    *_, report = made
    text = " ".join(report.table().split())
    assert "* smallest file that passed and runs in tflite-2.14, " in text
    smaller = min(report.artifacts, key=lambda artifact: artifact.bytes)
    assert smaller.format == "onnx"
    assert report.best.format == "tflite"


def test_an_error_may_more_than_double(made):
    *_, report = made
    content = {key: value for key, value in report.manifest.items() if key != "seal"}
    content["artifacts"][1]["drop"] = 9.5
    manifest.check(content, report.folder)


def test_the_page_tells_versions_and_settings_of_runtimes(made):
    *_, report = made
    text = " ".join(html_page.render(report).split())
    assert "the best file is the one of least size of those that run in tflite-2.14." in text
    assert "no: it reads no .onnx files" in text
    assert "TensorFlow Lite" in report.runtimes().since(report.best.file)
    assert report.runtimes().since(report.best.file) in text
    for name, advice in report.runtimes().advice().items():
        assert f"{name}: {advice}" in text
        assert f"- {name}: {advice}." in card.render(report)
    for heading in ("macro F1", "Keras recall", "MAE"):
        assert f"<th>{heading}</th>" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"labels": ["a", "b"]}, "must name the 3 classes of output `kind`"),
        ({"labels": ["a", "b", "c", "d"]}, "must name the 3 classes"),
        ({"normalization": (0, 255, 3)}, "must be `(mean, std)`"),
        ({"normalization": {"my input": (0, 255)}}, "`my input` in `normalization` is no image"),
        ({"normalization": {"in": ([1, 2], 255)}}, "each a number or 3 of them"),
        ({"metrics": {"kind": ["macro_f2"]}}, "Did you mean `macro_f1`?"),
        ({"metrics": {"sise": ["mae"]}}, "Did you mean `size`?"),
        ({"metrics": {"size": [3]}}, "`metrics` takes names"),
    ],
)
def test_what_the_graph_tells_is_refused_before_the_model_answers(
    made, tmp_path, monkeypatch, arguments, reason
):
    model, x, y, *_ = made

    def answered(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(model, "predict", answered)
    with pytest.raises((TypeError, ValueError), match=re.escape(reason)):
        keras_kd.export(model, tmp_path / "new", calibration=x, evaluation=(x, y), **arguments)
    assert not (tmp_path / "new").exists()
