"""The example of CONTRIBUTING, as it stands there, as somebody else's loss."""

import re
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_kd as kd
from keras_kd.losses.divergences import SoftTargets
from keras_kd.losses.logits import LogitLoss
from keras_kd.utils.types import Tensor

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example():
    """The class `LogitMAE`, made of the block of code in CONTRIBUTING."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    block = next(code for code in blocks if "class LogitMAE(" in code)
    block = textwrap.dedent(block).replace('package="keras_kd"', 'package="tests"')
    names = {"keras": keras, "ops": ops, "LogitLoss": LogitLoss, "Tensor": Tensor}
    exec(block, names)
    return names["LogitMAE"]


def network(units, end=None):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation=end)])


X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")


@pytest.mark.parametrize("units", [1, 3])
def test_the_example_of_contributing_distils_a_regression(example, units):
    student, teacher = network(units), network(units)
    expected = np.abs(X @ (np.asarray(teacher.weights[0]) - np.asarray(student.weights[0]))).mean()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss="mse", distillation_loss=example())
    history = distiller.fit(X, np.zeros((len(X), units), "float32"), batch_size=32, verbose=0)
    assert history.history["distillation_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_losses_of_distributions_say_so_and_are_refused_for_one_unit():
    class Steeper(SoftTargets):
        pass

    distiller = kd.Distiller(network(1), network(1))
    with pytest.raises(ValueError, match=r"compares distributions over classes.*one unit"):
        distiller.compile("sgd", loss="mse", distillation_loss=Steeper())
