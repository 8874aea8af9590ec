"""The accuracies of a model on the test parts of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_kd.lifelong.heads import GrowingHead
from keras_kd.lifelong.streams import Task
from keras_kd.utils.types import Array


def accuracies(
    tasks: Sequence[Task], head: GrowingHead, scores_of: Callable[[Array], Array]
) -> dict[str, Any]:
    """Accuracies on all test parts, among all classes and among those of the task.

    Args:
        tasks: The tasks, those still to come among them.
        head: Which column is which class.
        scores_of: `fn(x)`: scores of rows, a column for each class.

    Returns:
        Two lists: `free`, and `told`, with NaN where nothing can be measured.
    """
    known = [np.intersect1d(task.classes, head.classes) for task in tasks]
    rows = [task.x_test for task in tasks]
    tested = [x is not None and len(x) > 0 for x in rows]
    asked = [x for x, of in zip(rows, known) if x is not None and len(x) and len(of)]
    # In one go, since each model is compiled when it is first asked.
    scores = iter(
        np.split(
            scores_of(np.concatenate(asked)),
            np.cumsum([len(x) for x in asked])[:-1],
        )
        if asked
        else []
    )
    free: list[float] = []
    told: list[float] = []
    for task, of, has in zip(tasks, known, tested):
        if not has or not len(of):
            # A class that is not known is never answered.
            free.append(0.0 if has else float("nan"))
            told.append(float("nan"))
            continue
        found = next(scores)
        free.append(float((head.classes[found.argmax(-1)] == task.y_test).mean()))
        among = of[found[:, head.columns_of(of)].argmax(-1)]
        told.append(float((among == task.y_test).mean()))
    return {"free": free, "told": told}
