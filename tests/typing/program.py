"""A longer program of a user, for type checkers as `sample.py`: what is built on the distiller, and
classes of a user's own. It is checked, not run.
"""

from pathlib import Path
from typing import Any, assert_type

import keras
import numpy as np

import keras_kd as kd
from keras_kd.export import Artifact, BenchReport


class Smooth(kd.Penalty):
    """A penalty of a user."""

    def __call__(self, distiller: kd.Distiller, batch: kd.Batch) -> Any:
        return keras.ops.mean(keras.ops.square(batch.x))


def views(batch: kd.Batch, distiller: kd.Distiller) -> kd.Batch:
    """A batch transform."""
    return batch


def net(units: int) -> keras.Model:
    """Build a net."""
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(units), keras.layers.Dense(3)])


def lifelong(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Path:
    """Streams."""
    stream = kd.lifelong.Stream.by_domain(x, y, y % 2, test=(x, y))
    memory = kd.lifelong.Memory(bytes=500_000, policy="herding", seed=1)
    memory.add(x, y, logits=None)
    print(memory.x.shape, memory.y.shape, len(memory))
    memory.save("memory.npz")
    assert_type(kd.lifelong.Memory.load("memory.npz"), kd.lifelong.Memory)
    learner = kd.lifelong.Learner(
        model,
        method=kd.lifelong.DarkReplay(alpha=0.2, beta=0.5),
        memory=memory,
        folder=Path("runs") / "stream",
    )
    learner.compile("sgd", metrics=["accuracy"])
    for task in stream:
        assert_type(task, kd.lifelong.Task)
        learner.fit(task, epochs=1, batch_size=10, verbose=0, callbacks=[])
    print(len(stream), stream[0].name)
    report = learner.report(known_task=True)
    assert_type(report, kd.lifelong.Report)
    assert_type(report.table(), str)
    accuracy: float = report.average_accuracy
    forgetting: float = report.forgetting
    print(accuracy, forgetting, report.backward_transfer, report.matrix[0, 0], report.seconds)
    report.plot("plot.svg")
    report.save_html("report.html")
    found = kd.lifelong.refresh(
        "deployed", model, old=(x, y), new=(x, y), folder="refreshed", max_drop=0.01
    )
    print(found.shipped, found.table())
    for method in (kd.lifelong.ICaRL(), kd.lifelong.PodNet(), kd.lifelong.ElasticWeights()):
        assert isinstance(method, kd.lifelong.Method)
    return Path("report.html")


def robust(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Attacks."""
    threat = kd.robust.Linf(8 / 255, step=2 / 255, steps=10, restarts=1, bounds=(0.0, 1.0))
    distiller = kd.Distiller(model, None)
    distiller.compile("sgd", "mse", adversary=kd.robust.TRADES(threat, beta=6.0))
    report = kd.robust.evaluate(
        model, x, y, threat, corruptions=["contrast"], second_opinion="art", calibrate_on=(x, y)
    )
    clean: float = report.clean
    print(report.corrupted["contrast"][3], report.ece, report.flags, report.table())
    report.save_html(Path("robust.html"))
    attacked = kd.robust.attack(model, x, y, threat, kind="square", seed=0)
    print(attacked.shape, kd.robust.attack(model, x, y, kd.robust.L2(0.5), kind="fgsm").dtype)
    assert_type(kd.robust.corruptions("audio"), list[str])
    print(kd.robust.corrupt(x, "contrast", severity=3, seed=0).shape)
    assert_type(kd.robust.expected_calibration_error(x, y, bins=15), float)
    calibrated = kd.robust.calibrate(model, x, y)
    print(calibrated.predict(x), kd.robust.noisy_labels(y, rate=0.4, kind="pairs", seed=0).mean())
    assert_type(kd.robust.kept_decisions(model, x, threat), float)
    return clean


def search(teacher: keras.Model, x: np.ndarray, y: np.ndarray) -> str:
    """Choices."""

    def build(values: dict[str, Any]) -> keras.Model:
        return net(int(values["units"]))

    study = kd.search.tune(
        build,
        teacher,
        (x, y),
        (x, y),
        space={"units": kd.search.Choice(4, 8), "rate": kd.search.Log(1e-4, 1e-2)},
        minimize=("error", "bytes"),
        budget=kd.search.Budget(minutes=None, bytes=20_000, latency_ms=1.5, trials=6),
        seeds=2,
        folder=Path("runs/search"),
    )
    print(study.best, study.front, study.verdict)
    study.plot("front.png")
    assert_type(study.table(), str)
    choice = kd.search.best_method(lambda: net(4), teacher, (x, y), (x, y), seeds=2)
    assert_type(choice, kd.search.MethodChoice)
    print(choice.best, choice.arguments, choice.rows()[0], choice.to_dict())
    device = kd.search.for_device(
        teacher, (x, y), max_bytes=10_000, max_latency_ms=2.0, min_accuracy=0.9, folder="runs/d"
    )
    assert_type(device, kd.search.DeviceResult)
    if device.best is not None:
        print(device.best.path, device.best.precision)
    return choice.verdict


def federated(x: np.ndarray, y: np.ndarray) -> int:
    """Clients."""

    def client() -> kd.federated.Client:
        return kd.federated.Client(net(4), x, y)

    federation = kd.federated.Federation(
        clients=[client, client],
        public=x,
        method=kd.federated.DSFL(),
        aggregate="trimmed",
        privacy=kd.federated.Gaussian(noise_multiplier=1.0, delta=1e-5, max_epsilon=8.0),
        folder="runs/fed",
    )
    history = federation.fit(rounds=2, queries=100)
    print(history.bytes_down, history.per_client, history.epsilon, federation.student.name)
    for each in (kd.federated.FedMD(pretrain=2), kd.federated.FedDF()):
        print(each)
    return history.bytes_up


def export(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Artifact | None:
    """Files."""
    report = kd.export(
        model,
        Path("files"),
        formats=["onnx"],
        precisions=("float32", "int8"),
        calibration=x,
        evaluation=(x, y),
        metrics=["auc"],
        targets=["onnxruntime-1.17"],
        batch=1,
        max_drop=0.01,
        overwrite=True,
    )
    for artifact in report.artifacts:
        print(artifact.format, artifact.precision, artifact.bytes, artifact.path)
    print(report.runtimes(), report.save_html("report.html"))
    loaded = kd.export.load(Path("files"))
    print(loaded(x).argmax(-1))
    bench = kd.export.bench("files", threads=2)
    assert_type(bench, BenchReport)
    return report.best


def distill(student: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    """Everything around a distiller."""
    ensemble = kd.teachers.Ensemble([net(8), net(16)], weights=[0.3, 0.7], combine="logits")
    box = kd.teachers.BlackBox(lambda rows: rows[:, :3], outputs="logits", name="rule", version="1")
    onnx = kd.teachers.from_onnx("teacher.onnx")
    distiller = kd.Distiller(
        student,
        [ensemble, box, onnx],
        teacher_answers="memory",
        teacher_inputs=lambda rows: rows[:, ::2],
    )
    distiller.compile(
        keras.optimizers.Adam(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        distillation_loss={
            "a": kd.losses.SoftTargets(2.0, standardize=True),
            "b": kd.losses.DIST(),
        },
        penalties=[Smooth(weight=0.1, name="smooth")],
        batch_transform=views,
        student_loss_weight=1.0,
        distillation_loss_weight=2.0,
    )
    history = distiller.fit(x, y, validation_split=0.1, epochs=2)
    print(history.history["agreement"], distiller.evaluate(x, y), distiller.predict(x))
    distiller.temperature.assign(2.0)
    distiller.alpha.assign(0.1)
    distiller.save("d.keras")
    again = kd.load_distiller("d.keras", teacher=ensemble)
    assert_type(again, kd.Distiller)
    annealing = kd.callbacks.AlphaAnnealing(start=0.1, end=0.9, steps=100, kind="cosine")
    again.fit(x, y, callbacks=[annealing, keras.callbacks.EarlyStopping()])
    kd.cache.write_answers("answers", x, top_k=(y[:, None], x[:, :1]), vocabulary=50)
    cached = kd.teachers.CachedTeacher("answers")
    print(cached.join([x]), kd.cache.verify("answers"))
    small = kd.students.shrink(net(64), width=0.5, depth=1.0)
    kd.students.initialize_from(small, net(64), layers="every_other")
    aware = kd.compress.quantize_aware(small)
    pruned = kd.compress.prune(small, sparsity=0.5, pattern="2:4")
    clustered = kd.compress.cluster(small, clusters=16)
    print(kd.compress.finalize(aware), kd.compress.finalize(pruned), clustered)
    digits = kd.datasets.load("digits")
    print(digits.x_train.shape, digits.class_names)
    task = kd.datasets.load_task("table.csv", target="y", task="classification")
    print(task.inputs, task.class_names)
    mutual = kd.MutualLearning([net(4), net(4)])
    mutual.compile("adam", "mse")
    chain = kd.distill_chain([net(64), net(16), net(4)], x, y, compile={"optimizer": "adam"})
    print(mutual.fit(x, y), chain)
