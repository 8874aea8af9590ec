"""The metrics that a user asks for: figures of this package by name, Keras metrics, functions."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.signature import Arrays
from keras_kd.export.verification import scores
from keras_kd.export.verification.lists import ByList
from keras_kd.export.verification.output_meaning import (
    UNLABELED,
    is_probability,
    judged,
    spread,
    squeeze,
)
from keras_kd.utils.errors import did_you_mean

if TYPE_CHECKING:
    import keras


_BATCH = 4096
"""Rows that a Keras metric is given at once."""

_ALIASES = {
    "acc": "accuracy",
    "roc_auc": "auc",
    "f1_macro": "macro_f1",
    "mean_absolute_error": "mae",
    "root_mean_squared_error": "rmse",
    "r2_score": "r2",
    "ndcg": "ndcg@10",
}

# Names by convention: scikit-learn maximizes what ends in `_score` and minimizes what ends in
# `_error`, `_loss` and `_deviance`; Keras's callbacks maximize what is called accuracy or AUC.
_UP = {
    *("acc", "accuracy", "auc", "dice", "f1", "hit", "iou", "kappa", "kendall", "map", "mcc"),
    *("mrr", "ndcg", "pearson", "precision", "r2", "recall", "score", "sensitivity"),
    *("similarity", "spearman", "specificity", "correlation"),
}
_DOWN = {
    *("crossentropy", "deviance", "distance", "divergence", "err", "error", "huber", "loss"),
    *("mae", "mape", "mse", "msle", "perplexity", "rmse", "rmsle", "wer", "cer", "hinge"),
}


@dataclass(frozen=True)
class Chosen:
    """A metric of one output.

    Args:
        name: In reports.
        direction: `"max"` where more is better, `"min"` where less is, `""` where nobody says.
        measure: `(outputs, labels, weights)` to a number; outputs of shape `(samples, ..., units)`.
        figure: Whether it is one of this package, which anybody can measure again.
        groups: The number of each row's list, where it is measured by list.
    """

    name: str
    direction: str
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray | None], float]
    figure: bool = False
    groups: np.ndarray | None = None

    def to_list(self) -> list[str]:
        """Return its entry in a manifest: name, direction, `figure` if it is one, and `lists`."""
        told = {"figure": self.figure, "lists": self.groups is not None}
        return [self.name, self.direction, *(word for word, holds in told.items() if holds)]


def by_output(given: object, names: list[str]) -> dict[str, list[Any]]:
    """Give each output the metrics that were asked for.

    Args:
        given: What `keras_kd.export(metrics=...)` was given.
        names: Of the outputs.

    Returns:
        Lists of metrics, as given, by output name.

    Raises:
        ValueError: If an output is unknown, or one list was given for several outputs.
    """
    if given is None:
        return {}
    if isinstance(given, dict):
        for name in given:
            if name not in names:
                hint = did_you_mean(name, names)
                raise ValueError(
                    f"`metrics` names the output `{name}`, which the model does not have; its "
                    f"outputs are {names}.{hint}"
                )
        found = given
    elif len(names) == 1:
        found = {names[0]: given}
    elif isinstance(given, (list, tuple)) and len(given) == len(names):
        found = dict(zip(names, given, strict=True))
    else:
        raise ValueError(
            f"The model has the outputs {names}, and `metrics` does not say which of them it is "
            "for. Pass a dict by output name, or a list with an entry for each output."
        )
    listed = {}
    for name, value in found.items():
        several = isinstance(value, (list, tuple)) and not _with_direction(value)
        listed[name] = [each for each in (value if several else [value]) if each is not None]
    return {name: values for name, values in listed.items() if values}


def _with_direction(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[1] in ("max", "min")


def resolve(
    asked: dict[str, list[Any]],
    outputs: Arrays,
    labels: Arrays,
    kinds: dict[str, dict[str, Any]],
    weights: Arrays,
    *,
    judges: bool,
) -> dict[str, list[Chosen]]:
    """Make metrics ready, and try each on the Keras model's own answers.

    Args:
        asked: See `by_output`.
        outputs: The Keras model's outputs.
        labels: By output name.
        kinds: See `metrics.compare`.
        weights: By output name.
        judges: Whether the first metric of an output judges files, so that its direction must be
            known.

    Returns:
        The metrics by output name.

    Raises:
        TypeError: If something is no metric.
        ValueError: If one is unknown, has no labels to work with, fails, gives no single finite
            number, or its direction is not known.
    """
    found: dict[str, list[Chosen]] = {}
    for name, entries in asked.items():
        if name not in labels:
            raise ValueError(
                f"`metrics` asks for figures of output `{name}`, and the evaluation data has no "
                "labels for it. Pass `evaluation=(x, y)`."
            )
        found[name] = []
        for i, entry in enumerate(entries):
            value, direction = entry if _with_direction(entry) else (entry, "")
            one = _ready(value, direction, outputs[name], kinds[name])
            if one.name in [each.name for each in found[name]]:
                raise ValueError(
                    f"`metrics` has two metrics of the name `{one.name}` at output `{name}`. Name "
                    "each of them."
                )
            try:
                number = one.measure(outputs[name], labels[name], weights.get(name))
            except Exception as error:
                # Keras, its backends, scikit-learn and a user's function have types of their own.
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"The metric `{one.name}` fails on the Keras model's answers at output "
                    f"`{name}`, of shape {outputs[name].shape}, with labels of shape "
                    f"{labels[name].shape}: {reason}"
                ) from error
            if not math.isfinite(number):
                raise ValueError(
                    f"The metric `{one.name}` gives {number} for the Keras model's own answers at "
                    f"output `{name}`. Choose another one, or other evaluation data."
                )
            if i == 0 and judges and not one.direction:
                raise ValueError(
                    f"Nothing says whether more of the metric `{one.name}` is better, or less. "
                    f'Pass `({one.name}, "max")` or `({one.name}, "min")`, or `max_drop=None`, so '
                    "that it judges nothing."
                )
            found[name].append(one)
    return found


def again(
    entries: dict[str, list[list[str]]],
    outputs: Arrays,
    labels: Arrays,
    weights: Arrays,
    kinds: Any,
    groups: Arrays,
) -> tuple[dict[str, list[Chosen]], dict[str, list[str]]]:
    """Make those metrics of a manifest ready that can be measured from it alone.

    Args:
        entries: By output, see `Chosen.to_list`.
        outputs: The Keras model's stored outputs.
        labels: By output name.
        weights: By output name.
        kinds: See `metrics.compare`.
        groups: By output name the number of each row's list.

    Returns:
        The metrics by output name, and the names of those that need the user's own code or more
        samples than there are.
    """
    ready: dict[str, list[Chosen]] = {}
    missing: dict[str, list[str]] = {}
    for name, rows in entries.items():
        for metric, direction, *told in rows:
            known = "figure" in told and metric in scores.NAMES and name in labels
            value: Any = metric
            if "lists" in told:
                # Whole numbers alone, or rows of one list would be told apart.
                known = known and name in groups and groups[name].dtype.kind in "iu"
                value = ByList(groups[name]) if known else metric
            one = {name: [(value, direction) if direction else value]}
            try:
                found = resolve(one, outputs, labels, kinds, weights, judges=False) if known else {}
            except ValueError:
                found = {}
            if found:
                ready.setdefault(name, []).extend(found[name])
            else:
                missing.setdefault(name, []).append(metric)
    return ready, missing


def measure(
    chosen: dict[str, list[Chosen]], outputs: Arrays, labels: Arrays, weights: Arrays
) -> dict[str, dict[str, float]]:
    """Measure the metrics on a file's outputs.

    Args:
        chosen: See `resolve`.
        outputs: By output name.
        labels: By output name.
        weights: By output name.

    Returns:
        Values by metric by output.
    """
    return {
        name: {
            each.name: float(each.measure(outputs[name], labels[name], weights.get(name)))
            for each in entries
        }
        for name, entries in chosen.items()
    }


def lost(direction: str, before: float, after: float) -> float:
    """Return how much worse a figure became, as a share that compares with `max_drop`.

    Args:
        direction: `"max"` or `"min"`.
        before: The Keras model's figure.
        after: The file's.

    Returns:
        Where more is better, `before - after`, over `|before|` if that is beyond 1; where less is,
        `(after - before) / |before|`, since errors have the scale of the labels. Negative where the
        file is better; infinite where it is no number.
    """
    if not math.isfinite(after):
        return math.inf
    if direction == "max":
        return (before - after) / max(1.0, abs(before))
    if before == 0:
        return 0.0 if after <= 0 else math.inf
    return (after - before) / abs(before)


def check_metrics(asked: dict[str, list[Any]]) -> None:
    """Refuse what is no metric, before the model answers.

    Args:
        asked: See `by_output`.

    Raises:
        TypeError: If something is no metric.
        ValueError: If a name is unknown.
    """
    for entries in asked.values():
        for entry in entries:
            _found(entry[0] if _with_direction(entry) else entry)


def _found(value: object) -> Any:
    """The name of a figure of this package, a Keras metric, or a function."""
    if isinstance(value, ByList):
        return value
    import keras

    if isinstance(value, str):
        name = _ALIASES.get(value.lower(), value.lower())
        if name in scores.NAMES:
            return name
        try:
            value = keras.metrics.get(value)
        except ValueError:
            known = [*scores.NAMES, *_ALIASES]
            hint = did_you_mean(name, known)
            raise ValueError(
                f"`{value}` is no metric. Expected one of {', '.join(scores.NAMES)}, the name of a "
                f"Keras metric, a `keras.metrics.Metric`, or a function of (labels, outputs).{hint}"
            ) from None
    if isinstance(value, type) and issubclass(value, keras.metrics.Metric):
        value = value()
    if not isinstance(value, keras.metrics.Metric) and not callable(value):
        raise TypeError(
            "`metrics` takes names, `keras.metrics.Metric` objects and functions of (labels, "
            f"outputs), each alone or as (metric, 'max' or 'min'). Received: {value!r}."
        )
    return value


def _ready(value: Any, direction: str, outputs: np.ndarray, kind: dict[str, Any]) -> Chosen:
    value = _found(value)
    if isinstance(value, ByList):
        return Chosen(value.name, direction or "max", _by_list(value), True, value.groups)
    import keras

    if isinstance(value, str):
        way = direction or scores.NAMES[value]
        return Chosen(value, way, _figure(value, kind), figure=True)
    if isinstance(value, keras.metrics.Metric):
        _check_logits(value, outputs)
        # Keras notes for most metrics which way is better, and its callbacks read it.
        noted = {"up": "max", "down": "min"}.get(getattr(value, "_direction", ""), "")
        return Chosen(
            value.name, direction or noted or _by_name(value.name), _of_keras(value, kind)
        )
    name = getattr(value, "__name__", type(value).__name__)
    return Chosen(name, direction or _by_name(name), _of_function(value, name, kind))


def _by_list(
    metric: ByList,
) -> Callable[[np.ndarray, np.ndarray, np.ndarray | None], float]:
    def measured(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> float:
        return metric(labels, outputs, weights)

    return measured


def _by_name(name: str) -> str:
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
    up, down = words & _UP, words & _DOWN
    return "" if bool(up) == bool(down) else "max" if up else "min"


def _check_logits(metric: keras.metrics.Metric | keras.losses.Loss, outputs: np.ndarray) -> None:
    import keras

    if is_probability(outputs):
        return
    told = [getattr(metric, key, None) for key in ("from_logits", "_from_logits")]
    # These try thresholds from 0 to 1.
    sweeping = (
        keras.metrics.SensitivityAtSpecificity,
        keras.metrics.SpecificityAtSensitivity,
        keras.metrics.PrecisionAtRecall,
        keras.metrics.RecallAtPrecision,
    )
    if False in told:
        advice = "Pass it with `from_logits=True`"
    elif isinstance(metric, sweeping):
        advice = "End the model in the activation, or choose `auc`"
    else:
        return
    raise ValueError(
        f"The metric `{metric.name}` reads probabilities, and the model's outputs run from "
        f"{outputs.min():.3g} to {outputs.max():.3g}: they are logits. {advice}."
    )


def _figure(
    name: str, kind: dict[str, Any]
) -> Callable[[np.ndarray, np.ndarray, np.ndarray | None], float]:
    def measured(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> float:
        ranks = name == "ndcg@10"
        found = scores.scores(
            outputs,
            labels,
            kind["kind"],
            kind["probabilities"],
            weights,
            ranks=ranks,
            tags=kind.get("tags"),
        )
        if found.get(name) is None:
            known = [key for key in scores.NAMES if found.get(key) is not None]
            raise ValueError(
                f"it is no figure of these answers and labels; there are {', '.join(known)}"
            )
        return float(found[name])

    return measured


def _rows(
    outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, kind: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What counts: rows of no weight left out, weights of 0 where there is no label."""
    kept = np.ones(len(outputs), bool)
    if kind["kind"] in ("classes", "binary", "multilabel", "decisions"):
        truth, heavy = judged(outputs, labels, kind["kind"], weights)
        unlabeled = truth == UNLABELED
        if unlabeled.any():
            weights = heavy[..., 0] if kind["kind"] == "binary" else heavy
            # Any label that exists: it weighs nothing.
            labels = np.where(unlabeled, 0, squeeze(labels, outputs))
    if weights is not None:
        kept = weights.reshape(len(weights), -1).any(axis=1)
        weights = weights[kept]
        if (weights == 1).all():
            weights = None
    return outputs[kept], labels[kept], weights


def _of_keras(
    metric: keras.metrics.Metric | keras.losses.Loss, kind: dict[str, Any]
) -> Callable[[np.ndarray, np.ndarray, np.ndarray | None], float]:
    weighted = "sample_weight" in inspect.signature(metric.update_state).parameters

    def measured(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> float:
        outputs, labels, weights = _rows(outputs, labels, weights, kind)
        if weights is not None and not weighted:
            raise ValueError("its `update_state` takes no `sample_weight`, and there are weights")
        if labels.ndim == outputs.ndim - 1 and outputs.shape[-1] == 1:
            labels = labels[..., None]
        if weights is not None and "int" in str(metric.dtype):
            # Keras casts weights to the metric's dtype, with a warning: 0.9 would become 0.
            if (weights != np.round(weights)).any():
                raise ValueError(
                    "it counts in integers, and weights have fractions: make it with "
                    "`dtype='float32'`"
                )
            weights = weights.astype(np.int32)
        metric.reset_state()
        try:
            for i in range(0, len(outputs), _BATCH):
                part = slice(i, i + _BATCH)
                given = {} if weights is None else {"sample_weight": weights[part]}
                metric.update_state(labels[part], outputs[part], **given)
            return _single(metric.result())
        finally:
            metric.reset_state()

    return measured


def _of_function(
    function: Callable[..., Any], name: str, kind: dict[str, Any]
) -> Callable[[np.ndarray, np.ndarray, np.ndarray | None], float]:
    try:
        weighted = "sample_weight" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        weighted = False

    def measured(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> float:
        outputs, labels, weights = _rows(outputs, labels, weights, kind)
        # In the form of the outputs or of their rows: (n, 1) beside (n,) would be compared as
        # (n, n), without an error.
        labels = squeeze(labels, outputs)
        if weights is not None and weighted:
            return _single(function(labels, outputs, sample_weight=weights))
        from keras_kd.export.source.data import as_array

        found = as_array(function(labels, outputs))
        if weights is None:
            return float(np.mean(found))
        if found.shape[: weights.ndim] == weights.shape:
            return float(np.average(found, weights=spread(weights, found.shape)))
        if found.ndim >= 1 and found.shape == weights.shape[: found.ndim]:
            # One value a row, of which positions have weights: the row is the mean of nothing else.
            raise ValueError(
                "it gives one number a row, and there are weights within rows; let it take "
                "`sample_weight`"
            )
        if ((weights == 0) | (weights == 1)).all() and weights.ndim < outputs.ndim:
            # Positions that count, as rows of their own.
            counted = weights > 0
            return _single(function(labels[counted], outputs[counted]))
        raise ValueError(
            "it gives one number for all rows, and there are weights; let it take `sample_weight`, "
            "or give one number a row"
        )

    return measured


def _single(value: object) -> float:
    from keras_kd.export.source.data import as_array

    if isinstance(value, dict):
        raise ValueError(f"it gives {len(value)} figures, {sorted(value)}; one is needed")
    array = as_array(value)
    if array.size != 1:
        raise ValueError(
            f"it gives {array.size} numbers and one is needed, for example with `average='macro'`"
        )
    return float(array.reshape(()))
