"""The formats that an export knows. A new one is a function here and a line in `_OWN`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from keras_kd.export.formats.base import Format
from keras_kd.utils.errors import did_you_mean


def _tflite() -> Format:
    from keras_kd.export.formats.tflite.tflite_format import TFLite

    return TFLite()


def _onnx() -> Format:
    from keras_kd.export.formats.onnx.onnx_format import ONNX

    return ONNX()


_OWN: dict[str, Callable[[], Format]] = {"tflite": _tflite, "onnx": _onnx}

DEFAULT = tuple(_OWN)
"""The names of those that are made unless asked otherwise."""

_FOREIGN: dict[str, str] = {}
_LOADED: dict[str, Format] = {}


def register(cls: type[Format]) -> type[Format]:
    """Make a format known to `keras_kd.export`, as a decorator of its class.

    Its class must be found in a module that can be imported: conversion and measuring run in
    processes of their own, which import it from there.

    Args:
        cls: The class, made without arguments.

    Returns:
        The class.

    Raises:
        ValueError: If its name or one of its suffixes is taken, or the class cannot be imported.
    """
    if cls.__module__ == "__main__" or "." in cls.__qualname__:
        raise ValueError(
            f"The format `{cls.name}` is defined in `{cls.__module__}.{cls.__qualname__}`, which "
            "other processes cannot import. Define its class at the top of a module."
        )
    if cls.name in _OWN:
        raise ValueError(f"`{cls.name}` is a format of keras_kd. Choose another name.")
    for name in names():
        taken = set(cls.suffixes) & set(get(name).suffixes)
        if name != cls.name and taken:
            raise ValueError(
                f"The suffix `{taken.pop()}` of the format `{cls.name}` is that of `{name}`. "
                "Choose another one: a file is told by it."
            )
    _FOREIGN[cls.name] = f"{cls.__module__}:{cls.__qualname__}"
    _LOADED[cls.name] = cls()
    return cls


def unregister(name: str) -> None:
    """Forget a format that was registered."""
    _FOREIGN.pop(name, None)
    _LOADED.pop(name, None)


def foreign() -> dict[str, str]:
    """Return where the registered formats are found, for another process's `adopt`."""
    return dict(_FOREIGN)


def adopt(places: Mapping[str, str]) -> None:
    """Register the formats of another process.

    Args:
        places: What `foreign` returned there.
    """
    for name, place in places.items():
        if name not in _FOREIGN:
            module, _, cls = place.partition(":")
            # The module may register it, or be imported already.
            found = getattr(importlib.import_module(module), cls)
            if name not in _FOREIGN:
                register(found)


def names() -> tuple[str, ...]:
    """Return the names of all formats."""
    return (*_OWN, *_FOREIGN)


def get(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ValueError: If it is not known, with close matches.
    """
    if name not in _LOADED:
        if name not in _OWN:
            hint = did_you_mean(name, names())
            raise ValueError(
                f"`{name}` is no format that is known here. Expected one of {', '.join(names())}; "
                f"one of your own is known once its module is imported.{hint}"
            )
        _LOADED[name] = _OWN[name]()
    return _LOADED[name]


def every() -> Iterator[Format]:
    """Yield all formats."""
    for name in names():
        yield get(name)


def of_file(path: Path) -> Format:
    """Return the format that a file is opened as, by its suffix.

    Raises:
        ValueError: If it is that of no format.
    """
    for each in every():
        if path.suffix == each.suffixes[0]:
            return each
    known = " nor a ".join(f"`{each.suffixes[0]}`" for each in every())
    raise ValueError(f"`{path}` is neither a {known} file.")


def color(name: str) -> str:
    """Return the color of a format in plots; gray for what is none."""
    return get(name).color if name in names() else "#444444"
