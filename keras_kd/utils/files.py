"""Files that appear whole or not at all, and locks that have one holder.

Whatever lies where a file or a lock is to be, a link is never followed: files are made anew and
exclusively, with the rights that the process gives all of its files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from typing import IO

_NEW = (
    os.O_RDWR
    | os.O_CREAT
    | os.O_EXCL
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_HELD = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

PAUSE = 0.05
"""Seconds between two looks at a lock that is waited for."""


def create(path: str | os.PathLike[str]) -> IO[bytes]:
    """Make a file that was not there, for writing.

    Raises:
        FileExistsError: If anything is there, a link that leads nowhere included.
        OSError: If it cannot be made.
    """
    # The system takes the umask from these rights by itself.
    return os.fdopen(os.open(path, _NEW, 0o666), "w+b")


_DRAWN = 8
"""Bytes by chance in a temporary name."""


def temporary_name(name: str) -> str:
    """A name that nobody can foresee, hidden beside the file that it will become."""
    return secrets.token_hex(_DRAWN).join(_around(name))


def _around(name: str) -> tuple[str, str]:
    """What stands before and behind the letters by chance in the temporary names of a file."""
    stem, dot, suffix = name.rpartition(".")
    # Names end at 255 bytes; and Keras knows its files by how their names end.
    return f".{(stem if dot else name)[:40]}.", f".tmp{dot}{suffix if dot else ''}"


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, or a link and not what it leads to, where there is one."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def replacing(
    file: str | os.PathLike[str],
    temporary: str | os.PathLike[str] | None = None,
    before: Callable[[], None] | None = None,
) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the name `file` once it is written and on disk.

    If anything fails, the temporary file is removed and an earlier `file` stays as it was; what
    failed first is what is raised. What a process that was killed has left of the same file is
    removed first.

    Args:
        file: The file that is to be. A link of this name is replaced, not followed.
        temporary: The file until then, which a later attempt uses again; only for a caller that
            holds a lock on it. Defaults to a name of its own.
        before: Called when all is on disk, right before it gets its name; raises to give up.
    """
    file = pathlib.Path(file)
    if temporary is None:
        stream, temporary = _begun(file)
    else:
        # What a killed attempt left; or a link, of which no more than the name goes.
        remove(temporary)
        stream = create(temporary)
    try:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        if before is not None:
            before()
        os.replace(temporary, file)
    except BaseException:
        # A full disk fails once more when it is closed, in other words.
        with contextlib.suppress(OSError):
            stream.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync(file.parent)


def hand_over(file: str | os.PathLike[str], content: bytes) -> None:
    """Write a file for another process of this program, in a folder that goes with it.

    It appears whole, as with `replacing`; that it outlasts a power cut, and that nobody else writes
    it, is not seen to, which takes ten times as long.
    """
    file = pathlib.Path(file)
    temporary = file.with_name(temporary_name(file.name))
    with create(temporary) as stream:
        stream.write(content)
    os.replace(temporary, file)


@contextlib.contextmanager
def replacing_by_name(file: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Give the name of a new, empty file that takes the name `file` at the end.

    As `replacing`, for writers that open files themselves, such as `keras.Model.save`.

    Args:
        file: The file that is to be.
    """
    file = pathlib.Path(file)
    stream, temporary = _begun(file)
    try:
        # The open file holds the lock that tells this attempt from one that was killed.
        with stream:
            yield temporary
            sync(temporary)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync(file.parent)


def _begun(file: pathlib.Path) -> tuple[IO[bytes], pathlib.Path]:
    """Make a temporary file that others see at work, and remove those of dead processes."""
    _clear(file)
    while True:
        temporary = file.with_name(temporary_name(file.name))
        stream = create(temporary)
        try:
            # Elsewhere a lock keeps others from the bytes, the writer's own library among them.
            if os.name == "posix":
                with contextlib.suppress(OSError):
                    lock(stream.fileno())
            # Before it was locked it looked like one of a dead process.
            if is_at(stream, temporary):
                return stream, temporary
        except BaseException:
            stream.close()
            remove(temporary)
            raise
        stream.close()


def _clear(file: pathlib.Path) -> None:
    if os.name != "posix":
        return
    first, last = _around(file.name)
    ours = re.compile(f"{re.escape(first)}[0-9a-f]{{{2 * _DRAWN}}}{re.escape(last)}")
    try:
        names = [name for name in os.listdir(file.parent) if ours.fullmatch(name)]
    except OSError:
        # A missing folder is told of by who makes a file in it.
        return
    for name in names:
        # Who has no locks cannot tell, and what cannot be opened is somebody else's.
        with contextlib.suppress(OSError):
            path = file.with_name(name)
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if stat.S_ISREG(os.fstat(handle).st_mode):
                    lock(handle)
                    os.unlink(path)
            finally:
                os.close(handle)


def sync(path: str | os.PathLike[str]) -> None:
    """Make a file's bytes, or the names in a folder, last through a power cut.

    Not every system opens folders.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Find out whether files can be made in a folder, or will be once it is made.

    Args:
        folder: A folder, which may not exist yet.

    Raises:
        OSError: If they cannot, as `NotADirectoryError` where a file is in the way.
    """
    place = pathlib.Path(os.path.abspath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    probe = place / temporary_name("writable")
    try:
        with create(probe) as stream:
            stream.write(b" ")
    finally:
        remove(probe)


@contextlib.contextmanager
def claimed(
    file: str | os.PathLike[str], busy: Callable[[str], str], wait: float = 0.0
) -> Iterator[Callable[[], None]]:
    """Hold a lock that the system takes back when this process ends, however it ends.

    The lock file is removed with the lock. Someone who waits for it then, or finds that it was
    removed by hand, does not hold it: the file that is locked is the one of this name.

    Args:
        file: The lock file.
        busy: From the number of the process that holds it, as text, to the message.
        wait: Seconds to wait for it.

    Yields:
        A function that raises `OSError` once the lock is lost, since its file was removed by hand.

    Raises:
        BlockingIOError: If another process, or this one, holds it.
        OSError: If a link or anything else lies in its place, or the file system has no locks.
    """
    stream = _locked(os.fspath(file), busy, wait)

    def require_held() -> None:
        if not is_at(stream, file):
            raise OSError(
                errno.ESTALE,
                f"The lock `{os.fspath(file)}` was removed while it was held, so that another "
                "process may be writing the same. Stop it, and call this again",
            )

    try:
        yield require_held
    finally:
        # Removed while it is held, so that no one waits for a dead name.
        with contextlib.suppress(OSError):
            if is_at(stream, file):
                os.unlink(file)
        stream.close()


def _locked(file: str, busy: Callable[[str], str], wait: float) -> IO[bytes]:
    end = time.monotonic() + wait
    while True:
        stream = _lock_file(file)
        try:
            lock(stream.fileno())
            # Between opening and locking the holder before may have removed it.
            if is_at(stream, file):
                # Who holds it is told as far as the disk has room for it.
                with contextlib.suppress(OSError):
                    stream.truncate(0)
                    stream.write(str(os.getpid()).encode())
                return stream
            stream.close()
            continue
        except OSError as error:
            owner = _read(stream)
            stream.close()
            if error.errno in _NO_LOCKS:
                raise OSError(
                    error.errno,
                    f"The file system of `{file}` has no locks ({error.strerror}). Choose a "
                    "folder on another one",
                ) from error
            if error.errno not in _HELD:
                raise
            if time.monotonic() >= end:
                raise BlockingIOError(busy(owner)) from error
        except BaseException:
            stream.close()
            raise
        time.sleep(PAUSE)


def _read(stream: IO[bytes]) -> str:
    with contextlib.suppress(OSError):
        stream.seek(0)
        return stream.read(32).decode(errors="replace").strip() or "unknown"
    return "unknown"


def _lock_file(file: str) -> IO[bytes]:
    """Open the lock file, made now or left by someone else, if it is no more than that."""
    flags = (_NEW & ~os.O_EXCL) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _foreign(file, "a link") from error
        raise
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return os.fdopen(handle, "r+b", buffering=0)
    os.close(handle)
    raise _foreign(file, "a link" if stat.S_ISREG(status.st_mode) else "no regular file")


def _foreign(file: str, what: str) -> OSError:
    return OSError(
        errno.EEXIST,
        f"`{file}` is {what}, where a lock is to be made, and what is there is neither followed "
        "nor changed. Remove it, or choose another folder",
    )


def is_at(stream: IO[bytes], file: str | os.PathLike[str]) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        there = os.stat(file, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(stream.fileno()), there)


def lock(handle: int) -> None:
    """Lock an open file until it is closed or the process ends, without waiting.

    Args:
        handle: Its descriptor.

    Raises:
        OSError: If somebody else holds the lock, or the file system has none.
    """
    try:
        import fcntl
    except ImportError:
        import msvcrt  # Windows has no `fcntl`.

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
    """Give each of two files or folders the name of the other, in one step of the system.

    Every moment finds both names, each with one of the two behind it. A rename alone cannot put a
    folder in the place of one that holds files.

    Args:
        one: A path.
        other: A path on the same disk.

    Raises:
        OSError: If one is missing, they lie on different disks, or the system or the file system
            cannot do this; then nothing has changed.
    """
    import ctypes

    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = (os.fsencode(one), os.fsencode(other))
    if library is not None and hasattr(library, "renameat2"):
        here = ctypes.c_int(-100)  # AT_FDCWD
        failed = library.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))
    elif library is not None and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, ctypes.c_uint(2))
    else:
        raise OSError(errno.ENOTSUP, "This system cannot exchange two folders in one step")
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))
    for folder in {pathlib.Path(one).absolute().parent, pathlib.Path(other).absolute().parent}:
        sync(folder)
