"""A folder in service is replaced as a whole or not at all, by what its int8 file can do."""

import os
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_kd as kd
from keras_kd.export import manifest
from keras_kd.lifelong import refresh
from keras_kd.utils import files

DIGITS = Path(__file__).parents[2] / "exported" / "digits"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def service(tmp_path):
    folder = tmp_path / "service" / "digits"
    shutil.copytree(DIGITS, folder)
    (folder / "NOTES.txt").write_text("ours")
    return folder


@pytest.fixture(scope="module")
def data():
    digits = kd.datasets.load("digits")
    x, y, u, v = digits.x_train, digits.y_train, digits.x_test, digits.y_test
    old, new = y < 8, y >= 8
    return (x[old], y[old], u[v < 8], v[v < 8]), (x[new], y[new], u[v >= 8], v[v >= 8])


def mlp(units=10):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Dense(24, activation="relu")(keras.layers.Flatten()(inputs))
    return keras.Model(inputs, keras.layers.Dense(units, name="logits")(x), name="digits")


def test_refused_by_how_much_and_shipped_whole(service, data, tmp_path, monkeypatch):
    old, new = data
    before, teacher = contents(service), mlp()
    calls = {"teacher": teacher, "old": {"first": old}, "new": new, "folder": tmp_path / "work"}
    options = {"student": mlp(8), "epochs": 1, "batch_size": 512, "fine_tune": 1, "verbose": 0}
    done = refresh(service, max_drop=0.05, **calls, **options)
    assert not done.shipped
    assert contents(service) == before
    assert [(row["name"], row["part"]) for row in done.tasks] == [("first", "old"), ("new", "new")]
    # The figures are those of the int8 files, run here once more.
    for row, (_, _, u, v) in zip(done.tasks, data):
        for key, folder in (("before", service), ("after", done.folder)):
            answers = kd.export.load(folder / "digits_int8.tflite")(u)
            assert row[key] == pytest.approx(np.mean(answers.argmax(-1) == v))
        assert row["drop"] == pytest.approx(row["before"] - row["after"])
    worst = max(done.tasks, key=lambda row: row["drop"])
    assert f"by {100 * worst['drop']:.2f} points, " in done.reason.replace("; ", ", ") + ", "
    assert "at most 5.00 are allowed" in done.reason
    assert done.reason in done.table()

    # Again with another bound: what has been trained and exported is not made anew.
    def exported(student, folder, **options):
        assert options["name"] == "digits"
        assert options["precisions"] == ["int8"]
        assert set(options["formats"]) == {"tflite", "onnx"}
        return kd.export.Report.load(folder)

    monkeypatch.setattr("keras_kd.export.export_model", exported)
    monkeypatch.setattr(keras.Model, "fit", None)
    shipped = refresh(service, max_drop=1.0, **calls, **options)
    assert shipped.shipped, shipped.reason
    assert shipped.folder == service
    after = contents(service)
    assert after.pop("NOTES.txt") == b"ours"
    assert after == contents(done.folder)
    assert "student.keras" in after
    manifest.check_files(service, manifest.read(service))
    assert contents(tmp_path / "work" / "previous") == before
    assert [path.name for path in service.parent.iterdir()] == ["digits"]
    with pytest.raises(ValueError, match="another refresh: `epochs` was 1 and is 2"):
        refresh(service, **calls, **{**options, "epochs": 2})


def test_a_link_is_led_elsewhere(service, tmp_path):
    from keras_kd.lifelong.refresh import _put_in_service

    link = tmp_path / "current"
    link.symlink_to(service)
    before = contents(service)
    candidate = tmp_path / "candidate"
    shutil.copytree(DIGITS, candidate)
    (candidate / "student.keras").write_bytes(b"new")
    for _ in range(2):
        _put_in_service(candidate, link, manifest.read(link), tmp_path / "previous")
        assert link.is_symlink()
        assert contents(link)["student.keras"] == b"new"
    assert contents(service) == before


def test_killed_before_the_rename(service, tmp_path, monkeypatch):
    from keras_kd.lifelong.refresh import _put_in_service

    before, candidate = contents(service), tmp_path / "candidate"
    shutil.copytree(DIGITS, candidate)
    (candidate / "student.keras").write_bytes(b"new")
    content = manifest.read(service)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, "exchange", stop)
        with pytest.raises(KeyboardInterrupt):
            _put_in_service(candidate, service, content, tmp_path / "previous")
    assert contents(service) == before
    _put_in_service(candidate, service, content, tmp_path / "previous")
    assert contents(service)["student.keras"] == b"new"
    assert os.listdir(service.parent) == ["digits"]


def test_killed_after_the_rename(service, tmp_path, monkeypatch):
    from keras_kd.lifelong.refresh import _put_in_service

    before, candidate = contents(service), tmp_path / "candidate"
    shutil.copytree(DIGITS, candidate)
    content = manifest.read(candidate)
    gone = content["artifacts"].pop()
    content["best"] = content["artifacts"][0]["file"]
    manifest.write({k: v for k, v in content.items() if k != "seal"}, candidate / manifest.FILE)
    (candidate / gone["file"]).unlink()
    exchange = files.exchange

    def killed(*arguments):
        exchange(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, "exchange", killed)
        with pytest.raises(KeyboardInterrupt):
            _put_in_service(candidate, service, manifest.read(service), tmp_path / "previous")
    # The same is shipped again: what was in service before it is kept, and no copy of the new one.
    for _ in range(2):
        _put_in_service(candidate, service, manifest.read(service), tmp_path / "previous")
        assert contents(tmp_path / "previous") == before
        assert contents(service) == {**contents(candidate), "NOTES.txt": b"ours"}
    assert os.listdir(service.parent) == ["digits"]
    assert sorted(os.listdir(tmp_path)) == ["candidate", "previous", "service"]


def test_exchange(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    files.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "file").read_text() == "b"
    with pytest.raises(OSError, match="No such file"):
        files.exchange(tmp_path / "a", tmp_path / "missing")
    assert (tmp_path / "a" / "file").read_text() == "b"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"deployed_folder": "nowhere"}, FileNotFoundError, "There is no folder"),
        ({"max_drop": -1}, ValueError, "max_drop"),
        ({"old": (1, 2, 3)}, ValueError, "`old` is"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"fine_tune": -1}, ValueError, "fine_tune"),
        ({"student": 3}, TypeError, "`student` is a model or a path"),
        ({"teacher": "few"}, ValueError, "The teacher knows 4 classes"),
    ],
)
def test_bad_input_leaves_all_as_it_was(service, data, tmp_path, changed, error, message):
    before = contents(service)
    arguments = {
        "deployed_folder": service,
        "teacher": mlp(4) if changed.get("teacher") else mlp(),
        "old": data[0],
        "new": data[1],
        "folder": tmp_path / "work",
        **{name: value for name, value in changed.items() if name != "teacher"},
    }
    with pytest.raises(error, match=message):
        refresh(**arguments)
    assert contents(service) == before
    assert not (tmp_path / "work").exists()
