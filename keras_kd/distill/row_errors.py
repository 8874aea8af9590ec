"""How wrong a model is on each row: what methods and students are compared by.

Classes and independent units are wrong or right, numbers are off by a squared difference. The error
of a model is the mean of its rows, weighted by the sample weights: a share for classes, the mean
squared error for numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_kd.models import meaning
from keras_kd.utils.types import Losses


class RowErrors(NamedTuple):
    """One error and one weight a row, `(rows,)` each; what has no label has weight 0."""

    errors: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        """The error of the model."""
        return float(np.average(self.errors, weights=self.weights))


def row_errors(
    told: Sequence[str | None],
    outputs: Sequence[Any],
    labels: Sequence[Any],
    hard: Sequence[Any],
    weight: np.ndarray | None = None,
) -> RowErrors:
    """Compare answers with labels, row by row.

    Args:
        told: What each flat output means, see `keras_kd.models.meaning`; `None` where nothing
            tells, which counts as numbers.
        outputs: `(rows, ...)` answers of each, logits or probabilities.
        labels: Of each: class numbers or rows of them, 0 and 1, or numbers; `None` where it has
            none.
        hard: The hard loss of each, which says whether independent units are logits and which class
            counts nowhere.
        weight: `(rows,)` weights, or `(rows, positions)`, one for all outputs or a list with one
            each; `None` weighs all alike.

    Returns:
        The mean over the outputs that have labels.

    Raises:
        ValueError: If no row counts, or an answer is not finite.
    """
    weights = list(weight) if isinstance(weight, list | tuple) else [weight] * len(outputs)
    each = [
        _one(kind, np.asarray(output), np.asarray(label), loss, own)
        for kind, output, label, loss, own in zip(told, outputs, labels, hard, weights, strict=True)
        if label is not None
    ]
    if not each:
        raise ValueError("There are no labels to compare answers with. Pass `(x, y)`.")
    counted = np.mean([count for _, count in each], axis=0)
    if not counted.sum() > 0:
        raise ValueError("No row counts: none has a label and a weight above 0.")
    return RowErrors(np.mean([errors for errors, _ in each], axis=0), counted)


def _one(
    told: str | None, output: np.ndarray, label: np.ndarray, hard: Losses, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The error of each row of one output, and the weight of the row."""
    if not np.isfinite(output).all():
        raise ValueError("The model answers with NaN or infinite values.")
    counts = None
    if told == meaning.CLASSES:
        decided = output.argmax(-1)
        if label.ndim == output.ndim and label.shape[-1] == output.shape[-1]:
            label = label.argmax(-1)
        label = label.reshape(decided.shape)
        wrong = (decided != label).astype("float64")
        ignored = meaning.option(hard, "ignore_class")
        counts = label >= 0 if ignored is None else (label >= 0) & (label != ignored)
    elif told == meaning.INDEPENDENT:
        threshold = 0.0 if meaning.option(hard, "from_logits", False) else 0.5
        wrong = ((output > threshold) != (label.reshape(output.shape) > 0.5)).astype("float64")
    else:
        wrong = np.square(output.astype("float64") - label.reshape(output.shape))
    rows = len(wrong)
    wrong = wrong.reshape(rows, -1)
    counts = np.ones_like(wrong) if counts is None else counts.reshape(rows, -1).astype("float64")
    row_weights = np.ones(rows)
    if weight is not None:
        weight = np.asarray(weight, "float64").reshape(rows, -1)
        if weight.shape[1] == 1:
            row_weights = weight[:, 0]
        else:
            # One for each token.
            counts = counts * weight
    total = counts.sum(1)
    errors = (wrong * counts).sum(1) / np.where(total > 0, total, 1.0)
    return errors, np.where(total > 0, row_weights, 0.0)
