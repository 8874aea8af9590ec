"""How wrong a model is on each row: what methods and students are compared by.

Classes and independent units are wrong or right, numbers are off by a squared difference. Rows of
more than ten classes, of which several have a share and others none, are lists to be ranked: 1
minus the NDCG of the first ten. The error of a model is the mean of its rows, weighted by the
sample weights: a share for classes, the mean squared error for numbers.

Wrong and right are coarse: of a few hundred rows two models of which one is better differ on a
handful. So the log loss of each row is kept beside its error, and so is what is left of it at the
temperature at which it is least: models that learned from soft or scaled answers may be over- or
underconfident, which changes no decision and no ranking, and one number mends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_kd.models import meaning
from keras_kd.utils import paired
from keras_kd.utils.types import Losses

LIST = 10
"""Ranks that the NDCG of a list looks at, and classes up to which there is none."""

_LEAST = 1e-7
"""Least probability in a log loss, as in Keras's own losses."""

_HOTTEST = 100.0
"""Logits are divided and multiplied by no more than this."""

_FITTED = 10_000_000
"""Answers by which the best temperature is found, about."""

_ALL = slice(None)


class RowErrors(NamedTuple):
    """One error and one weight a row, `(rows,)` each; what has no label has weight 0.

    `losses` are the log losses of the rows, of numbers their errors once more; `None` where they
    were not measured. `refined` are those at the temperature at which their mean is least; `None`
    where it was not asked for.
    """

    errors: np.ndarray
    weights: np.ndarray
    losses: np.ndarray | None = None
    refined: np.ndarray | None = None

    @property
    def proper(self) -> np.ndarray | None:
        """The log losses that models are compared by: refined where that is known."""
        return self.losses if self.refined is None else self.refined

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
    refine: bool = False,
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
        refine: Whether the log loss at the best temperature is wanted too.

    Returns:
        The mean over the outputs that have labels.

    Raises:
        ValueError: If no row counts, or an answer is not finite.
        ImportError: If SciPy is missing, with `refine`.

    Reference:
        - [Guo et al., 2017](https://arxiv.org/abs/1706.04599), temperature scaling
        - [Berta et al., 2025](https://arxiv.org/abs/2501.19195), the log loss behind it as what
          models are chosen by
    """
    weights = list(weight) if isinstance(weight, list | tuple) else [weight] * len(outputs)
    each = [
        _one(kind, np.asarray(output), np.asarray(label), loss, own, refine)
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
        np.mean([one.refined for one in each if one.refined is not None], axis=0)
        if refine
        else None,
    )


def row_weights(
    told: Sequence[str | None],
    shapes: Sequence[tuple[int | None, ...]],
    labels: Sequence[Any],
    hard: Sequence[Any],
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """What each row counts in `row_errors`, `(rows,)`: 0 where it has no label, or no weight.

    Args:
        told: As in `row_errors`.
        shapes: Of each output, as `model.output_shape` has it.
        labels: As in `row_errors`.
        hard: As in `row_errors`.
        weight: As in `row_errors`.
    """
    weights = list(weight) if isinstance(weight, list | tuple) else [weight] * len(shapes)
    each = [
        _weights(_counts(kind, shape, np.asarray(label), loss), len(label), own)[1]
        for kind, shape, label, loss, own in zip(told, shapes, labels, hard, weights, strict=True)
        if label is not None
    ]
    return np.asarray(np.mean(each, axis=0)) if each else np.zeros(0)


def _one(
    told: str | None,
    output: np.ndarray,
    label: np.ndarray,
    hard: Losses,
    weight: np.ndarray | None,
    refine: bool,
) -> RowErrors:
    """The error, the weight and the log losses of each row of one output."""
    if not np.isfinite(output).all():
        raise ValueError("The model answers with NaN or infinite values.")
    counts = _counts(told, output.shape, label, hard)
    if told == meaning.CLASSES:
        decided = output.argmax(-1)
        logs = _logs(output)
        shares = _are_shares(output.shape, label)
        known = label if shares else np.where(counts, label.reshape(decided.shape), 0)
        if shares:
            wrong = _of_shares(output, decided, label)
        else:
            wrong = (decided != label.reshape(decided.shape)).astype("float64")

        def losses_at(sharpness: float, part: slice) -> np.ndarray:
            scaled = logs[part] if sharpness == 1.0 else _log_softmax(sharpness * logs[part])
            if shares:
                return np.asarray(-(known[part] * scaled).sum(-1))
            places = known[part].astype("int64")[..., None]
            return -np.take_along_axis(scaled, places, -1)[..., 0]

    elif told == meaning.INDEPENDENT:
        logits = bool(meaning.option(hard, "from_logits", False))
        label = label.reshape(output.shape)
        wrong = ((output > (0.0 if logits else 0.5)) != (label > 0.5)).astype("float64")
        yes, no = (_sigmoid_logs(sign * output, logits, sign) for sign in (1, -1))

        def losses_at(sharpness: float, part: slice) -> np.ndarray:
            own = label[part]
            if sharpness == 1.0:
                return np.asarray(-(own * yes[part] + (1 - own) * no[part]))
            # The difference of the two logarithms is the logit.
            scaled = sharpness * (yes[part] - no[part])
            return np.logaddexp(0.0, -scaled) * own + np.logaddexp(0.0, scaled) * (1 - own)

    else:
        wrong = np.square(output.astype("float64") - label.reshape(output.shape))

        def losses_at(sharpness: float, part: slice) -> np.ndarray:
            return wrong[part]

    wrong = wrong.reshape(len(wrong), -1)
    counted, rows = _weights(counts, len(wrong), weight, wrong.shape[1])
    total = counted.sum(1)
    some = np.where(total > 0, total, 1.0)

    def of_rows(values: np.ndarray, part: slice = _ALL) -> np.ndarray:
        values = values.reshape(len(values), -1)
        return np.asarray((values * counted[part]).sum(1) / some[part])

    losses = of_rows(losses_at(1.0, _ALL))
    refined = losses if refine else None
    # One number is known well enough by a part of very many.
    part = slice(None, None, 1 + output.size // _FITTED)
    if refine and told in (meaning.CLASSES, meaning.INDEPENDENT) and rows[part].sum() > 0:

        def mean_at(power: float) -> float:
            found = of_rows(losses_at(float(np.exp(power)), part), part)
            return float(np.average(found, weights=rows[part]))

        best = paired.least(mean_at, float(np.log(_HOTTEST)))
        refined = of_rows(losses_at(float(np.exp(best)), _ALL))
    return RowErrors(of_rows(wrong), rows, losses, refined)


def _are_shares(shape: Sequence[int | None], label: np.ndarray) -> bool:
    """Whether labels have a share for each class, and are no numbers of classes."""
    return label.ndim == len(shape) and label.shape[-1] == shape[-1]


def _counts(
    told: str | None, shape: Sequence[int | None], label: np.ndarray, hard: Losses
) -> np.ndarray | None:
    """Which positions have a label; `None` where all of them have."""
    if told != meaning.CLASSES:
        return None
    if _are_shares(shape, label):
        return np.asarray(label.max(-1) > 0)
    label = label.reshape(label.shape[: len(shape) - 1])
    ignored = meaning.option(hard, "ignore_class")
    return label >= 0 if ignored is None else (label >= 0) & (label != ignored)


def _weights(
    counts: np.ndarray | None, rows: int, weight: np.ndarray | None, positions: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """What each position of a row counts, `(rows, positions)`, and what each row does."""
    counted = np.ones((rows, positions))
    if counts is not None:
        counted = counts.reshape(rows, -1).astype("float64")
    of_rows = np.ones(rows)
    if weight is not None:
        weight = np.asarray(weight, "float64").reshape(rows, -1)
        if weight.shape[1] == 1:
            of_rows = weight[:, 0]
        else:
            # One for each token.
            counted = counted * weight
    return counted, np.where(counted.sum(1) > 0, of_rows, 0.0)


def _logs(output: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities of the classes, of logits or of probabilities."""
    output = output.astype("float64")
    if output.min() >= 0 and np.allclose(output.sum(-1), 1, atol=1e-3):
        return np.log(np.maximum(output, _LEAST))
    return _log_softmax(output)


def _log_softmax(output: np.ndarray) -> np.ndarray:
    output = output - output.max(-1, keepdims=True)
    return np.asarray(output - np.log(np.exp(output).sum(-1, keepdims=True)))


def _sigmoid_logs(output: np.ndarray, logits: bool, sign: int) -> np.ndarray:
    """Logarithms of the probabilities of yes (1), or of no (-1), where outputs come negated."""
    output = output.astype("float64")
    if logits:
        return -np.logaddexp(0.0, -output)
    return np.log(np.maximum(output if sign > 0 else 1.0 + output, _LEAST))


def _of_shares(output: np.ndarray, decided: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The errors where each class has a share of the label."""
    if label.shape[-1] > LIST and ((label > 0).sum(-1) > 1).any() and (label == 0).any():
        best = _discounted(np.sort(label, -1)[..., ::-1])
        # Of equal scores the earlier item comes first, as where they are shown.
        order = np.argsort(-output, -1, kind="stable")
        found = _discounted(np.take_along_axis(label, order, -1))
        return np.asarray(1.0 - found / np.where(best > 0, best, 1.0))
    given = np.take_along_axis(label, decided[..., None], -1)[..., 0]
    # Several classes may have the greatest share.
    return np.asarray((given < label.max(-1)).astype("float64"))


def _discounted(gains: np.ndarray) -> np.ndarray:
    """The sum of the first gains, each divided by the logarithm of its rank."""
    first = gains[..., :LIST].astype("float64")
    return np.asarray((first / np.log2(np.arange(first.shape[-1]) + 2.0)).sum(-1))
