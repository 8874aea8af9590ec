"""The command line: `keras-kd demo | distill | export | verify | bench | report | try | ...`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `keras-kd`.

    Args:
        arguments: What follows the program's name. Defaults to `sys.argv[1:]`.

    Returns:
        The exit code: 0, or 1 where a file failed its check, 2 for bad input with one line of
        reason on stderr, 130 after Ctrl-C.
    """
    # The process is the command's own, so that it may set TensorFlow's log level; the library,
    # which lives in a process of the user's, never does.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Where models are run, nobody else needs to hear of it.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if arguments is not None:
        return _run(list(arguments))
    # Imports make next to no garbage. Looking for it while they run, again in what they have left,
    # and once more at the end takes a sixth of the time of verifying a small export.
    gc.disable()
    try:
        return _run(sys.argv[1:], alone=True)
    finally:
        gc.freeze()


def _run(words: list[str], *, alone: bool = False) -> int:
    """Run a command; `alone` says that this process is its own."""
    try:
        from keras_kd.cli import app, exits

        command = app.command(words, alone=alone)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("rich", "typer"):
            raise
        if words[:1] == ["doctor"]:
            from keras_kd.cli import installation

            return installation.main(words[1:])
        print(
            f"keras-kd: the command line needs `{error.name}`, which is not installed. "
            'Install it with: pip install "keras_kd[report]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        # Before `app.run` is there to say it: the imports take a second or more.
        print("keras-kd: interrupted before any work began.", file=sys.stderr)
        return 130
    if alone:
        gc.freeze()
        gc.enable()
    return exits.exit_code(command)
