"""The same training on several devices and in several processes, each in a process of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from other_backends import environment, need

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(script, *arguments, backend="tensorflow"):
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env=environment(backend, JAX_PLATFORMS="cpu", PYTHONPATH=paths),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, seconds=300):
    """Wait for all of them; the first failure speaks for the others."""
    outputs = []
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return outputs


def test_two_mirrored_devices(tmp_path):
    """Losses, logs and weights are those of one device; metrics are not scaled by the replicas."""
    need("tensorflow")
    finish(start("mirrored.py", tmp_path / "results.npz"))
    results = np.load(tmp_path / "results.npz")
    names = [name[4:] for name in results.files if name.startswith("one_")]
    assert {"log_loss", "log_agreement", "log_val_soft_targets", "weight_0"} <= set(names)
    for name in names:
        one, two = results[f"one_{name}"], results[f"two_{name}"]
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training in one JAX process."""
    need("jax")
    folder = tmp_path_factory.mktemp("alone")
    result = folder / "result.npz"
    finish(
        start("across_processes.py", result, folder / "backup", "-", 1, 0, "data", backend="jax")
    )
    return np.load(result)


@pytest.mark.parametrize("kind", ["data", "model"])
def test_two_jax_processes(kind, alone, tmp_path):
    """`DataParallel` and `ModelParallel` over loopback: the numbers of one process, one writer."""
    address = f"127.0.0.1:{free_port()}"
    backups = [tmp_path / f"backup_{number}" for number in range(2)]
    processes = [
        start(
            "across_processes.py",
            tmp_path / f"{number}.npz",
            # Folders of their own show who writes.
            backups[number],
            address,
            2,
            number,
            kind,
            backend="jax",
        )
        for number in range(2)
    ]
    finish(*processes)
    for number in range(2):
        found = np.load(tmp_path / f"{number}.npz")
        assert found["processes"] == 2
        # With model parallelism the teacher's hidden layer is split as well.
        assert found["sharded"] == (2 if kind == "model" else 0)
        for name in alone.files:
            if name.startswith(("log_", "arr_")):
                np.testing.assert_allclose(
                    found[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name
                )
        assert found["written"].all() == (number == 0)
        assert found["written"].any() == (number == 0)


@pytest.mark.skipif(
    keras.__version__.split(".")[:2] < ["3", "16"],
    reason="Keras 3.15 reduces the nested PerReplica batch in `_maybe_symbolic_build`, and the "
    "logs along an axis they lack in `reduce_per_replica`: no Keras model trains this way.",
)
def test_multi_worker_mirrored_strategy():
    need("tensorflow")
    ports = f"{free_port()},{free_port()}"
    workers = [start("multi_worker.py", ports, number, "distilled") for number in range(2)]
    for output in finish(*workers, seconds=120):
        assert "trained" in output
