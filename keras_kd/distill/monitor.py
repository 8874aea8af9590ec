"""What the distiller watches while it trains: the teacher, and the live values for the logs."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_kd.distill import hooks
from keras_kd.distill.preparation import Preparation
from keras_kd.losses.base import DistillationLoss
from keras_kd.losses.temperatures import AdaptiveTemperature
from keras_kd.teachers.base import AnswerError, Teacher
from keras_kd.utils import checks
from keras_kd.utils.types import Logs


class TrainingMonitor(keras.callbacks.Callback):
    """Puts the live values into the logs and stops when the teacher fails.

    First in the list, so that every other callback sees the values. Batch ends
    may run in a thread of their own, beside the next step, so they only take
    notes; variables are read where Keras waits for the callbacks.
    """

    async_safe = True

    def __init__(self, teacher: Teacher | None, preparation: Preparation) -> None:
        super().__init__()
        self.teacher = teacher
        self.memory = preparation.memory
        self.labels = preparation.labels
        self.begins = True
        self.epoch = 0
        self.batches = 0
        self.read = 0
        self.suspect: int | None = None
        self.under_way: int | None = None
        self.live_values: dict[str, float] = {}

    def on_train_begin(self, logs: Logs = None) -> None:
        """Forget the values of an earlier `fit`."""
        self.live_values = self.model.live_values
        self.live_values.clear()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Remember which epoch this is, and let the teacher know."""
        self.epoch, self.begins, self.read = epoch, True, 0
        if self.teacher is not None:
            self.teacher.begin_epoch(epoch)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Stop before the next step if the teacher has failed; ask it anew if it has changed."""
        self._stop_if_teacher()
        if self.memory.changed(self.begins):
            # With the step that asks the teacher, though its answers lie beside the rows.
            self.model.make_train_function()
        self.begins, self.under_way = False, batch

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Note the first batch whose distillation loss is not a number."""
        self.batches += 1
        self.read, self.under_way = batch + 1, None
        if logs is None:
            return
        if math.isnan(logs.get("distillation_loss", 0.0)):
            self.suspect = batch if self.suspect is None else min(batch, self.suspect)
        logs.update(self.live_values)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Add the live values to the logs of the epoch."""
        if self.batches == 0:
            raise ValueError(
                "The training data are empty: no batch came out of them. Check that the dataset "
                "yields at least one batch (a `drop_remainder` with too few samples yields none)."
            )
        self._stop_if_teacher()
        self.labels.read(self.read)
        distiller = self.model
        if logs is None or not distiller.distills:
            return
        logs.update(_temperatures(distiller))
        if distiller.weighs_by_alpha:
            logs["alpha"] = float(ops.convert_to_numpy(distiller.alpha))
        logs.update(self.live_values)

    @contextlib.contextmanager
    def placing(self) -> Iterator[None]:
        """Tell of the batch in which a step that is not compiled was not answered."""
        try:
            yield
        except AnswerError as error:
            if self.under_way is None:
                raise
            first = self.under_way + 1
            where = self._batches(first, first + self.model.steps_per_execution - 1)
            raise error.placed(where) from error.__cause__

    def _stop_if_teacher(self) -> None:
        """Raise if the student's weights are sound, so that the NaN is the teacher's."""
        if self.suspect is None or self.teacher is None:
            return
        distiller = self.model
        if all(
            bool(ops.all(ops.isfinite(ops.cast(v, "float32"))))
            for v in distiller.student.trainable_variables
        ):
            raise teacher_failed(self.teacher, self._where())
        # The student itself diverged, which is for `TerminateOnNaN` to handle.
        self.suspect = None

    def _where(self) -> str:
        last = (self.suspect or 0) + 1
        # Keras shows a callback only the last of the steps that it executes at once.
        steps = self.model.steps_per_execution
        return self._batches((last - 1) // steps * steps + 1, last)

    def _batches(self, first: int, last: int) -> str:
        batches = f"batch {last}" if first == last else f"one of the batches {first} to {last}"
        return f"{batches} of epoch {self.epoch + 1}"


def _temperatures(distiller: hooks.Trained) -> dict[str, float]:
    """The temperatures in force, by their names in the logs.

    `temperature` is the distiller's wherever a loss follows it, or that of the only loss;
    a loss with one of its own beside others has it under `NAME_temperature`.
    """
    live = float(ops.convert_to_numpy(distiller.temperature))
    named: dict[str, float] = {}
    follows = False
    for transfer in distiller.transfers:
        loss = transfer.loss
        if not isinstance(loss, DistillationLoss) or not loss.softens:
            continue
        own = loss.temperature
        own = own.base if isinstance(own, AdaptiveTemperature) else own
        follows = follows or own is None
        if own is not None:
            named[f"{transfer.name}_temperature"] = float(own)
    if follows:
        return {"temperature": live, **named}
    if len(named) == 1:
        (only,) = named.values()
        return {"temperature": only}
    return named


def teacher_failed(teacher: Teacher, where: str) -> BaseException:
    """What is raised when the teacher's outputs stop being finite.

    Args:
        teacher: The teacher, which may know why.
        where: Of which batch it was asked.
    """
    failure = teacher.failure()
    if failure is not None:
        return failure.placed(where) if isinstance(failure, AnswerError) else failure
    return FloatingPointError(
        f"The outputs of the teacher `{teacher.name}` are NaN or infinite in {where}. Training "
        "stopped; that batch gave the student no gradient, its weights are finite, and checkpoints "
        "of earlier epochs are untouched. Check that batch's inputs and the teacher's weights."
    )


def first(monitor: TrainingMonitor, callbacks: object, model: keras.Model) -> Any:
    """The callbacks of `fit` with the monitor before all others.

    Args:
        monitor: The monitor.
        callbacks: What `fit` was given: a callback, a list of them, a `CallbackList` or `None`.
        model: What is trained.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        monitor.set_model(model)
        callbacks.callbacks.insert(0, monitor)
        return callbacks
    return [monitor, *(keras.tree.flatten(callbacks) if callbacks else [])]


def require_finite(distiller: keras.Model, distillation_loss: keras.Metric | None) -> None:
    """Raise `FloatingPointError` if the teacher's answers to one batch were not finite.

    Args:
        distiller: What was trained on the batch.
        distillation_loss: The metric that has booked it, or `None`.
    """
    if distillation_loss is None or checks.finite(distillation_loss.result()):
        return
    if checks.finite(distiller.student.trainable_variables):
        raise teacher_failed(distiller.pairing.teacher, "this batch")
