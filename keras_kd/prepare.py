"""What `fit` and `evaluate` are given, looked at and joined before the first step."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras

from keras_kd import checks, fitting, objective
from keras_kd.teachers import numbered
from keras_kd.transfer import Transfer


class Prepared(keras.Model):
    """The part of the distiller that looks at its data before it trains.

    It refuses what cannot work, puts a cache's answers beside the rows, and builds
    what only data can tell, so that the first step finds nothing new.

    Attributes:
        transfers: What is transferred to the student.
    """

    transfers: list[Transfer]
    adopt: Callable[[Any], None]
    _setup: Any

    @property
    def metrics_need_labels(self) -> bool:
        """Whether `compile` was given metrics of the student."""
        return self._compile_metrics is not None

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
        fitting.data(setup, x, y, arguments, self.loss)
        checks.training_data(x, y, self.loss, setup.student, self.metrics_need_labels)
        checks.more_data(arguments, self.loss, setup.student)
        given = arguments.get("validation_data")
        as_given = x, y, arguments
        if setup.teacher is not None:
            x, y, batch_size, arguments = setup.teacher.join_fit(
                x, y, batch_size, arguments, setup.evaluate_distillation
            )
        numbered.require_samples(x)
        rows, real, x = checks.first_rows(x, not setup.settled, batch_size)
        self._prepare(rows, real)
        setup.try_validation(given)
        x = numbered.added(x, self.transfers)
        if not isinstance(x, numbered.Numbered) and rows is not None:
            numbered.require(setup.split(rows)[1], self.transfers)
        if setup.evaluate_distillation and isinstance(given, list | tuple):
            size = arguments.get("validation_batch_size") or batch_size
            held, labels, weight = keras.utils.unpack_x_y_sample_weight(given)
            joined = self._asked(held, labels, weight, size)[0]
            if joined is held:
                numbered.require(setup.split(held)[1], self.transfers)
            else:
                arguments = {
                    **arguments,
                    "validation_data": joined,
                    "validation_batch_size": None,
                }
        # Where the teacher's answers were joined to arrays, these are a dataset by now.
        whole = (x, y, arguments) if numbered.are_arrays(x) else as_given
        setup.arrays = objective.training_arrays(*whole)
        if not numbered.are_arrays(given_x):
            x = fitting.watched(setup, x, self.loss)
        if given is not None and not isinstance(given, list | tuple):
            held = fitting.watched(setup, given, self.loss)
            arguments = {**arguments, "validation_data": held}
        return x, y, batch_size, arguments

    def _for_evaluation(self, x: Any, y: Any, sample_weight: Any) -> Any:
        """Data of `evaluate`, looked at as those of `fit` are."""
        setup = self._setup
        fitting.data(setup, x, y, {"sample_weight": sample_weight}, self.loss)
        if numbered.are_arrays(x):
            checks.labels(y, self.loss, setup.student)
            return x
        return fitting.watched(setup, x, self.loss)

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
