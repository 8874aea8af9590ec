"""The demo: its experiment, its table, and one run from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from keras_kd import datasets
from keras_kd.cli import demo, inputs, trial


def silent(*_):
    pass


@pytest.fixture(scope="module")
def small():
    """The digits with few samples, for experiments of one epoch."""
    full = datasets.load("digits")
    parts = {
        f"{axis}_{split}": getattr(full, f"{axis}_{split}")[:64]
        for axis in "xy"
        for split in ("train", "validation", "test")
    }
    return datasets.Dataset(name="small", class_names=full.class_names, **parts)


def test_the_plan_follows_the_number_of_samples(small):
    plan = trial.make_plan(small)
    assert (plan.epochs, plan.seeds, plan.batch_size) == (30, 3, 32)
    many = datasets.Dataset(**{**vars(small), "x_train": np.zeros((54_000, 1, 1, 1), "uint8")})
    plan = trial.make_plan(many)
    assert (plan.epochs, plan.seeds, plan.batch_size) == (5, 1, 128)
    plan = trial.make_plan(many, epochs=2, seeds=4)
    assert (plan.epochs, plan.seeds) == (2, 4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 1), (28, 28, 1), (33, 47, 3), (130, 200, 3)])
def test_the_networks_take_any_image(small, shape):
    data = datasets.Dataset(**{**vars(small), "x_train": np.zeros((1, *shape), "float32")})
    student = trial.network(data, trial.STUDENT_FILTERS, "student")
    assert student.output_shape == (None, 10)
    assert trial.decide(student, data.x_train).shape == (1,)


def test_both_students_start_alike(small, monkeypatch):
    starts = []

    def untrained(model, student, *_):
        starts.append([weight.copy() for weight in student.get_weights()])
        return {}

    monkeypatch.setattr(trial, "_fit", untrained)
    teacher = trial.network(small, (8,), "teacher")
    trial.train_students(small, teacher, trial.Plan(1, 2, 32), silent)
    # Plain and distilled of one seed begin with the same weights, two seeds with different ones.
    for plain, distilled in ((starts[0], starts[1]), (starts[2], starts[3])):
        for a, b in zip(plain, distilled, strict=True):
            np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(starts[0], starts[2], strict=True))


def test_runs_repeat(small):
    plan = trial.Plan(epochs=1, seeds=1, batch_size=32)
    teacher = trial.network(small, (8,), "teacher")
    first = trial.train_students(small, teacher, plan, silent)
    again = trial.train_students(small, teacher, plan, silent)
    for kind in ("plain", "distilled"):
        for one, two in zip(first[kind], again[kind], strict=True):
            for a, b in zip(one.model.get_weights(), two.model.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
    assert first["plain"][0].accuracy == trial.share(
        trial.decide(first["plain"][0].model, small.x_test), small.y_test
    )


def test_validation_chooses_the_exported_student():
    def run(seed, validation, test):
        return trial.Run(None, seed, {}, validation, test, 0.0)

    runs = [run(0, 0.90, 0.99), run(1, 0.95, 0.90), run(2, 0.95, 0.98)]
    assert trial.best_run(runs).seed == 1


def test_spread_is_mean_and_sample_deviation():
    assert trial.spread([0.5]) == {"mean": 0.5, "std": None}
    values = [0.1, 0.4, 0.7, 0.2]
    assert trial.spread(values)["std"] == pytest.approx(np.std(values, ddof=1))


def result(gain, std, seeds=3):
    spread = {"mean": 0.95, "std": 0.004 if seeds > 1 else None}
    model = {"parameters": 94_634, "bytes": 378_536, "latency_ms": 12.3456}
    student = {
        **model,
        "accuracy": spread,
        "agreement": spread,
        "runs": [{"accuracy": 0.95, "agreement": 0.96}] * seeds,
    }
    file = {
        "name": "tflite float32",
        "file": "digits_float32.tflite",
        "bytes": 125_000,
        "gzip_bytes": 118_000,
        "latency_ms": 12.3,
        "accuracy": 0.9499,
        "agreement": 0.96,
        "verified": True,
        "reason": "",
        "flags": [],
    }
    failed = {
        **dict.fromkeys(file),
        "name": "onnx int8",
        "verified": False,
        "reason": "it fell over",
        "flags": ["2.0 times slower than float32"],
    }
    return {
        "data": {"samples": {"train": 1222, "validation": 216, "test": 359}},
        "seeds": seeds,
        "models": {
            "teacher": {**model, "accuracy": 0.99},
            "plain": student,
            "distilled": student,
        },
        "gain": {"mean": gain, "std": std},
        "exported_seed": 0,
        "files": [file, failed],
        "best": "digits_float32.tflite",
        "max_drop": 0.01,
        "seconds": 61.0,
    }


@pytest.mark.parametrize("columns", [80, 160])
def test_the_table_fits_and_hides_nothing(columns):
    text = demo.table(result(0.01, 0.001), columns)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    assert "95.00 ± 0.40" in text
    assert "* tflite float32" in text
    assert text.splitlines()[-1].split() == ["onnx", "int8", "-", "-", "-", "-", "-", "no"]


@pytest.mark.parametrize(
    ("gain", "std", "seeds", "said"),
    [
        (0.012, 0.003, 3, "Distillation helped: +1.20 ± 0.30 points"),
        (-0.018, 0.003, 3, "Distillation did not help here, the plain student is better: -1.80"),
        (0.002, 0.009, 3, "Distillation made no clear difference here: +0.20 ± 0.90"),
        (0.01, None, 1, "(one seed, so chance plays a part: --seeds 5 shows the spread)"),
        (0.0, None, 1, "Distillation made no clear difference here: +0.00 points"),
    ],
)
def test_the_verdict_says_what_was_seen(gain, std, seeds, said):
    lines = demo.remarks(result(gain, std, seeds), Path("runs/digits"))
    assert said in lines[0]
    assert "x onnx int8: it fell over." in lines
    assert "! onnx int8: 2.0 times slower than float32." in lines


def test_without_a_good_file_none_is_named():
    lines = demo.remarks({**result(0.01, 0.001), "best": None}, Path("out"))
    assert any("No file passed its check" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("digits", "digits"),
        ("data/fashion_mnist.npz", "fashion_mnist"),
        ("tfds:emnist/letters:3.1.0", "emnist-letters-3-1-0"),
    ],
)
def test_folders_are_named_after_the_data(name, slug):
    assert inputs.slug(name) == slug


def test_an_interrupted_training_writes_nothing(run, tmp_path, image_file, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "train_teacher", interrupted)
    code, out, err = run("demo", "--data", image_file, "--quiet")
    assert (code, out) == (130, "")
    assert err == "keras-kd: interrupted. No half-written file was left behind.\n"
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_no_temporary_file(tmp_path):
    def full(path):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "student.keras").write_text("earlier")
    with pytest.raises(OSError, match="disk is full"):
        demo._write(tmp_path / "student.keras", full)
    assert [path.name for path in tmp_path.iterdir()] == ["student.keras"]
    assert (tmp_path / "student.keras").read_text() == "earlier"


def heeds_control_c():
    """A shell that starts the tests in the background lets its children ignore the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder, *arguments):
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-m", "keras_kd", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeds_control_c if os.name == "posix" else None,
    )


@pytest.mark.skipif(os.name == "nt", reason="signals are sent the POSIX way")
def test_control_c_ends_the_process_with_130(tmp_path):
    process = start(tmp_path, "demo", "--epochs", "1000")
    line = ""
    while "images a step" not in line:
        line = process.stderr.readline()
        assert line, "The demo ended before it began to train."
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not any(tmp_path.rglob("*.*"))


def test_the_demo_runs_from_end_to_end(tmp_path):
    process = start(tmp_path, "demo", "--epochs", "2", "--seeds", "1", "--json")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    document = json.loads(out)
    folder = tmp_path / "runs" / "digits"
    names = {path.name for path in folder.iterdir()}
    assert {"student.keras", "teacher.keras", "report.html", "demo.json", "manifest.json"} < names
    assert [row["name"] for row in document["files"]] == [
        f"{kind} {precision}"
        for kind in ("tflite", "onnx")
        for precision in ("float32", "float16", "dynamic", "int8")
    ]
    assert {row["file"] for row in document["files"]} < names
    assert document["best"] in names
    assert all(row["verified"] for row in document["files"] if row["accuracy"] is not None)
    # The files answer like the student they come from, on the test images.
    exact = document["models"]["distilled"]["runs"][0]["accuracy"]
    assert document["files"][0]["accuracy"] == pytest.approx(exact, abs=1.5 / 359)
    stored = json.loads((folder / "demo.json").read_text())
    assert {**stored, "out": document["out"]} == document
    # No log line of a library, no half-drawn bar: notes and finished bars alone.
    assert "WARNING" not in err
    assert "I0000" not in err
