"""What `fit` and `evaluate` are given, looked at and joined before the first step.

`Preparation` refuses what cannot work, puts a cache's answers beside the rows, and builds what only
data can tell, so that the first step finds nothing new.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd import backends
from keras_kd.distill import data_checks, hooks, label_checks, row_numbers
from keras_kd.distill.host_calls import HostCalls
from keras_kd.distill.memory import AnswerMemory
from keras_kd.distill.pairing import Pairing
from keras_kd.distill.short_steps import ShortSteps
from keras_kd.models import output_kinds, training_identity
from keras_kd.teachers.row_numbers import Numbered
from keras_kd.utils import checks
from keras_kd.utils.data import are_arrays, labels_of
from keras_kd.utils.types import Data, Tensor, Tensors
from keras_kd.utils.values import refuse_holder

Given = tuple[Any, Any, int | None, dict[str, Any]]
"""`x`, `y`, `batch_size` and the other arguments of `fit`."""


class Preparation:
    """Looks at the data of a distiller before it trains.

    Args:
        pairing: The models and how they are joined.
        teacher_answers: As given to `Distiller`.
        name: The distiller's, for messages.

    Attributes:
        memory: Keeps the teacher's answers.
        labels: Knows the datasets whose labels were compared.
        steps: Takes several steps at once.
        host_calls: Leaves XLA out of steps that call the host.
        arrays: `(x, y, sample_weight)` that `fit` is training on, where that is arrays.
        trains_on: `fn()`: what `fit` was given, in plain values by name, while it runs.
    """

    def __init__(self, pairing: Pairing, teacher_answers: str, name: str) -> None:
        self._pairing = pairing
        self.memory = AnswerMemory(pairing, teacher_answers, name)
        self.labels = label_checks.KnownDatasets()
        self.steps = ShortSteps(pairing)
        self.host_calls = HostCalls(pairing)
        self.arrays: tuple[Any, Any, Any] | None = None
        self.trains_on: Callable[[], dict[str, Any]] | None = None

    @contextlib.contextmanager
    def training(
        self, x: Data, y: Tensors | None, batch_size: int | None, arguments: dict[str, Any]
    ) -> Iterator[None]:
        """Know in here what `fit` was given."""
        self.arrays = None
        self.trains_on = functools.partial(
            training_identity.of_data, x, y, batch_size, dict(arguments)
        )
        try:
            yield
        finally:
            self.arrays, self.trains_on = None, None

    def models(self, distiller: hooks.Trained, rows: Tensors, real: bool = True) -> None:
        """Look at a few rows before the first step: build what they show, refuse what cannot work.

        Args:
            distiller: What is prepared.
            rows: A few rows of the data, `None` where nothing can be read.
            real: Whether they are rows of the data, or zeros in their shape.
        """
        pairing = self._pairing
        if pairing.prepared or pairing.teacher is None or rows is None:
            return
        with backends.variable_scope(distiller):
            placed = pairing.inspect(rows)
            if placed is not None:
                distiller.adopt(placed)
            if pairing.look(rows, real) and not distiller.optimizer.built:
                # Slots that exist before the first step can be restored by callbacks.
                distiller.optimizer.build(distiller.trainable_variables)
        pairing.prepared = True

    def require_trainable(self, distiller: hooks.Trained, x: object) -> None:
        """Raise if nothing trains or `x` is no data; follow weights of the teacher that changed."""
        refuse_holder("`x`", x)
        self._pairing.require_teacher()
        self._pairing.refresh()
        student = distiller.student
        if not distiller.trainable_variables and student.built:
            raise ValueError(
                f"No weight of the student `{student.name}` is trainable. Set "
                "`student.trainable = True`, or give it layers that it does not share with the "
                "teacher."
            )

    def for_fit(
        self,
        distiller: hooks.Trained,
        given: Given,
        epochs: int,
        callbacks: Sequence[keras.callbacks.Callback] | None,
    ) -> Given:
        """What `keras.Model.fit` is given in place of what the user gave.

        Args:
            distiller: What is trained.
            given: `x`, `y`, `batch_size` and the other arguments of `fit`.
            epochs: Index of the epoch at which training ends.
            callbacks: The user's.

        Returns:
            The same four.
        """
        found = self.memory.for_fit(distiller, self._looked_at(distiller, *given), epochs)
        return self.steps.for_fit(distiller, found, callbacks)

    def _looked_at(
        self,
        distiller: hooks.Trained,
        x: Data,
        y: Tensors | None,
        batch_size: int | None,
        arguments: dict[str, Any],
    ) -> Given:
        """The same, found to fit, and joined to the answers that a teacher has stored."""
        pairing, given_x = self._pairing, x
        asks = pairing.compiled.asks_in_evaluation
        data_checks.data(pairing, x, y, arguments, distiller.loss)
        checks.training_data(x, y, distiller.loss, distiller.metrics_need_labels)
        checks.more_data(arguments)
        given = arguments.get("validation_data")
        as_given = x, y, arguments
        if pairing.teacher is not None:
            x, y, batch_size, arguments = pairing.teacher.join_fit(
                x, y, batch_size, arguments, asks
            )
        row_numbers.require_samples(x)
        held = [*distiller.penalties, *distiller.batch_transforms]
        looking = [hook.it for hook in held if isinstance(hook.it, hooks.LooksFirst)]
        real_rows = not pairing.settled or bool(looking)
        rows, real, x = checks.first_rows(x, real_rows, batch_size)
        unseen = pairing.student.shapes is None
        self.models(distiller, rows, real)
        for hook in looking:
            hook.look(distiller, given_x, rows)
        if unseen:
            # Only now it shows how many classes there are.
            self.require_labels(distiller, as_given[1] if are_arrays(given_x) else None)
            if isinstance(given, list | tuple) and len(given) > 1:
                self.require_labels(distiller, given[1], "`y` of `validation_data`")
        with backends.variable_scope(distiller):
            labels = labels_of(*as_given[:2])
            outputs = output_kinds.symbolic_outputs(pairing.student.model)
            distiller.make_metrics(labels, outputs)
        pairing.try_validation(given)
        x = row_numbers.added(x, distiller.transfers)
        if not isinstance(x, Numbered) and rows is not None:
            row_numbers.require(pairing.split(rows)[1], distiller.transfers)
        if asks and isinstance(given, list | tuple):
            arguments = self._joined_validation(distiller, given, batch_size, arguments)
        # Where the teacher's answers were joined to arrays, these are a dataset by now.
        whole = (x, y, arguments) if are_arrays(x) else as_given
        self.arrays = _training_arrays(*whole)
        if not are_arrays(given_x):
            expected = label_checks.of_distiller(pairing, distiller.loss)
            x = self.labels.watched(expected, x, given_x, pairing.student.template)
        if given is not None and not isinstance(given, list | tuple):
            arguments = {**arguments, "validation_data": self._watched(distiller, given)}
        return x, y, batch_size, arguments

    def _joined_validation(
        self,
        distiller: hooks.Trained,
        given: Sequence[Any] | None,
        batch_size: int | None,
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        """The arguments of `fit` with validation arrays joined to the answers to them."""
        size = arguments.get("validation_batch_size") or batch_size
        held, labels, weight = keras.utils.unpack_x_y_sample_weight(given)
        joined = self._asked(held, labels, weight, size)[0]
        if joined is held:
            row_numbers.require(self._pairing.split(held)[1], distiller.transfers)
            return arguments
        return {**arguments, "validation_data": joined, "validation_batch_size": None}

    def for_evaluation(
        self,
        distiller: hooks.Trained,
        x: Data,
        y: Tensors | None,
        batch_size: int | None,
        arguments: dict[str, Any],
        known: bool = False,
    ) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """What `keras.Model.evaluate` is given in place of what the user gave.

        Args:
            distiller: What is evaluated.
            x: Inputs, or a dataset.
            y: Labels.
            batch_size: Samples a step.
            arguments: The other arguments of `evaluate`.
            known: Whether `fit` has looked at these data.

        Returns:
            The same four.
        """
        pairing = self._pairing
        if distiller.compiled and not known:
            weight = arguments.get("sample_weight")
            data_checks.data(pairing, x, y, {"sample_weight": weight}, distiller.loss)
            x = x if are_arrays(x) else self._watched(distiller, x)
        if not pairing.compiled.asks_in_evaluation:
            return x, y, batch_size, arguments
        pairing.refresh()
        weight = arguments.get("sample_weight")
        x, y, weight, batch_size = self._asked(x, y, weight, batch_size)
        if not pairing.prepared:
            pairing.require_teacher()
            rows, real, x = checks.first_rows(x, not pairing.settled)
            self.models(distiller, rows, real)
        return x, y, batch_size, {**arguments, "sample_weight": weight}

    def for_batch(self, distiller: hooks.Trained, x: Data, y: Tensors | None) -> None:
        """Look at one batch that is trained on by itself."""
        self._pairing.require_teacher()
        if distiller.compiled and not self._pairing.prepared:
            self.models(distiller, checks.first_rows(x, True)[0])
        row_numbers.require(self._pairing.split(x)[1], distiller.transfers)
        if distiller.compiled:
            self.require_labels(distiller, y)

    def one_batch(self, distiller: hooks.Trained, data: Data) -> tuple[Any, Any, Any]:
        """One batch `(x, y, sample_weight)` as `fit` would hand it to the step."""
        if not distiller.compiled:
            raise ValueError("The distiller is not compiled. Call `distiller.compile` first.")
        self._pairing.require_teacher()
        if not self._pairing.prepared:
            x = keras.utils.unpack_x_y_sample_weight(data)[0]
            self.models(distiller, checks.first_rows(x, True)[0])
        return plain_batch(data)

    def require_labels(
        self, distiller: hooks.Trained, y: Tensors | None, name: str = "`y`"
    ) -> None:
        """Raise `ValueError` for labels in arrays that the losses cannot read."""
        if y is not None:
            expected = label_checks.of_distiller(self._pairing, distiller.loss)
            label_checks.require(expected, y, self._pairing.student.template, name)

    def _watched(self, distiller: hooks.Trained, data: Data) -> Any:
        """A dataset whose labels are compared with what the losses read."""
        expected = label_checks.of_distiller(self._pairing, distiller.loss)
        return label_checks.watched(expected, data, self._pairing.student.template)

    def _asked(
        self, x: Data, y: Tensors | None, sample_weight: Tensors | None, batch_size: int | None
    ) -> tuple[Any, Any, Any, int | None]:
        """Data that the teacher is asked about in `evaluate`, joined to its answers."""
        teacher = self._pairing.teacher
        if teacher is None:
            return x, y, sample_weight, batch_size
        return teacher.join_evaluation(x, y, sample_weight, batch_size)

    def sample_rows(self, count: int) -> Any:
        """Some rows of the arrays that `fit` is reading, as one batch, or `None`.

        Args:
            count: How many at most; they are spread evenly over the data.
        """
        if self.arrays is None:
            return None
        length = len(keras.tree.flatten(self.arrays[0])[0])
        chosen = np.unique(np.linspace(0, length - 1, min(count, length)).round().astype("int64"))

        def take(leaf: np.ndarray) -> Any:
            array = ops.convert_to_numpy(leaf) if ops.is_tensor(leaf) else np.asarray(leaf)
            return array[chosen]

        found = keras.tree.map_structure(take, self.arrays, none_is_leaf=False)
        teacher = self._pairing.teacher
        return found if teacher is None else teacher.joined(found, chosen)


def _training_arrays(x: Data, y: Tensors | None, arguments: dict[str, Any]) -> Any:
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


def plain_batch(data: Data) -> tuple[Any, Any, Any]:
    """One batch `(x, y, sample_weight)` as `fit` would hand it to the step.

    Args:
        data: `x`, `(x, y)` or `(x, y, sample_weight)`, in arrays or tensors.
    """

    def tensor(leaf: Tensor) -> Any:
        if not hasattr(leaf, "__array__"):
            return leaf
        array = keras.ops.convert_to_numpy(leaf) if keras.ops.is_tensor(leaf) else leaf.__array__()
        dtype = keras.config.floatx() if array.dtype.kind == "f" else None
        return keras.ops.convert_to_tensor(array, dtype=dtype)

    x, y, weight = keras.utils.unpack_x_y_sample_weight(
        keras.tree.map_structure(tensor, data, none_is_leaf=False)
    )
    return x, y, weight
