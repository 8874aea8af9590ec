"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
        # mkstemp makes files that nobody else may read.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
