"""Processes that have imported what jobs need and wait for them, as long as this program lives.

Importing TensorFlow takes longer than all conversions of a small model: the first job of a program
starts a process for it, see `server`, and later ones find it there. One that is asked for under
another environment, or that has ended, is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from keras_kd.export import limits
from keras_kd.export.writing import hand_over

IDLE = 900.0
"""Seconds without a job after which a process ends and gives its memory back."""

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]

_ANY = frozenset(
    {
        # What importing TensorFlow sets: it would do so in the process itself.
        *("ENABLE_RUNTIME_UPTIME_TELEMETRY", "TF2_BEHAVIOR", "HDF5_PLUGIN_PATH"),
        *("TPU_ML_PLATFORM", "TPU_ML_PLATFORM_VERSION", "TPU_SKIP_MDS_QUERY"),
        *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),
        # What changes from line to line of a shell and from test to test.
        *("_", "PWD", "OLDPWD", "COLUMNS", "LINES", "PYTEST_CURRENT_TEST"),
    }
)
"""Variables that importing anything does not depend on; jobs get them as they are."""


def environment() -> dict[str, str]:
    """Return the environment of a process that works for this one."""
    found = dict(os.environ)
    # tf_keras, asked for by this variable, would replace the Keras that reads the model.
    found.pop("TF_USE_LEGACY_KERAS", None)
    found.update(
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
    # Imported, ONNX Runtime starts a thread that reports to its makers, which no fork has, and
    # leaves a file in the folder for what is temporary.
    found.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return found


FORKS = sys.platform == "linux"
"""Whether a job may be a fork of the waiting process: macOS's own libraries do not survive one."""


class _Process(Protocol):
    """What `Server` needs of `subprocess.Popen`."""

    stdin: IO[bytes] | None

    def poll(self) -> int | None:
        """Return the exit code, or `None` while it runs."""

    def kill(self) -> None:
        """End it."""

    def wait(self) -> int:
        """Wait for its end."""


class _Fork:
    """A fork of this process that waits for one job.

    Args:
        kind: Of the jobs.
        log: Receives what it writes.
    """

    def __init__(self, kind: str, log: IO[bytes]) -> None:
        reading, writing = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.close(writing)
                for source, target in ((reading, 0), (log.fileno(), 1), (log.fileno(), 2)):
                    os.dup2(source, target)
                os.environ.clear()
                os.environ.update(environment())
                os.chdir(os.path.abspath(os.sep))
                limits.end_with(parent)
                from keras_kd.export import server

                server.main(kind, IDLE, parent, forks=False)
            finally:
                # Whatever happened, nothing of the program's own is to run a second time.
                os._exit(1)
        os.close(reading)
        self.stdin: IO[bytes] | None = open(writing, "wb", buffering=0)  # noqa: SIM115
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or `None` while it runs."""
        if self._code is None:
            found, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if found else None
        return self._code

    def kill(self) -> None:
        """End it."""
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code


class Server:
    """A process that waits for jobs.

    Args:
        kind: Of the jobs.
        key: What it was started under, see `_key`.
        fork: Whether it is a fork of this process.
    """

    def __init__(self, kind: str, key: tuple[Any, ...], *, fork: bool = False) -> None:
        self.key = key
        self.users = 0
        # A fork for each job would cost more than it saves where there is one job.
        self.forks = FORKS and not fork
        self._lock = threading.Lock()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self.proven = False
        """Whether it has begun a job, so that its imports work."""
        if fork:
            self.process: _Process = _Fork(kind, self._log)
            return
        # -P: a file named like a package in the current folder must not be imported for it.
        words = [sys.executable, "-P", "-m", "keras_kd.export.server", kind, str(IDLE)]
        self.process = subprocess.Popen(
            [*words, str(os.getpid()), "forks" if FORKS else "single"],
            env=environment(),
            # Its end tells the process that this one is no more.
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            # No folder is kept busy by a process that only waits; jobs go to that of the caller.
            cwd=os.path.abspath(os.sep),
            bufsize=0,
        )

    def send(self, what: str, box: Path) -> None:
        """Ask for something, see `server`; nothing happens if the process has ended."""
        line = f"{what} {json.dumps(str(box))}\n".encode()
        with self._lock, contextlib.suppress(OSError, ValueError):
            stream = self.process.stdin
            assert stream is not None
            view = memoryview(line)
            while view:
                view = view[stream.write(view) :]

    def kill(self, box: Path) -> None:
        """End a job, and with it the whole process if that does not do as it is told."""
        if self.forks and (box / "began").exists():
            self.send("kill", box)
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end and self.process.poll() is None:
                if (box / "ended").exists():
                    return
                time.sleep(0.01)
        self.close()

    def close(self) -> None:
        """End the process, and the jobs that it has."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close what this process has of it."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
            self._log.close()

    def log(self) -> bytes:
        """What the process has written before its first job."""
        try:
            self._log.seek(0)
            return self._log.read()
        except ValueError:
            return b""


_PATIENCE = 5.0
"""Seconds in which a process ends a job that it is told to end."""


class Job:
    """A job that a waiting process does, with what `process` needs of `subprocess.Popen`.

    Args:
        kind: One of `KINDS`.
        box: Its folder, with `job.json`, see `worker`.
        memory: Bytes that it may ask for.
    """

    def __init__(self, kind: str, box: Path, memory: int | None) -> None:
        self._kind = kind
        self._box = box.absolute()
        request = {
            "environment": environment(),
            "folder": _folder(),
            "limits": limits.own(),
            "memory": memory,
        }
        hand_over(box / "request.json", json.dumps(request))
        self._code: int | None = None
        self._server = _lease(kind)
        self._server.send("do", self._box)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or `None` while it runs."""
        if self._code is not None:
            return self._code
        # Read first: what was written before the end is then seen below.
        end = self._server.process.poll()
        began, ended = (self._box / "began").exists(), self._box / "ended"
        self._server.proven |= began
        if ended.exists():
            self._end(int(ended.read_text()))
        elif end is not None and not began and (end == 0 or self._server.proven):
            # It had waited too long, or somebody has ended it, before it knew of this job.
            _release(self._server)
            self._server = _lease(self._kind)
            self._server.send("do", self._box)
        elif end is not None:
            with open(self._box / "log", "ab") as log:
                log.write(self._server.log())
            self._end(end)
        return self._code

    def kill(self) -> None:
        """End the job."""
        if self._code is None:
            self._server.kill(self._box)
            self._end(-int(signal.SIGTERM))

    def wait(self) -> None:
        """Nothing: `poll` says when the job has ended, and `kill` waits for that."""

    def _end(self, code: int) -> None:
        self._code = code
        _release(self._server)


KINDS = ("convert", "measure")
"""The kinds of jobs that a waiting process does; the first one has all that the second needs."""

_POOL: dict[str, Server] = {}
_LOCK = threading.RLock()


def prepare(kind: str) -> None:
    """Start the process for a kind of job, so that it imports while the caller does other things.

    Args:
        kind: One of `KINDS`.
    """
    with _LOCK:
        if kind not in _FORKED:
            _found(kind)


@contextlib.contextmanager
def forking(kind: str) -> Iterator[None]:
    """Import what a kind of job needs, so that the process for a job in here is a fork of this one.

    `fork_prepared` makes it. The fork has all that this process has imported, and the later it is
    made, the less is written twice. For a process that is a command's own: the state of a user's
    program is none of the business of jobs.

    Args:
        kind: One of `KINDS`.
    """
    from keras_kd.export import server

    if _may_fork():
        # What cannot be imported the job will miss, and say so.
        with contextlib.suppress(Exception):
            server.preload(kind)
        _FORKED.add(kind)
    try:
        yield
    finally:
        _FORKED.discard(kind)


_FORKED: set[str] = set()
"""Kinds of jobs for which this process has imported all."""


def fork_prepared(kind: str) -> None:
    """Make the fork of `forking`, in its block: when all is read, and no thread runs yet."""
    with _LOCK:
        if kind in _FORKED and _may_fork():
            _POOL[kind] = Server(kind, _key(), fork=True)
        _FORKED.discard(kind)


def _may_fork() -> bool:
    return FORKS and threading.active_count() == 1 and not _POOL


def _lease(kind: str) -> Server:
    with _LOCK:
        server = _found(kind)
        server.users += 1
        if not server.forks:
            # It does one job; the next one starts another, or `prepare` does before.
            _POOL.pop(kind, None)
        return server


def _release(server: Server) -> None:
    with _LOCK:
        server.users -= 1
        if not server.users and server not in _POOL.values():
            server.close()


def _found(kind: str) -> Server:
    key = _key()
    for name in KINDS if kind == "measure" and FORKS else (kind,):
        server = _POOL.get(name)
        if server is None:
            continue
        if server.process.poll() is None and server.key == key:
            return server
        del _POOL[name]
        if not server.users:
            server.close()
    server = _POOL[kind] = Server(kind, key)
    return server


def _key() -> tuple[Any, ...]:
    """What a process must have been started under to do as one that is started now."""
    found = environment()
    who = [os.getuid(), os.geteuid(), os.getgid(), os.getegid(), *os.getgroups()] if FORKS else []
    # Relative folders mean others once the current one is another.
    paths = [os.path.abspath(part) for part in found["PYTHONPATH"].split(os.pathsep)]
    variables = sorted((name, value) for name, value in found.items() if name not in _ANY)
    return sys.executable, FORKS, IDLE, tuple(paths), tuple(who), tuple(variables)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        # It was removed; nothing can be found there.
        return None


def close_all() -> None:
    """End all waiting processes; the next job starts one anew."""
    with _LOCK:
        for server in _POOL.values():
            server.close()
        _POOL.clear()


_FORGOTTEN: list[Server] = []


def _forget_all() -> None:
    # A fork of this process has the other end of every pipe as well, and would keep the processes
    # alive; those are its parent's.
    global _LOCK
    _LOCK = threading.RLock()
    for server in _POOL.values():
        server.forget()
        # Not deleted: subprocess warns of what still runs then.
        _FORGOTTEN.append(server)
    _POOL.clear()


atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
