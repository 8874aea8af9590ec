"""Options of a command from a TOML file, and a TOML file from its options.

Keys are the names of the options, with underscores or dashes. What the command line gives as well
wins over the file.
"""

from __future__ import annotations

import os
import tomllib
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from keras_kd.export.writing import write_file
from keras_kd.utils import archives
from keras_kd.utils.errors import did_you_mean

UNSAVED = ("config", "save_config", "help")
"""Options that a file does not hold."""


def read(context: typer.Context, path: str | None, command: Callable[..., Any]) -> str | None:
    """Take the options of a file as defaults of this call: what the callback of `--config` does.

    Args:
        context: Of the call.
        path: Path of the file, or `None`.
        command: The function behind the command, whose annotations are the types of its options.

    Returns:
        The path.

    Raises:
        ValueError: If the file is missing, no TOML, names an unknown option, or gives one a value
            of another type.
    """
    if path is None:
        return None
    problem = archives.file_problem(path)
    if problem is not None:
        raise ValueError(f"`{path}` {problem}. Pass a file that `--save-config` wrote.")
    try:
        given = tomllib.loads(archives.read_bytes(path, 1 << 20).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is no TOML: {error}. Mend the line.") from error
    hints = typing.get_type_hints(command)
    known = [str(option.name) for option in context.command.params if option.name not in UNSAVED]
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(
                f"`{path}` has the key `{key}`, which is no option of "
                f"`keras-kd {context.info_name}`.{hint} There are {', '.join(known)}."
            )
        if name in values:
            raise ValueError(f"`{path}` gives `{name}` twice. Leave one out.")
        values[name] = _checked(path, key, value, hints[name])
    context.default_map = {**(context.default_map or {}), **values}
    return path


_NAMES = {int: "integer", float: "number", bool: "boolean", str: "text"}


def _checked(path: str, key: str, value: Any, hint: Any) -> Any:
    # Of `int | None` and `list[str] | None` what is not None.
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    kind = kinds[0] if kinds and typing.get_origin(hint) is not list else hint
    several = typing.get_origin(kind) is list
    if several:
        kind = typing.get_args(kind)[0]
    values = value if several and isinstance(value, list) else [value]
    for one in values:
        # A bool is an int to Python, and a fraction would lose what is behind the point.
        fits = isinstance(one, (int, float) if kind is float else kind)
        if not fits or (isinstance(one, bool) and kind is not bool):
            raise ValueError(
                f"`{key}` in `{path}` is of type {_NAMES[kind]}"
                f"{' or a list of them' if several else ''}. Received: {one!r}."
            )
    return values if several else value


def save(path: str | os.PathLike[str], values: dict[str, Any], order: Iterable[str]) -> Path:
    """Write options to a file that `--config` reads.

    Args:
        path: Path of the file.
        values: By name; what is `None`, or an empty list, is left out.
        order: Names in the order of the file.

    Returns:
        The path.

    Raises:
        ImportError: If `tomli_w` is not installed.
        OSError: If it cannot be written.
    """
    return write_file(path, text(values, order))


def text(values: dict[str, Any], order: Iterable[str]) -> str:
    """Return the options as TOML, see `save`."""
    try:
        import tomli_w
    except ImportError as error:
        raise ImportError(
            "A configuration is written with `tomli_w`, which is not installed. "
            'Install it with: pip install "keras_kd[report]"'
        ) from error
    kept = {
        name: values[name]
        for name in order
        if name not in UNSAVED and values[name] not in (None, [], ())
    }
    return tomli_w.dumps(kept)
