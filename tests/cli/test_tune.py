"""`keras-kd tune`: its options, what it refuses, and what it says where nothing is within reach."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna")

from keras_kd.export import load
from keras_kd.search import Choice, Float, Log, files, tuner
from keras_kd.search.files import Weighed


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (
            {"y_train": np.arange(60) % 3 - np.eye(60, dtype=int)[0]},
            "1 training rows of .* no label",
        ),
        (
            {
                "x_train": None,
                "x_test": None,
                "a_train": np.zeros((60, 6, 6, 1)),
                "a_test": np.zeros((30, 6, 6, 1)),
            },
            "models of one input",
        ),
        (
            {"x_train": np.zeros((60, 6, 6)), "x_test": np.zeros((30, 6, 6))},
            "shape .6, 6, 1.*6, 6.",
        ),
    ],
)
def test_rows_that_distill_reads_otherwise_are_refused(
    run, models, image_file, arrays, reason, tmp_path
):
    with np.load(image_file) as stored:
        held = {**stored, **arrays}
    np.savez("odd.npz", **{name: array for name, array in held.items() if array is not None})
    code, out, err = run("tune", "--teacher", models["good"], "--data", "odd.npz", "--quiet")
    assert (code, out) == (2, ""), err
    assert re.search(reason, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["odd.npz"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "Missing option '--teacher'"),
        (["--teacher", "missing.keras"], "`missing.keras` does not exist"),
        (["--teacher", "GOOD", "--minutes", "0"], "`minutes` of a budget is positive"),
        (["--teacher", "GOOD", "--trials", "1"], "at least 2. Received: trials=1"),
        (["--teacher", "GOOD", "--max-bytes", "-5"], "`bytes` of a budget is positive"),
        (["--teacher", "GOOD", "--seeds", "1"], "'--seeds'"),
        (["--teacher", "GOOD", "--search", "width"], "Expected `NAME=VALUE,VALUE`"),
        (["--teacher", "GOOD", "--search", "width=a,b"], "`a` is no number"),
        (["--teacher", "GOOD", "--search", "alpha=1..0"], "from a finite number to a greater one"),
        (["--teacher", "GOOD", "--search", "alpha=0,1", "--search", "alpha=0.5,1"], "given twice"),
        (["--teacher", "GOOD", "--device", "ethos"], "`ethos` is no known target"),
        (["--teacher", "GOOD", "--data", "digit"], "`tfds:digit`"),
        (["--teacher", "GOOD"], "takes inputs of shape .6, 6, 1."),
        (["--teacher", "GOOD", "--data", "IMAGES", "--search", "widht=0.5,1"], "mean 'width'"),
        (["--teacher", "GOOD", "--data", "IMAGES", "--minimize", "eror"], "Did you mean 'error'"),
        (["--teacher", "GOOD", "--data", "IMAGES", "--search", "method=DISTT,DIST"], "mean 'DIST'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run, models, image_file, arguments, reason, tmp_path
):
    named = {"GOOD": models["good"], "IMAGES": image_file}
    code, out, err = run("tune", *(named.get(word, word) for word in arguments), "--quiet")
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert re.search(reason, err), err
    assert list(tmp_path.iterdir()) == []


def test_options_become_the_arguments_of_tune(run, models, image_file, monkeypatch, tmp_path):
    given = {}

    def tune(build, teacher, train, validation, **options):
        given.update(options, build=build)
        raise ValueError("asked")

    monkeypatch.setattr(tuner, "tune", tune)
    run(
        *("tune", "--teacher", models["good"], "--data", image_file, "--minutes", 5),
        *("--trials", 7, "--max-bytes", 9000, "--max-latency-ms", 2.5, "--minimize", "error,bytes"),
        *("--device", "tflite-2.14,ethos-u55", "--search", "temperature=1..8", "--out", "here"),
        *(
            "--search",
            "width=0.25,0.5",
            "--search",
            "alpha=0..1",
            "--search",
            "method=DIST,default",
        ),
        *("--epochs", 3, "--final-epochs", 5, "--seed", 4),
    )
    budget = given["budget"]
    assert (budget.minutes, budget.trials) == (5, 7)
    assert (budget.bytes, budget.latency_ms) == (9000, 2.5)
    assert given["space"] == {
        "temperature": Log(1, 8),
        "width": Choice(0.25, 0.5),
        "alpha": Float(0, 1),
        "method": Choice("DIST", "default"),
    }
    assert given["build"] == "shrink"
    assert given["minimize"] == ["error", "bytes"]
    assert given["device"] == ["tflite-2.14", "ethos-u55"]
    assert (given["epochs"], given["final_epochs"]) == (3, 5)
    assert (given["seed"], str(given["folder"])) == (4, "here")
    assert given["config"] == {"teacher": [str(models["good"])], "data": str(image_file)}
    assert given["export"]["labels"] == ["0", "1", "2"]


def test_what_is_not_reachable_is_exit_code_1(run, models, image_file, monkeypatch, tmp_path):
    def export(exporter, student, folder, precision, *, trained=True):
        assert not trained, "beyond the budget nothing is trained"
        return None, Weighed(2000, 0.1, 0.1, 0.1, student.count_params())

    monkeypatch.setattr(files.Exporter, "export", export)
    words = ("tune", "--teacher", models["good"], "--data", image_file, "--max-bytes", 100)
    code, out, err = run(*words, "--json")
    assert code == 1
    said = json.loads(out)
    assert said["best"] is None
    assert said["verdict"].startswith("not reachable")
    assert "2,000 bytes against 100" in said["verdict"]
    assert "the 30 test rows are not looked at" in " ".join(err.split())
    code, out, err = run(*words, "--quiet")
    assert (code, err) == (1, "")
    assert "not reachable" in out
    assert (tmp_path / "runs").is_dir()


def test_the_file_is_the_one_that_distill_makes_again(
    run, models, image_file, monkeypatch, tmp_path
):
    # By paths of this folder, and for a runtime that reads one row at a time.
    for name, given in (("teacher.keras", models["good"]), ("images.npz", image_file)):
        shutil.copy(given, tmp_path / name)
    words = ("tune", "--teacher", "teacher.keras", "--data", "images.npz", "--epochs", 2)
    few = ("--trials", 2, "--seeds", 2, "--search", "width=0.5,1.0", "--out", "t", "--json")
    code, out, err = run(*words, *few, "--device", "tflite-2.14")
    assert code == 0, err
    said = json.loads(out)
    path = tmp_path / said["best"]["file"]
    assert path.stat().st_size == said["best"]["bytes"]
    assert load(path).inputs[0]["shape"][0] == 1
    # The search judged this very file.
    searched = [each.read_bytes() for each in (tmp_path / "t" / "finals").rglob(path.name)]
    assert searched == [path.read_bytes()]
    for name in ("search.html", "front.png", "best.toml"):
        assert (tmp_path / "t" / name).stat().st_size > 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "t").rename("moved")
    code, _, err = run("distill", "--config", "moved/best.toml", "--out", "again", "--quiet")
    assert code == 0, err
    again = tmp_path / "elsewhere" / "again" / path.name
    assert again.read_bytes() == Path("moved", *path.parts[-2:]).read_bytes()
