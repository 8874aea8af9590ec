"""Jobs in a process of their own: a converter that crashes takes nothing else down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from . import limits

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def run_tasks(
    job: dict[str, Any],
    tasks: list[dict[str, Any]],
    folder: Path,
    *,
    timeout: float | None = None,
    done: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks one after the other in a worker process, and the rest in a fresh one after a crash.

    Args:
        job: Plain JSON values that hold for all tasks; `kind` names what the worker does.
        tasks: One dict a task, each with an `id`.
        folder: Scratch folder for the job and its results.
        timeout: Seconds a task may take; `None` takes what suits the size of the model or file.
        done: Called with each finished task.

    Returns:
        For every id a dict: the task's result, or `{"error": ..., "crashed": bool,
        "started": bool}`, where `started` is false if the worker failed before its first task.
    """
    results: dict[str, dict[str, Any]] = {}
    waiting = list(tasks)
    attempt = 0
    while waiting:
        attempt += 1
        box = folder / f"{job['kind']}-{attempt}"
        box.mkdir(parents=True)
        (box / "job.json").write_text(
            json.dumps(
                {
                    **job,
                    "tasks": waiting,
                    "sys_path": sys.path,
                    "attempt": attempt,
                    "memory": limits.memory(),
                }
            )
        )
        most = timeout or max(limits.seconds(job, task) for task in waiting)
        ended = _run_once(box, waiting, results, most, done)
        waiting = [task for task in waiting if task["id"] not in results]
        if waiting and ended is not None:
            # The worker names the task it is at before it begins; none named means that it
            # never came so far, and the next process would not either.
            current = box / "current"
            culprit = current.read_text() if current.exists() else ""
            blamed = [task for task in waiting if task["id"] == culprit] or waiting
            for task in blamed:
                results[task["id"]] = {
                    "error": ended,
                    "crashed": True,
                    "started": bool(culprit),
                }
                if done is not None:
                    done(task)
            waiting = [task for task in waiting if task["id"] not in results]
    return results


def _run_once(
    box: Path,
    tasks: list[dict[str, Any]],
    results: dict[str, dict[str, Any]],
    timeout: float,
    done: Callable[[dict[str, Any]], None] | None,
) -> str | None:
    # Returns why the worker ended early, or None when it went through.
    with open(box / "log", "wb") as log:
        process = _start(box, log)
        try:
            clock = time.monotonic()
            while True:
                # Read the state first: what was written before the end is then seen below.
                code = process.poll()
                for task in tasks:
                    path = box / f"{task['id']}.json"
                    if task["id"] not in results and path.exists():
                        results[task["id"]] = json.loads(path.read_text())
                        clock = time.monotonic()
                        if done is not None:
                            done(task)
                if code is not None:
                    break
                if time.monotonic() - clock > timeout:
                    return f"stopped after {timeout:.0f} s without a result"
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if code == 0:
        return None
    # A signal leaves no message of its own; the last line in the log is then about something else.
    return f"the process crashed ({_name(code)}){'' if code < 0 else _tail(box / 'log')}"


class _Worker(subprocess.Popen[bytes]):
    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        if self.stdin is not None:
            self.stdin.close()
        return code


def _start(box: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    return _Worker(
        # -P: a file named like a package in the current folder must not be imported for it.
        [sys.executable, "-P", "-m", "keras_kd.export.worker", str(box)],
        env={**_environment(), **_temporary(box)},
        # Nothing is ever written: its end tells the worker that this process is no more.
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
    )


def _temporary(box: Path) -> dict[str, str]:
    # TensorFlow's traced functions and ONNX Runtime leave files where the system keeps what is
    # temporary, the more so if they are ended: these go with the box.
    folder = box / "temporary"
    folder.mkdir(exist_ok=True)
    return dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder.resolve()))


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    # tf_keras, asked for by this variable, would replace the Keras that reads the model.
    environment.pop("TF_USE_LEGACY_KERAS", None)
    environment.update(
        KERAS_BACKEND="tensorflow",
        # Converters need no accelerator, and the caller may hold all of its memory.
        CUDA_VISIBLE_DEVICES="-1",
        TF_CPP_MIN_LOG_LEVEL="2",
        # Converters walk through sets of names: in one order, so that files repeat.
        PYTHONHASHSEED="0",
        PYTHONPATH=os.pathsep.join(
            part for part in (str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")) if part
        ),
    )
    return environment


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
