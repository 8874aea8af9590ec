"""`compile(distillation_loss="auto")`: the method is chosen at the start of the first `fit`.

With each seed another tenth of the labeled training rows is held out; every candidate trains the
student on the others, from the weights that it has, for the epochs that `fit` was asked for; then
the student has its first weights again, and trains on all rows by the method that was chosen. Rows
without a label are trained on and never held out. Where three seeds leave it open whether a method
is better, three more, and their tenths, decide. See `keras_kd.distill.method_choice`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_kd import backends
from keras_kd.cache.asked_once import SomeRows, asked_once
from keras_kd.cache.teacher import CachedTeacher
from keras_kd.distill import method_choice
from keras_kd.distill.candidates import CANDIDATES, Situation
from keras_kd.distill.compiled import fresh_optimizer
from keras_kd.distill.given import AUTO as NAME
from keras_kd.distill.given import stand_in
from keras_kd.distill.method_choice import MethodChoice
from keras_kd.distill.training_rows import read
from keras_kd.distill.trial_setting import Setting
from keras_kd.models import variables
from keras_kd.utils.types import Tensors

SEEDS = 3
HELD_OUT = 0.1
MORE = 3
"""Seeds that are added where the first ones leave it open."""
LEAST = 10
"""Rows that are held out at least: of fewer every single one decides."""


def choose(
    distiller: keras.Model,
    x: Tensors,
    y: Tensors | None,
    batch_size: int | None,
    epochs: int,
    verbose: int | str,
    arguments: dict[str, Any],
) -> MethodChoice:
    """Choose the method for this training and compile the distiller for it.

    Args:
        distiller: Compiled with `distillation_loss="auto"`.
        x: What `fit` was given.
        y: Labels.
        batch_size: Samples a step.
        epochs: Index of the epoch at which training ends.
        verbose: As for `fit`: 0 says nothing.
        arguments: The other arguments of `fit`.

    Returns:
        The choice, which is also `distiller.method_choice`.

    Raises:
        ValueError: If there are no labels, too few rows, or the data cannot be read twice.
    """
    compiled = dict(distiller.pairing.compiled.arguments)
    given = distiller.teacher
    if given is None or compiled["loss"] is None:
        raise ValueError(
            f'`distillation_loss="{NAME}"` compares methods by the labels, and needs a teacher and '
            "a hard `loss`. Pass both, or name the distillation loss."
        )
    rows, numbers, size = read(x, y, arguments, f'`distillation_loss="{NAME}"`')
    batch_size = batch_size or size or 32
    teacher_inputs, student_inputs = distiller.teacher_inputs, distiller.student_inputs
    from_logits = distiller.pairing.from_logits
    fit: dict[str, Any] = {
        name: arguments[name] for name in ("class_weight", "shuffle") if name in arguments
    }
    keep = ("run_eagerly", "steps_per_execution", "jit_compile", "auto_scale_loss", "loss_weights")
    student = distiller.student
    with (
        _unharmed(student, rows.taken(slice(0, 2)).x, student_inputs),
        backends.variable_scope(distiller),
    ):
        whole = Setting(
            distiller=type(distiller),
            make_student=_Again(student),
            train=rows,
            validation=rows,
            hard=compiled["loss"],
            make_optimizer=lambda: _fresh(distiller.optimizer),
            epochs=max(1, epochs - arguments.get("initial_epoch", 0)),
            batch_size=batch_size,
            made_with={"student_inputs": student_inputs, "from_logits": dict(from_logits)},
            compiled_with={name: compiled[name] for name in keep if name in compiled},
            fitted_with=fit,
        )
        splits = _splits(whole.counting(student), rows.count)

        def divided(seed: int) -> Setting:
            train, held = splits[seed]
            return dataclasses.replace(whole, train=rows.taken(train), validation=rows.taken(held))

        setting = divided(0)
        mapped = teacher_inputs is not None or student_inputs is not None
        model = None if mapped else method_choice.model_of(given)

        def situation(student: keras.Model) -> Situation:
            return setting.situation(student, model)

        methods = method_choice.prepared(CANDIDATES, situation(student), setting.train.count)
        if verbose != 0:
            stored = isinstance(given, CachedTeacher)
            asked = 0 if stored else rows.count
            print(f"{NAME}: {method_choice.cost(methods, SEEDS, setting, asked, MORE, True)}")
        with tempfile.TemporaryDirectory(prefix="keras_kd-auto-") as folder:
            taps = method_choice.taps_of(methods)
            known: CachedTeacher = given
            if not isinstance(given, CachedTeacher):
                numbers = None
                known = asked_once(
                    distiller.pairing.teacher,
                    rows.x,
                    folder,
                    taps=taps,
                    teacher_inputs=teacher_inputs,
                    from_logits=from_logits.get("teacher"),
                )
            of_rows = np.arange(rows.count) if numbers is None else numbers

            def fold(seed: int) -> tuple[Setting, CachedTeacher]:
                return divided(seed), SomeRows(known, of_rows[splits[seed][0]])

            choice = method_choice.choose(
                setting,
                methods,
                known,
                range(SEEDS),
                situation=situation,
                folds=fold,
                more=range(SEEDS, SEEDS + MORE),
            )
            choice.student = None
    final = choice.arguments
    if "distillation_loss" not in final:
        final = {**final, "distillation_loss": stand_in(compiled["loss"])}
    distiller.compile(optimizer=distiller.optimizer, **{**compiled, **final})
    distiller.method_choice = choice
    if verbose != 0:
        print(f"{NAME}: {choice.verdict}.")
    return choice


class _Again:
    """The student itself, with its first weights each time."""

    def __init__(self, student: keras.Model) -> None:
        self.student = student
        self.values = variables.values(student.variables)

    def __call__(self, seed: int) -> Any:
        variables.assign(self.student.variables, self.values)
        return self.student


@contextlib.contextmanager
def _unharmed(student: keras.Model, x: Tensors, student_inputs: Any) -> Iterator[None]:
    """Leave the student, and the generators of random numbers, as if nothing had happened.

    So the training behind the choice is, step by step, that of the method named beforehand. The
    seed that Keras gives to new layers cannot be read; where NumPy's was set, it follows from that.
    """
    if not student.built:
        student(student_inputs(x) if student_inputs else x)
    values = variables.values(student.variables)
    python, numbers = random.getstate(), np.random.get_state()
    with backends.shuffles_kept():
        try:
            yield
        finally:
            variables.assign(student.variables, values)
            np.random.set_state(numbers)
            keras.utils.set_random_seed(int(np.random.randint(2**31)))
            random.setstate(python)
            np.random.set_state(numbers)


def _fresh(optimizer: keras.optimizers.Optimizer) -> Any:
    """Another optimizer of the same settings."""
    try:
        return fresh_optimizer(optimizer)
    except Exception as error:
        # Whatever a class of the user's own raises.
        raise ValueError(
            f'`distillation_loss="{NAME}"` makes an optimizer like the given one for every '
            f"training, and `{type(optimizer).__name__}` cannot be made from its config: {error}. "
            "Register its classes with `keras.saving.register_keras_serializable`, or name the "
            "distillation loss."
        ) from error


def _splits(labeled: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each seed the numbers of the rows to train on, and of those held out.

    Args:
        labeled: Numbers of the rows that have a label.
        count: Of all rows.
    """
    held = round(HELD_OUT * len(labeled))
    if held < LEAST:
        raise ValueError(
            f'`distillation_loss="{NAME}"` holds out a tenth of the labeled training rows, at '
            f"least {LEAST} of them. Received: {len(labeled)} rows. Pass more, or name the "
            "distillation loss."
        )
    order = np.random.default_rng(0).permutation(labeled)
    found = []
    for seed in range(SEEDS + MORE):
        some = np.sort(order[seed * held : (seed + 1) * held])
        found.append((np.delete(np.arange(count), some), some))
    return found
