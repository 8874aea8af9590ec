"""Every argument of an export is looked at before anything is done."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import keras_kd.export
from keras_kd.export import arguments, limits, target, warm, worker_pool, writing
from keras_kd.utils import files

X = np.random.default_rng(0).random((20, 4)).astype("float32")
Y = np.arange(20) % 3


@pytest.fixture(scope="module")
def small():
    return keras.Sequential([keras.Input((4,), name="x"), layers.Dense(3)])


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Neither the model nor a converter runs."""

    def never(*_, **__):
        raise AssertionError("Work has begun.")

    monkeypatch.setattr("keras_kd.export.exporter.answer", never)
    monkeypatch.setattr("keras_kd.export.jobs.convert", never)


@pytest.mark.parametrize(
    ("given", "error", "reason"),
    [
        ({"history": [1.0]}, TypeError, "`history` must be `History.history`.*Received: list"),
        ({"history": keras.callbacks.History()}, TypeError, "Received: History"),
        ({"history": {"loss": 3.0}}, TypeError, "Received 3.0 for `loss`"),
        ({"history": {"loss": "0.1"}}, TypeError, "Received '0.1' for `loss`"),
        ({"history": {"loss": [0.1, "bad"]}}, TypeError, "Received 'bad' in `loss`"),
        ({"history": {"loss": [0.1, None]}}, TypeError, "Received None in `loss`"),
        ({"history": {"loss": [[0.1], [0.2, 0.3]]}}, TypeError, "in `loss`"),
        ({"history": {3: [0.1]}}, TypeError, "Received the name 3"),
        ({"history": {"\ud800": [0.1]}}, ValueError, "cannot be written"),
        ({"labels": "abc"}, TypeError, "`labels` must be a list"),
        ({"labels": 5}, TypeError, "`labels` must be a list"),
        ({"labels": {"a": 1}}, TypeError, "`labels` must be a list"),
        ({"labels": ["a", None, "c"]}, TypeError, "must be text. Received: None"),
        ({"labels": ["a", "b\nc", "d"]}, ValueError, "must be one line of text"),
        ({"labels": ["a", "\ud800", "d"]}, ValueError, "must be one line of text"),
        ({"teacher": "t.keras"}, TypeError, "must be a `keras.Model`"),
        ({"teacher": {"accuracy": 97.0}}, ValueError, r"a share, in \[0, 1\]. Received: 97.0"),
        ({"teacher": {"bytes": -1}}, ValueError, "not negative"),
        ({"teacher": {"latency_ms": "1"}}, TypeError, "must be a number"),
        ({"mixed": "no"}, TypeError, "`mixed` must be True or False"),
        ({"sparse": None}, TypeError, "`sparse` must be True or False"),
        ({"overwrite": 1}, TypeError, "`overwrite` must be True or False"),
        ({"allow_flex": "false"}, TypeError, "`allow_flex` must be True or False"),
        ({"progress": "bar"}, TypeError, "`progress` must be a function"),
        ({"formats": 3}, TypeError, "`formats` must be one of tflite, onnx"),
        ({"precisions": 8}, TypeError, "`precisions` must be one of"),
        ({"objective": ["size", 3]}, ValueError, "`3` is not known"),
        ({"name": "a\nb"}, ValueError, "first part of a file name"),
        ({"name": "a\\b"}, ValueError, "first part of a file name"),
        ({"name": "a:b"}, ValueError, "first part of a file name"),
        ({"name": "\ud800"}, ValueError, "first part of a file name"),
        ({"name": "x" * 200}, ValueError, "has 200 bytes"),
        ({"name": "ü" * 80}, ValueError, "has 160 bytes"),
        ({"name": " x"}, ValueError, "first part of a file name"),
    ],
)
def test_what_cannot_be_used_is_refused_first(small, tmp_path, given, error, reason):
    with pytest.raises(error, match=reason):
        keras_kd.export(small, tmp_path / "out", calibration=X, evaluation=(X, Y), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [None, 5, b"bytes", "", "a\0b", "a\ud800"])
def test_what_is_no_path_is_refused(small, folder):
    with pytest.raises((TypeError, ValueError), match="`folder` must be"):
        keras_kd.export(small, folder, evaluation=X, precisions="float32")


@pytest.mark.parametrize("name", ["model_int8.onnx", "evaluation.npz", "manifest.json"])
def test_a_folder_in_the_way_of_a_file_is_seen_first(small, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is in the way|none that `keras_kd.export` wrote"):
        keras_kd.export(small, tmp_path / "out", calibration=X, evaluation=X, overwrite=True)
    assert os.listdir(tmp_path / "out") == [name]


def test_a_name_that_no_file_can_hold_is_refused():
    with pytest.raises(ValueError, match="holds half of a surrogate pair"):
        arguments.check_texts("The layer", ["fine", "\ud800"])


def test_data_without_end_are_told_to_have_none(monkeypatch):
    import itertools

    from keras_kd.export.source import data
    from keras_kd.utils import archives

    monkeypatch.setattr(archives, "memory_available", lambda: 100_000)
    for what in ("evaluation", "calibration"):
        with pytest.raises(ValueError, match="goes on, more than the memory"):
            data.read((X for _ in itertools.count()), what, several_inputs=False)
    read = data.read((X for _ in itertools.count()), "calibration", several_inputs=False, limit=30)
    assert read.count == 30


def test_a_history_becomes_plain_numbers():
    curves = {"loss": np.float32([1, 2]), "val": (np.float64(3), float("nan"), 4)}
    assert arguments.read_history(curves) == {"loss": [1.0, 2.0], "val": [3.0, None, 4.0]}
    assert arguments.read_history({}) == {}
    assert arguments.check_labels(np.array(["a", "b"])) == ["a", "b"]
    assert arguments.check_labels([0, 1]) == ["0", "1"]


def test_a_file_is_new_and_follows_no_link(tmp_path, monkeypatch):
    umask = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)
        path = writing.write_file(tmp_path / "a.json", "x")
    finally:
        monkeypatch.undo()
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640
    (tmp_path / "precious").write_text("old")
    (tmp_path / "b.json").symlink_to(tmp_path / "precious")
    writing.write_file(tmp_path / "b.json", "new")
    assert (tmp_path / "precious").read_text() == "old"
    assert not (tmp_path / "b.json").is_symlink()


def test_a_full_disk_at_any_file_is_explained(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"disk is full, so `.*a` was not written") as caught:
        writing.write_file(tmp_path / "a", "new")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_task_has_a_time_that_grows_with_its_size(tmp_path):
    (tmp_path / "m.onnx").write_bytes(bytes(2_000_000))
    file = {"path": str(tmp_path / "m.onnx")}
    assert limits.seconds({"kind": "measure"}, file) == 300 + 5 * 2
    assert limits.seconds({"kind": "measure", "expected": 3.0}, file) == 310 + 300
    assert limits.seconds({"kind": "convert", "model": file["path"]}, {}) == 900 + 20 * 2
    assert limits.seconds({"kind": "convert"}, {"path": str(tmp_path / "none")}) == 900


LIMITED = """
import sys
sys.path.insert(0, {root!r})
from keras_kd.export import limits, worker

def task(_):
    return {{"size": len(bytearray(3 << 30))}}

worker._worker = lambda job: task
limits.begin(1 << 30)
worker.main(__import__("pathlib").Path(sys.argv[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux alone keeps the limit")
def test_a_worker_that_asks_for_all_memory_is_told_no(tmp_path, monkeypatch):
    package = tmp_path / "fake" / "keras_kd" / "export"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    root = str(Path(keras_kd.__file__).parents[1])
    # The package's own worker, with another task.
    (package / "worker.py").write_text(
        f"import subprocess, sys\n"
        f"sys.exit(subprocess.call([sys.executable, '-P', '-c', {LIMITED.format(root=root)!r}, "
        f"sys.argv[1]]))\n"
    )
    monkeypatch.setattr(warm, "_PACKAGE_ROOT", tmp_path / "fake")
    result = worker_pool.run_tasks({"kind": "test"}, [{"id": "a"}], tmp_path / "jobs")
    assert result["a"]["error"].startswith("it asks for more memory than this machine has")


def test_a_place_where_no_file_can_be_made_is_found_at_once(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "create", full)
    with pytest.raises(OSError, match=r"Nothing can be written to `.*new` \(No space") as caught:
        target.check_writable(tmp_path / "new")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    target.check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_what_a_worker_leaves_as_temporary_goes_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "system"))
    (tmp_path / "system").mkdir()
    (tmp_path / "box").mkdir()
    environment = {**warm.environment(), **worker_pool._temporary(tmp_path / "box")}
    code = "import tempfile; print(tempfile.mkstemp()[1])"
    made = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "box") in Path(made.stdout.strip()).parents
    assert os.listdir(tmp_path / "system") == []
