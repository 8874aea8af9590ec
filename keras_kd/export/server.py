"""The process that waits for jobs: `python -m keras_kd.export.server KIND SECONDS PARENT FORKS`.

It imports what a kind of job needs, once, and forks for each job: a job begins with the state of a
fresh process, may crash or take all of its memory, and leaves nothing to the next one. Where
processes do not fork, it does a single job and ends.

Requests come on standard input, a line each: `do FOLDER` begins the job of that folder, see
`worker`, whose `request.json` says what a process would have of the one that starts it; `kill
FOLDER` ends it. `FOLDER/began` and `FOLDER/ended` (the exit code,
negative for a signal) say what became of it. The process ends with the process PARENT, which holds
the other end of standard input, and after SECONDS without a job.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import queue
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from keras_kd.export import limits, worker
from keras_kd.export.absent_packages import without
from keras_kd.export.formats import registry
from keras_kd.export.writing import hand_over

_FIRST = {
    "measure": (),
    "convert": ("tensorflow", "tensorflow.lite", "keras", "tensorflow.saved_model"),
}
"""What each kind of job imports before what its formats need. A package that is missing is missed
by the job, which says so."""

_LAST = {"measure": (), "convert": ("keras_kd.export.convert",)}
_MEASURING = ("keras_kd.export.verification.scores", "keras_kd.export.verification.measurer")

_UNUSED = ("IPython", "jax", "matplotlib", "pandas", "scipy", "sklearn")
"""What Keras and TensorFlow import wherever it is installed, for tools that no job calls: a third
of the time of importing them."""

_LOOK = 0.01
"""Seconds between looks at running jobs."""

_REST = 1.0
"""Seconds between looks at the parent when there are none."""


def main(kind: str, idle: float, parent: int, *, forks: bool) -> None:
    """Import, then do jobs until the parent ends or nothing was asked for too long.

    Args:
        kind: Of the jobs: what is imported.
        idle: Seconds without a job after which the process ends.
        parent: The process that asks.
        forks: Whether each job gets a fork of the process.
    """
    # Ctrl-C reaches every process of a terminal; what becomes of the jobs is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not forks:
        _single(kind, idle)
        return
    imported = threading.Event()
    watch = threading.Thread(target=_end_with, args=[parent, imported], daemon=True)
    watch.start()
    preload(kind)
    imported.set()
    # A fork has but one thread, so this one is to have no other.
    watch.join()
    _Forks(parent, idle).serve()


def _end_with(parent: int, imported: threading.Event) -> None:
    while not imported.wait(_REST / 4):
        if os.getppid() != parent:
            os._exit(1)


def preload(kind: str) -> None:
    """Import what a kind of job needs.

    Args:
        kind: Of the jobs.
    """
    # Looking for garbage in what is imported takes a tenth of the time.
    gc.disable()
    try:
        _import(kind)
        # What is imported stays: the garbage collectors of the jobs need not walk through it. What
        # the small imports of measuring leave behind is not worth a walk before.
        if kind == "convert":
            gc.collect()
        gc.freeze()
    finally:
        gc.enable()


def _import(kind: str) -> None:
    formats = list(registry.every())
    modules = [*_FIRST[kind], *_LAST[kind]]
    if kind == "convert":
        modules += [name for each in formats for name in each.converter_packages]
    modules += [name for each in formats for name in each.runtime_packages]
    for name in [*modules, *_MEASURING]:
        heavy = name in ("tensorflow", "tensorflow.lite", "keras")
        with without(_UNUSED if heavy else ()), contextlib.suppress(ImportError):
            importlib.import_module(name)
    if kind == "convert":
        for each in formats:
            with contextlib.suppress(ImportError):
                each.warm_up()


class _Forks:
    def __init__(self, parent: int, idle: float) -> None:
        self._parent = parent
        self._idle = idle
        self._jobs: dict[int, Path] = {}

    def serve(self) -> None:
        text = b""
        rested = time.monotonic()
        try:
            while os.getppid() == self._parent:
                ready, _, _ = select.select([0], [], [], _LOOK if self._jobs else _REST)
                if ready:
                    read = os.read(0, 1 << 16)
                    if not read:
                        return
                    *lines, text = (text + read).split(b"\n")
                    for line in lines:
                        self._do(*_words(line))
                self._look()
                if self._jobs or ready:
                    rested = time.monotonic()
                elif time.monotonic() - rested > self._idle:
                    return
        finally:
            for pid in self._jobs:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _do(self, what: str, box: Path) -> None:
        if what == "kill":
            for pid, running in self._jobs.items():
                if running == box:
                    os.kill(pid, signal.SIGKILL)
            return
        own = os.getpid()
        with warnings.catch_warnings():
            # Python warns of the sleeping threads of NumPy's BLAS, which survives forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _as_a_fork(box, own)
        self._jobs[pid] = box
        _note(box / "began", pid)

    def _look(self) -> None:
        for pid in list(self._jobs):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                _note(self._jobs.pop(pid) / "ended", os.waitstatus_to_exitcode(status))


def _words(line: bytes) -> tuple[str, Path]:
    what, _, box = os.fsdecode(line).partition(" ")
    return what, Path(json.loads(box))


def _note(path: Path, number: int) -> None:
    # Whoever asked may have gone, and the folder with it.
    with contextlib.suppress(OSError):
        hand_over(path, str(number))


def _as_a_fork(box: Path, server: int) -> None:
    code = 1
    try:
        # Requests are none of its business.
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        limits.end_with(server)
        _do(box)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # What modules have registered for the end of a process is that of the server.
        os._exit(code)


def _do(box: Path) -> None:
    """Become what a process would be that the caller starts now, and do the job."""
    request: dict[str, Any] = json.loads((box / "request.json").read_text())
    log = os.open(box / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    # What libraries leave behind when they crash goes with the job.
    (box / "tmp").mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(box / "tmp")
    if request["folder"] is not None:
        os.chdir(request["folder"])
    limits.take_over(request["limits"])
    limits.bound(request["memory"])
    worker.main(box)


def _single(kind: str, idle: float) -> None:
    boxes: queue.Queue[Path] = queue.Queue()
    threading.Thread(target=_read, args=[boxes], daemon=True).start()
    preload(kind)
    try:
        box = boxes.get(timeout=idle)
    except queue.Empty:
        return
    _note(box / "began", os.getpid())
    _do(box)
    _note(box / "ended", 0)


def _read(boxes: queue.Queue[Path]) -> None:
    for line in sys.stdin.buffer:
        boxes.put(_words(line.rstrip())[1])
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), forks=sys.argv[4] == "forks")
