"""Arrays of any task from `.npz` files, as the models read them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_kd.datasets import files
from keras_kd.datasets.task_data import Raw, TaskData, assemble

_SPLITS = ("train", "validation", "test")


def load(
    path: str | os.PathLike[str],
    task: str,
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    classes: list[str] | None = None,
) -> TaskData:
    """Load the arrays of a task.

    The file holds `x_train` and `y_train`, and may hold `x_validation`, `y_validation`, `x_test`,
    `y_test` and `class_names`; or `x` and `y` alone. A model of several inputs has one array for
    each in place of `x`: `NAME_train`, `NAME_test`. Images of unsigned bytes, of three axes or
    four, are scaled from [0, 255] to [0, 1]; everything else is taken as it is.

    Args:
        path: Path of the file.
        task: What the labels are, see `task_data.TASKS`.
        validation: A file with `x` and `y` for this split.
        test: The same.
        classes: Names of the classes, in place of `class_names`.

    Returns:
        The data.

    Raises:
        ValueError: If a file cannot be read, or its arrays do not fit the task or each other.
    """
    text = os.fspath(path)
    arrays = files.read(path)
    names = classes
    if names is None and "class_names" in arrays:
        names = [str(name) for name in np.atleast_1d(arrays.pop("class_names"))]
    notes: list[str] = []
    plain = not any(f"y_{split}" in arrays for split in _SPLITS)
    splits: dict[str, Raw | None] = {}
    if plain:
        splits["train"] = _split(text, arrays, "", notes)
    else:
        for split in _SPLITS:
            splits[split] = _split(text, arrays, f"_{split}", notes)
    for split, other in (("validation", validation), ("test", test)):
        if other is not None:
            splits[split] = _split(os.fspath(other), files.read(other), "", notes)
            if splits[split] is None:
                raise ValueError(f"`{os.fspath(other)}` holds no `y`. Store `x` and `y` in it.")
    train = splits["train"]
    if train is None:
        raise ValueError(
            f"`{text}` holds {_listed(arrays)}, and no labels to train on. Store `x_train` and "
            "`y_train`, or `x` and `y`; rows without a label have -1."
        )
    return assemble(
        text,
        task,
        train,
        validation=splits.get("validation"),
        test=splits.get("test"),
        class_names=names,
        inputs={"kind": "images", "scale": 255} if notes else {"kind": "arrays"},
        notes=notes,
    )


def _split(path: str, arrays: dict[str, Any], end: str, notes: list[str]) -> Raw | None:
    labels = arrays.get(f"y{end}")
    found = {
        name[: len(name) - len(end)]: array
        for name, array in arrays.items()
        if name.endswith(end) and name != f"y{end}" and name != "class_names"
    }
    if labels is None:
        if "x" in found and end:
            raise ValueError(f"`{path}` holds `x{end}` and no `y{end}`. Store both, or neither.")
        return None
    if not found:
        raise ValueError(
            f"`{path}` holds `y{end}` and no inputs for it. Store `x{end}`, or an array "
            f"`NAME{end}` for each input of the model."
        )
    made = {name: _ready(array, notes) for name, array in found.items()}
    label = f"y{end}"
    return Raw(
        made.get("x", made),
        labels,
        lambda row: f"`{path}`: row {row} of `{label}`",
    )


def _ready(array: np.ndarray, notes: list[str]) -> Any:
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        return array
    if array.ndim == 3:
        array = array[..., np.newaxis]
        notes.append("The images had no channel axis: one was added.")
    notes.append("Images of unsigned bytes were scaled from [0, 255] to [0, 1].")
    return np.multiply(array, np.float32(1 / 255), dtype=np.float32)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "no arrays"
