"""Puts the cached answers beside the samples of a dataset, in whatever order these are drawn."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from keras_kd.cache import verification
from keras_kd.cache.stored import Source, StoredTeacher
from keras_kd.utils.types import Data, Tensors

if TYPE_CHECKING:
    import tensorflow as tf


UNJOINED = (
    "The teacher's answers are read from a cache, and nobody joined them to these data. Join the "
    "dataset in the order in which it was cached, before shuffling: `cached.join(dataset)`. "
    "Arrays given to `fit` are joined by themselves."
)


class Joined(NamedTuple):
    """One batch of inputs with what the teacher said of it.

    Attributes:
        x: What the data deliver.
        record: The fields of the cache by name, and the row numbers as
            `indices`.
    """

    x: Any
    record: Any


def is_joined(x: object) -> bool:
    """Whether one element of a dataset is joined already."""
    return isinstance(keras.utils.unpack_x_y_sample_weight(x)[0], Joined)


# Rows of which the views are compared before training begins; all others are as they are shown.
_FIRST_VIEWS = 64


def check_views(teacher: StoredTeacher, x: Tensors, rows: np.ndarray) -> None:
    """Find an augmentation that is not the one of the cache.

    Args:
        teacher: The teacher whose answers are stored.
        x: Inputs of which the first is that of row 0.
        rows: Row numbers.
    """
    if teacher.augment is not None:
        drawn = np.unique(np.linspace(0, len(rows) - 1, _FIRST_VIEWS).astype(int))
        teacher.view(keras.tree.map_structure(lambda leaf: leaf[rows[drawn]], x), rows[drawn])


def packed(x: Joined, y: Tensors | None, weight: Tensors | None) -> tuple[Any, ...]:
    """One element as `fit` unpacks it; always a tuple, since `Joined` is one itself."""
    if weight is not None:
        return (x, y, weight)
    return (x,) if y is None else (x, y)


def tf_fetch(
    teacher: Source,
    place: Callable[..., tuple[np.ndarray, int]],
    arguments: list[Any],
    size: int | tf.Tensor | None,
) -> dict[str, Any]:
    """`teacher.fetch` inside a `tf.data` function.

    Args:
        teacher: The teacher whose answers are stored.
        place: From `arguments` as NumPy arrays to row numbers and an epoch.
        arguments: Tensors.
        size: How many rows there will be, where it is known.
    """
    import tensorflow as tf

    example = teacher.fetch(np.zeros(1, "int64"))
    names = list(example)

    def fetch(*given: np.ndarray) -> list[np.ndarray]:
        found = teacher.fetch(*place(*given))
        return [found[name] for name in names]

    types = [tf.as_dtype(example[name].dtype) for name in names]
    tensors = tf.numpy_function(fetch, arguments, types)
    for name, tensor in zip(names, tensors):
        tensor.set_shape([size, *example[name].shape[1:]])
    return dict(zip(names, tensors))


def tf_view(teacher: Source, x: Tensors, rows: tf.Tensor, epoch: tf.Tensor | None = None) -> Any:
    """`teacher.view` inside a `tf.data` function."""
    import tensorflow as tf

    leaves = keras.tree.flatten(x)

    def view(
        rows: np.ndarray, epoch: np.ndarray, *flat: np.ndarray, compare: bool = True
    ) -> list[np.ndarray]:
        at = teacher.epoch if epoch < 0 else int(epoch)
        seen = teacher.view(keras.tree.pack_sequence_as(x, list(flat)), rows, at, compare)
        return [np.asarray(leaf) for leaf in keras.tree.flatten(seen)]

    example = view(
        np.zeros(1, "int64"),
        np.zeros((), "int64"),
        *[np.zeros((1, *leaf.shape[1:]), leaf.dtype.as_numpy_dtype) for leaf in leaves],
        compare=False,
    )
    at = tf.constant(-1, tf.int64) if epoch is None else epoch
    seen = tf.numpy_function(
        view, [rows, at, *leaves], [tf.as_dtype(leaf.dtype) for leaf in example]
    )
    for tensor, leaf in zip(seen, example):
        tensor.set_shape([rows.shape[0], *leaf.shape[1:]])
    return keras.tree.pack_sequence_as(x, seen)


def require_joined(x: Tensors) -> None:
    """Raise `ValueError` for a dataset that was not joined, where it can be told."""
    if hasattr(x, "element_spec"):
        spec = x.element_spec
        if is_joined(spec if isinstance(spec, tuple) and not _is_record(spec) else (spec,)):
            return
    elif isinstance(x, keras.utils.PyDataset):
        if is_joined(x[0]):
            return
    else:
        # A generator shows what it yields when it is read; `read` tells then.
        return
    raise ValueError(UNJOINED)


def _is_record(spec: tf.TypeSpec) -> bool:
    return isinstance(spec, Joined)


def dataset(teacher: StoredTeacher, data: Data) -> Any:
    """Join a dataset; see `CachedTeacher.join`."""
    if hasattr(data, "element_spec"):
        return _tf_join(teacher, data)
    if isinstance(data, keras.utils.PyDataset):
        return _PyJoin(teacher, data)
    if inspect.isgenerator(data):
        return _generated(teacher, data)
    raise TypeError(
        "`join` takes a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator of batches; "
        f"arrays go to `fit` as they are. Received: data of type {type(data).__name__}."
    )


def _checked(teacher: StoredTeacher, x: Tensors, row: int) -> np.ndarray:
    """The row numbers of a batch that begins at `row` and was found to be the cached one."""
    count = verification.require_inputs(teacher.caches[0], x, row)
    return np.arange(row, row + count)


def _joined(
    teacher: StoredTeacher, batch: Tensors, row: int, epoch: int
) -> tuple[tuple[Any, ...], int]:
    """A batch with its answers, and the row after it."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    rows = _checked(teacher, x, row)
    record = teacher.fetch(rows, epoch)
    joined = Joined(teacher.view(x, rows, epoch), record)
    return packed(joined, y, weight), row + len(rows)


def _generated(teacher: StoredTeacher, data: Iterator[Any]) -> Iterator[Any]:
    """A generator that may run through the data several times, in the same order."""
    row, epoch = 0, 0
    for batch in data:
        if row == teacher.count:
            row, epoch = 0, epoch + 1
        joined, row = _joined(teacher, batch, row, epoch)
        yield joined
    verification.require_count(teacher.caches[0], row)


class _PyJoin(keras.utils.PyDataset):
    """A `PyDataset` with the cached answers; all but the last batch have one size."""

    def __init__(self, teacher: StoredTeacher, data: keras.utils.PyDataset) -> None:
        super().__init__(
            workers=data.workers,
            use_multiprocessing=False,
            max_queue_size=data.max_queue_size,
        )
        self.teacher = teacher
        self.data = data
        _, self.size = _joined(teacher, data[0], 0, 0)
        if data.num_batches is None or data.num_batches != math.ceil(teacher.count / self.size):
            raise ValueError(
                f"The PyDataset has {data.num_batches} batches of {self.size} samples, and the "
                f"cache `{teacher.root}` has {teacher.count} samples. Pass the dataset "
                "that the cache was written from, with batches of one size but for the last."
            )

    @property
    def num_batches(self) -> int:
        return int(self.data.num_batches)

    def __getitem__(self, index: int) -> Any:
        return _joined(self.teacher, self.data[index], index * self.size, self.teacher.epoch)[0]

    def on_epoch_begin(self) -> None:
        self.data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self.data.on_epoch_end()


def _tf_join(teacher: StoredTeacher, data: tf.data.Dataset) -> Any:
    import tensorflow as tf

    spec = data.element_spec
    plain = isinstance(spec, tuple)
    x_spec = spec[0] if plain else spec
    leaves = keras.tree.flatten(x_spec)
    ranks = [len(each["shape"]) for each in teacher.caches[0].manifest.inputs]
    batched = [leaf.shape.rank for leaf in leaves] != ranks
    _check_first(teacher, data, batched)
    length = int(data.cardinality())
    if not batched and length >= 0:
        verification.require_count(teacher.caches[0], length)
    if batched and length >= 0:
        _require_batches(teacher, data, length)
    if not batched and _stackable(spec):
        # A call into Python costs about as much for one sample as for a page of them.
        page = min(256, max(1, _PAGE_BYTES // sum(map(_nbytes, keras.tree.flatten(spec)))))
        joined = _tf_join_batches(teacher, data.batch(page), plain, True).unbatch()
    else:
        joined = _tf_join_batches(teacher, data, plain, batched)
    if length >= 0:
        joined = joined.apply(tf.data.experimental.assert_cardinality(length))
    return joined


def _require_batches(teacher: StoredTeacher, data: tf.data.Dataset, length: int) -> None:
    """Refuse at once a dataset of too few or too many batches, where all have one size."""
    leaf = keras.tree.flatten(data.element_spec)[0]
    if leaf.shape.rank and leaf.shape[0] is not None:
        verification.require_count(teacher.caches[0], length * leaf.shape[0])
    elif "BatchDataset" in type(data).__name__:
        # As `batch` made it: only the last one may be smaller.
        first = next(iter(data.take(1)))
        size = int(keras.tree.flatten(first)[0].shape[0])
        if length != math.ceil(teacher.count / size):
            raise ValueError(
                f"The dataset has {length} batches of {size} samples, and the cache "
                f"`{teacher.root}` has {teacher.count} samples. Pass the data that the "
                "cache was written from, in full."
            )


# Samples that were given one by one are joined in pages of at most so many bytes.
_PAGE_BYTES = 4 << 20


def _stackable(spec: tf.TypeSpec) -> bool:
    """Whether samples of this form make dense batches."""
    import tensorflow as tf

    return all(
        isinstance(leaf, tf.TensorSpec) and leaf.shape.is_fully_defined()
        for leaf in keras.tree.flatten(spec)
    )


def _nbytes(spec: tf.TypeSpec) -> int:
    return int(spec.shape.num_elements()) * int(spec.dtype.size) or 1


def _tf_join_batches(
    teacher: StoredTeacher, data: tf.data.Dataset, plain: bool, batched: bool
) -> Any:
    """Join a `tf.data.Dataset` element by element, each with one call into Python.

    Args:
        teacher: The teacher whose answers are stored.
        data: The dataset.
        plain: Whether its elements are tuples of which the first are the inputs.
        batched: Whether they are batches, or single samples.
    """
    import tensorflow as tf

    length = int(data.cardinality())
    passes = _Passes(teacher, length)
    once = tf.data.Dataset.range(1)

    @tf.autograph.experimental.do_not_convert
    def begin(_: Tensors) -> Any:
        marks = tf.numpy_function(passes.begin, [], [tf.int64, tf.int64, tf.bool])
        for mark in marks:
            mark.set_shape([])
        return tuple(marks)

    @tf.autograph.experimental.do_not_convert
    def place(state: tf.Tensor, marked: tf.Tensor) -> Any:
        row, seen = state
        marks, element = marked
        x = keras.tree.flatten(element[0] if plain else element)
        size = tf.shape(x[0], tf.int64)[0] if batched else tf.constant(1, tf.int64)
        # Keras takes as many elements as there are and never asks for the end.
        last = tf.equal(seen + 1, length)
        return (row + size, seen + 1), (marks, row, last, element)

    @tf.autograph.experimental.do_not_convert
    def with_record(
        marks: Sequence[tf.Tensor], row: tf.Tensor, last: tf.Tensor, element: Any
    ) -> Any:
        x, *rest = element if plain else (element,)
        if not batched:
            x = keras.tree.map_structure(lambda leaf: tf.expand_dims(leaf, 0), x)
        flat = keras.tree.flatten(x)
        # Python is shown the tensors as they lie in memory, which copies nothing.
        record = tf_fetch(teacher, passes.rows, [*marks, row, last, *flat], flat[0].shape[0])
        if teacher.augment is not None:
            x = tf_view(teacher, x, row + tf.range(tf.shape(flat[0], tf.int64)[0]), marks[1])
        joined = Joined(x, record)
        if not batched:
            joined = keras.tree.map_structure(lambda leaf: leaf[0], joined)
        return (joined, *rest)

    def join(marks: Tensors) -> Any:
        placed = tf.data.Dataset.zip(marks, data)
        placed = placed.scan((tf.constant(0, tf.int64), tf.constant(0, tf.int64)), place)
        return placed.map(with_record, num_parallel_calls=tf.data.AUTOTUNE)

    def ended(elements: tf.data.Dataset, this: tf.data.Dataset) -> Any:
        """The elements, and nothing after them but a call of `passes.end`."""

        @tf.autograph.experimental.do_not_convert
        def end(_: Tensors) -> Any:
            none = tf.numpy_function(passes.end, [this], tf.int64)
            none.set_shape([])
            return elements.take(none)

        return elements.concatenate(once.flat_map(end))

    @tf.autograph.experimental.do_not_convert
    def marks_of_pass(*marks: Tensors) -> Any:
        return ended(tf.data.Dataset.from_tensors(marks).repeat(length), marks[0])

    @tf.autograph.experimental.do_not_convert
    def one_pass(*marks: Tensors) -> Any:
        # Reached when all before it was read: here it shows whether rows are missing.
        return ended(join(tf.data.Dataset.from_tensors(marks).repeat()), marks[0])

    begun = once.map(begin)
    if length < 0:
        return begun.flat_map(one_pass)
    # What is nested is set up anew in every pass, so that as little as can be is.
    joined = join(begun.flat_map(marks_of_pass))
    return joined.apply(tf.data.experimental.assert_cardinality(length))


class _Passes:
    """Compares what passes with what the teacher was given, and counts it.

    Every row is compared until all rows of one pass have been; after that, which
    the same pipeline has shown to deliver the cached rows, one row of each
    batch is, and that finds a dataset which is shuffled anew in each pass.
    Batches of one pass may come here in any order, and several passes may be
    under way at a time.

    A pass that follows another to its end, as after `repeat`, shows the views of
    the next epoch: what is prefetched begins it before the training does.
    """

    def __init__(self, teacher: StoredTeacher, length: int) -> None:
        self.teacher = teacher
        # Elements of a pass, negative where it is not known before the end.
        self.length = length
        self.counts: list[int] = []
        self.epochs: list[tuple[int, int]] = []
        self.known = False
        # Batches of one pass come from several threads.
        self._counting = threading.Lock()
        # The training, and the epoch that comes next in it, once a pass has ended.
        self.next: tuple[int, int | None] = (0, None)

    def begin(self) -> tuple[np.int64, np.int64, np.bool_]:
        """The number of a new pass, the epoch whose views it shows, whether all is compared."""
        run, epoch = self.next
        if run != self.teacher.run or epoch is None:
            run, epoch = self.teacher.run, self.teacher.epoch
        self.next = run, None
        self.counts.append(0)
        self.epochs.append((run, epoch))
        this = len(self.counts) - 1
        return np.int64(this), np.int64(epoch), np.bool_(not self.known)

    def rows(
        self,
        this: np.ndarray,
        epoch: np.ndarray,
        whole: np.ndarray,
        row: np.ndarray,
        last: np.ndarray,
        *flat: np.ndarray,
    ) -> tuple[np.ndarray, int]:
        """The row numbers of a batch, checked, and the epoch of their views."""
        first, count = int(row), len(flat[0])
        if count:
            # All rows, or one that moves along from pass to pass and batch to batch.
            at = 0 if whole else (first // count + int(this)) % count
            compared = [leaf[at : count if whole else at + 1] for leaf in flat]
            verification.require_inputs(self.teacher.caches[0], compared, first + at)
        if last or first + count > self.teacher.count:
            verification.require_count(self.teacher.caches[0], first + count)
        with self._counting:
            self.counts[int(this)] += count
            self.known = self.known or bool(whole and self.counts[int(this)] == self.teacher.count)
        return np.arange(first, first + count), int(epoch)

    def end(self, this: np.ndarray) -> np.int64:
        """Nothing more; raises if rows are missing."""
        # Of a pass whose length is known the last batch has told, and others may be under way.
        if self.length < 0:
            verification.require_count(self.teacher.caches[0], self.counts[int(this)])
        run, epoch = self.epochs[int(this)]
        if run == self.teacher.run:
            self.next = run, epoch + 1
        return np.int64(0)


def _check_first(teacher: StoredTeacher, data: tf.data.Dataset, batched: bool) -> None:
    """Look at the beginning at once, where a shuffled dataset shows."""
    element = next(iter(data.take(1)), None)
    if element is None:
        raise ValueError("The dataset yields nothing to join.")
    x = element[0] if isinstance(element, tuple) else element
    if not batched:
        x = keras.tree.map_structure(lambda leaf: leaf[None], x)
    x = keras.tree.map_structure(np.asarray, x)
    check_views(teacher, x, _checked(teacher, x, 0))
