"""Files made aside and put in place when all of them are complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_kd.export import manifest
from keras_kd.export.scratch import BusyError, held_folder
from keras_kd.export.target import (
    as_replaced,
    aside,
    check_folder,
    check_names_free,
    left_behind,
    name_of,
)
from keras_kd.export.writing import explained
from keras_kd.utils import files


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder on the target's disk in which everything is made, gone whatever happens.

    Raises:
        FileExistsError: If another export into the same folder is at work.
        OSError: If the folder cannot be made, or, in words of its own, if the disk is full at any
            time until the end.
    """
    # What a link leads to may lie on another disk.
    target = target.resolve()
    made: list[Path] = []
    with _explaining(target):
        try:
            missing = target.parent
            while not missing.exists():
                made.append(missing)
                missing = missing.parent
            target.parent.mkdir(parents=True, exist_ok=True)
            with held_folder(_beside(target), _prefix(target), alone=True) as stage:
                yield stage
        except BusyError as error:
            raise FileExistsError(
                errno.EEXIST,
                f"Another export is being written to `{target}` at this moment. Wait for it, or "
                "choose another folder",
            ) from error
        finally:
            _remove_empty(made)


@contextlib.contextmanager
def _explaining(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        said = explained(error, f"the export to `{target}`")
        if said is error:
            raise
        raise said from error


def _beside(target: Path) -> Path:
    # Beside the target, so that a new folder appears with what is in it; within it where another
    # disk is mounted there, since a rename does not lead from one to the other.
    if not target.is_dir():
        return target.parent
    same = target.stat().st_dev == target.parent.stat().st_dev
    return target.parent if same and os.access(target.parent, os.W_OK | os.X_OK) else target


def _prefix(target: Path) -> str:
    name = target.name or "export"
    if len(os.fsencode(name)) > 150:
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
    return f".{name}-"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            # It holds the export by now.
            return


@contextlib.contextmanager
def made_aside(target: Path, *, overwrite: bool, beside: Sequence[str]) -> Iterator[Path]:
    """A folder for an export and the files that belong to it, put in place when the block ends.

    Until then the target is as it was, whatever ends the block: an error or the process.

    Args:
        target: Where all of it is going to be.
        overwrite: Whether it may hold files by now.
        beside: Names of the files that belong to the export, of which some may not be made.

    Yields:
        A folder that is not there yet, for `export_model` to make.

    Raises:
        FileExistsError: See `staging` and `place`.
        OSError: See `staging` and `place`.
    """
    with staging(target) as stage:
        made = stage / "made"
        yield made
        content = {key: value for key, value in manifest.read(made).items() if key != "seal"}
        place(made, target, content, overwrite=overwrite, beside=beside)


@contextlib.contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """A folder whose files go into another one when the block ends and all are complete.

    Args:
        folder: Where they are going to be, made if it is missing. Files of the same names are
            replaced.

    Raises:
        OSError: If they cannot be written, in words of its own if the disk is full.
    """
    with _explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with held_folder(folder, ".keras-kd-") as stage:
            yield stage
            names = sorted(os.listdir(stage))
            for name in names:
                files.sync(stage / name)
            for name in names:
                os.replace(stage / name, folder / name)
            files.sync(folder)


def place(
    stage: Path,
    target: Path,
    content: dict[str, Any],
    *,
    overwrite: bool,
    beside: Sequence[str] = (),
) -> None:
    """Move the complete files into the target, and remove those of the export they replace.

    A new folder appears at once with all that is in it. In a folder that is there, every moment
    finds a manifest with all files that it names, the earlier export or the new one: new files
    come in under names of their own, with a part of their hash; one rename of the manifest makes
    the new export the one in the folder; then the files get the names that were asked for, as
    second names, what is left of the earlier export goes, and a second rename tells of these names.
    Files that belong to the earlier export, such as its student, step aside before that first
    rename, and the new ones get their names after it: no moment finds one beside another export.

    Args:
        stage: Folder of the new files, on the same disk.
        target: Folder of the export. Files of other origin in it stay.
        content: The manifest of the new files, without its seal.
        overwrite: Whether the folder may hold files by now.
        beside: Names of files that belong to the export and that no manifest names. What the stage
            does not hold of them goes from the target.

    Raises:
        FileExistsError: If it may not, and another export has come first; or if it holds what is
            not to be replaced.
        OSError: If a file cannot be put in place. The folder then holds the earlier export or the
            new one, whole.
    """
    target = target.resolve()
    check_folder(target, overwrite)
    hashes = manifest.hashes_of(content)
    check_names_free(target, [*hashes, *beside, manifest.FILE])
    others = {name: manifest.digest(stage / name) for name in beside if (stage / name).is_file()}
    for name in (*hashes, *others):
        files.sync(stage / name)
    manifest.write(content, stage / manifest.FILE)
    if not target.exists():
        whole = stage / ".whole"
        whole.mkdir()
        for name in (*hashes, *others, manifest.FILE):
            os.replace(stage / name, whole / name)
        files.sync(whole)
        try:
            os.rename(whole, target)
        except OSError:
            # Somebody has made it in the meantime: said as it is where that is the reason.
            check_folder(target, overwrite)
            raise
        files.sync(target.parent)
        return
    _take_up(target)
    earlier = _earlier(target)
    # Files of one artifact keep one name, by which the first finds the others.
    first = {
        each.file: row["sha256"] for row in content["artifacts"] for each in manifest.files_of(row)
    }
    names = {name: aside(name, first.get(name, sha256)) for name, sha256 in hashes.items()}
    new_others = {name: aside(name, sha256) for name, sha256 in others.items()}
    old_others = {
        name: as_replaced(name, manifest.digest(target / name))
        for name in beside
        if (target / name).is_file() and not (target / name).is_symlink()
    }
    # What goes once no manifest names it.
    ours = {*earlier, *names.values(), *new_others.values(), *left_behind(target)}
    try:
        for name, new in (*names.items(), *new_others.items()):
            os.replace(stage / name, target / new)
        os.rename(stage / manifest.FILE, stage / f".{manifest.FILE}")
        swap = {**_renamed(content, names), "replaces": sorted({*earlier, *hashes})}
        manifest.write(swap, stage / manifest.FILE)
        for name, new in old_others.items():
            os.replace(target / name, target / new)
        os.replace(stage / manifest.FILE, target / manifest.FILE)
        ours |= {*old_others.values(), *(set(beside) - set(others))}
        for name, new in new_others.items():
            os.replace(target / new, target / name)
        for name, new in names.items():
            _second_name(target / new, stage / name)
            ours.add(name)
            os.replace(stage / name, target / name)
        _tidy(target, ours - set(hashes))
        os.replace(stage / f".{manifest.FILE}", target / manifest.FILE)
    finally:
        # Ctrl-C and errors come through here at any of the steps above; a process that was killed
        # leaves this to the next export.
        _take_up(target)
        _tidy(target, ours)
        files.sync(target)


def _take_up(target: Path) -> None:
    """Give the files beside an export their names, where what was stopped came to give them none.

    They are those of the export whose manifest is in force: the ones that stepped aside as long as
    it is not the new one's, else the ones that came in. What is left of the other export goes.
    """
    found = left_behind(target)
    if not found:
        return
    content: dict[str, Any] = {}
    named: set[str] = set()
    if (target / manifest.FILE).exists():
        try:
            content = manifest.read(target)
        except manifest.ManifestError:
            # Somebody has changed it: what it names is not known.
            return
        named = set(first_names(content))
    for name in sorted(found - named):
        own, replaced = name_of(name)
        if replaced != ("replaces" in content) and not os.path.lexists(target / own):
            os.replace(target / name, target / own)
    _tidy(target, found)


def first_names(content: dict[str, Any]) -> list[str]:
    """Return the names of all files that a manifest describes."""
    return list(manifest.hashes_of(content))


def _renamed(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    def entry(row: dict[str, Any]) -> dict[str, Any]:
        renamed = {**row, "file": names.get(row["file"], row["file"])}
        if "more_files" in row:
            renamed["more_files"] = [
                {**each, "file": names.get(each["file"], each["file"])}
                for each in row["more_files"]
            ]
        return renamed

    return {
        **content,
        "artifacts": [entry(row) for row in content["artifacts"]],
        "evaluation": entry(content["evaluation"]),
        "best": names.get(content["best"], content["best"]),
    }


def _earlier(target: Path) -> set[str]:
    try:
        content = manifest.read(target)
    except manifest.ManifestError:
        return set()
    return {*first_names(content), *content.get("replaces", ())}


def _tidy(target: Path, names: Iterable[str]) -> None:
    try:
        named = {*first_names(manifest.read(target)), manifest.FILE}
    except manifest.ManifestError:
        named = set()
        if (target / manifest.FILE).exists():
            # Somebody has changed it: what it names is not known.
            return
    for name in set(names) - named:
        path = target / name
        if not path.is_dir() or path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _second_name(path: Path, new: Path) -> None:
    try:
        os.link(path, new)
    except OSError:
        # Some disks know one name a file.
        shutil.copyfile(path, new)
        files.sync(new)
