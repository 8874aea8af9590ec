"""The same random numbers for every test, in whatever order and company it runs."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

_AT_IMPORT: dict[int, tuple[np.random.Generator, Any]] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note where the generators of the modules stand before a test has drawn from them."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, np.random.Generator):
                _AT_IMPORT[id(value)] = value, value.bit_generator.state
    # TensorFlow's converter looks for garbage in every call, which takes a second in a process
    # that has all libraries and all tests in memory, unless these are left out.
    _leave_out_what_is_there()


def _leave_out_what_is_there() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    """What a module has left behind is not looked at again."""
    yield
    _leave_out_what_is_there()


def _seed() -> None:
    keras.utils.set_random_seed(7)
    for generator, state in _AT_IMPORT.values():
        generator.bit_generator.state = state


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[Any]:
    """Seed what several tests share, whichever of them is the first to ask for it."""
    if fixturedef.scope == "function":
        return (yield)
    before = [generator.bit_generator.state for generator, _ in _AT_IMPORT.values()]
    _seed()
    try:
        return (yield)
    finally:
        for (generator, _), state in zip(_AT_IMPORT.values(), before, strict=True):
            generator.bit_generator.state = state


@pytest.fixture(autouse=True)
def _seeded() -> None:
    _seed()
