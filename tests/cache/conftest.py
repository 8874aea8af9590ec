"""Small teachers and data, and a cache of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_kd as kd
from keras_kd import cache


def _classifier(width: int, seed: int, classes: int = 5, activation: Any = None) -> Any:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,), name="x")
    hidden = keras.layers.Dense(width, "relu", name="hidden")(inputs)
    outputs = keras.layers.Dense(classes, activation, name="logits")(hidden)
    return keras.Model(inputs, outputs, name=f"model_{width}_{seed}")


@pytest.fixture(scope="session")
def classifier() -> Callable[..., Any]:
    """`classifier(width, seed, classes=5, activation=None)`: six features in, logits out."""
    return _classifier


@pytest.fixture(scope="session")
def teacher() -> Any:
    return _classifier(16, 1)


@pytest.fixture(scope="session")
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 6)).astype("float32")


@pytest.fixture(scope="session")
def y() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 5, 200)


@pytest.fixture(scope="session")
def _written(tmp_path_factory: pytest.TempPathFactory, teacher: Any, x: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("written") / "cache"
    cache.write(teacher, x, path, dtype="float32", taps=["hidden"], batch_size=32, shard_size=64)
    return path


@pytest.fixture
def written(_written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 cache of `teacher` and `x` with one tap, in four shards; a copy to do harm to."""
    return Path(shutil.copytree(_written, tmp_path_factory.mktemp("copy") / "cache"))


@pytest.fixture(scope="session")
def losses(classifier: Callable[..., Any]) -> Callable[..., Any]:
    """`losses(teacher, *data, **fit)`: the logs of training one and the same student."""

    def run(teacher: Any, *data: Any, loss: Any = "labels", **fit: Any) -> dict[str, list[float]]:
        # Tracing a graph takes longer than these few steps.
        compiled = {"run_eagerly": True, **fit.pop("compile", {})}
        student = classifier(4, 2)
        distiller = kd.Distiller(student, teacher)
        if loss == "labels":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        distiller.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss, **compiled)
        keras.utils.set_random_seed(3)
        return distiller.fit(*data, verbose=0, **{"epochs": 2, "batch_size": 64, **fit}).history

    return run
