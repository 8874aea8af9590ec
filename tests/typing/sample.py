"""A user's program, for type checkers: what each name is. It is checked, not run.

`mypy --strict` reads it in `make lint`, pyright in `make types`. Names that are found on first use
are `Any` where a checker does not see them, which `assert_type` tells apart.
"""

from typing import Any, assert_type

import numpy as np

import keras_kd as kd
from keras_kd.callbacks import StudentCheckpoint, TemperatureAnnealing
from keras_kd.export import Artifact, LoadedModel, Report
from keras_kd.lifelong import Learner, Memory, Stream
from keras_kd.losses import DIST, Hint, SoftTargets
from keras_kd.robust import Linf, RobustReport
from keras_kd.search import Budget, Study
from keras_kd.teachers import CachedTeacher, Ensemble, Teacher


def distill(student: Any, teacher: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """Train a student."""
    hint = kd.Transfer(Hint(), teacher="block2", student="block1", projector="auto", weight=0.1)
    distiller = kd.Distiller(student, teacher, teacher_precision="auto")
    distiller.compile("adam", "mse", distillation_loss=[SoftTargets(2.0), hint], alpha=0.3)
    distiller.fit(
        x,
        y,
        epochs=3,
        callbacks=[
            TemperatureAnnealing(start=4.0, end=1.0, epochs=3),
            StudentCheckpoint("student.keras"),
        ],
    )
    assert_type(distiller, kd.Distiller)
    assert_type(distiller.transfers, list[kd.Transfer])
    assert_type(distiller.term_losses((x, y)), dict[str, float])
    pairs = kd.match_layers(student, teacher)
    assert_type(pairs, kd.LayerPairs)
    assert_type(pairs.transfers(DIST()), list[kd.Transfer])
    return distiller.student


def cached(model: Any, x: np.ndarray) -> Teacher:
    """Write answers, and read them."""
    kd.cache.write(model, x, "cache", top_k=10)
    teacher = kd.teachers.CachedTeacher("cache")
    assert_type(teacher, CachedTeacher)
    assert_type(kd.teachers.Ensemble([model, model]), Ensemble)
    assert_type(kd.cache.record_bytes(1000, top_k=100), int)
    return teacher


def exported(model: Any, x: np.ndarray, y: np.ndarray) -> Artifact | None:
    """Export by both names, verify and load."""
    report = kd.export(model, "files", calibration=x, evaluation=(x, y), max_drop=0.02)
    assert_type(report, Report)
    assert_type(report.table(), str)
    assert_type(report.best, Artifact | None)
    assert_type(kd.export.export_model(model, "files", overwrite=True), Report)
    assert_type(kd.export.load("files"), LoadedModel)
    verified = kd.export.verify("files")
    assert_type(verified, Report)
    try:
        kd.export.bench("files", threads=1)
    except kd.export.ManifestError as error:
        print(error)
    return report.best


def more(make: Any, teacher: Any, x: np.ndarray, y: np.ndarray) -> None:
    """What is built on the distiller."""
    study = kd.search.tune("shrink", teacher, (x, y), (x, y), budget=Budget(minutes=5))
    assert_type(study, Study)
    stream = kd.lifelong.Stream.by_class(x, y, tasks=5)
    assert_type(stream, Stream)
    learner = kd.lifelong.Learner(make(), method=kd.lifelong.Replay(), memory=Memory(100))
    assert_type(learner, Learner)
    assert_type(kd.robust.evaluate(make(), x, y, Linf(8 / 255)), RobustReport)
    assert_type(kd.born_again(make(), x, y, generations=2, compile={}), list[Any])
    assert_type(kd.__version__, str)
    smaller = kd.compress.prune(kd.students.shrink(teacher, 0.5), sparsity=0.5)
    print(kd.compress.summary(smaller), kd.datasets.load("digits").x_train.shape)


def refused(model: Any) -> None:
    """What a checker has to refuse: each of these comments is an error where nothing is wrong."""
    kd.export(model, 3)  # type: ignore[arg-type]
    kd.export(model, "files", precision="int8")  # type: ignore[call-arg]
    kd.Distiller(model, model, temperature=2)  # type: ignore[call-arg]
    kd.cache.record_bytes("1000")  # type: ignore[arg-type]
