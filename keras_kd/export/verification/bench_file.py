"""One file timed in a process of its own: inferences, starts, memory."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats import registry
from keras_kd.export.verification.timing import time_calls
from keras_kd.utils import archives

_STARTS = 5
"""Warm starts of which the median is taken."""


def bench_file(task: dict[str, Any]) -> dict[str, Any]:
    """Measure one file in this process, which must be fresh.

    Args:
        task: `path`, `threads`, `seconds`, `sample` (an `.npz` with inputs `x<i>`), and the
            `names` of the inputs in that order.

    Returns:
        `p50_ms`, `p90_ms`, `cold_start_ms`, `warm_start_ms`, `peak_memory_bytes`.
    """
    path = Path(task["path"])
    arrays = archives.arrays(task["sample"])
    feed = {name: arrays[f"x{i}"][:1] for i, name in enumerate(task["names"])}
    if path.suffix == ".keras":
        start = _keras_starter(path, feed)
        _check_answers(start()(), arrays)
    else:
        start = _starter(path, task, feed)
    _forget_peak()
    before = _peak()
    began = time.perf_counter()
    call = start()
    call()
    cold = time.perf_counter() - began
    times = time_calls(call, seconds=task["seconds"])
    peak = _peak() - before
    warm = []
    for _ in range(_STARTS):
        began = time.perf_counter()
        start()()
        warm.append(time.perf_counter() - began)
    return {
        "p50_ms": float(np.median(times)) * 1e3,
        "p90_ms": float(np.quantile(times, 0.9)) * 1e3,
        "cold_start_ms": cold * 1e3,
        "warm_start_ms": float(np.median(warm)) * 1e3,
        "peak_memory_bytes": int(peak),
    }


def _starter(
    path: Path, task: dict[str, Any], feed: dict[str, np.ndarray]
) -> Callable[[], Callable[[], Any]]:
    # Importing the runtime is no part of a start: an app links it.
    fmt = registry.get(task["format"])
    for package in fmt.runtime_packages:
        importlib.import_module(package)
    return lambda: fmt.open(path, task["threads"]).prepare(feed)


def _keras_starter(path: Path, feed: dict[str, np.ndarray]) -> Callable[[], Callable[[], Any]]:
    import keras

    from keras_kd.export.signature import is_symbolic

    def start() -> Callable[[], Any]:
        model = keras.saving.load_model(path, compile=False)
        graph = is_symbolic(model) and not isinstance(model, keras.Sequential)
        flat = list(feed.values())
        x = keras.tree.pack_sequence_as(model.input, flat) if graph else flat[0]
        return lambda: model.predict_on_batch(x)

    return start


def _check_answers(result: object, arrays: dict[str, np.ndarray]) -> None:
    import keras

    got = [np.shape(array) for array in keras.tree.flatten(result)]
    want = [arrays[f"y{i}"][:1].shape for i in range(sum(name[0] == "y" for name in arrays))]
    if got != want:
        raise ValueError(f"its outputs have the shapes {got}, and {want} are stored")


def _forget_peak() -> None:
    # Importing a runtime takes more memory for a moment than a small file ever does. Linux lets a
    # process lower its mark to what it holds now; elsewhere the mark stays.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    # Most memory that the process held since `_forget_peak`, in bytes.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    # macOS counts in bytes, other systems in units of 1,024.
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(value if sys.platform == "darwin" else 1024 * value)
