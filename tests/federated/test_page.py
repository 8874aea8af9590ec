"""What `docs/federated.md` shows runs as it stands there, on fewer rows and in fewer rounds."""

import functools
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_kd

PAGE = Path(__file__).parents[2] / "docs" / "federated.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def images(seed, count):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 10, count)
    x = rng.uniform(0, 0.2, (count, 28, 28, 1)).astype("float32")
    x[np.arange(count), y, :, 0] = 1.0
    return x, y


@pytest.fixture
def names():
    x, y = images(0, 40)
    return {
        "load_rows_of": lambda number: images(number, 40),
        "load_own_rows": lambda: images(1, 40),
        "load_public_rows": lambda: x,
        "make_model": lambda: keras.Sequential(
            [keras.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
        ),
        "makers_of_many_clients": [lambda: None] * 3,
        "x_public": x,
        "x_test": x,
        "y_test": y,
    }


def test_a_federation_ends_in_an_exported_verified_student(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    # One file is enough here: the exporter has tests of its own.
    few = functools.partial(keras_kd.export, formats=("onnx",), precisions=("float32",))
    monkeypatch.setattr(keras_kd, "export", few, raising=False)
    block = BLOCKS[0]
    for many, less in (
        ("range(10)", "range(2)"),
        ("rounds=10, queries=500", "rounds=1, queries=30"),
    ):
        assert many in block
        block = block.replace(many, less)
    exec(block, names)
    assert len(names["history"].rounds) == 1
    report = few(names["federation"].student, "again", calibration=names["x_public"])
    assert [row.passed for row in report.artifacts] == [True]
    assert list((tmp_path / "runs/federation/exported").glob("*.onnx"))


def test_the_other_blocks_make_what_they_say(tmp_path, names):
    names["kd"] = keras_kd
    exec(BLOCKS[1], names)
    assert names["federation"].privacy.noise_multiplier == 10.0
    names["make_student"] = names["make_model"]
    server = BLOCKS[2].replace("/srv/federation", str(tmp_path))
    exec(server, names)
    federation = names["make_federation"]()
    assert federation.expected == 3
    assert federation.student is not None
    exec(BLOCKS[3], names)
    assert names["make_client"]().public.identity[0] == 40
    assert len(BLOCKS) == 4
