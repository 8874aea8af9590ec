"""Jobs in a process of their own: a converter that crashes takes nothing else down."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from keras_kd.export import limits, warm

Results = dict[str, dict[str, Any]]
"""What came of tasks, by id."""

_LOOK = 0.02
"""Seconds between looks at a worker."""


class Run:
    """Tasks one after the other in a worker process, and the rest in a fresh one after a crash.

    `advance` looks at the worker and comes back at once, so that one thread may see to several.

    Args:
        job: Plain JSON values that hold for all tasks; `kind` names what the worker does.
        tasks: One dict a task, each with an `id`.
        folder: Scratch folder for the job and its results.
        timeout: Seconds a task may take; `None` takes what suits the size of the model or file.
        done: Called with each finished task.
    """

    def __init__(
        self,
        job: dict[str, Any],
        tasks: list[dict[str, Any]],
        folder: Path,
        *,
        timeout: float | None = None,
        done: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.results: Results = {}
        """For every id a dict: the task's result, or `{"error": ..., "crashed": bool,
        "started": bool}`, where `started` is false if the worker failed before its first task."""
        self._job = job
        self._waiting = list(tasks)
        self._folder = folder
        self._timeout = timeout
        self._done = done
        self._attempt = 0
        self._process: _Process | None = None

    def advance(self) -> bool:
        """Take in what has come; returns whether every task has a result."""
        if self._process is None:
            if not self._waiting:
                return True
            self._begin()
        ended = self._look()
        if self._process is None and ended:
            self._blame(ended)
        return not self._waiting and self._process is None

    def close(self) -> None:
        """End the worker if it runs."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.kill()
            process.wait()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        self._attempt += 1
        self._box = self._folder / f"{self._job['kind']}-{self._attempt}"
        self._box.mkdir(parents=True)
        most = limits.memory()
        content = {
            **self._job,
            "tasks": self._waiting,
            "sys_path": sys.path,
            "attempt": self._attempt,
            "memory": most,
        }
        (self._box / "job.json").write_text(json.dumps(content))
        self._most = self._timeout or max(limits.seconds(self._job, t) for t in self._waiting)
        self._clock = time.monotonic()
        self._process = start(self._job["kind"], self._box, most)

    def _look(self) -> str:
        """Take in results; returns why the worker ended early, if it did."""
        process = self._process
        assert process is not None
        # Read the state first: what was written before the end is then seen below.
        code = process.poll()
        for task in list(self._waiting):
            path = self._box / f"{task['id']}.json"
            if path.exists():
                self._clock = time.monotonic()
                self._finish(task, json.loads(path.read_text()))
        if code is not None:
            self.close()
            if code == 0:
                return ""
            # A signal leaves no message of its own; the last line in the log is then about
            # something else.
            tail = "" if code < 0 else _tail(self._box / "log")
            return f"the process crashed ({_name(code)}){tail}"
        if time.monotonic() - self._clock > self._most:
            self.close()
            return f"stopped after {self._most:.0f} s without a result"
        return ""

    def _finish(self, task: dict[str, Any], result: dict[str, Any]) -> None:
        self.results[task["id"]] = result
        self._waiting.remove(task)
        if self._done is not None:
            self._done(task)

    def _blame(self, reason: str) -> None:
        # The worker names the task it is at before it begins; none named means that it never came
        # so far, and the next process would not either.
        current = self._box / "current"
        culprit = current.read_text() if current.exists() else ""
        blamed = [task for task in self._waiting if task["id"] == culprit] or list(self._waiting)
        for task in blamed:
            failure = {"error": reason, "crashed": True, "started": bool(culprit)}
            self._finish(task, failure)


def run_tasks(
    job: dict[str, Any],
    tasks: list[dict[str, Any]],
    folder: Path,
    *,
    timeout: float | None = None,
    done: Callable[[dict[str, Any]], None] | None = None,
    meanwhile: Callable[[Results], object] | None = None,
) -> Results:
    """Run tasks to their end, see `Run`.

    Args:
        job: As for `Run`.
        tasks: As for `Run`.
        folder: As for `Run`.
        timeout: As for `Run`.
        done: As for `Run`.
        meanwhile: Called with what has come so far, again and again while the worker is at work.

    Returns:
        The results by id.
    """
    with Run(job, tasks, folder, timeout=timeout, done=done) as run:
        while not run.advance():
            if meanwhile is not None:
                meanwhile(run.results)
            time.sleep(_LOOK)
    return run.results


class _Process(Protocol):
    """What does a job."""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or `None` while it runs."""

    def kill(self) -> None:
        """End it."""

    def wait(self) -> object:
        """Wait for its end."""


def start(kind: str, box: Path, memory: int | None) -> _Process:
    """Begin a job in a process that waits for such jobs, or in a fresh one.

    Args:
        kind: Of the job.
        box: Its folder, with `job.json`.
        memory: Bytes that it may ask for.
    """
    return warm.Job(kind, box, memory) if kind in warm.KINDS else Fresh(box)


class Fresh(subprocess.Popen[bytes]):
    """A process for one job, whose memory and cold start are its own.

    Args:
        box: The folder of the job, with `job.json`.
    """

    def __init__(self, box: Path) -> None:
        with open(box / "log", "wb") as log:
            super().__init__(
                # -P: a file named like a package in the current folder must not be imported for it.
                [sys.executable, "-P", "-m", "keras_kd.export.worker", str(box)],
                env={**warm.environment(), **_temporary(box)},
                # Nothing is ever written: its end tells the worker that this process is no more.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and close the pipe."""
        code = super().wait(timeout)
        if self.stdin is not None:
            self.stdin.close()
        return code


def _temporary(box: Path) -> dict[str, str]:
    # TensorFlow's traced functions and ONNX Runtime leave files where the system keeps what is
    # temporary, the more so if they are ended: these go with the box.
    folder = box / "temporary"
    folder.mkdir(exist_ok=True)
    return dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder.resolve()))


def _name(code: int) -> str:
    if code < 0:
        try:
            return f"signal {-code}, {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def _tail(log: Path) -> str:
    lines = [
        line.strip()
        for line in log.read_text(errors="replace").splitlines()
        if line.strip() and not line.startswith(("W0000", "I0000", "WARNING"))
    ]
    return f": {lines[-1][:300]}" if lines else ""
