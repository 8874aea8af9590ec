"""`keras-kd export` and `keras-kd verify`, run on a tiny model."""

import json

import keras
import numpy as np
import pytest


@pytest.fixture(scope="module")
def exported(tmp_path_factory, models, image_file):
    """A folder that the command wrote, and what it printed."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from keras_kd.cli import main

    folder = tmp_path_factory.mktemp("exported") / "tiny"
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(
            [
                *("export", str(models["good"]), "--out", str(folder), "--json"),
                *("--calibration", str(image_file), "--evaluation", str(image_file)),
                *("--precisions", "int8", "--max-drop", "0.5", "--labels", "dark,gray,bright"),
            ]
        )
    assert code == 0, err.getvalue()
    return folder, json.loads(out.getvalue()), err.getvalue()


def test_export_writes_files_and_one_json_document(exported):
    folder, document, _ = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "good_int8.tflite",
        "good_int8.onnx",
        "evaluation.npz",
        "manifest.json",
        "report.html",
    }
    assert document["best"] in names
    rows = {row["name"]: row for row in document["rows"]}
    assert rows["tflite int8"]["status"] == rows["onnx int8"]["status"] == "passed"
    assert rows["tflite int8"]["bytes"] == (folder / "good_int8.tflite").stat().st_size
    assert document["evaluation"]["samples"] == 6
    assert json.loads((folder / "manifest.json").read_text())["model"]["labels"][2] == "bright"


@pytest.mark.parametrize("columns", [80, 160])
def test_verify_proves_the_files_and_fits_the_terminal(run, monkeypatch, exported, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run("verify", exported[0])
    assert code == 0
    # A path is not broken, so that it can be copied.
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= columns
    assert "Verified: 2 of 2 files" in " ".join(out.split())


def test_verify_gives_one_json_document(run, exported):
    code, out, _ = run("verify", exported[0], "--json", "--quiet")
    document = json.loads(out)
    assert (code, document["ok"], document["problems"]) == (0, True, [])


def test_quiet_leaves_stderr_empty(run, exported):
    code, _, err = run("verify", exported[0], "--quiet")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("spoil", ["flip", "remove", "edit"])
def test_verify_names_what_was_changed(run, tmp_path, exported, spoil):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(exported[0], folder)
    file = folder / "good_int8.tflite"
    if spoil == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(bytes(content))
    elif spoil == "remove":
        file.unlink()
    else:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"int8"', '"int9"', 1))
    code, out, err = run("verify", "copy")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert ("manifest.json" if spoil == "edit" else "good_int8.tflite") in err


def test_metrics_and_weights_come_from_the_command_line(run, tmp_path, models):
    rng = np.random.default_rng(1)
    model = keras.saving.load_model(models["good"])
    x = rng.random((30, 6, 6, 1)).astype("float32")
    said = model.predict(x, verbose=0).argmax(1)
    y = np.where(np.arange(30) % 3 == 0, (said + 1) % 3, said)
    weights = np.where(np.arange(30) % 3 == 0, 0.0, 2.0)
    np.savez(tmp_path / "data.npz", x=x, y=y, sample_weight=weights)
    code, out, err = run(
        "export", models["good"], "--evaluation", "data.npz", "--out", "scored", "--json",
        "--formats", "tflite", "--precisions", "float32", "--metrics", "macro_f1,acc", "--quiet",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(out)
    assert document["metric"] == "macro_f1"
    assert [row["score"] for row in document["rows"]] == [1.0, 1.0]
    assert [row["accuracy"] for row in document["scores"]] == [1.0, 1.0]
    assert sum(row["support"] for row in document["classes"]) == pytest.approx(weights.sum())
    code, _, err = run(
        "export", models["good"], "--evaluation", "data.npz", "--out", "not", "--precisions",
        "float32", "--metrics", "macrof1", "--quiet",
    )  # fmt: skip
    assert (code, err.count("\n")) == (2, 1)
    assert "Did you mean `macro_f1`" in err
    assert not (tmp_path / "not").exists()


def test_a_failed_export_leaves_the_earlier_one_untouched(run, tmp_path, exported, models):
    import shutil

    folder = tmp_path / "kept"
    shutil.copytree(exported[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    np.savez(tmp_path / "bad.npz", x=np.full((8, 6, 6, 1), np.nan, "float32"))
    arguments = ["--calibration", "bad.npz", "--out", "kept", "--overwrite"]
    code, _, err = run("export", models["good"], *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_inputs_are_read_by_name(models, tmp_path):
    from keras_kd.cli.inputs import load_model, read_samples

    left, right = keras.Input((2,), name="left"), keras.Input((3,), name="right")
    joined = keras.layers.Concatenate()([left, right])
    model = keras.Model([left, right], keras.layers.Dense(1, name="price")(joined))
    arrays = {"left": np.ones((4, 2)), "right": np.ones((4, 3)), "price": np.ones(4)}
    np.savez(tmp_path / "named.npz", **arrays)
    x, y, note = read_samples(str(tmp_path / "named.npz"), "evaluation", model)
    assert set(x) == {"left", "right"}
    assert set(y) == {"price"}
    assert "4 samples" in note
    np.savez(tmp_path / "plain.npz", x=np.ones((5, 6, 6, 1)), y=np.zeros(5, "int64"))
    good = load_model(str(models["good"]), "model")
    x, y, _ = read_samples(str(tmp_path / "plain.npz"), "calibration", good)
    assert (x.shape, y.shape) == ((5, 6, 6, 1), (5,))
    x, y, note = read_samples("digits", "evaluation", good)
    assert (len(x), len(y)) == (216, 216)
    assert note == "Evaluation: the 216 validation images of digits."
