"""Files that are there whole or not at all, on a disk or behind a URL."""

import contextlib
import difflib
import hashlib
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from keras_kd.cache import remote


def folder(path: Any) -> Any:
    """The folder of a cache as a path object.

    Args:
        path: A local path, or a URL such as `gs://bucket/cache`.

    Returns:
        A `pathlib.Path`, an `etils.epath.Path` for a URL, or a `RemotePath` for
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


def is_remote(path: Any) -> bool:
    """Whether a path is a URL and not a file of this machine."""
    return "://" in os.fspath(path)


def write_text(file: Any, text: str) -> None:
    """Write a small file at once: a reader sees the old one or the new one."""
    # Several processes may write the same manifest; each has a name of its own for it.
    with replacing(file, f"{file.name}.{os.getpid()}.tmp") as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def replacing(file: Any, temporary_name: str | None = None) -> Iterator[Any]:
    """Open a temporary file that takes the name `file` once it is written and on disk.

    If anything fails, the temporary file is removed and an earlier `file`
    stays as it was. Object stores show an object when it is closed, so that
    URLs need no second name.

    Args:
        file: The file that is to be.
        temporary_name: Name of the file until then. Defaults to one that a
            later attempt uses again.
    """
    remote = is_remote(file)
    temporary = file if remote else file.with_name(temporary_name or f"{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            if not remote:
                stream.flush()
                os.fsync(stream.fileno())
        if not remote:
            os.replace(temporary, file)
            _sync_folder(file.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync_folder(path: Any) -> None:
    """Make a rename last through a power cut, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def claimed(file: Any, what: str) -> Iterator[None]:
    """Hold a lock that the system takes back when this process ends, however it ends.

    URLs know no locks: there the last of two writers wins, and both wrote the
    same.

    Args:
        file: The lock file.
        what: What is locked, for the message.

    Raises:
        BlockingIOError: If another process, or this one, holds it.
    """
    if is_remote(file):
        yield
        return
    with open(file, "a+b") as stream:
        try:
            _lock(stream)
        except OSError as error:
            stream.seek(0)
            owner = stream.read().decode(errors="replace").strip() or "unknown"
            raise BlockingIOError(
                f"Process {owner} is writing {what} at this moment. Wait for it, stop it, or give "
                "each process its own shards with `process_index` and `process_count`."
            ) from error
        stream.truncate(0)
        stream.write(str(os.getpid()).encode())
        stream.flush()
        try:
            yield
        finally:
            # Removed while it is held, so that no one waits for a dead name.
            with contextlib.suppress(OSError):
                os.unlink(file)


def _lock(stream: Any) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt  # Windows has no `fcntl`.

        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def size(file: Any) -> int | None:
    """Bytes of a file, or `None` where there is none."""
    if is_remote(file):
        return int(file.stat().length) if file.exists() else None
    try:
        return file.stat().st_size
    except OSError:
        return None


def checksum(file: Any) -> str:
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

    def __call__(self, file: Any) -> Any:
        """A local file with the content of `file`; local files are their own."""
        if not is_remote(file):
            return file
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="keras_kd_cache_")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        copy = pathlib.Path(self._folder) / file.name
        if not copy.exists():
            with file.open("rb") as source, replacing(copy) as target:
                while piece := source.read(1 << 22):
                    target.write(piece)
        return copy


def close_names(name: str, known: Iterable[str]) -> str:
    """A hint at names like the one that was not found."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(f'`{match}`' for match in close)}?" if close else ""
