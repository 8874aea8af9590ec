"""A command line run: the command, what becomes of its errors, and what it takes to import."""

from __future__ import annotations

import os
import sys
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


def command(arguments: Sequence[str], *, alone: bool = False) -> Callable[[], int]:
    """Import a command and return it, ready to be run.

    Args:
        arguments: What follows the program's name.
        alone: Whether this process is the command's own, and ends with it.

    Returns:
        What gives the exit code, or raises for `exit_code` to tell.
    """
    if not _is_plain(arguments):
        from keras_kd.cli.program import program

        return program(arguments)
    if alone:
        # No matrices are multiplied there: NumPy's threads for that would be started, look for work
        # and be ended for nothing, an eighth of the time.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The parser, and Pydantic behind it, take a third of the time that verifying takes.
    from keras_kd.cli.verification import prove
    from keras_kd.export import warm

    given = set(arguments) & _FLAGS
    as_json, quiet = "--json" in given, bool(given & {"-q", "--quiet"})
    (folder,) = (word for word in arguments[1:] if word not in given)

    def proven() -> int:
        code = prove(folder, as_json=as_json, quiet=quiet, alone=alone)
        if alone:
            # Python would take apart what was imported, for as long as ONNX Runtime is imported.
            warm.close_all()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    return proven


def run(arguments: Sequence[str]) -> int:
    """Run the program and turn what it raises into one line and an exit code.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit code.
    """
    return exit_code(command(arguments))
