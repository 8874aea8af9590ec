"""The folder that an export goes to: what it may hold before, and what an export may replace."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from keras_kd.export import manifest
from keras_kd.export.scratch import LOCK
from keras_kd.utils import files, folders

_LENGTH = 16
_ASIDE = re.compile(rf"(.+\.([0-9a-f]{{{_LENGTH}}}))\.[a-z0-9_]+")
_REPLACED = ".replaced"


def check_folder(target: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written to, or is not empty, before any work.

    Args:
        target: The folder, which may not exist yet.
        overwrite: Whether it may hold files.

    Raises:
        FileExistsError: If it is not empty, or a `manifest.json` in it, as that of a teacher's
            cache, is not an export's to replace.
        NotADirectoryError: If it, or what it would lie in, is a file.
        PermissionError: If it cannot be written to.
    """
    existing = target
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(
            f"`{existing}` is a file, so nothing can be exported to `{target}`. Choose a folder."
        )
    if target.exists() and not overwrite and _holds_something(target):
        raise FileExistsError(
            f"The folder `{target}` is not empty. Choose another one, or pass `overwrite=True` "
            "(`--overwrite` on the command line) to replace an earlier export."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"The folder `{existing}` cannot be written to. Choose another one or change its "
            "permissions."
        )
    folders.require_no_cache(target)
    # A damaged manifest still lies beside the samples that every export writes.
    if folders.holds(target) == "other" and not (target / "evaluation.npz").is_file():
        raise FileExistsError(
            f"The `{manifest.FILE}` in `{target}` is none that `keras_kd.export` wrote, and an "
            "export would replace it. Choose another folder, or move that file away."
        )


def check_writable(target: Path) -> None:
    """Make a file where an export will, and remove it: rights do not tell of every file system.

    Args:
        target: The folder, which may not exist yet.

    Raises:
        OSError: If it cannot be made.
    """
    try:
        files.require_writable(target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Nothing can be written to `{target}` ({error.strerror}). Choose another folder, or "
            "mend its disk",
        ) from error


def check_names_free(target: Path, names: Iterable[str]) -> None:
    """Refuse a folder in which something that is no file has a name that is needed.

    Raises:
        FileExistsError: Naming it.
    """
    for name in names:
        path = target / name
        if os.path.lexists(path) and (path.is_dir() or not (path.is_file() or path.is_symlink())):
            raise FileExistsError(
                f"`{path}` is in the way of a file of that name, and is no file itself. Remove it, "
                "or choose another folder."
            )


def aside(name: str, sha256: str) -> str:
    """Return the name under which a file comes in while its own one may be taken."""
    path = Path(name)
    return f"{path.stem}.{sha256[:_LENGTH]}{path.suffix}"


def as_replaced(name: str, sha256: str) -> str:
    """Return the name under which a file steps aside for another one that takes its own."""
    path = Path(name)
    return aside(f"{path.stem}{_REPLACED}{path.suffix}", sha256)


def name_of(name: str) -> tuple[str, bool]:
    """Return a file's own name from that of a while, and whether it stepped aside.

    Args:
        name: As `aside` or `as_replaced` gave it.
    """
    path = Path(name)
    stem = path.stem[: -_LENGTH - 1]
    return stem.removesuffix(_REPLACED) + path.suffix, stem.endswith(_REPLACED)


def left_behind(target: Path) -> set[str]:
    """Return the files that a killed export brought in: their names say a part of a hash.

    It is that of the first file of an artifact, whose others have the same name.
    """
    groups: dict[str, list[str]] = {}
    proven = set()
    for name in os.listdir(target):
        match = _ASIDE.fullmatch(name)
        path = target / name
        if match and path.is_file() and not path.is_symlink():
            groups.setdefault(match[1], []).append(name)
            with contextlib.suppress(OSError, ValueError):
                if manifest.digest(path).startswith(match[2]):
                    proven.add(match[1])
    return {name for group in proven for name in groups[group]}


def _holds_something(target: Path) -> bool:
    names = {name for name in os.listdir(target) if not LOCK.fullmatch(name)}
    # Without a manifest they belong to an export that was killed before it had one, but for what
    # stepped aside for it.
    left = {name for name in left_behind(target) if not name_of(name)[1]}
    return bool(names) and (manifest.FILE in names or bool(names - left))
