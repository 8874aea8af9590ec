"""The search itself: with stubs where its logic is looked at, once from end to end."""

import json
import os
import shutil
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from small_models import crossentropy, mlp

pytest.importorskip("optuna")

import keras_kd as kd
from keras_kd.distill.training_rows import Rows
from keras_kd.search import (
    Budget,
    Choice,
    Float,
    Log,
    candidate,
    files,
    finals,
    journal,
    task,
    tuner,
)
from keras_kd.search.files import Times, Weighed

rng = np.random.default_rng(4)
X = rng.normal(size=(90, 6)).astype("float32")
Y = (X[:, :4] + 0.3 * X[:, 2:]).argmax(1)
TRAIN, VALIDATION = (X[:60], Y[:60]), (X[60:], Y[60:])
SPACE = {"method": ["default", "DIST"], "alpha": Float(0, 1), "width": Choice(0.25, 0.5, 1.0)}


@pytest.fixture(scope="module")
def teacher():
    model = mlp(width=16, name="teacher")
    model.compile(keras.optimizers.Adam(0.03), crossentropy())
    model.fit(*TRAIN, epochs=5, verbose=0)
    return model


class Stubs:
    """What is trained and exported, in place of training and exporting."""

    def __init__(self, monkeypatch, teacher):
        self.trained, self.epochs, self.exported, self.asked = [], [], [], 0
        self.fails_at = None
        self.teacher = teacher

        def trained(trainer, values, seed, keeps_on=None):
            if len(self.trained) == self.fails_at:
                raise KeyboardInterrupt
            self.trained.append((dict(values), seed))
            self.epochs.append(trainer.epochs)
            student = trainer.student(values, seed)
            if keeps_on is not None and not keeps_on(1, self.error(values, seed)):
                return student, 1
            student.values = dict(values), seed
            return student, trainer.epochs

        def export(exporter, student, folder, precision, *, trained=True):
            parameters = student.count_params()
            self.exported.append((parameters, trained))
            path = folder.with_suffix(".tflite")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * parameters)
            self.last = getattr(student, "values", None)
            latency = parameters / 1000
            return path, Weighed(parameters, latency, latency, latency, parameters)

        def errors(exporter, path, student):
            from keras_kd.distill.row_errors import RowErrors

            values, seed = getattr(student, "values", (None, 0))
            error = 0.9 if values is None else self.error(values, seed)
            return RowErrors(np.full(4, error), np.ones(4))

        def best(runs, role, seed):
            return {"file": "best/student.tflite"}

        def timed(paths, rows, **options):
            found = [path.stat().st_size / 1000 for path in paths]
            return [Times(t, t, t) for t in found]

        def own_error(trainer, student):
            return 0.9

        monkeypatch.setattr(candidate.Trainer, "error", own_error)

        def asking(teacher, x, folder, **options):
            self.asked += not folder.exists()
            folder.mkdir(exist_ok=True)
            return teacher

        monkeypatch.setattr(candidate.Trainer, "trained", trained)
        monkeypatch.setattr(files.Exporter, "export", export)
        monkeypatch.setattr(files.Exporter, "errors", errors)
        monkeypatch.setattr(finals.Finals, "_export", best)
        monkeypatch.setattr(finals, "latencies", timed)
        monkeypatch.setattr(tuner, "asked_once", asking)

    def error(self, values, seed):
        """Wider is better, and so is an alpha near 0.3; DIST is best."""
        helps = 0.1 * (values["method"] == "DIST") + 0.1 * (values["method"] == "default")
        return 0.5 + (values["alpha"] - 0.3) ** 2 / 4 - 0.1 * values["width"] - helps + seed / 1000


@pytest.fixture
def stubs(monkeypatch, teacher):
    return Stubs(monkeypatch, teacher)


def tune(stubs, folder, **options):
    given = {
        "build": "shrink",
        "teacher": stubs.teacher,
        "train": TRAIN,
        "validation": VALIDATION,
        "space": SPACE,
        "budget": Budget(minutes=None, trials=8),
        "folder": folder,
        "epochs": 9,
        "verbose": 0,
        **options,
    }
    return kd.search.tune(**given)


def compared(study):
    """What is the same however the search came about."""
    return [
        {key: value for key, value in row.items() if key != "latency_ms"} for row in study.rows()
    ]


def test_the_references_are_among_the_trials_and_the_winner_is_trained_again(stubs, tmp_path):
    study = tune(stubs, tmp_path / "s")
    rows = study.rows()
    assert len(rows) == 8
    assert [row["role"] for row in rows[:2]] == ["plain", "defaults"]
    assert rows[0]["alpha"] == 1
    assert rows[0]["method"] == "plain"
    assert rows[1]["alpha"] == 0.5
    assert rows[1]["method"] == "default"
    assert rows[1]["temperature"] == 1
    assert rows[1]["width"] == 0.5
    lowest = min((row for row in rows if row["error"] is not None), key=lambda row: row["error"])
    assert study.front[0]["trial"] == lowest["trial"]
    # All trials have one seed, the last trainings others, the same for all three.
    assert {seed for _, seed in stubs.trained[:8]} == {0}
    again = stubs.trained[8:]
    assert sorted({seed for _, seed in again}) == [1, 2, 3]
    assert {values["width"] for values, _ in again} == {lowest["width"]}
    assert {values["method"] for values, _ in again} == {"plain", "default", lowest["method"]}
    assert set(study.errors) == {"winner", "plain", "defaults"}
    assert study.best["width"] == lowest["width"]
    assert study.best["seed"] == 1
    assert study.best["error"] == pytest.approx(stubs.error(study.best, 1))
    assert stubs.epochs == [9] * 8 + [27] * len(again)
    assert study.best["epochs"] == 27
    assert stubs.asked == 1
    table = study.table()
    assert "0 plain" in table
    assert "1 defaults" in table
    assert study.verdict.split(":")[0] in table


@pytest.mark.parametrize(
    ("given", "minutes", "epochs", "seconds"),
    [
        # Two trainings took 10 s on average, and 3 x 2 are to come.
        (None, None, 27, 180),
        (None, 6, 27, 180),
        # Half of these minutes is less than 180 s.
        (None, 5.9, 9, 60),
        (18, 5.9, 18, 120),
        (3, None, 3, 20),
    ],
)
def test_the_last_trainings_are_longer_where_there_is_time(given, minutes, epochs, seconds):
    def record(state, began, ended, **said):
        return journal.Record(0, "", {}, state, said, began, ended)

    records = [
        record("done", 100.0, 108.0),
        record("done", 200.0, 212.0),
        record("done", 300.0, 301.0, stopped=1),
        record("beyond", 400.0, 400.5),
        record("running", 500.0, None),
    ]
    assert finals.length(records, 9, given, 2, minutes) == (epochs, pytest.approx(seconds))
    assert finals.length([], 9, given, 2, minutes).seconds == 0


def test_a_search_that_is_killed_ends_as_if_it_had_not_been(stubs, tmp_path):
    whole = tune(stubs, tmp_path / "whole")
    trainings = len(stubs.trained)
    for fails_at in (1, 5, 10, 14):
        stubs.trained.clear()
        folder = tmp_path / str(fails_at)
        stubs.fails_at = fails_at
        with pytest.raises(KeyboardInterrupt):
            tune(stubs, folder)
        stubs.fails_at = None
        study = tune(stubs, folder)
        assert compared(study) == compared(whole)
        assert study.verdict == whole.verdict
        assert {**study.best, "file": 0} == {**whole.best, "file": 0}
        assert len(stubs.trained) == trainings, "nothing that was done is done again"
    before = len(stubs.trained)
    assert compared(tune(stubs, folder)) == compared(whole)
    assert len(stubs.trained) == before


def test_more_trials_go_on_where_the_search_ended(stubs, tmp_path):
    first = tune(stubs, tmp_path / "s", budget=Budget(minutes=None, trials=5))
    more = tune(stubs, tmp_path / "s", budget=Budget(minutes=None, trials=12))
    assert compared(more)[:5] != []
    assert len(more.rows()) == 12
    assert [row["alpha"] for row in more.rows()[:5]] == [row["alpha"] for row in first.rows()]
    at_once = tune(stubs, tmp_path / "t", budget=Budget(minutes=None, trials=12))
    assert more.best["alpha"] == at_once.best["alpha"]


def test_a_candidate_beyond_the_budget_is_never_trained(stubs, tmp_path):
    wide = candidate.build_student("shrink", stubs.teacher, {"width": 1.0, "depth": 1.0})
    limit = wide.count_params() - 1
    study = tune(stubs, tmp_path / "s", budget=Budget(None, bytes=limit, trials=12))
    beyond = [row for row in study.rows() if row["state"] == "beyond"]
    assert beyond
    assert {row["width"] for row in beyond} == {1.0}
    assert all(row["error"] is None and row["bytes"] > limit for row in beyond)
    assert all(values["width"] < 1 for values, _ in stubs.trained)
    assert "bytes against" in beyond[0]["reason"]
    assert study.best["bytes"] <= limit
    # One untrained file for each size, however many candidates have it.
    assert sum(not trained for _, trained in stubs.exported) <= 3


def test_a_budget_that_nothing_meets_is_told_before_any_training(stubs, tmp_path):
    study = tune(stubs, tmp_path / "s", budget=Budget(None, bytes=7, trials=9))
    assert study.best is None
    assert study.front == []
    assert study.config == {}
    assert study.verdict.startswith("not reachable: no student of the space fits the budget")
    assert "bytes against 7" in study.verdict
    assert stubs.trained == []
    assert stubs.asked == 0
    with pytest.raises(ValueError, match="no student to train again"):
        study.save_config(tmp_path / "c.toml")
    slow = tune(stubs, tmp_path / "t", budget=Budget(None, latency_ms=1e-6, trials=9))
    assert "ms against 1e-06" in slow.verdict


@pytest.mark.parametrize(("low", "high", "front"), [(0.85, 1.05, [0]), (0.7, 0.85, [0, 1])])
def test_latencies_within_the_noise_are_the_same(low, high, front):
    def trial(slot, error):
        file = {"bytes": 100, "latency_ms": 1.0}
        return journal.Record(slot, "", {}, "done", {"error": error, "file": file})

    timed = {0: Times(1.0, 0.9, 1.1), 1: Times((low + high) / 2, low, high)}
    records = [trial(0, 0.1), trial(1, 0.2)]
    assert finals.front(records, ("error", "latency_ms"), timed) == front


def test_where_the_best_is_too_slow_when_timed_again_the_next_best_is_taken(monkeypatch, tmp_path):
    def trial(slot, error):
        file = {"bytes": 9, "latency_ms": 1.0, "low_ms": 1.0, "refused": {}}
        return journal.Record(slot, "", {}, "done", {"error": error, "file": file, "excess": {}})

    again = {"0": 5.0, "1": 5.0, "2": 1.0}

    def timed(paths, rows):
        return [Times(*[again[path.stem]] * 3) for path in paths]

    monkeypatch.setattr(finals, "latencies", timed)
    records = [trial(0, 0.1), trial(1, 0.2), trial(2, 0.3)]
    exporter = type("", (), {"validation": None})
    budget = Budget(None, latency_ms=2.0, trials=3)
    found = finals.winner(tmp_path, records, ("error",), budget, exporter)
    assert (found["slot"], found["front"]) == (2, [2])
    again["2"] = 5.0
    found = finals.winner(tmp_path, records, ("error",), budget, exporter)
    assert found["values"] is None
    assert found["verdict"].startswith("not reachable")
    assert "5 ms of 2" in found["verdict"]


def test_the_front_holds_what_nothing_beats_in_everything(stubs, tmp_path):
    study = tune(
        stubs, tmp_path / "s", minimize=("error", "latency"), budget=Budget(None, trials=12)
    )
    assert study.minimize == ("error", "latency_ms")
    done = [row for row in study.rows() if row["state"] == "done"]
    wanted = [
        row["trial"]
        for row in done
        if not any(
            other["error"] <= row["error"]
            and other["latency_ms"] <= row["latency_ms"]
            and (other["error"], other["latency_ms"], other["trial"])
            < (row["error"], row["latency_ms"], row["trial"])
            for other in done
            if other is not row
        )
    ]
    assert sorted(row["trial"] for row in study.front) == sorted(wanted)


def test_the_same_values_are_trained_once(stubs, tmp_path):
    space = {"alpha": [0.3, 0.7], "learning_rate": [0.005]}
    study = tune(stubs, tmp_path / "s", space=space, budget=Budget(None, trials=8))
    rows = study.rows()
    assert len(rows) == 8
    assert len([seed for _, seed in stubs.trained if seed == 0]) == len(
        {(row["method"], row["alpha"]) for row in rows}
    )
    same = [row for row in rows if row["alpha"] == rows[-1]["alpha"]]
    assert len({row["error"] for row in same}) == 1
    assert rows[-1]["reason"].startswith("as trial ")


def test_trainings_that_are_behind_are_stopped(stubs, tmp_path):
    study = tune(stubs, tmp_path / "s", budget=Budget(None, trials=14))
    stopped = [row for row in study.rows() if row["state"] == "stopped"]
    assert stopped
    assert all(row["epochs"] == 1 and not row["role"] for row in stopped)
    # Only what was trained to the end is exported.
    whole = [row for row in study.rows() if row["state"] == "done"]
    assert sum(trained for _, trained in stubs.exported) == len(whole) + len(stubs.trained) - 14
    assert not any(row["front"] for row in stopped)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"minimize": ["eror"]}, ValueError, "unknown key 'eror'.*Did you mean 'error'"),
        ({"minimize": []}, ValueError, "names different objectives of error, bytes, latency_ms"),
        ({"minimize": ["error", "error"]}, ValueError, "different objectives"),
        ({"space": {}}, ValueError, "nothing to choose in `space`"),
        ({"space": {"width": 0.5, "alpha": [0.5]}}, ValueError, "nothing to choose"),
        ({"space": {"widht": [0.5, 1.0]}}, ValueError, "Did you mean 'width'"),
        ({"space": {"width": [0.5, 1.5]}}, ValueError, "`width` lies above 0 and at most at 1"),
        ({"space": {"temperature": Float(0, 2)}}, ValueError, "`temperature` lies above 0"),
        ({"space": {"method": ["DISTT", "default"]}}, ValueError, "Did you mean 'DIST'"),
        ({"space": {"precision": ["int8", "int7"]}}, ValueError, "Did you mean 'int8'"),
        ({"space": {"method": Float(0, 1)}}, TypeError, "a choice of names"),
        ({"space": {"alpha": object()}}, TypeError, "The range of `alpha`"),
        ({"space": 3}, TypeError, "`space` is a dict"),
        ({"device": "tflite-mikro"}, ValueError, "Did you mean `tflite-micro`"),
        ({"budget": 3}, TypeError, "`budget` is a"),
        ({"seeds": 1}, ValueError, "`seeds` is at least 2"),
        ({"seeds": "3"}, TypeError, "`seeds` is a whole number"),
        ({"minimize": None}, TypeError, "`minimize` lists objectives"),
        ({"minimize": [["error"]]}, TypeError, "`minimize` lists objectives"),
        ({"space": {"alpha": [0, 1.5]}}, ValueError, "`alpha` lies at least at 0 and at most at 1"),
        ({"device": 3}, TypeError, "names of runtimes"),
        ({"config": ["a"]}, TypeError, "`config` is a dict"),
        ({"export": 3}, TypeError, "`export` is a dict"),
        ({"loss": "mse2"}, ValueError, "loss"),
        ({"train": (TRAIN[0], TRAIN[1] + 9)}, ValueError, "`y` of `train` holds labels"),
        ({"validation": (VALIDATION[0], VALIDATION[1] + 9)}, ValueError, "`y` of `validation`"),
        (
            {"build": lambda: mlp(), "space": {"alpha": [0, 1]}},
            TypeError,
            "called with one argument, a dict of values",
        ),
        ({"sampler": "grid"}, ValueError, "`sampler` is"),
        ({"epochs": 0}, ValueError, "`epochs`"),
        ({"final_epochs": 0}, ValueError, "`final_epochs` is at least 1"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(stubs, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        tune(stubs, tmp_path / "s", **change)
    assert not (tmp_path / "s").exists()
    assert stubs.trained == []


def test_a_build_is_a_function_or_shrink_and_needs_a_model(stubs, tmp_path):
    for build, error in (("shrnk", ValueError), (3, TypeError), (stubs.teacher, TypeError)):
        with pytest.raises(error, match="`build` is"):
            kd.search.tune(build, stubs.teacher, TRAIN, VALIDATION, folder=tmp_path / "s")
    with pytest.raises(TypeError, match="a single Keras model"):
        kd.search.tune("shrink", [stubs.teacher, mlp()], TRAIN, VALIDATION, folder=tmp_path / "s")
    with pytest.raises(TypeError, match="how to distill a teacher"):
        kd.search.tune("shrink", None, TRAIN, VALIDATION, folder=tmp_path / "s")
    with pytest.raises(TypeError, match="`build` returns a `keras.Model`"):
        kd.search.tune(lambda values: 3, stubs.teacher, TRAIN, VALIDATION, folder=tmp_path / "s")


def test_a_folder_of_another_study_is_left_alone(stubs, tmp_path):
    tune(stubs, tmp_path / "s", budget=Budget(None, trials=2))
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    for change, words in (
        ({"epochs": 5}, "its epochs differs .9 there, 5 here"),
        ({"final_epochs": 9}, 'its final_epochs differs ."by default" there, 9 here'),
        ({"space": {"alpha": Float(0, 0.5)}}, "its space differs"),
        ({"minimize": ("error", "bytes")}, "its minimize differs"),
        ({"budget": Budget(None, bytes=10**6, trials=2)}, "its limits differs"),
    ):
        with pytest.raises(FileExistsError, match=words):
            tune(stubs, tmp_path / "s", **change)
    other = mlp(width=16, name="teacher")
    with pytest.raises(FileExistsError, match="its teacher differs"):
        tune(Held(other), tmp_path / "s")
    for name in ("t.keras", "moved/t.keras"):
        two = Budget(None, trials=2)
        moved = tune(stubs, tmp_path / "t", budget=two, config={"teacher": name})
        assert moved.config["teacher"] == name
        assert tune(stubs, tmp_path / "t", budget=two).config["teacher"] == name
    after = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    assert after == before
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other files \(`thesis.txt`\)"):
        tune(stubs, tmp_path / "o")
    assert os.listdir(tmp_path / "o") == ["thesis.txt"]
    kd.cache.write(stubs.teacher, X, tmp_path / "c")
    with pytest.raises(FileExistsError, match="holds a teacher's cache"):
        tune(stubs, tmp_path / "c")
    (tmp_path / "f").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        tune(stubs, tmp_path / "f")


class Held:
    def __init__(self, teacher):
        self.teacher = teacher


def test_a_study_shows_itself(stubs, tmp_path):
    config = {"teacher": "t.keras", "data": "digits"}
    study = tune(stubs, tmp_path / "s", minimize=("error", "bytes"), config=config)
    import tomllib

    saved = tomllib.loads(study.save_config(tmp_path / "c.toml").read_text())
    assert saved == study.config
    best = study.best
    wanted = {
        "task": "classification",
        "teacher": "t.keras",
        "data": "digits",
        "student": f"shrink:{best['width']:g},1",
        "method": best["method"],
        # Three times those of a trial.
        "epochs": 27,
        "batch_size": 32,
        "learning_rate": best["learning_rate"],
        "seed": best["seed"],
        "formats": "tflite",
        "precisions": "int8",
        "max_drop": 1.0,
    }
    if best["method"] != "plain":
        wanted |= {"alpha": best["alpha"], "temperature": best["temperature"]}
    assert saved == wanted
    study.best["width"] = 0.3741592653589793
    assert study.config["student"] == "shrink:0.3741592653589793,1"
    assert study.plot(tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    svg = study.plot(tmp_path / "p.svg", kind="parallel").read_text()
    assert svg.count("<path") > 20
    page = study.save_html(tmp_path / "s.html").read_text()
    assert page.count("<svg") == 2
    assert "src=" not in page
    assert 'href="http' not in page
    for row in study.rows():
        assert f"<td>{row['trial']} {row['role']}</td>" in page
    json.dumps(study.to_dict())
    assert max(map(len, study.table(60).splitlines())) <= 60
    for path, kind in (("p.gif", "front"), ("p.png", "pareto")):
        with pytest.raises(ValueError, match=r"`.png` or `.svg`|`kind` is one of"):
            study.plot(tmp_path / path, kind)
    with pytest.raises(FileNotFoundError, match="holds no search"):
        kd.search.Study(tmp_path)
    assert kd.search.Study(tmp_path / "s").verdict == study.verdict


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"minutes": 0}, ValueError),
        ({"bytes": -1}, ValueError),
        ({"latency_ms": float("inf")}, ValueError),
        ({"trials": 1}, ValueError),
        ({"trials": 2.5}, ValueError),
        ({"minutes": None}, ValueError),
        ({"bytes": "20 KB"}, TypeError),
        ({"minutes": True}, TypeError),
    ],
)
def test_budgets_are_positive_and_end(options, error):
    with pytest.raises(error):
        Budget(**options)


def test_ranges_are_ranges():
    for make in (lambda: Float(1, 1), lambda: Log(0, 1), lambda: Choice(), lambda: Choice(1, 1)):
        with pytest.raises(ValueError, match=r"[Rr]ange|option|Options"):
            make()
    with pytest.raises(TypeError):
        Choice([1, 2])
    for ends in (("a", 1), (0, None), (True, 2)):
        with pytest.raises(TypeError, match="ends of a range are numbers"):
            Float(*ends)
    with pytest.raises(ValueError, match="Options are finite"):
        Choice(float("nan"), 1.0)
    assert Choice(np.float32(0.5), np.int64(1)).options == (0.5, 1)
    assert Log(1, 16).grid() == pytest.approx([1, 2, 4, 8, 16])
    assert Choice(0.25, 1.0).nearest(0.4) == 0.25


def test_the_verdict_is_the_paired_bound():
    plain, defaults = [0.30, 0.32, 0.31], [0.29, 0.30, 0.30]
    role, told = finals.decide(
        {"winner": [0.25, 0.27, 0.25], "plain": plain, "defaults": defaults}, False
    )
    assert role == "winner"
    assert told.startswith("take the winner: +5.33 points over plain")
    role, told = finals.decide(
        {"winner": [0.25, 0.30, 0.33], "plain": plain, "defaults": defaults}, False
    )
    assert role == "defaults"
    assert told.startswith("keep the defaults")
    role, told = finals.decide({"winner": plain, "plain": plain, "defaults": plain}, False)
    assert role == "plain"
    assert told.startswith("keep plain training")


def test_latencies_that_overlap_in_turn_leave_one_on_the_front():
    def trial(slot):
        file = {"bytes": 100, "latency_ms": 1.0}
        return journal.Record(slot, "", {}, "done", {"error": 0.1, "file": file})

    timed = {i: Times(t, t - 0.06, t + 0.06) for i, t in enumerate((1.0, 0.9, 0.8))}
    assert finals.front([trial(i) for i in range(3)], ("error", "latency_ms"), timed) == [2]


def test_a_training_that_a_callback_ends_was_not_behind():
    teacher = mlp(width=3)
    early = keras.callbacks.EarlyStopping("loss", min_delta=100, patience=1)
    rows = Rows(X[:32], Y[:32])
    given = ("shrink", teacher, None, rows, rows, crossentropy(), 9, 32, 0, [early])
    values = {"method": "plain", "alpha": 1.0, "learning_rate": 0.01, "width": 1.0, "depth": 1.0}
    assert candidate.Trainer(*given).trained(values, 0, lambda *_: True)[1] == 9
    assert early.stopped_epoch
    assert candidate.Trainer(*given).trained(values, 0, lambda *_: False)[1] == 1


@pytest.mark.parametrize(
    ("least", "size", "kept", "words"),
    [
        (None, 100, "plain", "keep plain"),
        (0.7, 100, "plain", "keep plain"),
        (0.8, 100, "winner", "but the winner reaches the accuracy"),
        (0.95, 100, "winner", "but the winner comes nearest"),
        (None, 103, "plain", "not reachable: exported again, the file has 103 bytes of 100"),
    ],
)
def test_a_file_that_is_right_often_enough_is_taken(
    tmp_path, monkeypatch, least, size, kept, words
):
    trainer = types.SimpleNamespace(epochs=2)
    runs = finals.Finals(tmp_path, trainer, None, 2, {"method": "DIST", "alpha": 0.1})
    errors = {"winner": (0.4, 0.1), "plain": (0.25, 0.25), "defaults": (0.3, 0.3)}
    for role, (one, two) in errors.items():
        for seed, error in ((1, one), (2, two)):
            file = {"bytes": 100, "latency_ms": 1.0, "low_ms": 1.0}
            path = runs._path(role, seed, "json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"error": error, "file": file}))
    monkeypatch.setattr(finals.Finals, "_export", lambda *_: {"file": "f", "bytes": size})
    budget = Budget(1, bytes=100)
    said = runs.conclude({"trials": 3}, False, budget, lambda *_: None, least)
    assert said["kept"] == kept
    assert words in said["verdict"]
    assert ("best" in said) == (size == 100)
    result = tmp_path / "result.json"
    assert not finals.is_concluded(result, 3, least)
    result.write_text(json.dumps(said))
    asked = [finals.is_concluded(result, trials, least) for trials in (2, 3, 4)]
    assert asked == [True, True, False]
    assert not finals.is_concluded(result, 3, 0.123)


def test_a_search_that_ends_late_leaves_the_result_of_a_longer_one(stubs, tmp_path, monkeypatch):
    trained = finals.Finals.train
    longer = []

    def late(runs, say):
        trained(runs, say)
        if not longer:
            longer.append(None)
            longer.append(tune(stubs, tmp_path / "s", budget=Budget(None, trials=9)))

    monkeypatch.setattr(finals.Finals, "train", late)
    tune(stubs, tmp_path / "s", budget=Budget(None, trials=4))
    assert json.loads((tmp_path / "s" / "result.json").read_text())["trials"] == 9


def test_names_of_losses_are_the_same_in_every_process():
    class Own:
        def __call__(self, y_true, y_pred):
            return 0.0

    named = task.names_of({"a": crossentropy(), "b": Own(), "c": "mse", "d": None})
    assert json.loads(json.dumps(named)) == named
    assert named["a"] == "sparse_categorical_crossentropy"
    assert "0x" not in named["b"]


def test_several_outputs_are_distilled_each_by_its_own_loss():
    inputs = keras.Input((6,))
    outputs = {"b": keras.layers.Dense(4, name="b"), "a": keras.layers.Dense(1, name="a")}
    student = keras.Model(inputs, {name: layer(inputs) for name, layer in outputs.items()})
    y = {"b": Y[:8], "a": X[:8, :1]}
    values = {"method": "default", "alpha": 0.5, "temperature": 1.0}
    for hard, regression, kinds in (
        ({"b": crossentropy(), "a": "mse"}, True, {"b": "SoftTargets", "a": "LogitMSE"}),
        ({"b": crossentropy()}, False, None),
    ):
        rows = Rows(X[:8], y)
        trainer = candidate.Trainer(None, None, None, rows, rows, hard, 1, 8, 0, None)
        losses = trainer.arguments(values, student)["distillation_loss"]
        found = losses and {name: type(loss).__name__ for name, loss in losses.items()}
        assert found == kinds
        assert candidate.is_regression(student, hard) == regression


def test_the_best_file_stays_until_the_result_names_another(tmp_path, monkeypatch):
    digits = Path(__file__).parents[2] / "exported" / "digits"
    student = mlp(width=3, name="student")
    weights = {f"w{i}": array for i, array in enumerate(student.get_weights())}

    def report(student, folder, *_):
        shutil.copytree(digits, folder)
        return kd.export.Report.load(folder)

    trainer = types.SimpleNamespace(
        epochs=2,
        student=lambda values, seed: student,
        validation=types.SimpleNamespace(x=VALIDATION[0], y=VALIDATION[1], weight=None),
    )
    exporter = types.SimpleNamespace(report=report)

    def exported(width):
        values = {"width": width, "precision": "float32"}
        runs = finals.Finals(tmp_path, trainer, exporter, 2, values)
        path = runs._path(finals.WINNER, 1, "npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **weights)
        return tmp_path / runs._export(finals.WINNER, 1)["file"]

    def killed(*_, **__):
        raise KeyboardInterrupt

    first = exported(0.5)
    before = {path.name: path.read_bytes() for path in first.parent.iterdir()}
    assert "student.keras" in before
    second = exported(0.75)
    monkeypatch.setattr(keras.Model, "save", killed)
    # Another search of the folder, and the same one again.
    for width in (1.0, 0.5):
        with pytest.raises(KeyboardInterrupt):
            exported(width)
    assert second.parent != first.parent
    assert {path.name: path.read_bytes() for path in first.parent.iterdir()} == before


def test_a_search_from_end_to_end(teacher, tmp_path):
    built = []

    def build(values):
        built.append(values)
        return mlp(width=values["units"], name="student")

    study = kd.search.tune(
        build,
        teacher,
        TRAIN,
        VALIDATION,
        space={"units": [3, 5], "temperature": Log(1, 4), "colour": ["red", "blue"]},
        minimize=("error", "bytes", "latency_ms"),
        budget=Budget(minutes=None, trials=2, bytes=50_000, latency_ms=50),
        device="tflite-2.14",
        seeds=2,
        folder=tmp_path / "s",
        epochs=2,
        verbose=0,
    )
    assert {values["colour"] for values in built} <= {"red", "blue"}
    assert "width" not in study.best
    assert "student" not in study.config
    path = study.best["file"]
    assert path.stat().st_size == study.best["bytes"] < 50_000
    assert 0 < study.best["latency_ms"] < 50
    answers = kd.export.load(path)(VALIDATION[0])
    assert study.best["error"] == pytest.approx(np.mean(answers.argmax(-1) != VALIDATION[1]))
    report = kd.export.verify(path.parent)
    assert report.best.path == path
    assert report.ok
    assert report.manifest["settings"]["targets"] == ["tflite-2.14"]
    student = keras.saving.load_model(path.parent / "student.keras")
    assert student.count_params() == report.manifest["model"]["parameters"]
    for row in study.rows():
        if row["state"] == "done":
            file = tmp_path / "s" / "trials" / f"{row['trial']}.tflite"
            assert file.stat().st_size == row["bytes"]
    # An untrained file is as large as the trained one, though its biases were 0.
    for trial in journal.read(tmp_path / "s", study.about):
        assert trial.said["weighed"]["bytes"] == trial.said["file"]["bytes"]
