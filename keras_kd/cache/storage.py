"""Files that are there whole or not at all, on a disk or behind a URL."""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from keras_kd.cache import remote
from keras_kd.cache.remote import Place
from keras_kd.utils import archives, files


def folder(path: object) -> Any:
    """The folder of a cache as a path object.

    Args:
        path: A local path, or a URL such as `gs://bucket/cache`.

    Returns:
        A `pathlib.Path`, an `etils.epath.Path` for a URL, or a `upath.UPath` for
        a URL that only fsspec reads.

    Raises:
        TypeError: If it is no path.
        ImportError: If what reads the URL is not installed.
        ValueError: If nothing reads URLs of this scheme.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"The path of a cache is a string or a `pathlib.Path`. Received: path={path!r}."
        )
    if not os.fspath(path):
        raise ValueError("The path of a cache is empty. Name a folder.")
    if not is_remote(path):
        return pathlib.Path(path)
    scheme, _, rest = os.fspath(path).partition("://")
    url = f"{scheme.lower()}://{rest}"
    if scheme.lower() not in _EPATH_SCHEMES:
        return remote.opened(url)
    try:
        from etils import epath  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"`{os.fspath(path)}` is a URL, and URLs are read with etils, which is not installed. "
            'Install it with: pip install "keras_kd[data]" "etils[epath]"'
        ) from error
    return epath.Path(url)


# Those that `etils.epath` reads; it fails with a bare `KeyError` on others.
_EPATH_SCHEMES = ("gs", "s3", "az", "hf")


def is_remote(path: object) -> bool:
    """Whether a path is a URL and not a file of this machine."""
    # `UPath` has no `__fspath__`: it is no file of this machine.
    return "://" in str(path)


def write_text(file: Place, text: str, before: Callable[[], None]) -> None:
    """Write a small file at once: a reader sees the old one or the new one.

    Several writers of the same file hold a lock while they do, and `before`
    raises where it is lost.
    """
    with replacing(file, before) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def replacing(file: Place, before: Callable[[], None]) -> Iterator[Any]:
    """Open a temporary file that takes the name `file` once it is written and on disk.

    If anything fails, the temporary file is removed and an earlier `file`
    stays as it was. Object stores show an object when it is closed, so that
    URLs need no second name.

    Args:
        file: The file that is to be. Who writes it holds a lock, since the
            temporary file is one that a later attempt uses again.
        before: Called right before the file gets its name; raises to give up.
    """
    if isinstance(file, pathlib.Path):
        temporary = file.with_name(f"{file.name}.tmp")
        with files.replacing(file, temporary, before) as stream:
            yield stream
        return
    stream = file.open("wb")
    try:
        yield stream
        before()
        stream.close()
    except BaseException:
        with contextlib.suppress(OSError):
            stream.close()
        with contextlib.suppress(OSError):
            file.unlink()
        raise


@contextlib.contextmanager
def claimed(file: Place, what: str, wait: float = 0.0) -> Iterator[Callable[[], None]]:
    """Hold a lock that the system takes back when this process ends, however it ends.

    URLs know no locks: there two writers of one cache write the same, and what
    another has begun is found when a shard is opened or finished.

    Args:
        file: The lock file.
        what: What is locked, for the message.
        wait: Seconds to wait for it.

    Yields:
        A function that raises `OSError` once the lock is lost.

    Raises:
        BlockingIOError: If another process, or this one, holds it.
    """
    if not isinstance(file, pathlib.Path):
        yield lambda: None
        return

    def busy(owner: str) -> str:
        return (
            f"Process {owner} is writing {what} at this moment. Wait for it, stop it, or give "
            "each process its own shards with `process_index` and `process_count`."
        )

    with files.claimed(file, busy, wait) as require_held:
        yield require_held


# What a writer that was killed leaves in the folder.
_TEMPORARY = re.compile(
    r"(manifest\.json|(records|inputs|views|shard)-[\d-]+\.(bin|crc|json))\.tmp"
)
_LOCK = re.compile(r"(manifest\.json|records-[\d-]+\.bin)\.lock")
_PROBE = re.compile(r"\.writable\.[0-9a-f]{16}\.tmp")


def clear(root: Place) -> None:
    """Remove what killed writers left in a finished cache, and nothing that is in use."""
    if not isinstance(root, pathlib.Path):
        return
    names = [file.name for file in root.iterdir()]
    for name in names:
        if _PROBE.fullmatch(name):
            files.remove(root / name)
        elif _LOCK.fullmatch(name):
            # Taken and given back it is gone.
            with contextlib.suppress(OSError), claimed(root / name, name):
                pass
    held = {_part(name) for name in names if _LOCK.fullmatch(name) and (root / name).exists()}
    for name in names:
        if _TEMPORARY.fullmatch(name) and _part(name) not in held:
            files.remove(root / name)


def _part(name: str) -> str:
    """What of a cache is written under one lock: the manifest, or a shard by its number."""
    return name.split(".")[0].rpartition("-")[2]


def read_bytes(file: Place) -> bytes:
    """All of a small file; a local one is a regular file of bounded size.

    Raises:
        ValueError: If it is a folder, a named pipe or a device, or too large.
        OSError: If it is missing or cannot be read.
    """
    if isinstance(file, pathlib.Path):
        return archives.read_bytes(file, _SMALL)
    return bytes(file.read_bytes())


# The checksums of a shard have four bytes a sample, the manifest some hundred a shard.
_SMALL = 1 << 30


def problem(file: Place) -> str | None:
    """What keeps a file from being read, as in "is missing", or `None`."""
    if not isinstance(file, pathlib.Path):
        return None if file.exists() else "is missing"
    found = archives.file_problem(file)
    return "is missing" if found == "does not exist" else found


def size(file: Place) -> int:
    """Bytes of a file."""
    found: Any = file.stat()
    # `etils.epath` has a name of its own for it.
    return int(found.length if hasattr(found, "length") else found.st_size)


def checksum(file: Place) -> str:
    """The SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class Local:
    """Local copies of remote files, made at first use and removed with this object."""

    def __init__(self) -> None:
        self._folder: str | None = None

    def __call__(self, file: Place) -> Any:
        """A local file with the content of `file`; local files are their own."""
        if isinstance(file, pathlib.Path):
            return file
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="keras_kd_cache_")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        copy = pathlib.Path(self._folder) / file.name
        if not copy.exists():
            with file.open("rb") as source, files.replacing(copy) as target:
                while piece := source.read(1 << 22):
                    target.write(piece)
        return copy
