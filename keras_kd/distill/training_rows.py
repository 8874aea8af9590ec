"""Training data in memory: what is read more than once before, or beside, a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_kd.cache.join_datasets import Joined
from keras_kd.teachers.row_numbers import Numbered
from keras_kd.utils import checks
from keras_kd.utils.data import are_arrays
from keras_kd.utils.types import Data, Tensors


@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays of samples: inputs, labels and weights, nested as `fit` takes them."""

    x: Any
    y: Any
    weight: Any = None

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(keras.tree.flatten(self.x)[0])

    def fit(self, model: keras.Model, batch_size: int, epochs: int, **more: Any) -> None:
        """Train a model on these rows.

        Args:
            model: A compiled model.
            batch_size: Rows a step.
            epochs: Passes over the rows.
            **more: More keywords of `fit`.
        """
        model.fit(
            self.x,
            self.y,
            sample_weight=self.weight,
            batch_size=batch_size,
            epochs=epochs,
            **more,
        )

    def taken(self, rows: np.ndarray) -> Rows:
        """Return these rows.

        Args:
            rows: Row numbers, or a slice.
        """
        return Rows(
            *keras.tree.map_structure(
                lambda leaf: leaf[rows], (self.x, self.y, self.weight), none_is_leaf=False
            )
        )


def read(
    x: Data, y: Tensors | None, arguments: Mapping[str, Any], who: str
) -> tuple[Rows, np.ndarray | None, int | None]:
    """Collect what `fit` is given in memory.

    Args:
        x: Arrays, or a dataset of batches that ends.
        y: Labels of arrays.
        arguments: The other arguments of `fit`. Rows that `validation_split` takes are left out.
        who: What reads them, for messages.

    Returns:
        The rows; where they are joined to a cache, their numbers in it; and of a dataset the size
        of its first batch.

    Raises:
        ValueError: If there are no labels or no rows, or the data cannot be read twice.
    """
    if isinstance(x, Numbered):
        x = x.x
    if are_arrays(x):
        if y is None:
            raise ValueError(f"{who} compares by the labels, and there are none. Pass `y`.")
        weight = arguments.get("sample_weight")
        arrays = keras.tree.map_structure(checks.as_array, (x, y, weight), none_is_leaf=False)
        rows = Rows(*arrays)
        lengths = {len(leaf) for leaf in keras.tree.flatten(arrays) if leaf is not None}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(
                f"{who} needs one label for each row, and at least one row. Received: arrays of "
                f"{', '.join(map(str, sorted(lengths)))} rows."
            )
        share = arguments.get("validation_split") or 0.0
        if share and arguments.get("validation_data") is None:
            # The user scores by these.
            rows = rows.taken(slice(0, int(rows.count * (1 - share))))
        return rows, None, None
    if isinstance(x, Iterator) or not _finite(x):
        raise ValueError(
            f"{who} reads the data more than once, and these can be read once, or never end. Pass "
            "arrays, or a dataset that ends."
        )
    batches = [keras.utils.unpack_x_y_sample_weight(batch) for batch in _batches(x, who)]
    if not batches:
        raise ValueError(f"{who} has no rows: the dataset yields no batch.")
    if batches[0][1] is None:
        raise ValueError(f"{who} compares by the labels, and the dataset has none. Yield `(x, y)`.")
    data, labels, weight = keras.tree.map_structure(
        lambda *leaves: np.concatenate([checks.as_array(leaf) for leaf in leaves]),
        *batches,
        none_is_leaf=False,
    )
    size = len(keras.tree.flatten(batches[0][0])[0])
    if isinstance(data, Joined):
        return Rows(data.x, labels, weight), np.asarray(data.record["indices"]), size
    if isinstance(data, Numbered):
        data = data.x
    return Rows(data, labels, weight), None, size


def _finite(data: Data) -> bool:
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches is not None
    cardinality = getattr(data, "cardinality", None)
    return cardinality is None or int(cardinality()) != -1


def _batches(data: Data, who: str) -> Iterator[Any]:
    if isinstance(data, keras.utils.PyDataset):
        return (data[i] for i in range(data.num_batches or 0))
    if not hasattr(data, "__iter__"):
        raise TypeError(
            f"{who} takes arrays `(x, y)` or a dataset of batches. Received: {type(data).__name__}."
        )
    return iter(data)
