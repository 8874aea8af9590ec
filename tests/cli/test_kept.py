"""What a command leaves that is stopped between two of its files: the run before, whole."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_kd.export
from keras_kd.cli import config_file, demo, distill, distill_result, distill_training, trial
from keras_kd.export.report.export_report import Report
from keras_kd.export.verification import benchmark

DIGITS = Path(__file__).parents[2] / "exported" / "digits"
OLD = (*distill._WRITTEN, *demo._WRITTEN, "card.md", "bench.csv", "bench.json", "bench.png")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def earlier(tmp_path):
    """The folder of an earlier run, with all files that commands write beside an export."""
    folder = tmp_path / "out"
    shutil.copytree(DIGITS, folder)
    for name in OLD:
        (folder / name).write_text("old")
    return folder


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exported(model, folder, **options):
    """An export that is over at once."""
    assert not options.get("overwrite")
    shutil.copytree(DIGITS, folder)
    return Report.load(folder)


def trained(*_, **__):
    return {"loss": [1.0]}, None


def students(data, *_):
    weights = trial.network(data, trial.STUDENT_FILTERS, "student").get_weights()
    run = trial.Run(weights, 0, {"loss": [1.0]}, 0.5, 0.5, 0.5)
    return {kind: [run] for kind in trial.KINDS}


def teacher(data, *_):
    return trial.network(data, (2,), "teacher")


WRITERS = {
    "distill": (
        (keras.Model, "save"),
        (Report, "save_html"),
        (distill, "write_file"),
        (config_file, "write_file"),
    ),
    "demo": ((keras.Model, "save"), (Report, "save_html"), (demo, "write_file")),
    "export": ((Report, "save_html"),),
    "report": ((Report, "save_card"),),
    "bench": ((benchmark.BenchReport, "save_json"), (benchmark.BenchReport, "save_png")),
}


@pytest.mark.parametrize(
    ("command", "writer"), [(name, each) for name, those in WRITERS.items() for each in those]
)
def test_a_command_that_is_stopped(
    run, monkeypatch, tmp_path, image_file, earlier, command, writer
):
    keras.utils.set_random_seed(1)
    model = tmp_path / "model.keras"
    shape = [keras.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]
    keras.Sequential(shape).save(model)
    arguments = {
        "distill": ["--data", image_file, "--teacher", model, "--student", model],
        "demo": ["--data", image_file],
        "export": [model, "--calibration", image_file],
    }.get(command, [earlier])
    overwrite = [] if command in ("report", "bench") else ["--overwrite", "--out", earlier]
    monkeypatch.setattr(keras_kd.export, "export_model", exported)
    monkeypatch.setattr(keras_kd.export, "verify", lambda folder, **_: Report.load(folder))
    monkeypatch.setattr(distill_training, "train", trained)
    monkeypatch.setattr(distill_result, "collect", lambda *_: {"best": None})
    monkeypatch.setattr(trial, "train_teacher", teacher)
    monkeypatch.setattr(trial, "train_students", students)
    monkeypatch.setattr(demo, "_result", lambda *_: {"best": None})
    timed = benchmark.BenchReport([], 1)
    monkeypatch.setattr(keras_kd.export, "bench", lambda *_, **__: timed)
    struck = []

    def killed(*_, **__):
        struck.append(command)
        raise Killed

    before = held(earlier)
    monkeypatch.setattr(*writer, killed)
    with pytest.raises(Killed):
        run(command, *arguments, *overwrite, "--quiet")
    assert struck
    assert held(earlier) == before
    assert np.unique([path.name for path in tmp_path.iterdir()]).tolist() == ["model.keras", "out"]
