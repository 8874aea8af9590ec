"""The demo's experiment: one teacher, the same student with and without it, equal steps.

Once with all labels, and once with one in ten, as where the teacher comes from elsewhere and labels
are dear.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.cli.console import Work
from keras_kd.datasets import Dataset
from keras_kd.datasets.dataset import stratified
from keras_kd.datasets.task_data import UNLABELED
from keras_kd.utils.types import Array

if TYPE_CHECKING:
    import keras


LEARNING_RATE = 5e-3
TEACHER_FILTERS = (32, 64, 96)
STUDENT_FILTERS = (6, 8, 12)

# Larger images are averaged down first: the demo is about distillation, not about resolution.
_LARGEST_SIDE = 64

FEW = 0.1
"""Share of the training images that keep their label in the second case."""

KINDS = ("plain", "distilled", "few_plain", "few_distilled")
"""The students: with all labels, and with few."""

SHORT = {
    "plain": "plain",
    "distilled": "distilled",
    "few_plain": "1 in 10, plain",
    "few_distilled": "1 in 10, distilled",
}
"""Their names in tables."""

_SMALL = 10_000
_SAMPLES_SEEN = 24_000
_STEPS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        epochs: Passes over the training samples, for every model.
        seeds: Number of runs of each student, with the seeds 0, 1, ...
        batch_size: Samples a step.
    """

    epochs: int
    seeds: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Run:
    """One trained student.

    Args:
        weights: Of the student, see `restored`.
        seed: Its seed.
        history: Loss and metrics, one value an epoch.
        validation_accuracy: Share of right answers, 0..1, on the validation samples.
        accuracy: The same on the test samples.
        agreement: Share of the test samples on which it answers like the teacher.
    """

    weights: Any = dataclasses.field(repr=False)
    seed: int
    history: dict[str, Sequence[float]] = dataclasses.field(repr=False)
    validation_accuracy: float
    accuracy: float
    agreement: float


def make_plan(data: Dataset, epochs: int | None = None, seeds: int | None = None) -> Plan:
    """Choose epochs, seeds and batch size that suit the number of training samples.

    Args:
        data: What is trained on.
        epochs: As asked for; `None` takes as many as show 24,000 samples, from 5 to 30.
        seeds: As asked for; `None` takes 5 under 10,000 training samples, else 1.

    Returns:
        The plan.
    """
    samples = len(data.x_train)
    small = samples < _SMALL
    return Plan(
        epochs=epochs or min(30, max(5, round(_SAMPLES_SEEN / samples))),
        seeds=seeds or (5 if small else 1),
        batch_size=32 if small else 128,
    )


def network(data: Dataset, filters: Sequence[int], name: str) -> Any:
    """Build a small convolutional classifier that gives logits.

    Args:
        data: Gives the image shape and the number of classes.
        filters: Channels of the 3 by 3 convolutions, each with BatchNorm and ReLU, with a 2 by 2
            maximum between them.
        name: Name of the model.

    Returns:
        The `keras.Model`, untrained.
    """
    import keras

    layers = keras.layers
    x = inputs = keras.Input(data.input_shape, name="image")
    factor = max(1, min(data.input_shape[:2]) // _LARGEST_SIDE)
    if factor > 1:
        x = layers.AveragePooling2D(factor)(x)
    for index, count in enumerate(filters):
        if index:
            x = layers.MaxPooling2D(2, padding="same")(x)
        x = layers.Conv2D(count, 3, padding="same", use_bias=False)(x)
        # The usual 0.99 averages over more steps than a short run has.
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(data.num_classes, name="logits")(x), name=name)


def train_teacher(data: Dataset, plan: Plan, work: Work) -> Any:
    """Train the demo's teacher.

    Args:
        data: Images and labels.
        plan: Epochs and batch size.
        work: Hears of every epoch.

    Returns:
        The trained `keras.Model`.
    """
    import keras

    keras.utils.set_random_seed(0)
    teacher = network(data, TEACHER_FILTERS, "teacher")
    _compile(teacher, len(data.x_train), plan)
    _fit(teacher, teacher, (data.x_train, data.y_train), plan, work, "teacher")
    return teacher


def train_students(
    data: Dataset, teacher: keras.Model | None, plan: Plan, work: Work
) -> dict[str, list[Run]]:
    """Train the same student plain and distilled, with all labels and with one in ten.

    In each of the two cases both begin with the same weights and take equally many steps. With one
    label in ten the plain student sees the images that have one, ten times as often; the distilled
    one sees all images, and of those without a label the teacher's answer alone. Which images keep
    their label is drawn anew for each seed, every class in proportion.

    Args:
        data: Images and labels.
        teacher: A built classifier of these images.
        plan: Epochs, seeds and batch size.
        work: Hears of every epoch.

    Returns:
        The runs of each of `KINDS`, by seed.
    """
    import keras

    import keras_kd

    answers = decide(teacher, data.x_test)
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    student = network(data, STUDENT_FILTERS, "student")
    # Each is compiled once: a step of these networks is so short that making it anew for every
    # student would take a third of the time.
    # The teacher is asked once an image, which "auto" would tell of.
    distiller = keras_kd.Distiller(student, teacher, teacher_answers="memory")
    models = {"plain": student, "distilled": distiller}
    for model in models.values():
        _compile(model, len(data.x_train), plan)
    for seed in range(plan.seeds):
        few = labeled(data, seed)
        for kind, done in runs.items():
            way = "distilled" if kind.endswith("distilled") else "plain"
            x, y = data.x_train, data.y_train
            if kind.startswith("few") and way == "plain":
                chosen = np.resize(np.flatnonzero(few), len(y))
                x, y = x[chosen], y[chosen]
            elif kind.startswith("few"):
                y = np.where(few, y, UNLABELED)
            # The same numbers twice: equal initial weights, then equal order of the samples.
            keras.utils.set_random_seed(seed)
            student.set_weights(network(data, STUDENT_FILTERS, "student").get_weights())
            stage = f"student {seed + 1}/{plan.seeds}, {SHORT[kind]}"
            keras.utils.set_random_seed(seed)
            history = _fit(models[way], student, (x, y), plan, work, stage)
            decisions = decide(student, data.x_test)
            right = share(decide(student, data.x_validation), data.y_validation)
            work(stage, plan.epochs, plan.epochs, f"validation {100 * right:.1f} %")
            done.append(
                Run(
                    weights=student.get_weights(),
                    seed=seed,
                    history=history,
                    validation_accuracy=right,
                    accuracy=share(decisions, data.y_test),
                    agreement=share(decisions, answers),
                )
            )
    return runs


def labeled(data: Dataset, seed: int) -> Any:
    """Choose the training images that keep their label where one in ten does.

    Args:
        data: Images and labels.
        seed: Of the choice.

    Returns:
        Boolean mask, `(samples,)`, with at least one image of each class.
    """
    return stratified(data.y_train, FEW, seed)


def best_run(runs: dict[str, list[Run]]) -> tuple[str, Run]:
    """Choose the run with the highest validation accuracy.

    Of equals the one whose kind is better in the mean, then the first of `KINDS`, which begin with
    plain training, then the first seed.

    Args:
        runs: Those of each kind.

    Returns:
        Its kind, and the run.
    """

    def rank(kind: str) -> tuple[float, float]:
        values = [run.validation_accuracy for run in runs[kind]]
        return max(values), statistics.fmean(values)

    kind = max(runs, key=rank)
    return kind, max(runs[kind], key=lambda run: run.validation_accuracy)


def restored(data: Dataset, run: Run) -> Any:
    """Return the student of a run."""
    student = network(data, STUDENT_FILTERS, "student")
    student.set_weights(run.weights)
    return student


def gain(distilled: Sequence[Run], plain: Sequence[Run]) -> dict[str, float | None]:
    """Compare two kinds, seed by seed.

    Args:
        distilled: Runs by seed.
        plain: Runs by seed.

    Returns:
        `mean` and `std` of the differences of accuracy, the `standard_error` of their mean, and
        `limit`, half of its 95 % confidence interval by Student's t; `None` of one seed.
    """
    pairs = zip(distilled, plain, strict=True)
    found = spread([one.accuracy - other.accuracy for one, other in pairs])
    if found["std"] is None:
        return {**found, "standard_error": None, "limit": None}
    from scipy.stats import t

    error = found["std"] / len(plain) ** 0.5
    return {**found, "standard_error": error, "limit": float(t.ppf(0.975, len(plain) - 1)) * error}


def decide(model: keras.Model, x: Array) -> Any:
    """Give the class that a model names for each image, `(samples,)`."""
    # Called directly: `predict` would compile each of many small models anew.
    import keras

    parts = [
        keras.ops.convert_to_numpy(model(x[start : start + 256], training=False))
        for start in range(0, len(x), 256)
    ]
    return np.argmax(np.concatenate(parts), axis=-1)


def share(decisions: Array, truth: Array) -> float:
    """Give the share of equal entries, 0..1."""
    return float(np.mean(np.asarray(decisions) == np.asarray(truth)))


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Give mean and sample standard deviation, which one value alone has not."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _compile(model: keras.Model, samples: int, plan: Plan) -> None:
    import keras

    steps = -(-samples // plan.batch_size)
    model.compile(
        optimizer=keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(LEARNING_RATE, plan.epochs * steps)
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=UNLABELED),
        # A step of these networks takes about as long as Python needs to start it.
        steps_per_execution=min(steps, _STEPS_AT_ONCE),
    )


def _fit(
    model: keras.Model,
    student: keras.Model,
    rows: tuple[Any, Any],
    plan: Plan,
    work: Work,
    stage: str,
) -> dict[str, Sequence[float]]:
    import keras

    # As new: another student has been trained by it.
    for variable in model.optimizer.variables:
        if variable is not model.optimizer.learning_rate:
            variable.assign(keras.ops.zeros_like(variable))

    def report(epoch: int, logs: dict[str, float]) -> None:
        work(stage, epoch + 1, plan.epochs, f"loss {logs['loss']:.3f}")

    work(stage, 0, plan.epochs)
    history = model.fit(
        *rows,
        batch_size=plan.batch_size,
        epochs=plan.epochs,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=report)],
        verbose=0,
    )
    if not all(np.isfinite(weight).all() for weight in student.get_weights()):
        raise ArithmeticError(
            f"The training of `{stage}` ended with NaN or infinite weights. Check the scale of the "
            "images: values in [0, 1] are expected."
        )
    return {name: [float(value) for value in values] for name, values in history.history.items()}
