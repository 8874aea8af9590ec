"""How long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_kd.export.checks import number

TIMED = 0.05
"""Seconds for which an export measures each file's latency, and the Keras model's."""


def time_calls(call: Callable[[], Any], *, seconds: float = 0.3, at_least: int = 30) -> np.ndarray:
    """Time a call again and again after a warm-up.

    Args:
        call: What to time.
        seconds: How long to measure, after a third of it for warming up.
        at_least: Fewest timed calls, however long they take (but no more than 20 times `seconds`).

    Returns:
        Seconds of each call.

    Raises:
        ValueError: If `seconds` is no finite number above 0.
    """
    number("seconds", seconds)
    if seconds <= 0:
        raise ValueError(f"`seconds` must be positive. Received: seconds={seconds!r}.")
    end = time.perf_counter() + seconds / 3
    call()
    while time.perf_counter() < end:
        call()
    times: list[float] = []
    began = time.perf_counter()
    while True:
        start = time.perf_counter()
        call()
        stop = time.perf_counter()
        times.append(stop - start)
        spent = stop - began
        if (spent >= seconds and len(times) >= at_least) or spent >= 20 * seconds:
            return np.asarray(times)


def quantile(times: np.ndarray, share: float) -> float:
    """Return a quantile as `np.quantile` does, which imports a package to find equal numbers.

    Args:
        times: Numbers, at least one.
        share: In [0, 1]; what lies between two of them is interpolated.
    """
    rising = np.sort(times)
    return float(np.interp(share * (len(rising) - 1), np.arange(len(rising)), rising))
