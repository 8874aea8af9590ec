"""All commands in one program, as Typer parses them."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from keras_kd.cli.exits import fail, one_line

_FRAMED = 80
"""Columns from which on the help has frames."""

_COMMANDS = {
    "demo": "demo",
    "distill": "distill",
    "export": "export",
    "try": "try_page",
    "verify": "verify",
    "bench": "bench",
    "report": "report",
    "robust": "robust",
    "tune": "tune",
    "lifelong": "lifelong",
    "doctor": "doctor",
}
"""The commands, and the module of each: it has a function of its own name."""


_CACHE = "cache"


def _program(asked: str) -> typer.Typer:
    """The program with the command that is asked for; with all of them if it is none, for help."""
    app = typer.Typer(
        name="keras-kd",
        add_completion=False,
        no_args_is_help=False,
        rich_markup_mode="markdown",
        help="Distill a Keras model, export it to TFLite and ONNX, and prove that the files work.",
        epilog="Exit codes: 0 done, 1 a file failed its check, 2 bad input, 130 interrupted.",
    )
    # Importing the others would take as long as verifying a small file.
    for name in [asked] if asked in _COMMANDS else _COMMANDS:
        module = importlib.import_module(f"keras_kd.cli.{_COMMANDS[name]}")
        command: Callable[..., None] = getattr(module, _COMMANDS[name])
        # Without `short_help` the list of commands in a narrow terminal cuts the sentence.
        app.command(name, short_help=(command.__doc__ or "").partition("\n")[0])(command)
    if asked not in _COMMANDS:
        app.add_typer(importlib.import_module("keras_kd.cli.cache").app, name=_CACHE)
    app.callback(invoke_without_command=True)(_keras_kd)
    return app


# Typer's base class of all usage errors is not public under one name in all of its versions; it is
# the parent of `BadParameter`, which is.
_UsageError: Any = typer.BadParameter.__bases__[0]


def _keras_kd(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from keras_kd import __version__

        print(f"keras-kd {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def program(arguments: Sequence[str]) -> Callable[[], int]:
    """Return the program with the command that is asked for, ready to be run.

    Args:
        arguments: What follows the program's name.
    """
    command = next((word for word in arguments if not word.startswith("-")), "")
    # With help or a version asked for, too, since those end before the command.
    app = _program("" if arguments and arguments[0] != command else command)
    columns = shutil.get_terminal_size().columns
    # Rich's frames leave no room for whole names of options there, and cut them.
    app.rich_markup_mode = "markdown" if columns >= _FRAMED else None
    app.info.context_settings = {"terminal_width": columns} if columns < _FRAMED else None
    return lambda: _called(app, command, list(arguments))


def _below(command: str, arguments: Sequence[str]) -> list[str]:
    """The command below `cache` that is asked for, where there is such a one."""
    words = [word for word in arguments if not word.startswith("-")][1:2]
    return [word for word in words if command == _CACHE and word in ("write", "verify")]


def _refuse_repeated(parsed: Any, arguments: Sequence[str]) -> None:
    """Raise `ValueError` for an option that is given twice, of which the parser takes the last."""
    words = list(arguments)
    while words and words[0] in getattr(parsed, "commands", ()):
        parsed = parsed.commands[words.pop(0)]
    options = {
        name: option
        for option in parsed.params
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("-")
    }
    given: dict[str, str] = {}
    while words and words[0] != "--":
        name, equals, _ = words.pop(0).partition("=")
        option = options.get(name)
        if option is None or option.multiple:
            continue
        if not option.is_flag and not equals and words:
            words.pop(0)
        # The same flag twice says the same.
        if option.name in given and not (option.is_flag and given[option.name] == name):
            before = given[option.name]
            both = f"`{name}` is given twice" if before == name else f"`{before}` and `{name}`"
            raise ValueError(f"{both}: leave one out.")
        given[option.name] = name


def _called(app: typer.Typer, command: str, arguments: list[str]) -> int:
    _refuse_repeated(typer.main.get_command(app), arguments)
    try:
        code = app(args=arguments, prog_name="keras-kd", standalone_mode=False)
    except _UsageError as error:
        known = [*_COMMANDS, _CACHE]
        asked = " ".join([command, *_below(command, arguments)]) if command in known else ""
        reason = one_line(error.format_message()).rstrip(".")
        end = "" if reason.endswith("?") else "."
        return fail(f"{reason}{end} See `{' '.join(['keras-kd', asked]).strip()} --help`.", 2)
    except typer.Abort:
        raise KeyboardInterrupt from None
    return int(code or 0)
