"""Files made aside and put in place when all of them are complete."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import manifest


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder beside the target in which everything is made, gone afterwards whatever happens."""
    made: list[Path] = []
    try:
        missing = target.parent
        while not missing.exists():
            made.append(missing)
            missing = missing.parent
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        _remove_empty(made)
        raise _explained(error, target) from error
    try:
        yield stage
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            # It holds the export by now.
            return


def _explained(error: OSError, target: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError(
            error.errno,
            f"The disk is full, so the export to `{target}` was not written and nothing of it was "
            "left behind. Free some space or choose another folder",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionError(
            error.errno,
            f"The export to `{target}` cannot be written ({error.strerror}). Choose another folder",
        )
    return error


def place(stage: Path, target: Path) -> None:
    """Move the complete files into the target, and remove those of the export they replace.

    Args:
        stage: Folder of the new files, on the same disk.
        target: Folder of the export. Files of other origin in it stay.
    """
    # The manifest goes last: until then the folder still describes, or lacks, the earlier export.
    stale: set[str] = set()
    if target.exists():
        try:
            earlier = manifest.read(target)
        except manifest.ManifestError:
            earlier = None
        if earlier is not None:
            stale = {row["file"] for row in earlier["artifacts"] if row.get("file")}
    target.mkdir(exist_ok=True)
    # A converter that was killed while writing leaves a hidden temporary file.
    names = sorted(
        path.name
        for path in stage.iterdir()
        if path.name != manifest.FILE and not path.name.startswith(".")
    )
    for name in (*names, manifest.FILE):
        os.replace(stage / name, target / name)
    for name in stale - set(names):
        (target / name).unlink(missing_ok=True)
