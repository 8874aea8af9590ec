"""Which losses remember every row, and whether the data bring the numbers of the rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd.losses.base import DistillationLoss
from keras_kd.teachers.row_numbers import Numbered
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils.data import are_arrays
from keras_kd.utils.types import Data, Tensor


def readers(transfers: Sequence[Transfer]) -> list[Transfer]:
    """The transfers whose losses read row numbers."""
    return [t for t in transfers if isinstance(t.loss, DistillationLoss) and t.loss.reads_indices]


def added(x: Data, transfers: Sequence[Transfer]) -> Any:
    """Arrays with their row numbers where a loss reads these; anything else as it is.

    Raises:
        ValueError: If there are more rows than a loss remembers.
    """
    if not readers(transfers) or not are_arrays(x):
        return x
    if not isinstance(x, Numbered):
        x = Numbered(x, np.arange(len(keras.tree.flatten(x)[0]), dtype="int32"))
    indices = np.asarray(x.indices)
    for transfer in readers(transfers):
        known = transfer.loss.samples
        if known is not None and indices.size and not 0 <= indices.min() <= indices.max() < known:
            raise ValueError(
                f"`{transfer.name}` remembers samples={known} rows, and the row numbers of the "
                f"data run from {indices.min()} to {indices.max()}. Make the loss with "
                f"`samples={int(indices.max()) + 1}`."
            )
    return x


def require_samples(data: Data) -> None:
    """Raise `ValueError` for a dataset whose batches, not samples, were numbered."""
    if not hasattr(data, "element_spec"):
        return
    x = keras.utils.unpack_x_y_sample_weight(data.element_spec)[0]
    if isinstance(x, Numbered) and x.indices.shape.rank == 0:
        raise ValueError(
            "`Numbered` has one row number for a whole batch. Number the dataset before it is "
            "batched: `dataset.enumerate()`, then `map`, `shuffle` and `batch`."
        )


def require(record: Mapping[str, Tensor] | None, transfers: Sequence[Transfer]) -> None:
    """Raise `ValueError` if a loss reads row numbers and the data bring none.

    Args:
        record: What was joined to the data: a dict, or `None`.
        transfers: The transfers of the distiller.
    """
    missing = readers(transfers)
    if missing and not (isinstance(record, dict) and "indices" in record):
        raise ValueError(
            f"`{missing[0].name}` remembers every row of the data, and these data bring no row "
            "numbers. Arrays given to `fit` are numbered by themselves; a dataset or generator "
            "yields `keras_kd.teachers.Numbered(x, indices)` in place of `x`, numbered before it "
            "is shuffled."
        )
