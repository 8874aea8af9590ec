"""`keras-kd distill`: every task from end to end, reruns, configurations, and bad input."""

import hashlib
import json
import tomllib
import types
import wave
from pathlib import Path

import keras
import numpy as np
import pytest
import tomli_w
from sklearn import metrics

from keras_kd.cli import distill_result, distill_training, recipes, teachers
from keras_kd.cli.recipes import RECIPES
from keras_kd.datasets import load_task, task_data

layers = keras.layers


def dense(shape, units, width=16, activation=None, name="teacher"):
    return keras.Sequential(
        [
            keras.Input(shape, name="x"),
            layers.Dense(width, activation="relu"),
            layers.Dense(units, activation=activation),
        ],
        name=name,
    )


def reader(units, length, words=9):
    return keras.Sequential(
        [
            keras.Input((length,), name="x"),
            layers.Embedding(words, 8),
            layers.Conv1D(8, 3, padding="same", activation="relu"),
            layers.Dense(units),
        ],
        name="teacher",
    )


def save(path, *arrays, **named):
    np.savez(path, *arrays, **named)
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Data and a trained teacher of each task, by name: paths."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 6)).astype("float32")
    w = generator.normal(size=(6, 12)).astype("float32")
    z = x @ w
    tags = "".join(
        "".join(f"{a}\t{b}\n" for a, b in (("Ada", "B-p"), (f"w{i % 3}", "I-p"), ("ran", "O")))
        + "\n"
        for i in range(60)
    )
    (folder / "tokens.conll").write_text(tags)
    rows = "\n".join(f"{a:.4f},{b:.4f},{'ab'[int(a + b > 0)]}" for a, b, *_ in x)
    (folder / "classification.csv").write_text(f"left,right,label\n{rows}\n")
    save(folder / "multilabel.npz", x=x, y=(z[:, :3] > 1).astype("uint8"))
    save(folder / "regression.npz", x=x, y=z[:, :2])
    save(folder / "ranking.npz", x=x, y=np.maximum(np.round(z), 0))
    made = {}
    for task, model, loss, options in (
        ("classification", dense((2,), 2), "sparse_categorical_crossentropy", {"target": "label"}),
        ("multilabel", dense((6,), 3, activation="sigmoid"), "binary_crossentropy", {}),
        ("regression", dense((6,), 2), "mse", {}),
        ("ranking", dense((6,), 12), "mse", {}),
        ("tokens", reader(3, 3), "sparse_categorical_crossentropy", {}),
    ):
        data = next(folder.glob(f"{task}.*"))
        loaded = load_task(data, task, **options)
        loss = keras.losses.get(loss)
        if "sparse" in loss.__name__:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
        keras.utils.set_random_seed(1)
        model.compile(keras.optimizers.Adam(0.02), loss)
        model.fit(loaded.train.x, loaded.train.y, epochs=6, verbose=0)
        model.save(folder / f"{task}.keras")
        made[task] = (data, folder / f"{task}.keras")
    return made


def asked(job, task, *more, student="shrink:0.5", method="default"):
    data, teacher = job[task]
    target = ("--target", "label") if task == "classification" else ()
    return (
        *("distill", "--data", data, "--task", task, *target, "--teacher", teacher),
        *("--student", student, "--method", method, "--epochs", "6", "--learning-rate", "0.02"),
        *("--precisions", "float32", *more),
    )


@pytest.mark.parametrize("task", list(RECIPES))
def test_a_task_from_end_to_end(run, tmp_path, job, task):
    # One format: this is about the tasks.
    more = ("--out", "out", "--json", "--max-drop", "0.2", "--formats", "onnx")
    code, out, err = run(*asked(job, task, *more))
    assert code == 0, err
    document = json.loads(out)
    stored = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert {**stored, "out": "out"} == document
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"student.keras", "report.html", "inputs.json", "distill.toml", "manifest.json"} < names
    assert document["best"] in names
    # The figures of the student and of its files, by scikit-learn.
    options = {"target": "label"} if task == "classification" else {}
    test = load_task(job[task][0], task, **options).test
    student = keras.models.load_model(tmp_path / "out" / "student.keras")
    outputs = student.predict(test.x, verbose=0)
    found = document["models"]["student"]
    if task == "classification":
        decided = outputs.argmax(axis=1)
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(test.y, decided))
        assert found["macro_f1"] == pytest.approx(
            metrics.f1_score(test.y, decided, average="macro")
        )
        assert found["auc"] == pytest.approx(
            metrics.roc_auc_score(test.y, outputs[:, 1] - outputs[:, 0])
        )
    elif task == "multilabel":
        decided = outputs > (0.5 if outputs.min() >= 0 and outputs.max() <= 1 else 0)
        assert found["macro_f1"] == pytest.approx(
            metrics.f1_score(test.y, decided, average="macro", zero_division=0)
        )
        precision = metrics.precision_score(test.y, decided, average=None, zero_division=0)
        np.testing.assert_allclose(found["per_class"]["precision"], precision)
    elif task == "regression":
        assert found["mae"] == pytest.approx(metrics.mean_absolute_error(test.y, outputs), rel=1e-5)
        assert found["rmse"] == pytest.approx(
            np.sqrt(np.mean((test.y - outputs) ** 2, dtype="float64")), rel=1e-5
        )
    elif task == "ranking":
        assert found["ndcg@10"] == pytest.approx(metrics.ndcg_score(test.y, outputs, k=10))
        assert set(found) & {"mae", "accuracy"} == set()
    else:
        counted = test.y >= 0
        decided = outputs.argmax(axis=-1)[counted]
        assert found["macro_f1"] == pytest.approx(
            metrics.f1_score(test.y[counted], decided, average="macro")
        )
        # One entity a sentence: right where all three tags are.
        names = load_task(job[task][0], task).class_names
        assert names == ("O", "B-p", "I-p")
        whole = (outputs.argmax(axis=-1) == test.y).all(axis=1)
        assert found["per_entity"]["support"] == [len(test.y)]
        assert found["entity_recall"] == pytest.approx(whole.mean(), abs=1e-9)
        assert "entities of onnx float32" in run("report", "out")[1]
    judge = document["metric"]
    assert judge == RECIPES[task].judges[0]
    for row in document["files"]:
        assert row["verified"], row
        assert row[judge] == pytest.approx(found[judge], abs=0.02)
    assert not any("no better than" in line for line in distill_result.remarks(document, tmp_path))


@pytest.mark.parametrize("columns", [40, 60, 100, 160])
@pytest.mark.parametrize("task", list(RECIPES))
def test_the_tables_fit_and_say_the_metric(task, columns):
    figures = dict.fromkeys(RECIPES[task].shown, 0.91234)
    per_class = {key: [0.5, 0.25] for key in ("precision", "recall", "f1")} | {"support": [9, 1234]}
    model = {"name": "m", "parameters": 9_000, "bytes": 36_000, "latency_ms": 0.5, **figures}
    file = {
        "name": "onnx float32",
        "file": "a.onnx",
        "bytes": 9_000,
        "gzip_bytes": 8_000,
        "latency_ms": 0.01,
        "verified": True,
        "reason": "",
        "flags": [],
    }
    failed = {**dict.fromkeys(file), "name": "onnx int8", "reason": "it fell", "flags": ["slow"]}
    result = {
        "data": {
            "task": task,
            "samples": {"train": 10, "validation": 3, "test": 4},
            "classes": ["yes", "no"],
        },
        "metric": RECIPES[task].judges[0],
        "models": {"teacher": model, "student": {**model, "per_class": per_class}},
        "files": [{**file, **figures, "per_class": per_class}, failed],
        "best": "a.onnx",
        "max_drop": 0.01,
        "trivial": {"mae": 0.5} if task == "regression" else {"accuracy": 0.95},
        "seconds": 3.0,
    }
    for text in distill_result.tables(result, columns):
        assert max(map(len, text.splitlines()), default=0) <= columns
    from keras_kd.export.report.scorecard import heading

    assert heading(result["metric"]) in distill_result.tables(result, columns)[0]
    lines = distill_result.remarks(result, Path("out"))
    assert any("Take a.onnx" in line for line in lines)
    worse = [line for line in lines if "no better than answering" in line]
    assert len(worse) == (2 if task in ("classification", "multilabel", "tokens") else 0) or (
        task == "regression" and "the mean target" in worse[0]
    )
    assert "x onnx int8: it fell." in lines


def test_a_rerun_gives_the_same_files(run, tmp_path, job):
    arguments = asked(job, "classification", "--out", "one", "--save-config", "job.toml", "--quiet")
    code, out, err = run(*arguments, "--seed", "3")
    assert (code, err) == (0, "")
    assert "classes of" in out
    saved = tomllib.loads((tmp_path / "job.toml").read_text())
    assert saved["seed"] == 3
    assert saved["teacher"] == [str(job["classification"][1])]
    code, _, err = run("distill", "--config", "job.toml", "--out", "two", "--quiet")
    assert (code, err) == (0, "")

    def digests(folder):
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / folder).iterdir()
            if path.suffix in (".tflite", ".onnx") or path.name == "inputs.json"
        }

    assert len(digests("one")) == 3
    assert digests("one") == digests("two")
    again = tomllib.loads((tmp_path / "two" / "distill.toml").read_text())
    assert {**again, "out": "one"} == saved


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("Training has started.")

    monkeypatch.setattr(distill_training, "train", never)

    def command(*arguments):
        before = tree(tmp_path)
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("keras-kd: ")
        assert err.count("\n") == 1, err
        assert tree(tmp_path) == before
        return err

    return command


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"epoch": 3}, "has the key `epoch`, which is no option.*Did you mean `epochs`"),
        ({"epochs": "many"}, "`epochs` in `c.toml` is of type integer. Received: 'many'"),
        ({"epochs": 2.5}, "is of type integer"),
        ({"epochs": True}, "is of type integer"),
        ({"epochs": 0}, "'--epochs'"),
        ({"alpha": "half"}, "is of type number"),
        ({"data": ["a.npz"]}, "`data` in `c.toml` is of type text"),
        ({"teacher": [1]}, "is of type text or a list of them"),
        ({"standardize": 1}, "is of type boolean"),
        ({"leave-out": "a", "leave_out": "b"}, "gives `leave_out` twice"),
        ({"config": "d.toml"}, "has the key `config`"),
        ({"task": "clasification"}, "`--data` is missing"),
    ],
)
def test_configurations_that_cannot_be_used(refused, tmp_path, config, reason):
    import re

    (tmp_path / "c.toml").write_text(tomli_w.dumps(config))
    assert re.search(reason, refused("distill", "--config", "c.toml"))


def test_files_that_are_no_configuration(refused, tmp_path):
    assert "`missing.toml` does not exist" in refused("distill", "--config", "missing.toml")
    (tmp_path / "c.toml").write_text("epochs = \n")
    assert "is no TOML" in refused("distill", "--config", "c.toml")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--task", "clasification"], "Did you mean `classification`"),
        (["--method", "SoftTarget"], "Did you mean `SoftTargets`"),
        (["--method", "hint"], "compares inner layers, which are named in Python"),
        (["--method", "plain", "--alpha", "0.3"], "`--method plain` reads no `--alpha`"),
        (["--method", "auto", "--temperature", "3"], "reads no `--temperature`"),
        (["--alpha", "1.5"], "`--alpha` is in [0, 1]"),
        (["--alpha", "0.5", "--label-weight", "1"], "Leave it out beside the two weights"),
        (["--temperature", "0"], "is above 0"),
        (["--learning-rate", "-1"], "`--learning-rate` is above 0"),
        (["--student", "shrink"], "is no student"),
        (["--student", "shrink:2"], "is no student"),
        (["--student", "shrink:0.5,0.5,0.5"], "is no student"),
        (["--student", "missing.keras"], "The student `missing.keras` does not exist"),
        (["--teacher", "missing.onnx"], "The teacher `missing.onnx` does not exist"),
        (["--teacher", "gradient-bosting"], "Did you mean `gradient-boosting`"),
        (["--teacher", "x.txt"], "is no teacher"),
        (["--target", "labl"], "Did you mean `label`"),
        (["--text", "label"], "is the target"),
        (["--image-size", "8"], "`image_size` does not apply to"),
        (["--out", "taken"], "--overwrite"),
        (["--out", ""], "`--out` is empty"),
        (["--out", "taken", "--out", "other"], "`--out` is given twice"),
        (["--formats", "tf"], "`tf` is not known for `formats`"),
        (["--formats", ","], "`formats` is empty"),
        (["--precisions", "int3"], "Did you mean `int8`"),
        (["--max-drop", "nan"], "`max_drop` must lie in [0, 1]"),
        (["--metrics", "acuracy"], "Did you mean `accuracy`"),
        (["--metrics", "mae"], "it is no figure of these answers and labels"),
        (["--seed", str(2**32)], "less than or equal to 4294967295"),
        (["--save-config", "taken"], "is in the way of a file of that name"),
        (["--save-config", "nowhere/c.toml"], "there is no folder `nowhere`"),
        (["--save-config", ""], "`--save-config` is empty"),
        (["--teacher", ""], "`` is no teacher"),
        (["--method", "BinarySoftTargets"], "does not fit the task `classification`"),
        (["--classes", "a,c"], "is of class `b`, which is none of those"),
        (["--classes", "a,b,c"], "needs (batch, 3): a, b, c"),
        (["--data", "missing.csv"], "`missing.csv` does not exist"),
        (["--data", "missing"], "are no data"),
    ],
)
def test_bad_input(refused, tmp_path, job, change, reason):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kept.txt").write_text("x")
    arguments = [str(word) for word in asked(job, "classification")]
    if change[0] in arguments and change[0] != "--teacher":
        place = arguments.index(change[0])
        del arguments[place : place + 2]
    if change[0] == "--teacher":
        place = arguments.index("--teacher")
        del arguments[place : place + 2]
    assert reason in refused(*arguments, *change)


def sound(folder, name, rate):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(folder / name), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"\0\1" * 8)


def test_bad_data_are_named_before_any_model_is_read(refused, tmp_path):
    for name in "ab":
        for i in range(4):
            sound(tmp_path / "sounds", f"{name}/{i}.wav", 8000)
        sound(tmp_path / "others", f"{name}/0.wav", 16000)
    (tmp_path / "a.csv").write_text("text,y\n" + "hello,0\nworld,1\n" * 8)
    (tmp_path / "b.csv").write_text("text,y\nhello,0\n\u200b,1\n", encoding="utf-8")
    (tmp_path / "a.conll").write_text("Bern\tB-place\n\n" * 8)
    (tmp_path / "b.conll").write_text("in\tO\nBern\tI-place\n\n")
    (tmp_path / "teacher.keras").write_bytes(b"never read")
    models = ("--teacher", "teacher.keras", "--student", "shrink:0.5")
    for data, test, more, reason in (
        ("sounds", "others", (), "a/0.wav` has 16,000 samples a second"),
        ("a.csv", "b.csv", ("--target", "y", "--text", "text"), "`b.csv`, line 3: the text `text`"),
        ("a.conll", "b.conll", ("--task", "tokens"), "`b.conll`, line 2: `I-place` follows `O`"),
    ):
        assert reason in refused("distill", "--data", data, "--test", test, *more, *models)


def test_models_that_do_not_fit(refused, tmp_path, job, monkeypatch):
    import keras_kd.teachers

    dense((3,), 2).save("wide.keras")
    dense((2,), 3).save("many.keras")
    keras.Sequential([keras.Input((3,)), layers.Embedding(3, 4), layers.Dense(3)]).save("few.keras")
    assert "takes" in refused(*asked(job, "classification", student="wide.keras"))
    assert "needs (batch, 2)" in refused(*asked(job, "classification", student="many.keras"))
    assert "has 3 rows, and the vocabulary" in refused(*asked(job, "tokens", student="few.keras"))
    (tmp_path / "empty.npz").write_bytes(b"x")
    data, _ = job["classification"]
    monkeypatch.setattr(keras_kd.teachers, "from_sklearn", lambda made, **_: made, raising=False)
    common = ("distill", "--data", data, "--target", "label", "--method", "default")
    said = refused(*common, "--teacher", "gradient-boosting", "--student", "shrink:0.5")
    assert "from a Keras teacher, and `gradient-boosting` is none" in said


# ---------------------------------------------------------------- teachers by name


@pytest.fixture
def answered(tmp_path, job, monkeypatch):
    """Data, and how a file of answers is taken in."""
    import keras_kd.cache
    import keras_kd.teachers

    taken = {}

    def write_answers(path, inputs, **given):
        taken.update(path=path, inputs=inputs, **given)

    monkeypatch.setattr(keras_kd.cache, "write_answers", write_answers, raising=False)
    monkeypatch.setattr(keras_kd.teachers, "CachedTeacher", lambda path: ("cached", path))
    return load_task(job["classification"][0], target="label"), taken


def test_answers_follow_the_rows_that_are_trained_on(tmp_path, answered):
    import contextlib

    data, taken = answered
    logits = np.arange(600.0).reshape(300, 2)
    save(tmp_path / "a.npz", logits=logits, class_names=["a", "b"])
    with contextlib.ExitStack() as stack:
        found = teachers.load(str(tmp_path / "a.npz"), data, stack)
        np.testing.assert_array_equal(taken["logits"], logits[data.train.index])
        np.testing.assert_array_equal(found.test_answers(data), logits[data.test.index])
    with pytest.raises(ValueError, match="no ensemble asks"):
        teachers.together([found, found])
    indices = np.arange(300)[:, None] % 2
    save(tmp_path / "b.npz", indices=indices, log_probabilities=np.zeros((300, 1)))
    with contextlib.ExitStack() as stack:
        found = teachers.load(str(tmp_path / "b.npz"), data, stack)
    np.testing.assert_array_equal(taken["top_k"][0], indices[data.train.index])
    assert taken["vocabulary"] == 2
    assert found.test_answers(data) is None


LOGITS = np.random.default_rng(0).normal(size=(300, 2))


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"logits": np.zeros((299, 2))}, "299 answers, but .* has 300 rows"),
        ({"logits": np.zeros((300, 3))}, "shape .300, 3., but .* needs .'rows', 2."),
        ({"outputs": np.zeros((300, 2))}, "answers are `logits`, `probabilities`, or `indices`"),
        ({"indices": np.zeros((300, 2)), "logits": np.zeros((300, 2))}, "answers are `logits`"),
        ({"log_probabilities": np.zeros((300, 2))}, "answers are `logits`"),
        ({"logits": np.zeros((300, 2)), "class_names": ["b", "a"]}, "another order: number 0"),
        ({"logits": np.zeros((300, 2)), "class_names": ["a", "z"]}, "`z` is none of these"),
        # Rows are told by their number in the file, those that are not trained on too.
        *(
            ({"logits": np.where(np.arange(300)[:, None] == row, np.nan, 0.5 * LOGITS)}, said)
            for row in (3, 4, 5, 6, 7, 8)
            for said in [f"a.npz`: `logits` of row {row} are NaN"]
        ),
        (
            {"indices": np.zeros((200, 1), int), "log_probabilities": np.zeros((300, 1))},
            r"a.npz`: The indices and .* \(200, 1\) and \(300, 1\)",
        ),
    ],
)
def test_answers_that_do_not_fit(tmp_path, answered, arrays, reason):
    import contextlib

    save(tmp_path / "a.npz", **arrays)
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match=reason):
        teachers.load(str(tmp_path / "a.npz"), answered[0], stack)


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_files_of_other_runtimes_are_asked_for_by_their_door(tmp_path, job, monkeypatch, name):
    import keras_kd.teachers

    path = tmp_path / f"teacher.{name}"
    path.write_bytes(b"model")
    data = load_task(job["classification"][0], target="label")

    class Made:
        classes = None
        shapes = None

        def __init__(self, given):
            self.given = given

        def output_shapes(self):
            return self.shapes

        def answer(self, x):
            return types.SimpleNamespace(output=2 * x)

    monkeypatch.setattr(keras_kd.teachers, f"from_{name}", Made, raising=False)
    teachers.check(str(path))
    found = teachers.load(str(path), data, None)
    assert found.teacher.given == str(path)
    np.testing.assert_allclose(found.test_answers(data), 2 * data.test.x)
    monkeypatch.setattr(Made, "classes", ["b", "a"])
    with pytest.raises(ValueError, match="another order: number 0 is `b` there"):
        teachers.load(str(path), data, None)
    monkeypatch.setattr(Made, "classes", None)
    monkeypatch.setattr(Made, "shapes", [(None, 3)])
    with pytest.raises(ValueError, match="answers 3 numbers a row, .* needs 2"):
        teachers.load(str(path), data, None)


def test_an_estimator_is_trained_on_the_rows_with_a_label(monkeypatch, tmp_path):
    import keras_kd.teachers

    monkeypatch.setattr(keras_kd.teachers, "from_sklearn", lambda made, **_: made, raising=False)
    x = np.random.default_rng(0).normal(size=(200, 2))
    y = np.where(np.arange(200) % 2, (x[:, 0] > 0).astype(int), -1)
    save(tmp_path / "a.npz", x=x, y=y)
    data = load_task(tmp_path / "a.npz")
    made = teachers.load("random-forest", data, None).teacher
    assert made.score(data.test.x, data.test.y) > 0.8
    assert list(made.classes_) == [0, 1]
    save(tmp_path / "b.npz", x=x, y=np.abs(y) * 2)
    with pytest.raises(ValueError, match="class `1` has no training row"):
        teachers.load("random-forest", load_task(tmp_path / "b.npz"), None)
    save(tmp_path / "c.npz", x=x[:, None], y=np.abs(y))
    with pytest.raises(ValueError, match="rows of plain numbers"):
        teachers.load("random-forest", load_task(tmp_path / "c.npz"), None)


# ---------------------------------------------------------------- recipes


def test_gains_become_shares():
    gains = np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]], "float32")
    np.testing.assert_allclose(recipes.targets("ranking", gains), [[0.75, 0.25, 0], [0, 0, 0]])


def test_the_hard_loss_follows_the_end_of_the_student():
    x = np.ones((4, 2), "float32")
    for activation, logits in ((None, True), ("softmax", False)):
        loss = recipes.hard_loss("classification", dense((2,), 3, activation=activation), x, True)
        assert (loss.get_config()["from_logits"], loss.ignore_class) == (logits, -1)
    loss = recipes.hard_loss("classification", dense((2,), 1, activation="sigmoid"), x, False)
    assert isinstance(loss, keras.losses.BinaryCrossentropy)
    with pytest.raises(ValueError, match="one unit for each class"):
        recipes.hard_loss("classification", dense((2,), 1), x, True)


@pytest.mark.parametrize("method", [*recipes.METHODS[4:], recipes.STANDARDIZED, recipes.DEFAULT])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_a_method_fits_the_task_or_is_refused(method, task):
    import keras_kd

    x = np.zeros((8, 3), "float32")
    student, teacher = dense((3,), 3), dense((3,), 3)
    plain = ("LogitMSE", "LogitHuber", recipes.DEFAULT)
    classes = method != "BinarySoftTargets"
    if method not in plain and (task == "regression" or classes == (task == "multilabel")):
        with pytest.raises(ValueError, match="Choose `default`"):
            recipes.distillation(method, task)
        return
    compiled = recipes.distillation(method, task)
    distiller = keras_kd.Distiller(student, teacher)
    distiller.compile(
        "sgd", loss=recipes.hard_loss(task, student, x, False), run_eagerly=True, **compiled
    )
    labels = np.zeros(8, "int32") if task == "classification" else np.zeros((8, 3), "float32")
    logs = distiller.train_on_batch(x, labels, return_dict=True)
    assert np.isfinite(logs["loss"])


COLUMNS = [{"name": "age", "mean": 0, "std": 1}, {"name": "job", "values": ["a", "b", "c"]}]


@pytest.mark.parametrize(
    ("kind", "have", "want", "cure"),
    [
        ({"kind": "text", "length": 5}, (5,), (7,), "`--length 7` reads as many of each"),
        ({"kind": "audio", "length": 5}, (5,), (800,), "`--length 800` reads as many of each"),
        ({"kind": "table", "columns": COLUMNS}, (4,), (2,), "its categories: `job` has 3"),
        ({"kind": "images"}, (8, 8, 3), (9, 9, 3), "`--image-size 9` resizes those"),
        ({"kind": "images"}, (8, 8, 3), (8, 8, 1), "that of the channels, 1 for gray"),
        ({"kind": "arrays"}, (8,), (3,), "Store rows of that shape"),
    ],
)
def test_rows_of_another_shape_are_told_with_the_option(kind, have, want, cure):
    rows = task_data.Rows(np.zeros((4, *have), "float32"), np.arange(4) % 2, np.arange(4))
    data = task_data.TaskData("d", "classification", rows, rows, rows, ("a", "b"), kind)
    flat = [keras.Input(want), layers.Flatten(), layers.Dense(2)]
    with pytest.raises(ValueError, match="student `.*` takes rows of shape .*" + cure):
        recipes.check_model(keras.Sequential(flat), "student", data)


def test_auto_is_asked_for_by_its_name():
    assert recipes.distillation("auto", "classification") == {"distillation_loss": "auto"}


def test_what_needs_no_model_is_worth():
    data = load_task("digits")
    most = np.bincount(data.train.y).argmax()
    assert distill_result.trivial(data)["accuracy"] == pytest.approx(np.mean(data.test.y == most))


def test_the_same_tag_everywhere_is_worth(job):
    data = load_task(job["tokens"][0], "tokens")
    truth = data.test.y[data.test.y >= 0]
    often = np.bincount(data.train.y[data.train.y >= 0]).argmax()
    expected = metrics.f1_score(truth, np.full(len(truth), often), average="macro")
    assert distill_result.trivial(data)["macro_f1"] == pytest.approx(expected)
    data = load_task(job["regression"][0], "regression")
    expected = metrics.mean_absolute_error(
        data.test.y, np.broadcast_to(data.train.y.mean(axis=0), data.test.y.shape)
    )
    assert distill_result.trivial(data)["mae"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def lists_of_items(tmp_path_factory):
    """Forty lists of two to twelve items in one table, and a student of one unit."""
    folder = tmp_path_factory.mktemp("lists")
    rng = np.random.default_rng(3)
    lines = ["query,price,stars,gain"]
    rows = [(q, *rng.normal(size=2)) for q in range(40) for _ in range(2 + q % 11)]
    for q, price, stars in rng.permutation(rows):
        lines.append(f"q{q:.0f},{price:.7f},{stars:.7f},{max(0, round(stars - price))}")
    (folder / "items.csv").write_text("\n".join(lines) + "\n")
    keras.utils.set_random_seed(0)
    dense((2,), 1).save(folder / "student.keras")
    return folder


def test_lists_whose_items_are_rows(run, lists_of_items):
    folder = lists_of_items
    options = {"target": "gain", "group": "query"}
    data = load_task(folder / "items.csv", "ranking", **options)
    assert data.train.x.shape[1] == 2
    assert data.units == 1
    assert data.learns == "regression"
    found = [set(np.unique(rows.groups)) for rows in (data.train, data.validation, data.test)]
    assert [len(each) for each in found] == [29, 3, 8]
    assert set.union(*found) == set(range(40))
    code, out, err = run(
        *("distill", "--data", folder / "items.csv", "--task", "ranking", "--target", "gain"),
        *("--group", "query", "--teacher", "random-forest", "--out", "out", "--json"),
        *("--student", folder / "student.keras", "--method", "default", "--epochs", "20"),
        *("--learning-rate", "0.02", "--formats", "onnx", "--precisions", "float32"),
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["metric"] == "ndcg@10"
    assert document["data"]["groups"] == {"train": 29, "validation": 3, "test": 8}
    outputs = keras.models.load_model("out/student.keras").predict(data.test.x, verbose=0)
    each = [
        metrics.ndcg_score(data.test.y[at].T, outputs[at].T, k=10)
        for at in (data.test.groups == group for group in found[2])
    ]
    assert document["models"]["student"]["ndcg@10"] == pytest.approx(np.mean(each))
    assert document["models"]["teacher"]["ndcg@10"] > 0.6
    (file,) = document["files"]
    assert file["verified"]
    assert file["ndcg@10"] == pytest.approx(np.mean(each), abs=0.01)
    # The lists travel with the samples, so that it is measured again.
    code, out, _ = run("verify", "out", "--json")
    proven = json.loads(out)
    assert code == 0
    assert not proven["evaluation"]["not_measured"]
    (kind,) = proven["evaluation"]["kinds"].values()
    assert kind["kind"] == "values"
    scored = keras.models.load_model("out/student.keras").predict(data.validation.x, verbose=0)
    by_list = [
        metrics.ndcg_score(data.validation.y[at].T, scored[at].T, k=10)
        for at in (data.validation.groups == group for group in found[1])
    ]
    assert proven["metric"] == "ndcg@10"
    assert proven["rows"][1]["score"] == pytest.approx(np.mean(by_list), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group": "querry"}, "Did you mean `query`"),
        ({"group": "gain"}, "is the target, and cannot be the group too"),
        ({"group": "query", "target": ["gain", "stars"]}, "each row is one item"),
        ({"group": "price"}, "has one row, and nothing to rank"),
        ({"group": "query", "task": "regression"}, "Pass `--task ranking`"),
    ],
)
def test_groups_that_make_no_lists(lists_of_items, options, reason):
    given = {"task": "ranking", "target": "gain", **options}
    with pytest.raises(ValueError, match=reason):
        load_task(lists_of_items / "items.csv", **given)


def test_a_missing_group_is_told_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("q,x,y\na,1,2\na,2,0\n ,3,1\n")
    with pytest.raises(ValueError, match="line 4: the group `q` is missing"):
        load_task(tmp_path / "a.csv", "ranking", target="y", group="q")
