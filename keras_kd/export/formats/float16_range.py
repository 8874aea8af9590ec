"""What of a network float16 cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from keras_kd.export.rows import Beyond
from keras_kd.export.signature import Arrays

GREATEST = 65_504.0
LEAST = 2.0**-25
"""The greatest number of float16, and the one below which numbers round to 0."""

_SHOWN = 5
_SAMPLES = 4


def few(inputs: Arrays) -> Arrays:
    """Return the samples whose inner results are looked at: each of them is held in memory."""
    return {name: x[:_SAMPLES] for name, x in inputs.items()}


def beyond(
    half: Iterable[tuple[str, np.ndarray]],
    full: Iterable[tuple[str, np.ndarray]],
    tensors: Arrays,
    readers: Callable[[], dict[str, str]],
) -> tuple[Beyond, ...]:
    """Find what a float16 file lost since float16 cannot hold it.

    Args:
        half: Constants of the float16 file by name.
        full: Constants of the float32 file of the same format.
        tensors: Results of the float32 file by name.
        readers: Gives for each of its tensors the first result computed from it.

    Returns:
        At most five, of which `value` is the greatest magnitude, or for constants that vanish the
        greatest of what was there: constants of the float32 file above 65,504, those all of whose
        numbers round to 0, those that the converter cut off at less, and results of the float32
        file above 65,504.
    """
    kept = {name: array for name, array in half if array.dtype == np.float16}
    rows: list[Beyond] = []
    for name, array in full:
        if array.dtype != np.float32 or not array.size or not np.isfinite(array).all():
            continue
        peak = float(np.abs(array).max())
        cut = name in kept and kept[name].size and float(np.abs(kept[name]).max()) < 0.99 * peak
        vanishes = 0 < peak < LEAST
        if peak > GREATEST or (peak > 1 and cut) or vanishes:
            # As text, since JSON has no infinity.
            rows.append(Beyond(name, f"{peak:.3g}", constant=True, vanishes=vanishes))
    for name, array in tensors.items():
        peak = float(np.abs(array).max(initial=0.0))
        if peak > GREATEST:
            rows.append(Beyond(name, f"{peak:.3g}", constant=False, vanishes=False))
    first = readers() if rows else {}
    return tuple(replace(row, reader=first.get(row.tensor)) for row in rows[:_SHOWN])
