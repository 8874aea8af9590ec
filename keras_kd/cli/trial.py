"""The demo's experiment: one teacher, the same student with and without it, equal steps."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_kd.cli.console import Work
from keras_kd.datasets import Dataset

LEARNING_RATE = 5e-3
TEACHER_FILTERS = (32, 64, 96)
STUDENT_FILTERS = (6, 8, 12)

# Larger images are averaged down first: the demo is about distillation, not about resolution.
_LARGEST_SIDE = 64

_SMALL = 10_000
_SAMPLES_SEEN = 36_000


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
        model: The student.
        seed: Its seed.
        history: Loss and metrics, one value an epoch.
        validation_accuracy: Share of right answers, 0..1, on the validation samples.
        accuracy: The same on the test samples.
        agreement: Share of the test samples on which it answers like the teacher.
    """

    model: Any = dataclasses.field(repr=False)
    seed: int
    history: dict[str, Sequence[float]] = dataclasses.field(repr=False)
    validation_accuracy: float
    accuracy: float
    agreement: float


def make_plan(data: Dataset, epochs: int | None = None, seeds: int | None = None) -> Plan:
    """Choose epochs, seeds and batch size that suit the number of training samples.

    Args:
        data: What is trained on.
        epochs: As asked for; `None` takes as many as show 36,000 samples, from 5 to 30.
        seeds: As asked for; `None` takes 3 under 10,000 training samples, else 1.

    Returns:
        The plan.
    """
    samples = len(data.x_train)
    small = samples < _SMALL
    return Plan(
        epochs=epochs or min(30, max(5, round(_SAMPLES_SEEN / samples))),
        seeds=seeds or (3 if small else 1),
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
    _fit(teacher, teacher, data, plan, work, "teacher")
    return teacher


def train_students(data: Dataset, teacher: Any, plan: Plan, work: Work) -> dict[str, list[Run]]:
    """Train the same student plain and distilled, from equal seeds in equal steps.

    Args:
        data: Images and labels.
        teacher: A built classifier of these images.
        plan: Epochs, seeds and batch size.
        work: Hears of every epoch.

    Returns:
        The runs under `"plain"` and `"distilled"`, by seed.
    """
    import keras

    import keras_kd

    answers = decide(teacher, data.x_test)
    runs: dict[str, list[Run]] = {"plain": [], "distilled": []}
    for seed in range(plan.seeds):
        for kind, done in runs.items():
            # The same numbers twice: equal initial weights, then equal order of the samples.
            keras.utils.set_random_seed(seed)
            student = network(data, STUDENT_FILTERS, "student")
            model = student
            if kind == "distilled":
                # The teacher is asked once an image, which "auto" would tell of.
                model = keras_kd.Distiller(student, teacher, teacher_answers="memory")
            stage = f"student {seed + 1}/{plan.seeds}, {kind}"
            keras.utils.set_random_seed(seed)
            history = _fit(model, student, data, plan, work, stage)
            decisions = decide(student, data.x_test)
            done.append(
                Run(
                    model=student,
                    seed=seed,
                    history=history,
                    validation_accuracy=share(
                        decide(student, data.x_validation), data.y_validation
                    ),
                    accuracy=share(decisions, data.y_test),
                    agreement=share(decisions, answers),
                )
            )
    return runs


def best_run(runs: Sequence[Run]) -> Run:
    """Choose the run with the highest validation accuracy, the first of equals.

    Args:
        runs: The runs of one kind.

    Returns:
        One of them.
    """
    return max(runs, key=lambda run: run.validation_accuracy)


def decide(model: Any, x: Any) -> Any:
    """Give the class that a model names for each image, `(samples,)`."""
    # Called directly: `predict` would compile each of many small models anew.
    import keras

    parts = [
        keras.ops.convert_to_numpy(model(x[start : start + 256], training=False))
        for start in range(0, len(x), 256)
    ]
    return np.argmax(np.concatenate(parts), axis=-1)


def share(decisions: Any, truth: Any) -> float:
    """Give the share of equal entries, 0..1."""
    return float(np.mean(np.asarray(decisions) == np.asarray(truth)))


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Give mean and sample standard deviation, which one value alone has not."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _fit(
    model: Any, student: Any, data: Dataset, plan: Plan, work: Work, stage: str
) -> dict[str, Sequence[float]]:
    import keras

    steps = plan.epochs * -(-len(data.x_train) // plan.batch_size)
    model.compile(
        optimizer=keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # A step of these networks takes about as long as Python needs to start it.
        steps_per_execution=8,
    )

    def report(epoch: int, logs: dict[str, float]) -> None:
        detail = f"validation {100 * logs['val_accuracy']:.1f} %"
        work(stage, epoch + 1, plan.epochs, detail)

    work(stage, 0, plan.epochs)
    history = model.fit(
        data.x_train,
        data.y_train,
        batch_size=plan.batch_size,
        epochs=plan.epochs,
        validation_data=(data.x_validation, data.y_validation),
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=report)],
        verbose=0,
    )
    if not all(np.isfinite(weight).all() for weight in student.get_weights()):
        raise ArithmeticError(
            f"The training of `{stage}` ended with NaN or infinite weights. Check the scale of the "
            "images: values in [0, 1] are expected."
        )
    return {name: [float(value) for value in values] for name, values in history.history.items()}
