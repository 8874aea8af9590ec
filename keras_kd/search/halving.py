"""Which trainings go on: those that are among the best third of their size so far.

Optuna stops no trainings where there are several objectives. Here a training is compared at each
rung with all that came so far, by the error of the Keras model on the validation rows; where size
or latency is minimized too, only with those that are no larger and no slower, since a small student
may be worse than a large one and still be wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from keras_kd.search.files import Weighed
from keras_kd.search.journal import Record

FACTOR = 3
"""One in so many goes on."""

_LEAST = 3
"""Others that are needed to tell that a training is behind."""

_SLACK = 1.05
"""How much larger counts as of the same size."""


def goes_on(
    slot: int,
    epochs: int,
    error: float,
    weighed: Weighed,
    records: Sequence[Record],
    by_size: bool,
) -> bool:
    """Whether a training goes on after a rung.

    Args:
        slot: Of the trial.
        epochs: The rung.
        error: Its error there.
        weighed: Its file.
        records: The trials of the study.
        by_size: Whether size or latency is an objective.
    """
    others = [
        float(record.said[f"rung_{epochs}"])
        for record in records
        if record.slot != slot
        and f"rung_{epochs}" in record.said
        and (not by_size or _no_larger(record.said.get("weighed") or {}, weighed))
    ]
    if len(others) < _LEAST:
        return True
    kept = math.ceil((len(others) + 1) / FACTOR)
    return sum(other < error for other in others) < kept


def _no_larger(other: dict[str, float | None], own: Weighed) -> bool:
    for name, value in (("bytes", own.bytes), ("latency_ms", own.latency_ms)):
        theirs = other.get(name)
        if value is not None and theirs is not None and theirs > _SLACK * value:
            return False
    return True
