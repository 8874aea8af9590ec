"""How tests start a process with another backend: on one core, and compiled in the least time."""

import importlib.metadata
import importlib.util
import os

import pytest

_XLA = "--xla_backend_optimization_level=0"
# Of JAX's XLA alone; the one in TensorFlow need not know them. Programs that run for a moment are
# compiled in half the time. JAX 0.12 knows the flag no more, and ends a process that has it.
_JAX = "--xla_cpu_use_fusion_emitters=false"
_NOT_SINCE = (0, 11)


def need(backend):
    """Skip the test where a backend is not installed."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")


def _jax_version():
    return tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])


def environment(backend, **more):
    """The variables of a process with this backend."""
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        # Small work on one thread: the processes of a test run share the cores.
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Most of the time on JAX is compilation.
        "XLA_FLAGS": f"{_XLA} {_JAX}" if backend == "jax" and _jax_version() < _NOT_SINCE else _XLA,
        **more,
    }
