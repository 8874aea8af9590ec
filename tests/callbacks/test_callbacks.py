"""Annealed values, at the right place after a restart, and the student's checkpoints."""

import math
import os

import keras
import numpy as np
import pytest

import keras_kd as kd
from keras_kd.callbacks import (
    AlphaAnnealing,
    StudentCheckpoint,
    TemperatureAnnealing,
    TransferWeightAnnealing,
)


def dense(units, name):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(units, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="top")(hidden), name=name)


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    return generator.normal(size=(12, 4)).astype("float32"), generator.integers(0, 3, 12)


@pytest.fixture
def distiller():
    keras.utils.set_random_seed(0)
    distiller = kd.Distiller(dense(3, "student"), dense(8, "teacher"))
    distiller.compile(
        optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return distiller


def linear(start, end, i, n):
    return start + (end - start) * min(i / (n - 1), 1)


def cosine(start, end, i, n):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(i / (n - 1), 1)))


def exponential(start, end, i, n):
    return start * (end / start) ** min(i / (n - 1), 1)


FORMULAS = {"linear": linear, "cosine": cosine, "exponential": exponential}


@pytest.mark.parametrize("kind", FORMULAS)
def test_temperature_follows_its_formula_by_epoch_and_stays_at_the_end(distiller, data, kind):
    callback = TemperatureAnnealing(start=8.0, end=1.0, epochs=4, kind=kind)
    history = distiller.fit(*data, epochs=6, verbose=0, callbacks=[callback]).history
    expected = [FORMULAS[kind](8.0, 1.0, i, 4) for i in range(6)]
    np.testing.assert_allclose(history["temperature"], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_alpha_may_reach_zero_and_follows_the_optimizer_step(distiller, data, kind):
    seen = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs["alpha"])

    callback = AlphaAnnealing(start=1.0, end=0.0, steps=5, kind=kind)
    distiller.fit(*data, batch_size=4, epochs=2, verbose=0, callbacks=[Record(), callback])
    np.testing.assert_allclose(
        seen, [FORMULAS[kind](1.0, 0.0, i, 5) for i in range(6)], rtol=1e-6, atol=1e-7
    )


def test_a_keras_schedule_is_read_at_the_epoch(distiller, data):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 2], [6.0, 3.0, 1.5])
    history = distiller.fit(
        *data, epochs=4, verbose=0, callbacks=[TemperatureAnnealing(kind=schedule)]
    ).history
    np.testing.assert_allclose(history["temperature"], [6.0, 6.0, 3.0, 1.5])


def test_annealing_changes_the_loss_of_the_very_step(distiller, data):
    """The value in the logs is the one the graph used, without retracing."""
    x, _ = data
    distiller.compile(
        optimizer=keras.optimizers.SGD(0.0), loss=None, distillation_loss=kd.losses.SoftTargets()
    )
    history = distiller.fit(
        x, epochs=3, verbose=0, callbacks=[TemperatureAnnealing(start=1.0, end=5.0, epochs=3)]
    ).history
    teacher, student = (
        distiller.teacher.predict(x, verbose=0),
        distiller.student.predict(x, verbose=0),
    )

    def kl(temperature):
        p, q = (
            np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True)
            for z in (teacher, student)
        )
        return temperature**2 * (p * np.log(p / q)).sum(-1).mean()

    np.testing.assert_allclose(history["distillation_loss"], [kl(1), kl(3), kl(5)], rtol=1e-4)


def test_resumes_at_the_right_value_with_initial_epoch(distiller, data):
    callback = TemperatureAnnealing(start=4.0, end=1.0, epochs=4)
    history = distiller.fit(
        *data, epochs=4, initial_epoch=2, verbose=0, callbacks=[callback]
    ).history
    np.testing.assert_allclose(history["temperature"], [2.0, 1.0])


def test_resumes_at_the_right_step_after_loading(distiller, data, tmp_path):
    def annealing():
        return TemperatureAnnealing(start=5.0, end=1.0, steps=5)

    distiller.fit(*data, batch_size=6, epochs=1, verbose=0, callbacks=[annealing()])
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    assert float(loaded.temperature) == 4.0
    history = loaded.fit(*data, batch_size=6, epochs=1, verbose=0, callbacks=[annealing()]).history
    np.testing.assert_allclose(history["temperature"], [2.0])


def test_transfer_weight_warms_up_and_is_logged(data):
    keras.utils.set_random_seed(0)
    distiller = kd.Distiller(dense(8, "student"), dense(8, "teacher"))
    hint = kd.Transfer(kd.losses.Hint(), teacher="hidden", student="hidden")
    distiller.compile(optimizer=keras.optimizers.SGD(0.0), loss=None, distillation_loss=hint)
    history = distiller.fit(
        data[0],
        epochs=3,
        verbose=0,
        callbacks=[TransferWeightAnnealing("hint", start=0.0, end=2.0, epochs=3)],
    ).history
    np.testing.assert_allclose(history["hint_weight"], [0.0, 1.0, 2.0])
    np.testing.assert_allclose(
        history["distillation_loss"], np.array(history["hint"]) * [0.0, 1.0, 2.0], rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"no transfer `hin`\. It has: `hint`"):
        distiller.fit(
            data[0], verbose=0, callbacks=[TransferWeightAnnealing("hin", 0.0, 1.0, epochs=2)]
        )


def test_values_reach_tensorboard_and_the_progress_bar(distiller, data, tmp_path, capsys):
    tensorboard = keras.callbacks.TensorBoard(tmp_path)
    annealing = TemperatureAnnealing(start=2.0, end=1.0, epochs=2)
    distiller.fit(*data, epochs=2, verbose=2, callbacks=[tensorboard, annealing])
    assert "temperature: 2.0000" in capsys.readouterr().out
    import tensorflow as tf

    found = {}
    for file in sorted((tmp_path / "train").iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                if value.tag == "epoch_temperature":
                    found[event.step] = float(tf.make_ndarray(value.tensor))
    assert found == {0: 2.0, 1: 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemperatureAnnealing(0.0, 1.0, epochs=3), "`start` of `TemperatureAnnealing`"),
        (lambda: TemperatureAnnealing(1.0, math.nan, epochs=3), "`end` of `TemperatureAnnealing`"),
        (lambda: AlphaAnnealing(0.5, 1.5, epochs=3), "between 0 and 1"),
        (lambda: AlphaAnnealing(0.5, 1.0), "one of them"),
        (lambda: AlphaAnnealing(0.5, 1.0, epochs=3, steps=3), "one of them"),
        (lambda: AlphaAnnealing(1.0, 0.0, epochs=3, kind="exponential"), "positive"),
        (lambda: TemperatureAnnealing(4.0, 1.0, epochs=3, kind="cosin"), "'cosine'"),
        (lambda: TemperatureAnnealing(epochs=3), "needs `start` and `end`"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_alpha_annealing_is_refused_where_alpha_weighs_nothing(distiller, data):
    distiller.compile(
        optimizer="sgd",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        student_loss_weight=1.0,
        distillation_loss_weight=2.0,
    )
    with pytest.raises(ValueError, match="explicit weights"):
        distiller.fit(*data, verbose=0, callbacks=[AlphaAnnealing(0.0, 1.0, epochs=2)])


def test_student_checkpoint_is_the_student_alone(distiller, data, tmp_path):
    path = tmp_path / "best" / "student.keras"
    distiller.compile(
        optimizer=keras.optimizers.SGD(0.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # Whether more or less is better is told by the distiller's metrics.
    callback = StudentCheckpoint(path, monitor="val_accuracy")
    distiller.fit(*data, epochs=2, validation_data=data, verbose=0, callbacks=[callback])
    student = keras.saving.load_model(path)
    assert type(student) is type(distiller.student)
    assert [w.shape for w in student.weights] == [w.shape for w in distiller.student.weights]
    np.testing.assert_array_equal(
        student.predict(data[0], verbose=0), distiller.student.predict(data[0], verbose=0)
    )
    assert os.listdir(path.parent) == ["student.keras"]


def test_student_checkpoint_keeps_the_best(distiller, data, tmp_path):
    class Worse(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["score"] = [0.9, 0.1][epoch]

    path = tmp_path / "student.keras"
    checkpoint = StudentCheckpoint(path, monitor="score", mode="max")
    after_first = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            after_first.append(self.model.student.get_weights())

    distiller.fit(*data, epochs=2, verbose=0, callbacks=[Worse(), checkpoint, Keep()])
    for saved, kept in zip(keras.saving.load_model(path).get_weights(), after_first[0]):
        np.testing.assert_array_equal(saved, kept)


def test_a_failed_write_leaves_the_last_good_checkpoint(distiller, data, tmp_path, monkeypatch):
    path = tmp_path / "student.keras"
    distiller.fit(*data, verbose=0, callbacks=[StudentCheckpoint(path, monitor="loss")])
    before = path.read_bytes()

    def full(filepath, **kwargs):
        with open(filepath, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(distiller.student, "save", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        distiller.fit(
            *data, verbose=0, callbacks=[StudentCheckpoint(path, "loss", save_best_only=False)]
        )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["student.keras"]


def test_student_checkpoint_refuses_another_format():
    with pytest.raises(ValueError, match=r"ends in `\.keras`"):
        StudentCheckpoint("student.h5")
