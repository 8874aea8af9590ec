"""The Keras model run on the evaluation data, and the arguments of an export that speak of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.checks import check_model, names, number
from keras_kd.export.rows import KerasFigures, to_json
from keras_kd.export.signature import (
    Arrays,
    Signature,
    describe,
    is_symbolic,
    pack,
    samples_elsewhere,
)
from keras_kd.export.source import data
from keras_kd.export.verification import counting, entities, output_meaning
from keras_kd.export.verification.chosen_metrics import by_output, check_metrics, resolve
from keras_kd.export.verification.decisions import whole_numbers
from keras_kd.export.verification.lists import ByList
from keras_kd.export.verification.reference import Reference, judged
from keras_kd.export.verification.timing import TIMED, time_calls
from keras_kd.utils.types import Losses, Tensors

if TYPE_CHECKING:
    import keras


def answer(
    model: keras.Model,
    x: Tensors,
    y: Tensors,
    weights: Arrays | None = None,
    *,
    classes: Sequence[str] | None = None,
    chosen: Any = None,
    judges: bool = False,
) -> Reference:
    """Run the Keras model on the evaluation data.

    Args:
        model: A built model.
        x: Its inputs, nested as it takes them.
        y: Labels, or `None`.
        weights: Sample weights, or `None`, see `counting.sample_weights`.
        classes: Names of the classes of the first output, which then is known to hold classes.
        chosen: The metrics that are asked for, see `chosen.resolve`.
        judges: Whether files are judged by them.

    Returns:
        The reference.

    Raises:
        ValueError: If inputs, labels, weights or metrics do not fit the model, or it gives NaN.
    """
    import keras

    if is_symbolic(model):
        # The graph declares its inputs, so the data is checked before the model sees it.
        draft = describe(model, x, [_empty(tensor) for tensor in model.outputs])
        inputs = data.by_name(x, draft, "evaluation")
        result = model.predict(_nest(draft, inputs, model), batch_size=256, verbose=0)
        signature = describe(model, x, result)
    else:
        result = model.predict(x, batch_size=256, verbose=0)
        signature = describe(model, x, result)
        inputs = data.by_name(x, signature, "evaluation")
    outputs = {
        info.name: np.ascontiguousarray(np.asarray(array), info.dtype)
        for info, array in zip(signature.outputs, keras.tree.flatten(result), strict=True)
    }
    count = len(next(iter(inputs.values())))
    for name, array in outputs.items():
        if array.shape[:1] != (count,):
            raise samples_elsewhere(name, model.name, array.shape)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"The Keras model itself gives NaN or infinite values at output `{name}` on the "
                "evaluation data. Mend the model before exporting it."
            )
    asked = by_output(chosen, [info.name for info in signature.outputs])
    nested = _nest(signature, inputs, model)
    labels, counted = counting.count(
        _labels(y, signature),
        counting.sample_weights(weights, signature, outputs),
        counting.keras_masks(model, nested, signature, outputs),
        counting.ignored(model, list(outputs), asked),
        outputs,
    )
    hints = _hints(model, outputs, bool(classes))
    for name, entries in asked.items():
        if any(isinstance(entry, ByList) for entry in entries):
            # Gains of 0 and 1 are no decisions.
            hints[name] = "values"
    kinds = {
        name: {
            "kind": output_meaning.kind_of(array, labels.get(name), hints.get(name)),
            "probabilities": output_meaning.is_probability(array),
        }
        for name, array in outputs.items()
    }
    first = next(iter(outputs))
    kinds[first] |= entities.known_tags(classes, outputs[first])
    one = _nest(signature, {name: array[:1] for name, array in inputs.items()}, model)
    measures = resolve(asked, outputs, labels, kinds, counted, judges=judges)
    figures = _figures(model, judged(outputs, labels, kinds, counted, measures), one)
    return Reference(signature, inputs, outputs, labels, kinds, figures, counted, measures)


def teacher_figures(
    teacher: keras.Model, x: Tensors, reference: Reference
) -> dict[str, Any] | None:
    """Return the figures of the teacher: measured, or as given in a dict.

    Args:
        teacher: A Keras model with the student's inputs and outputs, a dict, or `None`.
        x: Evaluation inputs, nested as Keras takes them.
        reference: Of the student.

    Returns:
        Some of `accuracy`, `parameters`, `bytes`, `latency_ms`.

    Raises:
        TypeError: If a figure in the dict is no number.
        ValueError: If the dict has other keys, or the teacher other outputs.
    """
    if teacher is None:
        return None
    if isinstance(teacher, dict):
        return given_figures(teacher)
    check_model(teacher)
    import keras

    flat = keras.tree.flatten(teacher.predict(x, batch_size=256, verbose=0))
    shapes = [array.shape for array in reference.outputs.values()]
    if [np.shape(array) for array in flat] != shapes:
        raise ValueError(
            f"The teacher `{teacher.name}` has outputs of shape {[np.shape(a) for a in flat]} on "
            f"the evaluation data, the student {shapes}. Pass a teacher for the same task, or a "
            "dict of its figures."
        )
    # The teacher may end in another activation than the student.
    kinds = {
        name: {**kind, "probabilities": output_meaning.is_probability(np.asarray(array))}
        for (name, kind), array in zip(reference.kinds.items(), flat, strict=True)
    }
    outputs = {name: np.asarray(a, np.float32) for name, a in zip(kinds, flat, strict=True)}
    found = judged(outputs, reference.labels, kinds, reference.weights, reference.chosen)
    return to_json(_figures(teacher, found, keras.tree.map_structure(lambda array: array[:1], x)))


def check_teacher(teacher: object) -> None:
    """Refuse what is no teacher to show, before anything runs.

    Raises:
        TypeError: If it is neither a Keras model nor a dict of figures.
        ValueError: If a figure is unknown or lies outside its limits, or the model is not built.
    """
    if isinstance(teacher, dict):
        given_figures(teacher)
    elif teacher is not None:
        check_model(teacher)


def given_figures(teacher: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a teacher as they were given, checked.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is unknown, or lies outside its limits.
    """
    known = ("accuracy", "parameters", "bytes", "latency_ms")
    given = {
        key: teacher[key]
        for key in (names("figures of `teacher`", list(teacher), known) if teacher else ())
        if teacher[key] is not None
    }
    for key, value in given.items():
        number(f"teacher['{key}']", value, whole=key in ("parameters", "bytes"))
        if value < 0 or (key == "accuracy" and value > 1):
            limits = "a share, in [0, 1]" if key == "accuracy" else "not negative"
            raise ValueError(f"`teacher['{key}']` is {limits}. Received: {value!r}.")
    return {
        key: int(value) if key in ("parameters", "bytes") else float(value)
        for key, value in given.items()
    }


def check_arguments(
    model: keras.Model, labels: Sequence[str] | None, normalization: object, chosen: object
) -> None:
    """Refuse class names, normalization and metrics that the graph alone shows to be wrong.

    Args:
        model: A built model; of one without a graph nothing is known yet.
        labels: Names of the classes.
        normalization: See `read_normalization`.
        chosen: The metrics that are asked for, see `chosen.by_output`.

    Raises:
        TypeError: If something is no metric.
        ValueError: As `check_class_names`, `read_normalization` and `chosen.by_output`, or if a
            metric is unknown.
    """
    if not is_symbolic(model):
        return
    signature = describe(model, None, [_empty(tensor) for tensor in model.outputs])
    first = signature.outputs[0]
    # Whole numbers are decisions, whose names only answers can count.
    if len(first.shape) > 1 and first.shape[-1] is not None and first.dtype.startswith("float"):
        _check_count(labels, first.name, first.shape[-1])
    read_normalization(normalization, signature)
    check_metrics(by_output(chosen, [info.name for info in signature.outputs]))


def check_class_names(labels: Sequence[str] | None, reference: Reference) -> None:
    """Refuse class names that are not as many as the first output has classes.

    Raises:
        ValueError: Saying how many there should be, that one is longer than a line, or that there
            are no classes.
    """
    if labels is None:
        return
    name, first = next(iter(reference.outputs.items()))
    if reference.kinds[name]["kind"] == "decisions":
        known = int(first.max(initial=0)) + 1
        if len(labels) < known:
            raise ValueError(
                f"`labels` must name each number that output `{name}` decides for, and it goes up "
                f"to {known - 1} on the evaluation data. Received: {labels!r}."
            )
    else:
        _check_count(labels, name, first.shape[-1] if first.ndim > 1 else 1)
    for label in labels:
        # Files hold one name a line.
        if len(str(label).splitlines()) != 1:
            raise ValueError(f"A name in `labels` must be one line of text. Received: {label!r}.")
    if len(labels) > 1 and reference.kinds[name]["kind"] == "values":
        raise ValueError(
            f"`labels` names classes, and the evaluation labels say that output `{name}` holds "
            f"plain numbers. Leave `labels` out, or pass class indices. Received: {list(labels)!r}."
        )


def _check_count(labels: Sequence[str] | None, name: str, units: int) -> None:
    if labels is not None and len(labels) not in ({units} if units > 1 else {1, 2}):
        raise ValueError(
            f"`labels` must name the {units} classes of output `{name}`. Received: {labels!r}."
        )


def read_normalization(
    normalization: Any, signature: Signature
) -> dict[str, dict[str, list[float]]]:
    """Return `mean` and `std` of the pixels of each image input, checked.

    Args:
        normalization: `None`, `(mean, std)`, or a dict of such pairs by input name.
        signature: Of the model.

    Raises:
        ValueError: If an input is none of the model's or no image, or a value does not fit.
    """
    if normalization is None:
        return {}
    images = {info.name: info for info in signature.inputs if len(info.shape) == 4}
    if not isinstance(normalization, dict):
        if len(images) != 1:
            raise ValueError(
                f"`normalization=(mean, std)` needs a model with one image input (batch, height, "
                f"width, channels), and this one has {len(images)}: {list(images)}. Pass a dict by "
                "input name, or leave it out."
            )
        normalization = {next(iter(images)): normalization}
    result = {}
    for name, pair in normalization.items():
        if name not in images:
            raise ValueError(
                f"`{name}` in `normalization` is no image input (batch, height, width, channels) "
                f"of the model. Its image inputs are {list(images)}."
            )
        channels = images[name].shape[-1]
        try:
            mean, std = (np.asarray(part, np.float64).reshape(-1) for part in pair)
        except (TypeError, ValueError):
            mean = std = np.empty(0)
        fits = all(part.size in (1, channels) and np.isfinite(part).all() for part in (mean, std))
        if not fits or not (std > 0).all():
            raise ValueError(
                f"`normalization` of input `{name}` must be `(mean, std)` in pixels 0..255, each a "
                f"number or {channels} of them, with std above 0. Received: {pair!r}; for inputs "
                "in 0..1 it is (0, 255)."
            )
        # One length for both: readers take a value a channel or one for all.
        length = max(mean.size, std.size)
        result[name] = {
            key: np.broadcast_to(part, length).tolist()
            for key, part in (("mean", mean), ("std", std))
        }
    return result


def _figures(model: keras.Model, judged: KerasFigures, one: Any) -> KerasFigures:
    times = time_calls(lambda: model.predict_on_batch(one), seconds=TIMED)
    return replace(
        judged,
        parameters=int(model.count_params()),
        bytes=int(sum(4 * np.prod(weight.shape) for weight in model.weights)),
        latency_ms=float(np.median(times)) * 1e3,
    )


# What the loss that a model was compiled with says of an output without labels.
_MEANING = {
    **dict.fromkeys(("sparse_categorical_crossentropy", "categorical_crossentropy"), "classes"),
    **dict.fromkeys(("categorical_focal_crossentropy", "categorical_hinge"), "classes"),
    **dict.fromkeys(("mse", "mean_squared_error", "mae", "mean_absolute_error"), "values"),
    **dict.fromkeys(("mape", "mean_absolute_percentage_error", "huber", "log_cosh"), "values"),
    **dict.fromkeys(("msle", "mean_squared_logarithmic_error", "poisson"), "values"),
}


def _hints(model: keras.Model, outputs: Arrays, classes: bool) -> dict[str, str]:
    # Only what is known: the name of a layer, its width or the order of its values prove nothing.
    known = list(outputs)
    losses = counting.losses_by_output(model, known)
    hints = whole_numbers(model, outputs)
    for name, value in losses.items():
        if name in hints:
            continue
        meaning = _MEANING.get(_loss_name(value))
        units = outputs[name].shape[-1] if outputs[name].ndim > 1 else 1
        if meaning == "values" or (meaning and units > 1):
            hints[name] = meaning
        elif _loss_name(value).startswith("binary_"):
            if outputs[name].shape[1:] in ((), (1,)):
                hints[name] = "binary"
            elif units > 1 and not output_meaning.is_distribution(outputs[name]):
                hints[name] = "multilabel"
    if classes and outputs[known[0]].ndim > 1 and known[0] not in hints:
        hints[known[0]] = "classes" if outputs[known[0]].shape[-1] > 1 else "binary"
    return hints


def _loss_name(loss: Losses) -> str:
    if loss is None:
        return ""
    if not isinstance(loss, str):
        loss = getattr(loss, "__name__", type(loss).__name__)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", loss).lower()


def _empty(tensor: keras.KerasTensor) -> np.ndarray:
    dtype = str(tensor.dtype)
    shape = [1 if size is None else size for size in tensor.shape]
    return np.zeros(shape, np.float32 if "float" in dtype else dtype)


def _nest(signature: Signature, arrays: Arrays, model: keras.Model) -> Any:
    return pack(model, signature, [arrays[info.name] for info in signature.inputs])


def _labels(y: Tensors, signature: Signature) -> Arrays:
    if y is None:
        return {}
    known = [info.name for info in signature.outputs]
    if isinstance(y, dict):
        unknown = sorted(set(y) - set(known))
        if unknown:
            raise ValueError(
                f"The evaluation labels name the outputs {unknown}, which the model does not have; "
                f"its outputs are {known}."
            )
        rows = dict(y)
    elif isinstance(y, (list, tuple)) and len(known) > 1:
        if len(y) != len(known):
            raise ValueError(
                f"The evaluation labels are {len(y)} arrays, the model has the {len(known)} "
                f"outputs {known}. Pass a dict by output name to label only some."
            )
        rows = dict(zip(known, y, strict=True))
    elif len(known) > 1:
        raise ValueError(
            f"One array of evaluation labels was given, the model has the outputs {known}. Pass a "
            "dict by output name."
        )
    else:
        rows = {known[0]: y}
    result = {}
    for name, value in rows.items():
        # Of several outputs, some may have no labels.
        if value is None:
            continue
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(
                f"The evaluation labels for output `{name}` have dtype {array.dtype}; class "
                "indices or numbers are needed."
            )
        result[name] = array
    return result
