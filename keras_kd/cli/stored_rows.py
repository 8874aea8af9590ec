"""Rows of a `.npz` file with splits, `x_train` and the rest, as a model reads them.

A model of images gets them as `keras_kd.datasets.load` gives them, bytes scaled to [0, 1]. Any
other one gets the rows as they stand in the file: tables, sequences, waveforms, word numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from keras_kd import datasets
from keras_kd.datasets import npz_file
from keras_kd.datasets.task_data import Rows, count, divide
from keras_kd.utils.types import Array, Shape

if TYPE_CHECKING:
    import keras

Split: TypeAlias = tuple[Any, Any]
"""Inputs, an array or a dict of them by input name, and labels or `None`."""

_PARTS = ("train", "validation", "test")


def shapes_of(model: keras.Model) -> dict[str, Shape]:
    """Return the shapes of a model's inputs without the batch, by name; none where it has none."""
    return {tensor.name: tuple(tensor.shape[1:]) for tensor in model.inputs or []}


def are_splits(arrays: Mapping[str, Array], shapes: Mapping[str, Shape]) -> bool:
    """Whether a file holds splits.

    Args:
        arrays: What it holds.
        shapes: Of the model's inputs by name, see `shapes_of`.
    """
    return "x_train" in arrays or _named(arrays, tuple(shapes), "train") is not None


def are_images(arrays: Mapping[str, Array], shapes: Mapping[str, Shape]) -> bool:
    """Whether the splits of a file are images of classes to the model that reads them.

    Args:
        arrays: What the file holds.
        shapes: Of the model's inputs by name; where they are not known, what has the axes of images
            is taken for images.
    """
    x, y = arrays.get("x_train"), arrays.get("y_train")
    if x is None or y is None or x.ndim not in (3, 4) or not {"x_test", "y_test"} <= set(arrays):
        return False
    of_classes = y.dtype.kind in "bui" and (y.ndim == 1 or y.shape[1:] == (1,))
    return of_classes and [len(shape) for shape in shapes.values()] in ([], [3])


def split(
    path: str,
    arrays: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    part: str,
    outputs: Sequence[str] = (),
) -> Split:
    """Return one split of a file.

    Args:
        path: Of the file.
        arrays: What it holds.
        shapes: Of the model's inputs by name, see `shapes_of`.
        part: `"train"`, `"validation"` or `"test"`. What the file does not have of the last two is
            taken from its training rows, as `keras-kd distill` takes it.
        outputs: Names of the model's outputs, by which labels may stand in the file.

    Raises:
        ValueError: If the arrays do not fit together, or there are too few rows.
    """
    if are_images(arrays, shapes):
        loaded = datasets.load(path)
        return getattr(loaded, f"x_{part}"), getattr(loaded, f"y_{part}")
    found: dict[str, Rows] = {}
    labels: dict[str, Any] = {}
    for name in _PARTS:
        x = _named(arrays, tuple(shapes), name)
        if x is None and f"x_{name}" in arrays:
            x = _ready(arrays[f"x_{name}"], next(iter(shapes.values()), ()))
        elif isinstance(x, dict):
            x = {key: _ready(array, shapes[key]) for key, array in x.items()}
        if x is None:
            continue
        several = _named(arrays, tuple(outputs), name) if len(outputs) > 1 else None
        labels[name] = arrays.get(f"y_{name}") if several is None else several
        lengths = {np.shape(each)[:1] for each in (*_leaves(x), *_leaves(labels[name]))}
        if len(lengths) > 1 or () in lengths:
            raise ValueError(
                f"The {name} arrays of `{path}` have {_listed(lengths)} rows. Store one row of "
                "inputs and one label for each sample."
            )
        index = np.arange(count(x))
        found[name] = Rows(x, index if labels[name] is None else _told(labels[name]), index)
    if part == "train" and labels["train"] is None:
        return found["train"].x, None
    # Labels as they stand in the file, of the rows that the split has.
    source = part if part in found else "train"
    divide(path, _task(found["train"].y), found, [])
    y, rows = labels[source], found[part].index
    if isinstance(y, dict):
        return found[part].x, {name: each[rows] for name, each in y.items()}
    return found[part].x, None if y is None else y[rows]


def _named(arrays: Mapping[str, Array], names: Sequence[str], part: str) -> Any:
    """The arrays of a split by name; `None` without them."""
    keys = [f"{name}_{part}" for name in names]
    if not keys or not set(keys) <= set(arrays):
        return None
    return {name: arrays[key] for name, key in zip(names, keys, strict=True)}


def _ready(array: Array, shape: Shape) -> Array:
    return npz_file.ready(array, []) if len(shape) == 3 else array


def _listed(lengths: set[tuple[int, ...]]) -> str:
    return " and ".join(f"{each[0]:,}" if each else "no" for each in sorted(lengths))


def _leaves(value: Any) -> list[Array]:
    if value is None:
        return []
    return list(value.values()) if isinstance(value, dict) else [value]


def _told(labels: Any) -> Array:
    """The labels by which rows are divided: class numbers where they are such."""
    y = next(iter(labels.values())) if isinstance(labels, dict) else labels
    if y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0]
    one_hot = y.ndim == 2 and np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all()
    return y.argmax(axis=1) if one_hot else y


def _task(y: Array) -> str:
    """The task whose rows are divided as these."""
    if y.dtype.kind not in "bui" or y.ndim == 0:
        return "regression"
    if y.ndim == 1:
        # Without labels there are numbers of rows, of which no two are alike.
        return "classification" if len(np.unique(y)) < len(y) else "regression"
    return "tokens" if y.min() < 0 or y.max() > 1 else "multilabel"
