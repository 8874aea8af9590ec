"""Files of unknown origin: regular ones only, and no more memory than they may claim.

An archive of a few kilobytes can unpack to gigabytes, a FIFO never ends, and a device is no file.
What is read here is looked at first: what kind of file it is, and the sizes that it declares. No
Keras is needed, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

UNPACKED_FREELY = 512 << 20
"""Bytes to which any archive may unpack: what an ordinary machine has to spare."""

EXPANSION = 50
"""How many times its own size an archive may unpack to beyond that.

Photographs compress to a half, digits to a fifth, token ids and one-hot labels to a fiftieth;
DEFLATE ends at a thousandth, which only zeros reach.
"""

MEMBERS = 65_535
"""Members that an archive may have: more than a model has files or a data set arrays."""

_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a named pipe (FIFO), not a regular file",
    stat.S_IFSOCK: "is a socket, not a regular file",
    stat.S_IFCHR: "is a device, not a regular file",
    stat.S_IFBLK: "is a device, not a regular file",
}


def file_problem(path: str | os.PathLike[str]) -> str | None:
    """What keeps a path from being read as a file, or `None`.

    Args:
        path: Path of a file; links are followed.

    Returns:
        The rest of a sentence, as in "`model.keras` does not exist".
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "is not a regular file")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a regular file for reading; nothing else is opened or waited for.

    Args:
        path: Path of the file; links are followed.

    Raises:
        ValueError: If it is a folder, a named pipe, a socket or a device.
        OSError: If it is missing or cannot be read.
    """
    os.stat(path)
    problem = file_problem(path)
    if problem is None:
        # What became a named pipe since the look at it would be waited for without this.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
        with os.fdopen(handle, "rb") as stream:
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                yield stream
                return
        problem = "is not a regular file any more"
    raise ValueError(f"`{os.fspath(path)}` {problem}. Pass the path of a file.")


_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def read_bytes(path: str | os.PathLike[str], limit: int = 64 << 20) -> bytes:
    """Read a regular file that is meant to be small, such as a manifest.

    Args:
        path: Path of the file.
        limit: The most bytes that it may have.

    Returns:
        All that it holds.

    Raises:
        ValueError: If it is no regular file, or larger.
        OSError: If it is missing or cannot be read.
    """
    with opened(path) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(
            f"`{os.fspath(path)}` has more than {limit:,} bytes, which no such file has. It was "
            "not written by keras_kd, or is damaged."
        )
    return data


@contextlib.contextmanager
def archive(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive, such as a `.keras` or `.npz` file, whose content fits into memory.

    Args:
        path: Path of the file.

    Raises:
        ValueError: If it is no regular file, or declares more than may be unpacked.
        zipfile.BadZipFile: If it is no zip archive, or a part of one.
        OSError: If it is missing or cannot be read.
    """
    with opened(path) as stream, zipfile.ZipFile(stream) as found:
        require_bounded(found, os.fspath(path), os.fstat(stream.fileno()).st_size)
        yield found


def keras_file(path: str | os.PathLike[str], *, whole: bool = True) -> None:
    """Raise unless `path` is a `.keras` archive that fits into memory.

    Args:
        path: Path of the file.
        whole: Whether to read all of it, which finds what is damaged.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is no such archive.
    """
    path = os.fspath(path)
    problem = file_problem(path)
    if problem == "does not exist":
        raise FileNotFoundError(f"There is no file `{path}`.")
    if problem is not None:
        raise ValueError(f"`{path}` {problem}. Pass the file that `model.save` wrote.")
    try:
        with archive(path) as found:
            names = found.namelist()
            damaged = found.testzip() if whole else None
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"`{path}` is no `.keras` file, or only a part of one: it is not a zip archive. Save "
            "the model again with `model.save('name.keras')`."
        ) from error
    except (zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"`{path}` is no `.keras` file: it is damaged ({error}).") from error
    if "config.json" not in names or damaged is not None:
        raise ValueError(
            f"`{path}` is no `.keras` file"
            + (f": `{damaged}` in it is damaged." if damaged else ": it has no `config.json`.")
        )


def require_bounded(found: zipfile.ZipFile, path: str, size: int) -> None:
    """Refuse an archive by what its directory declares, before a byte is unpacked.

    `zipfile` never unpacks more of a member than its directory declares, so that this holds.

    Args:
        found: The archive.
        path: What the errors call it.
        size: Bytes of the archive itself.

    Raises:
        ValueError: If it is encrypted, has too many members, or they are too large for its own
            size or for the memory of this machine.
    """
    members = found.infolist()
    if len(members) > MEMBERS:
        raise ValueError(
            f"`{path}` has {len(members):,} members, and at most {MEMBERS:,} are read. It was not "
            "written by Keras or NumPy."
        )
    locked = next((each.filename for each in members if each.flag_bits & 1), None)
    if locked is not None:
        raise ValueError(f"`{path}` is encrypted (`{locked}`). Write it again without a password.")
    declared = sum(each.file_size for each in members)
    if declared > max(UNPACKED_FREELY, EXPANSION * size):
        raise ValueError(
            f"`{path}` has {size:,} bytes and would unpack to {declared:,}, more than {EXPANSION} "
            "times as many, as archives that are made to fill the memory do. If it is yours, write "
            "it uncompressed (`np.savez`), so that it has the size of what it holds."
        )
    free = memory_available()
    if free is not None and declared > free:
        raise ValueError(
            f"`{path}` unpacks to {declared:,} bytes, and {free:,} bytes of memory are available. "
            "Free some, or split the file."
        )


def arrays(
    path: str | os.PathLike[str], check: Callable[[list[str]], None] | None = None
) -> dict[str, np.ndarray]:
    """Read all arrays of a `.npz` file into memory.

    Args:
        path: Path of the file.
        check: Called with the names of the arrays before any is read, to refuse them.

    Returns:
        The arrays by name, in the order of the file.

    Raises:
        ValueError: If the file is missing, no regular file, truncated, of another format, holds
            pickled objects, or declares more than may be unpacked.
    """
    path = os.fspath(path)
    with _npz(path) as found:
        names = {name.removesuffix(".npy"): name for name in found.namelist()}
        if check is not None:
            check(list(names))
        return {name: _array(path, found, member) for name, member in names.items()}


def names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the arrays of a `.npz` file, of which none is read.

    Args:
        path: Path of the file.

    Raises:
        ValueError: As for `arrays`, as far as the directory of the file tells.
    """
    with _npz(os.fspath(path)) as found:
        return [name.removesuffix(".npy") for name in found.namelist()]


@contextlib.contextmanager
def _npz(path: str) -> Iterator[zipfile.ZipFile]:
    problem = file_problem(path)
    if problem is not None:
        raise ValueError(f"`{path}` {problem}. Expected the path of a `.npz` file.")
    try:
        # Not by `np.load`, which would also take a bare `.npy` or a pickle.
        with archive(path) as found:
            yield found
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(
            f"`{path}` is not a readable `.npz` file: it is truncated or of another format. "
            "Write it again with `np.savez_compressed`."
        ) from error
    except MemoryError as error:
        raise ValueError(
            f"`{path}` holds more than the memory of this process. Free some, or split the file."
        ) from error
    except OSError as error:
        raise ValueError(
            f"`{path}` cannot be read: {error.strerror or error}. Check the file and its rights."
        ) from error


def _array(path: str, found: zipfile.ZipFile, name: str) -> np.ndarray:
    """One member, whose header claims as many bytes as there are."""
    info = found.getinfo(name)
    with found.open(info) as stream:
        prefix = stream.read(len(np.lib.format.MAGIC_PREFIX))
    if prefix != np.lib.format.MAGIC_PREFIX:
        raise ValueError(
            f"`{name}` in `{path}` is not an array but a file of another kind. "
            "Write the file again with `np.savez_compressed`."
        )
    with found.open(info) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            shape, dtype = _header(stream, version)
        except Exception as error:
            # Headers are Python literals, and NumPy passes on what its parsers raise.
            raise zipfile.BadZipFile(name) from error
        if dtype.hasobject:
            raise ValueError(
                f"`{name.removesuffix('.npy')}` in `{path}` is a pickled object array, which is "
                "never loaded: unpickling runs code. Store plain numbers, all images of one shape."
            )
        # An array of the claimed size would be made before it is found out how much there is.
        if stream.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise zipfile.BadZipFile(name)
    with found.open(info) as stream:
        try:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
        except ValueError as error:
            raise zipfile.BadZipFile(name) from error


def _header(stream: Any, version: tuple[int, int]) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype that the header of an array claims."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0}
    # A third version differs from the second in nothing but the letters of field names.
    read = readers.get(version, np.lib.format.read_array_header_2_0)
    shape, _, dtype = read(stream)
    return shape, dtype


def memory_available() -> int | None:
    """Bytes of memory that this process can still have, or `None` where the system does not say.

    Of Linux: what is free or can be freed at once, and no more than the limit of a container.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
        if "MemAvailable" in fields:
            found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit in _LIMITS:
        # "max" stands for no limit and is no number.
        with contextlib.suppress(OSError, ValueError), open(limit) as file:
            found.append(int(file.read()))
    return min(found) if found else None


# Of a control group, as containers have one, in its two versions.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
