"""Files in folders, one folder a class: which file is of which class and split."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_kd.datasets import class_names, files
from keras_kd.datasets.task_data import Place

_SPLITS = ("train", "validation", "test")


class Kind(NamedTuple):
    """What is looked for.

    Args:
        files: What the errors call them.
        example: The end of a name in the errors.
        suffixes: Of the files.
    """

    files: str
    example: str
    suffixes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of each split.

    Args:
        files: By split, each with its class number.
        names: Of the classes.
        notes: What was left out.
    """

    files: dict[str, list[tuple[Path, int]]]
    names: list[str]
    notes: list[str]

    def labels(self, split: str) -> Any:
        """Class numbers `(files,)`."""
        return np.array([label for _, label in self.files[split]])

    def where(self, split: str) -> Place:
        """What says where a row comes from."""
        return lambda row: f"`{self.files[split][row][0]}`"


def find(
    folder: str | os.PathLike[str],
    kind: Kind,
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Found:
    """Find the files of `FOLDER/CLASS/*`, or of `FOLDER/train/CLASS/*` and `FOLDER/test/CLASS/*`.

    Args:
        folder: Path of the folder.
        kind: What is looked for.
        validation: A folder of the same classes for this split.
        test: The same.
        classes: The classes in the order of their numbers; in alphabetical order without.

    Raises:
        ValueError: If a folder is missing or holds no such files, or a file outside those for
            training is of none of their classes.
    """
    root = Path(folder)
    _require(root, kind)
    notes: list[str] = []
    roots = _roots(root, validation is not None, notes)
    for split, other in (("validation", validation), ("test", test)):
        if other is not None:
            roots[split] = Path(other)
    found = {
        split: _paths(place, kind, notes, 2 if split == "train" else 1)
        for split, place in roots.items()
    }
    class_names.check(sorted(found["train"]), lambda name: f"`{roots['train'] / name}`")
    names = sorted(found["train"]) if classes is None else [str(name) for name in classes]
    files: dict[str, list[tuple[Path, int]]] = {}
    for split, by_class in found.items():
        for name, paths in by_class.items():
            if name not in names:
                which = "`--classes` names" if classes is not None else f"`{roots['train']}` has"
                raise ValueError(
                    f"`{paths[0]}` is of class `{name}`, which is none of those that {which}."
                    f"{class_names.hint(name, names)} Add training {kind.files} of it, or leave "
                    "its folder out."
                )
        files[split] = [
            (path, names.index(name)) for name in sorted(by_class) for path in by_class[name]
        ]
    return Found(files, names, notes)


def holds(folder: str | os.PathLike[str], kind: Kind) -> bool:
    """Whether any class of a folder begins with such a file."""
    return any(
        _is_one(path, kind)
        for place in _folders(_train(Path(folder)) or Path(folder))
        for path in place.iterdir()
    )


def _folders(root: Path) -> list[Path]:
    """The folders within one, but those that file managers and macOS's archives leave."""
    return [
        place
        for place in sorted(root.iterdir())
        if place.is_dir() and not place.name.startswith(".") and place.name != "__MACOSX"
    ]


def _is_one(path: Path, kind: Kind) -> bool:
    # `._1.png` is no image: macOS writes what it knows of `1.png` into it.
    return path.suffix.lower() in kind.suffixes and not path.name.startswith(".")


def _train(root: Path) -> Path | None:
    """The folder of the training split, which holds folders; one of files is a class, `train`."""
    for place in _folders(root):
        if place.name.lower() == "train" and _folders(place):
            return place
    return None


def _roots(root: Path, validated: bool, notes: list[str]) -> dict[str, Path]:
    """The folder of each split that there is."""
    if _train(root) is None:
        return {"train": root}
    roots: dict[str, Path] = {}
    others = []
    for place in _folders(root):
        split = place.name.lower()
        if split in roots:
            raise ValueError(f"`{roots[split]}` and `{place}` are one split. Put them together.")
        if split in _SPLITS:
            roots[split] = place
        else:
            others.append(place)
    lacks = not validated and "validation" not in roots
    for place in others:
        if lacks and place.name.lower() in files.OTHERS_VALIDATION:
            raise ValueError(
                f"`{place}` is none of {', '.join(_SPLITS)}, as the folders of splits are called. "
                f"Rename it, or pass `--validation {place}`."
            )
    if others:
        notes.append(
            f"`{root}` has splits, and beside them folders that were left out: "
            f"{_few([place.name for place in others])}."
        )
    return roots


def _require(root: Path, kind: Kind) -> None:
    if not root.is_dir():
        raise ValueError(f"`{root}` is no folder. Pass one that holds CLASS/*.{kind.example}.")


def _paths(root: Path, kind: Kind, notes: list[str], least: int) -> dict[str, list[Path]]:
    _require(root, kind)
    found: dict[str, list[Path]] = {}
    others = [
        path for path in sorted(root.iterdir()) if path.is_file() and not path.name.startswith(".")
    ]
    deeper: list[Path] = []
    for place in _folders(root):
        inside = sorted(place.iterdir())
        paths = [path for path in inside if _is_one(path, kind)]
        spare = [path for path in inside if path.is_file() and path not in paths]
        folders = [path for path in _folders(place) if path not in paths]
        others += spare
        deeper += folders
        if not paths:
            instead = f", but {_ends(spare + folders)}" if spare or folders else ""
            raise ValueError(
                f"`{place}` holds no {kind.files} ({', '.join(kind.suffixes)}){instead}. Remove "
                f"the folder, or put {kind.files} of the class in. A folder holds images or "
                "recordings, and not both."
            )
        found[place.name] = paths
    if len(found) < least:
        needs = (
            f"a classifier needs two classes: CLASS/*.{kind.example}, or "
            f"train/CLASS/*.{kind.example} and test/CLASS/*.{kind.example}"
            if least > 1
            else f"those of a class lie in a folder of its name: CLASS/*.{kind.example}"
        )
        raise ValueError(f"`{root}` holds {len(found)} folders of {kind.files}, and {needs}.")
    if deeper:
        notes.append(
            f"Folders within those of the classes were left out: {_few(list(map(str, deeper)))}."
        )
    if others:
        notes.append(
            f"{len(others):,} files of `{root}` are no {kind.files} and were left out: "
            f"{_ends(others)}."
        )
    return found


def _ends(paths: Sequence[Path]) -> str:
    """How the names of files end, or whole names where they have no ending."""
    return _few(sorted({path.suffix.lower() or path.name for path in paths}))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" and others" if len(names) > 6 else "")
