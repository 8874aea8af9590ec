"""Answers in memory, joined to arrays as those on disk are.

`Remembered` is what a teacher said of the rows of arrays; it makes answers of the fields that were
joined to a batch. `join_arrays` draws rows of `Held` fields beside those of the data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_kd.models.model_reader import Answer
from keras_kd.utils.masks import keras_mask, with_keras_mask
from keras_kd.utils.types import Tensor, Tensors

_MARK = "remembered"


class Form(NamedTuple):
    """The structure of an answer whose tensors lie in fields.

    Attributes:
        answer: An `Answer` with the name of a field in place of each tensor.
        masks: The fields that have a Keras mask beside them.
    """

    answer: Any
    masks: tuple[str, ...]


def fields_of(answer: Answer) -> tuple[dict[str, Any], Form]:
    """The tensors of an answer as fields, and how they lie in it."""
    fields: dict[str, Any] = {}
    masks: list[str] = []

    known: dict[int, str] = {}

    def put(tensor: Tensor) -> str:
        if id(tensor) in known:
            # An output that is the logits is kept once.
            return known[id(tensor)]
        name = known[id(tensor)] = f"{_MARK}/{len(known)}"
        fields[name] = tensor
        mask = keras_mask(tensor)
        if mask is not None:
            masks.append(name)
            # One for each sample, also where one serves all.
            rows = (ops.shape(tensor)[0], *[1] * (len(mask.shape) - 1))
            ones = ops.ones(rows, dtype="bool")
            fields[f"{name}/mask"] = ops.logical_and(ops.cast(mask, "bool"), ones)
        return name

    named = keras.tree.map_structure(put, answer, none_is_leaf=False)
    return fields, Form(named, tuple(masks))


class Held:
    """Fields of all rows, as the joins of arrays read them; without any, rows come as they are.

    Attributes:
        fields: Arrays `(rows, ...)` by name.
        epoch: As `CachedTeacher` has it.
        augment: As `CachedTeacher` has it; nothing is augmented here.
    """

    augment: Callable[[Any, int], Any] | None = None
    epoch = 0
    root: Any = None

    def __init__(self, fields: dict[str, np.ndarray]) -> None:
        self.fields = fields

    def fetch(self, rows: np.ndarray, epoch: int = 0) -> dict[str, np.ndarray]:
        """What was said of some rows."""
        return {name: field[rows] for name, field in self.fields.items()}

    def view(self, x: Tensors, rows: np.ndarray, epoch: int = 0, compare: bool = True) -> Any:
        """The inputs as they are."""
        return x

    def held(self) -> dict[str, np.ndarray]:
        """All of it."""
        return self.fields


class Remembered(NamedTuple):
    """What a teacher said of some rows of arrays.

    Attributes:
        fields: Arrays `(rows, ...)` by name, the row numbers as `indices` among them.
        form: How they make an answer.
    """

    fields: dict[str, np.ndarray]
    form: Form

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(field.nbytes for field in self.fields.values())

    def answer(self, record: dict[str, Any]) -> Answer:
        """The answer to one batch from the fields that were joined to it."""
        masks = self.form.masks

        def tensor(name: str) -> Any:
            found = record[name]
            return with_keras_mask(found, record[f"{name}/mask"] if name in masks else None)

        found: Answer = keras.tree.map_structure(tensor, self.form.answer, none_is_leaf=False)
        return found


def is_remembered(record: object) -> bool:
    """Whether what was joined to a batch was remembered."""
    return isinstance(record, dict) and f"{_MARK}/0" in record


def joined_rows(parts: Sequence[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """Fields of batches after one another, cut to so many rows."""
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
