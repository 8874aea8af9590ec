"""What a model's outputs mean, classes, yes and no or numbers, and how they become decisions.

`kind_of` says it from labels and hints, `decide` turns outputs into decisions, `judged` brings
labels to the same form. Everything that measures builds on these; a new kind is a word of `KINDS`
and a branch in each of the three.
"""

from __future__ import annotations

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
