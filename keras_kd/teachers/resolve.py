"""A teacher made of what the user passed."""

from keras_kd.teachers import precision as precisions
from keras_kd.teachers.base import Teacher, TeacherLike
from keras_kd.teachers.ensemble import Ensemble
from keras_kd.teachers.model import ModelTeacher


def make(
    teacher: TeacherLike, from_logits: bool | None, precision: str = "float32"
) -> Teacher | None:
    """A teacher from what the user passed: a model, a list, a `Teacher` or `None`.

    Args:
        teacher: What the user passed.
        from_logits: Whether the outputs of models are logits; `None` finds out.
        precision: In which models run; `"float32"` leaves them as they were given.

    Raises:
        TypeError: If it is nothing that can teach.
        ValueError: If the precision is unknown, there is no model to run in it, or a model cannot
            be copied.
    """
    precisions.require(precision)
    if teacher is None:
        return None
    made: Teacher
    if isinstance(teacher, Teacher):
        made = teacher
    elif isinstance(teacher, list | tuple):
        made = Ensemble(teacher, from_logits=from_logits)
    else:
        made = ModelTeacher(teacher, from_logits)
    return made if precision == "float32" else made.at_precision(precision)
