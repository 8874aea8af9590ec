"""The command line: `keras-kd demo | distill | export | verify | bench | report | try | ...`."""

from __future__ import annotations

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
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if _is_plain(words):
            # The parser, and Pydantic behind it, take a third of the time that verifying takes.
            from keras_kd.cli.exits import exit_code
            from keras_kd.cli.verification import prove

            given = set(words) & _FLAGS
            (folder,) = (word for word in words[1:] if word not in given)
            return exit_code(
                lambda: prove(
                    folder, as_json="--json" in given, quiet=bool(given & {"-q", "--quiet"})
                )
            )
        from keras_kd.cli import app
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
    return app.run(words)


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
