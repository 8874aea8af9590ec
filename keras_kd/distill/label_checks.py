"""Whether labels are what the losses read, found out before the step that would read them.

One look for arrays, datasets, single batches and validation data, and for every trainer.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import keras
import numpy as np

from keras_kd.distill.pairing import Pairing
from keras_kd.models import meaning
from keras_kd.utils import checks
from keras_kd.utils.types import Data, Losses, Tensor, Tensors

if TYPE_CHECKING:
    import tensorflow as tf


_INT32 = 2**31


class Expected(NamedTuple):
    """What the losses read of the labels of one output.

    Attributes:
        loss: The hard loss, or `None`.
        shape: The shape of the output, `None` where it is not known.
        reader: Name of a distillation loss that reads class numbers, or `None`.
        model: Name of the model that has the output.
    """

    loss: Any = None
    shape: Any = None
    reader: str | None = None
    model: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether the hard loss reads class numbers."""
        sparse = keras.losses.sparse_categorical_crossentropy
        return meaning.function_of(self.loss) is sparse

    @property
    def ignored(self) -> Any:
        """The class number that the hard loss leaves out, or `None`."""
        return meaning.option(self.loss, "ignore_class")

    @property
    def classes(self) -> int | None:
        """How many classes are told apart, `None` where that is not known."""
        count = self.shape[-1] if self.shape is not None else None
        return count if self.is_sparse or count != 1 else None

    def are_numbers(self, label: Tensor) -> bool:
        """Whether labels are class numbers; one-hot rows have as many axes as the output."""
        shape: Any = getattr(label, "shape", ())
        if not (self.is_sparse or self.reader is not None) or getattr(shape, "rank", 0) is None:
            return False
        rank = len(self.shape) if self.shape is not None else len(shape) + 1
        return len(shape) < rank or (len(shape) == rank and shape[-1] == 1)

    def bounds(self, label: Tensor) -> tuple[float, float] | None:
        """The least and the greatest label, `None` where any number may be one.

        Args:
            label: Labels, or their spec.
        """
        dtype = _dtype(label)
        if self.are_numbers(label):
            if "int" not in dtype and self.is_sparse:
                return None
            # To a distillation loss a label of -1 marks a row that has none.
            return (0 if self.is_sparse else -1), (self.classes or _INT32) - 1
        if "int" not in dtype and "float" not in dtype:
            return None
        # Soft labels that were interpolated or held in halves overshoot a little.
        slack = 1e-2 if "float" in dtype else 0
        if meaning.of_loss(self.loss) == meaning.INDEPENDENT:
            return -slack, 1 + slack
        weighs = any(meaning.function_of(self.loss) is each for each in _OF_DISTRIBUTIONS)
        return (-slack, float("inf")) if weighs else None

    def wrong(self, labels: np.ndarray) -> tuple[float, float] | None:
        """The least and the greatest of labels of which some are out of range, else `None`."""
        bounds = self.bounds(labels)
        if bounds is None:
            return None
        if self.ignored is not None and self.are_numbers(labels):
            labels = labels[labels != self.ignored]
        if not labels.size:
            return None
        low, high = labels.min().item(), labels.max().item()
        return (low, high) if low < bounds[0] or high > bounds[1] else None

    def said(self, labels: Tensor) -> str:
        """What labels of this form should be, to follow "from 0 to 9, and "."""
        if self.are_numbers(labels):
            if self.classes is None:
                return f"classes are numbered from 0, in 32 bits. {_RENUMBER}"
            return f"there are {self.classes} classes, numbered from 0. {_RENUMBER}"
        name = meaning.name_of(self.loss)
        if meaning.of_loss(self.loss) == meaning.INDEPENDENT:
            return f"`{name}` reads numbers from 0 to 1. Check how they are coded."
        return f"`{name}` reads shares of classes, at least 0. Check how they are coded."


_RENUMBER = "Renumber the labels, or give the student more outputs."

# They add up logarithms of the outputs, weighed by labels.
_OF_DISTRIBUTIONS = (
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
)


def of_distiller(pairing: Pairing, loss: Losses) -> list[Expected]:
    """What the losses of a distiller read, one entry for each flat output of the student.

    Args:
        pairing: The distiller's models and transfers.
        loss: The hard loss, or `None`.
    """
    student = pairing.student
    readers = {
        output: transfer.name
        for transfer, output in pairing.placed
        if getattr(transfer.loss, "reads_labels", False)
    }
    shapes = student.shapes
    return [
        Expected(one, None if shapes is None else shapes[i], readers.get(i), student.model.name)
        for i, one in enumerate(checks.per_output(loss, student.template))
    ]


# ------------------------------------------------------------------------- arrays


def require(
    expected: Sequence[Expected], y: Tensors | None, template: object, name: str = "`y`"
) -> None:
    """Raise `ValueError` for labels that the losses cannot read.

    Args:
        expected: What they read, one entry for each output.
        y: Labels in arrays, or the specs of those that a dataset yields; `None` for none.
        template: The outputs with names at the leaves, as in `checks.per_output`.
        name: What the labels are called.
    """
    for leaf in keras.tree.flatten(y):
        kind = no_number(leaf)
        if kind is not None:
            raise ValueError(
                f"{name} holds {kind}, and labels are numbers. Number the classes: "
                "`classes, y = numpy.unique(y, return_inverse=True)`."
            )
    for label, one in zip(checks.per_output(y, template), expected):
        if label is not None:
            _require(label, one, name)


def _require(label: Tensor, one: Expected, name: str) -> None:
    """Compare the labels of one output, or their spec, with what is read."""
    shape = tuple(getattr(label, "shape", None) or ())
    if _width_differs(shape, one):
        raise ValueError(
            f"{name} has the shape {shape}, and the student `{one.model}` returns "
            f"{tuple(one.shape)}. Give each sample as many targets as the student has units."
        )
    dtype = _dtype(label)
    if one.is_sparse and "float" in dtype:
        raise ValueError(
            f"The loss reads integer labels, and {name} is {dtype}. Convert them with "
            "`y.astype('int32')`, or use a categorical loss for one-hot labels."
        )
    if not hasattr(label, "__array__"):
        return
    array = checks.as_array(label)
    checks.require_finite(array, name)
    if one.is_sparse and not one.are_numbers(array):
        raise ValueError(
            f"The loss reads one label a sample, and {name} of shape {shape} has {shape[-1]}. If "
            "it is one-hot, convert it with `y.argmax(-1)`, or use "
            "`keras.losses.CategoricalCrossentropy`."
        )
    by_class = one.are_numbers(array)
    if by_class and "float" in dtype and (array != np.round(array)).any():
        raise ValueError(f"{name} holds fractions. `{one.reader}` reads them as class numbers.")
    found = one.wrong(array)
    if found is None:
        return
    run = f"from {found[0]} to {found[1]}, and"
    if by_class and not one.is_sparse:
        run = f"{name} runs {run} `{one.reader}` reads them as class numbers:"
    else:
        run = f"Labels run {run}" if name == "`y`" else f"{name} holds labels {run}"
    said = one.said(array)
    if by_class and one.classes is not None:
        said = (
            f"the student has {one.classes} classes, numbered 0 to {one.classes - 1}. {_RENUMBER}"
        )
    if by_class and one.is_sparse and one.ignored is None and found[0] == -1:
        said += " Rows without a label have -1 where the loss has `ignore_class=-1`."
    raise ValueError(f"{run} {said}")


def _width_differs(found: tuple[Any, ...], one: Expected) -> bool:
    """Whether targets have another last axis than outputs that are compared unit by unit."""
    if one.loss is None or one.is_sparse or one.shape is None:
        return False
    return (
        len(found) == len(one.shape) > 1
        and None not in (found[-1], one.shape[-1])
        and found[-1] != one.shape[-1]
        and 1 not in (found[-1], one.shape[-1])
    )


def _dtype(leaf: Tensor) -> str:
    """The name of a dtype of whatever library."""
    dtype = getattr(leaf, "dtype", None)
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def no_number(leaf: Tensor) -> str | None:
    """What an array holds that is no number, or `None`."""
    kind = getattr(getattr(leaf, "dtype", None), "kind", "")
    if kind in ("U", "S") or _dtype(leaf) == "string":
        return "text"
    if kind == "O":
        return "Python objects, as arrays of rows of different lengths do"
    if kind in ("M", "m"):
        return "dates or durations"
    return "complex numbers" if kind == "c" else None


# ----------------------------------------------------------- labels of a dataset


OUT_OF_RANGE = "keras_kd: labels out of range"


def watched(expected: Sequence[Expected], data: Data, template: object) -> Any:
    """A dataset whose labels are compared with what is read, batch by batch.

    Backends answer labels out of range each in their own way: by a bare error, by NaN on a GPU, or
    by leaving them out.

    Args:
        expected: What the losses read, one entry for each output.
        data: A `tf.data.Dataset`, a `PyDataset`, a PyTorch `DataLoader` or an iterator of
            batches; anything else is returned as it is.
        template: The outputs with names at the leaves, as in `checks.per_output`.
    """
    watch = _Watch(expected, template)
    if _is_dataset(data):
        return _mapped(data, watch)
    if isinstance(data, keras.utils.PyDataset):
        return _Watched(data, watch)
    if isinstance(data, Iterator):
        return watch.iterator(data)
    if "torch" in sys.modules:
        from torch.utils.data import DataLoader

        if isinstance(data, DataLoader):
            data = copy.copy(data)
            data.collate_fn = _Collated(data.collate_fn, watch)
    return data


class KnownDatasets:
    """Datasets whose labels `fit` has compared, so that it need not in its next call.

    A `tf.data.Dataset` of known length that was read to its end yields the same labels again. One
    whose length is not known, such as one of a generator, may not, and is watched for good.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Sequence[Expected]]
        self._known = weakref.WeakKeyDictionary()
        self._under_way: tuple[weakref.ref[Any], int, Sequence[Expected]] | None = None

    def watched(
        self, expected: Sequence[Expected], data: Data, source: Data, template: object
    ) -> Any:
        """As the function `watched`, but for a dataset that is known.

        Args:
            expected: What the losses read, one entry for each output.
            data: What `fit` will read.
            source: What the user gave, of which it was made.
            template: The outputs with names at the leaves, as in `checks.per_output`.
        """
        self._under_way = None
        if not (_is_dataset(data) and _is_dataset(source)):
            return watched(expected, data, template)
        if self._known.get(source) == expected:
            return data
        length = int(data.cardinality())
        if length > 0:
            self._under_way = weakref.ref(source), length, expected
        return watched(expected, data, template)

    def read(self, batches: int) -> None:
        """Note the end of an epoch.

        Args:
            batches: How many were read in it, without an error.
        """
        if self._under_way is not None:
            source, length, expected = self._under_way
            given = source()
            if given is not None and batches >= length:
                self._known[given] = expected


def _is_dataset(data: Data) -> TypeGuard[tf.data.Dataset]:
    return "tensorflow" in sys.modules and isinstance(data, sys.modules["tensorflow"].data.Dataset)


class _Watch:
    """Compares the labels of a batch with what is read of each output."""

    def __init__(self, expected: Sequence[Expected], template: object) -> None:
        self.expected = expected
        self.template = template

    def labels(self, batch: Tensors) -> list[tuple[Any, Expected]]:
        """Labels, or their specs, of which some would be wrong."""
        if not isinstance(batch, list | tuple):
            return []
        y = keras.utils.unpack_x_y_sample_weight(tuple(batch))[1]
        if y is None:
            return []
        return [
            (label, one)
            for label, one in zip(checks.per_output(y, self.template), self.expected)
            if label is not None and one.bounds(label) is not None
        ]

    def check(self, batch: Tensors) -> None:
        """Raise `ValueError` for a batch of arrays whose labels are out of range."""
        for label, one in self.labels(batch):
            found = one.wrong(checks.as_array(label))
            if found is not None:
                raise ValueError(
                    f"{OUT_OF_RANGE}: from {found[0]} to {found[1]}, and {one.said(label)}"
                )

    def iterator(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, each checked."""
        for batch in batches:
            self.check(batch)
            yield batch


def _mapped(data: tf.data.Dataset, watch: _Watch) -> Any:
    import tensorflow as tf

    if not watch.labels(data.element_spec):
        return data

    @tf.autograph.experimental.do_not_convert
    def checked(*element: Tensors) -> Any:
        asserted = []
        for label, one in watch.labels(element):
            low, high = one.bounds(label) or (0, 0)
            wide = tf.cast(label, tf.int64) if label.dtype.is_integer else label
            least, greatest = tf.reduce_min(wide), tf.reduce_max(wide)
            read = wide
            if one.ignored is not None and one.are_numbers(label):
                read = tf.boolean_mask(wide, wide != one.ignored)
            wrong = tf.reduce_min(read) < tf.cast(low, wide.dtype)
            if high != float("inf"):
                wrong |= tf.reduce_max(read) > tf.cast(high, wide.dtype)
            if label.dtype == tf.uint64:
                wrong |= tf.reduce_any(label > tf.constant(2**62, tf.uint64))
            said = [f"{OUT_OF_RANGE}: from", least, "to", greatest, f", and {one.said(label)}"]
            # `tf.debugging.Assert` makes branches of it, which cost more than all the rest each
            # time that the dataset is iterated over.
            asserted.append(tf.raw_ops.Assert(condition=~wrong, data=said))
        with tf.control_dependencies(asserted):
            return tf.nest.map_structure(tf.identity, element, expand_composites=True)

    return data.map(checked)


class _Watched(keras.utils.PyDataset):
    """A `PyDataset` whose labels are checked."""

    def __init__(self, data: keras.utils.PyDataset, watch: _Watch) -> None:
        super().__init__(
            workers=data.workers,
            use_multiprocessing=data.use_multiprocessing,
            max_queue_size=data.max_queue_size,
        )
        self.data, self.watch = data, watch

    @property
    def num_batches(self) -> Any:
        return self.data.num_batches

    def __getitem__(self, index: int) -> Any:
        batch = self.data[index]
        self.watch.check(batch)
        return batch

    def on_epoch_begin(self) -> None:
        self.data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self.data.on_epoch_end()


class _Collated:
    """Makes batches of samples as a `DataLoader` does, and checks their labels."""

    def __init__(self, collate: Callable[[Any], Any], watch: _Watch) -> None:
        self.collate, self.watch = collate, watch

    def __call__(self, samples: Sequence[object]) -> Any:
        batch = self.collate(samples)
        self.watch.check(batch)
        return batch


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Raise one sentence in place of what a backend makes of labels out of range.

    Raises:
        ValueError: If labels of watched data are out of range.
    """
    try:
        yield
    except Exception as error:
        reason = _explained(error)
        if reason is None:
            raise
        raise reason from error


def _explained(error: Exception) -> ValueError | None:
    text = str(error)
    at = text.find(OUT_OF_RANGE)
    if at < 0:
        return None
    line = text[at:].removeprefix(OUT_OF_RANGE + ":").splitlines()[0]
    pieces = " ".join(line.replace("[", " ").replace("]", " ").replace("'", " ").split())
    return ValueError(f"The data yield labels {pieces.replace(' ,', ',')}")
