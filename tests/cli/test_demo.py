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
    assert (plan.epochs, plan.seeds, plan.batch_size) == (30, 5, 32)
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


def test_students_of_a_seed_start_alike(small, monkeypatch):
    starts, seen = [], []

    def untrained(model, student, rows, *_):
        starts.append([weight.copy() for weight in student.get_weights()])
        seen.append(rows)
        # What the next one must not begin with.
        student.set_weights([weight + 1 for weight in student.get_weights()])
        return {}

    monkeypatch.setattr(trial, "_fit", untrained)
    teacher = trial.network(small, (8,), "teacher")
    trial.train_students(small, teacher, trial.Plan(1, 2, 32), silent)
    # All four kinds of one seed begin with the same weights, two seeds with different ones.
    for first in (0, 4):
        for other in starts[first + 1 : first + 4]:
            for a, b in zip(starts[first], other, strict=True):
                np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(starts[0], starts[4], strict=True))
    # Plain, distilled, and the same with few labels: equally many rows, so equally many steps.
    assert {len(x) for x, _ in seen} == {64}
    np.testing.assert_array_equal(seen[0][1], seen[1][1])
    few = trial.labeled(small, 0)
    assert set(small.y_train[few]) == set(small.y_train)
    np.testing.assert_array_equal(seen[3][1], np.where(few, small.y_train, -1))
    np.testing.assert_array_equal(seen[2][0], small.x_train[few][np.arange(64) % few.sum()])
    np.testing.assert_array_equal(seen[2][1], small.y_train[few][np.arange(64) % few.sum()])
    assert (trial.labeled(small, 0) != trial.labeled(small, 1)).any()


def test_runs_repeat(small):
    plan = trial.Plan(epochs=1, seeds=1, batch_size=32)
    teacher = trial.network(small, (8,), "teacher")
    first = trial.train_students(small, teacher, plan, silent)
    again = trial.train_students(small, teacher, plan, silent)
    for kind in trial.KINDS:
        for one, two in zip(first[kind], again[kind], strict=True):
            for a, b in zip(one.weights, two.weights, strict=True):
                np.testing.assert_array_equal(a, b)
    student = trial.restored(small, first["plain"][0])
    assert first["plain"][0].accuracy == trial.share(
        trial.decide(student, small.x_test), small.y_test
    )


def test_a_student_that_is_trained_again_is_as_new(small):
    """Nothing of the optimizer or the statistics of an earlier student is left."""
    import keras

    plan = trial.Plan(epochs=2, seeds=1, batch_size=32)
    student = trial.network(small, (4,), "student")
    trial._compile(student, 64, plan)
    rows = (small.x_train, small.y_train)
    start, ends = student.get_weights(), []
    for _ in range(2):
        student.set_weights(start)
        keras.utils.set_random_seed(3)
        trial._fit(student, student, rows, plan, silent, "student")
        ends.append(student.get_weights())
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(student.optimizer.iterations) == 4


def test_validation_chooses_the_exported_student():
    def run(seed, validation, test):
        return trial.Run(None, seed, {}, validation, test, 0.0)

    plain = [run(0, 0.90, 0.99), run(1, 0.95, 0.90), run(2, 0.95, 0.98)]
    kind, chosen = trial.best_run({"plain": plain, "distilled": [run(0, 0.94, 1.0)]})
    assert (kind, chosen.seed) == ("plain", 1)
    # Of equals the kind that is better in the mean, and plain training where both are alike.
    better = [run(0, 0.95, 0.1), run(1, 0.94, 0.2), run(2, 0.95, 0.3)]
    assert trial.best_run({"plain": plain, "distilled": better})[0] == "distilled"
    assert trial.best_run({"plain": plain, "distilled": plain})[0] == "plain"


def test_the_gain_is_paired_and_its_interval_is_students():
    from scipy import stats

    def runs(values):
        return [trial.Run(None, i, {}, 0, value, 0) for i, value in enumerate(values)]

    one, other = [0.95, 0.97, 0.96, 0.99], [0.90, 0.93, 0.94, 0.91]
    found = trial.gain(runs(one), runs(other))
    difference = np.subtract(one, other)
    assert found["mean"] == pytest.approx(difference.mean())
    assert found["standard_error"] == pytest.approx(stats.sem(difference))
    low, high = stats.t.interval(0.95, 3, difference.mean(), stats.sem(difference))
    assert found["mean"] - found["limit"] == pytest.approx(low)
    assert found["mean"] + found["limit"] == pytest.approx(high)
    assert trial.gain(runs([0.5]), runs([0.4]))["limit"] is None


def test_spread_is_mean_and_sample_deviation():
    assert trial.spread([0.5]) == {"mean": 0.5, "std": None}
    values = [0.1, 0.4, 0.7, 0.2]
    assert trial.spread(values)["std"] == pytest.approx(np.std(values, ddof=1))


def difference(mean, std, seeds):
    if std is None:
        return {"mean": mean, **dict.fromkeys(("std", "standard_error", "limit"))}
    error = std / seeds**0.5
    return {"mean": mean, "std": std, "standard_error": error, "limit": 4.303 * error}


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
            **dict.fromkeys(trial.KINDS, student),
        },
        "gain": (gains := difference(gain, std, seeds)),
        "few_labels": {"labels": 122, "gain": gains},
        "exported_kind": "distilled",
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
        (0.012, 0.003, 3, "distillation helped: +1.20 ± 0.30 points of"),
        (0.012, 0.003, 3, "standard error 0.17 (3 seeds in pairs, equal steps)."),
        (-0.018, 0.003, 3, "distillation did not help here, the plain student is better: -1.80"),
        (0.002, 0.009, 3, "distillation made no clear difference here: +0.20 ± 0.90"),
        # Beyond two standard errors, and within Student's interval of three pairs.
        (0.006, 0.003, 3, "distillation made no clear difference here: +0.60 ± 0.30"),
        (0.01, None, 1, "(one seed, so chance plays a part: --seeds 5 shows the spread)"),
        (0.0, None, 1, "distillation made no clear difference here: +0.00 points"),
    ],
)
def test_the_verdict_says_what_was_seen(gain, std, seeds, said):
    lines = demo.remarks(result(gain, std, seeds), Path("runs/digits"))
    assert lines[0].startswith("All labels: ")
    assert lines[1].startswith("One label in ten (122 of 1,222; ")
    assert said in lines[0]
    assert said in lines[1]
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
    exact = document["models"][document["exported_kind"]]["runs"][0]["accuracy"]
    assert document["files"][0]["accuracy"] == pytest.approx(exact, abs=1.5 / 359)
    stored = json.loads((folder / "demo.json").read_text())
    assert {**stored, "out": document["out"]} == document
    assert document["few_labels"]["labels"] == 120
    best = max(
        run["validation_accuracy"]
        for kind in ("plain", "distilled")
        for run in document["models"][kind]["runs"]
    )
    exported = document["models"][document["exported_kind"]]["runs"][document["exported_seed"]]
    assert exported["validation_accuracy"] == best
    # No log line of a library, no half-drawn bar: notes and finished bars alone.
    assert "WARNING" not in err
    assert "I0000" not in err
