"""A teacher made of what the user passed."""

import copy
from typing import Any

from keras_kd.teachers.ensemble import Ensemble
from keras_kd.teachers.model import ModelTeacher, Teacher
from keras_kd.teachers.precision import at_precision


def apart(teacher: Teacher) -> Teacher:
    """A teacher of the same models that reads layers of its own choice."""
    if isinstance(teacher, Ensemble):
        twin = copy.copy(teacher)
        twin.members = [_apart(member) for member in teacher.members]
        return twin
    return _apart(teacher) if isinstance(teacher, ModelTeacher) else teacher


def _apart(teacher: ModelTeacher) -> ModelTeacher:
    twin = copy.copy(teacher)
    twin._reader = copy.copy(teacher._reader)
    return twin


def make(teacher: Any, from_logits: bool | None, precision: str = "float32") -> Teacher | None:
    """A teacher from what the user passed: a model, a list, a `Teacher` or `None`."""
    made: Teacher | None
    if teacher is None or isinstance(teacher, Teacher):
        made = teacher
    elif isinstance(teacher, list | tuple):
        made = Ensemble(teacher, from_logits=from_logits)
    else:
        made = ModelTeacher(teacher, from_logits)
    return at_precision(made, precision)
