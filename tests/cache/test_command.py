"""`keras-kd cache`: the same from the command line."""

import json

import keras
import numpy as np
import pytest

pytest.importorskip("typer")

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
