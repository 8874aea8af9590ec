"""Arrays and a cache, joined row by row for `fit` and `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from keras_kd.cache import verification
from keras_kd.cache.join_datasets import (
    Joined,
    check_views,
    packed,
    require_joined,
    tf_fetch,
    tf_view,
)
from keras_kd.cache.stored import Source, StoredTeacher
from keras_kd.utils.data import are_arrays
from keras_kd.utils.types import Data, Tensor, Tensors

if TYPE_CHECKING:
    import tensorflow as tf


def for_fit(
    teacher: StoredTeacher,
    x: Tensors,
    y: Tensors | None,
    batch_size: int | None,
    arguments: dict[str, Any],
    asked: bool = False,
) -> tuple[Any, Any, int | None, dict[str, Any]]:
    """What `keras.Model.fit` is given in place of what the user gave.

    Args:
        teacher: The teacher whose answers are stored.
        x: What `fit` was given.
        y: Labels.
        batch_size: Samples a step.
        arguments: The other arguments of `fit`.
        asked: Whether rows that are split off for validation are joined too.

    Returns:
        The same four.

    Raises:
        ValueError: If the data are not those of the cache, or are not joined.
    """
    if not are_arrays(x):
        require_joined(x)
        return x, y, batch_size, arguments
    data = row_data(x, y, arguments)
    _check_arrays(teacher, data)
    return drawn_for_fit(teacher, data, batch_size, arguments, asked)


def drawn_for_fit(
    teacher: Source,
    data: tuple[Any, ...],
    batch_size: int | None,
    arguments: dict[str, Any],
    asked: bool,
    at_once: int = 1,
) -> tuple[Any, Any, int | None, dict[str, Any]]:
    """What `keras.Model.fit` is given, with rows drawn as it would draw them.

    Args:
        teacher: What was said of the rows.
        data: What `row_data` made of the arrays that `fit` was given.
        batch_size: Samples a step.
        arguments: The other arguments of `fit`.
        asked: Whether rows that are split off for validation are joined too.
        at_once: Of how many batches the row numbers come at once; more than one give `Pages` as
            data, on TensorFlow.

    Returns:
        Data, labels, batch size and other arguments.
    """
    arguments = dict(arguments)
    for name in ("sample_weight", "class_weight"):
        arguments.pop(name, None)
    split = arguments.pop("validation_split", 0.0)
    count = used = len(keras.tree.flatten(data[0])[0])
    if split and arguments.get("validation_data") is None:
        used = rows_trained_on(split, count)
        if not asked:
            arguments["validation_data"] = _cut(data, used, count)
    steps = arguments.get("steps_per_epoch")
    size = batch_size or (math.ceil(used / steps) if steps else 32)
    if are_arrays(keras.tree.flatten(arguments.get("validation_data"))[:1]):
        # Keras would fall back to its default size beside a dataset.
        arguments["validation_batch_size"] = arguments.get("validation_batch_size") or size
    shuffle = arguments.pop("shuffle", True)
    arguments["shuffle"] = False
    if asked and used < count:
        _require_no_views(teacher)
        rest = arguments.pop("validation_batch_size", None) or size
        held = _Rows(teacher, data, range(used, count), rest, False)
        arguments["validation_data"] = held.dataset()
    rows = _Rows(teacher, data, range(used), size, shuffle)
    drawn = rows.dataset() if at_once == 1 else rows.tf_pages(at_once)
    if not steps and keras.config.backend() == "tensorflow":
        # Without a number Keras makes two iterators an epoch, one for nothing: it makes one where
        # the last ended, and another where the next epoch begins.
        arguments["steps_per_epoch"] = rows.steps
    return drawn, None, None, arguments


def for_evaluation(
    teacher: StoredTeacher,
    x: Tensors,
    y: Tensors | None,
    sample_weight: Tensors | None,
    batch_size: int | None,
) -> tuple[Any, Any, Any, int | None]:
    """What `keras.Model.evaluate` is given where the teacher is asked.

    Args:
        teacher: The teacher whose answers are stored.
        x: What `evaluate` was given.
        y: Labels.
        sample_weight: Weights.
        batch_size: Samples a step.

    Returns:
        The same four.

    Raises:
        ValueError: If the data are not those of the cache, or are not joined.
    """
    if not are_arrays(x):
        require_joined(x)
        return x, y, sample_weight, batch_size
    _require_no_views(teacher)
    data = row_data(x, y, {"sample_weight": sample_weight})
    try:
        _check_arrays(teacher, data)
    except ValueError as error:
        raise ValueError(
            "`evaluate_distillation=True` asks the teacher about the validation data, and its "
            f"answers are read from a cache. {error} For other data write a cache of them and pass "
            "`CachedTeacher(path).join(dataset)`, or compile with `evaluate_distillation=False`."
        ) from error
    rows = _Rows(teacher, data, range(teacher.count), batch_size or 32, False)
    return rows.dataset(), None, None, None


def row_data(x: Tensors, y: Tensors | None, arguments: dict[str, Any]) -> Any:
    """Arrays `(x, y, sample_weight)` as Keras would take them, with the weights of classes."""
    weight = arguments.get("sample_weight")
    if weight is not None and keras.tree.is_nested(y) and not keras.tree.is_nested(weight):
        weight = keras.tree.map_structure(lambda _: weight, y)
    x, y, weight = keras.tree.map_structure(_plain, (x, y, weight), none_is_leaf=False)
    classes = arguments.get("class_weight")
    return x, y, weight if classes is None else _class_weights(classes, y, weight)


def _require_no_views(teacher: Source) -> None:
    """Raise `ValueError` where the cache answers augmented samples, and none as they are."""
    if teacher.augment is not None:
        raise ValueError(
            "`evaluate_distillation=True` asks the teacher about the validation data as they are, "
            f"and the cache `{teacher.root}` holds its answers to augmented views. Pass "
            "`validation_data=CachedTeacher(path).join(dataset)` from a cache without "
            "augmentation, or compile with `evaluate_distillation=False`."
        )


def _plain(leaf: Tensor) -> np.ndarray:
    """An array as Keras would take it: floats in its own precision, float32 in place of halves.

    By the numbers in float32 a cache knows its rows, and the layers that read them in half
    precision round them alike.
    """
    array = keras.ops.convert_to_numpy(leaf) if keras.ops.is_tensor(leaf) else np.asarray(leaf)
    floats = keras.backend.result_type("float32", keras.config.floatx())
    if array.dtype.kind == "f" and array.dtype.name != floats:
        return array.astype(floats)
    return array


def _check_arrays(teacher: StoredTeacher, data: tuple[Any, ...]) -> None:
    x = data[0]
    lengths = {len(leaf) for leaf in keras.tree.flatten(data) if leaf is not None}
    for length in sorted(lengths):
        verification.require_count(teacher.caches[0], length)
    for start in range(0, teacher.count, 4096):
        verification.require_inputs(teacher.caches[0], _cut((x,), start, start + 4096)[0], start)
    check_views(teacher, x, np.arange(teacher.count))


def _class_weights(classes: dict[int, float], y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A weight for each row from its class, 1 for classes that have none."""
    if weight is not None or not isinstance(y, np.ndarray):
        raise ValueError(
            "`class_weight` is for one output with labels, and not beside `sample_weight`. "
            f"Received: class_weight={classes}, labels of type {type(y).__name__}, sample_weight "
            f"{'given' if weight is not None else 'not given'}."
        )
    if y.ndim > 1 and y.shape[-1] > 1:
        y = np.argmax(y, axis=-1)
    labels = np.round(y).astype("int64").reshape(len(y), -1)[:, 0]
    known, place = np.unique(labels, return_inverse=True)
    of_class = np.array([classes.get(int(label), 1.0) for label in known])
    return of_class.astype(keras.config.floatx())[place]


def rows_trained_on(fraction: float, count: int) -> int:
    """How many rows are left for training, as Keras counts them."""
    used = math.floor(count * (1.0 - fraction))
    if not 0 < used < count:
        raise ValueError(
            f"`validation_split` leaves no rows on one side. Received: validation_split={fraction} "
            f"for {count} samples."
        )
    return used


def _cut(data: Data, start: int, stop: int) -> Any:
    return keras.tree.map_structure(lambda leaf: leaf[start:stop], data, none_is_leaf=False)


class _Rows:
    """Arrays and a cache, drawn together by row."""

    def __init__(
        self,
        teacher: Source,
        data: tuple[Any, ...],
        drawn: range,
        batch_size: int,
        shuffle: bool | str,
    ) -> None:
        self.teacher = teacher
        self.data = data
        self.first = drawn.start
        self.count = len(drawn)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.steps = math.ceil(self.count / batch_size)

    def dataset(self) -> Any:
        """What the backend reads fastest."""
        if keras.backend.backend() == "tensorflow":
            return self.tf_dataset()
        return self.py_dataset()

    def batch(self, rows: np.ndarray) -> tuple[Any, ...]:
        """The batch of these rows, as `fit` reads it."""
        epoch = self.teacher.epoch
        x, y, weight = keras.tree.map_structure(
            lambda leaf: leaf[rows], self.data, none_is_leaf=False
        )
        record = self.teacher.fetch(rows, epoch)
        x = self.teacher.view(x, rows, epoch)
        return packed(Joined(x, record) if record else x, y, weight)

    def py_dataset(self) -> Any:
        """For the backends that read NumPy."""
        rows = self

        class Drawn(keras.utils.PyDataset):
            """Batches by row; the order is drawn as Keras draws it for arrays."""

            order: Any = np.arange(rows.count)

            @property
            def num_batches(self) -> int:
                return rows.steps

            def on_epoch_begin(self) -> None:
                if rows.shuffle and rows.shuffle != "batch":
                    # PyTorch draws when the first batch is asked for.
                    on_torch = keras.backend.backend() == "torch"
                    self.order = None if on_torch else np.random.permutation(rows.count)

            def __getitem__(self, index: int) -> Any:
                if self.order is None:
                    from keras_kd.backends import torch as backend_torch

                    self.order = backend_torch.permutation(rows.count)
                chosen = self.order[index * rows.batch_size : (index + 1) * rows.batch_size]
                if rows.shuffle == "batch":
                    chosen = np.random.permutation(chosen)
                return rows.batch(rows.first + chosen)

        return Drawn()

    def tf_dataset(self) -> Any:
        """For TensorFlow: rows in the order in which Keras draws those of arrays.

        The permutation is the first random operation of its function, as it is
        in Keras, so that one seed gives one order with and without a cache.
        """
        import tensorflow as tf

        chosen = self._tf_chosen(self.batch_size, whole=self.count % self.batch_size == 0)
        if self.shuffle == "batch":
            chosen = chosen.map(tf.random.shuffle)
        record = self.teacher.held()
        # Of several inputs or outputs: a list would be one tensor to `tf.data`, as Keras knows too.
        data = keras.tree.lists_to_tuples(self.data)
        held = keras.tree.map_structure(tf.constant, (*data, record), none_is_leaf=False)
        augmented = self.teacher.augment is not None

        @tf.autograph.experimental.do_not_convert
        def gather(rows: tf.Tensor) -> Any:
            if record is not None:
                return batch_of_held(held, lambda leaf: tf.gather(leaf, rows))
            x, y, weight, _ = keras.tree.map_structure(
                lambda leaf: tf.gather(leaf, rows), held, none_is_leaf=False
            )
            fetched = tf_fetch(
                self.teacher, lambda rows: (rows, self.teacher.epoch), [rows], rows.shape[0]
            )
            if augmented:
                x = tf_view(self.teacher, x, rows)
            return packed(Joined(x, fetched) if fetched else x, y, weight)

        dataset = chosen.map(gather, num_parallel_calls=2)
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(self.steps))
        return self._tf_untuned(dataset.prefetch(2))

    def tf_pages(self, at_once: int) -> Pages:
        """For a TensorFlow step that gathers the rows itself, several batches in one go."""
        import tensorflow as tf

        # An epoch of one page is drawn by one function, which is set up in half the time.
        whole = at_once >= self.steps
        chosen = self._tf_orders() if whole else self._tf_chosen(self.batch_size * at_once)
        dataset = self._tf_untuned(chosen if whole else chosen.prefetch(1))
        # Keras counts batches; it takes as many pages as hold these, and never asks for the end.
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(self.steps))
        fields = (*self.data, self.teacher.held())
        held = keras.tree.map_structure(tf.constant, fields, none_is_leaf=False)
        return Pages(dataset, held, self.batch_size, at_once)

    def _tf_orders(self) -> Any:
        """All row numbers at once, in the order in which Keras draws the rows of arrays."""
        import tensorflow as tf

        # There is nothing in these functions for AutoGraph, which would rewrite the cache's own.
        @tf.autograph.experimental.do_not_convert
        def permutation(count: tf.Tensor) -> Any:
            rows = tf.range(self.first, self.first + count, dtype=tf.int64)
            return tf.random.shuffle(rows) if self.shuffle and self.shuffle != "batch" else rows

        # The number comes as a tensor, so that a step is not traced anew for other data.
        return tf.data.Dataset.range(self.count, self.count + 1).map(permutation)

    def _tf_chosen(self, size: int, whole: bool = False) -> Any:
        """So many of these row numbers at a time.

        Args:
            size: How many.
            whole: Whether all batches have this size. The step knows it then, as with the arrays
                that Keras reads, and has half the operations less to take.
        """
        # A function for `flat_map` would be set up again in each epoch.
        return self._tf_orders().rebatch(size, drop_remainder=whole)

    def _tf_untuned(self, dataset: tf.data.Dataset) -> Any:
        import tensorflow as tf

        options = tf.data.Options()
        # An epoch would end only when the autotuner next looks up: 0.35 s takes 0.63.
        options.autotune.enabled = False
        # Graph rewriting costs more than it saves here; Keras turns it off too.
        options.experimental_optimization.apply_default_optimizations = False
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.DATA
        )
        return dataset.with_options(options)


def batch_of_held(held: tuple[Any, ...], take: Callable[[Any], Any]) -> tuple[Any, ...]:
    """One batch of rows of `Pages.held`, as `fit` reads it.

    Args:
        held: What `Pages` hold.
        take: From a tensor of all rows to some of them.
    """
    x, y, weight, record = keras.tree.map_structure(take, held, none_is_leaf=False)
    return packed(Joined(x, record) if record else x, y, weight)


class Pages(NamedTuple):
    """Row numbers of several batches at a time, and the rows that they number.

    Attributes:
        dataset: A `tf.data.Dataset` of row numbers `(up to batch_size * at_once,)`.
        held: `(x, y, sample_weight, fields)` of all rows, in tensors.
        batch_size: Rows of a batch.
        at_once: Batches of a page.
    """

    dataset: Any
    held: Any
    batch_size: int
    at_once: int
