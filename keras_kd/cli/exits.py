"""What becomes of the errors of a command: one line, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from keras_kd.export.scratch import ended_by_signals
from keras_kd.utils.escaping import plain

# What the checks, the loaders and the exporter raise for input that cannot be used. Anything else
# is a mistake of this program, and keeps its traceback.
_BAD_INPUT = (ValueError, TypeError, OSError, ImportError, ArithmeticError, MemoryError)


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and turn what it raises into one line and an exit code.

    Args:
        command: Gives the exit code, where it raises nothing.
    """
    try:
        with ended_by_signals(interrupts=True):
            code = command()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as ended:
        # 128 and the number of the signal that asked for it.
        if not isinstance(ended.code, int) or ended.code <= 128:
            raise
        return fail("ended by a signal. No half-written file was left behind.", ended.code)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has gone: there is nobody to tell.
        sys.stderr.close()
        return 1
    except _BAD_INPUT as error:
        return fail(one_line(_reason(error)), 2)
    if code == 130:
        return fail("interrupted. No half-written file was left behind.", 130)
    return code


def _reason(error: BaseException) -> str:
    # An OSError of the system's own names its file apart; ours carry a whole sentence.
    if isinstance(error, OSError) and error.filename is not None:
        return f"`{error.filename}`: {error.strerror}. Choose another path or mend this one."
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "this needs more memory than there is. Pass less data, or free some."
    return str(error) or type(error).__name__


def one_line(text: str) -> str:
    """Return a text as one line of at most 600 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 600 else f"{text[:600]}..."


def fail(reason: str, code: int) -> int:
    """Say why on stderr, and return the exit code."""
    print(f"keras-kd: {plain(reason)}", file=sys.stderr)
    return code
