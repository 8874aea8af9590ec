"""The same attacks and losses on TensorFlow, JAX and PyTorch."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from other_backends import environment, need

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def figures(backend):
    need(backend)
    ran = subprocess.run(
        [sys.executable, str(HERE / "on_backends.py"), backend],
        env=environment(backend, PYTHONPATH=str(HERE.parents[1])),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def here():
    if keras.config.backend() != "tensorflow":
        return figures("tensorflow")
    import on_backends

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return on_backends.figures()


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_same_figures(backend, here):
    there = figures(backend)
    assert there.keys() == here.keys()
    for name, values in here.items():
        if name.startswith(("fgsm", "pgd", "square")):
            # A sign at zero may differ.
            close = np.isclose(values, there[name], atol=2e-4)
            assert close.mean() > 0.97, name
        else:
            np.testing.assert_allclose(there[name], values, rtol=1e-2, atol=5e-3, err_msg=name)
