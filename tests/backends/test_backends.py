"""The suite on every backend, each in a process of its own, and the same numbers on all of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BACKENDS = ("tensorflow", "jax", "torch")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes find the weights and data they share."""
    folder = tmp_path_factory.mktemp("backends")
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(50, 6)).astype("float32"),
        "y": rng.integers(0, 4, 50),
        "weights": rng.uniform(0.5, 1.5, 50).astype("float32"),
        "tokens": np.where(np.arange(5) < rng.integers(1, 6, (12, 1)), 1, 0)
        * rng.integers(1, 11, (12, 5)),
        "token_labels": rng.integers(0, 4, (12, 5)),
    }
    for name, width in (("student", 5), ("teacher", 9)):
        # Dense, BatchNorm (scale, offset, mean, variance), Dense.
        shapes = [(6, width), (width,), *[(width,)] * 4, (width, 4), (4,)]
        for i, shape in enumerate(shapes):
            value = rng.uniform(0.5, 1.5, shape) if i in (2, 5) else rng.normal(size=shape)
            arrays[f"{name}{i}"] = value.astype("float32")
    for i, shape in enumerate([(5, 9), (9,)]):
        arrays[f"projection{i}"] = rng.normal(size=shape).astype("float32")
    np.savez(folder / "shared.npz", **arrays)
    return folder


def need(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")


def run_suite(backend, folder, *arguments, flags=""):
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_KD_SUITE": str(folder),
        # Small work on one thread: the processes of a test run share the cores.
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Most of the time on JAX is compilation of programs that run for a moment.
        "XLA_FLAGS": f"--xla_backend_optimization_level=0 {flags}",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"],
        env=environment,
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


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_same_numbers(backend, folder):
    """Losses, logs and weights of twenty steps, to 1e-5 of those on TensorFlow."""
    for name in ("tensorflow", backend):
        need(name)
        if not (folder / f"{name}.npz").exists():
            run_suite(name, folder, str(HERE / "suite.py"), "-k", "test_twenty_steps")
    expected, found = np.load(folder / "tensorflow.npz"), np.load(folder / f"{backend}.npz")
    assert set(expected.files) == set(found.files)
    assert len(found["batch_loss"]) == 20
    for name in expected.files:
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=f"{name} on {backend}"
        )


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_losses(backend, folder):
    """The conformance table in short, and the vocabularies; TensorFlow runs them whole."""
    need(backend)
    losses = HERE.parent / "losses"
    # Without it compilation takes twice as long; TensorFlow's XLA need not know it.
    flags = "--xla_cpu_use_fusion_emitters=false" if backend == "jax" else ""
    files = [str(losses / name) for name in ("essentials.py", "test_vocabulary.py")]
    result = run_suite(backend, folder, *files, "-k", "not memory and not fit", flags=flags)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
