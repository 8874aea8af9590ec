"""Whether one is better than another where both were tried under the same chances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
"""Of the one-sided bounds."""


def lower_bound(differences: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """The lower end of the one-sided confidence interval of a mean of paired differences.

    `mean - t(confidence, n - 1) * s / sqrt(n)`, with the sample standard deviation `s` and the
    quantile `t` of Student's distribution.

    Args:
        differences: `n >= 2` numbers, one a seed.
        confidence: In (0, 1).

    Raises:
        ValueError: If there are fewer than two.
        ImportError: If SciPy is missing.
    """
    n = len(differences)
    if n < 2:
        raise ValueError(f"One difference has no spread. Received: {n} of them.")
    mean, s = float(np.mean(differences)), float(np.std(differences, ddof=1))
    return mean - float(_stats().t.ppf(confidence, n - 1)) * s / math.sqrt(n)


def lower_bound_of_rows(
    better: np.ndarray, worse: np.ndarray, weights: np.ndarray, confidence: float = CONFIDENCE
) -> float:
    """The same over the rows of one comparison, which says nothing of other seeds.

    Args:
        better: `(rows,)` errors of the one that may be better.
        worse: `(rows,)` errors of the other, on the same rows.
        weights: `(rows,)` weights, not negative.
        confidence: In (0, 1).

    Returns:
        The lower bound of the weighted mean of `worse - better`, by the normal distribution.
    """
    weights = np.asarray(weights, "float64")
    share = weights / weights.sum()
    difference = np.asarray(worse, "float64") - np.asarray(better, "float64")
    mean = float((share * difference).sum())
    error = math.sqrt(float((np.square(share) * np.square(difference - mean)).sum()))
    return mean - float(_stats().norm.ppf(confidence)) * error


def least(function: Callable[[float], float], limit: float) -> float:
    """Where a function of one number is least, between `-limit` and `limit`.

    Args:
        function: With a single minimum there.
        limit: Above 0.

    Raises:
        ImportError: If SciPy is missing.
    """
    _stats()
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(function, bounds=(-limit, limit), method="bounded")
    return float(found.x)


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "Comparing methods needs SciPy, which is not installed. Install it with "
            '`pip install "keras_kd[search]"`.'
        ) from error
    return stats
