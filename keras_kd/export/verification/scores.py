"""What a task asks of its answers, beyond accuracy: ranks, classes one by one, sizes of errors.

What counts and ranks is NumPy's work: importing scikit-learn, and SciPy's statistics for it, takes
longer than measuring a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_kd.export.verification import entities
from keras_kd.export.verification.output_meaning import decide, judged, spread, squeeze

MOST_CLASSES = 256
"""Classes up to which each has figures of its own."""

MOST_NUMBERS = 20_000_000
"""Outputs times rows up to which ranks are sorted: segmentations have more."""

_MOST_NUMBERED = 1_000_000
"""Number of a class beyond which numbers are taken for names rather than classes."""

LIST = 10
"""Units beyond which a row of numbers is a list to be ranked, and the ranks that NDCG looks at."""

NAMES = {
    "accuracy": "max",
    "balanced_accuracy": "max",
    "macro_f1": "max",
    "entity_precision": "max",
    "entity_recall": "max",
    "entity_f1": "max",
    "f1": "max",
    "auc": "max",
    "mae": "min",
    "rmse": "min",
    "r2": "max",
    "spearman": "max",
    "ndcg@10": "max",
}
"""The figures, and whether more of one or less is better."""


def scores(
    outputs: np.ndarray,
    labels: np.ndarray | None,
    kind: str,
    probabilities: bool,
    weights: np.ndarray | None = None,
    *,
    ranks: bool = False,
    tags: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure answers against labels, by the definitions of scikit-learn.

    Args:
        outputs: `(samples, ..., units)`.
        labels: As for `output_meaning.kind_of`, or `None`.
        kind: One of `output_meaning.KINDS`.
        probabilities: Whether outputs are probabilities rather than logits.
        weights: Of the samples, or of each of their first axes; `None` for ones. Rank correlation
            has no weights: it is that of the rows that count.
        ranks: Whether NDCG is asked for, which is otherwise measured on more than 10 numbers or yes
            and no. Of classes it is that of the right one among the others.
        tags: Of classes that are tags of BIO their names, see `entities.tag_names`: entities are
            counted whole then.

    Returns:
        Empty without labels. Of decisions `accuracy`, `balanced_accuracy` (mean recall of the
        classes), `macro_f1`, `auc` (of several classes the mean of each against the rest, by
        softmax), of a single yes or no also `f1`; and `per_class`, lists of `support`, `precision`,
        `recall`, `f1`, `auc`, a number a class. Of numbers `mae`, `rmse`, `r2`, `spearman` (mean
        over the units), and `per_unit`, lists of `mae`, `rmse` and `spearman`. Of rows of more than
        10 numbers or yes and no `ndcg@10`. Of tags the figures of `entities.figures` as well. What
        cannot be measured is `None`.
    """
    if labels is None or kind == "unknown":
        return {}
    if kind == "values":
        found = _values(outputs, squeeze(labels, outputs), weights)
    else:
        truth, heavy = judged(outputs, labels, kind, weights)
        decisions = decide(outputs, kind, probabilities)
        if decisions is None or not (heavy > 0).any():
            return {}
        if kind == "decisions":
            return _numbered(truth, decisions, heavy)
        if kind == "classes":
            found = _classes(outputs, truth, decisions, heavy, probabilities)
            if tags is not None:
                found |= entities.figures(truth, decisions, heavy > 0, tags)
        elif kind == "binary":
            found = _binary(outputs, truth, decisions, heavy)
        else:
            found = _multilabel(outputs, truth, decisions, heavy)
    listed = outputs.ndim == 2 and outputs.shape[-1] > (1 if ranks else LIST)
    if listed and kind in ("values", "multilabel"):
        found["ndcg@10"] = _ndcg(outputs, squeeze(labels, outputs), weights)
    elif listed and ranks and kind == "classes" and outputs.size <= MOST_NUMBERS:
        right = np.arange(outputs.shape[-1]) == truth[:, None]
        found["ndcg@10"] = _ndcg(outputs, right.astype(np.float32), heavy)
    return found


def _classes(
    outputs: np.ndarray,
    truth: np.ndarray,
    decisions: np.ndarray,
    heavy: np.ndarray,
    probabilities: bool,
) -> dict[str, Any]:
    units = outputs.shape[-1]
    keep = heavy.reshape(-1) > 0
    y, w = truth.reshape(-1)[keep].astype(np.int64), heavy.reshape(-1)[keep]
    rows = outputs.reshape(-1, units)[keep]
    result = _decided(y, decisions.reshape(-1)[keep], w, range(units))
    aucs: list[float | None] = [None] * units
    if rows.size <= MOST_NUMBERS and units <= MOST_CLASSES:
        if units == 2:
            # One number tells both classes apart, and ties of small shares are none of logits.
            edge = rows[:, 1].astype(np.float64) - rows[:, 0]
            aucs = [_auc(y == 1, edge, w)] * 2
        else:
            wide = rows.astype(np.float64)
            shares = wide if probabilities else _softmax(wide)
            aucs = [_auc(y == k, shares[:, k], w) for k in range(units)]
    return _with_auc(result, aucs)


def _numbered(truth: np.ndarray, decisions: np.ndarray, heavy: np.ndarray) -> dict[str, Any]:
    """Figures of decisions that come without the scores behind them: there are no ranks."""
    keep = heavy.reshape(-1) > 0
    y, d = truth.reshape(-1)[keep].astype(np.int64), decisions.reshape(-1)[keep]
    w = heavy.reshape(-1)[keep]
    if y.min() < 0 or y.max() > _MOST_NUMBERED:
        # Hashes or signed numbers are no classes.
        return {"accuracy": float(np.average(y == d, weights=w))}
    # As many as the labels have, so that the same ones are listed for every file.
    result = _decided(y, d, w, range(max(int(y.max()) + 1, 2)))
    return _with_auc(result, [None] * len((result["per_class"] or {}).get("support", ())))


def _binary(
    outputs: np.ndarray, truth: np.ndarray, decisions: np.ndarray, heavy: np.ndarray
) -> dict[str, Any]:
    keep = heavy.reshape(-1) > 0
    y, w = truth.reshape(-1)[keep].astype(np.int64), heavy.reshape(-1)[keep]
    result = _decided(y, decisions.reshape(-1)[keep].astype(np.int64), w, range(2))
    result["f1"] = result["per_class"]["f1"][1]
    auc = _auc(y == 1, outputs.reshape(-1)[keep], w) if outputs.size <= MOST_NUMBERS else None
    return _with_auc(result, [auc, auc])


def _multilabel(
    outputs: np.ndarray, truth: np.ndarray, decisions: np.ndarray, heavy: np.ndarray
) -> dict[str, Any]:
    units = outputs.shape[-1]
    y, d, w, scored = (part.reshape(-1, units) for part in (truth, decisions, heavy, outputs))
    table: dict[str, list[Any]] = {key: [] for key in _COLUMNS}
    recalls = []
    for k in range(units if units <= MOST_CLASSES else 0):
        keep = w[:, k] > 0
        one, said, weight = y[keep, k].astype(np.int64), d[keep, k].astype(np.int64), w[keep, k]
        auc = _auc(one == 1, scored[keep, k], weight) if outputs.size <= MOST_NUMBERS else None
        if not keep.any():
            row: list[Any] = [0, 0.0, 0.0, 0.0, auc]
        else:
            both = _by_class(one, said, weight, 2)
            recalls.append(np.mean([r for r, s in zip(both[1], both[3]) if s > 0]))
            precision, recall, f1, support = (part[1] for part in both)
            row = [_number(support), float(precision), float(recall), float(f1), auc]
        for key, value in zip(_COLUMNS, row, strict=True):
            table[key].append(value)
    supported = [f for f, s in zip(table["f1"], table["support"]) if s > 0]
    result: dict[str, Any] = {
        "accuracy": float(np.sum((y == d) * w) / np.sum(w)),
        "balanced_accuracy": float(np.mean(recalls)) if recalls else None,
        "macro_f1": float(np.mean(supported)) if supported else None,
        "per_class": table if units <= MOST_CLASSES else None,
    }
    known = [auc for auc in table["auc"] if auc is not None]
    return {**result, "auc": float(np.mean(known)) if known else None}


_COLUMNS = ("support", "precision", "recall", "f1", "auc")


def _by_class(
    truth: np.ndarray, decisions: np.ndarray, weights: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall, F1 and support of each class; 0 where nothing is divided."""
    same = truth == decisions
    hits, support, said = (
        np.bincount(where, heavy, classes)
        for where, heavy in (
            (truth[same], weights[same]),
            (truth, weights),
            (decisions, weights),
        )
    )

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros(classes), where=whole > 0)

    return share(hits, said), share(hits, support), share(2 * hits, support + said), support


def _decided(
    truth: np.ndarray, decisions: np.ndarray, weights: np.ndarray, classes: range
) -> dict[str, Any]:
    precision, recall, f1, support = _by_class(truth, decisions, weights, len(classes))
    met = np.bincount(truth, minlength=len(classes)) + np.bincount(
        decisions, minlength=len(classes)
    )
    return {
        "accuracy": float(np.average(truth == decisions, weights=weights)),
        "balanced_accuracy": float(np.mean(recall[support > 0])),
        # As in scikit-learn, of the classes that are there or were answered.
        "macro_f1": float(np.mean(f1[met > 0])),
        "per_class": {
            "support": [_number(value) for value in support],
            "precision": precision.tolist(),
            "recall": recall.tolist(),
            "f1": f1.tolist(),
        }
        if len(classes) <= MOST_CLASSES
        else None,
    }


def _with_auc(result: dict[str, Any], aucs: list[float | None]) -> dict[str, Any]:
    known = [auc for auc in aucs if auc is not None]
    result["auc"] = float(np.mean(known)) if known else None
    if result["per_class"] is not None:
        result["per_class"]["auc"] = aucs
    return result


def _auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> float | None:
    """Return the share of pairs of a yes and a no that are in order, by weight; ties are half."""
    # Without both there is nothing to tell apart.
    if not positive.any() or positive.all():
        return None
    place = places(score)
    heavy = np.asarray(weights, np.float64)
    yes, no = (np.bincount(place, np.where(which, heavy, 0)) for which in (positive, ~positive))
    below = np.cumsum(no) - no / 2
    return float(yes @ below / (yes.sum() * no.sum()))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def _values(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
    units = outputs.shape[-1] if outputs.ndim > 1 else 1
    got, want, heavy = (
        part.reshape(-1, units).astype(np.float64)
        for part in (outputs, labels, spread(weights, outputs.shape))
    )
    total = heavy.sum()
    if total <= 0:
        return {}
    error = np.where(heavy > 0, got - want, 0)
    by_unit = np.maximum(heavy.sum(axis=0), np.finfo(float).tiny)
    square, size = (heavy * error**2).sum(axis=0), (heavy * np.abs(error)).sum(axis=0)
    mean = (heavy * np.where(heavy > 0, want, 0)).sum(axis=0) / by_unit
    spreads = (heavy * np.where(heavy > 0, want - mean, 0) ** 2).sum(axis=0)
    few = units <= MOST_CLASSES and got.size <= MOST_NUMBERS
    ranks = [_spearman(got[:, k], want[:, k], heavy[:, k] > 0) for k in range(units if few else 0)]
    known = [rank for rank in ranks if rank is not None]
    result: dict[str, Any] = {
        "mae": float(size.sum() / total),
        "rmse": float(np.sqrt(square.sum() / total)),
        # The mean over the units, as in scikit-learn; of a unit without spread nothing is known.
        "r2": float(np.mean(1 - square / spreads)) if (spreads > 0).all() else None,
        "spearman": float(np.mean(known)) if known else None,
    }
    if units > 1 and few:
        result["per_unit"] = {
            "mae": (size / by_unit).tolist(),
            "rmse": np.sqrt(square / by_unit).tolist(),
            "spearman": ranks,
        }
    return result


def _spearman(got: np.ndarray, want: np.ndarray, counted: np.ndarray) -> float | None:
    a, b = got[counted], want[counted]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from the lowest; what is equal shares the mean of its ranks."""
    place = places(values)
    counts = np.bincount(place)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def places(values: np.ndarray) -> np.ndarray:
    """The place of each value among the different ones, for which `np.unique` imports a package."""
    order = np.argsort(values, kind="stable")
    rising = values[order]
    found = np.empty(len(values), np.int64)
    found[order] = np.concatenate([[0], np.cumsum(rising[1:] != rising[:-1])])
    return found


def _ndcg(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> float | None:
    from sklearn.metrics import ndcg_score

    heavy = spread(weights, outputs.shape)
    rows = (heavy > 0).all(axis=-1)
    # Gains are never negative, and each item of a list counts as much as the next.
    if not rows.any() or labels[rows].min() < 0 or np.ptp(heavy[rows], axis=-1).any():
        return None
    return float(ndcg_score(labels[rows], outputs[rows], k=LIST, sample_weight=heavy[rows][:, 0]))


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
