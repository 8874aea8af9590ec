"""Folders at URLs that only fsspec reads, with what a cache needs of `pathlib`."""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple


class Stat(NamedTuple):
    """The size of a file in bytes, named as `etils.epath` names it."""

    length: int


class RemotePath:
    """A file or folder at a URL.

    Args:
        filesystem: What fsspec opened for the URL's scheme.
        path: The path in it.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._path = path.rstrip("/")

    def __fspath__(self) -> str:
        return str(self._filesystem.unstrip_protocol(self._path))

    def __str__(self) -> str:
        return self.__fspath__()

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self._filesystem, f"{self._path}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rpartition("/")[2]

    def exists(self) -> bool:
        """Whether it is there."""
        return bool(self._filesystem.exists(self._path))

    def iterdir(self) -> Iterator["RemotePath"]:
        """What lies in the folder."""
        for entry in self._filesystem.ls(self._path, detail=False):
            yield RemotePath(self._filesystem, entry)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder, and those above it."""
        self._filesystem.makedirs(self._path, exist_ok=exist_ok)

    def open(self, mode: str = "rb") -> Any:
        """Open the file."""
        return self._filesystem.open(self._path, mode)

    def stat(self) -> Stat:
        """The size of the file."""
        return Stat(int(self._filesystem.size(self._path)))

    def read_bytes(self) -> bytes:
        """All that the file holds."""
        return bytes(self._filesystem.cat_file(self._path))

    def write_text(self, text: str) -> None:
        """Make the file anew."""
        self._filesystem.pipe_file(self._path, text.encode())

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        if not missing_ok or self.exists():
            self._filesystem.rm_file(self._path)


def opened(url: str) -> Any:
    """The folder at a URL.

    Args:
        url: `scheme://...`, of any scheme that fsspec knows.

    Returns:
        A `pathlib.Path` for files of this machine, else a `RemotePath`.

    Raises:
        ImportError: If fsspec, or what it needs for the scheme, is not installed.
        OSError: If what it needs does not work.
        ValueError: If fsspec does not know the scheme.
    """
    scheme = url.partition("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"`{url}` is a URL of the scheme `{scheme}`, which is read with fsspec, and fsspec is "
            "not installed. Install it with: pip install fsspec"
        ) from error
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(
            f"`{url}` cannot be opened: for the scheme `{scheme}` fsspec needs a package that is "
            f"not installed ({error})."
        ) from error
    except OSError as error:
        # Some list, line by line, all the places in which they looked for a library.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"`{url}` cannot be opened: {reason}") from error
    except ValueError as error:
        raise ValueError(
            f"`{url}` is of the scheme `{scheme}`, which neither etils nor fsspec reads ({error}). "
            "Pass a local folder, or a URL such as `gs://bucket/cache`."
        ) from error
    if "file" in _protocols(filesystem):
        # Of this machine, with its locks and renames.
        return pathlib.Path(path)
    return RemotePath(filesystem, path)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
