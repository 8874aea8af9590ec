"""How far an exported file's answers are from the Keras model's, and from the labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

KINDS = ("classes", "binary", "multilabel", "decisions", "values", "unknown")
"""What an output means: one class of many, one yes or no, several of them, decisions that the model
itself makes (the number of the greatest score, yes or no), plain numbers, or a row of numbers of
which nothing says whether they are classes."""


def kind_of(reference: np.ndarray, labels: np.ndarray | None, hint: str | None = None) -> str:
    """Say what an output means, from its labels, or else from what is known of the model.

    Args:
        reference: Outputs of the Keras model, `(samples, ..., units)`.
        labels: `None`, class indices `(samples, ...)` with -1 where there is no label, or an array
            shaped like the outputs.
        hint: One of `KINDS`, which holds without labels, and with labels that tell too little: 0
            and 1 at the only unit of a regression, -1 at one that says yes or no.

    Returns:
        One of `KINDS`.

    Raises:
        ValueError: If class indices lie outside the number of units, the shapes do not fit, or no
            row has a label.
    """
    if hint == "decisions":
        return _decisions(reference, labels)
    units = reference.shape[-1] if reference.ndim > 1 else 1
    if labels is None:
        if hint is not None:
            return hint
        if units > 1 and is_distribution(reference):
            return "classes"
        return "unknown" if reference.ndim == 2 and units > 1 else "values"
    labels = squeeze(labels, reference)
    whole = labels.dtype.kind in "biu" or bool(np.all(labels == np.round(labels)))
    if units > 1 and labels.shape == reference.shape[:-1] and whole:
        low, high = int(labels.min()), int(labels.max())
        if low < UNLABELED or high >= units:
            raise ValueError(
                f"The evaluation labels run from {low} to {high}, but the model has {units} "
                f"outputs, so labels lie in 0..{units - 1}, and -1 marks a row without a label. "
                "Check the labels or the last layer; another number that stands for no label is "
                "known by `ignore_class` of the loss that the model was compiled with, or by a "
                "sample weight of 0."
            )
        if high == UNLABELED:
            raise ValueError(
                "All evaluation labels are -1, which stands for no label. Leave the labels out: "
                "`evaluation=x`."
            )
        return "classes"
    if units > 1 and labels.shape == reference.shape[:-1]:
        odd = labels[labels != np.round(labels)][0]
        raise ValueError(
            f"The evaluation labels hold {odd:g}, but class numbers are whole. Pass integers from "
            f"0 to {units - 1}, or one value for each of the {units} outputs."
        )
    if labels.shape != reference.shape:
        raise ValueError(
            f"The evaluation labels have shape {labels.shape} and the model's outputs "
            f"{reference.shape}. Pass class indices of shape {reference.shape[:-1]}, or one value "
            "for each output."
        )
    known = set(np.unique(labels)) if whole else set()
    marked = hint in ("binary", "multilabel") and known == {UNLABELED, 0, 1}
    if whole and (known <= {0, 1} or marked):
        one_hot = units > 1 and bool(np.all(labels.sum(axis=-1) == 1)) and not marked
        if hint == "values" and not one_hot:
            return "values"
        if units == 1:
            return "binary"
        return "classes" if one_hot else "multilabel"
    # Soft labels are distributions over the classes.
    distributions = (
        units > 1 and labels.min() >= 0 and np.allclose(labels.sum(axis=-1), 1, atol=1e-3)
    )
    return "classes" if distributions and hint != "values" else "values"


def _decisions(reference: np.ndarray, labels: np.ndarray | None) -> str:
    if labels is None:
        return "decisions"
    labels = squeeze(labels, reference)
    if labels.shape != reference.shape:
        one_hot = labels.shape[:-1] == reference.shape
        raise ValueError(
            f"The evaluation labels have shape {labels.shape}, and the model's output holds one "
            f"decision in each place of {reference.shape}. Pass one number for each of them"
            + (": of one-hot labels `labels.argmax(axis=-1)`." if one_hot else ".")
        )
    if not np.all(labels == np.round(labels)):
        odd = labels[labels != np.round(labels)][0]
        raise ValueError(
            f"The evaluation labels hold {odd:g}, but decisions are whole numbers, as the model's "
            "output is. Pass integers."
        )
    if labels.size and np.all(labels == UNLABELED):
        raise ValueError(
            "All evaluation labels are -1, which stands for no label. Leave the labels out: "
            "`evaluation=x`."
        )
    if reference.dtype.kind != "b" and reference.min() < 0 and np.any(labels == UNLABELED):
        raise ValueError(
            f"The model's output holds whole numbers from {reference.min()}, so a label of -1 may "
            "be one of them or no label at all. Leave the labels out, or let the model answer "
            "numbers from 0."
        )
    return "decisions"


UNLABELED = -1
"""The class index of a row without a label: it has part in what compares the file with the Keras
model, and in nothing that compares with labels."""


def squeeze(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Bring labels to the rank of the class indices or of the outputs, as Keras's metrics do."""
    if labels.ndim == reference.ndim and labels.shape[-1] == 1 and reference.shape[-1] > 1:
        return labels[..., 0]
    if labels.ndim == reference.ndim + 1 and labels.shape[-1] == 1:
        return labels[..., 0]
    if labels.ndim == reference.ndim - 1 and reference.shape[-1] == 1:
        return labels[..., None]
    return labels


def decide(outputs: np.ndarray, kind: str, probabilities: bool) -> np.ndarray | None:
    """Turn outputs into decisions: class indices, or yes and no; `None` for plain numbers."""
    if kind in ("classes", "unknown"):
        return outputs.argmax(axis=-1)
    if kind in ("binary", "multilabel"):
        return outputs > (0.5 if probabilities else 0.0)
    if kind == "decisions":
        return outputs.astype(np.int64)
    return None


def is_probability(reference: np.ndarray) -> bool:
    """Say whether outputs lie in [0, 1], which logits of more than a few samples do not."""
    return bool(reference.min() >= 0 and reference.max() <= 1)


def is_distribution(reference: np.ndarray) -> bool:
    """Say whether every row of the outputs is a distribution, as after a softmax."""
    sums = reference.astype(np.float64).sum(axis=-1)
    return is_probability(reference) and bool(np.allclose(sums, 1, atol=5e-3))


def spread(weights: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return a weight for each entry of an array: ones, or the weights of its first axes."""
    if weights is None:
        return np.ones(shape)
    return np.broadcast_to(
        weights.astype(np.float64).reshape(weights.shape + (1,) * (len(shape) - weights.ndim)),
        shape,
    )


def judged(
    outputs: np.ndarray, labels: np.ndarray, kind: str, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels in the form of the decisions, and the weight of each.

    Args:
        outputs: `(samples, ..., units)`.
        labels: As given to `kind_of`.
        kind: `"classes"`, `"binary"`, `"multilabel"` or `"decisions"`.
        weights: Of the samples, or of each of their first axes; `None` for ones.

    Returns:
        Two arrays of the shape of the decisions; a row without a label weighs nothing.
    """
    labels = squeeze(labels, outputs)
    if kind == "classes" and labels.shape == outputs.shape:
        labels = labels.argmax(axis=-1)
    return labels, spread(weights, labels.shape) * (labels != UNLABELED)


def accuracy(
    outputs: np.ndarray,
    labels: np.ndarray | None,
    kind: str,
    probabilities: bool,
    weights: np.ndarray | None = None,
) -> float | None:
    """Return the share of right decisions by weight, 0..1; `None` without labels or decisions."""
    decisions = decide(outputs, kind, probabilities)
    if labels is None or decisions is None:
        return None
    if kind == "unknown":
        kind = "classes"
    truth, heavy = judged(outputs, labels, kind, weights)
    return _share(decisions == truth.astype(np.int64), heavy)


def agreement(
    reference: np.ndarray,
    outputs: np.ndarray,
    kind: str,
    probabilities: bool,
    weights: np.ndarray | None = None,
) -> float | None:
    """Return the share of decisions equal to the reference's by weight, in 0..1.

    `None` for plain numbers. Rows without a label count like any other.
    """
    mine = decide(outputs, kind, probabilities)
    theirs = decide(reference, kind, probabilities)
    if mine is None or theirs is None:
        return None
    return _share(mine == theirs, spread(weights, mine.shape))


def _share(right: np.ndarray, weights: np.ndarray) -> float | None:
    total = float(weights.sum())
    return float((right * weights).sum() / total) if total > 0 else None


def sqnr(reference: np.ndarray, outputs: np.ndarray) -> float:
    """Return the signal-to-quantization-noise ratio, `10 log10(sum r**2 / sum (r - o)**2)`, in dB.

    Args:
        reference: Outputs of the Keras model, any shape.
        outputs: Outputs of the file, same shape.

    Returns:
        Decibels; infinite where both are equal.
    """
    reference = reference.astype(np.float64)
    noise = float(np.sum((reference - outputs) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def lowest_sqnr(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the lowest `sqnr` of several outputs, by which two files are compared.

    Args:
        pairs: References and outputs. The numbers of classes are no quantities, so whole numbers
            count only where there is nothing else.

    Returns:
        Decibels.
    """
    levels = [(sqnr(a, b), a.dtype.kind == "f") for a, b in pairs]
    floats = [level for level, real in levels if real]
    return min(floats or [level for level, _ in levels])


def variation(
    reference: np.ndarray, outputs: np.ndarray, counted: np.ndarray | None = None
) -> float | None:
    """Return the ratio of the outputs' variation over the samples to the noise, in dB.

    As `sqnr`, but the signal is what changes from sample to sample,
    `10 log10(sum (r - mean r)**2 / sum (r - o)**2)`: a large constant part, which any file keeps,
    hides nothing.

    Args:
        reference: Outputs of the Keras model, `(samples, ...)`.
        outputs: Outputs of the file, same shape.
        counted: Which entries count, same shape; all by default.

    Returns:
        Decibels; infinite where both are equal, `None` where the outputs do not vary.
    """
    reference = reference.astype(np.float64)
    spread, counts = _deviations(reference, counted)
    signal = float(np.sum(spread**2))
    # Rounding of equal answers is no variation.
    if signal <= 1e-12 * float(np.sum(np.where(counts, reference, 0) ** 2)):
        return None
    noise = float(np.sum(np.where(counts, reference - outputs, 0) ** 2))
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def _deviations(array: np.ndarray, counted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    # From the mean over the samples, 0 where an entry does not count.
    counts = np.ones(array.shape, bool) if counted is None else counted
    mean = np.sum(np.where(counts, array, 0), axis=0) / np.maximum(counts.sum(axis=0), 1)
    return np.where(counts, array - mean, 0), counts


STILL = 0.1
"""Share of the Keras model's standard deviation below which answers are called constant."""

_SHOWN = 20
"""Columns that a file's entry names; their number is told besides."""


def still_columns(
    reference: np.ndarray, outputs: np.ndarray, counted: np.ndarray | None = None
) -> dict[str, Any]:
    """Find answers that hardly change from sample to sample, where the Keras model's do.

    Args:
        reference: Outputs of the Keras model, `(samples, ..., units)`.
        outputs: Outputs of the file, same shape.
        counted: Which entries count, same shape; all by default.

    Returns:
        `constant`: whether the standard deviation over the samples of the whole output is under a
        tenth of the Keras model's; `still`: the first units of which the same is true alone, of
        units that vary by more than a millionth of the greatest output; and `still_count`, how
        many there are.
    """
    both = [
        _deviations(array.astype(np.float64), counted)[0].reshape(
            -1, array.shape[-1] if array.ndim > 1 else 1
        )
        for array in (reference, outputs)
    ]
    theirs, mine = (np.sqrt(np.sum(part**2, axis=0)) for part in both)
    total, kept = (float(np.sqrt(np.sum(part**2))) for part in (theirs, mine))
    rows = max(len(both[0]), 1)
    peak = float(np.max(np.abs(reference), initial=0.0))
    real = theirs > 1e-6 * peak * math.sqrt(rows)
    still = np.flatnonzero(real & (mine < STILL * theirs))
    return {
        "constant": bool(real.any()) and kept < STILL * total,
        "still": [int(i) for i in still[:_SHOWN]],
        "still_count": len(still),
    }


def compare(
    references: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    kinds: dict[str, dict[str, Any]],
    weights: dict[str, np.ndarray] | None = None,
    *,
    scores: bool = False,
) -> dict[str, Any]:
    """Compare all outputs of a file with the Keras model's.

    Args:
        references: Keras's outputs by name.
        outputs: The file's outputs by name, dequantized.
        labels: Labels by output name; an output may have none.
        kinds: For each output `{"kind": one of KINDS, "probabilities": bool}`.
        weights: Weights by output name, of the samples or of each of their first axes. What weighs
            nothing counts in no figure; accuracy and agreement are weighted means, signal and noise
            are those of all entries that count.
        scores: Whether to add `scores` to each output, see `scores.scores`.

    Returns:
        `accuracy` (mean over the outputs that have one, else `None`), `agreement` (lowest over the
        outputs that make decisions, else `None`), `worst` (greatest absolute difference),
        `relative` (the same over the greatest magnitude of that output), `sqnr` (lowest over the
        outputs, dB), `finite`, and `outputs` with the figures of each output: these, its `kind`,
        `drop` (Keras's accuracy minus the file's), `variation` and `kappa`, see there, and those of
        `still_columns`. The numbers of classes are no quantities: of an output of `"decisions"`
        `worst` is 1 where any is another and 0 otherwise, `relative` is 0 and `sqnr` infinite, and
        `changed` says how many of how many (`decided`) are other ones.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, reference in references.items():
        weight = (weights or {}).get(name)
        if kinds[name]["kind"] == "decisions":
            rows[name] = _decided(reference, outputs[name], labels.get(name), weight, scores)
            continue
        got = outputs[name].astype(np.float32)
        counted = None if weight is None else spread(weight, reference.shape) > 0
        here: Any = slice(None) if counted is None else counted
        kind, probabilities = kinds[name]["kind"], kinds[name]["probabilities"]
        finite = bool(np.isfinite(got[here]).all())
        apart = np.abs(got - reference)[here] if finite else np.empty(0)
        worst = float(np.max(apart, initial=0.0)) if finite else math.inf
        peak = float(np.max(np.abs(reference[here]), initial=0.0))
        truth = labels.get(name)
        right = accuracy(got, truth, kind, probabilities, weight)
        before = accuracy(reference, truth, kind, probabilities, weight)
        rows[name] = {
            "kind": kind,
            "accuracy": right,
            "drop": None if right is None or before is None else before - right,
            "agreement": agreement(reference, got, kind, probabilities, weight),
            "kappa": kappa(reference, got, kind, probabilities, weight),
            "worst": worst,
            "relative": worst / peak if peak > 0 else worst,
            "sqnr": sqnr(reference[here], got[here]) if finite else -math.inf,
            "variation": variation(reference, got, counted) if finite else -math.inf,
            "finite": finite,
            **(still_columns(reference, got, counted) if finite else {}),
        }
        if scores and finite:
            from keras_kd.export.verification.scores import scores as measured

            rows[name]["scores"] = measured(got, truth, kind, probabilities, weight)
    return {
        "accuracy": _mean([row["accuracy"] for row in rows.values()]),
        "agreement": min(
            (row["agreement"] for row in rows.values() if row["agreement"] is not None),
            default=None,
        ),
        "worst": max(row["worst"] for row in rows.values()),
        "relative": max(row["relative"] for row in rows.values()),
        "sqnr": min(row["sqnr"] for row in rows.values()),
        "finite": all(row["finite"] for row in rows.values()),
        "outputs": rows,
    }


def _decided(
    reference: np.ndarray,
    got: np.ndarray,
    labels: np.ndarray | None,
    weights: np.ndarray | None,
    scored: bool,
) -> dict[str, Any]:
    """Figures of an output that holds decisions, see `compare`."""
    counted = spread(weights, reference.shape) > 0
    changed = int(np.count_nonzero((got != reference) & counted))
    right, before = (
        accuracy(array, labels, "decisions", False, weights) for array in (got, reference)
    )
    row: dict[str, Any] = {
        "kind": "decisions",
        "accuracy": right,
        "drop": None if right is None or before is None else before - right,
        "agreement": agreement(reference, got, "decisions", False, weights),
        "kappa": kappa(reference, got, "decisions", False, weights),
        "changed": changed,
        "decided": int(np.count_nonzero(counted)),
        "worst": float(changed > 0),
        "relative": 0.0,
        "sqnr": math.inf,
        "variation": None,
        "finite": True,
    }
    if scored:
        from keras_kd.export.verification.scores import scores

        row["scores"] = scores(got, labels, "decisions", False, weights)
    return row


def kappa(
    reference: np.ndarray,
    outputs: np.ndarray,
    kind: str,
    probabilities: bool,
    weights: np.ndarray | None = None,
) -> float | None:
    """Return Cohen's kappa of the file's decisions and the reference's, by weight.

    `(p_o - p_e) / (1 - p_e)`: agreement beyond what two sets of decisions with these frequencies
    agree by chance. 1 is the same decisions, 0 none but chance.

    Returns:
        Kappa; `None` for plain numbers, or where the reference always decides the same.
    """
    mine = decide(outputs, kind, probabilities)
    theirs = decide(reference, kind, probabilities)
    if mine is None or theirs is None:
        return None
    heavy = spread(weights, mine.shape)
    total = float(heavy.sum())
    values, places = np.unique(np.stack([mine, theirs]), return_inverse=True)
    first, second = places.reshape(2, -1)
    flat = heavy.reshape(-1)
    a, b = (np.bincount(part, flat, len(values)) for part in (first, second))
    if total <= 0 or np.count_nonzero(b) < 2:
        return None
    chance = float(a @ b) / total**2
    return (float(flat[first == second].sum()) / total - chance) / (1 - chance)


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
