"""A model, whatever it ends in, as logits of exclusive classes: what attacks and reports read.

`Classifier` reads a Keras model and has gradients; `FileClassifier` reads an exported file, which
has none. In a training, `of_student` and `of_teacher` read the models of a distiller; nothing else
in `keras_kd.robust` reaches into it. May import: the models' readers, `export.load`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd import backends
from keras_kd.distill import hooks
from keras_kd.models import meaning
from keras_kd.models.model_reader import Reader
from keras_kd.robust.formulas import two_sided
from keras_kd.utils import checks
from keras_kd.utils.checks import require_model
from keras_kd.utils.types import Tensor

Logits = Callable[[Tensor], Tensor]
"""From inputs `(batch, ...)` to logits `(batch, classes)`, in inference mode."""


class Classifier:
    """A Keras model as logits, with gradients with respect to its input.

    Args:
        model: A `keras.Model` with one input and one output, logits or probabilities of exclusive
            classes, or one unit for yes and no.
        rows: A few inputs, which tell what the layers do not.
        from_logits: Whether outputs are logits; `None` finds out.

    Attributes:
        model: The model.
        classes: How many classes there are.
        probabilities: Whether the logits are logarithms of probabilities that come from no layer
            whose logits could be read: gradients of saturated ones are lost.

    Raises:
        TypeError: If it is no Keras 3 model.
        ValueError: If it has several inputs or outputs, or other outputs than those.
    """

    def __init__(
        self, model: keras.Model, rows: np.ndarray, from_logits: bool | None = None
    ) -> None:
        require_model(model, "model")
        self.model = model
        self.name = str(model.name)
        inputs = keras.tree.flatten(getattr(model, "inputs", None) or [None])
        if len(inputs) != 1:
            raise ValueError(
                f"Robustness is measured on models with one input, and `{self.name}` has "
                f"{len(inputs)}. Wrap it in a model of the input that is attacked."
            )
        _require_shape(inputs[0], rows, self.name)
        self._reader, self.probabilities = _reader(model, rows, from_logits)
        shapes = self._reader.shapes or []
        if len(shapes) > 1:
            raise ValueError(
                f"Robustness is measured on models with one output, and `{self.name}` has "
                f"{len(shapes)}. Make a model of the output that decides: "
                "`keras.Model(model.input, model.outputs[0])`."
            )
        output = ops.shape(self._reader.run(rows[:1], False))
        if len(output) != 2:
            raise ValueError(
                "Robustness is measured on one decision a row, `(batch, classes)`. The outputs of "
                f"`{self.name}` have shape {tuple(map(int, output))}."
            )
        self.units = int(output[-1])
        if self.units > 1 and self._reader.kinds()[0] == "sigmoid":
            raise ValueError(
                f"The model `{self.name}` answers {self.units} independent questions by sigmoids, "
                "and robustness is measured on one decision among exclusive classes."
            )
        self.classes = max(2, self.units)
        self._program = backends.program(self.logits, [model])

    def require_attackable(self) -> None:
        """Raise `TypeError` where the model reads whole numbers, which no small step changes."""
        flat = keras.tree.flatten(getattr(self.model, "inputs", None) or [])
        if flat and not keras.backend.is_float_dtype(flat[0].dtype):
            raise TypeError(
                f"An attack moves inputs by small steps, and `{self.name}` reads {flat[0].dtype}, "
                "which rounds them off. Attack a model of its layers with a float input, such as "
                "the embedded words or the pixels before they are rounded."
            )

    def logits(self, x: Tensor) -> Tensor:
        """The logits of a batch in inference mode, `(batch, classes)`."""
        units = (meaning.INDEPENDENT,) if self.units == 1 else ()
        return two_sided(self._reader.read(x, False, units).logits[0])

    def predict(self, x: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """The logits of many rows, float32 `(rows, classes)`."""
        return in_batches(self._program, batch_size, x)


def _require_shape(declared: Any, rows: np.ndarray, name: str) -> None:
    """Raise `ValueError` for rows of another shape than the input has, where it is known."""
    wanted = getattr(declared, "shape", None)
    if wanted is None:
        return
    given = tuple(np.shape(rows))
    if len(given) != len(wanted) or any(
        size not in (None, found) for size, found in zip(wanted[1:], given[1:])
    ):
        raise ValueError(
            f"`{name}` reads inputs of shape {tuple(wanted)}, and `x` has rows of shape "
            f"{given[1:]}."
        )


def _reader(model: keras.Model, rows: np.ndarray, from_logits: bool | None) -> tuple[Reader, bool]:
    found = Reader(model, "model", from_logits)
    found.inspect(rows)
    try:
        found.require_logits(0)
        return found, from_logits is False
    except ValueError:
        if from_logits is not None:
            raise
    # They look like probabilities, so that their logarithm is what there is.
    found = Reader(model, "model", False)
    found.inspect(rows)
    found.require_logits(0)
    return found, True


class FileClassifier:
    """An exported file as logits: outputs of it, or the logarithm of its probabilities.

    Args:
        file: What `keras_kd.export.load` returned.
        rows: A few inputs.
        from_logits: Whether its answers are logits; `None` judges by those to `rows`.

    Attributes:
        classes: How many classes there are.
        probabilities: Whether the file returns probabilities.

    Raises:
        ValueError: If it has several inputs or outputs, or other outputs than classes.
    """

    def __init__(self, file: Any, rows: np.ndarray, from_logits: bool | None = None) -> None:
        self.file = file
        self.name = str(file.path.name)
        if len(file.inputs) != 1 or len(file.outputs) != 1:
            raise ValueError(
                f"Robustness is measured on files with one input and one output. `{self.name}` has "
                f"{len(file.inputs)} and {len(file.outputs)}."
            )
        answers = np.asarray(file(rows))
        if answers.ndim != 2:
            raise ValueError(
                "Robustness is measured on one decision a row, `(batch, classes)`. The outputs of "
                f"`{self.name}` have shape {answers.shape}."
            )
        self.units = answers.shape[1]
        self.classes = max(2, self.units)
        low, high, sums = answers.min(), answers.max(), answers.sum(axis=1)
        # Sums of int8 probabilities are off by half a step a class.
        even = self.units == 1 or bool(np.all(np.abs(sums - 1) <= 0.02 + self.units / 512))
        alike = bool(low >= 0 and high <= 1 + 1e-3 and even)
        if from_logits is False and not alike:
            raise ValueError(
                f"`{self.name}` answers with values from {low:.4g} to {high:.4g}, which are no "
                "probabilities. Leave out `from_logits=False`."
            )
        self.probabilities = alike if from_logits is None else not from_logits

    def predict(self, x: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """The logits of many rows, float32 `(rows, classes)`."""
        answers = np.asarray(self.file(x), "float32")
        if self.units > 1:
            return np.log(np.maximum(answers, 1e-30)) if self.probabilities else answers
        if self.probabilities:
            p = np.clip(answers, 1e-7, 1 - 1e-7)
            answers = np.log(p) - np.log1p(-p)
        return np.concatenate([np.zeros_like(answers), answers], axis=1)


def in_batches(program: Callable[..., Any], batch_size: int, *arrays: np.ndarray) -> Any:
    """What a compiled function says of many rows.

    Args:
        program: `fn(*tensors)`: a tensor or a tuple of them, a row for each row.
        batch_size: Rows at once. All batches have this many, and few rows a power of two, so that
            few programs do for all.
        *arrays: With as many rows each.

    Returns:
        An array, or a tuple of arrays.
    """
    parts: list[Any] = []
    rows = len(arrays[0])
    size = min(batch_size, 1 << max(rows - 1, 0).bit_length())
    for start in range(0, rows, size):
        chosen = np.arange(start, start + size)
        # A batch is filled up with the last row.
        batch = [ops.convert_to_tensor(a[np.minimum(chosen, rows - 1)]) for a in arrays]
        found = program(*batch)
        kept = min(size, rows - start)
        parts.append(
            keras.tree.map_structure(lambda t, n=kept: np.array(ops.convert_to_numpy(t))[:n], found)
        )
    return keras.tree.map_structure(lambda *each: np.concatenate(each), *parts)


def labels_of(y: np.ndarray | None, rows: int, classes: int, name: str = "y") -> np.ndarray:
    """Class numbers `(rows,)` of labels in any form, or one error.

    Args:
        y: Class numbers `(rows,)` or `(rows, 1)`, or one-hot `(rows, classes)`.
        rows: How many there are.
        classes: How many classes the model has.
        name: What the message calls them.

    Raises:
        ValueError: If their number, shape or values do not fit.
    """
    named = name if "`" in name else f"`{name}`"
    array = checks.as_array(y)
    if array.dtype.kind not in "biuf":
        what = "None" if y is None else f"dtype {array.dtype}"
        raise ValueError(f"{named} holds class numbers. Received: {what}.")
    if array.ndim == 2 and array.shape[1] == classes and classes > 1:
        array = of_one_hot(array, named)
    elif array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) != rows:
        raise ValueError(
            f"{named} holds a class number for each of the {rows} rows, or {classes} columns. "
            f"Received: shape {np.shape(y)}."
        )
    numbers = array.astype("int64")
    if array.dtype.kind not in "iub" and not np.array_equal(numbers, array):
        raise ValueError(f"{named} holds class numbers. Received: dtype {array.dtype}.")
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < classes):
        raise ValueError(
            f"{named} runs from {numbers.min()} to {numbers.max()}, and the model has {classes} "
            f"classes, 0 to {classes - 1}."
        )
    return numbers


def of_one_hot(array: np.ndarray, named: str) -> np.ndarray:
    """Class numbers of one-hot rows, or `ValueError` where a row names no class, or several.

    Args:
        array: `(rows, classes)`.
        named: What the message calls it.
    """
    odd = np.flatnonzero(((array != 0) & (array != 1)).any(axis=1) | (array.sum(axis=1) != 1))
    if len(odd):
        raise ValueError(
            f"{named} has {array.shape[1]} columns, and {len(odd)} of {len(array)} rows are not "
            f"one-hot, a single 1 among zeros; the first is row {odd[0]}: {array[odd[0]].tolist()}."
        )
    return np.asarray(array.argmax(axis=1))


# --------------------------------------------------------------------------- a distiller's models


def of_student(distiller: hooks.Trained) -> Logits:
    """The student of a distiller as logits, in inference mode."""
    reader = Reader(distiller.student, "student", distiller.pairing.from_logits.get("student"))
    return lambda x: two_sided(reader.read(x, False, _units(distiller)).logits[0])


def in_training(distiller: hooks.Trained, x: Tensor) -> Tensor:
    """The logits of one more pass of the student, with `training=True`."""
    reader = Reader(distiller.student, "student", distiller.pairing.from_logits.get("student"))
    return two_sided(reader.read(x, True, _units(distiller)).logits[0])


def of_teacher(distiller: hooks.Trained) -> Logits:
    """The teacher of a distiller as logits; it has gradients."""
    setup = distiller.pairing
    return lambda x: two_sided(setup.teacher.answer(x, None, setup.match.teacher_units).logits[0])


def _units(distiller: hooks.Trained) -> Any:
    return distiller.pairing.match.units


def only_tensor(x: Tensor, whose: str) -> Tensor:
    """The one tensor of a batch, or `ValueError`."""
    flat = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    if len(flat) != 1:
        raise ValueError(
            f"{whose} attacks models with one input. Received: a batch of {len(flat)} tensors."
        )
    return flat[0]


def one_output(logits: list[Tensor], whose: str) -> Tensor:
    """The logits of the one output `(batch, classes)`, or `ValueError`."""
    if len(logits) != 1 or len(logits[0].shape) != 2:
        shapes = [tuple(tensor.shape) for tensor in logits]
        raise ValueError(
            f"{whose} trains models with one output, one decision a row, `(batch, classes)`. "
            f"Received: outputs of shapes {shapes}."
        )
    return two_sided(logits[0])


def spread_rows(x: Tensor, rows: np.ndarray, count: int) -> np.ndarray | None:
    """Some rows of what `fit` was given, `None` where it is no array.

    Args:
        x: What `fit` was given.
        rows: Its first rows, which are taken where it is a dataset.
        count: How many at most, spread evenly.
    """
    for source in (x, rows):
        flat = [leaf for leaf in keras.tree.flatten(source) if leaf is not None]
        if len(flat) == 1 and hasattr(flat[0], "__array__"):
            leaf = flat[0]
            array = np.asarray(ops.convert_to_numpy(leaf) if ops.is_tensor(leaf) else leaf)
            chosen = np.unique(np.linspace(0, len(array) - 1, min(count, len(array))).astype(int))
            return array[chosen]
    return None


def batches_of(rows: int, size: int) -> Iterator[slice]:
    """The slices that cut `rows` into batches of `size`."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
