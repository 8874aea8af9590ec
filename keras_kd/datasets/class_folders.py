"""Files in folders, one folder a class: which file is of which class and split."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
    roots = {"train": root}
    if (root / "train").is_dir():
        roots = {split: root / split for split in _SPLITS if (root / split).is_dir()}
    for split, other in (("validation", validation), ("test", test)):
        if other is not None:
            roots[split] = Path(other)
    notes: list[str] = []
    found = {
        split: _paths(place, kind, notes, 2 if split == "train" else 1)
        for split, place in roots.items()
    }
    names = sorted(found["train"]) if classes is None else [str(name) for name in classes]
    files: dict[str, list[tuple[Path, int]]] = {}
    for split, by_class in found.items():
        for name, paths in by_class.items():
            if name not in names:
                which = "`--classes` names" if classes is not None else f"`{roots['train']}` has"
                raise ValueError(
                    f"`{paths[0]}` is of class `{name}`, which is none of those that {which}. "
                    f"Add training {kind.files} of it, or leave its folder out."
                )
        files[split] = [
            (path, names.index(name)) for name in sorted(by_class) for path in by_class[name]
        ]
    return Found(files, names, notes)


def holds(folder: str | os.PathLike[str], kind: Kind) -> bool:
    """Whether any class of a folder begins with such a file."""
    root = Path(folder)
    root = root / "train" if (root / "train").is_dir() else root
    return any(
        path.suffix.lower() in kind.suffixes
        for place in sorted(root.iterdir())
        if place.is_dir()
        for path in place.iterdir()
    )


def _require(root: Path, kind: Kind) -> None:
    if not root.is_dir():
        raise ValueError(f"`{root}` is no folder. Pass one that holds CLASS/*.{kind.example}.")


def _paths(root: Path, kind: Kind, notes: list[str], least: int) -> dict[str, list[Path]]:
    _require(root, kind)
    found: dict[str, list[Path]] = {}
    others: list[Path] = []
    for place in sorted(root.iterdir()):
        if not place.is_dir() or place.name.startswith("."):
            others += [place] if place.is_file() and not place.name.startswith(".") else []
            continue
        inside = sorted(place.iterdir())
        paths = [path for path in inside if path.suffix.lower() in kind.suffixes]
        spare = [path for path in inside if path.is_file() and path not in paths]
        others += spare
        if not paths:
            instead = f", but {_ends(spare)}" if spare else ""
            raise ValueError(
                f"`{place}` holds no {kind.files} ({', '.join(kind.suffixes)}){instead}. Remove "
                f"the folder, or put {kind.files} of the class in. A folder holds images or "
                "recordings, and not both."
            )
        found[place.name] = paths
    if len(found) < 2 and least > 1:
        raise ValueError(
            f"`{root}` holds {len(found)} folders of {kind.files}, and a classifier needs two "
            f"classes: CLASS/*.{kind.example}, or train/CLASS/*.{kind.example} and "
            f"test/CLASS/*.{kind.example}."
        )
    if others:
        notes.append(
            f"{len(others):,} files of `{root}` are no {kind.files} and were left out: "
            f"{_ends(others)}."
        )
    return found


def _ends(paths: Sequence[Path]) -> str:
    """How the names of files end, or whole names where they have no ending."""
    ends = sorted({path.suffix.lower() or path.name for path in paths})
    return ", ".join(ends[:6]) + (" and others" if len(ends) > 6 else "")
