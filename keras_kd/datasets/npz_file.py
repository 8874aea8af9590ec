"""Arrays of any task from `.npz` files, as the models read them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_kd.datasets import bio, files
from keras_kd.datasets.task_data import Inputs, Raw, TaskData, assemble

_SPLITS = ("train", "validation", "test")
_NAMES = tuple(f"{part}_{split}" for split in _SPLITS for part in "xy")


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
    four, are scaled from [0, 255] to [0, 1], but for `tokens`; everything else is taken as it is.

    Args:
        path: Path of the file.
        task: What the labels are, see `task_data.TASKS`.
        validation: A file with `x` and `y` for this split.
        test: The same.
        classes: Names of the classes, in place of `class_names`.

    Returns:
        The data.

    Raises:
        ValueError: If a file cannot be read, its arrays do not fit the task or each other, or tags
            do not follow BIO, where the classes are named by such.
    """
    text = os.fspath(path)
    arrays = files.read(path)
    stored, rate = _names(arrays), _rate(text, arrays)
    names = classes if classes is not None else stored
    notes: list[str] = []
    _check_array_names(text, arrays)
    plain = not any(f"y_{split}" in arrays for split in _SPLITS)
    splits: dict[str, Raw | None] = {}
    if plain:
        splits["train"] = _split(text, arrays, "", task, notes)
    else:
        for split in _SPLITS:
            splits[split] = _split(text, arrays, f"_{split}", task, notes)
    for split, other in (("validation", validation), ("test", test)):
        if other is not None:
            own = files.read(other)
            _require_alike(text, (stored, rate), other, (_names(own), _rate(other, own)))
            splits[split] = _split(os.fspath(other), own, "", task, notes)
            if splits[split] is None:
                raise ValueError(f"`{os.fspath(other)}` holds no `y`. Store `x` and `y` in it.")
    train = splits["train"]
    if train is None:
        raise ValueError(
            f"`{text}` holds {_listed(arrays)}, and no labels to train on. Store `x_train` and "
            "`y_train`, or `x` and `y`; rows without a label have -1."
        )
    for split, raw in splits.items():
        if raw is not None:
            _require_one_dtype(split, raw, train)
    said = []
    for split, raw in splits.items():
        if raw is not None and task == "tokens" and names is not None:
            found = bio.check(np.asarray(raw.y), names, text, raw.where)
            said += [f"{split}: {found}"] if found else []
    spare = _spare(arrays, plain)
    if spare:
        said.append(f"`{text}` has {_listed(spare)} beside the inputs and labels: left out.")
    inputs: dict[str, Any] = {"kind": "images", "scale": 255} if notes else {"kind": "arrays"}
    return assemble(
        text,
        task,
        train,
        validation=splits.get("validation"),
        test=splits.get("test"),
        class_names=names,
        inputs=inputs if rate is None else {**inputs, "sample_rate": rate},
        notes=[*notes, *said],
    )


def _check_array_names(path: str, arrays: Iterable[str]) -> None:
    """Refuse names beside which the right ones are missing."""
    files.require_known_splits(path, arrays)
    known = list(arrays)
    for name in known:
        lower = name.lower()
        if lower != name and lower in ("x", "y", *_NAMES) and lower not in known:
            raise ValueError(f"`{path}` holds `{name}`. Rename it `{lower}`.")
    for name in known:
        split = name.removeprefix("x_")
        if split in _SPLITS and f"y_{split}" not in known and "y" in known:
            raise ValueError(
                f"`{path}` holds `{name}` and `y`. The labels of `{name}` are called `y_{split}`: "
                "rename them."
            )


def _spare(arrays: Iterable[str], plain: bool) -> list[str]:
    """Names of arrays that nothing reads, where the inputs are called `x`."""
    known = list(arrays)
    if ("x" if plain else "x_train") not in known:
        return []
    return [name for name in known if name not in (("x", "y") if plain else _NAMES)]


def _split(path: str, arrays: dict[str, Any], end: str, task: str, notes: list[str]) -> Raw | None:
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
    # Bytes of three axes are features of tokens where there are tokens, and no images.
    images = task != "tokens"
    made = {name: ready(array, notes) if images else array for name, array in found.items()}
    label = f"y{end}"
    return Raw(
        made.get("x", made),
        labels,
        lambda row: f"`{path}`: row {row} of `{label}`",
        path,
        tuple(name for name, array in found.items() if made[name] is not array),
    )


def _names(arrays: dict[str, Any]) -> list[str] | None:
    """Take the names of the classes out of the arrays."""
    found = arrays.pop("class_names", None)
    return None if found is None else files.names_of(found)


def _rate(path: str | os.PathLike[str], arrays: dict[str, Any]) -> int | float | None:
    """Take the samples a second of recordings out of the arrays."""
    rate = arrays.get("sample_rate")
    if rate is None or rate.ndim > 1 or rate.size != 1:
        return None
    del arrays["sample_rate"]
    if rate.dtype.kind not in "uif" or not float(rate.item()) > 0:
        raise ValueError(
            f"`{os.fspath(path)}` holds the `sample_rate` {rate.item()!r}, and one is a number of "
            "samples a second."
        )
    found: int | float = rate.item()
    return found


def _require_alike(path: str, own: Any, other: str | os.PathLike[str], others: Any) -> None:
    told = (
        ("class_names", "Bring its labels into the order of these names."),
        ("sample_rate", "Resample one to the rate of the other."),
    )
    for (name, cure), one, another in zip(told, own, others, strict=True):
        if None not in (one, another) and one != another:
            raise ValueError(
                f"`{os.fspath(other)}` has the `{name}` {another}, and `{path}` {one}. {cure}"
            )


def _require_one_dtype(split: str, raw: Raw, train: Raw) -> None:
    """Refuse images that are scaled in one split and taken as they are in another."""
    if set(raw.scaled) != set(train.scaled):
        name = sorted(set(raw.scaled) ^ set(train.scaled))[0]
        bytes_in, other = (raw, train) if name in raw.scaled else (train, raw)
        here, there = ("training", split) if other is raw else (split, "training")
        raise ValueError(
            f"`{name}` of the {here} rows in `{bytes_in.path}` holds images of unsigned bytes, "
            f"which are scaled from [0, 255] to [0, 1], and that of the {there} rows in "
            f"`{other.path}` holds {_dtype(other.x, name)}, which is taken as it is. Store both in "
            "one dtype."
        )


def _dtype(x: Inputs, name: str) -> str:
    array = x.get(name) if isinstance(x, dict) else x
    return "nothing of that name" if array is None else str(array.dtype)


def ready(array: np.ndarray, notes: list[str]) -> Any:
    """Return images of unsigned bytes with a channel axis and scaled; all else as it is.

    Args:
        array: Of one input, `(samples, ...)`.
        notes: Takes sentences on what was changed.
    """
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        return array
    if array.ndim == 3:
        array = array[..., np.newaxis]
        notes.append("The images had no channel axis: one was added.")
    notes.append("Images of unsigned bytes were scaled from [0, 255] to [0, 1].")
    return np.multiply(array, np.float32(1 / 255), dtype=np.float32)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "no arrays"
