"""One set of values as a student: built, trained, stopped early where it is behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_kd.distill.candidates import Situation
from keras_kd.distill.distiller import Distiller
from keras_kd.distill.training_rows import Rows
from keras_kd.distill.trial_setting import answered, errors_of, meanings
from keras_kd.losses import DIST, SoftTargets
from keras_kd.models import meaning, output_kinds
from keras_kd.search import task
from keras_kd.students.shrink import shrink
from keras_kd.utils import checks
from keras_kd.utils.types import Logs, Losses

Values = Mapping[str, Any]

SHRINK = "shrink"


@dataclass(frozen=True)
class Trainer:
    """Trains students of a search, all under the same conditions.

    Args:
        build: From values to an untrained student, or `"shrink"`.
        model: The teacher's model, which `"shrink"` starts from.
        answers: What knows the teacher's answers to the training rows.
        train: What is trained on.
        validation: What stops a training that is behind.
        hard: The hard loss.
        epochs: Passes over the training rows.
        batch_size: Rows a step.
        verbose: Of `fit`.
        callbacks: Of every training.
    """

    build: Any
    model: Any
    answers: Any
    train: Rows
    validation: Rows
    hard: Any
    epochs: int
    batch_size: int
    verbose: int
    callbacks: Any

    def student(self, values: Values, seed: int) -> Any:
        """Build an untrained student.

        Args:
            values: Of the candidate.
            seed: Of its weights.

        Raises:
            TypeError: If what was built is no model.
        """
        keras.utils.set_random_seed(seed)
        student = build_student(self.build, self.model, values)
        if not student.built:
            student(self.train.taken(slice(0, 1)).x)
        return student

    def trained(
        self, values: Values, seed: int, keeps_on: Callable[[int, float], bool] | None = None
    ) -> tuple[Any, int]:
        """Train a student.

        Args:
            values: Of the candidate.
            seed: Of its weights, the order of the rows, and dropout.
            keeps_on: Asked at each rung, see `rungs`, with the number of epochs and the error on
                the validation rows: whether the training goes on.

        Returns:
            The student, and the epochs after which it was given up; all of them where it was not,
            even if a callback of the user's ended it.

        Raises:
            ArithmeticError: If its weights are not finite in the end.
        """
        student = self.student(values, seed)
        plain = is_plain(values)
        distiller = Distiller(student, None if plain else self.answers)
        steps = task.steps(self.train.count, self.batch_size, self.epochs)
        distiller.compile(
            optimizer=task.adam(values["learning_rate"], steps),
            loss=self.hard,
            **({} if plain else self.arguments(values, student)),
        )
        keras.utils.set_random_seed(seed)
        watch = _Rungs(self, student, keeps_on)
        self.train.fit(
            distiller,
            self.batch_size,
            self.epochs,
            verbose=self.verbose,
            callbacks=[watch, *(keras.tree.flatten(self.callbacks) if self.callbacks else [])],
        )
        if not all(np.isfinite(weight).all() for weight in student.get_weights()):
            raise ArithmeticError("the training ended with NaN or infinite weights")
        return student, watch.given_up or self.epochs

    def arguments(self, values: Values, student: keras.Model) -> dict[str, Any]:
        """Return what `Distiller.compile` is given for these values."""
        single = self.situation(student)
        losses: dict[str, Callable[[], Any]] = {
            "default": single.usual,
            "standardized": partial(SoftTargets, standardize=True, **single.reduction()),
            "DIST": partial(DIST, **single.reduction()),
        }
        several = single.told is None and values["method"] == "default"
        loss: Any = self._of_each(student) if several else losses[values["method"]]()
        return {
            "distillation_loss": loss,
            "alpha": float(values["alpha"]),
            "temperature": float(values["temperature"]),
        }

    def _of_each(self, student: keras.Model) -> Any:
        """The default loss of each of several outputs; `compile` has none for numbers."""
        told = meanings(student, self.hard)
        if meaning.VALUES not in told:
            return None
        template = output_kinds.output_template(student)
        each = [
            None if kind is None else Situation(hard, kind, None, student).usual()
            for kind, hard in zip(told, checks.per_output(self.hard, template), strict=True)
        ]
        return keras.tree.pack_sequence_as(template, each)

    def situation(self, student: keras.Model) -> Situation:
        """Return what losses are made by."""
        outputs = keras.tree.flatten(student(self.train.taken(slice(0, 1)).x, training=False))
        told = meanings(student, self.hard)
        return Situation(
            hard=self.hard,
            told=told[0] if len(outputs) == 1 else None,
            classes=int(outputs[0].shape[-1]) if len(outputs) == 1 else None,
            student=student,
        )

    def error(self, student: keras.Model) -> float:
        """Return the error of a Keras model on the validation rows."""
        answers = answered(student, self.validation.x)
        return errors_of(student, answers, self.validation, self.hard).mean


def build_student(build: Callable[..., Any] | str, model: keras.Model, values: Values) -> Any:
    """Build an untrained student.

    Args:
        build: From values to a model, or `"shrink"`.
        model: What `"shrink"` starts from.
        values: Of the candidate.

    Raises:
        TypeError: If what was built is no model.
    """
    if isinstance(build, str):
        return shrink(model, values["width"], values["depth"], name="student")
    student = build(dict(values))
    if not isinstance(student, keras.Model):
        raise TypeError(
            f"`build` returns a `keras.Model`. Received: {type(student).__name__} for {values}."
        )
    return student


def is_plain(values: Values) -> bool:
    """Whether the teacher takes no part in the training."""
    return bool(values["method"] == "plain" or values["alpha"] == 1)


def rungs(epochs: int) -> list[int]:
    """The numbers of epochs after which a training is compared with others: a ninth, a third."""
    found = {max(1, round(epochs / 9)), max(1, round(epochs / 3))}
    return sorted(rung for rung in found if rung < epochs)


def is_regression(student: keras.Model, hard: Losses) -> bool:
    """Whether errors are mean squared ones, or of one output among several, and no shares."""
    losses = checks.per_output(hard, output_kinds.output_template(student))
    told = [kind for kind, loss in zip(meanings(student, hard), losses) if loss is not None]
    return not all(kind in (meaning.CLASSES, meaning.INDEPENDENT) for kind in told)


class _Rungs(keras.callbacks.Callback):
    """Stops a training that is behind."""

    def __init__(
        self, trainer: Trainer, student: keras.Model, keeps_on: Callable[[int, float], bool] | None
    ) -> None:
        super().__init__()
        self.trainer = trainer
        self.student = student
        self.keeps_on = keeps_on
        self.rungs = rungs(trainer.epochs) if keeps_on else []
        self.given_up = 0

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if self.keeps_on is None or epoch + 1 not in self.rungs:
            return
        if not self.keeps_on(epoch + 1, self.trainer.error(self.student)):
            self.given_up = epoch + 1
            self.model.stop_training = True
