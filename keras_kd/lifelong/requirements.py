"""What a learner is given, checked before anything changes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_kd.lifelong.streams import Task, rows_of
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
        return found
    if not callable(found) or isinstance(found, type):
        raise TypeError(f"`loss` is a Keras loss or a function. Received: {loss!r}. {advice}")
    return found


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
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"`{name}` is a positive integer. Received: {name}={value!r}.")
    if not 0 <= split < 1:
        raise ValueError(
            f"`validation_split` lies in [0, 1). Received: validation_split={split!r}."
        )
    x, y = task.x, task.y
    if data is not None:
        u, v = rows_of(*data)
        if split:
            raise ValueError("Pass either `validation_split` or `validation_data`.")
        return (x, y), (u, v)
    if not split:
        return (x, y), None
    stay = int(len(y) * (1 - split))
    if not 0 < stay < len(y):
        raise ValueError(
            f"`validation_split={split}` of {len(y)} rows leaves none for one of the two."
        )
    return (x[:stay], y[:stay]), (x[stay:], y[stay:])
