"""Bad input and broken machines: one clear error, nothing half-written."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap

import judging
import keras
import numpy as np
import pytest
from keras import layers

import keras_kd.export
from keras_kd.export import warm, worker_pool
from keras_kd.export.verification import acceptance, output_meaning

X = np.random.default_rng(0).random((20, 4)).astype("float32")
Y = np.arange(20) % 3


@pytest.fixture(scope="module")
def small():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((4,), name="x"), layers.Dense(8, activation="relu"), layers.Dense(3)]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precisions": ["int9"]}, "Did you mean `int8`"),
        ({"precisions": []}, "`precisions` is empty"),
        ({"precisions": "int16x8", "formats": "onnx"}, "does not exist for onnx"),
        ({"formats": ["tflight"]}, "Did you mean `tflite`"),
        ({"max_drop": 1.5}, r"`max_drop` must lie in \[0, 1\]"),
        ({"max_drop": float("nan")}, "`max_drop` must lie"),
        ({"objective": "speed"}, "`speed` is not known for `objective`"),
        ({"name": "../x"}, "first part of a file name"),
        ({"calibration": None}, "`int8` needs calibration data"),
        ({"calibration": X[:0]}, "calibration data is empty"),
        ({"calibration": 255 * X}, "another scale"),
        ({"calibration": np.full((9, 4), np.nan)}, "NaN or infinite values in 9 of 9"),
        ({"calibration": X[:, :3]}, r"samples of shape \(3,\), the model takes \(4,\)"),
        ({"evaluation": (X, Y + 1)}, "labels run from 1 to 3, but the model has 3 outputs"),
        ({"evaluation": (X, Y[:5])}, "different lengths"),
        ({"evaluation": iter(())}, "yielded no batch"),
        ({"evaluation": None, "calibration": None, "precisions": "float32"}, "No data was given"),
        ({"labels": ["a", "b"]}, "must name the 3 classes"),
        ({"teacher": {"acuracy": 1.0}}, "Did you mean `accuracy`"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(small, tmp_path, arguments, message):
    given = {"calibration": X, "evaluation": (X, Y), **arguments}
    with pytest.raises(ValueError, match=message):
        keras_kd.export(small, tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"max_drop": "a"}, {"max_drop": True}, {"opset": 17.0}, {"name": 3}]
)
def test_settings_of_another_type_are_refused(small, tmp_path, arguments):
    with pytest.raises(TypeError, match=f"`{next(iter(arguments))}` must be a"):
        keras_kd.export(small, tmp_path / "out", calibration=X, evaluation=(X, Y), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_built_keras_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must be a `keras\.Model`.*distiller\.student"):
        keras_kd.export("student.keras", tmp_path / "out", evaluation=X)
    unbuilt = keras.Sequential([layers.Dense(3)])
    with pytest.raises(ValueError, match="is not built"):
        keras_kd.export(unbuilt, tmp_path / "out", evaluation=X, precisions="float32")


def test_a_model_that_gives_nan_is_refused(small, tmp_path):
    broken = keras.models.clone_model(small)
    broken.set_weights([np.full_like(w, np.nan) for w in broken.get_weights()])
    with pytest.raises(ValueError, match="model itself gives NaN"):
        keras_kd.export(broken, tmp_path / "out", evaluation=X, precisions="float32")


def test_string_inputs_are_refused(tmp_path):
    words = keras.Input((1,), dtype="string", name="words")
    lookup = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    model = keras.Model(words, layers.Dense(3)(lookup(words)))
    x = np.array([["a"], ["b"]])
    with pytest.raises(ValueError, match="takes strings"):
        keras_kd.export(model, tmp_path / "out", calibration=x, evaluation=x)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_refused(small, tmp_path):
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(NotADirectoryError, match="is a file"):
            keras_kd.export(small, folder, evaluation=X, precisions="float32")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(small, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written"):
            keras_kd.export(small, tmp_path / "out", evaluation=X, precisions="float32")
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    # A limit on the size of files stands in for a full disk, in the worker processes too.
    script = textwrap.dedent(
        """
        import resource, sys
        import keras, numpy as np
        import keras_kd.export
        x = np.random.default_rng(0).random((50, 64)).astype("float32")
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(512)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            keras_kd.export(model, sys.argv[1], formats="onnx", precisions="float32", evaluation=x)
        except OSError as error:
            print("errno", error.errno, str(error))
        """
    )
    target = tmp_path / "deep" / "out"
    result = subprocess.run(
        [sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=False
    )
    assert f"errno {errno.EFBIG}" in result.stdout, result.stderr[-2000:]
    assert "disk is full" in result.stdout
    assert "nothing of it was left behind" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_export_leaves_the_old_one(small, tmp_path):
    old = tmp_path / "out"
    old.mkdir()
    (old / "model_float32.onnx").write_text("old")

    def stop(stage, done, total):
        if (stage, done) == ("write", 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keras_kd.export(
            small,
            old,
            formats="onnx",
            precisions="float32",
            evaluation=X,
            overwrite=True,
            progress=stop,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (old / "model_float32.onnx").read_text() == "old"


def tasks(*names):
    return [{"id": name} for name in names]


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Replaces the worker by a script that crashes on some tasks."""

    def install(body):
        package = tmp_path / "fake" / "keras_kd" / "export"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package.parent / "__init__.py").touch()
        head = "import json, os, signal, sys, time\nbox = sys.argv[1]\n"
        head += "job = json.load(open(box + '/job.json'))\n"
        (package / "worker.py").write_text(head + textwrap.dedent(body))
        monkeypatch.setattr(warm, "_PACKAGE_ROOT", tmp_path / "fake")

    return install


def test_the_tasks_after_a_crash_go_on_in_a_fresh_process(worker, tmp_path):
    worker(
        """
        for task in job["tasks"]:
            open(box + "/current", "w").write(task["id"])
            if task["id"] == "b":
                os.kill(os.getpid(), signal.SIGSEGV)
            json.dump({"pid": os.getpid()}, open(box + "/" + task["id"] + ".tmp", "w"))
            os.replace(box + "/" + task["id"] + ".tmp", box + "/" + task["id"] + ".json")
        """
    )
    seen = []
    results = worker_pool.run_tasks(
        {"kind": "test"},
        tasks(*"abc"),
        tmp_path / "jobs",
        done=lambda task: seen.append(task["id"]),
    )
    assert seen == ["a", "b", "c"]
    assert results["b"] == {
        "error": "the process crashed (signal 11, SIGSEGV)",
        "crashed": True,
        "started": True,
    }
    assert results["a"]["pid"] != results["c"]["pid"]


def test_a_worker_that_never_starts_fails_all_tasks_once(worker, tmp_path):
    worker("raise SystemExit('no such package')")
    results = worker_pool.run_tasks({"kind": "test"}, tasks(*"ab"), tmp_path / "jobs")
    assert len(list((tmp_path / "jobs").iterdir())) == 1
    for result in results.values():
        assert result["error"] == "the process crashed (exit code 1): no such package"
        assert result["started"] is False


def test_a_worker_that_hangs_is_stopped(worker, tmp_path):
    worker(
        """
        open(box + "/current", "w").write(job["tasks"][0]["id"])
        if job["attempt"] == 1:
            time.sleep(60)
        json.dump({"ok": True}, open(box + "/b.tmp", "w"))
        os.replace(box + "/b.tmp", box + "/b.json")
        """
    )
    results = worker_pool.run_tasks({"kind": "test"}, tasks(*"ab"), tmp_path / "jobs", timeout=3)
    assert results["a"]["error"] == "stopped after 3 s without a result"
    assert results["b"] == {"ok": True}


def row(precision, **changes):
    entry = {
        "format": "tflite",
        "precision": precision,
        "status": "passed",
        "stage": None,
        "reason": "",
        "flags": [],
        "file": f"model_{precision}.tflite",
        "bytes": 1000,
        "latency_ms": 1.0,
        "latency_low_ms": 1.0,
        "metrics": {
            "accuracy": 0.9,
            "agreement": 1.0,
            "worst": 0.0,
            "relative": 0.0,
            "sqnr": 120.0,
            "finite": True,
        },
        "contents": {"weight_bits": {"32": 900}, "flex": [], "float_operators": []},
    }
    entry["metrics"] = {**entry["metrics"], **changes.pop("metrics", {})}
    figures = {**entry["metrics"], "kind": "classes", "variation": entry["metrics"]["sqnr"]}
    figures["drop"] = None if figures["accuracy"] is None else 0.9 - figures["accuracy"]
    entry["metrics"]["outputs"] = {"y": figures}
    entry["contents"] = {**entry["contents"], **changes.pop("contents", {})}
    return {**entry, **changes}


def best(objective, *entries):
    return acceptance.best(list(map(judging.artifact, entries)), objective)


def judged(*rows, max_drop=0.01):
    entries = list(rows)
    judging.judge(entries, max_drop, False)
    return entries


def compared(reference, outputs, labels, max_drop=0.01):
    """The judged row of an int8 file that gives these outputs by name."""
    kinds = {
        name: {"kind": output_meaning.kind_of(array, labels.get(name)), "probabilities": False}
        for name, array in reference.items()
    }
    entry = {**row("int8"), "metrics": judging.compare(reference, outputs, labels, kinds)}
    return judged(entry, max_drop=max_drop)[0]


def test_a_miscompiled_float_file_fails_verification():
    lost = row("float32", metrics={"relative": 0.3, "worst": 2.0, "sqnr": 12.0})
    (entry,) = judged(lost, max_drop=None)
    assert entry["status"] == "failed"
    assert entry["stage"] == "verify"
    assert "converted wrongly" in entry["reason"]
    (broken,) = judged(row("int8", metrics={"finite": False}), max_drop=None)
    assert "NaN" in broken["reason"]


def test_the_budget_decides_on_accuracy_agreement_or_noise():
    within, beyond = (
        row("int8", metrics={"accuracy": 0.89}),
        row("int8", metrics={"accuracy": 0.88}),
    )
    assert [entry["status"] for entry in judged(within, beyond)] == ["passed", "failed"]
    unlabeled = {"accuracy": None, "agreement": 0.98}
    (entry,) = judged(row("int8", metrics=unlabeled))
    assert "changes 2.00 %" in entry["reason"]
    values = {"accuracy": None, "agreement": None}
    good, bad = (row("int8", metrics={**values, "sqnr": noise}) for noise in (25.0, 15.0))
    assert [entry["status"] for entry in judged(good, bad)] == ["passed", "failed"]
    assert best("size", beyond) is None


def test_every_output_is_judged_by_itself():
    rng = np.random.default_rng(0)
    scores, other = rng.normal(size=(2, 200, 10)).astype("float32")
    value = rng.normal(size=(200, 1)).astype("float32")
    right = scores.argmax(1)
    for labels in ({"a": right}, {"a": right, "b": value}, {}):
        entry = compared({"a": scores, "b": value}, {"a": scores, "b": 0 * value + 7}, labels)
        assert entry["status"] == "failed"
        assert entry["reason"].startswith("at output `b`, its outputs keep")
        assert entry["worst_output"] == "b"
        assert compared({"a": scores, "b": value}, {"a": scores, "b": value}, labels)["file"]
    lossy = np.where(np.arange(200)[:, None] < 4, -scores, scores)
    labels = {"a": right, "b": other.argmax(1)}
    entry = compared({"a": scores, "b": other}, {"a": lossy, "b": other}, labels)
    assert entry["metrics"]["accuracy"] == 0.99
    assert entry["drop"] == pytest.approx(0.02)
    assert "at output `a`, accuracy 98.00 % is 2.00 points below" in entry["reason"]


def test_numbers_that_may_be_no_classes_must_keep_their_values_too():
    rng = np.random.default_rng(0)
    rows = np.stack([np.full(200, 10.0), *rng.normal(size=(2, 200))], 1).astype("float32")
    entry = compared({"y": rows}, {"y": np.float32([[10, 0, 0]] * 200)}, {})
    assert entry["metrics"]["agreement"] == 1
    assert "of signal over noise" in entry["reason"]
    shifted = compared({"y": rows + 100}, {"y": rows * [1, 0, 0] + 100}, {})
    assert "from sample to sample" in shifted["reason"]
    assert compared({"y": rows}, {"y": rows * 1.001}, {})["status"] == "passed"
    flagged = row("float32")
    flagged["metrics"]["outputs"]["y"]["kind"] = "unknown"
    assert "nothing says whether `y` holds classes" in judged(flagged)[0]["flags"][0]


def test_best_follows_the_objective():
    small = row("int8", bytes=10, latency_ms=2.0)
    fast = row("float16", bytes=20, latency_ms=1.0)
    failed = row("dynamic", bytes=1, latency_ms=0.1, status="failed")
    assert best("size", failed, fast, small) == small["file"]
    assert best("latency", failed, fast, small) == fast["file"]


def test_a_quantization_that_did_nothing_or_harm_is_flagged():
    full = row("float32")
    idle = row("dynamic")
    (_, entry) = judged(full, idle)
    assert entry["flags"] == ["quantization did nothing: all weights are still 32-bit floats"]
    partly = row("dynamic", contents={"weight_bits": {"8": 300, "32": 2800}}, bytes=800)
    assert judged(full, partly)[1]["flags"] == ["70 % of its weights are still 32-bit floats"]
    large = row("int8", contents={"weight_bits": {"8": 800}}, bytes=990, latency_low_ms=3.0)
    mixed = row("int8", contents={"weight_bits": {"8": 9}, "float_operators": ["ERF"]}, bytes=90)
    (_, first, second) = judged(row("float32"), large, mixed)
    assert first["flags"] == [
        "it is hardly smaller than float32 (990 against 1000 bytes)",
        "3.0 times slower than float32",
    ]
    assert second["flags"] == ["computes in float: ERF"]


def test_a_full_disk_while_placing_is_explained(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk can only be mounted by root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        model = keras.Sequential([keras.Input((64,)), layers.Dense(512)])
        x = np.random.default_rng(0).random((20, 64)).astype("float32")
        with pytest.raises(OSError, match="disk is full") as caught:
            keras_kd.export(model, disk / "out", formats="onnx", precisions="float32", evaluation=x)
        assert caught.value.errno == errno.ENOSPC
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
