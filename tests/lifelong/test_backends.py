"""The same streams on JAX and PyTorch end with the weights that they have here."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from other_backends import environment, need


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_same_numbers(backend, tmp_path):
    need(backend)
    script = Path(__file__).with_name("suite.py")
    result = subprocess.run(
        [sys.executable, str(script)],
        env=environment(backend, KERAS_KD_NUMBERS=str(tmp_path / "numbers.npz")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("suite_of_lifelong", script)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    found = np.load(tmp_path / "numbers.npz")
    for name, value in suite.numbers().items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
