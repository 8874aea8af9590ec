"""`keras-kd cache`: the same from the command line."""

import json

import keras
import numpy as np
import pytest

pytest.importorskip("typer")

import keras_kd.export
from keras_kd import cli
from keras_kd.cache.reader import Records


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    inputs = keras.Input((6,), name="features")
    model = keras.Model(inputs, keras.layers.Dense(5)(inputs), name="tutor")
    model.save(folder / "teacher.keras")
    x = np.random.default_rng(0).normal(size=(100, 6)).astype("float32")
    np.savez(folder / "data.npz", x=x)
    np.savez(folder / "other.npz", features=x[::-1])
    return folder, model, x


def test_write_info_and_verify(tmp_path, capsys, files):
    folder, model, x = files
    teacher, path = str(folder / "teacher.keras"), str(tmp_path / "cache")
    data = ["--data", str(folder / "data.npz")]
    options = ["--top-k", "2", "--batch-size", "16", "--shard-size", "64"]
    assert cli.main(["cache", "write", teacher, path, *data, *options]) == 0
    said = capsys.readouterr()
    assert "answers to 100 samples, 800 bytes" in " ".join(said.out.split())
    assert "samples/s" in said.err
    assert "left" in said.err
    expected = np.argsort(-model.predict(x, verbose=0), -1)[:, :2]
    assert np.array_equal(Records(path).read(np.arange(100))["classes_0"], expected)

    assert cli.main(["cache", "info", path, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["complete"]
    assert (about["samples"], about["record_bytes"], about["shards"]) == (100, 8, 2)
    assert about["teacher"]["name"] == "tutor"

    assert cli.main(["cache", "verify", path, "--teacher", teacher, *data]) == 0
    assert "2 shards have the recorded SHA-256" in " ".join(capsys.readouterr().out.split())


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, files):
    folder, _, _ = files
    teacher, path = str(folder / "teacher.keras"), str(tmp_path / "cache")
    data = ["--data", str(folder / "data.npz")]
    other = ["--data", str(folder / "other.npz")]
    for arguments, reason in (
        (["info", path], "holds no teacher's cache"),
        (["write", teacher, path, *data, "--top-k", "9"], "larger than the number of classes"),
        (["write", teacher, str(folder / "data.npz"), *data], "cannot be written to"),
        (["write", teacher, path, *data, "--process-index", "1"], "counts from 0 to"),
    ):
        assert cli.main(["cache", *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        lines = said.err.strip().split("\n")
        assert reason in lines[-1]
        assert lines[-1].startswith("keras-kd: ")
    assert cli.main(["cache", "write", teacher, path, *data, "--quiet"]) == 0
    assert cli.main(["cache", "verify", path, *other, "--teacher", teacher]) == 2
    assert "row 0 is another sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": np.full((9, 6), np.nan, "float32")}, "holds NaN or infinite values in 9 of 9"),
        ({"x": np.zeros((9, 5), "float32")}, "samples of shape (5,), the model takes (6,)"),
        ({"x": np.float32(1)}, "a single value where one row a sample is needed"),
        ({"x": np.array(["a", "b"])}, "numbers are needed"),
        ({"x": np.zeros((0, 6), "float32")}, "no rows"),
    ],
)
def test_data_that_the_teacher_does_not_take(tmp_path, capsys, files, arrays, reason):
    np.savez(tmp_path / "bad.npz", **arrays)
    data = ["--data", str(tmp_path / "bad.npz"), "--quiet"]
    path = tmp_path / "cache"
    assert cli.main(["cache", "write", str(files[0] / "teacher.keras"), str(path), *data]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert reason in said
    assert not path.exists()


def test_several_inputs_go_by_their_names(tmp_path, capsys):
    one, two = keras.Input((3,), name="x"), keras.Input((2,), name="z")
    model = keras.Model([one, two], keras.layers.Dense(4)(keras.layers.Concatenate()([one, two])))
    model.save(tmp_path / "two.keras")
    np.savez(tmp_path / "both.npz", x=np.ones((8, 3), "float32"), z=np.ones((8, 2), "float32"))
    np.savez(tmp_path / "one.npz", x=np.ones((8, 3), "float32"))
    teacher, path = str(tmp_path / "two.keras"), str(tmp_path / "cache")
    both, one = (["--data", str(tmp_path / name)] for name in ("both.npz", "one.npz"))
    assert cli.main(["cache", "write", teacher, path, *one]) == 2
    assert "1 array(s) and the model 2 input(s), ['x', 'z']" in capsys.readouterr().err
    assert cli.main(["cache", "write", teacher, path, *both, "--quiet"]) == 0
    assert cli.main(["cache", "verify", path, "--teacher", teacher, *both]) == 0


def test_the_manifest_of_an_export_is_no_cache(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"schema": 1}')
    assert cli.main(["cache", "info", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is the manifest of something else: it lacks `layout`. Pass the folder" in said


def test_a_teacher_of_another_runtime(tmp_path, capsys, files):
    folder, model, x = files
    keras_kd.export(
        model, tmp_path / "out", formats=("onnx", "tflite"), precisions=("float32",), evaluation=x
    )
    data = ["--data", str(folder / "data.npz")]
    for kind in ("onnx", "tflite"):
        teacher = str(next((tmp_path / "out").glob(f"*.{kind}")))
        path = str(tmp_path / kind)
        assert cli.main(["cache", "write", teacher, path, *data, "--dtype", "float32"]) == 0
        stored = Records(path).read(np.arange(100))["logits_0"]
        np.testing.assert_allclose(stored, model.predict(x, verbose=0), atol=1e-5)
        assert cli.main(["cache", "verify", path, "--teacher", teacher, *data]) == 0
        other = str(folder / "teacher.keras")
        assert cli.main(["cache", "verify", path, "--teacher", other]) == 2
        assert "is the cache of another teacher" in capsys.readouterr().err
    # By the names of its inputs.
    np.savez(tmp_path / "named.npz", features=x)
    named = ["--data", str(tmp_path / "named.npz"), "--quiet"]
    teacher = str(next((tmp_path / "out").glob("*.onnx")))
    assert cli.main(["cache", "write", teacher, str(tmp_path / "named"), *named]) == 0


def test_answers_that_exist_already(tmp_path, capsys, files):
    folder = files[0]
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(100, 5)).astype("float32")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logits, -1)[:, :2]
    top = {"indices": order, "log_probabilities": np.take_along_axis(log_p, order, -1)}
    arrays = {"whole": {"logits": logits}, "top": {**top, "vocabulary": 5}}
    data = ["--data", str(folder / "data.npz"), "--quiet", "--dtype", "float32"]
    for name, held in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **held)
        path = str(tmp_path / name)
        assert cli.main(["cache", "write", str(tmp_path / f"{name}.npz"), path, *data]) == 0
        assert cli.main(["cache", "verify", path, "--data", data[1]]) == 0
    stored = Records(tmp_path / "whole").read(np.arange(100))["logits_0"]
    np.testing.assert_allclose(stored, logits, rtol=1e-6)
    np.savez(tmp_path / "lacks.npz", **top)
    np.savez(tmp_path / "short.npz", logits=logits[:7])
    for name, more, reason in (
        ("lacks.npz", (), "not how many there are"),
        ("short.npz", (), "7 rows"),
        ("data.npz", (), "A teacher's answers are"),
        ("whole.npz", ("--top-k", "2"), "`--top-k` is for a teacher that is asked"),
        ("whole.npz", ("--tap", "a"), "`--tap` is for a teacher that is asked"),
        ("whole.npz", ("--process-count", "2"), "`--process-count` is for a teacher"),
        ("missing.onnx", (), "does not exist"),
        ("whole.h5", (), "does not exist. Expected a file that ends in .keras, .npz"),
    ):
        file = str((folder if name == "data.npz" else tmp_path) / name)
        capsys.readouterr()
        assert cli.main(["cache", "write", file, str(tmp_path / "new"), *data, *more]) == 2
        assert reason in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "new").exists()
