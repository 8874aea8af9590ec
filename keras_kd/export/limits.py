"""What a worker may take: as long as its parent lives, and no more memory or time than is sound."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from keras_kd.utils import archives

_LEAST_MEMORY = 4 << 30
_MEMORY_PER_CORE = 32 << 20
"""Bytes that a worker may always ask for: TensorFlow sets some aside for each of its threads, most
of which is never used."""

_SECONDS = {"convert": 900.0, "measure": 300.0, "bench": 300.0}
_SECONDS_PER_MEGABYTE = {"convert": 20.0, "measure": 5.0, "bench": 5.0}
_PATIENCE = 100.0
"""What a task may take: seconds in any case, for each megabyte of the model or file, and for each
second that the Keras model needs for the same samples, of which TensorFlow's slowest kernels need
some ten."""


def seconds(job: dict[str, Any], task: dict[str, Any]) -> float:
    """Return how long a task may take before it counts as hanging.

    Args:
        job: Of the worker: its `kind`, and perhaps the `expected` seconds that the Keras model
            needs for all samples.
        task: One of its tasks.
    """
    kind = str(job.get("kind"))
    return (
        _SECONDS.get(kind, 900.0)
        + _SECONDS_PER_MEGABYTE.get(kind, 20.0) * _size(job, task) / 1e6
        + _PATIENCE * float(job.get("expected", 0.0))
    )


def _size(job: dict[str, Any], task: dict[str, Any]) -> int:
    """Bytes of what a task works on: the model of the job, or its own file."""
    name = job.get("model") or task.get("path")
    if not name:
        return 0
    file = Path(name)
    try:
        parts = file.rglob("*") if file.is_dir() else [file]
        return sum(part.stat().st_size for part in parts if part.is_file())
    except OSError:
        return 0


def memory() -> int | None:
    """Return the most bytes of memory that a worker may ask for; `None` where nothing is known."""
    available = archives.memory_available()
    least = _LEAST_MEMORY + _MEMORY_PER_CORE * (os.cpu_count() or 1)
    return None if available is None else max(least, available)


def begin(most: int | None) -> None:
    """Bind this process to its parent and to a limit of memory.

    The parent holds the other end of standard input open as long as it lives, on every system. A
    converter that is in C++ for long lets no thread look at it; Linux is asked to see to it, too.

    Args:
        most: Bytes of memory that may be asked for. Linux alone keeps to it; asking for more fails
            there with the error of any allocation.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        _die_with_parent()
    bound(most)


def bound(most: int | None) -> None:
    """Bind this process to a limit of memory.

    Args:
        most: As for `begin`.
    """
    if sys.platform == "linux" and most is not None:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (least, hard))


def end_with(parent: int) -> None:
    """Let this process, which `parent` has just forked, end with it."""
    _die_with_parent()
    if os.getppid() != parent:
        os._exit(1)


def processors() -> int:
    """Return how many processors this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def own() -> dict[str, Any]:
    """Return what a process that is started now would get from this one, as JSON values."""
    found: dict[str, Any] = {}
    if sys.platform != "linux":
        return found
    import resource

    found["resources"] = {
        name: resource.getrlimit(getattr(resource, name))
        for name in dir(resource)
        if name.startswith("RLIMIT_")
    }
    found["processors"] = sorted(os.sched_getaffinity(0))
    # Asking the system for it means setting it, for all threads.
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        found["umask"] = int(status.split("Umask:")[1].split()[0], 8)
    return found


def take_over(given: dict[str, Any]) -> None:
    """Take what another process has said to be its `own`, as far as the system lets it."""
    if sys.platform != "linux":
        return
    import resource

    for name, values in given["resources"].items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, name), tuple(values))
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, given["processors"])
    if "umask" in given:
        os.umask(given["umask"])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    try:
        while os.read(0, 1024):
            pass
    except OSError:
        # Without a standard input there is no parent to watch.
        return
    os._exit(1)
