"""Files for devices, and what stands in their way: stubs in place of training and exporting."""

import dataclasses
import shutil

import keras
import numpy as np
import pytest
from small_models import crossentropy, mlp

pytest.importorskip("optuna")

import keras_kd as kd
from keras_kd.distill.row_errors import RowErrors
from keras_kd.search import Device, candidate, devices, files, finals, tuner
from keras_kd.search.files import Times, Weighed

rng = np.random.default_rng(4)
X = rng.normal(size=(90, 6)).astype("float32")
Y = (X[:, :4] + 0.3 * X[:, 2:]).argmax(1)
DATA = ((X[:60], Y[:60]), (X[60:], Y[60:]))
# Bytes of the file by the parameters of the student: width 0.25, 0.5, 0.75 and 1 of the teacher.
SMALLEST = 48


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One real export, which stands for all."""
    folder = tmp_path_factory.mktemp("exported") / "file"
    kd.export(mlp(), folder, ("tflite",), ("float32",), calibration=X[:8], max_drop=None)
    return folder


@pytest.fixture
def found(monkeypatch, tmp_path, exported):
    model = mlp(width=16, name="teacher")
    model.compile(keras.optimizers.Adam(0.03), crossentropy())
    model.fit(*DATA[0], epochs=3, verbose=0)
    asked = []

    def export(exporter, student, folder, precision, *, trained=True):
        size = student.count_params() * (1 if precision == "int8" else 4)
        path = folder.with_suffix(".tflite")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
        told = {name: "no: FULLY_CONNECTED" for name in exporter.targets if name == "ethos-u55"}
        ms = size / 1000
        return path, Weighed(size, ms, ms, ms, student.count_params(), told)

    def errors(exporter, path, student):
        # The larger the better.
        return RowErrors(np.full(4, 0.4 - student.count_params() / 1000), np.ones(4))

    def asking(teacher, x, folder, **options):
        asked.append(folder)
        folder.mkdir(exist_ok=True, parents=True)
        return teacher

    def best(runs, role, seed):
        shutil.copytree(exported, runs.folder / "best")
        return {"file": "best/model_float32.tflite"}

    def timed(paths, rows, **options):
        return [Times(*[path.stat().st_size / 1000] * 3) for path in paths]

    monkeypatch.setattr(
        candidate.Trainer,
        "trained",
        lambda self, values, seed, keep=None: (self.student(values, seed), self.epochs),
    )
    monkeypatch.setattr(files.Exporter, "export", export)
    monkeypatch.setattr(files.Exporter, "errors", errors)
    monkeypatch.setattr(finals.Finals, "_export", best)
    monkeypatch.setattr(finals, "latencies", timed)
    monkeypatch.setattr(tuner, "asked_once", asking)

    def call(**options):
        given = {"trials": 3, "minutes": None, "epochs": 1, "verbose": 0, "seeds": 2, **options}
        return kd.search.for_device(model, DATA, folder=tmp_path / "d", **given)

    call.model, call.asked, call.folder = model, asked, tmp_path
    return call


def test_what_is_not_reachable_says_what_would_have_to_give(found):
    small = found(max_bytes=40)
    assert small.best is None
    assert small.accuracy is None
    assert small.verdict.startswith("not reachable: no student of the space fits the budget")
    assert f"{SMALLEST} bytes against 40" in small.verdict
    assert f"What would have to give: at least {SMALLEST} bytes, the smallest file" in small.verdict
    assert found.asked == []


def test_milliseconds_and_operators_are_told_too(found):
    slow = found(max_latency_ms=0.04)
    assert "at least 0.048 ms, the fastest file of the space" in slow.verdict


def test_a_runtime_that_refuses_all_files_is_named(found):
    refused = found(targets="ethos-u55")
    assert "ethos-u55 answers `no: FULLY_CONNECTED`" in refused.verdict
    assert "a runtime other than ethos-u55, or layers that it takes" in refused.verdict
    assert found.asked == []


def test_too_low_an_accuracy_says_how_near_and_what_is_next(found):
    short = found(max_bytes=100, min_accuracy=0.99)
    assert short.best is None
    size = short.study.best["bytes"]
    assert size <= 100
    assert short.accuracy == pytest.approx(0.6 + size / 1000)
    missing = 100 * (0.99 - short.accuracy)
    assert f"{missing:.2f} points less than the 99 % asked for" in short.verdict
    wrong = np.mean(found.model.predict(DATA[1][0], verbose=0).argmax(1) != DATA[1][1])
    assert f"The teacher itself is right on {100 * (1 - wrong):.2f} %" in short.verdict
    assert "The next larger student (width 0.75) would take 136 bytes" in short.verdict


@pytest.mark.parametrize("least", [0.99, 0.7 + 1e-12, 0.7])
def test_no_student_is_called_untrained_that_was_within_the_limits(found, monkeypatch, least):
    # 1 - 0.3 is a little less than 0.7 in binary.
    monkeypatch.setattr(files.Exporter, "errors", lambda *_: RowErrors(np.full(4, 0.3), np.ones(4)))
    told = found(max_bytes=200, min_accuracy=least)
    assert (told.best is None) == (least > 0.8)
    assert ("No larger student of the space is kept out" in told.verdict) == (least > 0.8)
    assert "was not trained" not in told.verdict


def test_what_is_reached_is_a_verified_artifact(found):
    reached = found(max_bytes=200, min_accuracy=0.5)
    assert reached.verdict.startswith("reached: ")
    assert reached.best.passed
    assert reached.best.path.is_file()
    assert "reached" in reached.table()


def test_a_family_asks_the_teacher_once(found):
    tiers = {
        "server": Device(precisions=("float32", "int8")),
        "micro": Device(max_bytes=40),
    }
    results = kd.search.family(
        found.model,
        DATA,
        tiers,
        found.folder / "f",
        trials=2,
        minutes=None,
        epochs=1,
        seeds=2,
        verbose=0,
    )
    assert list(results) == ["server", "micro"]
    assert results["server"].best is not None
    assert results["micro"].best is None
    assert set(found.asked) == {found.folder / "f" / "answers"}
    assert (found.folder / "f" / "server" / "search.json").exists()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: Device(max_bytes=0), ValueError, "positive"),
        (lambda t: Device(max_latency_ms="1"), TypeError, "is a number"),
        (lambda t: Device(min_accuracy=2), ValueError, "share from 0 to 1"),
        (lambda t: Device(min_accuracy="0.9"), TypeError, "`min_accuracy` is a number"),
        (lambda t: Device(max_bytes=-1), ValueError, "`max_bytes` of a device"),
        (lambda t: Device(precisions=()), ValueError, "names none"),
        (lambda t: kd.search.family(t, DATA, [Device()]), ValueError, "a dict from names"),
        (lambda t: kd.search.for_device(t, DATA, epoch=3), ValueError, "Did you mean 'epochs'"),
        (
            lambda t: kd.search.for_device(t, DATA, minimize=("bytes",)),
            ValueError,
            "unknown key 'minimize'",
        ),
        (lambda t: Device(targets="ethos-u5"), ValueError, "no known target"),
        (lambda t: kd.search.family(t, DATA, {}), ValueError, "names none"),
        (lambda t: kd.search.family(t, DATA, {"a": 3}), TypeError, "is a `keras_kd.search.Device`"),
        (lambda t: kd.search.for_device(t, X), TypeError, "`data` is `.train, validation.`"),
        (lambda t: kd.search.for_device(t, (X, Y)), TypeError, "`data` is"),
        (
            lambda t: kd.search.for_device(t, DATA, space={"precision": ["int8", "float32"]}),
            ValueError,
            "leave `precision` out",
        ),
        (lambda t: kd.search.for_device(t, DATA, precisions=["int9"]), ValueError, "mean 'int8'"),
    ],
)
def test_bad_input(call, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        call(mlp(width=16))
    assert list(tmp_path.iterdir()) == []


def test_devices_are_plain_values():
    assert dataclasses.asdict(Device(max_bytes=5))["max_bytes"] == 5
    assert devices.Device() == Device()
    assert Device(precisions="int8") == Device(precisions=("int8",))
