"""What is asked of an argument that is a name or a number, told without Keras.

`keras_kd.utils.checks` has these too, beside what takes Keras to tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np

from keras_kd.utils.errors import did_you_mean


def refuse_holder(what: str, value: object) -> None:
    """Raise `TypeError` for what holds arrays under names, such as the rows that `load_task` gives.

    Args:
        what: What the message calls it.
        value: What was passed in place of arrays.
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type | Iterable):
        return
    names = ", ".join(f"`{field.name}`" for field in dataclasses.fields(value))
    raise TypeError(
        f"{what} is a `{type(value).__name__}`, which holds {names}. Pass the arrays: "
        "`data.train.x` and `data.train.y` of `load_task`, `data.x_train` and `data.y_train` of "
        "`load`."
    )


def known_keys(given: Iterable[str], known: Sequence[str], argument: str) -> None:
    """Raise `ValueError` for a key that is not known, with close matches."""
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known, quote="'")
            raise ValueError(
                f"`{argument}` has the unknown key {key!r}. Expected "
                f"{', '.join(repr(k) for k in known) or 'no keys'}.{hint}"
            )


def one_of(argument: str, given: object, known: Sequence[str]) -> None:
    """Raise `ValueError` for a choice that there is not, with close matches."""
    if given not in known:
        hint = did_you_mean(given, known, quote="'")
        raise ValueError(
            f"`{argument}` is one of {', '.join(map(repr, known))}. Received: "
            f"{argument}={given!r}.{hint}"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a single number of Python or NumPy, and no boolean."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number of Python or NumPy, and no boolean."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def all_digits(value: float) -> str:
    """A number as the shortest text that reads as that very number, without an exponent."""
    return np.format_float_positional(float(value), trim="-")


def numeric(name: str, value: object) -> float:
    """Return a single number, finite or not, or raise `TypeError`.

    Args:
        name: What the message calls it.
        value: What was passed.
    """
    if not is_number(value):
        raise TypeError(f"`{name}` is a number. Received: {name}={value!r}.")
    return value


def number(name: str, value: object, least: float = -math.inf) -> float:
    """Return a finite number, or raise.

    Args:
        name: What the message calls it.
        value: What was passed.
        least: The least that it may be.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite, or smaller.
    """
    found = numeric(name, value)
    if not math.isfinite(found):
        raise ValueError(f"`{name}` is finite. Received: {name}={value!r}.")
    if found < least:
        raise ValueError(f"`{name}` is at least {least:g}. Received: {name}={value!r}.")
    return float(found)


def positive(name: str, value: object, advice: str = "") -> float:
    """Return a finite number above 0, or raise.

    Args:
        name: What the message calls it.
        value: What was passed.
        advice: What the message says beside.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite or not above 0.
    """
    found = number(name, value)
    if found <= 0:
        beside = f": {advice}" if advice else ""
        raise ValueError(f"`{name}` is greater than 0{beside}. Received: {name}={value!r}.")
    return found


def whole(name: str, value: object, least: int = 1) -> int:
    """Return a whole number of at least `least`, or raise.

    Args:
        name: What the message calls it.
        value: What was passed.
        least: The least that it may be.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is smaller.
    """
    if not is_whole(value):
        raise TypeError(f"`{name}` is a whole number. Received: {name}={value!r}.")
    if value < least:
        raise ValueError(f"`{name}` is at least {least}. Received: {name}={value!r}.")
    return int(value)


def misfit(array: np.ndarray, dtype: Any) -> str | None:
    """Say what keeps numbers from being held by a dtype, where anything does.

    That a real number is rounded to the digits of the dtype is none of it. What would become
    infinite, wrap around, be cut to a whole number, or be no number at all is.

    Args:
        array: Numbers of any dtype, those of `ml_dtypes` too.
        dtype: Of floats, integers or booleans.

    Returns:
        What follows "the input", such as "holds 1e+300, more than float32 can hold", or `None`.
    """
    wanted = np.dtype(dtype)
    if array.size == 0 or np.can_cast(array.dtype, wanted, "safe"):
        return None
    if array.dtype.kind not in "biuf":
        # NumPy knows nothing of such a dtype, and float32 holds its numbers exactly.
        array = array.astype(np.float32)
    if wanted.kind == "b":
        odd = ~np.isin(array, (0, 1))
        return (
            f"holds values that are neither 0 nor 1, such as {array[odd][0]}" if odd.any() else None
        )
    if wanted.kind not in "iu":
        with np.errstate(over="ignore"):
            odd = np.isfinite(array) & ~np.isfinite(array.astype(wanted))
        return f"holds {array[odd][0]}, more than {wanted} can hold" if odd.any() else None
    if array.dtype.kind == "f":
        odd = ~(array == np.trunc(array))
        if odd.any():
            return f"holds values that are not whole, such as {array[odd][0]}"
    limits = np.iinfo(wanted)
    low, high = array.min(), array.max()
    # As Python compares them, exactly: the greatest integer is no number that floats have.
    if low.item() < limits.min or high.item() > limits.max:
        return f"holds values from {low} to {high}"
    return None
