"""The training behind `keras-kd distill`: the student, how long, and the loss of the task."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.cli import inputs, recipes
from keras_kd.cli.console import Work
from keras_kd.cli.teachers import NamedTeacher
from keras_kd.datasets import TaskData
from keras_kd.datasets.task_data import rows_of

if TYPE_CHECKING:
    import keras


_SMALL = 10_000
_SAMPLES_SEEN = 60_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        epochs: Passes over the training rows.
        batch_size: Rows a step.
        learning_rate: Of Adam in the first step; it falls to 0 by a cosine.
        seed: Of the weights and the order of the rows.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


def make_plan(
    data: TaskData, epochs: int | None, batch_size: int | None, learning_rate: float, seed: int
) -> Plan:
    """Choose what was not asked for by the number of training rows.

    Args:
        data: What is trained on.
        epochs: `None` takes as many as show 60,000 rows, from 5 to 100.
        batch_size: `None` takes 32 under 10,000 rows, else 128.
        learning_rate: As asked for.
        seed: As asked for.

    Returns:
        The plan.
    """
    rows = len(data.train)
    return Plan(
        epochs or min(100, max(5, round(_SAMPLES_SEEN / rows))),
        batch_size or (32 if rows < _SMALL else 128),
        learning_rate,
        seed,
    )


def check_student(name: str, *, inside: bool = True) -> tuple[float, float] | None:
    """Refuse what names no student, before Keras is imported.

    Args:
        name: `FILE.keras`, `shrink:WIDTH` or `shrink:WIDTH,DEPTH`.
        inside: Whether to look into a file.

    Returns:
        Width and depth, or `None` for a file.

    Raises:
        ValueError: If it is neither.
    """
    if not name.startswith("shrink"):
        inputs.check_model_file(name, "student", inside=inside)
        return None
    _, _, numbers = name.partition(":")
    try:
        width, depth = ([float(part) for part in numbers.split(",")] + [1.0])[:2]
        fits = 0 < width <= 1 and 0 < depth <= 1 and numbers.count(",") < 2
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`--student {name}` is no student. Expected `FILE.keras`, or the fractions of width "
            "and depth that are kept, above 0 and at most 1: `shrink:0.5` or `shrink:0.5,0.5`."
        )
    return width, depth


def load_student(name: str, data: TaskData) -> Any:
    """Load the student.

    Args:
        name: See `check_student`.
        data: What it is trained on.

    Returns:
        A built `keras.Model`; `None` where it is to be derived from the teacher.

    Raises:
        ValueError: If it does not fit the data.
    """
    if check_student(name) is not None:
        return None
    student = inputs.load_model(name, "student")
    recipes.check_model(student, "student", data)
    return student


def shrunk(name: str, found: Sequence[NamedTeacher], data: TaskData, seed: int) -> Any:
    """Derive the student from the first Keras teacher.

    Args:
        name: `shrink:WIDTH` or `shrink:WIDTH,DEPTH`.
        found: The teachers.
        data: What it is trained on.
        seed: Of its first weights.

    Returns:
        A built `keras.Model`.

    Raises:
        ValueError: If there is no Keras teacher to derive it from.
    """
    import keras

    from keras_kd.students import shrink

    model = next((one.model for one in found if one.model is not None), None)
    sizes = check_student(name)
    if model is None or sizes is None:
        raise ValueError(
            f"`--student {name}` derives the student from a Keras teacher, and `{found[0].name}` "
            "is none. Pass a student of your own, `FILE.keras`."
        )
    keras.utils.set_random_seed(seed)
    student = shrink(model, width=sizes[0], depth=sizes[1], name="student")
    recipes.check_model(student, "student", data)
    return student


def introduction(data: TaskData, plan: Plan, teacher: Sequence[str], method: str) -> str:
    """Say what is going to be done."""
    sizes = data.sizes
    units = f", {data.units} {'classes' if data.task != 'regression' else 'targets'}"
    if data.train.groups is not None:
        lists = [len(np.unique(getattr(data, split).groups)) for split in sizes]
        units = f", in {', '.join(f'{count:,}' for count in lists)} lists"
    lines = [
        f"{data.name}: {sizes['train']:,} training, {sizes['validation']:,} validation and "
        f"{sizes['test']:,} test rows{units if data.units else ''}.",
        *data.notes,
        f"Teacher {', '.join(teacher)}; method {method}; {plan.epochs} epochs, {plan.batch_size} "
        f"rows a step, learning rate {plan.learning_rate:g}, seed {plan.seed}.",
    ]
    return "\n".join(lines)


def train(
    student: keras.Model,
    teacher: Any,
    data: TaskData,
    plan: Plan,
    compiled: dict[str, Any] | None,
    work: Work,
    *,
    quiet: bool = False,
) -> tuple[dict[str, Sequence[float]], dict[str, Any] | None]:
    """Train the student.

    Args:
        student: Changed in place.
        teacher: What `Distiller` takes.
        data: Rows and labels.
        plan: How much is trained.
        compiled: How `Distiller.compile` distills, see `recipes.distillation`; `None` trains on the
            labels alone.
        work: Hears of every epoch.
        quiet: Whether what choosing a method costs and finds is not printed.

    Returns:
        Losses, one value an epoch; and where the method was chosen its `best`, `verdict` and
        `methods`.

    Raises:
        ValueError: If models, data and method do not fit together.
        ArithmeticError: If the weights end as NaN.
    """
    import keras

    import keras_kd

    repeatable()
    x, y = data.train.x, recipes.targets(data.learns, data.train.y)
    unlabeled = bool((~data.labeled).any())
    if compiled is None and unlabeled:
        x, y = rows_of(x, data.labeled), y[data.labeled]
        unlabeled = False
    loss = recipes.hard_loss(data.learns, student, inputs.first_rows(x), unlabeled)
    steps = plan.epochs * -(-len(y) // plan.batch_size)
    chooses = compiled is not None and compiled.get("distillation_loss") == recipes.AUTO
    keras.utils.set_random_seed(plan.seed)
    distiller: Any = keras_kd.Distiller(student, None if compiled is None else teacher)
    distiller.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(plan.learning_rate, steps)),
        loss=loss,
        **(compiled or {}),
    )
    # Made by hand, the list has no bar of Keras's own where `verbose` lets the choice speak.
    heard = keras.callbacks.CallbackList(
        [
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: work(
                    "distill", epoch + 1, plan.epochs, f"validation loss {logs['val_loss']:.4g}"
                )
            )
        ],
        add_history=True,
        add_progbar=False,
        model=distiller,
        epochs=plan.epochs,
        steps=steps // plan.epochs,
        verbose=0,
    )
    if not chooses:
        work("distill", 0, plan.epochs)
    # Advice for who calls the distiller from Python.
    warnings.filterwarnings("ignore", message=".* asked its teacher once")
    history = distiller.fit(
        x,
        y,
        batch_size=plan.batch_size,
        epochs=plan.epochs,
        validation_data=(data.validation.x, recipes.targets(data.learns, data.validation.y)),
        callbacks=heard,
        verbose=1 if chooses and not quiet else 0,
    )
    if not all(np.isfinite(weight).all() for weight in student.get_weights()):
        raise ArithmeticError(
            "The training ended with NaN or infinite weights. Lower `--learning-rate`, or check "
            "the scale of the inputs (`--standardize` for tables)."
        )
    curves: dict[str, Sequence[float]] = {
        name: [float(value) for value in values] for name, values in history.history.items()
    }
    if not chooses:
        return curves, None
    choice = distiller.method_choice
    return curves, {"best": choice.best, "verdict": choice.verdict, "methods": choice.rows()}


def repeatable() -> None:
    """Let a rerun give the same files: the process is the command's own."""
    import keras

    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def check_metrics(data: TaskData, student: keras.Model, asked: Sequence[str]) -> None:
    """Refuse metrics that cannot judge this student on these data, before it is trained.

    Args:
        data: Validation rows judge.
        student: Trained or not: what its answers mean is the same.
        asked: Names of metrics.

    Raises:
        ValueError: As `keras_kd.export` does behind the training.
    """
    if asked:
        from keras_kd.export.verification.keras_answers import answer

        held = data.validation
        names = data.class_names if recipes.RECIPES[data.task].by_class else ()
        classes = names if len(names) > 1 else None
        chosen = judges(data, student, asked)
        answer(student, held.x, held.y, classes=classes, chosen=chosen, judges=True)


def judges(data: TaskData, student: keras.Model, asked: Sequence[str]) -> list[Any]:
    """Return the metrics by which files are judged: as asked for, or the task's.

    Args:
        data: Validation rows judge.
        student: The trained student.
        asked: Names of metrics.

    Returns:
        What `keras_kd.export` takes as `metrics`.
    """
    groups = data.validation.groups
    if groups is not None:
        from keras_kd.export.verification import lists

        # Which items are one list, only the data know.
        by_list = lists.ByList(groups)
        return [by_list if name == by_list.name else name for name in asked or [by_list.name]]
    if asked:
        return list(asked)
    from keras_kd.cli.distill_result import figures

    outputs = np.asarray(student.predict(data.validation.x, batch_size=256, verbose=0))
    return [recipes.judged_by(data.task, figures(data, outputs, data.validation))]
