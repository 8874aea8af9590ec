"""Data of any task in one form: inputs as the models read them, labels, three splits.

`dataset.py` is the same for classes of images, with scaling. Here inputs are whatever arrays the
models take; what the labels must be depends on the task, and `checked_labels` says it for each.
A loader (`csv_file.py`, `conll.py`, `image_folder.py`, `npz_file.py`) reads its kind of file and
hands raw splits to `assemble`. It imports NumPy alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from keras_kd.datasets import class_names as names_of_classes
from keras_kd.datasets.dataset import (
    MAX_CLASSES,
    SPLIT_SEED,
    TEST_FRACTION,
    VALIDATION_FRACTION,
    stratified,
)
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Array

TASKS = ("classification", "multilabel", "regression", "tokens", "ranking")
"""What a model may be asked: one class of many, several yes or no, numbers, a class for each token,
or scores by which the items of a row are ranked."""

UNLABELED = -1
"""The class number of a row, or a token, without a label."""

Inputs: TypeAlias = Any
"""An array, or a dict of arrays by the names of a model's inputs."""

Place: TypeAlias = Callable[[int], str]
"""Says where a row of a split comes from, as `data.csv, line 7`."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """One split.

    Args:
        x: Inputs, `(samples, ...)` each.
        y: Labels: class numbers `(samples,)` for `classification`, 0 and 1 `(samples, labels)` for
            `multilabel`, float32 `(samples, units)` for `regression`, class numbers `(samples,
            length)` for `tokens`, non-negative gains `(samples, items)` for `ranking`. A class
            number of -1 is no label.
        index: Where each row stood in the file that it was read from, `(samples,)`; negative in
            splits that have a file of their own.
        texts: What word numbers were made of, for models that read it otherwise: the text of each
            row of a CSV file, the tokens of each sentence of a CoNLL file. Empty for other data.
        groups: Number of the list that each row is an item of, `(samples,)`, where the items of a
            ranking are rows of their own; `y` is `(samples, 1)` then.
    """

    x: Inputs = dataclasses.field(repr=False)
    y: Array = dataclasses.field(repr=False)
    index: Array = dataclasses.field(repr=False)
    texts: tuple[Any, ...] = dataclasses.field(default=(), repr=False)
    groups: Array | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.y)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The data of a task in memory.

    Args:
        name: What was loaded, as it was asked for.
        task: One of `classification`, `multilabel`, `regression`, `tokens`, `ranking`.
        train: What is trained on.
        validation: What chooses between models and files.
        test: What is reported, and chooses nothing.
        class_names: One name for each class, label, target or item, in the order of the model's
            units. Empty where nothing names them.
        inputs: How the inputs are made of what a file holds, as JSON values: the columns of a
            table, the vocabulary of texts, the scale of images.
        notes: What was done to the data on the way, one sentence each.
    """

    name: str
    task: str
    train: Rows
    validation: Rows
    test: Rows
    class_names: tuple[str, ...] = ()
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples in each split."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}

    @property
    def units(self) -> int | None:
        """Units that the model's output needs: classes, labels, targets or items."""
        if self.task in ("classification", "tokens"):
            return len(self.class_names)
        return int(self.train.y.shape[-1])

    @property
    def learns(self) -> str:
        """The task of which loss and method are: items that are rows learn their gain, a number."""
        return "regression" if self.train.groups is not None else self.task

    @property
    def labeled(self) -> Array:
        """Which training rows have any label, `(samples,)` of bool."""
        if self.task == "classification":
            return self.train.y != UNLABELED
        if self.task == "tokens":
            return (self.train.y != UNLABELED).any(axis=1)
        return np.ones(len(self.train), bool)


@dataclasses.dataclass(frozen=True)
class Raw:
    """A split as a loader read it, before checks and splitting.

    Args:
        x: Inputs.
        y: Labels as they stand in the file.
        where: Says where row `i` comes from, for the errors.
        path: Of the file.
        scaled: Names of inputs that were scaled on the way, where others may not be.
        groups: As in `Rows`.
    """

    x: Inputs
    y: Any
    where: Place
    path: str = ""
    scaled: tuple[str, ...] = ()
    groups: Any = None


def assemble(
    name: str,
    task: str,
    train: Raw,
    *,
    validation: Raw | None = None,
    test: Raw | None = None,
    class_names: Sequence[str] | None = None,
    inputs: dict[str, Any] | None = None,
    unlabeled: bool = True,
    notes: Sequence[str] = (),
    texts: Mapping[str, Sequence[Any]] | None = None,
) -> TaskData:
    """Check raw splits and take those that are missing from the training rows.

    Args:
        name: What the errors call the data.
        task: One of `TASKS`.
        train: The training rows.
        validation: The same; taken from `train`, after the test rows, if `None`.
        test: The same; taken from `train` if `None`.
        class_names: Names of the classes, labels, targets or items.
        inputs: See `TaskData`.
        unlabeled: Whether training rows may have no label.
        notes: Sentences to put before those that are added here.
        texts: For each split that was read, what stands in `Rows.texts`.

    Returns:
        The data.

    Raises:
        ValueError: If the task is unknown, labels are missing or of another kind, splits do not fit
            together, or there are too few rows to split.
    """
    check_task(task)
    said = list(notes)
    given = {"train": train, "validation": validation, "test": test}
    splits: dict[str, Rows] = {}
    labels: dict[str, Array] = {}
    for split, raw in given.items():
        if raw is None:
            continue
        x = _checked_inputs(raw.x, split, raw.path or name)
        may_lack, listed = unlabeled and split == "train", raw.groups is not None
        file = raw.path or name
        y = checked_labels(raw.y, task, split, raw.where, said, may_lack, listed, file)
        if count(x) != len(y):
            raise ValueError(
                f"The {split} inputs of `{name}` have {count(x):,} rows and its labels {len(y):,}. "
                "Each row needs one."
            )
        labels[split] = y
        index = np.arange(len(y)) if split == "train" else np.full(len(y), -1)
        held, groups = (texts or {}).get(split, ()), _checked_groups(raw.groups, split, name)
        splits[split] = Rows(x, y, index, tuple(held), groups)
    names = _names(task, labels["train"], class_names, name)
    _check_together(name, task, splits, given, names)
    if task in ("classification", "tokens"):
        _check_classes(name, task, labels["train"], names, said)
    divide(name, task, splits, said)
    said += _repeated(splits)
    data = TaskData(
        name,
        task,
        splits["train"],
        splits["validation"],
        splits["test"],
        names,
        dict(inputs or {}),
        tuple(dict.fromkeys(said)),
    )
    without = int((~data.labeled).sum())
    if without == len(data.train):
        raise ValueError(
            f"No training row of `{name}` has a label. Give some of them one: labels choose and "
            "judge the student."
        )
    if without:
        note = f"{without:,} of {len(data.train):,} training rows have no label and learn from the "
        data = dataclasses.replace(data, notes=(*data.notes, f"{note}teacher alone."))
    return data


def divide(name: str, task: str, splits: dict[str, Rows], said: list[str]) -> None:
    """Take the splits that are missing from the training rows.

    Args:
        name: What the errors call the data.
        task: One of `TASKS`.
        splits: `"train"`, and what there is of `"validation"` and `"test"`; changed in place.
        said: Takes sentences on what was taken.

    Raises:
        ValueError: If there are too few rows.
    """
    for split, fraction in (("test", TEST_FRACTION), ("validation", VALIDATION_FRACTION)):
        if split in splits:
            continue
        rows = splits["train"]
        chosen = _chosen(task, rows, fraction)
        if not chosen.any() or chosen.all():
            raise ValueError(
                f"`{name}` has no {split} split and too few training rows to take one from: "
                f"{_how_many(task, rows)}. Add rows, or pass a {split} file."
            )
        splits[split], splits["train"] = taken(rows, chosen), taken(rows, ~chosen)
        said.append(
            f"There is no {split} split: {int(chosen.sum()):,} training rows were taken for it "
            "with a fixed seed."
        )


def _how_many(task: str, rows: Rows) -> str:
    if rows.groups is not None:
        return f"{len(np.unique(rows.groups)):,} lists, which are not divided"
    known = np.unique(rows.y[rows.y != UNLABELED]) if task == "classification" else ()
    if 2 < len(known) == np.count_nonzero(rows.y != UNLABELED):
        return (
            f"each of its {len(known):,} classes has one row. Numbers to be predicted are "
            "`--task regression`"
        )
    return f"{len(rows):,}"


def _repeated(splits: dict[str, Rows]) -> list[str]:
    """Sentences on rows of other splits that are training rows as well, inputs and labels."""
    if splits["train"].groups is not None:
        # One item in several lists is what rankings are of.
        return []
    train, found = set(_digests(splits["train"])), []
    for split in ("validation", "test"):
        again = sum(one in train for one in _digests(splits[split]))
        rows = len(splits[split])
        if again and 100 * again >= rows:
            found.append(
                f"{again:,} of {rows:,} {split} rows stand among the training rows too, with the "
                "same label: on those a model is judged by what it was shown."
            )
    return found


def _digests(rows: Rows) -> list[int]:
    arrays = list(rows.x.values()) if isinstance(rows.x, dict) else [rows.x]
    lists = zip(*arrays, rows.y, strict=True)
    return [hash(tuple(np.asarray(each).tobytes() for each in row)) for row in lists]


def check_task(task: str) -> None:
    """Refuse a task that is not known.

    Raises:
        ValueError: Naming the close one.
    """
    if task not in TASKS:
        hint = did_you_mean(task, TASKS)
        raise ValueError(f"`{task}` is no task. Expected one of {', '.join(TASKS)}.{hint}")


def check_class_names(names: Sequence[str], whose: str) -> None:
    """Refuse names of classes of which two are one.

    Args:
        names: In the order of the class numbers.
        whose: What the error calls the list.

    Raises:
        ValueError: Naming the one that comes twice.
    """
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(
            f"{whose} name the class `{twice[0]}` twice. Each class number has a name of its own."
        )


def count(x: Inputs) -> int:
    """Number of rows of inputs."""
    return len(next(iter(x.values())) if isinstance(x, dict) else x)


def rows_of(x: Inputs, chosen: np.ndarray | slice) -> Inputs:
    """The chosen rows of inputs."""
    if isinstance(x, dict):
        return {name: array[chosen] for name, array in x.items()}
    return x[chosen]


def taken(rows: Rows, chosen: np.ndarray | slice) -> Rows:
    """The chosen rows of a split."""
    texts = rows.texts and tuple(rows.texts[i] for i in np.arange(len(rows))[chosen])
    groups = None if rows.groups is None else rows.groups[chosen]
    return Rows(rows_of(rows.x, chosen), rows.y[chosen], rows.index[chosen], texts, groups)


def _checked_groups(groups: Any, split: str, name: str) -> Array | None:
    if groups is None:
        return None
    found = np.asarray(groups)
    if np.unique(found, return_counts=True)[1].max() < 2:
        raise ValueError(
            f"Each group of the {split} rows of `{name}` has one row, and nothing to rank. Name "
            "the column that is the same for all items of a list."
        )
    return found


def _chosen(task: str, rows: Rows, fraction: float) -> Array:
    y = rows.y
    if rows.groups is not None:
        # A list is in one split with all of its items.
        lists = np.unique(rows.groups)
        order = np.random.default_rng(SPLIT_SEED).permutation(lists)
        some = order[: max(1, round(fraction * len(order)))] if len(order) > 1 else order[:0]
        return np.isin(rows.groups, some)
    if task == "classification":
        mask = stratified(y, fraction)
        # What chooses and judges needs labels.
        return mask & (y != UNLABELED)
    able = np.arange(len(y))
    if task == "tokens":
        able = np.flatnonzero((y != UNLABELED).any(axis=1))
    order = np.random.default_rng(SPLIT_SEED).permutation(able)
    mask = np.zeros(len(y), bool)
    mask[order[: max(1, round(fraction * len(order)))]] = len(order) > 1
    return mask


def _checked_inputs(x: Inputs, split: str, name: str) -> Inputs:
    if isinstance(x, dict):
        for key, array in x.items():
            _check_array(np.asarray(array), f"`{key}` of the {split} rows of `{name}`")
        sizes = {key: len(array) for key, array in x.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The {split} inputs of `{name}` differ in length: {sizes}.")
        return {key: _native(np.asarray(array)) for key, array in x.items()}
    x = np.asarray(x)
    _check_array(x, f"`x` of the {split} rows of `{name}`")
    return _native(x)


def _native(array: Array) -> Array:
    """Numbers in a form that every backend takes: of this machine's byte order, 64 bits at most."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _check_array(array: Array, what: str) -> None:
    if array.ndim == 0 or len(array) == 0:
        raise ValueError(f"{what} is empty: its shape is {array.shape}. Put at least one row in.")
    if array.dtype.kind not in "buif":
        raise ValueError(f"{what} has dtype {array.dtype}, but models read numbers.")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            held = np.array([bool(np.isfinite(row.astype("float32")).all()) for row in array])
        finite = np.array([bool(np.isfinite(row).all()) for row in array[~held]])
        if finite.any():
            raise ValueError(
                f"{what} holds numbers that float32 does not, first in row "
                f"{int(np.flatnonzero(~held)[finite][0])}. Scale them."
            )
        if not held.all():
            raise ValueError(
                f"{what} holds NaN or infinite values, first in row "
                f"{int(np.flatnonzero(~held)[0])}. Remove or repair these rows."
            )


def checked_labels(
    y: np.ndarray,
    task: str,
    split: str,
    where: Place,
    said: list[str],
    unlabeled: bool,
    listed: bool = False,
    file: str = "",
) -> Array:
    """Bring labels to the form of `Rows.y`.

    Args:
        y: As they stand in the file.
        task: One of `TASKS`.
        split: Name of the split, for the errors.
        where: Says where a row comes from.
        said: Takes sentences on what was changed.
        unlabeled: Whether rows may have no label.
        listed: Whether each row of a ranking is one item of a list.
        file: That they were read from, for the errors.

    Returns:
        The labels.

    Raises:
        ValueError: If they are of another kind than the task's.
    """
    y = np.asarray(y)
    whose = f"The {split} labels" + (f" of `{file}`" if file else "")
    if y.dtype.kind not in "buif":
        raise ValueError(
            f"{whose} have dtype {y.dtype}, but labels are numbers. Number the classes: "
            "`class_names, y = np.unique(y, return_inverse=True)`."
        )
    if y.ndim == 0 or y.size == 0:
        raise ValueError(f"{whose} are empty: their shape is {y.shape}. Store one for each row.")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        row = int(np.flatnonzero(~np.isfinite(y).reshape(len(y), -1).all(axis=1))[0])
        raise ValueError(
            f"The target is missing in {where(row)}: it is NaN or infinite. Leave such rows out"
            + (", or label them -1." if task == "classification" else ".")
        )
    if task in ("regression", "ranking"):
        with np.errstate(over="ignore"):
            held = np.isfinite(y.astype(np.float32))
        _forbid(~held, y, where, "float32 holds no numbers so large")
    if task == "regression":
        y = y.reshape(len(y), -1) if y.ndim < 3 else y
        _require_rank(y, 2, task, whose)
        return y.astype(np.float32)
    if task == "ranking":
        _require_rank(y, 2, task, whose)
        _forbid(y < 0, y, where, "gains of a ranking are 0 or more")
        if split == "train" and not y.any():
            raise ValueError(f"{whose} are 0 everywhere: no item is better than another one.")
        if y.shape[1] < 2 and not listed:
            raise ValueError("A ranking needs at least two items a row: `y` is (rows, items).")
        return y.astype(np.float32)
    _forbid(y != np.round(y), y, where, "class numbers and yes or no are whole numbers")
    if task == "multilabel":
        _require_rank(y, 2, task, whose)
        _forbid((y != 0) & (y != 1), y, where, "labels of `multilabel` are 0 and 1")
        return y.astype(np.float32)
    if task == "classification" and y.ndim == 2:
        if y.shape[1] > 1:
            _forbid((y != 0) & (y != 1), y, where, "one-hot rows hold 0 and 1")
            _forbid(
                np.broadcast_to(y.sum(axis=1, keepdims=True) != 1, y.shape),
                y,
                where,
                "of a one-hot row one number is 1 (several are `--task multilabel`)",
            )
            said.append("One-hot labels became class numbers.")
            y = y.argmax(axis=1)
        else:
            y = y[:, 0]
    _require_rank(y, 2 if task == "tokens" else 1, task, whose)
    _forbid(y < UNLABELED, y, where, "class numbers start at 0, and -1 is no label")
    _forbid(y >= MAX_CLASSES, y, where, f"class numbers go to {MAX_CLASSES - 1:,} at most")
    if task == "classification" and not unlabeled:
        advice = "that is none, which only training rows may have"
        _forbid(y == UNLABELED, y, where, advice if split != "train" else "that is none")
    return y.astype(np.int32)


def _require_rank(y: Array, rank: int, task: str, whose: str) -> None:
    if y.ndim != rank:
        wanted = {
            "multilabel": "(rows, labels)",
            "regression": "(rows,) or (rows, targets)",
            "tokens": "(rows, length)",
            "ranking": "(rows, items)",
            "classification": "(rows,)",
        }[task]
        raise ValueError(
            f"{whose} have shape {y.shape}, but those of the task `{task}` have shape {wanted}."
        )


def _forbid(wrong: Array, y: Array, where: Place, rule: str) -> None:
    if not wrong.any():
        return
    place = tuple(int(i[0]) for i in np.nonzero(wrong))
    raise ValueError(f"{where(place[0])} has the label {y[place]:g}, but {rule}.")


def _names(task: str, y: Array, given: Sequence[str] | None, name: str) -> tuple[str, ...]:
    if task not in ("classification", "tokens"):
        names = tuple(map(str, given or ()))
        if names and len(names) != y.shape[-1]:
            raise ValueError(
                f"`{name}` has {y.shape[-1]} labels a row and {len(names)} names for them. Name "
                "each, in the order of the columns."
            )
        return names
    if given is not None and len(given) < 2:
        raise ValueError(
            f"`{name}` has {len(given)} class, and a classifier needs two. Check the labels."
        )
    if given is not None:
        check_class_names([str(one) for one in given], f"The class names of `{name}`")
    known = y[y != UNLABELED]
    highest = int(known.max()) if known.size else -1
    if given is None:
        return tuple(map(str, range(max(highest + 1, 2))))
    if highest >= len(given):
        raise ValueError(
            f"`{name}` has the class number {highest}, but names for {len(given)} classes only. "
            "Name each class, in the order of the numbers."
        )
    return tuple(map(str, given))


def _check_classes(name: str, task: str, y: Array, names: Sequence[str], said: list[str]) -> None:
    """Refuse labels that tell nothing apart, and say which classes have no row."""
    held = np.unique(y[y != UNLABELED]).tolist()
    if len(held) == 1 and task == "classification":
        raise ValueError(
            f"All labels of the training rows of `{name}` are the class `{names[held[0]]}`, and a "
            "classifier needs two classes. Check the labels."
        )
    cased = names_of_classes.by_case(names)
    said += [cased] if cased else []
    seen = set(held)
    without = [one for i, one in enumerate(names) if i not in seen]
    if held and without:
        few = ", ".join(f"`{one}`" for one in without[:6])
        more = f" and {len(without) - 6:,} others" if len(without) > 6 else ""
        said.append(
            f"{len(without):,} of {len(names):,} classes have no training row: {few}{more}."
        )


def _check_together(
    name: str, task: str, splits: dict[str, Rows], raw: dict[str, Raw | None], names: Sequence[str]
) -> None:
    first = splits["train"]
    for split, rows in splits.items():
        source = raw[split]
        file = (source.path if source is not None else "") or name
        if _shapes(rows.x) != _shapes(first.x) and task != "tokens":
            raise ValueError(
                f"The {split} inputs of `{file}` have the shapes {_shapes(rows.x)}, and those for "
                f"training {_shapes(first.x)}. All splits need the same."
            )
        if task not in ("classification", "tokens"):
            if rows.y.shape[1:] != first.y.shape[1:]:
                raise ValueError(
                    f"The {split} labels of `{file}` have {rows.y.shape[1]} columns and those for "
                    f"training {first.y.shape[1]}."
                )
            continue
        known = set(np.unique(first.y).tolist()) | {UNLABELED}
        strange = ~np.isin(rows.y, sorted(known))
        if strange.any() and source is not None:
            place = tuple(int(i[0]) for i in np.nonzero(strange))
            label = int(rows.y[place])
            said = names[label] if label < len(names) else str(label)
            raise ValueError(
                f"{source.where(place[0])} is of class `{said}`, which no training row has: no "
                f"student could learn it. Add training rows of it, or leave it out of the {split} "
                "rows."
            )


def _shapes(x: Inputs) -> Any:
    if isinstance(x, dict):
        return {name: array.shape[1:] for name, array in x.items()}
    return x.shape[1:]
