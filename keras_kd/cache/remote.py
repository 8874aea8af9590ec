"""Folders at URLs that only fsspec reads, as paths of `universal_pathlib`."""

from __future__ import annotations

import pathlib
import warnings
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from upath import UPath

Place: TypeAlias = "pathlib.Path | UPath"
"""A file or folder of a cache."""


def opened(url: str) -> Place:
    """The folder at a URL.

    Args:
        url: `scheme://...`, of any scheme that fsspec knows.

    Returns:
        A `pathlib.Path` for files of this machine, else a `upath.UPath`.

    Raises:
        ImportError: If universal_pathlib, or what fsspec needs for the scheme, is not installed.
        OSError: If what it needs does not work.
        ValueError: If fsspec does not know the scheme, or needs more than a URL.
    """
    scheme = url.partition("://")[0]
    try:
        from upath import UPath
    except ImportError as error:
        raise ImportError(
            f"`{url}` is a URL of the scheme `{scheme}`, which is read with universal_pathlib, and "
            'that is not installed. Install it with: pip install "keras_kd[data]"'
        ) from error
    try:
        with warnings.catch_warnings():
            # Schemes of which universal_pathlib has no class of its own are read as all others are.
            warnings.simplefilter("ignore", UserWarning)
            path = UPath(url)
        protocol = path.fs.protocol
    except ImportError as error:
        raise ImportError(
            f"`{url}` cannot be opened: for the scheme `{scheme}` fsspec needs a package that is "
            f"not installed ({error})."
        ) from error
    except OSError as error:
        # Some list, line by line, all the places in which they looked for a library.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"`{url}` cannot be opened: {reason}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{url}` is of the scheme `{scheme}`, which neither etils nor fsspec reads ({error}). "
            "Pass a local folder, or a URL such as `gs://bucket/cache`."
        ) from error
    if "file" in ((protocol,) if isinstance(protocol, str) else protocol):
        # Of this machine, with its locks and renames.
        return pathlib.Path(path.path)
    return path
