"""What a learner is given, checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.lifelong.lesson import unreduced
from keras_kd.lifelong.method import Method
from keras_kd.lifelong.streams import Task, rows_of
from keras_kd.utils import checks
from keras_kd.utils.types import Array, Losses, Shape


def require_loss(loss: Losses) -> Any:
    """A loss of integers and logits, or one error.

    Args:
        loss: What `compile` was given.

    Raises:
        TypeError: If it is no loss.
        ValueError: If it takes one-hot labels or probabilities.
    """
    advice = "Pass `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`."
    found = keras.losses.get(loss) if isinstance(loss, str) else loss
    if isinstance(loss, str) and not isinstance(found, keras.losses.Loss):
        # By its name Keras takes probabilities.
        raise ValueError(f"The loss {loss!r} does not take logits. {advice}")
    if isinstance(found, keras.losses.Loss):
        config = found.get_config()
        if isinstance(
            found,
            keras.losses.CategoricalCrossentropy
            | keras.losses.BinaryCrossentropy
            | keras.losses.CategoricalFocalCrossentropy,
        ):
            raise ValueError(
                f"The loss `{type(found).__name__}` reads one-hot labels, whose width changes with "
                f"each task. {advice}"
            )
        if config.get("from_logits") is False:
            raise ValueError(
                f"The loss `{type(found).__name__}` was made with `from_logits=False`, and the "
                f"model answers in logits. {advice}"
            )
        _require_one_a_row(found, f"The loss `{type(found).__name__}`", advice)
        return found
    if not callable(found) or isinstance(found, type):
        raise TypeError(f"`loss` is a Keras loss or a function. Received: {loss!r}. {advice}")
    name = getattr(found, "__name__", type(found).__name__)
    _require_one_a_row(found, f"The loss `{name}`", advice)
    return found


def _require_one_a_row(loss: Any, what: str, advice: str) -> None:
    """Try a loss on three columns and logits of five classes."""
    try:
        values = unreduced(loss, ops.zeros((3,), "int32"), ops.zeros((3, 5), "float32"))
    except Exception as error:
        raise ValueError(
            f"{what} cannot compare columns `(batch,)`, integers, with logits `(batch, classes)`. "
            f"{advice}"
        ) from error
    if tuple(values.shape) != (3,):
        raise ValueError(f"{what} gives shape {tuple(values.shape)} for 3 rows. {advice}")


def fresh(metric: keras.metrics.Metric | str) -> Any:
    """A metric without the state of an earlier task.

    Args:
        metric: A Keras metric, a name or a function.
    """
    if isinstance(metric, keras.metrics.Metric):
        return type(metric).from_config(metric.get_config())
    return metric


def has_shape(shape: Shape, wanted: Shape) -> bool:
    """Whether rows of a shape are what a model takes.

    Args:
        shape: Of a row.
        wanted: Of the model, with `None` for any size.
    """
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted))


def rows_to_train(
    task: object, epochs: int, batch_size: int, split: float, data: tuple[Array, Array] | None
) -> tuple[tuple[Array, Array], Any]:
    """The rows that are trained on and those that are measured after each epoch.

    Args:
        task: A task.
        epochs: Passes over it.
        batch_size: Rows a step.
        split: Share of the rows that are measured.
        data: Rows that are measured in place of these, or `None`.

    Raises:
        TypeError: If `task` is none.
        ValueError: If a number is out of range, or a share leaves no rows.
    """
    if not isinstance(task, Task):
        raise TypeError(
            f"`fit` takes a task of a `Stream`. Received: {type(task).__name__}. Make one with "
            "`Stream.by_task([(x, y)])`."
        )
    checks.whole("epochs", epochs)
    checks.whole("batch_size", batch_size)
    if not 0 <= checks.number("validation_split", split) < 1:
        raise ValueError(
            f"`validation_split` lies in [0, 1). Received: validation_split={split!r}."
        )
    x, y = task.x, task.y
    if data is not None:
        if not isinstance(data, list | tuple) or len(data) != 2:
            raise ValueError(
                f"`validation_data` is `(x, y)`. Received: {type(data).__name__}"
                f"{f' of {len(data)}' if isinstance(data, list | tuple) else ''}."
            )
        u, v = rows_of(*data)
        if split:
            raise ValueError("Pass either `validation_split` or `validation_data`.")
        if u.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"The rows of `validation_data` have shape {u.shape[1:]}, and those of "
                f"`{task.name}` {x.shape[1:]}."
            )
        return (x, y), (u, v)
    if not split:
        return (x, y), None
    stay = int(len(y) * (1 - split))
    if not 0 < stay < len(y):
        raise ValueError(
            f"`validation_split={split}` of {len(y)} rows leaves none for one of the two."
        )
    return (x[:stay], y[:stay]), (x[stay:], y[stay:])


def known_classes(classes: object, method: Method) -> list[int]:
    """The classes that the columns of a given model stand for.

    Args:
        classes: What was given, or `None`.
        method: What is to learn more of them.

    Raises:
        TypeError: If they are no whole numbers.
        ValueError: If one is negative, or the method has to have seen their rows.
    """
    if classes is None:
        return []
    if isinstance(classes, str) or not isinstance(classes, Sequence | np.ndarray):
        raise TypeError(f"`classes` lists the class of each column. Received: classes={classes!r}.")
    if method.needs_rows and len(classes):
        raise ValueError(
            f"`{method.name}` answers by the rows that it has seen of each class, and of those in "
            "`classes` it has seen none. Choose another method, or let it learn these as a task."
        )
    return [checks.whole("classes", label, 0) for label in classes]
