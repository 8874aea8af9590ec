"""One training among several that are compared: what is the same for all, and how wrong it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd import backends
from keras_kd.distill.candidates import Made, Situation
from keras_kd.distill.row_errors import RowErrors, row_errors, row_weights
from keras_kd.distill.training_rows import Rows
from keras_kd.models import meaning, output_kinds
from keras_kd.teachers.base import TeacherLike
from keras_kd.utils import checks
from keras_kd.utils.types import Losses, Tensors

_FEW = slice(0, 4)
"""Rows that show the shape of what comes out."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that is the same for every candidate.

    Args:
        distiller: Class of the distillers, `keras_kd.Distiller`.
        make_student: From a seed to the student as it begins.
        train: What is trained on.
        validation: What candidates are compared by.
        hard: The hard loss.
        make_optimizer: Makes a fresh optimizer.
        epochs: Passes over the training rows.
        batch_size: Rows a step.
        made_with: More keywords of the distiller, such as `student_inputs`.
        compiled_with: More keywords of `compile`.
        fitted_with: More keywords of `fit`.
    """

    distiller: Any
    make_student: Callable[[int], Any]
    train: Rows
    validation: Rows
    hard: Any
    make_optimizer: Callable[[], Any]
    epochs: int
    batch_size: int
    made_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compiled_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fitted_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def situation(self, student: keras.Model, teacher: TeacherLike) -> Situation:
        """Return what the candidates may look at.

        Args:
            student: One as it begins.
            teacher: The teacher's model where its layers see what the student's see, or `None`.
        """
        rows = self.train.taken(_FEW).x
        output = self._outputs(student, rows)
        single = len(output) == 1
        return Situation(
            hard=self.hard,
            told=meanings(student, self.hard)[0] if single else None,
            classes=int(output[0].shape[-1]) if single else None,
            student=student,
            teacher=teacher,
            x=rows,
        )

    def _outputs(self, student: keras.Model, x: Tensors) -> list[Any]:
        mapped = self.made_with.get("student_inputs")
        return list(keras.tree.flatten(student(mapped(x) if mapped else x, training=False)))

    def counting(self, student: keras.Model) -> np.ndarray:
        """Return the numbers of the training rows that could compare models.

        They have a label, and weigh more than nothing.

        Args:
            student: One as it begins.
        """
        told, labels, losses, weight = _flat(student, self.train, self.hard)
        shapes = [
            tuple(output.shape) for output in self._outputs(student, self.train.taken(_FEW).x)
        ]
        return np.flatnonzero(row_weights(told, shapes, labels, losses, weight) > 0)

    def trained(
        self, method: Callable[[Any], Made] | None, teacher: TeacherLike, seed: int
    ) -> tuple[RowErrors, Any]:
        """Train one student.

        Args:
            method: From the student to the method; `None` for plain training.
            teacher: What it learns from.
            seed: Of the initial weights, the order of the rows, and dropout.

        Returns:
            Its errors on the validation rows, and the student.

        Raises:
            ArithmeticError: If the training diverges.
        """
        keras.utils.set_random_seed(seed)
        student = self.make_student(seed)
        distiller = self.distiller(student, teacher if method else None, **self.made_with)
        distiller.compile(
            optimizer=self.make_optimizer(),
            loss=self.hard,
            **(method(student).arguments if method else {}),
            **self.compiled_with,
        )
        # Whatever the layers drew, the rows come in the same order.
        keras.utils.set_random_seed(seed)
        fitted_with = {"verbose": 0, **self.fitted_with}
        self.train.fit(distiller, self.batch_size, self.epochs, **fitted_with)
        answers = answered(distiller, self.validation.x)
        return errors_of(student, answers, self.validation, self.hard, refine=True), student


def answered(model: keras.Model, x: Tensors, batch_size: int = 256) -> list[np.ndarray]:
    """Run a model on all rows.

    Args:
        model: A `keras.Model`. It is called as it is: `predict` would compile each of many models.
        x: Arrays of the rows.
        batch_size: Rows a call.

    Returns:
        `(rows, ...)` for each flat output.
    """
    return list(keras.tree.flatten(backends.answers_as_called(model, x, batch_size)))


def errors_of(
    student: keras.Model, answers: Sequence[Any], rows: Rows, hard: Losses, refine: bool = False
) -> RowErrors:
    """Compare a model's answers with the labels.

    Args:
        student: The model, which tells what its outputs mean.
        answers: `(rows, ...)` for each flat output.
        rows: With the labels.
        hard: The hard loss.
        refine: Whether the log loss at the best temperature is wanted too.
    """
    told, labels, losses, weight = _flat(student, rows, hard)
    return row_errors(told, answers, labels, losses, weight, refine)


def _flat(student: keras.Model, rows: Rows, hard: Losses) -> tuple[Any, Any, Any, Any]:
    """Of each flat output its meaning, labels and loss, and the weights."""
    template = output_kinds.output_template(student)
    labels = checks.per_output(rows.y, template)
    weight = None if rows.weight is None else checks.per_output(rows.weight, template)
    return meanings(student, hard), labels, checks.per_output(hard, template), weight


def meanings(student: keras.Model, hard: Losses) -> list[str | None]:
    """What each flat output of a model means, see `keras_kd.models.meaning`."""
    losses = checks.per_output(hard, output_kinds.output_template(student))
    kinds = [output.kind for output in output_kinds.outputs_of(student)]
    kinds += ["unknown"] * (len(losses) - len(kinds))
    return [meaning.of_output(loss, (kind,)) for loss, kind in zip(losses, kinds)]
