"""What the commands share: where they print, how they show progress, and quiet imports."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from keras_kd.cli.exits import one_line
from keras_kd.utils.escaping import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Terminal:
    """The two streams of a command: the result on stdout, everything else on stderr.

    Args:
        as_json: Whether stdout gets one JSON document in place of text.
        quiet: Whether notes and progress bars are left out.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._stdout = sys.stdout

    @functools.cached_property
    def _stderr(self) -> Console:
        # Rich is not imported before it shows something: that takes as long as proving a file.
        from rich.console import Console

        return Console(stderr=True, highlight=False)

    @property
    def width(self) -> int:
        """Columns that a line of the result may take."""
        return columns()

    def note(self, text: str) -> None:
        """Say something that is not the result."""
        if not self.quiet:
            self._stderr.print(plain(text, "\n"), markup=False)

    def result(self, document: dict[str, Any], *texts: str) -> None:
        """Print the result, as text or as JSON.

        Args:
            document: The result as plain JSON values.
            *texts: The result for people, in the order of printing.
        """
        if self.as_json:
            print(json.dumps(document, indent=2, allow_nan=False), file=self._stdout)
            return
        width = self.width
        for text in texts:
            print(wrapped(plain(text, "\n"), width), file=self._stdout)
        # Whoever read the output may have gone, which is told here and not at the end.
        self._stdout.flush()

    @contextlib.contextmanager
    def working(self) -> Iterator[Work]:
        """Show progress bars on stderr, and keep everything but the result off stdout."""
        if self.quiet:
            with contextlib.redirect_stdout(sys.stderr), self._warnings_as_notes():
                yield Work(None)
            return
        progress = _bars(self._stderr)
        work = Work(progress)
        # Libraries announce downloads and the like on stdout, which `--json` reserves.
        with contextlib.redirect_stdout(sys.stderr), self._warnings_as_notes():
            try:
                yield work
            except BaseException:
                # What failed is said in one line: no half-filled bars above it.
                progress.live.transient = True
                raise
            finally:
                # `progress.stop` would add a line even where there were no bars to end.
                progress.live.stop()
                if work.shown and not (self._stderr.is_interactive or progress.live.transient):
                    self._stderr.print()

    @contextlib.contextmanager
    def _warnings_as_notes(self) -> Iterator[None]:
        """Tell in a line what Python would tell with the line of code that it comes from."""

        def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
            # What will change in a library concerns who writes the code.
            if not issubclass(category, DeprecationWarning | FutureWarning | ResourceWarning):
                self.note(f"Note: {one_line(str(message))}")

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield


def columns() -> int:
    """Columns of the terminal that belongs to any of the streams; 80 where there is none."""
    given = os.environ.get("COLUMNS", "")
    if given.isdigit() and int(given):
        return int(given)
    for stream in (0, 1, 2):
        with contextlib.suppress(OSError):
            found = os.get_terminal_size(stream).columns
            if found:
                return found
    return 80


def wrapped(text: str, width: int) -> str:
    """Return a text of lines in which those that are longer than a terminal is wide are broken."""
    if text.isascii():
        lines = [
            part
            for line in text.split("\n")
            for part in ([line] if len(line) <= width else _broken(line, width))
        ]
        return "\n".join(lines)
    # How wide other letters are is no short story.
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width)
    return "\n".join(part.plain for part in Text(text).wrap(console, width))


def _broken(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line, width, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False
    )


def _bars(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
    )


class Work:
    """One bar for each stage of the work, made when the stage first reports.

    Args:
        progress: Where the bars are shown; `None` shows none.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    @property
    def shown(self) -> bool:
        """Whether any stage has reported to an enabled display."""
        return bool(self._bars)

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Report `done` of `total` steps of a stage; `detail` stands behind the bar."""
        if self._progress is None:
            return
        if stage not in self._bars:
            # Not before: an empty display would print an empty line.
            self._progress.start()
            self._bars[stage] = self._progress.add_task(stage, total=total, detail="")
        self._progress.update(self._bars[stage], completed=done, total=total, detail=detail)


def import_keras() -> None:
    """Import Keras and start its backend, without what they log on the way."""
    with native_silence():
        import keras

        # The first tensor makes TensorFlow look for devices and say what it did not find.
        keras.ops.zeros(())
    import logging

    # Advice on tracing and the like concerns who writes the code, not who runs the command.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)


@contextlib.contextmanager
def native_silence() -> Iterator[None]:
    """Hold back what C++ parts write straight to file descriptor 2, unless an error follows."""
    descriptor = os.dup(2)
    try:
        with tempfile.TemporaryFile() as said:
            os.dup2(said.fileno(), 2)
            try:
                yield
            except KeyboardInterrupt:
                # Nothing went wrong: what was said on the way explains nothing.
                raise
            except BaseException:
                os.dup2(descriptor, 2)
                said.seek(0)
                os.write(2, said.read())
                raise
            finally:
                os.dup2(descriptor, 2)
    finally:
        os.close(descriptor)
