"""What a student is trained for, where the user did not say: loss, optimizer, epochs."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd.distill import label_checks
from keras_kd.distill.training_rows import Rows, read
from keras_kd.models import meaning, output_kinds
from keras_kd.utils.types import Data, Losses

LEARNING_RATE = 5e-3
"""Of Adam at the first step; a cosine takes it to 0."""

BATCH_SIZE = 32

_SAMPLES_SEEN = 36_000


def rows_of(data: Data, name: str) -> Rows:
    """Read what was passed as `train` or `validation`.

    Args:
        data: `(x, y)`, `(x, y, sample_weight)`, or a dataset of batches that ends.
        name: Of the argument.

    Raises:
        ValueError: If it has no labels or no rows.
        TypeError: If it is of another type.
    """
    if isinstance(data, tuple):
        if not 2 <= len(data) <= 3:
            raise ValueError(
                f"`{name}` is `(x, y)` or `(x, y, sample_weight)`. Received: {len(data)} of them."
            )
        x, y, weight = (*data, None)[:3]
        x, y = (part if hasattr(part, "__array__") else _arrays(part) for part in (x, y))
        return _listed(read(x, y, {"sample_weight": weight}, f"`{name}`")[0])
    if data is None or hasattr(data, "__array__") or isinstance(data, dict | list):
        raise TypeError(
            f"`{name}` is `(x, y)`, `(x, y, sample_weight)` or a dataset of batches. Received: "
            f"{name} of type {type(data).__name__}."
        )
    return _listed(read(data, None, {}, f"`{name}`")[0])


def _listed(rows: Rows) -> Rows:
    # An export takes a tuple for inputs and labels.
    return dataclasses.replace(rows, x=list(rows.x)) if isinstance(rows.x, tuple) else rows


def _arrays(part: Any) -> Any:
    """Nested arrays as they are; a list of numbers as an array."""
    if part is None or all(hasattr(leaf, "__array__") for leaf in keras.tree.flatten(part)):
        return part
    return np.asarray(part)


def require_alike(train: Rows, validation: Rows) -> None:
    """Raise `ValueError` unless the rows of both have one form, and are finite."""
    shapes = [
        [np.shape(leaf)[1:] for leaf in keras.tree.flatten(rows.x)] for rows in (train, validation)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`train` has rows of shape {shapes[0]} and `validation` of {shapes[1]}. Prepare both "
            "alike."
        )
    for name, rows in (("train", train), ("validation", validation)):
        for leaf in keras.tree.flatten(rows.x):
            if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
                raise ValueError(f"`{name}` holds NaN or infinite values. Remove those rows.")


def hard_loss(student: keras.Model, rows: Rows) -> Any:
    """The loss on the labels: the one that the student was compiled with, or what the labels say.

    Args:
        student: A student as it begins.
        rows: Training rows.

    Raises:
        ValueError: If there are several outputs, or labels and output do not fit.
    """
    if getattr(student, "compiled", False) and student.loss is not None:
        return student.loss
    ends = output_kinds.outputs_of(student)
    y = keras.tree.flatten(rows.y)
    if len(ends) != 1 or len(y) != 1:
        raise ValueError(
            "The student has several outputs, and nothing says which loss each has. Pass `loss=`, "
            "or compile the student that you return."
        )
    output = student(keras.tree.map_structure(lambda leaf: leaf[:1], rows.x), training=False)
    shape, labels = tuple(keras.tree.flatten(output)[0].shape), np.asarray(y[0])
    logits = ends[0].kind not in ("softmax", "sigmoid")
    units = shape[-1]
    binary = bool(np.isin(labels, (0, 1)).all())
    whole = labels.dtype.kind in "biu"
    of_rows = labels.shape[1:] == shape[1:]
    if units > 1 and whole and labels.ndim == len(shape) - 1:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
    if units > 1 and whole and labels.shape[1:] == (*shape[1:-1], 1) and not of_rows:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
    if units == 1 and labels.shape[1:] in ((), shape[1:]):
        if binary and (whole or ends[0].kind == "sigmoid"):
            return keras.losses.BinaryCrossentropy(from_logits=logits)
        if not binary:
            return keras.losses.MeanSquaredError()
        raise ValueError(
            "The labels are all 0.0 and 1.0, and the student ends in one unit without a sigmoid: "
            "nothing says whether it decides or answers a number. Pass "
            '`loss=keras.losses.BinaryCrossentropy(from_logits=True)` or `loss="mse"`, or compile '
            "the student."
        )
    if of_rows and binary and ends[0].kind != "sigmoid" and bool((labels.sum(-1) == 1).all()):
        return keras.losses.CategoricalCrossentropy(from_logits=logits)
    if of_rows and binary:
        return keras.losses.BinaryCrossentropy(from_logits=logits)
    if of_rows and labels.dtype.kind == "f" and units > 1 and _are_shares(labels):
        if ends[0].kind == "softmax":
            return keras.losses.CategoricalCrossentropy()
        raise ValueError(
            "The labels of each row sum to 1, and the student does not end in a softmax: nothing "
            "says whether they are probabilities of classes or numbers. Pass "
            '`loss=keras.losses.CategoricalCrossentropy(from_logits=True)` or `loss="mse"`, or '
            "compile the student."
        )
    if of_rows and labels.dtype.kind == "f":
        return keras.losses.MeanSquaredError()
    raise ValueError(
        f"Nothing says which loss compares outputs of shape {shape} with labels of shape "
        f"{labels.shape} and dtype {labels.dtype}. Pass `loss=`, or compile the student."
    )


def builder_name(build: Callable[..., Any] | str) -> str:
    """What makes the students, as a name."""
    return build if isinstance(build, str) else getattr(build, "__qualname__", type(build).__name__)


def names_of(hard: Losses) -> Any:
    """The name of the loss, or of each, as plain values that are the same in every process.

    Args:
        hard: The hard loss, for several outputs nested as they are.
    """

    def name(loss: Any) -> str:
        # A loss without a name would be told with its address in this process.
        return re.sub(r" at 0x[0-9a-fA-F]+", "", meaning.name_of(loss))

    return keras.tree.map_structure(name, hard)


def _are_shares(labels: np.ndarray) -> bool:
    return bool(labels.min() >= 0 and np.allclose(labels.sum(-1), 1.0, atol=1e-3))


def epochs_for(rows: int) -> int:
    """Passes over the rows that show 36,000 samples, from 5 to 30."""
    return min(30, max(5, round(_SAMPLES_SEEN / rows)))


def steps(rows: int, batch_size: int, epochs: int) -> int:
    """Steps of a training."""
    return epochs * math.ceil(rows / batch_size)


def adam(rate: float, total: int) -> Any:
    """Adam whose learning rate falls to 0 over the training."""
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, total))


def optimizer_maker(
    optimizer: str | keras.optimizers.Optimizer, student: keras.Model, total: int
) -> Callable[[], Any]:
    """What makes a fresh optimizer for each training.

    Args:
        optimizer: One that was passed, its name, or `None`.
        student: Whose own optimizer counts where none was passed.
        total: Steps of a training.
    """
    if optimizer is None and getattr(student, "compiled", False):
        optimizer = student.optimizer
    if optimizer is None:
        return lambda: adam(LEARNING_RATE, total)
    given = keras.optimizers.get(optimizer)
    return lambda: type(given).from_config(given.get_config())


def digest(*values: object) -> str:
    """A hash of arrays, wherever they are nested, and of plain values."""
    found = hashlib.sha256()
    for value in values:
        for leaf in keras.tree.flatten(value):
            array = np.asarray(leaf)
            if array.dtype.kind == "O":
                found.update(repr(leaf).encode())
                continue
            found.update(f"{array.dtype.str}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def function(name: str, value: object, *given: object) -> Any:
    """Raise `TypeError` unless a value is a function that makes students.

    Args:
        name: What the message calls it.
        value: What was passed.
        *given: What it is called with.
    """
    if isinstance(value, keras.Model) or not callable(value):
        raise TypeError(
            f"`{name}` is a function that returns a new student each time. Received: "
            f"{name} of type {type(value).__name__}. For copies of one model pass "
            "`lambda: keras.models.clone_model(model)`."
        )
    try:
        inspect.signature(value).bind(*given)
    except TypeError as error:
        said = "one argument, a dict of values" if given else "no arguments"
        raise TypeError(f"`{name}` is a function that is called with {said}: {error}.") from error
    except ValueError:
        # Of a function in another language nothing is told.
        pass
    return value


def require_labels(student: keras.Model, hard: Losses, shapes: Sequence[Any], **rows: Rows) -> None:
    """Raise `ValueError` for labels that the hard loss of a single output cannot read.

    Args:
        student: A student as it begins.
        hard: The hard loss.
        shapes: Of its outputs.
        **rows: Rows by the name of the argument that they were.
    """
    if len(shapes) != 1:
        return
    loss = keras.losses.get(hard) if isinstance(hard, str) else hard
    expected = [label_checks.Expected(loss, tuple(shapes[0]), None, student.name)]
    for name, each in rows.items():
        label_checks.require(expected, each.y, None, f"`y` of `{name}`")


def of_command(told: str | None, shape: tuple[int, ...]) -> str:
    """What `keras-kd distill` calls the task of an output.

    Args:
        told: What the output means, see `models.meaning`.
        shape: Of the output.
    """
    if told == meaning.CLASSES:
        return "tokens" if len(shape) > 2 else "classification"
    if told == meaning.INDEPENDENT:
        return "classification" if shape[-1] == 1 else "multilabel"
    return "regression"
