"""The suite on every backend, each in a process of its own, and the same numbers on all of them."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from other_backends import environment, need
from twenty_steps import twenty_steps

# TensorFlow is the backend of the tests themselves, which collect the suite as well.
BACKENDS = ("jax", "torch")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes leave their numbers."""
    return tmp_path_factory.mktemp("backends")


@pytest.fixture(scope="module")
def expected(folder):
    """The numbers of TensorFlow, which this process usually has."""
    need("tensorflow")
    if keras.config.backend() != "tensorflow":
        return numbers("tensorflow", folder)
    return twenty_steps()


def numbers(backend, folder):
    """What a backend's run of the suite has left, or its part that leaves it."""
    need(backend)
    path = folder / f"{backend}.npz"
    if not path.exists():
        run_suite(backend, folder, str(HERE / "suite.py"), "-k", "test_twenty_steps")
    return dict(np.load(path))


def run_suite(backend, folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"],
        env=environment(backend, KERAS_KD_SUITE=str(folder)),
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_suite(backend, folder):
    need(backend)
    result = run_suite(backend, folder, str(HERE / "suite.py"), "-x", "--durations=5")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    print(result.stdout[-800:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_numbers(backend, folder, expected):
    """Losses, logs and weights of twenty steps, to 1e-5 of those on TensorFlow."""
    found = numbers(backend, folder)
    assert expected.keys() == found.keys()
    assert len(found["batch_loss"]) == 20
    for name in expected:
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=f"{name} on {backend}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses(backend, folder):
    """The conformance table in short, and the vocabularies; TensorFlow runs them whole."""
    need(backend)
    losses = HERE.parent / "losses"
    files = [str(losses / name) for name in ("essentials.py", "test_vocabulary.py")]
    result = run_suite(backend, folder, *files, "-k", "not memory and not fit")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
