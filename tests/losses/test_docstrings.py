"""Every example in the docstrings of the losses runs and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import keras_kd.losses

MODULES = [
    f"keras_kd.losses.{module.name}" for module in pkgutil.iter_modules(keras_kd.losses.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    names = {key: getattr(keras_kd.losses, key) for key in keras_kd.losses.__all__}
    failed, _ = doctest.testmod(module, extraglobs=names)
    assert failed == 0


@pytest.mark.parametrize("name", sorted(set(keras_kd.losses.__all__) - {"DistillationLoss"}))
def test_every_loss_shows_an_example_and_its_source(name):
    text = inspect.getdoc(getattr(keras_kd.losses, name))
    for section in ("Args:", "Raises:", "Examples:", ">>> ", "Reference:", "https://"):
        assert section in text
