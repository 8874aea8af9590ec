"""What is searched: parameters, their ranges, and the values of those that are not searched."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_kd.utils.values import is_number, known_keys


@dataclass(frozen=True)
class Float:
    """Any number from `low` to `high`, all alike.

    Args:
        low: Least value.
        high: Greatest value, above `low`.

    Raises:
        TypeError: If an end is no number.
        ValueError: If the range is empty or not finite.

    Examples:
        >>> Float(0, 1)
        Float(low=0, high=1)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_range(self.low, self.high)

    @property
    def single(self) -> bool:
        """Whether there is nothing to choose."""
        return False

    def grid(self) -> list[Any]:
        """A few values from the least to the greatest."""
        return [self.low + (self.high - self.low) * i / 4 for i in range(5)]

    def nearest(self, value: float) -> Any:
        """The value of the range that is nearest to another."""
        return min(max(float(value), self.low), self.high)

    def to_json(self) -> Any:
        """Plain values that say what it is."""
        return {type(self).__name__.lower(): [self.low, self.high]}


@dataclass(frozen=True)
class Log(Float):
    """Any number from `low` to `high`, all orders of magnitude alike.

    Args:
        low: Least value, positive.
        high: Greatest value, above `low`.

    Raises:
        TypeError: If an end is no number.
        ValueError: If the range is empty, not finite, or not positive.

    Examples:
        >>> Log(1, 20)
        Log(low=1, high=20)
    """

    def __post_init__(self) -> None:
        _require_range(self.low, self.high)
        if self.low <= 0:
            raise ValueError(f"`Log` needs a positive range. Received: {self!r}.")

    def grid(self) -> list[Any]:
        """A few values from the least to the greatest."""
        return [self.low * (self.high / self.low) ** (i / 4) for i in range(5)]


@dataclass(frozen=True, init=False)
class Choice:
    """One of several values.

    Args:
        *options: Numbers, names, or truth values; different ones.

    Raises:
        ValueError: If there is none, or one is given twice.
        TypeError: If one is no plain value.

    Examples:
        >>> Choice(0.25, 0.5, 1.0)
        Choice(options=(0.25, 0.5, 1.0))
    """

    options: tuple[Any, ...]

    def __init__(self, *options: object) -> None:
        options = tuple(o.item() if isinstance(o, np.generic) else o for o in options)
        object.__setattr__(self, "options", options)
        if not options:
            raise ValueError("A choice needs at least one option.")
        for option in options:
            if not isinstance(option, str | int | float | bool | type(None)):
                raise TypeError(f"Options are numbers or names. Received: {option!r}.")
            if isinstance(option, float) and not math.isfinite(option):
                raise ValueError(f"Options are finite. Received: {options!r}.")
        if len(set(options)) < len(options):
            raise ValueError(f"Options differ from one another. Received: {options!r}.")

    @property
    def single(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.options) == 1

    def grid(self) -> list[Any]:
        """All options."""
        return list(self.options)

    def nearest(self, value: object) -> Any:
        """The option that is nearest to a value; the first one of names."""
        if value in self.options:
            return value
        numbers = [o for o in self.options if isinstance(o, int | float)]
        if numbers and isinstance(value, int | float):
            return min(numbers, key=lambda option: abs(option - value))
        return self.options[0]

    def to_json(self) -> Any:
        """Plain values that say what it is."""
        return {"choice": list(self.options)}


Range = Float | Choice

PRECISIONS = ("float32", "float16", "dynamic", "weight_int8", "int8", "int16x8")
"""Precisions of TFLite files that may be searched."""

METHODS = ("plain", "default", "standardized", "DIST")

DEFAULTS: dict[str, Any] = {
    "method": "default",
    "temperature": 1.0,
    "alpha": 0.5,
    "learning_rate": 5e-3,
    "width": 0.5,
    "depth": 1.0,
    "precision": "int8",
}
"""What a parameter is where it is not searched, and what the trial called `defaults` has."""

TRAINING = ("method", "temperature", "alpha", "learning_rate")
"""What changes nothing in the size of a file."""

_LIMITS = {
    "temperature": (0.0, math.inf, False),
    "alpha": (0.0, 1.0, True),
    "learning_rate": (0.0, math.inf, False),
    "width": (0.0, 1.0, False),
    "depth": (0.0, 1.0, False),
}


class Space:
    """The parameters of a search.

    Args:
        given: By name a `Float`, `Log`, `Choice`, a list of options, or a single value; `None` for
            the defaults.
        own: Whether a function of the user's builds the student, which may have parameters of its
            own.
        classes: Whether the methods for exclusive classes apply.
        depth: Whether the teacher has blocks that can be dropped.
        precisions: What the precision is chosen of, whatever `given` leaves out.

    Raises:
        ValueError: If a name or an option is unknown or out of range, or nothing is to be chosen.
        TypeError: If a range is of another type.
    """

    def __init__(
        self,
        given: object,
        *,
        own: bool,
        classes: bool,
        depth: bool,
        precisions: Sequence[str] | None = None,
    ) -> None:
        if given is None:
            ranges = _usual(own, classes, depth)
        elif isinstance(given, Mapping):
            ranges = {str(name): _range(str(name), value) for name, value in given.items()}
        else:
            raise TypeError(
                "`space` is a dict from names of parameters to `Float`, `Log`, `Choice` or lists. "
                f"Received: space={given!r}."
            )
        if precisions is not None:
            if "precision" in ranges:
                raise ValueError(
                    "A device says which precisions it takes: leave `precision` out of `space`."
                )
            ranges["precision"] = Choice(*precisions)
        known = [name for name in DEFAULTS if not (own and name in ("width", "depth"))]
        if not own:
            known_keys(ranges, known, "space")
        for name, found in ranges.items():
            if name in DEFAULTS:
                _require_known(name, found, classes)
        self.ranges = {name: found for name, found in ranges.items() if not found.single}
        if not self.ranges:
            raise ValueError(
                "There is nothing to choose in `space`: give at least one parameter a range or two "
                f"options. Received: space={given!r}. Its parameters are {', '.join(known)}."
            )
        fixed = {name: found.grid()[0] for name, found in ranges.items() if found.single}
        usual = {name: value for name, value in DEFAULTS.items() if name in known}
        self.fixed = {**usual, **fixed}

    def defaults(self) -> dict[str, Any]:
        """All values as near to the defaults as the ranges allow."""
        values = dict(self.fixed)
        for name, found in self.ranges.items():
            values[name] = found.nearest(DEFAULTS.get(name, found.grid()[len(found.grid()) // 2]))
        return values

    def shapes(self, most: int = 64) -> tuple[list[dict[str, Any]], bool]:
        """All combinations of what decides the size of a file.

        Args:
            most: Of so many; of more the corners and the middle alone.

        Returns:
            Values by name, and whether these are all that there are.
        """
        names = [name for name in self.ranges if name not in TRAINING]
        if not names:
            return [{}], True
        grids = [self.ranges[name].grid() for name in names]
        complete = all(isinstance(self.ranges[name], Choice) for name in names)
        if math.prod(map(len, grids)) > most:
            grids = [
                list(dict.fromkeys((grid[0], grid[len(grid) // 2], grid[-1]))) for grid in grids
            ]
            complete = False
        combinations = itertools.islice(itertools.product(*grids), most)
        return [dict(zip(names, each)) for each in combinations], complete

    def to_json(self) -> dict[str, Any]:
        """Plain values that say what is searched."""
        ranges = {name: found.to_json() for name, found in self.ranges.items()}
        return {"searched": ranges, "fixed": self.fixed}


def _usual(own: bool, classes: bool, depth: bool) -> dict[str, Range]:
    methods = ("default", "standardized", "DIST") if classes else ("default",)
    found: dict[str, Range] = {
        "method": Choice(*methods),
        "temperature": Log(1.0, 20.0),
        "alpha": Float(0.0, 1.0),
        "learning_rate": Log(1e-3, 2e-2),
    }
    if not own:
        found["width"] = Choice(0.25, 0.5, 0.75, 1.0)
        if depth:
            found["depth"] = Choice(0.5, 1.0)
    return found


def _range(name: str, value: object) -> Range:
    if isinstance(value, Float | Choice):
        return value
    if isinstance(value, str | int | float | bool | np.generic):
        return Choice(value)
    if isinstance(value, Sequence | np.ndarray):
        return Choice(*value)
    raise TypeError(
        f"The range of `{name}` is a `Float`, `Log`, `Choice`, a list of options or a value. "
        f"Received: {value!r}."
    )


def _require_known(name: str, found: Range, classes: bool) -> None:
    if name in ("method", "precision"):
        known = PRECISIONS if name == "precision" else METHODS if classes else METHODS[:2]
        if not isinstance(found, Choice):
            raise TypeError(f"`{name}` is a choice of names. Received: {found!r}.")
        known_keys(map(str, found.options), known, f"space[{name!r}]")
        return
    low, high, closed = _LIMITS[name]
    for value in (found.low, found.high) if isinstance(found, Float) else found.options:
        if not is_number(value) or not (low <= value <= high) or (value == low and not closed):
            raise ValueError(
                f"`{name}` lies {'at least at' if closed else 'above'} {low:g}"
                f"{f' and at most at {high:g}' if math.isfinite(high) else ''}. Received: "
                f"{name}={value!r} in the space."
            )


def _require_range(low: float, high: float) -> None:
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"The ends of a range are numbers. Received: {low!r} to {high!r}.")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"A range goes from a finite number to a greater one. Received: {low!r} to {high!r}."
        )
