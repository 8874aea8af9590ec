"""Row numbers beside the data, for losses that remember every row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.losses.base import DistillationLoss
from keras_kd.losses.contrast import CRD
from keras_kd.transfer import Transfer


class Numbered(NamedTuple):
    """Inputs with the number of each row in the training data.

    A loss that keeps something for every row, as `keras_kd.losses.CRD` with
    `samples`, has to know which rows are in the batch. With arrays
    `Distiller.fit` adds the row numbers by itself, and the answers of a
    `CachedTeacher` bring theirs. A `tf.data.Dataset`, a
    `keras.utils.PyDataset`, a generator, or a call of `train_on_batch` gives
    `Numbered(x, indices)` in place of `x`. The same sample must have the same
    number in every epoch, so a dataset is numbered before it is shuffled.

    Attributes:
        x: What the models read.
        indices: Integers `(batch,)`, from 0 and below the `samples` of the
            loss.

    Examples:
        >>> dataset = tf.data.Dataset.from_tensor_slices((x, y)).enumerate()
        >>> dataset = dataset.map(lambda i, sample: (Numbered(sample[0], i), sample[1]))
        >>> history = distiller.fit(dataset.shuffle(len(x)).batch(32))
    """

    x: Any
    indices: Any


def split(x: Any) -> tuple[Any, Any]:
    """What the models read, and a record of the row numbers or `None`."""
    return (x.x, {"indices": x.indices}) if isinstance(x, Numbered) else (x, None)


def are_arrays(x: Any) -> bool:
    """Whether these are arrays and no dataset."""
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(hasattr(leaf, "__array__") for leaf in leaves)


def readers(transfers: Sequence[Transfer]) -> list[Transfer]:
    """The transfers whose losses read row numbers."""
    return [t for t in transfers if isinstance(t.loss, DistillationLoss) and t.loss.reads_indices]


def added(x: Any, transfers: Sequence[Transfer]) -> Any:
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
        known = transfer.loss.samples if isinstance(transfer.loss, CRD) else None
        if known is not None and indices.size and not 0 <= indices.min() <= indices.max() < known:
            raise ValueError(
                f"`{transfer.name}` remembers samples={known} rows, and the row numbers of the "
                f"data run from {indices.min()} to {indices.max()}. Make the loss with "
                f"`samples={int(indices.max()) + 1}`."
            )
    return x


def require_samples(data: Any) -> None:
    """Raise `ValueError` for a dataset whose batches, not samples, were numbered."""
    if not hasattr(data, "element_spec"):
        return
    x = keras.utils.unpack_x_y_sample_weight(data.element_spec)[0]
    if isinstance(x, Numbered) and x.indices.shape.rank == 0:
        raise ValueError(
            "`Numbered` has one row number for a whole batch. Number the dataset before it is "
            "batched: `dataset.enumerate()`, then `map`, `shuffle` and `batch`."
        )


def require(record: Any, transfers: Sequence[Transfer]) -> None:
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
