"""What `fit` and `evaluate` are given, looked at and joined before the first step."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras

from keras_kd.distill import data_checks, hooks, label_checks, monitor, objective, row_numbers
from keras_kd.teachers.row_numbers import Numbered
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import checks
from keras_kd.utils.data import are_arrays


class Prepared(keras.Model):
    """The part of the distiller that looks at its data before it trains.

    It refuses what cannot work, puts a cache's answers beside the rows, and builds
    what only data can tell, so that the first step finds nothing new.

    Attributes:
        student: The model that is trained.
        transfers: What is transferred to it.
    """

    student: Any
    transfers: list[Transfer]
    penalties: list[Any]
    batch_transforms: list[Any]
    adopt: Callable[[Any], None]
    _setup: Any
    _books: Any

    @property
    def metrics_need_labels(self) -> bool:
        """Whether `compile` was given metrics of the student."""
        return self._compile_metrics is not None

    @property
    def distills(self) -> bool:
        """Whether anything is transferred from a teacher."""
        return self._setup.teacher is not None or bool(self._setup.placed)

    def _hooks(self) -> list[Any]:
        """The penalties and the batch transform, as the distiller holds them."""
        return [*self.penalties, *self.batch_transforms]

    def _prepare(self, rows: Any, real: bool = True) -> None:
        """Look at a few rows before the first step: build what they show, refuse what cannot work.

        Args:
            rows: A few rows of the data, `None` where nothing can be read.
            real: Whether they are rows of the data, or zeros in their shape.
        """
        setup = self._setup
        if setup.prepared or setup.teacher is None or rows is None:
            return
        with self._scope():
            placed = setup.inspect(rows)
            if placed is not None:
                self.adopt(placed)
            if setup.look(rows, real) and not self.optimizer.built:
                # Slots that exist before the first step can be restored by callbacks.
                self.optimizer.build(self.trainable_variables)
        setup.prepared = True

    def _scope(self) -> Any:
        """Where variables are created, under `tf.distribute` too."""
        if keras.config.backend() == "tensorflow":
            return self.distribute_strategy.scope()
        return contextlib.nullcontext()

    def _for_fit(
        self, x: Any, y: Any, batch_size: int | None, arguments: dict[str, Any]
    ) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """What `keras.Model.fit` is given in place of what the user gave.

        Args:
            x: Inputs, or a dataset.
            y: Labels.
            batch_size: Samples a step.
            arguments: The other arguments of `fit`.

        Returns:
            The same four.
        """
        setup, given_x = self._setup, x
        data_checks.data(setup, x, y, arguments, self.loss)
        checks.training_data(x, y, self.loss, self.metrics_need_labels)
        checks.more_data(arguments)
        given = arguments.get("validation_data")
        as_given = x, y, arguments
        if setup.teacher is not None:
            x, y, batch_size, arguments = setup.teacher.join_fit(
                x, y, batch_size, arguments, setup.evaluate_distillation
            )
        row_numbers.require_samples(x)
        looking = [h.it for h in self._hooks() if isinstance(h.it, hooks.LooksFirst)]
        real_rows = not setup.settled or bool(looking)
        rows, real, x = checks.first_rows(x, real_rows, batch_size)
        unseen = setup.student.shapes is None
        self._prepare(rows, real)
        for hook in looking:
            hook.look(self, given_x, rows)
        if unseen:
            # Only now it shows how many classes there are.
            self._require_labels(as_given[1] if are_arrays(given_x) else None)
            if isinstance(given, list | tuple) and len(given) > 1:
                self._require_labels(given[1], "`y` of `validation_data`")
        setup.try_validation(given)
        x = row_numbers.added(x, self.transfers)
        if not isinstance(x, Numbered) and rows is not None:
            row_numbers.require(setup.split(rows)[1], self.transfers)
        if setup.evaluate_distillation and isinstance(given, list | tuple):
            size = arguments.get("validation_batch_size") or batch_size
            held, labels, weight = keras.utils.unpack_x_y_sample_weight(given)
            joined = self._asked(held, labels, weight, size)[0]
            if joined is held:
                row_numbers.require(setup.split(held)[1], self.transfers)
            else:
                arguments = {
                    **arguments,
                    "validation_data": joined,
                    "validation_batch_size": None,
                }
        # Where the teacher's answers were joined to arrays, these are a dataset by now.
        whole = (x, y, arguments) if are_arrays(x) else as_given
        setup.arrays = objective.training_arrays(*whole)
        if not are_arrays(given_x):
            x = self._watched(x)
        if given is not None and not isinstance(given, list | tuple):
            arguments = {**arguments, "validation_data": self._watched(given)}
        return x, y, batch_size, arguments

    def _for_evaluation(self, x: Any, y: Any, sample_weight: Any) -> Any:
        """Data of `evaluate`, looked at as those of `fit` are."""
        setup = self._setup
        data_checks.data(setup, x, y, {"sample_weight": sample_weight}, self.loss)
        return x if are_arrays(x) else self._watched(x)

    def _watched(self, data: Any) -> Any:
        """A dataset whose labels are compared with what the losses read."""
        setup = self._setup
        expected = label_checks.of_distiller(setup, self.loss)
        return label_checks.watched(expected, data, setup.student.template)

    def _require_labels(self, y: Any, name: str = "`y`") -> None:
        """Raise `ValueError` for labels in arrays that the losses cannot read."""
        setup = self._setup
        if y is not None:
            expected = label_checks.of_distiller(setup, self.loss)
            label_checks.require(expected, y, setup.student.template, name)

    def _asked(
        self, x: Any, y: Any, sample_weight: Any, batch_size: int | None
    ) -> tuple[Any, Any, Any, int | None]:
        """Data that the teacher is asked about in `evaluate`, joined to its answers."""
        teacher = self._setup.teacher
        if teacher is None:
            return x, y, sample_weight, batch_size
        joined: tuple[Any, Any, Any, int | None] = teacher.join_evaluation(
            x, y, sample_weight, batch_size
        )
        return joined

    def train_on_batch(self, x: Any, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Take one optimizer step, as `keras.Model.train_on_batch` does.

        Args:
            x: Inputs.
            y: Labels.
            *args: As in `keras.Model.train_on_batch`.
            **kwargs: As in `keras.Model.train_on_batch`.

        Returns:
            The loss, or the logs with `return_dict=True`.

        Raises:
            FloatingPointError: If the teacher's outputs are not finite.
        """
        self._setup.require_teacher()
        if self.compiled and not self._setup.prepared:
            self._prepare(checks.first_rows(x, True)[0])
        row_numbers.require(self._setup.split(x)[1], self.transfers)
        if self.compiled:
            self._require_labels(y)
        result = super().train_on_batch(x, y, *args, **kwargs)
        if self.distills and self._books is not None:
            loss = self._books.means["distillation_loss"].result()
            if not checks.finite(loss) and checks.finite(self.student.trainable_variables):
                raise monitor.teacher_failed(self._setup.teacher.name, "this batch")
        return result

    def test_on_batch(self, x: Any, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, as `keras.Model.test_on_batch` does."""
        if self.compiled:
            self._require_labels(y)
        return super().test_on_batch(x, y, *args, **kwargs)
