"""A distiller from its file, with its teacher given back."""

import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_kd.distill.distiller import Distiller
from keras_kd.distill.memory import MODES
from keras_kd.teachers.base import TeacherLike
from keras_kd.utils import archives, checks
from keras_kd.utils.types import PathLike


def load_distiller(
    path: PathLike,
    teacher: TeacherLike = None,
    teacher_inputs: Callable[[Any], Any] | None = None,
    student_inputs: Callable[[Any], Any] | None = None,
    teacher_precision: str = "float32",
    custom_objects: dict[str, Any] | None = None,
    teacher_answers: str = "auto",
) -> Distiller:
    """Load what `distiller.save(path)` wrote and give it its teacher back.

    Args:
        path: A `.keras` file.
        teacher: The teacher that was trained with, as for `Distiller`.
        teacher_inputs: As for `Distiller`; functions are not saved.
        student_inputs: As for `Distiller`.
        teacher_precision: As for `Distiller`.
        custom_objects: Classes of the student that are not registered, by name.
        teacher_answers: As for `Distiller`.

    Returns:
        A compiled `Distiller` that goes on where it stopped: weights, optimizer,
        temperature and alpha.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file holds no distiller, the teacher is another one
            than the saved, an input function is missing, or the state of the
            optimizer does not fit.

    Examples:
        >>> distiller.save("d.keras")
        >>> distiller = load_distiller("d.keras", teacher=teacher)
        >>> history = distiller.fit(x, y, epochs=20, initial_epoch=10)
    """
    checks.one_of("teacher_answers", teacher_answers, MODES)
    checks.functions(teacher_inputs=teacher_inputs, student_inputs=student_inputs)
    archives.keras_file(path)
    loaded = _loaded(path, custom_objects)
    if not isinstance(loaded, Distiller):
        raise ValueError(
            f"`{path}` holds a {type(loaded).__name__}, not a distiller. Load a student with "
            "`keras.saving.load_model`."
        )
    loaded.take_teacher(
        teacher,
        teacher_inputs=teacher_inputs,
        student_inputs=student_inputs,
        teacher_precision=teacher_precision,
        teacher_answers=teacher_answers,
        path=path,
    )
    return loaded


def _loaded(path: PathLike, custom_objects: dict[str, Any] | None) -> Any:
    """What Keras loads; a state of the optimizer that it would leave out is an error."""
    skipped = "Skipping variable loading for optimizer"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=skipped)
        try:
            return keras.saving.load_model(path, custom_objects=custom_objects, safe_mode=True)
        except (ValueError, UserWarning) as error:
            if skipped not in str(error):
                raise
            raise ValueError(
                f"The optimizer in `{path}` has the state of other variables than those that train "
                "in the loaded distiller, so that training would not go on where it stopped. Give "
                "the student's class a `build` that makes all its layers' weights, in the order in "
                "which they were made; or load the student's weights alone into a new distiller."
            ) from error
