"""From the answers of many clients to one: what a class gets counts only those who know it.

Pure functions of NumPy arrays: `(clients, rows, classes)` answers and `(clients, classes)` booleans
in, `(rows, classes)` out. A new rule is a function of this form and a line of `RULES`. Imports
nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
"""A NumPy array."""

TRIMMED = 0.2
"""Share of the clients that `trimmed` leaves out at each end, and one at least of three or more."""


def mean(values: Array) -> Array:
    """Mean over the first axis, the clients that know a class."""
    return values.mean(axis=0)


def median(values: Array) -> Array:
    """Median over the first axis, which fewer than half of the clients cannot move far."""
    return np.median(values, axis=0)


def trimmed(values: Array) -> Array:
    """Mean over the first axis without the largest and the smallest values.

    Of `n` values `max(1, floor(0.2 n))` go at each end; of one or two none do.

    Reference:
        - [Yin et al., 2018](https://arxiv.org/abs/1803.01498), definition 2
    """
    n = len(values)
    cut = max(1, int(TRIMMED * n)) if n > 2 else 0
    return np.sort(values, axis=0)[cut : n - cut].mean(axis=0)


RULES: dict[str, Callable[[Array], Array]] = {"mean": mean, "median": median, "trimmed": trimmed}


def aggregate(answers: Array, has: Array, rule: str = "mean") -> tuple[Array, Array]:
    """Join the answers of clients, class by class.

    Args:
        answers: `(clients, rows, classes)`, one client at least, in the same order of rows.
        has: Booleans `(clients, classes)`: which classes a client knows.
        rule: A name of `RULES`.

    Returns:
        Float64 `(rows, classes)`, 0 in classes that nobody knows; and booleans `(classes,)`, which
        classes somebody knows.
    """
    answers, has = np.asarray(answers, "float64"), np.asarray(has, bool)
    joined = np.zeros(answers.shape[1:])
    for c in range(answers.shape[-1]):
        if has[:, c].any():
            joined[:, c] = RULES[rule](answers[has[:, c], :, c])
    return joined, has.any(axis=0)


def shares(values: Array) -> Array:
    """Rows that sum to 1, of values that are no probabilities any more once joined.

    Negative values, which noise makes, count as 0; a row without any other is uniform.

    Args:
        values: `(rows, classes)`.
    """
    positive = np.maximum(values, 0.0)
    total = positive.sum(axis=-1, keepdims=True)
    uniform = np.full_like(positive, 1.0 / positive.shape[-1])
    return np.where(total > 0, positive / np.where(total > 0, total, 1.0), uniform)


def softmax(logits: Array, known: Array | None = None) -> Array:
    """Probabilities of logits over the last axis.

    Args:
        logits: `(rows, classes)`.
        known: Booleans `(classes,)`: the others have probability 0.
    """
    z = np.asarray(logits, "float64")
    if known is not None:
        z = np.where(known, z, -np.inf)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sharpened(probabilities: Array, temperature: float, known: Array | None = None) -> Array:
    """Entropy reduction: `softmax(p / temperature)` of probabilities `p`, never of logits.

    Args:
        probabilities: `(rows, classes)`, in `[0, 1]`.
        temperature: Positive, dimensionless; 1 at most sharpens little, 0.1 much.
        known: Booleans `(classes,)`: the others stay 0.

    Reference:
        - [Itahara et al., 2020](https://arxiv.org/abs/2008.06180), equation 9
    """
    p = np.asarray(probabilities, "float64")
    # From the largest on: a very low temperature would make infinities of the shares themselves.
    top = (p if known is None else np.where(known, p, -np.inf)).max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        return softmax((p - top) / temperature, known)
