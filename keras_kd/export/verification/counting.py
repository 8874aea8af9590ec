"""What counts of the evaluation, and how much: sample weights, masks, ignored labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.signature import Arrays, Signature
from keras_kd.export.verification.output_meaning import UNLABELED, squeeze
from keras_kd.utils.types import Tensors

if TYPE_CHECKING:
    import keras


def sample_weights(given: object, signature: Signature, outputs: Arrays) -> Arrays:
    """Give each output its sample weights, checked.

    Args:
        given: `None`, one array for all outputs, or a list or dict of them by output, each of shape
            `(samples,)`, or of as many of the output's first axes as it has weights for.
        signature: Of the model.
        outputs: The model's outputs by name.

    Returns:
        Float32 arrays by output name.

    Raises:
        ValueError: If an output is unknown, a shape does not fit, or a weight is negative or not
            finite, or all of them are 0.
    """
    if given is None:
        return {}
    known = [info.name for info in signature.outputs]
    if isinstance(given, dict):
        unknown = sorted(set(map(str, given)) - set(known))
        if unknown:
            raise ValueError(
                f"The sample weights name the outputs {unknown}, which the model does not have; "
                f"its outputs are {known}."
            )
        rows = dict(given)
    elif isinstance(given, (list, tuple)):
        if len(given) != len(known):
            raise ValueError(
                f"The sample weights are {len(given)} arrays, the model has the {len(known)} "
                f"outputs {known}. Pass one array for all of them, or a dict by output name."
            )
        rows = dict(zip(known, given, strict=True))
    else:
        rows = dict.fromkeys(known, given)
    result = {}
    for name, value in rows.items():
        if value is None:
            continue
        array = np.asarray(value)
        shape = outputs[name].shape
        if array.ndim == 2 and array.shape[1] == 1 and len(shape) == 2:
            array = array[:, 0]
        if array.dtype.kind not in "biuf" or array.shape != shape[: array.ndim]:
            raise ValueError(
                f"The sample weights of output `{name}` have shape {array.shape} and dtype "
                f"{array.dtype}, and the output has shape {shape}. Pass numbers of shape "
                f"{shape[:1]}" + (f" or {shape[:-1]}" if len(shape) > 2 else "") + "."
            )
        array = array.astype(np.float32)
        if not np.isfinite(array).all() or (array < 0).any() or not (array > 0).any():
            raise ValueError(
                f"The sample weights of output `{name}` run from {array.min():g} to "
                f"{array.max():g}. Weights are finite, none is negative, and one at least is above "
                "0."
            )
        result[name] = array
    return result


def keras_masks(model: keras.Model, x: Tensors, signature: Signature, outputs: Arrays) -> Arrays:
    """Read the masks that Keras attaches to a model's outputs.

    Args:
        model: The model.
        x: Its inputs, nested as it takes them.
        signature: Of the model.
        outputs: Its outputs by name.

    Returns:
        Boolean arrays `(samples, ...)` by output name, for the outputs that have a mask.
    """
    import keras

    from keras_kd.utils.masks import keras_mask

    def read(start: int, stop: int) -> list[Any]:
        part = keras.tree.map_structure(lambda array: array[start:stop], x)
        tensors = keras.tree.flatten(model(part, training=False))
        masks = [keras_mask(tensor) for tensor in tensors]
        return [None if m is None else keras.ops.convert_to_numpy(m).astype(bool) for m in masks]

    # Masks come from layers, and a model whose first row has none has none.
    if all(mask is None for mask in read(0, 1)):
        return {}
    count = len(next(iter(outputs.values())))
    parts = [read(start, start + 256) for start in range(0, count, 256)]
    found = {}
    for i, info in enumerate(signature.outputs):
        masks = [part[i] for part in parts]
        if any(mask is None for mask in masks):
            continue
        mask = np.concatenate(masks)
        if mask.shape == outputs[info.name].shape[: mask.ndim] and mask.any():
            found[info.name] = mask
    return found


def ignored(
    model: keras.Model, names: Iterable[str], metrics: dict[str, list[Any]]
) -> dict[str, set[int]]:
    """Return the labels that a compiled loss or a metric ignores, by output.

    Args:
        model: The model; `ignore_class` of the losses that it was compiled with is read.
        names: Of its outputs.
        metrics: Metrics by output; their `ignore_class` is read as well.
    """
    found: dict[str, set[int]] = {}
    losses = losses_by_output(model, names)
    for name in names:
        known = (losses.get(name), *metrics.get(name, []))
        # A metric may come with its direction, as a pair.
        plain = (each[0] if isinstance(each, tuple) else each for each in known)
        values = (getattr(each, "ignore_class", None) for each in plain)
        found[name] = {int(value) for value in values if value is not None}
    return found


def losses_by_output(model: keras.Model, names: Iterable[str]) -> dict[str, Any]:
    """Return the losses that a model was compiled with, as they were given, by output name."""
    loss, known = getattr(model, "loss", None), list(names)
    if isinstance(loss, dict):
        return {name: loss.get(name) for name in known}
    if isinstance(loss, (list, tuple)):
        return dict(zip(known, loss, strict=False))
    return {known[0]: loss} if len(known) == 1 else {}


def count(
    labels: Arrays,
    weights: Arrays,
    masks: Arrays,
    skipped: dict[str, set[int]],
    outputs: Arrays,
) -> tuple[Arrays, Arrays]:
    """Bring weights, masks and ignored labels together.

    Args:
        labels: By output name.
        weights: See `sample_weights`.
        masks: See `keras_masks`.
        skipped: See `ignored`.
        outputs: The Keras model's outputs.

    Returns:
        Labels, in which whatever does not count is -1 if it holds class numbers, and weights by
        output name; an output without weights counts everywhere.

    Raises:
        ValueError: If nothing of an output is left to count, or labels that count are not finite.
    """
    labels, result = dict(labels), {}
    for name, output in outputs.items():
        parts = [
            part.astype(np.float32)
            for part in (weights.get(name), masks.get(name))
            if part is not None
        ]
        truth = labels.get(name)
        if truth is not None and skipped.get(name):
            truth = squeeze(truth, output)
            left_out = np.isin(truth, list(skipped[name]))
            if truth.shape == output.shape[:-1] and left_out.any():
                parts.append((~left_out).astype(np.float32))
        if parts:
            rank = max(part.ndim for part in parts)
            result[name] = np.prod(
                np.broadcast_arrays(
                    *(part.reshape(part.shape + (1,) * (rank - part.ndim)) for part in parts)
                ),
                axis=0,
            )
            if not (result[name] > 0).any():
                raise ValueError(
                    f"Nothing of output `{name}` counts in the evaluation: all of it is weighed "
                    "with 0, masked, or has a label that is ignored."
                )
        if truth is not None:
            labels[name] = _cleared(truth, output, result.get(name), name)
    return labels, result


def _cleared(
    labels: np.ndarray, output: np.ndarray, weights: np.ndarray | None, name: str
) -> np.ndarray:
    if weights is not None:
        whole = squeeze(labels, output)
        if weights.ndim <= whole.ndim and whole.shape[: weights.ndim] == weights.shape:
            nothing = np.broadcast_to(
                (weights == 0).reshape(weights.shape + (1,) * (whole.ndim - weights.ndim)),
                whole.shape,
            )
            if nothing.any():
                # Padding may hold any number; what stands in its place must not change what the
                # labels mean.
                if output.shape[-1] > 1 and whole.shape == output.shape[:-1]:
                    whole = whole if whole.dtype.kind in "if" else whole.astype(np.int64)
                    labels = np.where(nothing, whole.dtype.type(UNLABELED), whole)
                else:
                    first = tuple(np.argwhere(weights > 0)[0])
                    labels = np.where(nothing, whole[first], whole)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError(f"The evaluation labels for output `{name}` hold NaN or infinite values.")
    return labels
