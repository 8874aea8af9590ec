"""What every loader gives back, and the checks, the scaling and the split they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from keras_kd.utils.types import Array

Pair: TypeAlias = tuple[Array, Array]

SPLIT_SEED = 20
"""Seed of every split made here. It is part of what a result means, so it is no option."""

VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.2

MAX_CLASSES = 1_000_000
"""Classes that a set may have: more than any classifier of images, and far from where int32 wraps.

Every number up to the highest label is a class with a name, so that one wrong label would fill the
memory with names.
"""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image classification set in memory.

    Args:
        name: What was loaded, as it was asked for.
        x_train: Images, `(samples, height, width, channels)`, float32; in `[0, 1]` wherever the
            source stores integers.
        y_train: Class numbers from 0, `(samples,)`, int32.
        x_validation: As `x_train`. What chooses between models.
        y_validation: As `y_train`.
        x_test: As `x_train`. What is reported, and chooses nothing.
        y_test: As `y_train`.
        class_names: One name a class, in the order of the class numbers.
        notes: What was done to the data on the way, one sentence each.
    """

    name: str
    x_train: Array = dataclasses.field(repr=False)
    y_train: Array = dataclasses.field(repr=False)
    x_validation: Array = dataclasses.field(repr=False)
    y_validation: Array = dataclasses.field(repr=False)
    x_test: Array = dataclasses.field(repr=False)
    y_test: Array = dataclasses.field(repr=False)
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, `(height, width, channels)` in pixels."""
        return tuple(self.x_train.shape[1:])

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples in each split."""
        return {
            "train": len(self.x_train),
            "validation": len(self.x_validation),
            "test": len(self.x_test),
        }


def assemble(
    name: str,
    train: Pair,
    *,
    test: Pair | None = None,
    validation: Pair | None = None,
    class_names: Sequence[str] | None = None,
    test_fraction: float = TEST_FRACTION,
    validation_fraction: float = VALIDATION_FRACTION,
    notes: Sequence[str] = (),
) -> Dataset:
    """Check, split and scale raw splits into a `Dataset`.

    Args:
        name: What the errors call the data.
        train: Images `(samples, height, width[, channels])` and class numbers `(samples,)`.
        test: The same; taken from `train` if `None`.
        validation: The same; taken from `train`, after the test samples, if `None`.
        class_names: One name a class. The class numbers themselves if `None`.
        test_fraction: Share of the training samples to take for a missing test split.
        validation_fraction: Share of what then remains to take for a missing validation split.
        notes: Sentences to put before those that are added here.

    Returns:
        A `Dataset`.

    Raises:
        ValueError: If a split is empty, has other than finite numbers or class numbers, or does
            not fit the other splits.
    """
    said = list(notes)
    splits = {"train": train, "validation": validation, "test": test}
    given = {split: pair for split, pair in splits.items() if pair is not None}
    checked = {split: _checked(name, split, *pair, said) for split, pair in given.items()}
    if class_names is not None and len(set(class_names)) < len(class_names):
        twice = next(one for i, one in enumerate(class_names) if one in class_names[:i])
        raise ValueError(
            f"The class names of `{name}` name `{twice}` twice. Each class number has a name of "
            "its own."
        )
    _check_together(name, checked, class_names)
    labels = [y for _, y in checked.values()]
    classes = tuple(class_names or map(str, range(1 + max(int(y.max()) for y in labels))))
    if len(classes) < 2:
        raise ValueError(
            f"`{name}` has {len(classes)} class, but a classifier needs at least two. "
            "Check the label arrays."
        )
    only = np.unique(checked["train"][1])
    if len(only) < 2:
        raise ValueError(
            f"All training labels of `{name}` are the class `{classes[only[0]]}`, and a classifier "
            "needs two classes. Check the labels."
        )

    # The split is made on the source's own dtype: a uint8 copy is a quarter of a float32 one.
    for split, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if split in checked:
            continue
        x, y = checked["train"]
        taken = stratified(y, fraction)
        if not taken.any():
            raise ValueError(
                f"`{name}` has no {split} split and too few training samples to take one from: "
                f"{len(y)} samples in {len(classes)} classes. At least one class needs two."
            )
        checked[split] = x[taken], y[taken]
        checked["train"] = x[~taken], y[~taken]
        said.append(
            f"The source has no {split} split: {int(taken.sum()):,} training samples were taken "
            "for it with a fixed seed, each class in proportion."
        )
    scaled = {split: _scaled(name, split, x, said) for split, (x, _) in checked.items()}
    return Dataset(
        name=name,
        x_train=scaled["train"],
        y_train=checked["train"][1],
        x_validation=scaled["validation"],
        y_validation=checked["validation"][1],
        x_test=scaled["test"],
        y_test=checked["test"][1],
        class_names=classes,
        notes=tuple(dict.fromkeys(said)),
    )


def stratified(labels: Array, fraction: float, seed: int = SPLIT_SEED) -> Array:
    """Choose a share of the samples of every class.

    Args:
        labels: Class numbers, `(samples,)`.
        fraction: Share to choose, between 0 and 1. A class of at least two samples gives at
            least one and keeps at least one.
        seed: Seed of the choice.

    Returns:
        Boolean mask, `(samples,)`, True for the chosen ones.
    """
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = max(1, round(fraction * len(members)))
        chosen[members[: min(count, len(members) - 1)]] = True
    return chosen


def _checked(name: str, split: str, x: Array, y: Array, said: list[str]) -> Pair:
    """Images of rank 4 in the dtype of the source, and int32 class numbers."""
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind not in "buif":
        raise ValueError(
            f"`x_{split}` of `{name}` has dtype {x.dtype}, but images are numbers. "
            "Save them as uint8 from 0 to 255, or as float32."
        )
    if len(x) != len(y):
        raise ValueError(
            f"`x_{split}` of `{name}` has {len(x):,} samples and `y_{split}` has {len(y):,}. "
            "Each image needs one label."
        )
    if x.size == 0:
        raise ValueError(
            f"`x_{split}` of `{name}` is empty: its shape is {x.shape}. Put at least one image in."
        )
    if x.ndim == 3:
        x = x[..., np.newaxis]
        said.append("The images had no channel axis: one was added.")
    if x.ndim != 4:
        raise ValueError(
            f"`x_{split}` of `{name}` has shape {x.shape}, but images are "
            "(samples, height, width) or (samples, height, width, channels)."
        )
    if x.dtype.kind == "f":
        # Sample by sample sums: a mask of the whole array would double the memory.
        sums = np.array([np.sum(image, dtype=np.float64) for image in x])
        if not np.isfinite(sums).all():
            raise ValueError(
                f"`x_{split}` of `{name}` holds NaN or infinite values, first in sample "
                f"{int(np.flatnonzero(~np.isfinite(sums))[0])}. Remove or repair these samples."
            )
    return x, _checked_labels(name, split, y, said)


def _checked_labels(name: str, split: str, y: Array, said: list[str]) -> Array:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
        said.append("The labels had shape (samples, 1): the last axis was dropped.")
    if y.ndim == 2:
        raise ValueError(
            f"`y_{split}` of `{name}` has shape {y.shape}, but labels are class numbers of shape "
            "(samples,). One-hot labels become class numbers with `np.argmax(y, axis=1)`."
        )
    if y.ndim != 1 or y.dtype.kind not in "bui":
        raise ValueError(
            f"`y_{split}` of `{name}` has dtype {y.dtype} and shape {y.shape}, but labels are "
            "integer class numbers of shape (samples,). Whole numbers that are stored as floats "
            "become integers with `y.astype('int32')`."
        )
    if int(y.min()) < 0:
        raise ValueError(
            f"`y_{split}` of `{name}` holds the label {int(y.min())}, but class numbers start at "
            "0. Remove unlabeled samples, or renumber the classes."
        )
    if int(y.max()) >= MAX_CLASSES:
        raise ValueError(
            f"`y_{split}` of `{name}` holds the label {int(y.max())}, but class numbers go from 0 "
            f"to {MAX_CLASSES - 1:,} at most. Renumber identifiers: "
            "`classes, y = np.unique(y, return_inverse=True)`."
        )
    return y.astype(np.int32)


def _check_together(name: str, checked: dict[str, Pair], class_names: Sequence[str] | None) -> None:
    x_train, y_train = checked["train"]
    if class_names is not None:
        classes, whose = len(class_names), "the class names"
    else:
        classes, whose = 1 + int(y_train.max()), "`y_train`"
    for split, (x, y) in checked.items():
        if x.shape[1:] != x_train.shape[1:]:
            raise ValueError(
                f"`x_{split}` of `{name}` has images of shape {x.shape[1:]} and `x_train` of "
                f"{x_train.shape[1:]}. All splits need the same image shape."
            )
        if x.dtype.kind != x_train.dtype.kind:
            raise ValueError(
                f"`x_{split}` of `{name}` has dtype {x.dtype} and `x_train` {x_train.dtype}: "
                "they would be scaled differently. Store all images in one dtype."
            )
        if int(y.max()) >= classes:
            raise ValueError(
                f"`y_{split}` of `{name}` holds the label {int(y.max())}, but {whose} go only up "
                f"to class {classes - 1}: first in row {int(np.argmax(y >= classes))}. Mend the "
                "labels, or give every class training samples."
            )
        strange = ~np.isin(y, y_train)
        if strange.any():
            row = int(np.argmax(strange))
            raise ValueError(
                f"`y_{split}` of `{name}` holds the label {int(y[row])} in row {row}, and no "
                "training sample has it: no student could learn it. Mend the labels, or give every "
                "class training samples."
            )


def _scaled(name: str, split: str, x: Array, said: list[str]) -> Array:
    """float32 images: integers from [0, 255] to [0, 1], floats as they are."""
    if x.dtype.kind in "ui":
        low, high = int(x.min()), int(x.max())
        if low < 0 or high > 255:
            raise ValueError(
                f"`x_{split}` of `{name}` has integers from {low} to {high}, but integer images "
                "go from 0 to 255. Save other ranges as float32, scaled as the model expects."
            )
        said.append("Integer images were scaled from [0, 255] to [0, 1].")
        return np.multiply(x, np.float32(1 / 255), dtype=np.float32)
    bound = float(np.finfo(np.float32).max)
    if x.dtype.itemsize > 4 and x.size and (float(x.max()) > bound or float(x.min()) < -bound):
        raise ValueError(
            f"`x_{split}` of `{name}` holds values beyond {bound:.4g}, which float32 does not "
            "hold. Scale the images first."
        )
    images = x.astype(np.float32, copy=False)
    if float(images.max()) > 16.0:
        said.append(
            "Float images are taken as they are, although some values are above 16: divide by "
            "255 beforehand if they are pixels from 0 to 255."
        )
    return images


def is_size(value: object) -> bool:
    """Whether it is a whole number above 0."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0


def check_image_size(image_size: object) -> None:
    """Raise `ValueError` unless it is `None` or `(height, width)`."""
    if image_size is None:
        return
    sizes = list(image_size) if isinstance(image_size, tuple | list) else []
    if len(sizes) != 2 or not all(is_size(size) for size in sizes):
        raise ValueError(
            f"`image_size` is {image_size!r}, but it is (height, width) in pixels, both at least "
            "1. For example `image_size=(32, 32)`."
        )
