"""Kill -9 in mid-training, run again: the same student, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from other_backends import environment, need

SCRIPT = Path(__file__).parent / "resumed_training.py"


class Trainings:
    """One process a backend that has imported everything, and forks for each training."""

    def __init__(self, folder):
        self.folder, self.servers, self.whole = folder, {}, {}

    def run(self, backend, folder, result, data="arrays", frequency=2, kill_at=0):
        """The exit code of one training."""
        server = self.servers.get(backend) or self.start(backend)
        arguments = [str(folder), str(result), data, frequency, kill_at]
        server.stdin.write(json.dumps(arguments) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def start(self, backend):
        paths = [str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.servers[backend] = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            env=environment(backend, PYTHONPATH=os.pathsep.join(paths)),
            **pipes,
        )
        return self.servers[backend]

    def uninterrupted(self, backend, data):
        """The final student of a training that nothing stopped, made once."""
        if (backend, data) not in self.whole:
            folder = self.folder / f"{backend}-{data}"
            folder.mkdir()
            assert self.run(backend, folder / "backup", folder / "student.npz", data) == 0
            self.whole[backend, data] = np.load(folder / "student.npz")
        return self.whole[backend, data]

    def stop(self):
        for server in self.servers.values():
            server.stdin.close()
            server.wait()


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    started = Trainings(tmp_path_factory.mktemp("whole"))
    yield started
    started.stop()


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
def test_killed_and_resumed(backend, data, frequency, kills, trainings, tmp_path):
    need(backend)
    backup, result = tmp_path / "backup", tmp_path / "student.npz"
    for step in kills:
        code = trainings.run(backend, backup, result, data, frequency, step)
        assert code == -signal.SIGKILL
        assert not result.exists()
    assert trainings.run(backend, backup, result, data, frequency) == 0
    found, expected = np.load(result), trainings.uninterrupted(backend, data)
    assert set(found.files) == set(expected.files)
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert not backup.exists()
