"""Row numbers beside the data."""

from typing import Any, NamedTuple

from keras_kd.utils.types import Data


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


def split(x: Data) -> tuple[Any, Any]:
    """What the models read, and a record of the row numbers or `None`."""
    return (x.x, {"indices": x.indices}) if isinstance(x, Numbered) else (x, None)
