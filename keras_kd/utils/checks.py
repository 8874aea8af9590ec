"""Bad input found before any work starts: one clear error each."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.utils.data import are_arrays
from keras_kd.utils.types import Data, Losses, Shape, Tensor, Tensors
from keras_kd.utils.values import is_number as is_number
from keras_kd.utils.values import is_whole as is_whole
from keras_kd.utils.values import known_keys as known_keys
from keras_kd.utils.values import number as number
from keras_kd.utils.values import numeric
from keras_kd.utils.values import one_of as one_of
from keras_kd.utils.values import positive as positive
from keras_kd.utils.values import whole as whole


def objective(loss: Losses, distillation_loss: object, distills: bool) -> None:
    """Raise `ValueError` if there is nothing to minimize, or nothing to learn it from."""
    if distills:
        return
    if distillation_loss is not None:
        raise ValueError(
            "A `distillation_loss` was given, and the distiller has no teacher. Pass one, "
            "`Distiller(student, teacher)`, or leave the distillation loss out."
        )
    if loss is None:
        raise ValueError(
            "There is nothing to minimize: the distiller has no teacher and `loss=None`. "
            "Pass a teacher, or a loss on the labels."
        )


def temperature(value: float) -> None:
    """Raise `ValueError` unless the temperature is positive and finite."""
    numeric("temperature", value)
    if not 0 < value < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite. Received: temperature={value!r}. "
            "Typical values lie between 1 and 8."
        )


def weights(
    alpha: float | None, student: float | None, distillation: float | None, labeled: bool
) -> None:
    """Raise `ValueError` for weights that are out of range or contradict each other."""
    given = {
        "alpha": alpha,
        "student_loss_weight": student,
        "distillation_loss_weight": distillation,
    }
    for name, value in given.items():
        if value is not None:
            numeric(name, value)
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
    if student and not labeled:
        raise ValueError(
            f"`student_loss_weight` weighs the hard loss, and there is none with `loss=None`. "
            f"Received: student_loss_weight={student!r}. Leave it out, or pass a `loss`."
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


def number_of_layers(transfer: Any) -> None:
    """Raise `ValueError` where several layers are given to a loss that compares one with one."""
    loss = transfer.loss
    # A function, or a loss of the user's own, may take lists.
    keras_own = isinstance(loss, keras.losses.Loss) and type(loss).__module__.startswith("keras.")
    if not (keras_own or getattr(loss, "single_layer", False)):
        return
    for side in ("teacher", "student"):
        taps = getattr(transfer, side)
        if isinstance(taps, list):
            raise ValueError(
                f"`{transfer.name}` compares one layer with one layer, and several are listed. "
                f"Received: {side}={taps!r}. Use one transfer for each pair of layers."
            )


def per_output(values: object, template: object) -> list[Any]:
    """Losses, labels or weights for each flat output; a single one serves all.

    Args:
        values: One for all outputs, or as many as there are, by name, in order or nested as the
            outputs are.
        template: The outputs with names at the leaves, or `None` where they are
            not known, which stands for a single output.

    Returns:
        One entry for each flat output, `None` where there is none.
    """
    names = keras.tree.flatten(template) if template is not None else [None]
    if isinstance(values, dict):
        if template is None:
            return [None]
        rows = keras.tree.flatten_with_path(template)
        return [_named(values, path, name) for path, name in rows]
    flat = keras.tree.flatten(values)
    if len(flat) == 1:
        return flat * len(names)
    return flat if len(flat) == len(names) else [None] * len(names)


def _named(values: dict[Any, Any], path: tuple[Any, ...], name: str) -> Any:
    """What a dict holds at the place of an output, or under its name."""
    entry: Any = values if path else None
    for key in path:
        if isinstance(entry, dict):
            entry = entry.get(key)
        elif isinstance(entry, list | tuple) and isinstance(key, int) and key < len(entry):
            entry = entry[key]
        else:
            entry = None
    return values.get(name) if entry is None else entry


def training_data(x: Data, y: Data, loss: Losses, metrics: bool) -> None:
    """Raise `ValueError` for data that cannot be trained on.

    Arrays are looked at whole; of a `tf.data.Dataset` the element types and
    the length, since reading it would disturb its order.

    Args:
        x: What `fit` was given.
        y: Labels, or `None`.
        loss: The hard loss, or `None`.
        metrics: Whether metrics read labels.
    """
    _not_ragged(x)
    if hasattr(x, "element_spec"):
        _dataset(x, loss, metrics)
        return
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches == 0:
            raise ValueError(_EMPTY + "the dataset yields no batch.")
        return
    if not are_arrays(x):
        return
    _arrays(x, "x")
    if y is None and (loss is not None or metrics):
        raise ValueError(
            "There are no labels, and `compile` was given a loss or metrics that read them. Pass "
            "`y`, or compile with `loss=None` and no metrics to distil without labels."
        )


def more_data(arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for weights and validation data that cannot be used.

    Args:
        arguments: The other arguments of `fit`.
    """
    weight, validation = arguments.get("sample_weight"), arguments.get("validation_data")
    if weight is not None:
        _arrays(weight, "sample_weight")
    if isinstance(validation, list | tuple) and are_arrays(validation[0]):
        _arrays(validation[0], "the `x` of `validation_data`")


_EMPTY = "The training data are empty: "


def _not_ragged(x: Tensors) -> None:
    """Keras 3 layers read no ragged tensors, and say so late and in other words."""
    for leaf in keras.tree.flatten(getattr(x, "element_spec", x)):
        if type(leaf).__name__ in ("RaggedTensor", "RaggedTensorSpec"):
            raise ValueError(
                "The data hold ragged tensors, which Keras 3 layers do not read. Pad them: "
                "`tensor.to_tensor()`, in a dataset `dataset.map(lambda x, y: (x.to_tensor(), "
                "y.to_tensor()))` or `padded_batch`, and mask the padding with "
                "`Embedding(mask_zero=True)` or a weight for each token."
            )


def _arrays(values: Tensors, name: str) -> None:
    for leaf in keras.tree.flatten(values):
        array = as_array(leaf)
        if array.ndim and len(array) == 0:
            raise ValueError(f"{_EMPTY}{_quoted(name)} has no rows.")
        require_finite(array, name)


def _dataset(dataset: Any, loss: Losses, metrics: bool) -> None:
    cardinality = getattr(dataset, "cardinality", None)
    if cardinality is not None and int(cardinality()) == 0:
        raise ValueError(_EMPTY + "the dataset yields no batch.")
    labels = keras.utils.unpack_x_y_sample_weight(dataset.element_spec)[1]
    if labels is None and (loss is not None or metrics):
        raise ValueError(
            "The dataset yields no labels, and `compile` was given a loss or metrics that read "
            "them. Yield `(x, y)`, or compile with `loss=None` to distil without labels."
        )


def first_rows(x: Data, must_be_real: bool, batch_size: int | None = None) -> tuple[Any, bool, Any]:
    """The first rows of what `fit` was given: a few, or the first batch if they must be real.

    Args:
        x: What `fit` was given.
        must_be_real: Whether zeros in the shape of the data are not enough.
            Those spare a `tf.data.Dataset`, which cannot be looked into
            without starting its pipeline.
        batch_size: Rows a batch of arrays; `None` is Keras's 32.

    Returns:
        The rows, or `None` where nothing can be read; whether they are rows of
        the data; and what takes the place of `x`, since a generator that was
        looked into begins with its second batch.

    Raises:
        ValueError: If there is no first batch.
    """

    def head(batch: Tensors) -> Any:
        rows = keras.utils.unpack_x_y_sample_weight(batch)[0]
        return keras.tree.map_structure(lambda leaf: leaf if must_be_real else leaf[:8], rows)

    if are_arrays(x):
        count = (batch_size or 32) if must_be_real else 8
        rows = keras.tree.map_structure(lambda leaf: leaf[:count], x)
        # Data frames have no shape that a model reads.
        pandas = any(type(leaf).__module__.startswith("pandas") for leaf in keras.tree.flatten(x))
        return keras.tree.map_structure(np.asarray, rows) if pandas else rows, True, x
    if hasattr(x, "element_spec") and hasattr(x, "take"):
        spec = keras.utils.unpack_x_y_sample_weight(x.element_spec)[0]
        if not must_be_real and all(_has_shape(leaf) for leaf in keras.tree.flatten(spec)):
            zeros = keras.tree.map_structure(
                lambda leaf: np.zeros((1, *leaf.shape[1:]), leaf.dtype.as_numpy_dtype), spec
            )
            return zeros, False, x
        for batch in x.take(1):
            return head(batch), True, x
        raise ValueError(_EMPTY + "the dataset yields no batch.")
    if isinstance(x, keras.utils.PyDataset):
        return head(x[0]), True, x
    if isinstance(x, Iterator):
        try:
            first = next(x)
        except StopIteration:
            raise ValueError(_EMPTY + "the generator yields no batch.") from None
        return head(first), True, _again(first, x)
    return None, False, x


def _has_shape(spec: Any) -> bool:
    shape = getattr(spec, "shape", None)
    if shape is None or not shape.rank or None in tuple(shape[1:]):
        return False
    return bool(spec.dtype.is_floating or spec.dtype.is_integer)


def _again(first: Tensors, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def finite(values: Tensors) -> bool:
    """Whether every number in a structure of arrays is finite."""
    for leaf in keras.tree.flatten(values):
        leaf = leaf.value if isinstance(leaf, keras.Variable) else leaf
        if keras.config.backend() == "jax" and ops.is_tensor(leaf):
            # One number, since other processes may hold parts of the array.
            if not bool(ops.all(ops.isfinite(leaf))):
                return False
            continue
        array = ops.convert_to_numpy(leaf)
        if array.dtype.kind not in "iubSUO" and not np.isfinite(array.astype("float64")).all():
            return False
    return True


def _quoted(name: str) -> str:
    return name if "`" in name else f"`{name}`"


def may_be_one(one: Shape, other: Shape) -> bool:
    """Whether two shapes are one, as far as they are known: no axis is spread over another."""
    known = zip(one, other, strict=False)
    return len(one) == len(other) and all(a == b or None in (a, b) for a, b in known)


def as_array(leaf: Tensor) -> np.ndarray:
    """An array of NumPy of an array or tensor, wherever that lies.

    Raises:
        ValueError: If values of it are masked, which a plain array would show again.
    """
    if np.ma.is_masked(leaf):
        hidden = int(np.ma.getmaskarray(leaf).sum())
        raise ValueError(
            f"{hidden} values of an array of shape {np.shape(leaf)} are masked, and what lies "
            "under the mask is no value. Fill them (`array.filled(...)`), or leave those rows out."
        )
    return np.asarray(ops.convert_to_numpy(leaf) if ops.is_tensor(leaf) else leaf)


def require_finite(array: np.ndarray, name: str) -> None:
    """Raise `ValueError` for NaN and infinite values, with the rows that hold them."""
    if not np.issubdtype(array.dtype, np.floating):
        return
    # NaN and infinities show in the extremes, which need no array of booleans.
    with np.errstate(invalid="ignore"):
        low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        raise ValueError(
            f"{_quoted(name)} holds NaN or infinite values in {len(rows)} of {len(array)} rows, "
            f"the first is row {rows[0]}. Remove or repair them before training."
        )


def logits_flags(from_logits: bool | dict[str, bool | None] | None) -> dict[str, bool | None]:
    """What is told of each side, whether its outputs are logits.

    Raises:
        TypeError: If it is told as something else.
        ValueError: If a side is called otherwise.
    """
    both: dict[str, Any] = {"teacher": from_logits, "student": from_logits}
    found = from_logits if isinstance(from_logits, dict) else both
    for value in found.values():
        if value is not None and not isinstance(value, bool | np.bool_):
            raise TypeError(
                "`from_logits` is True, False, or None to find out, or a dict of these for "
                f"'teacher' and 'student'. Received: from_logits={from_logits!r}."
            )
    known_keys(found, ("teacher", "student"), "from_logits")
    return found


def functions(**given: object) -> None:
    """Raise `TypeError` unless each argument is a function, or `None`."""
    for name, value in given.items():
        if value is not None and not callable(value):
            raise TypeError(
                f"`{name}` is a function from one batch `x` to what the model reads, or None. "
                f"Received: {name}={value!r}."
            )


def require_model(model: object, side: str) -> None:
    """Raise `TypeError` unless `model` is a Keras 3 model."""
    if isinstance(model, keras.Model):
        return
    if any(base.__module__.split(".")[0] == "tf_keras" for base in type(model).__mro__):
        raise TypeError(
            f"The {side} `{getattr(model, 'name', model)}` is a tf_keras (Keras 2) model. "
            "Rebuild it with Keras 3 and copy its weights: "
            "`new.set_weights(old.get_weights())`."
        )
    raise TypeError(
        f"The {side} must be a `keras.Model`. Received: {side} of type {type(model).__name__}."
    )
