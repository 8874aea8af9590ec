"""Calls that are wrong, each in one way: a checker that finds nothing wrong in one says that its
comment is needless. It is checked, not run.
"""

import keras
import numpy as np

import keras_kd as kd
from keras_kd import callbacks, datasets, federated, lifelong, losses, robust, search


def calls(m: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    """All wrong."""
    datasets.load_task(3)  # type: ignore[arg-type]
    datasets.load_task("a.csv", targets="y")  # type: ignore[call-arg]
    datasets.load_task("a.csv", image_size=32)  # type: ignore[arg-type]
    datasets.load_task("a.csv", length="5")  # type: ignore[arg-type]
    print(datasets.load("digits").train)  # type: ignore[attr-defined]
    print(datasets.load_task("digits").x_train)  # type: ignore[attr-defined]
    kd.Distiller(m, m, teacher_answer="live")  # type: ignore[call-arg]
    kd.Distiller(m, m).compile("adam", "mse", alpha="half")  # type: ignore[arg-type]
    kd.Distiller(m, m).compile("adam", "mse", temprature=2.0)  # type: ignore[call-arg]
    losses.SoftTargets(temperature="hot")  # type: ignore[arg-type]
    losses.SoftTargets(2.0, standardise=True)  # type: ignore[call-arg]
    losses.Hints()  # type: ignore[attr-defined]
    kd.Transfer(losses.Hint(), teacher=3, student="b")  # type: ignore[arg-type]
    callbacks.TemperatureAnnealing(start=4.0, end=1.0, epoch=3)  # type: ignore[call-arg]
    callbacks.TemperatureAnnealing(start="4", end=1.0, epochs=3)  # type: ignore[arg-type]
    callbacks.StudentCheckpoint(3)  # type: ignore[arg-type]
    kd.export(m, "files", calibration=x, evaluation=(x, y), formats=3)  # type: ignore[arg-type]
    kd.export(m, "files", maxdrop=0.1)  # type: ignore[call-arg]
    kd.export.lod("x")  # type: ignore[attr-defined]
    kd.export.verify(3)  # type: ignore[arg-type]
    kd.cache.write(m, x)  # type: ignore[call-arg]
    kd.cache.write_answers("a", x, topk=(x, x))  # type: ignore[call-arg]
    kd.teachers.BlackBox(3, outputs="logits", name="a")  # type: ignore[arg-type]
    kd.teachers.from_onnx(3)  # type: ignore[arg-type]
    lifelong.Memory("200")  # type: ignore[arg-type]
    lifelong.Stream.by_class(x, y, task=5)  # type: ignore[call-arg]
    lifelong.Learner(m, methods=lifelong.Replay())  # type: ignore[call-arg]
    lifelong.Learner(m, lifelong.Replay()).compile("sgd", jit="auto")  # type: ignore[call-arg]
    kd.MutualLearning([m, m]).compile("sgd", "mse", eagerly=True)  # type: ignore[call-arg]
    robust.Linf("8/255")  # type: ignore[arg-type]
    robust.attack(m, x, y, 0.1)  # type: ignore[arg-type]
    search.Budget(minute=3)  # type: ignore[call-arg]
    search.Budget(bytes="20k")  # type: ignore[arg-type]
    search.for_device(m, (x, y), max_byte=3)  # type: ignore[call-arg]
    search.best_method(m, m, (x, y), (x, y), seed=2)  # type: ignore[call-arg]
    federated.Client(m, x, y, epoch=1)  # type: ignore[call-arg]
    federated.Federation("two", x)  # type: ignore[arg-type]
    kd.compress.quantize_aware(m, weightbits=4)  # type: ignore[call-arg]
    kd.compress.prune(m, sparsity="half")  # type: ignore[arg-type]
    kd.students.shrink(m, width="half")  # type: ignore[arg-type]
    words: str = kd.robust.expected_calibration_error(x, y)  # type: ignore[assignment]
    count: int = datasets.load_task("digits").units  # type: ignore[assignment]
    print(words, count)
