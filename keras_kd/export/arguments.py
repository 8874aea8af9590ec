"""Arguments of an export that name and describe its files, checked before any work."""

from __future__ import annotations

import math
import numbers
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST_NAME = 120
"""Bytes of the first part of a file name; the rest and the names of a while follow."""

_NO_NAME = re.compile(r'[/\\:*?"<>|]')


def check_switches(**given: object) -> None:
    """Refuse what is neither true nor false: `"no"` would count as true.

    Raises:
        TypeError: Naming the argument.
    """
    for name, value in given.items():
        if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
            raise TypeError(f"`{name}` must be True or False. Received: {name}={value!r}.")


def check_progress(progress: object) -> None:
    """Refuse a callback that cannot be called.

    Raises:
        TypeError: Saying how it is called.
    """
    if progress is not None and not callable(progress):
        raise TypeError(
            "`progress` must be a function, called as `progress(stage, done, total)`. "
            f"Received: {progress!r}."
        )


def check_path(folder: object) -> None:
    """Refuse what is no path.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is empty, or no system takes it.
    """
    if not isinstance(folder, (str, os.PathLike)) or isinstance(os.fspath(folder), bytes):
        raise TypeError(
            f"`folder` must be a path, as text or `pathlib.Path`. Received: {folder!r}."
        )
    path = os.fspath(folder)
    if not path or "\0" in path or not writable(path):
        raise ValueError(f"`folder` must be the path of a folder. Received: {path!r}.")


def check_name(name: object) -> None:
    """Refuse what cannot be the first part of a file name on every system.

    Raises:
        TypeError: If it is no text.
        ValueError: If it names a folder, holds characters that some system does not take, or is
            too long.
    """
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: {name!r}.")
    odd = not name.isprintable() or _NO_NAME.search(name) or name.strip() != name
    if not name or odd or name.startswith(".") or not writable(name):
        raise ValueError(
            "`name` is the first part of a file name, without folders, line breaks or any of "
            f'\\ : * ? " < > |. Received: name={name!r}.'
        )
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"`name` is the first part of a file name, and has {len(name.encode())} bytes; at most "
            f"{_LONGEST_NAME} leave room for the rest. Received: name={name[:40]!r}..."
        )


def check_labels(labels: Any) -> list[str] | None:
    """Return the names of the classes as text.

    Raises:
        TypeError: If they are no list, or one of them is neither text nor a number.
        ValueError: If one is empty, longer than a line, or cannot be written.
    """
    if labels is None:
        return None
    if isinstance(labels, (str, bytes, Mapping)) or not _is_iterable(labels):
        raise TypeError(
            "`labels` must be a list of the names of the classes, in their order. "
            f"Received: labels={labels!r}."
        )
    given = list(labels)
    for label in given:
        if not isinstance(label, (str, numbers.Number)):
            raise TypeError(f"A name in `labels` must be text. Received: {label!r}.")
        # Files hold one name a line.
        if len(str(label).splitlines()) != 1 or not writable(str(label)) or "\0" in str(label):
            raise ValueError(f"A name in `labels` must be one line of text. Received: {label!r}.")
    return [str(label) for label in given]


def read_history(history: object) -> dict[str, list[float | None]] | None:
    """Return the curves of a training as plain numbers; one that is not finite becomes `None`.

    Args:
        history: `History.history`, or `None`.

    Raises:
        TypeError: If it is something else, or holds what are no numbers.
        ValueError: If a name cannot be written.
    """
    if history is None:
        return None
    expected = (
        "`history` must be `History.history` of a training: for each name a list with one number "
        "an epoch."
    )
    if not isinstance(history, Mapping):
        raise TypeError(f"{expected} Received: {type(history).__name__}.")
    curves: dict[str, list[float | None]] = {}
    for name, values in history.items():
        if not isinstance(name, str):
            raise TypeError(f"{expected} Received the name {name!r}.")
        if not writable(name):
            raise ValueError(f"{expected} The name {name!r} cannot be written.")
        if isinstance(values, (str, bytes, Mapping)) or not _is_iterable(values):
            raise TypeError(f"{expected} Received {values!r} for `{name}`.")
        curves[name] = []
        for value in values:
            number = _number(value)
            if number is None:
                raise TypeError(f"{expected} Received {value!r} in `{name}`.")
            curves[name].append(number if math.isfinite(number) else None)
    return curves


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def check_texts(what: str, names: Iterable[object]) -> None:
    """Refuse names that hold halves of surrogate pairs: no file can hold them.

    Raises:
        ValueError: Naming the first.
    """
    for name in names:
        if not writable(str(name)):
            raise ValueError(f"{what} {name!r} holds half of a surrogate pair. Give it another.")


def writable(text: str) -> bool:
    """Say whether a text can be written as UTF-8."""
    return text.isascii() or not any(unicodedata.category(letter) == "Cs" for letter in text)


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True
