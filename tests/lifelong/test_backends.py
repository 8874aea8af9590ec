"""The same streams on JAX and PyTorch end with the weights that they have here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_same_numbers(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    script = Path(__file__).with_name("suite.py")
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_KD_NUMBERS": str(tmp_path / "numbers.npz"),
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("suite_of_lifelong", script)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    found = np.load(tmp_path / "numbers.npz")
    for name, value in suite.numbers().items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
