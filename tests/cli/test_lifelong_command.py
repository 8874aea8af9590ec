"""`keras-kd lifelong`, run on the digits with a tiny model."""

import json

import keras
import numpy as np
import pytest

from keras_kd.lifelong.report import Report


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("student") / "digits.keras"
    inputs = keras.Input((8, 8, 1))
    hidden = keras.layers.Dense(8, activation="relu")(keras.layers.Flatten()(inputs))
    keras.Model(inputs, keras.layers.Dense(10)(hidden)).save(path)
    return path


class Killed(BaseException):
    """Stands for the end of the process."""


def test_learns_and_reports(run, student, tmp_path, monkeypatch):
    arguments = ("lifelong", student, "--tasks", 2, "--method", "replay", "--memory", 50)
    arguments += ("--batch-size", 256, "--json", "--quiet")
    code, out, err = run(*arguments)
    assert code == 0, err
    document = json.loads(out)
    assert np.shape(document["matrix"]) == (2, 2)
    folder = tmp_path / "runs" / "digits-lifelong"
    assert json.loads((folder / "report.json").read_text()) == document
    assert "<svg" in (folder / "report.html").read_text()
    assert keras.saving.load_model(folder / "model.keras").output_shape == (None, 10)
    # Run again, all of it is there.
    code, out, _ = run(*arguments)
    assert (code, json.loads(out)) == (0, document)
    # Another training in the same folder is refused.
    code, _, err = run(*arguments, "--epochs", 2)
    assert code == 2
    assert "holds another training" in err
    assert json.loads((folder / "report.json").read_text()) == document

    # Stopped between two of its files, it leaves those of the run before.
    def killed(*_):
        raise Killed

    monkeypatch.setattr(Report, "save_html", killed)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Killed):
        run(*arguments)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "dark-reply"), "Did you mean 'dark-replay'"),
        (("--memory", 0), "`--memory` is positive"),
        (("--tasks", 11), "10 classes cannot be cut into tasks=11"),
        (("--method", "lwf", "--policy", "herding"), "`--policy` is of a memory"),
        (("--memory", 5000), "the whole stream has"),
        (("--data", "digit"), "digits"),
    ],
)
def test_bad_input(run, student, arguments, message):
    code, out, err = run("lifelong", student, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
