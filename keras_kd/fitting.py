"""Whether arrays, labels and weights fit the models, found out before any step is taken."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd import checks

_INT32 = 2**31


# ---------------------------------------------------------------------- arguments


def logits_flags(from_logits: Any) -> None:
    """Raise `TypeError` unless it is told for each side whether outputs are logits."""
    given = from_logits.values() if isinstance(from_logits, dict) else [from_logits]
    for value in given:
        if value is not None and not isinstance(value, bool | np.bool_):
            raise TypeError(
                "`from_logits` is True, False, or None to find out, or a dict of these for "
                f"'teacher' and 'student'. Received: from_logits={from_logits!r}."
            )


def functions(**given: Any) -> None:
    """Raise `TypeError` unless each argument is a function, or `None`."""
    for name, value in given.items():
        if value is not None and not callable(value):
            raise TypeError(
                f"`{name}` is a function from one batch `x` to what the model reads, or None. "
                f"Received: {name}={value!r}."
            )


def mapped(value: Any, name: str) -> Any:
    """What an input function made of a batch, if a model can read it.

    Raises:
        ValueError: If it is nothing.
    """
    leaves = keras.tree.flatten(value)
    if not leaves or any(leaf is None for leaf in leaves):
        raise ValueError(
            f"`{name}` gave {value!r} for a batch. It returns what the model reads: an array, or a "
            "structure of arrays."
        )
    return value


def probabilities(output: Any, told: Any, side: str, name: str) -> None:
    """Raise `ValueError` where outputs are said to be probabilities and are none.

    Args:
        output: What the model returned for some rows.
        told: Its `from_logits`.
        side: `"teacher"` or `"student"`.
        name: Its name.
    """
    if told is not False:
        return
    for tensor in keras.tree.flatten(output):
        values = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
        # Halves round to a little more than 1.
        if values.size and (np.nanmin(values) < -1e-3 or np.nanmax(values) > 1 + 1e-2):
            raise ValueError(
                f"`from_logits=False` says that the {side} `{name}` returns probabilities, and on "
                f"the first rows of the data it returns numbers from {np.nanmin(values):.4g} to "
                f"{np.nanmax(values):.4g}. Leave `from_logits` out, or pass `True` for logits."
            )


# --------------------------------------------------------------------------- data


def data(setup: Any, x: Any, y: Any, arguments: dict[str, Any], loss: Any) -> None:
    """Raise `ValueError` for data of `fit` that no step can be taken on.

    Args:
        setup: The distiller's models and transfers.
        x: What `fit` was given.
        y: Labels.
        arguments: The other arguments of `fit`.
        loss: The hard loss, or `None`.
    """
    _pair(setup, x, y, arguments.get("sample_weight"), loss, "")
    _class_weights(arguments.get("class_weight"), setup)
    given = arguments.get("validation_data")
    if given is None:
        return
    if not isinstance(given, list | tuple):
        if not _is_data(given):
            raise TypeError(
                "`validation_data` is `(x, y)`, `(x, y, sample_weight)` or a dataset of batches. "
                f"Received: validation_data of type {type(given).__name__}."
            )
        _pair(setup, given, None, None, loss, "`validation_data`")
        return
    if not 1 <= len(given) <= 3:
        raise ValueError(
            "`validation_data` is `(x, y)` or `(x, y, sample_weight)`. Received: "
            f"{len(given)} values."
        )
    held, labels, weight = keras.utils.unpack_x_y_sample_weight(tuple(given))
    _pair(setup, held, labels, weight, loss, "`validation_data`")
    rows = {
        name: {len(leaf) for leaf in keras.tree.flatten(part)}
        for name, part in (("x", held), ("y", labels), ("sample_weight", weight))
        if part is not None and _are_arrays(part)
    }
    if len(set().union(*rows.values())) > 1:
        raise ValueError(
            "The arrays of `validation_data` have different numbers of rows: "
            + ", ".join(f"{name} {_numbers(found)}" for name, found in rows.items())
            + ". Each sample needs one row in each."
        )


def _is_data(given: Any) -> bool:
    return (
        hasattr(given, "element_spec")
        or isinstance(given, keras.utils.PyDataset | Iterator)
        or hasattr(given, "__iter__")
        or hasattr(given, "__array__")
    )


def _are_arrays(x: Any) -> bool:
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(
        hasattr(leaf, "__array__") and len(getattr(leaf, "shape", ())) for leaf in leaves
    )


def _numbers(found: Any) -> str:
    return " and ".join(str(n) for n in sorted(found))


def _pair(setup: Any, x: Any, y: Any, weight: Any, loss: Any, where: str) -> None:
    """Look at inputs, labels and weights of one kind of data."""
    spec = getattr(x, "element_spec", None)
    if spec is not None:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(_unjoined(spec))
    elif not _are_arrays(x):
        return
    of = f" of {where}" if where else ""
    _inputs(setup, x, where)
    if y is not None:
        for leaf in keras.tree.flatten(y):
            kind = _kind(leaf)
            if kind is not None:
                raise ValueError(
                    f"`y`{of} holds {kind}, and labels are numbers. Number the classes: "
                    "`classes, y = numpy.unique(y, return_inverse=True)`."
                )
        _targets(setup, y, loss, f"`y`{of}")
    if weight is not None:
        for leaf in keras.tree.flatten(weight):
            kind = _kind(leaf)
            if kind is not None:
                raise ValueError(f"`sample_weight`{of} holds {kind}, and weights are numbers.")
            if where and hasattr(leaf, "__array__"):
                array = np.asarray(leaf)
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise ValueError(
                        f"`sample_weight`{of} is NaN or infinite in "
                        f"{int((~np.isfinite(array)).sum())} places. Repair them."
                    )
        _weight_shapes(setup, y, weight, f"`sample_weight`{of}")


def _weight_shapes(setup: Any, y: Any, weight: Any, name: str) -> None:
    """Compare weights with what losses give of an output: a value a sample, or a token, a pixel."""
    student = setup.student
    labels = checks.per_output(y, student.template)
    for i, one in enumerate(checks.per_output(weight, student.template)):
        output: Any = student.shapes[i] if student.shapes is not None else None
        # A spec of unknown rank has no shape that could be read.
        given: Any = getattr(one, "shape", None)
        shape = () if given is None or getattr(given, "rank", 0) is None else tuple(given)
        if output is None or not shape:
            continue
        found = shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape
        label: Any = getattr(labels[i], "shape", None)
        # Classes may lie on another axis than the last; labels then tell the places.
        places = [tuple(output)[:-1], *([tuple(label)] if _indexes(label, output) else [])]
        if not any(_covers(found, each) for each in places):
            kinds = " or ".join(
                f"({', '.join(['samples', *map(str, part)])})"
                for part in dict.fromkeys(((), tuple(output)[1:-1]))
            )
            raise ValueError(
                f"{name} has the shape {shape}, and the student `{student.model.name}` returns "
                f"{tuple(output)}. Pass one weight for each sample, or for each place that the "
                f"loss reads: shape {kinds}."
            )


def _indexes(label: Any, output: Any) -> bool:
    """Whether labels are class numbers, of one dimension less than the outputs."""
    return label is not None and getattr(label, "rank", 0) is not None and len(label) < len(output)


def _covers(weight: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether weights fit the first axes of values, 1 standing for any size."""
    return len(weight) <= len(values) and all(
        one in (None, 1) or other is None or one == other
        for one, other in zip(weight[1:], values[1:])
    )


def _unjoined(spec: Any) -> Any:
    """The element of a dataset, whose inputs may have the answers of a cache beside them."""
    from keras_kd.cache.join import Joined

    first, *rest = spec if type(spec) is tuple else (spec,)
    return (first.x if isinstance(first, Joined) else first, *rest)


def _kind(leaf: Any) -> str | None:
    """What an array holds that is no number, or `None`."""
    dtype = getattr(leaf, "dtype", None)
    name = str(getattr(dtype, "name", dtype))
    kind = getattr(dtype, "kind", "")
    if kind in ("U", "S") or name == "string":
        return "text"
    if kind == "O":
        return "Python objects, as arrays of rows of different lengths do,"
    if kind in ("M", "m"):
        return "dates or durations"
    return "complex numbers" if kind == "c" else None


def _inputs(setup: Any, x: Any, where: str) -> None:
    """Compare inputs with what the student declares to read."""
    model = setup.student.model
    name = f"the `x` of {where}" if where else "`x`"
    declared = keras.tree.flatten(getattr(model, "inputs", None) or [])
    text = not declared or any(str(tensor.dtype) == "string" for tensor in declared)
    own = setup.student_inputs is not None or setup.teacher_inputs is not None
    for leaf in keras.tree.flatten(x):
        kind = _kind(leaf)
        if kind is not None and not (kind == "text" and (text or own)):
            raise ValueError(
                f"{name[0].upper()}{name[1:]} holds {kind} (dtype {leaf.dtype}), and the student "
                f"`{model.name}` reads numbers. Convert it to an array of numbers, padded to one "
                "shape."
            )
    if own or not declared:
        return
    for leaf, tensor in _matched(x, model, declared):
        shape = tuple(getattr(leaf, "shape", None) or ())
        wanted = tuple(tensor.shape)
        if len(shape) == len(wanted) and any(
            None not in (a, b) and a != b for a, b in zip(shape[1:], wanted[1:])
        ):
            raise ValueError(
                f"{name[0].upper()}{name[1:]} has the shape {shape}, and the student "
                f"`{model.name}` reads inputs of shape {wanted}. Pass data of that form."
            )


def _matched(x: Any, model: Any, declared: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Inputs beside what the model declares, as far as they meet by name or order."""
    if isinstance(x, dict):
        by_name = {tensor.name: tensor for tensor in declared}
        return [(leaf, by_name[key]) for key, leaf in x.items() if key in by_name]
    leaves = keras.tree.flatten(x)
    return list(zip(leaves, declared)) if len(leaves) == len(declared) else []


# ------------------------------------------------------------------------- labels


def _targets(setup: Any, y: Any, loss: Any, name: str) -> None:
    """Compare labels with what the losses read and with the student's outputs."""
    student = setup.student
    losses = checks.per_output(loss, student.template)
    read = _class_readers(setup)
    for i, label in enumerate(checks.per_output(y, student.template)):
        shape: Any = student.shapes[i] if student.shapes is not None else None
        if label is None:
            continue
        if _width_differs(label, losses[i], shape):
            raise ValueError(
                f"{name} has the shape {tuple(label.shape)}, and the student "
                f"`{student.model.name}` returns {tuple(shape)}. Give each sample as many targets "
                "as the student has units."
            )
        if not hasattr(label, "__array__"):
            continue
        array = np.asarray(label)
        if checks._is_sparse(losses[i]) and array.dtype.kind in "iu" and array.size:
            low, high = int(array.min()), int(array.max())
            if high >= _INT32 or low < -_INT32:
                raise ValueError(
                    f"{name} holds labels from {low} to {high}, and class numbers are integers of "
                    "32 bits: larger ones would become others. Renumber the classes: `classes, y "
                    "= numpy.unique(y, return_inverse=True)`."
                )
        if i in read:
            problem = class_problem(array, shape, ignored=getattr(losses[i], "ignore_class", None))
            if problem is not None:
                raise ValueError(f"{name} {problem} `{read[i]}` reads them as class numbers.")


def _width_differs(label: Any, loss: Any, shape: Any) -> bool:
    """Whether targets have another last axis than outputs that are compared unit by unit."""
    if loss is None or checks._is_sparse(loss) or shape is None:
        return False
    found = tuple(getattr(label, "shape", None) or ())
    return (
        len(found) == len(shape) > 1
        and None not in (found[-1], shape[-1])
        and found[-1] != shape[-1]
        and 1 not in (found[-1], shape[-1])
    )


def _class_readers(setup: Any) -> dict[int, str]:
    """The outputs whose labels a distillation loss reads, with its name."""
    return {
        output: transfer.name
        for transfer, output in setup.placed
        if getattr(transfer.loss, "reads_labels", False)
    }


def class_problem(labels: np.ndarray, shape: Any, ignored: int | None = None) -> str | None:
    """What keeps labels from being class numbers, or `None`.

    One-hot rows are class numbers of another form.

    Args:
        labels: Labels of one output.
        shape: The shape of that output, or `None`.
        ignored: A number that marks labels which do not count.
    """
    if not labels.size or labels.dtype.kind not in "iuf":
        return None
    if shape is not None and labels.ndim == len(shape) and labels.shape[-1] != 1:
        return None
    if labels.dtype.kind == "f" and not (labels == np.round(labels)).all():
        return "holds fractions."
    counted = labels if ignored is None else labels[labels != ignored]
    if not counted.size:
        return None
    low, high = int(counted.min()), int(counted.max())
    classes = shape[-1] if shape is not None else None
    # A label of -1 marks a row that has none.
    if low < -1 or high >= (classes if classes is not None and classes > 1 else _INT32):
        known = f"and the student has {classes} classes" if classes else "beyond 32 bits"
        return f"runs from {low} to {high}, {known}."
    return None


def _class_weights(given: Any, setup: Any) -> None:
    """Raise unless each class has one finite weight that is not negative."""
    if given is None:
        return
    advice = "`class_weight` is a dict from class numbers to weights, as {0: 1.0, 1: 2.5}."
    if not isinstance(given, dict):
        raise TypeError(f"{advice} Received: class_weight of type {type(given).__name__}.")
    shapes = setup.student.shapes
    classes = None
    if shapes is not None and len(shapes) == 1:
        # One unit tells two classes apart.
        classes = 2 if shapes[0][-1] == 1 else shapes[0][-1]
    for key, value in given.items():
        whole = isinstance(key, int | np.integer) and not isinstance(key, bool)
        if not whole or key < 0 or (classes is not None and key >= classes):
            known = f" of 0 to {classes - 1}" if classes is not None else ""
            raise ValueError(f"{advice} Received: the key {key!r}, which is no class{known}.")
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise ValueError(
                f"{advice} A weight is finite and not negative. Received: {value!r} for class "
                f"{key}."
            )
    if not any(given.values()):
        raise ValueError(f"{advice} Received: no weight that is more than 0, so nothing trains.")


# ----------------------------------------------------------- labels of a dataset


LABELS_OUT_OF_RANGE = "keras_kd: labels out of range"


def watched(setup: Any, data: Any, loss: Any) -> Any:
    """A dataset whose integer labels are compared with the classes, batch by batch.

    Backends answer labels out of range each in their own way: by a bare error, by NaN on a GPU, or
    by leaving them out.

    Args:
        setup: The distiller's models and transfers.
        data: A `tf.data.Dataset`, a `PyDataset` or an iterator of batches; anything else is
            returned as it is.
        loss: The hard loss, or `None`.
    """
    student = setup.student
    losses = checks.per_output(loss, student.template)
    read = _class_readers(setup)
    bounds = []
    for i, one in enumerate(losses):
        shape: Any = student.shapes[i] if student.shapes is not None else None
        classes = shape[-1] if shape is not None else None
        watches = (checks._is_sparse(one) or i in read) and classes is not None and classes > 1
        ignored = getattr(one, "ignore_class", None)
        low = 0 if checks._is_sparse(one) else -1
        bounds.append((low, classes, ignored, len(shape)) if watches else None)
    if not any(bounds):
        return data
    watch = _Watch(bounds, student.template)
    if hasattr(data, "element_spec") and hasattr(data, "map"):
        return _mapped(data, watch)
    if isinstance(data, keras.utils.PyDataset):
        return _Watched(data, watch)
    return watch.iterator(data) if isinstance(data, Iterator) else data


class _Watch:
    """Compares the labels of a batch with the classes of each output."""

    def __init__(self, bounds: list[Any], template: Any) -> None:
        self.bounds = bounds
        self.template = template

    def labels(self, batch: Any) -> list[tuple[Any, Any]]:
        """Integer labels beside their bounds."""
        if not isinstance(batch, tuple):
            return []
        y = keras.utils.unpack_x_y_sample_weight(batch)[1]
        if y is None:
            return []
        return [
            (label, bound)
            for label, bound in zip(checks.per_output(y, self.template), self.bounds)
            if bound is not None and label is not None and _is_integer(label, bound[3])
        ]

    def check(self, batch: Any) -> None:
        """Raise `ValueError` for a batch of arrays whose labels are no classes."""
        for label, (low, classes, ignored, _) in self.labels(batch):
            array = np.asarray(label)
            counted = array if ignored is None else array[array != ignored]
            if counted.size and (counted.min() < low or counted.max() >= classes):
                raise ValueError(
                    f"{LABELS_OUT_OF_RANGE}: from {int(counted.min())} to {int(counted.max())}, "
                    f"and there are {classes} classes"
                )

    def iterator(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, each checked."""
        for batch in batches:
            self.check(batch)
            yield batch


def _is_integer(label: Any, rank: int) -> bool:
    """Whether these are class numbers; one-hot rows have the rank of the outputs."""
    dtype = getattr(label, "dtype", None)
    name = str(getattr(dtype, "name", dtype))
    shape: Any = getattr(label, "shape", ())
    if not name.startswith(("int", "uint")) or getattr(shape, "rank", 0) is None:
        return False
    return len(shape) < rank or (len(shape) == rank and shape[-1] == 1)


def _mapped(data: Any, watch: _Watch) -> Any:
    import tensorflow as tf

    if not watch.labels(data.element_spec):
        return data

    @tf.autograph.experimental.do_not_convert
    def checked(*element: Any) -> Any:
        asserted = []
        for label, (low, classes, ignored, _) in watch.labels(element):
            wide = tf.cast(label, tf.int64)
            wrong = (wide < low) | (wide >= classes)
            if label.dtype == tf.uint64:
                wrong |= label > tf.constant(2**62, tf.uint64)
            if ignored is not None:
                wrong &= wide != ignored
            said = [
                f"{LABELS_OUT_OF_RANGE}: from",
                tf.reduce_min(wide),
                "to",
                tf.reduce_max(wide),
                f", and there are {classes} classes",
            ]
            asserted.append(tf.debugging.Assert(~tf.reduce_any(wrong), said))
        with tf.control_dependencies([each for each in asserted if each is not None]):
            return tf.nest.map_structure(tf.identity, element, expand_composites=True)

    return data.map(checked)


class _Watched(keras.utils.PyDataset):
    """A `PyDataset` whose labels are checked."""

    def __init__(self, data: Any, watch: _Watch) -> None:
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


def explained(error: Exception) -> ValueError | None:
    """The one sentence for what a backend made of labels out of range, or `None`."""
    text = str(error)
    at = text.find(LABELS_OUT_OF_RANGE)
    if at < 0:
        return None
    pieces = " ".join(text[at:].replace("[", " ").replace("]", " ").replace("'", " ").split())
    numbers = pieces.partition("classes")[0].removeprefix(LABELS_OUT_OF_RANGE + ":").strip()
    return ValueError(
        f"The data yield labels {numbers.replace(' ,', ',')} classes, numbered from 0. Renumber "
        "the labels, or give the student more outputs."
    )
