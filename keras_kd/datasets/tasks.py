"""One door to data of any task: which loader reads what, and which options it takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.datasets import audio_folder, class_folders, conll, csv_file, image_folder, npz_file
from keras_kd.datasets.dataset import Dataset, check_image_size, is_size
from keras_kd.datasets.images import load
from keras_kd.datasets.task_data import Rows, TaskData, check_class_names, check_task

_KINDS = {
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "conll": (".conll", ".conllu", ".bio", ".iob", ".conll.gz"),
    "npz": (".npz",),
}
_TAKES = {
    "csv": (
        *("target", "text", "categories", "leave_out", "classes", "standardize", "unlabeled"),
        *("vocabulary", "length", "delimiter", "validation", "test", "group"),
    ),
    "conll": ("classes", "vocabulary", "length", "validation", "test"),
    "npz": ("classes", "validation", "test"),
    "folder": ("classes", "image_size", "validation", "test"),
    "audio": ("classes", "length", "validation", "test"),
    "named": ("image_size", "data_dir"),
}
_SAID = {
    "csv": "a CSV file",
    "conll": "a CoNLL file",
    "npz": "a `.npz` file",
    "folder": "a folder of images",
    "audio": "a folder of recordings",
    "named": "a data set by name",
}


def load_task(
    data: str | os.PathLike[str],
    task: str = "classification",
    *,
    target: Sequence[str] | str = (),
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    text: str | None = None,
    categories: Sequence[str] | str = (),
    leave_out: Sequence[str] | str = (),
    classes: Sequence[str] | None = None,
    standardize: bool = False,
    unlabeled: bool = False,
    vocabulary: str | os.PathLike[str] | None = None,
    length: int | None = None,
    delimiter: str | None = None,
    image_size: tuple[int, int] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    group: str | None = None,
) -> TaskData:
    """Load data of any task as `keras-kd distill` reads them.

    A teacher that is trained on the arrays of this function answers the very inputs that the
    command gives it.

    Args:
        data: `digits`, `tfds:NAME`, or a path: a `.npz` file, a CSV file (`.csv`, `.tsv`, also
            `.gz`), a CoNLL file (`.conll`, `.bio`, also `.gz`), or a folder of images or of WAV
            files, with a folder for each class.
        task: `classification`, `multilabel`, `regression`, `tokens` or `ranking`.
        target: CSV: name of the column with the label; several for labels, targets or items.
        validation: A file or folder of the same kind for this split; taken from the training rows
            with a fixed seed without.
        test: The same.
        text: CSV: name of the column whose words are the input.
        categories: CSV: columns that hold numbers and are categories all the same, as numbers of
            users are; one name or several.
        leave_out: CSV: columns that are no input; the same.
        classes: Names of the classes in the order of the model's units.
        standardize: CSV: whether columns of numbers get mean 0 and standard deviation 1.
        unlabeled: CSV: whether rows with an empty target are kept, for the teacher alone.
        vocabulary: CSV and CoNLL: a file with one word a line; built from the training rows
            without.
        length: CSV and CoNLL: words that are read of a row. Recordings: samples.
        delimiter: CSV: what separates cells.
        image_size: Folders and TFDS: `(height, width)` in pixels to resize images to.
        data_dir: TFDS: folder where it keeps its data.
        group: CSV: of a ranking whose items are rows, the column that is the same for all items of
            a list; the target is the gain of an item then.

    Returns:
        A `TaskData`.

    Raises:
        ValueError: If the data are unknown, cannot be read, or do not fit the task, naming file and
            line; or if an option does not apply to data of this kind.
        TypeError: If `classes` is a text in place of a list.
        ImportError: If a package is missing.

    Examples:
        >>> data = load_task("digits")
        >>> data.train.x.shape, data.units
        ((1222, 8, 8, 1), 10)
    """
    check_task(task)
    name = os.fsdecode(data)
    kind = _kind(name)
    given: dict[str, Any] = {
        "target": _columns(target),
        "validation": validation,
        "test": test,
        "text": text,
        "categories": _columns(categories),
        "leave_out": _columns(leave_out),
        "classes": None if classes is None else list(classes),
        "standardize": standardize,
        "unlabeled": unlabeled,
        "vocabulary": vocabulary,
        "length": length,
        "delimiter": delimiter,
        "image_size": image_size,
        "data_dir": data_dir,
        "group": group,
    }
    for option, value in given.items():
        if option not in _TAKES[kind] and value not in (None, False, []):
            takers = [_SAID[other] for other, takes in _TAKES.items() if option in takes]
            raise ValueError(
                f"`{option}` does not apply to `{name}`, {_SAID[kind]}: it is for "
                f"{' and '.join(takers)}. Leave it out."
            )
    if isinstance(classes, str):
        raise TypeError(f"`classes` is a list of names. Received: classes={classes!r}.")
    if kind == "csv":
        _check_reading(given)
    if classes is not None:
        check_class_names(given["classes"], "`--classes`")
    if length is not None and not is_size(length):
        raise ValueError(f"`length` is a whole number above 0. Received: length={length!r}.")
    check_image_size(image_size)
    options = {key: value for key, value in given.items() if key in _TAKES[kind]}
    if kind == "csv":
        return csv_file.load(name, task, options.pop("target"), **_renamed(options))
    if kind == "npz":
        return npz_file.load(name, task, **options)
    wanted = "tokens" if kind == "conll" else "classification"
    if task != wanted:
        raise ValueError(
            f"`{name}`, {_SAID[kind]}, holds the task `{wanted}`. Received: task={task!r}. Store "
            "data of that task in a `.npz` or CSV file."
        )
    if kind == "conll":
        return conll.load(name, **_renamed(options))
    if kind == "audio":
        return audio_folder.load(name, **options)
    if kind == "folder":
        return image_folder.load(name, **options)
    return _of_images(load(name, **options))


def _columns(given: Sequence[str] | str) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _check_reading(given: dict[str, Any]) -> None:
    """Refuse options of a table where a text is read, and the other way around."""
    text = given["text"]
    spare = ("vocabulary", "length") if text is None else ("categories", "standardize")
    option = next((name for name in spare if given[name] not in (None, False, [])), None)
    if option is None:
        return
    if text is None:
        raise ValueError(
            f"`{option}` is for the words of a text, and a table, without `text`, has none. Name "
            "the column, `--text COLUMN`, or leave it out."
        )
    raise ValueError(
        f"`{option}` does not apply where the words of `{text}` alone are read. Leave it out."
    )


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    return {"words" if key == "vocabulary" else key: value for key, value in options.items()}


def _kind(name: str) -> str:
    for kind, ends in _KINDS.items():
        if name.lower().endswith(ends):
            return kind
    if name == "digits" or name.startswith("tfds:"):
        return "named"
    if Path(name).is_dir():
        return "audio" if class_folders.holds(name, audio_folder.KIND) else "folder"
    known = ", ".join(end for ends in _KINDS.values() for end in ends)
    hint = (
        f"A TFDS set is written with its prefix, `tfds:{name}`."
        if name.isidentifier() and not Path(name).exists()
        else "It does not exist."
        if not Path(name).exists()
        else "Its name ends in none of these."
    )
    raise ValueError(
        f"`{name}` are no data. Expected `digits`, `tfds:NAME`, a folder of images or recordings, "
        f"or a file that ends in one of {known}. {hint}"
    )


def _of_images(data: Dataset) -> TaskData:
    def rows(split: str, index: np.ndarray) -> Rows:
        return Rows(getattr(data, f"x_{split}"), getattr(data, f"y_{split}"), index)

    count = len(data.y_train)
    scaled = any("scaled from [0, 255]" in note for note in data.notes)
    return TaskData(
        data.name,
        "classification",
        rows("train", np.arange(count)),
        rows("validation", np.full(len(data.y_validation), -1)),
        rows("test", np.full(len(data.y_test), -1)),
        data.class_names,
        {"kind": "images", "scale": 255} if scaled else {"kind": "arrays"},
        data.notes,
    )
