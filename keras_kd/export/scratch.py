"""Folders that last as long as the process that works in them, however it ends.

Beside each lies a file that its process keeps locked. A lock is the one thing that the system takes
back from any process, killed ones too: a folder whose file can be locked belongs to nobody, and the
next one to make such a folder removes it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from keras_kd.utils import files

_MARK = b"keras_kd: a folder of the same name is at work while this file is locked.\n"
_WAIT = 5.0


_undisturbed = 0
"""How many folders are being made or removed: `ended_by_signals` raises nothing meanwhile."""


class BusyError(OSError):
    """Another process works in a folder of this kind."""


@contextlib.contextmanager
def held_folder(parent: Path, prefix: str, *, alone: bool = False) -> Iterator[Path]:
    """Make a folder that goes when the block ends, and with it those of dead processes.

    Args:
        parent: Where it is made.
        prefix: First part of its name; folders of the same prefix are looked at.
        alone: Whether no other process may have one of the same prefix.

    Raises:
        BusyError: If another one is at work and `alone` is set.
        OSError: If it cannot be made.
    """
    global _undisturbed
    folder = parent / f"{prefix}{secrets.token_hex(_LETTERS // 2)}"
    lock = folder.with_name(f"{folder.name}.lock")
    with ended_by_signals():
        handle = None
        # Counted by hand: a call at the beginning of `finally` would let a signal in.
        try:
            _undisturbed += 1
            try:
                with _one_at_a_time(parent):
                    busy = _clear(parent, prefix)
                    if busy and alone:
                        raise BusyError(f"another process is at work there ({busy})")
                    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600)
                    with contextlib.suppress(OSError):
                        # A disk without locks keeps what dies on it; nothing else depends on them.
                        files.lock(handle)
                os.write(handle, _MARK)
                folder.mkdir(mode=0o700)
            finally:
                _undisturbed -= 1
            yield folder
        finally:
            _undisturbed += 1
            try:
                if handle is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    # The name goes while the lock is held: nobody may find it free and another's.
                    with contextlib.suppress(OSError):
                        lock.unlink()
                    os.close(handle)
            finally:
                _undisturbed -= 1


def working_folder() -> contextlib.AbstractContextManager[Path]:
    """Make such a folder where the system keeps what is temporary.

    Raises:
        OSError: If it cannot be made.
    """
    return held_folder(Path(tempfile.gettempdir()), "keras-kd-")


_LETTERS = 12
LOCK = re.compile(rf"\..+-[0-9a-f]{{{_LETTERS}}}(\.lock)?")
"""Names of such folders and their locks, where their prefix is `.NAME-`."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def _clear(parent: Path, prefix: str) -> str:
    """Remove the folders of dead processes; returns the name of one that is alive, if any."""
    alive = ""
    of_prefix = re.compile(rf"{re.escape(prefix)}[0-9a-f]{{{_LETTERS}}}\.lock")
    try:
        names = [name for name in os.listdir(parent) if of_prefix.fullmatch(name)]
    except OSError:
        return ""
    for name in sorted(names):
        path = parent / name
        try:
            handle = os.open(path, os.O_RDWR | _NO_LINK | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            continue
        try:
            about = os.fstat(handle)
            mine = sys.platform == "win32" or about.st_uid == os.getuid()
            if not stat.S_ISREG(about.st_mode) or not mine:
                continue
            try:
                files.lock(handle)
            except (BlockingIOError, PermissionError):
                alive = name.removesuffix(".lock")
                continue
            except OSError:
                # A disk without locks: nobody can tell, and nothing is touched.
                continue
            # Only what this module wrote is a lock of its own; a process that died between the
            # two has left an empty one.
            if os.read(handle, len(_MARK) + 1) in (_MARK, b""):
                shutil.rmtree(path.with_name(name.removesuffix(".lock")), ignore_errors=True)
                with contextlib.suppress(OSError):
                    path.unlink()
        finally:
            os.close(handle)
    return alive


@contextlib.contextmanager
def _one_at_a_time(parent: Path) -> Iterator[None]:
    # Two that begin at once would each see no other. Folders can be locked on the systems that
    # many processes share; elsewhere what is looked at again at the end must do.
    handle = None
    with contextlib.suppress(OSError):
        handle = os.open(parent, os.O_RDONLY)
    try:
        end = time.monotonic() + _WAIT
        while handle is not None and time.monotonic() < end:
            try:
                files.lock(handle)
            except (BlockingIOError, PermissionError):
                time.sleep(0.01)
            except OSError:
                break
            else:
                break
        yield
    finally:
        if handle is not None:
            os.close(handle)


_HANDLERS: dict[int, Any] = {
    getattr(signal, name): signal.SIG_DFL
    for name in ("SIGTERM", "SIGHUP")
    if name in signal.Signals.__members__
}
"""What Python does of itself on the signals that end a block."""
_WITH_INTERRUPTS = {**_HANDLERS, signal.SIGINT: signal.default_int_handler}


@contextlib.contextmanager
def ended_by_signals(*, interrupts: bool = False) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that what it began is cleared away.

    Python dies of them at once otherwise. A handler of the caller's own stays, and so does the
    system's in threads other than the first, where Python sets none.

    An exception that comes out of nowhere gets lost where Python cannot hand it on, in a destructor
    or in an `except:` of somebody else's, and C libraries make others of it. It is raised again
    each second until the block ends of it.

    Args:
        interrupts: Whether that holds for Ctrl-C as well. See `interrupts_once` for code that
            catches it.

    Raises:
        SystemExit: With 128 and the number of the signal, 143 for SIGTERM.
        KeyboardInterrupt: After Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = _WITH_INTERRUPTS if interrupts else _HANDLERS
    taken = {number: own for number, own in handlers.items() if signal.getsignal(number) is own}
    ending: list[BaseException] = []
    # Held while a signal is sent: none may come once the earlier handlers are back.
    sending = threading.Lock()
    over, main = False, threading.get_ident()

    def stop(number: int, frame: FrameType | None) -> Any:
        if not ending:
            by_hand = number == signal.SIGINT
            ending.append(KeyboardInterrupt() if by_hand else SystemExit(128 + number))
            if sys.platform != "win32":
                # Not a `threading.Thread`: what was interrupted may hold a lock that its start
                # takes.
                _thread.start_new_thread(repeat, (number,))
        # Nothing cuts the clearing short.
        if not (over or _undisturbed or _is_handled(ending[0])):
            raise ending[0]

    def repeat(number: int) -> None:
        while True:
            time.sleep(_AGAIN)
            with sending:
                if over:
                    return
                signal.pthread_kill(main, number)

    try:
        for number in taken:
            signal.signal(number, stop)
        yield
    except Exception as error:
        if ending:
            # What was called has made an error of its own of it.
            raise ending[0] from error
        raise
    finally:
        over = True
        with sending:
            for number, own in taken.items():
                signal.signal(number, own)
    if ending:
        raise ending[0]


@contextlib.contextmanager
def interrupts_once() -> Iterator[None]:
    """Within `ended_by_signals`, let Ctrl-C raise KeyboardInterrupt once, for who catches it."""
    earlier = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(earlier):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


_AGAIN = 1.0


def _is_handled(ending: BaseException) -> bool:
    """Whether an exception is on its way: some `finally` or `except` is at work for it."""
    error, seen = sys.exc_info()[1], set()
    while error is not None and id(error) not in seen:
        if error is ending:
            return True
        seen.add(id(error))
        error = error.__context__
    return False
