"""Every block of Python in the README and in the pages of `docs/` runs, on small data.

The blocks of a page are one program. What a page takes as given (`x`, `teacher`, a folder) is made
here, and what would take minutes is made short. A block that cannot run here says so in the page,
in a comment before it: `<!-- not run: REASON -->`; the arguments of its calls are compared with
the signatures all the same.
"""

import ast
import inspect
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from small_models import crossentropy

import keras_kd as kd

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
PAGES["README.md"] = ROOT / "README.md"
BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<why>.*?) -->\n)?^ *```python\n(?P<code>.*?)^ *```", re.M | re.S
)

# Pages whose blocks another test runs, with more to look at than that they run.
ELSEWHERE = {
    "README.md": "tests/cli/test_readme.py",
    "distill.md": "tests/cli/test_distill_docs.py",
    "errors.md": "tests/docs/test_errors.py",
    "teachers.md": "tests/teachers/test_page.py",
}

CLASSES, SIZE = 4, 8


def convolutional(width, name=None, classes=CLASSES, channels=1):
    inputs = keras.Input((SIZE, SIZE, channels), name="image")
    x = layers.Conv2D(width, 3, activation="relu", name="conv")(inputs)
    x = layers.GlobalAveragePooling2D(name="embedding")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=name)


def images(count=24, classes=CLASSES, channels=1):
    """Images between 0 and 1, brighter from class to class."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % classes
    x = 0.6 * rng.random((count, SIZE, SIZE, channels)) + 0.4 * (y / classes)[:, None, None, None]
    return x.astype("float32"), y


def given():
    x, y = images()
    names = {
        "tf": tf,
        "keras": keras,
        "kd": kd,
        "np": np,
        "ops": ops,
        "x": x,
        "y": y,
        "loss": crossentropy(),
        "hard": crossentropy(),
    }
    for part in ("train", "val", "validation", "test", "new"):
        names[f"x_{part}"], names[f"y_{part}"] = x, y
    names["student"], names["teacher"] = convolutional(3, "student"), convolutional(6, "teacher")
    names["distiller"] = kd.Distiller(names["student"], names["teacher"])
    names["optimizer"] = "adam"
    return names | of_clients()


def of_clients():
    """What the pages on several owners of data take as given."""

    def rows_of(number=0):
        rng = np.random.default_rng(number)
        y = rng.integers(0, 10, 16)
        return (rng.random((16, 28, 28, 1)) * y[:, None, None, None] / 10).astype("float32"), y

    def make_model():
        model = keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.AveragePooling2D(7),
                layers.Flatten(),
                layers.Dense(10),
            ]
        )
        model.compile("adam", crossentropy())
        return model

    return {
        "load_rows_of": rows_of,
        "load_own_rows": rows_of,
        "load_public_rows": lambda: rows_of()[0],
        "make_model": make_model,
        "make_student": make_model,
        "x_public": rows_of()[0],
    }


# ---------------------------------------------------------------- what pages need before a block


def two_caches(names):
    for folder in ("cache_a", "cache_b"):
        kd.cache.write(names["teacher"], names["x"], folder)


def unlabeled_rows(names):
    names["has_label"] = names["y"] < 3


def images_and_sounds(names):
    sounds = keras.Sequential([keras.Input((5,)), layers.Dense(CLASSES)])
    names |= {"teacher": sounds, "images": names["x"], "y": images()[1]}
    names["sounds"] = np.ones((len(names["x"]), 5), "float32")


def compiled_after(names):
    """The distiller of two inputs is compiled as the one before it."""
    names["distiller"] = kd.Distiller(names["student"], convolutional(6))
    names["distiller"].compile("adam", loss=None)


def one_hot(names):
    names["one_hot"] = np.eye(CLASSES, dtype="float32")[names["y"]]
    names["distiller"].compile("adam", keras.losses.CategoricalCrossentropy(from_logits=True))


def language(names):
    words = 9

    def model(width):
        tokens = keras.Input((None,), dtype="int32")
        x = layers.GRU(width, return_sequences=True)(layers.Embedding(words, width)(tokens))
        return keras.Model(tokens, layers.Dense(words)(x))

    names["tokens"] = np.random.default_rng(0).integers(0, words, (8, 6))
    names["distiller"] = kd.Distiller(model(3), model(5))
    names["distiller"].compile("adam", crossentropy())


def credit(names):
    names["student"] = keras.Sequential(
        [keras.Input((SIZE, SIZE, 1), name="x"), layers.Flatten(), layers.Dense(1, name="score")]
    )
    names |= {"y_val": (images()[1] > 1).astype("int32"), "weights": np.ones(24)}


def photos(names):
    names["student"] = convolutional(3, classes=3, channels=3)
    names["x_val"], names["y_val"] = images(classes=3, channels=3)
    names["x_cal"] = names["x_val"]


def in_service(names):
    keras.utils.set_random_seed(1)
    model = convolutional(4, "in_service")
    names |= {"x_new": names["x"], "y_new": names["y"], "old_student": model}
    kd.export(
        model,
        "service/digits",
        ("tflite",),
        ("int8",),
        calibration=names["x"],
        evaluation=(names["x"], names["y"]),
        max_drop=None,
    )
    model.save("service/digits/student.keras")


def memory_of_rows(names):
    names["memory_x"], names["memory_y"] = names["x"][:2], names["y"][:2]


def a_model(names):
    names["model"] = convolutional(4, "model")


def a_maker(names):
    names["make_student"] = lambda: convolutional(3, "student")


def judged(names):
    """What `...` stands for in the page."""
    names["judged"] = {"evaluation": (names["x"], names["y"]), "max_drop": None}


def of_digits(names):
    names["x_test"], names["y_test"] = names["load_rows_of"]()


def clients(names):
    names["makers_of_many_clients"] = [names["make_client"](number) for number in range(3)]


BEFORE = {
    ("cache.md", 4): two_caches,
    ("data.md", 1): unlabeled_rows,
    ("data.md", 2): images_and_sounds,
    ("data.md", 3): compiled_after,
    ("data.md", 4): one_hot,
    ("data.md", 5): language,
    ("export.md", 2): credit,
    ("export.md", 3): lambda names: names.update(images=images()[0]),
    ("export.md", 4): photos,
    ("federated.md", 1): of_digits,
    ("federated.md", 2): clients,
    ("lifelong.md", 1): a_model,
    ("lifelong.md", 2): in_service,
    ("objectives.md", 2): memory_of_rows,
    ("robust.md", 3): judged,
    ("search.md", 1): a_maker,
}

# What takes its time at full length.
SHORTER = {
    "cache.md": [("epochs=20", "epochs=1"), ("epochs=30", "epochs=2"), ("top_k=100", "top_k=2")],
    "choose/runtime.md": [("epochs=30", "epochs=1"), ("max_drop=0.1", "max_drop=None")],
    "data.md": [("epochs=300", "epochs=1")],
    "export.md": [
        ('"exported/digits",\n', '"exported/digits", ("tflite",), ("int8",),\n'),
        ('"exported/credit",\n', '"exported/credit", ("tflite",), ("float32",),\n'),
        ('precisions=("float32", "int8", "uint8")', 'formats=("tflite",), precisions=("uint8",)'),
        ("max_drop=0.01,", "max_drop=None,"),
        (
            "evaluation=(x_val, y_val),\n    labels",
            "evaluation=(x_val, y_val), max_drop=None,\n    labels",
        ),
    ],
    "federated.md": [
        ("range(10)", "range(2)"),
        ("rounds=10, queries=500", "rounds=1, queries=8"),
        ('"runs/federation/exported", ', '"runs/federation/exported", ("tflite",), ("float32",), '),
    ],
    "lifelong.md": [
        ("tasks=5", "tasks=2"),
        ("Memory(200", "Memory(8"),
        ("max_drop=0.01", "max_drop=1.0, epochs=1"),
    ],
    "robust.md": [
        ("epochs=100", "epochs=1"),
        ("steps=10", "steps=2"),
        ("steps=20, restarts=2", "steps=2"),
        ('    second_opinion="art",\n', ""),
        ('corruptions="all"', 'corruptions=["contrast"], queries=5'),
        ('"exported/student", ...', '"exported/student", ("tflite",), ("float32",), **judged'),
    ],
    "search.md": [
        (
            "(x_val, y_val))\n",
            "(x_val, y_val), methods=['default'], seeds=2, epochs=1, loss=hard)\n",
        )
    ],
    "start.md": [
        ("epochs=30", "epochs=1"),
        ('"runs/first",', '"runs/first", ("tflite",), ("int8",), max_drop=None,'),
    ],
}


def blocks(page):
    """Number, code and reason not to run of each block of a page."""
    text = PAGES[page].read_text(encoding="utf-8")
    for number, found in enumerate(BLOCK.finditer(text), 1):
        code = found["code"]
        for long, short in SHORTER.get(page, ()):
            code = code.replace(long, short)
        yield number, code, found["why"]


def called(node):
    """The object that `kd.a.b` names in a tree, else nothing."""
    if isinstance(node, ast.Attribute):
        base = called(node.value)
        return None if base is None else getattr(base, node.attr)
    return kd if isinstance(node, ast.Name) and node.id == "kd" else None


def bind(code):
    """Compare the calls of our names with their signatures."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and (function := called(node.func)) is not None:
            words = {word.arg: None for word in node.keywords if word.arg}
            inspect.signature(function).bind_partial(*node.args, **words)


def with_code(page):
    return BLOCK.search(PAGES[page].read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize(
    "page", [page for page in PAGES if with_code(page) and page not in ELSEWHERE]
)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given()
    for number, code, why in blocks(page):
        if why:
            assert len(why) > 20, f"block {number} of {page}: give the reason in words"
            bind(code)
            continue
        if (page, number) in BEFORE:
            BEFORE[page, number](names)
        exec(compile(code, f"{page}, block {number}", "exec"), names)


def test_what_is_short_and_prepared_is_there():
    for page, changes in SHORTER.items():
        if page not in PAGES:
            continue
        text = PAGES[page].read_text(encoding="utf-8")
        for long, _ in changes:
            assert long in text, f"{page} has no {long!r} any more"
    for page, number in BEFORE:
        if page not in PAGES:
            continue
        assert number <= len(list(blocks(page))), page
    for page, test in ELSEWHERE.items():
        assert with_code(page)
        assert (ROOT / test).is_file()
