"""A command line run: the command, what becomes of its errors, and what it takes to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from keras_kd.cli.exits import exit_code

_FLAGS = {"--json", "--quiet", "-q"}


def _is_plain(words: Sequence[str]) -> bool:
    """Whether this is `verify` with a folder and flags alone, which need no parser."""
    rest = [word for word in words[1:] if word not in _FLAGS]
    return (
        words[:1] == ["verify"]
        and len(rest) == 1
        and bool(rest[0])
        and not rest[0].startswith("-")
        and len(set(words[1:])) == len(words) - 1
    )


def command(arguments: Sequence[str]) -> Callable[[], int]:
    """Import a command and return it, ready to be run.

    Args:
        arguments: What follows the program's name.

    Returns:
        What gives the exit code, or raises for `exit_code` to tell.
    """
    if not _is_plain(arguments):
        from keras_kd.cli.program import program

        return program(arguments)
    # The parser, and Pydantic behind it, take a third of the time that verifying takes.
    from keras_kd.cli.verification import prove

    given = set(arguments) & _FLAGS
    (folder,) = (word for word in arguments[1:] if word not in given)
    return lambda: prove(folder, as_json="--json" in given, quiet=bool(given & {"-q", "--quiet"}))


def run(arguments: Sequence[str]) -> int:
    """Run the program and turn what it raises into one line and an exit code.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit code.
    """
    return exit_code(command(arguments))
