"""The distillation loss of one batch, and the batches it is measured on."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.distill import batch as step
from keras_kd.distill.pairing import Wiring
from keras_kd.losses.counts import Counted
from keras_kd.models.model_reader import Answer
from keras_kd.utils.data import are_arrays
from keras_kd.utils.types import Tensor


def distillation(
    setup: Wiring,
    batch: step.Batch,
    y: Any,
    student: Answer,
    counted: Sequence[Counted],
    temperature: Any,
    training: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """The value of each transfer, and their sum by weight.

    Args:
        setup: The transfers of a distiller.
        batch: The batch with the teacher's answer.
        y: Labels.
        student: The student's answer.
        counted: What counts of each flat output of the student, by `Wiring.counted`.
        temperature: The distiller's live temperature.
        training: Whether the student is being trained.

    Returns:
        Scalars by the name of the transfer, and `sum_i weight_i * value_i`.
    """
    values: dict[str, Any] = {}
    total: Any = 0.0
    temperature = ops.convert_to_tensor(temperature)
    for transfer, value in setup.terms(batch, y, student, counted, temperature, training):
        values[transfer.name] = values.get(transfer.name, 0.0) + value
        total = total + step.times(ops.convert_to_tensor(transfer.weight), value)
    return values, total


def training_arrays(x: Any, y: Any, arguments: dict[str, Any]) -> Any:
    """What `fit` trains on, where that is arrays.

    Args:
        x: Inputs.
        y: Labels.
        arguments: The other arguments of `fit`.

    Returns:
        `(x, y, sample_weight)` without the rows that are split off for
        validation, or `None`.
    """
    if not are_arrays(x) or arguments.get("class_weight"):
        return None
    data = (x, y, arguments.get("sample_weight"))
    split = arguments.get("validation_split")
    if not split or arguments.get("validation_data") is not None:
        return data
    used = math.floor(len(keras.tree.flatten(x)[0]) * (1.0 - split))
    return keras.tree.map_structure(lambda leaf: leaf[:used], data, none_is_leaf=False)


def spread(arrays: Any, count: int) -> np.ndarray:
    """The numbers of some rows of arrays, spread evenly, `(n,)`, at most `count`."""
    length = len(keras.tree.flatten(arrays[0])[0])
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype("int64"))


def rows(arrays: Any, chosen: np.ndarray) -> Any:
    """These rows of arrays; `None` stays `None`."""

    def take(leaf: Any) -> Any:
        array = ops.convert_to_numpy(leaf) if ops.is_tensor(leaf) else np.asarray(leaf)
        return array[chosen]

    return keras.tree.map_structure(take, arrays, none_is_leaf=False)
