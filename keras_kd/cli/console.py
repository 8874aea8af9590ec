"""What the commands share: where they print, how they show progress, and quiet imports."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from keras_kd.cli.exits import one_line
from keras_kd.utils.escaping import plain

if TYPE_CHECKING:
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
        self._stderr = Console(stderr=True, highlight=False)

    @property
    def width(self) -> int:
        """Columns that a line of the result may take."""
        return Console(file=self._stdout).width

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
        console = Console(file=self._stdout, highlight=False)
        for text in texts:
            console.print(plain(text, "\n"), markup=False, soft_wrap=False)

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
