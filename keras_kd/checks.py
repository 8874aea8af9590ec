"""Bad input found before any work starts: one clear error each."""

import difflib
import math
import os
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np


def known_keys(given: Iterable[str], known: Sequence[str], argument: str) -> None:
    """Raise `ValueError` for a key that is not known, with close matches."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"`{argument}` has the unknown key {key!r}. Expected "
                f"{', '.join(repr(k) for k in known) or 'no keys'}.{hint}"
            )


def temperature(value: float) -> None:
    """Raise `ValueError` unless the temperature is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite. Received: temperature={value!r}. "
            "Typical values lie between 1 and 8."
        )


def weights(
    alpha: float | None, student: float | None, distillation: float | None, labeled: bool
) -> None:
    """Raise `ValueError` for weights that are out of range or contradict each other."""
    if alpha is not None and (student is not None or distillation is not None):
        raise ValueError(
            "`alpha` and the explicit weights are two ways to say the same. Received: "
            f"alpha={alpha!r}, student_loss_weight={student!r}, "
            f"distillation_loss_weight={distillation!r}. Give `alpha` alone, or the two weights."
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(
            f"`alpha` weighs the hard loss and lies in [0, 1]. Received: alpha={alpha!r}. For "
            "other sums use `student_loss_weight` and `distillation_loss_weight`."
        )
    if alpha and not labeled:
        raise ValueError(
            f"`alpha` weighs the hard loss, and there is none with `loss=None`. Received: "
            f"alpha={alpha!r}. Leave it out, or pass a `loss`."
        )
    for name, value in (
        ("student_loss_weight", student),
        ("distillation_loss_weight", distillation),
    ):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(
                f"`{name}` must be finite and not negative. Received: {name}={value!r}."
            )


def unique(names: Sequence[str], what: str) -> None:
    """Raise `ValueError` if two things would share one name in the logs."""
    reserved = {"loss", "student_loss", "distillation_loss", "agreement", "alpha", "temperature"}
    for i, name in enumerate(names):
        if name in reserved or name in names[:i]:
            why = "is a log of the distiller" if name in reserved else "is used twice"
            raise ValueError(
                f"The {what} name `{name}` {why}. Give each {what} a `name=` of its own."
            )


def student_loss(loss: Any, kinds: Sequence[str]) -> None:
    """Warn where the hard loss takes logits for probabilities."""
    flat = keras.tree.flatten(loss)
    for one, kind in zip(flat if len(flat) == len(kinds) else [], kinds):
        name = one if isinstance(one, str) else getattr(one, "name", "")
        crossentropy = isinstance(name, str) and name.endswith("crossentropy")
        if crossentropy and kind == "logits" and not getattr(one, "from_logits", False):
            warnings.warn(
                f"The student ends in logits, and the loss `{name}` expects probabilities. Use "
                "the loss with `from_logits=True`.",
                stacklevel=4,
            )


def one_unit_is_binary(loss: Any, student: str) -> None:
    """Raise `ValueError` where one linear unit may be a regression."""
    flat = keras.tree.flatten(loss)
    names = [str(one if isinstance(one, str) else getattr(one, "name", one)) for one in flat]
    if flat and flat != [None] and not any("crossentropy" in name for name in names):
        raise ValueError(
            f"The student `{student}` has one linear output unit, and `loss={names[0]!r}` does not "
            "say that it classifies. Name the distillation loss: `keras_kd.losses.LogitMSE()` for "
            "a regression, `keras_kd.losses.BinarySoftTargets()` for two classes."
        )


def output_order(ours: Any, theirs: Any) -> list[int]:
    """For each flat output of the student the teacher's flat output that answers it.

    Args:
        ours: The student's output names, as its outputs are structured.
        theirs: The teacher's.

    Returns:
        Indices into the teacher's flat outputs.

    Raises:
        ValueError: If the outputs cannot be matched.
    """
    mine, other = keras.tree.flatten(ours), keras.tree.flatten(theirs)
    if isinstance(ours, dict) or isinstance(theirs, dict):
        if set(mine) <= set(other):
            return [other.index(name) for name in mine]
        if len(mine) == 1 == len(other):
            return [0]
        raise ValueError(
            f"The outputs of student and teacher do not match by name. Received: student "
            f"{mine}, teacher {other}. Name them alike."
        )
    if len(mine) != len(other):
        raise ValueError(
            f"The student has {len(mine)} outputs and the teacher {len(other)}: {mine} and "
            f"{other}. Give both the same outputs, or return dicts to match them by name."
        )
    return list(range(len(mine)))


def logit_loss_fits(transfer: Any, binary: bool, kind: str, shape: Any, side: str) -> None:
    """Raise `ValueError` where a loss on class logits meets independent outputs, or the reverse."""
    independent = kind == "sigmoid" or shape[-1] == 1
    if independent and not binary and not _plain_difference(transfer):
        what = "one unit" if shape[-1] == 1 else "independent sigmoid units"
        regression = ", or `LogitMSE()` for a regression" if shape[-1] == 1 else ""
        raise ValueError(
            f"`{transfer.name}` compares distributions over classes, and the {side} ends in "
            f"{what}. Use `keras_kd.losses.BinarySoftTargets()`{regression}."
        )
    if binary and kind == "softmax":
        raise ValueError(
            f"`{transfer.name}` compares independent sigmoid outputs, and the {side} ends in a "
            "softmax. Use `keras_kd.losses.SoftTargets()`."
        )


def _plain_difference(transfer: Any) -> bool:
    return type(transfer.loss).__name__ in ("LogitMSE", "LogitHuber")


def same_classes(teacher: Any, student: Any) -> None:
    """Raise `ValueError` unless both sides have the same classes."""
    if None not in (teacher[-1], student[-1]) and teacher[-1] != student[-1]:
        raise ValueError(
            f"The teacher has {teacher[-1]} classes and the student {student[-1]}. Give the "
            "student's last layer as many units as the teacher's, or distil from inner layers "
            "alone with transfers."
        )


def training_data(x: Any, y: Any, loss: Any, shapes: Any, metrics: bool) -> None:
    """Raise `ValueError` for data that cannot be trained on.

    Arrays are looked at whole; of a `tf.data.Dataset` the element types and
    the length, since reading it would disturb its order.

    Args:
        x: What `fit` was given.
        y: Labels, or `None`.
        loss: The hard loss, or `None`.
        shapes: Shapes of the student's flat outputs, or `None`.
        metrics: Whether metrics read labels.
    """
    if hasattr(x, "element_spec"):
        _dataset(x, loss)
        return
    arrays = [leaf for leaf in keras.tree.flatten(x) if isinstance(leaf, np.ndarray)]
    for array in arrays:
        if len(array) == 0:
            raise ValueError("The training data are empty: `x` has no rows.")
        _finite(array, "x")
    if arrays and y is None and (loss is not None or metrics):
        raise ValueError(
            "There are no labels, and `compile` was given a loss or metrics that read them. Pass "
            "`y`, or compile with `loss=None` and no metrics to distil without labels."
        )
    labels, losses = keras.tree.flatten(y), keras.tree.flatten(loss)
    if len(losses) == 1:
        losses = losses * len(labels)
    for i, (one, label) in enumerate(zip(losses, labels)):
        if isinstance(label, np.ndarray):
            classes = shapes[i][-1] if shapes is not None and i < len(shapes) else None
            _labels(label, one, classes)


def _dataset(dataset: Any, loss: Any) -> None:
    cardinality = getattr(dataset, "cardinality", None)
    if cardinality is not None and int(cardinality()) == 0:
        raise ValueError("The training data are empty: the dataset yields no batch.")
    spec = dataset.element_spec
    if isinstance(spec, tuple) and len(spec) > 1:
        labels, losses = keras.tree.flatten(spec[1]), keras.tree.flatten(loss)
        for label, one in zip(labels, losses if len(losses) > 1 else losses * len(labels)):
            if _is_sparse(one) and hasattr(label, "dtype") and label.dtype.is_floating:
                _refuse_float_labels(label.dtype.name)
    elif loss is not None:
        raise ValueError(
            "The dataset yields no labels, and `compile` was given a loss that reads them. Yield "
            "`(x, y)`, or compile with `loss=None` to distil without labels."
        )


def _finite(array: np.ndarray, name: str) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        return
    # NaN and infinities show in the extremes, which need no array of booleans.
    with np.errstate(invalid="ignore"):
        low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        raise ValueError(
            f"`{name}` holds NaN or infinite values in {len(rows)} of {len(array)} rows, the "
            f"first is row {rows[0]}. Remove or repair them before training."
        )


def _labels(labels: np.ndarray, loss: Any, classes: int | None) -> None:
    _finite(labels, "y")
    if not _is_sparse(loss):
        return
    if np.issubdtype(labels.dtype, np.floating):
        _refuse_float_labels(str(labels.dtype))
    ignored = getattr(loss, "ignore_class", None)
    counted = labels if ignored is None else labels[labels != ignored]
    if classes is None or counted.size == 0:
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"Labels run from {low} to {high}, and the student has {classes} classes, numbered 0 "
            f"to {classes - 1}. Renumber the labels, or give the student more outputs."
        )


def _refuse_float_labels(dtype: str) -> None:
    raise ValueError(
        f"The loss reads integer labels, and `y` is {dtype}. Convert them with "
        "`y.astype('int32')`, or use a categorical loss for one-hot labels."
    )


def _is_sparse(loss: Any) -> bool:
    if isinstance(loss, str):
        return loss == "sparse_categorical_crossentropy"
    return (
        isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        or loss is keras.losses.sparse_categorical_crossentropy
    )


def first_batch(x: Any, size: int = 32) -> Any:
    """A few rows of what `fit` was given, or `None` where reading would use them up."""
    if hasattr(x, "element_spec"):
        batch = next(iter(x.take(1)), None)
    elif isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    else:
        leaves = keras.tree.flatten(x)
        if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
            return None
        return keras.tree.map_structure(lambda leaf: leaf[:size], x)
    return None if batch is None else keras.utils.unpack_x_y_sample_weight(batch)[0]


def keras_file(path: Any) -> None:
    """Raise unless `path` is a whole `.keras` archive."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file `{path}`.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"`{path}` is no `.keras` file, or only a part of one: it is not a zip archive. Save "
            "the model again with `model.save('name.keras')`."
        )
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        damaged = archive.testzip()
    if "config.json" not in names or damaged is not None:
        raise ValueError(
            f"`{path}` is no `.keras` file"
            + (f": `{damaged}` in it is damaged." if damaged else ": it has no `config.json`.")
        )
