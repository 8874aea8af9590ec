"""What may stand as a teacher: a model, several models, or outputs read from disk."""

import copy
from typing import Any

from keras_kd.ensemble import Ensemble as Ensemble
from keras_kd.mixtures import combined as combined
from keras_kd.mixtures import mixture_weights as mixture_weights
from keras_kd.model_teacher import ModelTeacher as ModelTeacher
from keras_kd.model_teacher import Teacher as Teacher
from keras_kd.model_teacher import fingerprint as fingerprint
from keras_kd.model_teacher import require_model as require_model
from keras_kd.numbered import Numbered as Numbered
from keras_kd.taps import output_template as output_template

__all__ = ["CachedTeacher", "Ensemble", "ModelTeacher", "Numbered", "Teacher", "fingerprint"]


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
    # Imported here, since it builds on the classes of this module.
    from keras_kd.precision import at_precision

    made: Teacher | None
    if teacher is None or isinstance(teacher, Teacher):
        made = teacher
    elif isinstance(teacher, list | tuple):
        made = Ensemble(teacher, from_logits=from_logits)
    else:
        made = ModelTeacher(teacher, from_logits)
    return at_precision(made, precision)


# Last, since it builds on the names above.
from keras_kd.cache.teacher import CachedTeacher as CachedTeacher  # noqa: E402
