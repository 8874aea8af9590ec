"""How far an exported file's answers are from the Keras model's, and from the labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_kd.export.rows import FileFigures, OutputFigures
from keras_kd.export.verification.output_meaning import decide, judged, spread
from keras_kd.export.verification.scores import places
from keras_kd.export.verification.scores import scores as task_scores


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


@dataclass(frozen=True)
class Still:
    """Answers that hardly change from sample to sample.

    Args:
        constant: Whether the standard deviation over the samples of the whole output is under a
            tenth of the Keras model's.
        units: The first units of which the same is true alone.
        count: How many there are.
    """

    constant: bool | None = None
    units: tuple[int, ...] | None = None
    count: int | None = None


def still_columns(
    reference: np.ndarray, outputs: np.ndarray, counted: np.ndarray | None = None
) -> Still:
    """Find answers that hardly change from sample to sample, where the Keras model's do.

    Args:
        reference: Outputs of the Keras model, `(samples, ..., units)`.
        outputs: Outputs of the file, same shape.
        counted: Which entries count, same shape; all by default.

    Returns:
        What was found, of units that vary by more than a millionth of the greatest output.
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
    return Still(
        bool(real.any()) and kept < STILL * total,
        tuple(int(i) for i in still[:_SHOWN]),
        len(still),
    )


def compare(
    references: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    kinds: dict[str, dict[str, Any]],
    weights: dict[str, np.ndarray] | None = None,
    *,
    scores: bool = False,
) -> FileFigures:
    """Compare all outputs of a file with the Keras model's.

    Args:
        references: Keras's outputs by name.
        outputs: The file's outputs by name, dequantized.
        labels: Labels by output name; an output may have none.
        kinds: For each output `{"kind": one of KINDS, "probabilities": bool}`, and where its
            classes are tags of entities `"tags"`, see `entities.tag_names`.
        weights: Weights by output name, of the samples or of each of their first axes. What weighs
            nothing counts in no figure; accuracy and agreement are weighted means, signal and noise
            are those of all entries that count.
        scores: Whether to add `scores` to each output, see `scores.scores`.

    Returns:
        `accuracy` (mean over the outputs that have one, else `None`), `agreement` (lowest over the
        outputs that make decisions, else `None`), `worst` (greatest absolute difference),
        `relative` (the same over the greatest magnitude of that output), `sqnr` (lowest over the
        outputs, dB), `finite`, and `outputs` with the figures of each output: these, its `kind`,
        `drop` (Keras's accuracy minus the file's), `variation` and `kappa`, see there, `apart` (the
        variation of classes without what they share) and those of `still_columns`. The numbers of
        classes are no quantities: of an output of `"decisions"`
        `worst` is 1 where any is another and 0 otherwise, `relative` is 0 and `sqnr` infinite, and
        `changed` says how many of how many (`decided`) are other ones.
    """
    rows: dict[str, OutputFigures] = {}
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
        still = still_columns(reference, got, counted) if finite else Still()
        rows[name] = OutputFigures(
            accuracy=right,
            agreement=agreement(reference, got, kind, probabilities, weight),
            worst=worst,
            relative=worst / peak if peak > 0 else worst,
            sqnr=sqnr(reference[here], got[here]) if finite else -math.inf,
            finite=finite,
            kind=kind,
            drop=None if right is None or before is None else before - right,
            kappa=kappa(reference, got, kind, probabilities, weight),
            variation=variation(reference, got, counted) if finite else -math.inf,
            apart=_told_apart(reference, got, counted, kind) if finite else None,
            constant=still.constant,
            still=still.units,
            still_count=still.count,
            scores=task_scores(
                got, truth, kind, probabilities, weight, tags=kinds[name].get("tags")
            )
            if scores and finite
            else None,
        )
    figures = rows.values()
    return FileFigures(
        accuracy=_mean([row.accuracy for row in figures]),
        agreement=min(
            (row.agreement for row in figures if row.agreement is not None), default=None
        ),
        worst=max(row.worst for row in figures),
        relative=max(row.relative for row in figures),
        sqnr=min(row.sqnr for row in figures),
        finite=all(row.finite for row in figures),
        outputs=rows,
    )


def _told_apart(
    reference: np.ndarray, got: np.ndarray, counted: np.ndarray | None, kind: str
) -> float | None:
    """`variation` of classes without what all of a row have in common, which decides nothing.

    Logits may share a large part that a file keeps while what tells the classes apart is lost.
    """
    if kind != "classes" or reference.ndim < 2 or reference.shape[-1] < 2:
        return None
    apart = [
        array.astype(np.float64) - array.mean(axis=-1, keepdims=True, dtype=np.float64)
        for array in (reference, got)
    ]
    return variation(apart[0], apart[1], counted)


def _decided(
    reference: np.ndarray,
    got: np.ndarray,
    labels: np.ndarray | None,
    weights: np.ndarray | None,
    scored: bool,
) -> OutputFigures:
    """Figures of an output that holds decisions, see `compare`."""
    counted = spread(weights, reference.shape) > 0
    changed = int(np.count_nonzero((got != reference) & counted))
    right, before = (
        accuracy(array, labels, "decisions", False, weights) for array in (got, reference)
    )
    return OutputFigures(
        accuracy=right,
        agreement=agreement(reference, got, "decisions", False, weights),
        worst=float(changed > 0),
        relative=0.0,
        sqnr=math.inf,
        finite=True,
        kind="decisions",
        drop=None if right is None or before is None else before - right,
        kappa=kappa(reference, got, "decisions", False, weights),
        changed=changed,
        decided=int(np.count_nonzero(counted)),
        scores=task_scores(got, labels, "decisions", False, weights) if scored else None,
    )


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
    first, second = places(np.stack([mine, theirs]).reshape(-1)).reshape(2, -1)
    flat, several = heavy.reshape(-1), int(max(first.max(initial=0), second.max(initial=0))) + 1
    a, b = (np.bincount(part, flat, several) for part in (first, second))
    if total <= 0 or np.count_nonzero(b) < 2:
        return None
    chance = float(a @ b) / total**2
    return (float(flat[first == second].sum()) / total - chance) / (1 - chance)


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
