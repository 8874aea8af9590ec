"""Files of an export, whole or not at all, and what is said where a disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from keras_kd.utils import files

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file under a temporary name beside it and rename it.

    Args:
        path: The file; its folder must exist. An earlier file stays if writing fails.
        content: Text, which is written as UTF-8, or bytes.

    Returns:
        The path.

    Raises:
        OSError: If the folder is missing or cannot be written, or the disk is full.
    """
    path = Path(path)
    blob = content.encode() if isinstance(content, str) else content
    with _explaining(path), files.replacing(path) as file:
        file.write(blob)
    return path


def hand_over(path: Path, content: str) -> None:
    """Write a text for another process of this program, see `files.hand_over`.

    Raises:
        OSError: As for `write_file`.
    """
    with _explaining(path):
        files.hand_over(path, content.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a new, empty file beside `path` that takes its name at the end.

    Args:
        path: The file that is to be; its folder must exist.

    Raises:
        OSError: If the folder is missing or cannot be written, or the disk is full.
    """
    with _explaining(path), files.replacing_by_name(path) as temporary:
        yield temporary


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if disk_fault(error) is not None:
            raise explained(error, f"`{path}`") from error
        raise


def disk_fault(error: BaseException) -> int | None:
    """Return the number of the error behind an error, if it is that a disk is full.

    What closes a half-written file often fails as well, and its error takes the place of the one
    that says why; libraries in C say it in their text alone.

    Args:
        error: Any exception.

    Returns:
        One of `ENOSPC`, `EDQUOT` and `EFBIG`, or `None`.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno in _FULL:
            return one.errno
        text = str(one)
        for number in _FULL:
            if f"errno = {number}," in text:
                return number
        if os.strerror(errno.ENOSPC) in text:
            return errno.ENOSPC
        waiting += [one.__cause__, one.__context__]
    return None


def explained(error: BaseException, what: str) -> BaseException:
    """Return what is raised in place of an error of the disk; others come back as they are.

    Args:
        error: Any exception.
        what: What could not be written, such as "the export to `out`".
    """
    full = disk_fault(error)
    if full is not None:
        return OSError(
            full,
            f"The disk is full, so {what} was not written and nothing of it was left behind. Free "
            "some space or choose another folder",
        )
    if isinstance(error, OSError) and error.errno in _CLOSED:
        return PermissionError(
            error.errno,
            f"{what[0].upper()}{what[1:]} cannot be written ({error.strerror}). Choose another "
            "folder",
        )
    return error
