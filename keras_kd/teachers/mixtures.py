"""Several teachers' logits as one: how they are combined, and with what weights."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_kd.models import meaning
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor

CONFIDENCE = "confidence"


def mixture_weights(
    weights: Sequence[float] | str | None, count: int, combine: str, what: str
) -> Any:
    """Weights of several teachers, scaled to sum 1.

    Args:
        weights: One number each, none negative and not all zero;
            `"confidence"`; or `None` for equal weights.
        count: How many there are.
        combine: `"probabilities"` or `"logits"`.
        what: `"models"` or `"caches"`, for the message.

    Returns:
        A list of floats, or `"confidence"`.

    Raises:
        TypeError: If the weights are no numbers.
        ValueError: If the weights do not fit, or `combine` is unknown.
    """
    if combine not in ("probabilities", "logits"):
        raise ValueError(
            f"`combine` of several {what} is 'probabilities' or 'logits'. "
            f"Received: combine={combine!r}."
        )
    if isinstance(weights, str):
        if weights != CONFIDENCE:
            raise ValueError(
                f"`weights` of {count} {what} is a number for each, {CONFIDENCE!r} or None. "
                f"Received: weights={weights!r}."
            )
        return weights
    listed = isinstance(weights, Iterable) and not isinstance(weights, Mapping)
    each = list(weights) if weights is not None and listed else []
    if weights is not None and not (listed and all(map(checks.is_number, each))):
        raise TypeError(
            f"`weights` of {count} {what} is a list with a number for each, in their order. "
            f"Received: weights={weights!r}."
        )
    given = [1.0] * count if weights is None else [float(w) for w in each]
    total = sum(given)
    if len(given) != count or not (all(w >= 0 for w in given) and 0 < total < np.inf):
        raise ValueError(
            f"`weights` of {count} {what} holds one positive number for each, or 0 for some. "
            f"Received: weights={given!r}."
        )
    return [w / total for w in given]


def combined(
    logits: Sequence[Tensor], weights: Sequence[float] | str, combine: str, binary: bool
) -> Tensor:
    """The logits of several teachers as one: see `Ensemble`.

    Args:
        logits: One tensor a teacher, all of one shape.
        weights: One float a teacher, of sum 1, or `"confidence"`.
        combine: `"probabilities"` or `"logits"`.
        binary: Whether the units are independent.

    Returns:
        A float32 tensor of the same shape.

    Raises:
        ValueError: If a single unit that is no probability is to be weighed
            by its confidence.
    """
    # Half precision ends at 65504, and the sums below lose what sets models apart.
    logits = [ops.cast(z, "float32") for z in logits]
    if isinstance(weights, str):
        log_weights = log_confidence(logits, binary)
    else:
        # A teacher of weight 0 says nothing; log(0) is spared.
        kept = [k for k, w in enumerate(weights) if w > 0]
        logits = [logits[k] for k in kept]
        log_weights = [float(np.log(weights[k])) for k in kept]
    # A softmax over one unit says nothing, so one that is no probability is averaged as it is.
    if combine == "logits" or (logits[0].shape[-1] == 1 and not binary):
        return _sum(ops.exp(w) * z for w, z in zip(log_weights, logits))
    if binary:
        positive = _log_mixture(log_weights, [ops.log_sigmoid(z) for z in logits])
        negative = _log_mixture(log_weights, [ops.log_sigmoid(-z) for z in logits])
        return positive - negative
    return _log_mixture(log_weights, [ops.log_softmax(z, axis=-1) for z in logits])


def of_units(
    logits: Sequence[Tensor], weights: Sequence[float] | str, combine: str, unit: str
) -> Tensor:
    """The answers of several teachers as one, whatever the units mean; values have a mean.

    Args:
        logits: One tensor a teacher, all of one shape.
        weights: One float a teacher, of sum 1, or `"confidence"`.
        combine: `"probabilities"` or `"logits"`, for all but values.
        unit: What the output means, as in `keras_kd.models.meaning`.

    Returns:
        A float32 tensor of the same shape.

    Raises:
        ValueError: If values, which have no entropy, are to be weighed by confidence.
    """
    if unit != meaning.VALUES:
        return combined(logits, weights, combine, unit == meaning.INDEPENDENT)
    if isinstance(weights, str):
        raise ValueError(
            f"weights={weights!r} weighs by the entropy of class distributions, and the loss on "
            "the labels says that this output is a regression. Pass one number a teacher, or None."
        )
    return combined(logits, weights, "logits", False)


def returned(logits: Tensor, kind: str) -> Tensor:
    """What a model returns, from its logits.

    Args:
        logits: `(batch, ..., units)`.
        kind: `"softmax"` or `"sigmoid"` where it ends in one; logits are returned otherwise.

    Returns:
        Tensor of the same shape.
    """
    if kind == "softmax":
        return ops.softmax(logits, axis=-1)
    return ops.sigmoid(logits) if kind == "sigmoid" else logits


def log_confidence(logits: Sequence[Tensor], binary: bool) -> list[Tensor]:
    """Logarithms of the weights that each sample gives to each teacher.

    `w_k = exp(-H_k) / sum_j exp(-H_j)`, where `H_k` is the entropy of teacher
    `k`'s distribution at temperature 1: weights in inverse proportion to the
    perplexity. With independent units each unit has weights of its own.

    Args:
        logits: One float32 tensor `(batch, ..., classes)` a teacher.
        binary: Whether the units are independent.

    Returns:
        One tensor a teacher, `(batch, ..., 1)`, or `(batch, ..., classes)`
        where the units are independent.

    Raises:
        ValueError: If there is a single unit that is no probability.
    """
    if not binary and logits[0].shape[-1] == 1:
        raise ValueError(
            "`weights='confidence'` weighs models by their class probabilities, and these models "
            "end in one unit that no loss reads as a probability. Use fixed weights, or "
            "`keras_kd.losses.BinarySoftTargets()` for two classes."
        )
    entropies = [_binary_entropy(z) if binary else _entropy(z) for z in logits]
    scores = ops.stack([-h for h in entropies], axis=0)
    log_weights = ops.log_softmax(scores, axis=0)
    return [log_weights[k] for k in range(len(logits))]


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of `softmax(logits)` in nats, `(batch, ..., 1)`."""
    log_p = ops.log_softmax(logits, axis=-1)
    p = ops.exp(log_p)
    # A class that is ruled out by a logit of minus infinity adds 0, not NaN.
    terms = ops.where(p > 0, p * log_p, ops.zeros_like(p))
    return -ops.sum(terms, axis=-1, keepdims=True)


def _binary_entropy(logits: Tensor) -> Tensor:
    """Entropy of independent units of probability `sigmoid(logits)`, in nats."""
    p, q = ops.sigmoid(logits), ops.sigmoid(-logits)
    return p * ops.softplus(-logits) + q * ops.softplus(logits)


def _log_mixture(log_weights: Sequence[Any], logs: Sequence[Tensor]) -> Tensor:
    """`log(sum_k w_k exp(l_k))` without leaving log space."""
    shifted = [log_p + log_w for log_w, log_p in zip(log_weights, logs)]
    return ops.logsumexp(ops.stack(shifted, axis=0), axis=0)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    total: Any = 0.0
    for term in terms:
        total = total + term
    return total


# --------------------------------------------------------------- learned weights


class Observations(NamedTuple):
    """What teachers say of labeled data, in NumPy and in double precision.

    Attributes:
        logits: `(n, teachers, classes)`, or `(n, teachers, 2)` with the logit
            of an independent unit and 0.
        labels: `(n, classes)` probabilities of the true classes.
        importance: `(n,)` weights of the rows, of sum 1.
    """

    logits: np.ndarray
    labels: np.ndarray
    importance: np.ndarray


def observations(
    logits: np.ndarray, labels: np.ndarray, weight: np.ndarray | None, binary: bool, output: str
) -> Observations:
    """Labeled answers of several teachers, one row a sample, position or independent unit.

    Args:
        logits: `(n, ..., teachers, classes)`.
        labels: Integers `(n, ...)` or probabilities `(n, ..., classes)`; for
            independent units numbers in [0, 1] of that shape.
        weight: `(n,)` or `(n, ...)` weights of the rows, or `None`.
        binary: Whether the units are independent.
        output: Name of the output, for messages.

    Raises:
        ValueError: If labels or weights do not fit, or logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError(
            f"A model's answers for `{output}` are NaN or infinite on these data. Check the "
            "inputs and the models' weights."
        )
    *outer, count, classes = logits.shape
    labels = np.asarray(labels)
    given = f"Received: y of shape {labels.shape} and type {labels.dtype}."
    if labels.dtype.kind not in "iubf" or not np.isfinite(labels).all():
        raise ValueError(f"The labels of `{output}` are finite numbers. {given}")
    if labels.shape == (*outer, 1) and (classes > 1 or not binary):
        labels = labels[..., 0]
    elif binary and classes == 1 and labels.shape == tuple(outer):
        labels = labels[..., None]
    if labels.shape == (*outer, classes):
        if labels.min() < 0 or labels.max() > 1:
            raise ValueError(
                f"Labels of the shape of the output `{output}` are probabilities in [0, 1]. "
                f"Received: y from {labels.min()} to {labels.max()}."
            )
        target = labels.astype("float64")
    elif labels.shape == tuple(outer) and labels.dtype.kind in "iu" and not binary:
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"The output `{output}` has the classes 0 to {classes - 1}. Received: y from "
                f"{labels.min()} to {labels.max()}. Give rows that do not count a label in the "
                "range and the weight 0."
            )
        target = np.eye(classes)[labels]
    else:
        kinds = "numbers in [0, 1]" if binary else "integers, or probabilities of all classes,"
        raise ValueError(
            f"`{output}` of shape {(*outer, classes)} needs {kinds} as labels, one for each "
            f"{'unit' if binary else 'row'}. {given}"
        )
    importance = _importance(weight, tuple(outer), output)
    if binary:
        # A unit and its complement are two classes of logits z and 0.
        wide = np.moveaxis(logits, -2, -1)[..., None]
        logits = np.concatenate([wide, np.zeros_like(wide)], axis=-1)
        target = np.stack([target, 1.0 - target], axis=-1)
        importance = np.repeat(importance.ravel(), classes) / classes
        classes = 2
    return Observations(
        logits.reshape(-1, count, classes).astype("float64"),
        target.reshape(-1, classes),
        importance.ravel(),
    )


def _importance(weight: np.ndarray | None, shape: tuple[int, ...], output: str) -> np.ndarray:
    """Weights of the rows, `shape`, scaled to sum 1."""
    given = np.ones(shape[:1]) if weight is None else np.asarray(weight, "float64")
    if given.shape == (*shape, 1):
        given = given[..., 0]
    if given.shape != shape[: given.ndim] or given.ndim == 0:
        raise ValueError(
            f"`sample_weight` of `{output}` has the shape {shape[:1]} or {shape}. "
            f"Received: {given.shape}."
        )
    if not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise ValueError(
            f"`sample_weight` of `{output}` holds finite numbers, none negative and not all zero."
        )
    wide = np.broadcast_to(given.reshape(given.shape + (1,) * (len(shape) - given.ndim)), shape)
    return wide / wide.sum()


def cross_entropy(seen: Sequence[Observations], weights: np.ndarray, combine: str) -> float:
    """Cross-entropy of the mixture in nats: the mean over rows, summed over outputs."""
    return -sum(
        float(importance @ (labels * _log_mixed(logits, weights, combine)).sum(axis=-1))
        for logits, labels, importance in seen
    )


def _log_mixed(logits: np.ndarray, weights: np.ndarray, combine: str) -> np.ndarray:
    """Log-probabilities of the mixture, `(n, classes)`."""
    if combine == "logits":
        return _log_softmax(np.einsum("nkc,k->nc", logits, weights))
    kept = weights > 0
    logs = _log_softmax(logits[:, kept]) + np.log(weights[kept])[:, None]
    top = logs.max(axis=1)
    return top + np.log(np.exp(logs - top[:, None]).sum(axis=1))


def learned(
    seen: Sequence[Observations], combine: str, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, float]:
    """Weights on the simplex that minimize the cross-entropy of the mixture.

    Both problems are convex. For the mixture of probabilities
    expectation-maximization has updates in closed form,
    `w_k <- sum_i a_i w_k p_ik / sum_j w_j p_ij`. For the mixture of logits the
    spectral projected gradient method takes steps of Barzilai and Borwein's
    length, projects them onto the simplex and backtracks. The result is
    certain: `g.w - min_k g_k`, with the gradient `g`, is never less than the
    distance to the minimum, and the search ends when it is below `tolerance`.

    Args:
        seen: What the teachers say of labeled data, output by output.
        combine: `"probabilities"` or `"logits"`.
        tolerance: Largest distance to the minimum, in nats.
        max_iterations: After so many the search ends with a warning.

    Returns:
        `(teachers,)` weights of sum 1, and their cross-entropy in nats.

    Reference:
        - [Dempster et al., 1977](https://doi.org/10.1111/j.2517-6161.1977.tb01600.x), section 4.3
        - [Birgin et al., 2000](https://doi.org/10.1137/S1052623497330963), algorithm 2.2
        - [Jaggi, 2013](https://proceedings.mlr.press/v28/jaggi13.html), section 2 (the distance)
    """
    minimize = _expectation_maximization if combine == "probabilities" else _projected_gradient
    weights, gap = minimize(seen, tolerance, max_iterations)
    if gap > tolerance:
        warnings.warn(
            f"The weights are within {gap:.2g} nats of the best after {max_iterations} "
            f"iterations, not within tolerance={tolerance:.2g}. Raise `max_iterations`, or the "
            "tolerance.",
            stacklevel=3,
        )
    return weights, cross_entropy(seen, weights, combine)


def _distance(weights: np.ndarray, gradient: np.ndarray) -> float:
    """How far the minimum may be at most."""
    return float(gradient @ weights - gradient.min())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _expectation_maximization(
    seen: Sequence[Observations], tolerance: float, max_iterations: int
) -> tuple[np.ndarray, float]:
    ratios, counted = [], []
    for logits, labels, importance in seen:
        # Every class that a label gives weight to is an observation of its own.
        row, label = np.nonzero(labels * importance[:, None])
        counted.append(importance[row] * labels[row, label])
        logs = _log_softmax(logits)[row, :, label]
        # Only ratios within a row matter, and so no probability is lost to 0.
        ratios.append(np.exp(logs - logs.max(axis=1, keepdims=True)))
    likelihood, importance = np.concatenate(ratios), np.concatenate(counted)
    weights = np.full(likelihood.shape[1], 1.0 / likelihood.shape[1])
    total = importance.sum()
    for _ in range(max_iterations):
        ratio = (importance / (likelihood @ weights)) @ likelihood
        gap = _distance(weights, -ratio)
        if gap <= tolerance:
            break
        weights = weights * ratio / total
        weights /= weights.sum()
    return weights, gap


def _of_logits(seen: Sequence[Observations], weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The cross-entropy of the weighted logits, and its gradient."""
    gradient = np.zeros_like(weights)
    for logits, labels, importance in seen:
        mass = labels.sum(axis=-1, keepdims=True)
        residual = mass * np.exp(_log_mixed(logits, weights, "logits")) - labels
        gradient += np.einsum("n,nc,nkc->k", importance, residual, logits, optimize=True)
    return cross_entropy(seen, weights, "logits"), gradient


def _projected(point: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex."""
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1.0) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[ordered > excess][-1], 0.0)


def _projected_gradient(
    seen: Sequence[Observations], tolerance: float, max_iterations: int
) -> tuple[np.ndarray, float]:
    # A constant added to the logits of a row changes nothing but the rounding.
    seen = [o._replace(logits=o.logits - o.logits.mean(axis=-1, keepdims=True)) for o in seen]
    count = seen[0].logits.shape[1]
    weights = np.full(count, 1.0 / count)
    value, gradient = _of_logits(seen, weights)
    length = 1.0 / max(np.abs(gradient).max(), 1e-12)
    for _ in range(max_iterations):
        gap = _distance(weights, gradient)
        if gap <= tolerance:
            break
        direction = _projected(weights - length * gradient) - weights
        slope, share = float(gradient @ direction), 1.0
        while True:
            moved = weights + share * direction
            new_value, new_gradient = _of_logits(seen, moved)
            # Less than the last digit cannot be told from rounding.
            if new_value <= value + 1e-4 * share * slope + 1e-15 * abs(value) or share < 1e-12:
                break
            share *= 0.5
        step, change = moved - weights, new_gradient - gradient
        curvature = float(step @ change)
        length = float(np.clip(step @ step / curvature, 1e-12, 1e12)) if curvature > 0 else 1e12
        weights, value, gradient = moved, new_value, new_gradient
    return weights / weights.sum(), gap
