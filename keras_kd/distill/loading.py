"""A distiller from its file, with its teacher given back."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from keras_kd import teachers
from keras_kd.distill.saving import Saved
from keras_kd.models.fingerprint import IDENTITY
from keras_kd.utils import checks

if TYPE_CHECKING:
    from keras_kd.distill.distiller import Distiller


def load_distiller(
    path: Any,
    teacher: Any = None,
    teacher_inputs: Callable[[Any], Any] | None = None,
    student_inputs: Callable[[Any], Any] | None = None,
    teacher_precision: str = "float32",
    custom_objects: dict[str, Any] | None = None,
) -> "Distiller":
    """Load what `distiller.save(path)` wrote and give it its teacher back.

    Args:
        path: A `.keras` file.
        teacher: The teacher that was trained with, as for `Distiller`.
        teacher_inputs: As for `Distiller`; functions are not saved.
        student_inputs: As for `Distiller`.
        teacher_precision: As for `Distiller`.
        custom_objects: Classes of the student that are not registered, by name.

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
    checks.functions(teacher_inputs=teacher_inputs, student_inputs=student_inputs)
    checks.keras_file(path)
    loaded = _loaded(path, custom_objects)
    if not isinstance(loaded, Saved):
        raise ValueError(
            f"`{path}` holds a {type(loaded).__name__}, not a distiller. Load a student with "
            "`keras.saving.load_model`."
        )
    setup = loaded._setup
    for argument, given in (("teacher_inputs", teacher_inputs), ("student_inputs", student_inputs)):
        if setup.maps_inputs.get(argument) and given is None:
            raise ValueError(
                f"`{path}` was trained with `{argument}`, and functions are not saved. Pass the "
                f"same function as `{argument}=`."
            )
    made = teachers.make(teacher, setup.from_logits.get("teacher"), teacher_precision)
    if setup.loaded is not None:
        if made is None:
            raise ValueError(
                f"`{path}` was trained with the teacher `{setup.loaded['name']}`. Pass it as "
                "`teacher=`."
            )
        if setup.loaded.get("identity") != IDENTITY:
            raise ValueError(
                f"`{path}` was saved by an earlier version, which knew the teacher "
                f"`{setup.loaded['name']}` by less than its layers and wiring, so that it cannot "
                "be told whether this is the same. Load the file with `keras.saving.load_model` "
                "as `distiller`, and begin a new one with `distiller.student`."
            )
        if made.fingerprint() != setup.loaded["fingerprint"]:
            raise ValueError(
                f"`{path}` was trained with the teacher `{setup.loaded['name']}`, whose layers or "
                f"weights differ from those of the given `{made.name}`. Pass the same teacher, or "
                "begin a new distiller with `loaded.student`."
            )
    setup.teacher_inputs, setup.student_inputs = teacher_inputs, student_inputs
    setup.attach(made)
    if made is not None and loaded.compiled:
        loaded.adopt(setup.placed)
    return loaded


def _loaded(path: Any, custom_objects: dict[str, Any] | None) -> Any:
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
