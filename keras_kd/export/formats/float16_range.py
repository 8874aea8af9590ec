"""What of a network float16 cannot hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from keras_kd.export.rows import Beyond
from keras_kd.export.signature import Arrays

GREATEST = 65_504.0
LEAST = 2.0**-25
"""The greatest number of float16, and the one below which numbers round to 0."""

_SHOWN = 5
_SAMPLES = 4


class Inspector(Protocol):
    """What is asked of the `contents` module of a format."""

    def constants(self, path: Path) -> Iterable[tuple[str, np.ndarray]]:
        """The constants of a file by name."""

    def tensors(self, path: Path, feed: Arrays) -> tuple[Arrays, dict[str, list[str]]]:
        """The results inside a file by name, and what they are made of."""

    def readers(self, path: Path) -> dict[str, str]:
        """For each tensor the first result computed from it."""


def beyond(contents: Inspector, half: Path, full: Path, inputs: Arrays) -> tuple[Beyond, ...]:
    """Find what a float16 file lost since float16 cannot hold it.

    Args:
        contents: Looks into files of the format.
        half: The float16 file.
        full: The float32 file of the same format.
        inputs: Samples by name; of the first few the results inside are looked at, since each of
            them is held in memory.

    Returns:
        At most five, of which `value` is the greatest magnitude, or for constants that vanish the
        greatest of what was there: constants of the float32 file above 65,504, those all of whose
        numbers round to 0, those that the converter cut off at less, and results of the float32
        file above 65,504.
    """
    kept = {name: each for name, each in contents.constants(half) if each.dtype == np.float16}
    rows: list[Beyond] = []
    for name, array in contents.constants(full):
        if array.dtype != np.float32 or not array.size or not np.isfinite(array).all():
            continue
        peak = float(np.abs(array).max())
        cut = name in kept and kept[name].size and float(np.abs(kept[name]).max()) < 0.99 * peak
        vanishes = 0 < peak < LEAST
        if peak > GREATEST or (peak > 1 and cut) or vanishes:
            # As text, since JSON has no infinity.
            rows.append(Beyond(name, f"{peak:.3g}", constant=True, vanishes=vanishes))
    few = {name: x[:_SAMPLES] for name, x in inputs.items()}
    for name, array in contents.tensors(full, few)[0].items():
        peak = float(np.abs(array).max(initial=0.0))
        if peak > GREATEST:
            rows.append(Beyond(name, f"{peak:.3g}", constant=False, vanishes=False))
    first = contents.readers(full) if rows else {}
    return tuple(replace(row, reader=first.get(row.tensor)) for row in rows[:_SHOWN])
