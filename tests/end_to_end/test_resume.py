"""Kill -9 in mid-training, run again: the same student, bit for bit."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "resumed_training.py"
STEPS_PER_EPOCH = 5


def run(folder, result, data="arrays", frequency="2", kill_at=0, backend="tensorflow"):
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    arguments = [str(folder), str(result), data, str(frequency), str(kill_at)]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def need(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of each kind, made once."""
    made = {}

    def result(data, backend):
        if (data, backend) not in made:
            folder = tmp_path_factory.mktemp("whole")
            done = run(folder / "backup", folder / "student.npz", data, backend=backend)
            assert done.returncode == 0, done.stderr[-3000:]
            made[data, backend] = np.load(folder / "student.npz")
        return made[data, backend]

    return result


@pytest.mark.parametrize(
    ("backend", "data", "frequency", "kills"),
    [
        # Mid-epoch; twice in one training; before the first backup; at an epoch's last step.
        ("tensorflow", "arrays", 2, [8, 4]),
        ("tensorflow", "arrays", 1, [1]),
        ("tensorflow", "arrays", "epoch", [7]),
        ("tensorflow", "arrays", 5, [10]),
        ("tensorflow", "together", 2, [4]),
        ("tensorflow", "dataset", 3, [9]),
        ("tensorflow", "cache", 2, [8]),
        ("jax", "arrays", 3, [9]),
        ("torch", "arrays", 3, [9]),
    ],
)
def test_killed_and_resumed(backend, data, frequency, kills, whole, tmp_path):
    need(backend)
    backup, result = tmp_path / "backup", tmp_path / "student.npz"
    for step in kills:
        killed = run(backup, result, data, frequency, step, backend)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert not result.exists()
    resumed = run(backup, result, data, frequency, 0, backend)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found, expected = np.load(result), whole(data, backend)
    assert set(found.files) == set(expected.files)
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert not backup.exists()
