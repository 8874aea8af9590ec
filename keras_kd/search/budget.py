"""What a search may spend, and what its file may weigh and take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from keras_kd.utils.values import is_number


@dataclass(frozen=True)
class Budget:
    """Limits of a search; `None` sets no limit.

    Args:
        minutes: Of searching, with the last trainings of the winner in it. What earlier calls on
            the same folder took counts, pauses between them do not. Trials that have begun are
            finished, and the two references are always trained.
        bytes: Most bytes of the exported file.
        latency_ms: Most milliseconds of one inference on this machine, one thread.
        trials: Most trials, plain training and the defaults among them; at least 2.

    Raises:
        ValueError: If a limit is not positive, or neither `minutes` nor `trials` ends the search.
        TypeError: If a limit is no number.

    Examples:
        >>> Budget(minutes=10, bytes=20_000, latency_ms=5)
        Budget(minutes=10, bytes=20000, latency_ms=5, trials=None)
    """

    minutes: float | None = 60
    bytes: int | None = None
    latency_ms: float | None = None
    trials: int | None = None

    def __post_init__(self) -> None:
        for name in ("minutes", "bytes", "latency_ms", "trials"):
            require_limit(name, getattr(self, name), "a budget")
        if self.trials is not None and (self.trials < 2 or self.trials != int(self.trials)):
            raise ValueError(
                "`trials` counts plain training and the defaults too, and is a whole number of at "
                f"least 2. Received: trials={self.trials!r}."
            )
        if self.minutes is None and self.trials is None:
            raise ValueError("Nothing ends the search: set `minutes` or `trials`.")

    def excess(self, bytes: float | None, latency_ms: float | None) -> dict[str, float]:
        """Say by how much a file is beyond the limits.

        Args:
            bytes: Its size, `None` where it is not known.
            latency_ms: Its latency, `None` where it is not known.

        Returns:
            By limit the share beyond it, `value / limit - 1`, which is at most 0 within.
        """
        found = {}
        for name, value, limit in (
            ("bytes", bytes, self.bytes),
            ("latency_ms", latency_ms, self.latency_ms),
        ):
            if value is not None and limit is not None:
                found[name] = value / limit - 1
        return found

    def limits(self) -> dict[str, Any]:
        """The limits of the file alone."""
        return {"bytes": self.bytes, "latency_ms": self.latency_ms}


def require_limit(name: str, value: object, whose: str) -> None:
    """Raise unless a limit is a positive finite number, or `None`.

    Args:
        name: What the message calls it.
        value: What was passed.
        whose: Whose limit it is.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive or not finite.
    """
    if value is None:
        return
    if not is_number(value):
        raise TypeError(f"`{name}` of {whose} is a number. Received: {name}={value!r}.")
    if not 0 < value < math.inf:
        raise ValueError(
            f"`{name}` of {whose} is positive and finite. Received: {name}={value!r}. Leave it out "
            "to set no limit."
        )
