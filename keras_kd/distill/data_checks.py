"""Whether arrays, labels and weights fit the models, found out before any step is taken."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd.cache.join_datasets import Joined
from keras_kd.distill import label_checks
from keras_kd.distill.pairing import Pairing
from keras_kd.models import meaning
from keras_kd.teachers.row_numbers import Numbered
from keras_kd.utils import checks
from keras_kd.utils.data import are_arrays, known_shape, labels_of
from keras_kd.utils.types import Data, Losses, Tensor, Tensors

# --------------------------------------------------------------------------- data


def data(
    pairing: Pairing, x: Data, y: Tensors | None, arguments: dict[str, Any], loss: Losses
) -> None:
    """Raise `ValueError` for data of `fit` that no step can be taken on.

    Args:
        pairing: The distiller's models and transfers.
        x: What `fit` was given.
        y: Labels.
        arguments: The other arguments of `fit`.
        loss: The hard loss, or `None`.
    """
    _pair(pairing, x, y, arguments.get("sample_weight"), loss, "")
    _same_rows(x, y, arguments.get("sample_weight"), "The arrays")
    _class_weights(arguments.get("class_weight"), pairing)
    if arguments.get("class_weight") is not None:
        _classes_of_samples(known_shape(labels_of(x, y)), loss)
    given = arguments.get("validation_data")
    if given is None:
        return
    if not isinstance(given, list | tuple):
        if not _is_data(given):
            raise TypeError(
                "`validation_data` is `(x, y)`, `(x, y, sample_weight)` or a dataset of batches. "
                f"Received: validation_data of type {type(given).__name__}."
            )
        _pair(pairing, given, None, None, loss, "`validation_data`")
        return
    if not 1 <= len(given) <= 3:
        raise ValueError(
            "`validation_data` is `(x, y)` or `(x, y, sample_weight)`. Received: "
            f"{len(given)} values."
        )
    held, labels, weight = keras.utils.unpack_x_y_sample_weight(tuple(given))
    _pair(pairing, held, labels, weight, loss, "`validation_data`")
    _same_rows(held, labels, weight, "The arrays of `validation_data`")


def _same_rows(x: Any, y: Any, weight: Any, what: str) -> None:
    """Raise `ValueError` where arrays of the same samples have different numbers of rows."""
    parts = {"x": x, "y": y, "sample_weight": weight}
    if isinstance(x, Numbered):
        parts.update(x=x.x, indices=x.indices)
    rows = {
        name: {size for leaf in keras.tree.flatten(part) for size in np.shape(leaf)[:1]}
        for name, part in parts.items()
        if part is not None and are_arrays(part)
    }
    if "x" in rows and len(set().union(*rows.values())) > 1:
        raise ValueError(
            f"{what} have different numbers of rows: "
            + ", ".join(f"{name} {_numbers(found)}" for name, found in rows.items())
            + ". Each sample needs one row in each."
        )


def _is_data(given: object) -> bool:
    return (
        hasattr(given, "element_spec")
        or isinstance(given, keras.utils.PyDataset | Iterator)
        or hasattr(given, "__iter__")
        or hasattr(given, "__array__")
    )


def _numbers(found: Iterable[Any]) -> str:
    return " and ".join(str(n) for n in sorted(found))


def _pair(
    pairing: Pairing, x: Data, y: Tensors | None, weight: Tensors | None, loss: Losses, where: str
) -> None:
    """Look at inputs, labels and weights of one kind of data."""
    spec = getattr(x, "element_spec", None)
    if spec is not None:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(_unjoined(spec))
    elif not are_arrays(x):
        return
    of = f" of {where}" if where else ""
    _inputs(pairing, x, where)
    label_checks.require(
        label_checks.of_distiller(pairing, loss), y, pairing.student.template, f"`y`{of}"
    )
    if weight is not None:
        for leaf in keras.tree.flatten(weight):
            kind = label_checks.no_number(leaf)
            if kind is not None:
                raise ValueError(f"`sample_weight`{of} holds {kind}, and weights are numbers.")
            if where and hasattr(leaf, "__array__"):
                array = np.asarray(leaf)
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise ValueError(
                        f"`sample_weight`{of} is NaN or infinite in "
                        f"{int((~np.isfinite(array)).sum())} places. Repair them."
                    )
        _weight_shapes(pairing, y, weight, f"`sample_weight`{of}")


def _weight_shapes(pairing: Pairing, y: Tensors | None, weight: Tensors | None, name: str) -> None:
    """Compare weights with what losses give of an output: a value a sample, or a token, a pixel."""
    student = pairing.student
    labels = checks.per_output(y, student.template)
    for i, one in enumerate(checks.per_output(weight, student.template)):
        output: Any = student.shapes[i] if student.shapes is not None else None
        # A spec of unknown rank has no shape that could be read.
        given: Any = getattr(one, "shape", None)
        shape = () if given is None or getattr(given, "rank", 0) is None else tuple(given)
        if output is None or not shape:
            continue
        found = shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape
        label: Any = getattr(labels[i], "shape", None)
        # Classes may lie on another axis than the last; labels then tell the places.
        places = [tuple(output)[:-1], *([tuple(label or ())] if _indexes(label, output) else [])]
        if not any(_covers(found, each) for each in places):
            kinds = " or ".join(
                f"({', '.join(['samples', *map(str, part)])})"
                for part in dict.fromkeys(((), tuple(output)[1:-1]))
            )
            raise ValueError(
                f"{name} has the shape {shape}, and the student `{student.model.name}` returns "
                f"{tuple(output)}. Pass one weight for each sample, or for each place that the "
                f"loss reads: shape {kinds}."
            )


def _indexes(label: Tensor, output: Tensor) -> bool:
    """Whether labels are class numbers, of one dimension less than the outputs."""
    return label is not None and getattr(label, "rank", 0) is not None and len(label) < len(output)


def _covers(weight: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether weights fit the first axes of values, 1 standing for any size."""
    return len(weight) <= len(values) and all(
        one in (None, 1) or other is None or one == other
        for one, other in zip(weight[1:], values[1:])
    )


def _unjoined(spec: object) -> Any:
    """The element of a dataset, whose inputs may have the answers of a cache beside them."""
    first, *rest = spec if type(spec) is tuple else (spec,)
    return (first.x if isinstance(first, Joined) else first, *rest)


def _inputs(pairing: Pairing, x: Data, where: str) -> None:
    """Compare inputs with what the student declares to read."""
    model = pairing.student.model
    name = f"the `x` of {where}" if where else "`x`"
    declared = keras.tree.flatten(getattr(model, "inputs", None) or [])
    text = not declared or any(str(tensor.dtype) == "string" for tensor in declared)
    own = pairing.student_inputs is not None or pairing.teacher_inputs is not None
    for leaf in keras.tree.flatten(x):
        kind = label_checks.no_number(leaf)
        if kind is not None and not (kind == "text" and (text or own)):
            raise ValueError(
                f"{name[0].upper()}{name[1:]} holds {kind} (dtype {leaf.dtype}), and the student "
                f"`{model.name}` reads numbers. Convert it to an array of numbers, padded to one "
                "shape."
            )
    if own or not declared:
        return
    for leaf, tensor in _matched(x, model, declared):
        shape = tuple(getattr(leaf, "shape", None) or ())
        wanted = tuple(tensor.shape)
        if len(shape) == len(wanted) and any(
            None not in (a, b) and a != b for a, b in zip(shape[1:], wanted[1:])
        ):
            raise ValueError(
                f"{name[0].upper()}{name[1:]} has the shape {shape}, and the student "
                f"`{model.name}` reads inputs of shape {wanted}. Pass data of that form."
            )


def _matched(x: Data, model: keras.Model, declared: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Inputs beside what the model declares, as far as they meet by name or order."""
    if isinstance(x, dict):
        by_name = {tensor.name: tensor for tensor in declared}
        return [(leaf, by_name[key]) for key, leaf in x.items() if key in by_name]
    leaves = keras.tree.flatten(x)
    return list(zip(leaves, declared)) if len(leaves) == len(declared) else []


# ------------------------------------------------------------------------- weights


def _classes_of_samples(labels: tuple[Any, ...] | None, loss: Losses) -> None:
    """Raise `ValueError` where Keras would read the class of a sample from what is none.

    It takes the place of the greatest label along the last axis for the class of the whole sample.
    """
    told = meaning.of_loss(loss)
    if labels is None or told not in (meaning.CLASSES, meaning.INDEPENDENT):
        return
    sparse = meaning.function_of(loss) is keras.losses.sparse_categorical_crossentropy
    one_hot = told == meaning.CLASSES and not sparse
    places = labels[1:-1] if one_hot else labels[1:]
    if all(size == 1 for size in places):
        return
    raise ValueError(
        f"`class_weight` gives a weight to each sample by its class, and the labels of shape "
        f"{labels} hold several for each sample, of which Keras would take the place of the "
        "greatest for the class. Pass "
        + (
            "weights for each output in a loss of your own."
            if told == meaning.INDEPENDENT
            else f"`sample_weight` of shape {labels[: len(labels) - one_hot]} instead, one weight "
            "for each place."
        )
    )


def _class_weights(given: object, pairing: Pairing) -> None:
    """Raise unless each class has one finite weight that is not negative."""
    if given is None:
        return
    advice = "`class_weight` is a dict from class numbers to weights, as {0: 1.0, 1: 2.5}."
    if not isinstance(given, dict):
        raise TypeError(f"{advice} Received: class_weight of type {type(given).__name__}.")
    shapes = pairing.student.shapes
    classes = None
    if shapes is not None and len(shapes) == 1:
        # One unit tells two classes apart.
        classes = 2 if shapes[0][-1] == 1 else shapes[0][-1]
    for key, value in given.items():
        if not checks.is_whole(key) or key < 0 or (classes is not None and key >= classes):
            known = f" of 0 to {classes - 1}" if classes is not None else ""
            raise ValueError(f"{advice} Received: the key {key!r}, which is no class{known}.")
        if not checks.is_number(value) or not 0 <= value < math.inf:
            raise ValueError(
                f"{advice} A weight is finite and not negative. Received: {value!r} for class "
                f"{key}."
            )
    if not any(given.values()):
        raise ValueError(f"{advice} Received: no weight that is more than 0, so nothing trains.")
