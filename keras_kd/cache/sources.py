"""The data that a teacher answers: batches of inputs in one order."""

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_kd.utils.types import Tensors


class Source:
    """Batches of inputs, the same in every pass.

    Args:
        data: What `keras_kd.cache.write` was given.

    Attributes:
        count: Number of samples, or `None` while it is not known.
        estimate: The same, or a bound on it, for progress and shard size.
    """

    count: int | None = None
    estimate: int | None = None

    def first(self) -> Any:
        """The inputs of the first batch; no pass is used up."""
        raise NotImplementedError

    def batches(self, shard_size: int) -> Iterator[tuple[int, Any]]:
        """All batches with the row number at which each begins."""
        raise NotImplementedError


class Arrays(Source):
    """Arrays of equal length, cut so that no batch crosses the end of a shard.

    So a shard's bytes do not depend on which others are written beside it.
    """

    def __init__(self, x: Tensors, batch_size: int) -> None:
        lengths = {len(leaf) for leaf in keras.tree.flatten(x)}
        if len(lengths) != 1:
            raise ValueError(
                f"The inputs of one sample are one row of each array. Received: arrays of "
                f"{' and '.join(str(n) for n in sorted(lengths))} rows."
            )
        self.x = x
        self.batch_size = batch_size
        self.count = self.estimate = self.rows = lengths.pop()
        if self.rows == 0:
            raise ValueError("There is nothing to cache: the data have no rows.")

    def first(self) -> Any:
        """The inputs of the first batch."""
        return keras.tree.map_structure(lambda leaf: leaf[: self.batch_size], self.x)

    def batches(self, shard_size: int) -> Iterator[tuple[int, Any]]:
        """All batches with the row number at which each begins."""
        for shard in range(math.ceil(self.rows / shard_size)):
            end = min((shard + 1) * shard_size, self.rows)
            for row in range(shard * shard_size, end, self.batch_size):
                stop = min(row + self.batch_size, end)
                yield row, keras.tree.map_structure(lambda leaf, a=row, b=stop: leaf[a:b], self.x)


class Stream(Source):
    """A dataset of batches.

    Args:
        data: An iterable of batches.
        batches: How many there are, where it is known.
        once: Whether it can be read only once.
    """

    def __init__(self, data: Iterable[Any], batches: int | None, once: bool) -> None:
        self.data = data
        self.once = once
        self._batches = batches

    def first(self) -> Any:
        """The inputs of the first batch; no pass is used up."""
        iterator = iter(self.data)
        batch = next(iterator, None)
        if batch is None:
            raise ValueError("There is nothing to cache: the dataset yields no batch.")
        if self.once:
            self.data = itertools.chain([batch], iterator)
        x, size = _inputs(batch)
        if self._batches:
            self.estimate = self._batches * size
        return x

    def batches(self, shard_size: int) -> Iterator[tuple[int, Any]]:
        """All batches with the row number at which each begins."""
        row = 0
        for batch in self.data:
            x, size = _inputs(batch)
            yield row, x
            row += size
        self.count = self.estimate = row


def _inputs(batch: Tensors) -> tuple[Any, int]:
    """The inputs of one batch, and how many samples they are."""
    x = keras.utils.unpack_x_y_sample_weight(batch)[0]
    leaves = keras.tree.flatten(x)
    if not leaves or not all(len(getattr(leaf, "shape", ())) > 0 for leaf in leaves):
        raise ValueError(
            "A dataset that is cached yields batches of dense arrays, `x`, `(x, y)` or `(x, y, "
            f"sample_weight)`. Received: x of type {type(x).__name__} without a batch axis."
        )
    sizes = {int(leaf.shape[0]) for leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(
            "The inputs of one sample are one row of each array. Received: a batch with arrays of "
            f"{' and '.join(map(str, sorted(sizes)))} rows."
        )
    return x, sizes.pop()


def source(data: Any, batch_size: int) -> Source:
    """The batches of whatever the user passed.

    Args:
        data: Arrays `x`, a tuple `(x, y)` or `(x, y, sample_weight)` of them, a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, a generator, or any
            iterable of batches.
        batch_size: Samples a batch, for arrays.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is empty or never ends.
    """
    if hasattr(data, "element_spec"):
        batches = int(data.cardinality())
        if batches == -1:
            raise ValueError(
                "The dataset never ends: it repeats. Cache it before `.repeat()`, and repeat the "
                "joined dataset."
            )
        return Stream(data, batches if batches > 0 else None, once=False)
    if isinstance(data, keras.utils.PyDataset):
        return Stream(_Pages(data), data.num_batches, once=False)
    if inspect.isgenerator(data):
        return Stream(data, None, once=True)
    x = keras.utils.unpack_x_y_sample_weight(data)[0] if isinstance(data, tuple) else data
    leaves = keras.tree.flatten(x)
    if leaves and all(len(getattr(leaf, "shape", ())) > 0 for leaf in leaves):
        return Arrays(x, batch_size)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | dict | list | tuple):
        return Stream(data, None, once=isinstance(data, Iterator))
    raise TypeError(
        "The data of a cache are arrays, `(x, y)`, a `tf.data.Dataset`, a `keras.utils.PyDataset` "
        f"or an iterable of batches. Received: data of type {type(data).__name__}."
    )


class _Pages:
    """A `PyDataset` in its own order, once a pass."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        batches = self.data.num_batches
        if batches is None:
            raise ValueError(
                "The PyDataset never ends: `num_batches` is None. Give it the number of batches "
                "of one pass."
            )
        return (self.data[i] for i in range(batches))
