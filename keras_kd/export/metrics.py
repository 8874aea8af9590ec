"""How far an exported file's answers are from the Keras model's, and from the labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

KINDS = ("classes", "binary", "multilabel", "values", "unknown")
"""What an output means: one class of many, one yes or no, several of them, plain numbers, or a row
of numbers of which nothing says whether they are classes."""


def kind_of(reference: np.ndarray, labels: np.ndarray | None, hint: str | None = None) -> str:
    """Say what an output means, from its labels, or else from what is known of the model.

    Args:
        reference: Outputs of the Keras model, `(samples, ..., units)`.
        labels: `None`, class indices `(samples, ...)`, or an array shaped like the outputs.
        hint: One of `KINDS`, which holds without labels.

    Returns:
        One of `KINDS`.

    Raises:
        ValueError: If class indices lie outside the number of units, or the shapes do not fit.
    """
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
        if low < 0 or high >= units:
            raise ValueError(
                f"The evaluation labels run from {low} to {high}, but the model has {units} "
                f"outputs, so labels lie in 0..{units - 1}. Check the labels or the last layer."
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
    if whole and set(np.unique(labels)) <= {0, 1}:
        if units == 1:
            return "binary"
        return "classes" if np.all(labels.sum(axis=-1) == 1) else "multilabel"
    # Soft labels are distributions over the classes.
    distributions = (
        units > 1 and labels.min() >= 0 and np.allclose(labels.sum(axis=-1), 1, atol=1e-3)
    )
    return "classes" if distributions else "values"


def squeeze(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Bring labels to the rank of the class indices or of the outputs, as Keras's metrics do."""
    if labels.ndim == reference.ndim and labels.shape[-1] == 1 and reference.shape[-1] > 1:
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
    return None


def is_probability(reference: np.ndarray) -> bool:
    """Say whether outputs lie in [0, 1], which logits of more than a few samples do not."""
    return bool(reference.min() >= 0 and reference.max() <= 1)


def is_distribution(reference: np.ndarray) -> bool:
    """Say whether every row of the outputs is a distribution, as after a softmax."""
    sums = reference.astype(np.float64).sum(axis=-1)
    return is_probability(reference) and bool(np.allclose(sums, 1, atol=5e-3))


def accuracy(
    outputs: np.ndarray, labels: np.ndarray | None, kind: str, probabilities: bool
) -> float | None:
    """Return the share of right decisions, in 0..1; `None` without labels or decisions."""
    decisions = decide(outputs, kind, probabilities)
    if labels is None or decisions is None:
        return None
    labels = squeeze(labels, outputs)
    if kind == "classes" and labels.shape == outputs.shape:
        labels = labels.argmax(axis=-1)
    return float(np.mean(decisions == labels.astype(decisions.dtype)))


def agreement(
    reference: np.ndarray, outputs: np.ndarray, kind: str, probabilities: bool
) -> float | None:
    """Return the share of decisions equal to the reference's, in 0..1; `None` for plain numbers."""
    mine = decide(outputs, kind, probabilities)
    theirs = decide(reference, kind, probabilities)
    return None if mine is None or theirs is None else float(np.mean(mine == theirs))


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


def variation(reference: np.ndarray, outputs: np.ndarray) -> float | None:
    """Return the ratio of the outputs' variation over the samples to the noise, in dB.

    As `sqnr`, but the signal is what changes from sample to sample,
    `10 log10(sum (r - mean r)**2 / sum (r - o)**2)`: a large constant part, which any file keeps,
    hides nothing.

    Args:
        reference: Outputs of the Keras model, `(samples, ...)`.
        outputs: Outputs of the file, same shape.

    Returns:
        Decibels; infinite where both are equal, `None` where the outputs do not vary.
    """
    reference = reference.astype(np.float64)
    spread = reference - reference.mean(axis=0, keepdims=True)
    signal = float(np.sum(spread**2))
    # Rounding of equal answers is no variation.
    if signal <= 1e-12 * float(np.sum(reference**2)):
        return None
    noise = float(np.sum((reference - outputs) ** 2))
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def compare(
    references: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    kinds: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Compare all outputs of a file with the Keras model's.

    Args:
        references: Keras's outputs by name.
        outputs: The file's outputs by name, dequantized.
        labels: Labels by output name; an output may have none.
        kinds: For each output `{"kind": one of KINDS, "probabilities": bool}`.

    Returns:
        `accuracy` (mean over the outputs that have one, else `None`), `agreement` (lowest over the
        outputs that make decisions, else `None`), `worst` (greatest absolute difference),
        `relative` (the same over the greatest magnitude of that output), `sqnr` (lowest over the
        outputs, dB), `finite`, and `outputs` with the figures of each output: these, its `kind`,
        `drop` (Keras's accuracy minus the file's) and `variation`, see there.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, reference in references.items():
        got = outputs[name].astype(np.float32)
        kind, probabilities = kinds[name]["kind"], kinds[name]["probabilities"]
        finite = bool(np.isfinite(got).all())
        worst = float(np.max(np.abs(got - reference), initial=0.0)) if finite else math.inf
        peak = float(np.max(np.abs(reference), initial=0.0))
        right = accuracy(got, labels.get(name), kind, probabilities)
        before = accuracy(reference, labels.get(name), kind, probabilities)
        rows[name] = {
            "kind": kind,
            "accuracy": right,
            "drop": None if right is None or before is None else before - right,
            "agreement": agreement(reference, got, kind, probabilities),
            "worst": worst,
            "relative": worst / peak if peak > 0 else worst,
            "sqnr": sqnr(reference, got) if finite else -math.inf,
            "variation": variation(reference, got) if finite else -math.inf,
            "finite": finite,
        }
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


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
