"""How wrong a model is on each row: what methods and students are compared by.

Classes and independent units are wrong or right, numbers are off by a squared difference. Rows of
more than ten classes, of which several have a share and others none, are lists to be ranked: 1
minus the NDCG of the first ten. The error of a model is the mean of its rows, weighted by the
sample weights: a share for classes, the mean squared error for numbers.

Wrong and right are coarse: of a few hundred rows two models of which one is better differ on a
handful. So the log loss of each row is kept beside its error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_kd.models import meaning
from keras_kd.utils.types import Losses

LIST = 10
"""Ranks that the NDCG of a list looks at, and classes up to which there is none."""


_LEAST = 1e-7
"""Least probability in a log loss, as in Keras's own losses."""


class RowErrors(NamedTuple):
    """One error and one weight a row, `(rows,)` each; what has no label has weight 0.

    `losses` are the log losses of the rows, of numbers their errors once more; `None` where they
    were not measured.
    """

    errors: np.ndarray
    weights: np.ndarray
    losses: np.ndarray | None = None

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
    counted = np.mean([one.weights for one in each], axis=0)
    if not counted.sum() > 0:
        raise ValueError("No row counts: none has a label and a weight above 0.")
    return RowErrors(
        np.mean([one.errors for one in each], axis=0),
        counted,
        np.mean([one.losses for one in each if one.losses is not None], axis=0),
    )


def _one(
    told: str | None, output: np.ndarray, label: np.ndarray, hard: Losses, weight: np.ndarray | None
) -> RowErrors:
    """The error, the weight and the log loss of each row of one output."""
    if not np.isfinite(output).all():
        raise ValueError("The model answers with NaN or infinite values.")
    counts = None
    if told == meaning.CLASSES:
        decided = output.argmax(-1)
        logs = _logs(output)
        if label.ndim == output.ndim and label.shape[-1] == output.shape[-1]:
            wrong, counts = _of_shares(output, decided, label)
            losses = -(label * logs).sum(-1)
        else:
            label = label.reshape(decided.shape)
            wrong = (decided != label).astype("float64")
            ignored = meaning.option(hard, "ignore_class")
            counts = label >= 0 if ignored is None else (label >= 0) & (label != ignored)
            known = np.where(counts, label, 0).astype("int64")
            losses = -np.take_along_axis(logs, known[..., None], -1)[..., 0]
    elif told == meaning.INDEPENDENT:
        logits = bool(meaning.option(hard, "from_logits", False))
        label = label.reshape(output.shape)
        wrong = ((output > (0.0 if logits else 0.5)) != (label > 0.5)).astype("float64")
        yes, no = (_sigmoid_logs(sign * output, logits, sign) for sign in (1, -1))
        losses = -(label * yes + (1 - label) * no)
    else:
        wrong = np.square(output.astype("float64") - label.reshape(output.shape))
        losses = wrong
    rows = len(wrong)
    wrong, losses = wrong.reshape(rows, -1), losses.reshape(rows, -1)
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
    some = np.where(total > 0, total, 1.0)
    return RowErrors(
        (wrong * counts).sum(1) / some,
        np.where(total > 0, row_weights, 0.0),
        (losses * counts).sum(1) / some,
    )


def _logs(output: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities of the classes, of logits or of probabilities."""
    output = output.astype("float64")
    if output.min() >= 0 and np.allclose(output.sum(-1), 1, atol=1e-3):
        return np.log(np.maximum(output, _LEAST))
    output = output - output.max(-1, keepdims=True)
    return np.asarray(output - np.log(np.exp(output).sum(-1, keepdims=True)))


def _sigmoid_logs(output: np.ndarray, logits: bool, sign: int) -> np.ndarray:
    """Logarithms of the probabilities of yes (1), or of no (-1), where outputs come negated."""
    output = output.astype("float64")
    if logits:
        return -np.logaddexp(0.0, -output)
    return np.log(np.maximum(output if sign > 0 else 1.0 + output, _LEAST))


def _of_shares(
    output: np.ndarray, decided: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The errors where each class has a share of the label, and which positions count."""
    if label.shape[-1] > LIST and ((label > 0).sum(-1) > 1).any() and (label == 0).any():
        best = _discounted(np.sort(label, -1)[..., ::-1])
        # Of equal scores the earlier item comes first, as where they are shown.
        order = np.argsort(-output, -1, kind="stable")
        found = _discounted(np.take_along_axis(label, order, -1))
        return 1.0 - found / np.where(best > 0, best, 1.0), best > 0
    given = np.take_along_axis(label, decided[..., None], -1)[..., 0]
    # Several classes may have the greatest share.
    return (given < label.max(-1)).astype("float64"), label.max(-1) > 0


def _discounted(gains: np.ndarray) -> np.ndarray:
    """The sum of the first gains, each divided by the logarithm of its rank."""
    first = gains[..., :LIST].astype("float64")
    return np.asarray((first / np.log2(np.arange(first.shape[-1]) + 2.0)).sum(-1))
