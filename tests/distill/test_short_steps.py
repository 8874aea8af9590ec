"""Several short steps at once: the same training, and callbacks that are told."""

import warnings

import keras
import numpy as np
import pytest
from small_models import FEATURES, crossentropy, pair, rows

import keras_kd as kd


class Seen(keras.callbacks.Callback):
    """Batches and epochs that a callback of the user hears of."""

    def on_train_begin(self, logs=None):
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(epoch)


def _trained(steps, answers, data, callbacks=(), compiled=None, **options):
    keras.utils.set_random_seed(1)
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher, teacher_answers=answers)
    arguments = {"loss": crossentropy(), "metrics": ["accuracy"], **(compiled or {})}
    distiller.compile(keras.optimizers.Adam(0.1), steps_per_execution=steps, **arguments)
    keras.utils.set_random_seed(3)
    options = {"epochs": 2, "batch_size": 5, "verbose": 0, **options}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = distiller.fit(*data, callbacks=list(callbacks), **options).history
    said = [str(each.message) for each in said if "steps at once" in str(each.message)]
    return history, distiller, said


WAYS = {
    "live": ("live", {}),
    "memory": ("memory", {}),
    "xla": ("memory", {"compiled": {"jit_compile": True}}),
    "weighted": ("live", {"sample_weight": np.linspace(0, 2, 12)}),
    "split": ("memory", {"validation_split": 0.25}),
    "unshuffled": ("live", {"shuffle": False}),
    "batch": ("memory", {"shuffle": "batch"}),
    "eager": ("live", {"compiled": {"run_eagerly": True}}),
    "evaluated": (
        "memory",
        {"validation_split": 0.25, "compiled": {"evaluate_distillation": True}},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_training_is_the_same(way):
    answers, options = WAYS[way]
    data = rows(12)
    found, many, _ = _trained("auto", answers, data, **options)
    assert many.steps_per_execution == (2 if "validation_split" in options else 3)
    if options.get("shuffle") == "batch":
        # What is drawn within batches is no order that two pipelines share.
        return
    expected, one, _ = _trained(1, answers, data, **options)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    for a, b in zip(many.student.get_weights(), one.student.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_callbacks_of_batches_are_told_and_those_of_epochs_intact():
    seen = Seen()
    _, distiller, said = _trained("auto", "live", rows(12), [seen])
    assert len(said) == 1
    assert "takes 3 steps at once" in said[0]
    assert "`Seen` is called every 3 batches" in said[0]
    assert (seen.batches, seen.epochs) == ([2, 2], [0, 1])
    # Nobody is told who does not count batches.
    assert not _trained("auto", "live", rows(12), [kd.callbacks.AlphaAnnealing(1, 0, 2)])[2]
    # Other ways in still work.
    x, y = rows(7)
    distiller.train_on_batch(x, y)
    distiller.fit(x, y, batch_size=2, verbose=0)
    assert distiller.steps_per_execution == 4
    assert np.isfinite(distiller.evaluate(x, y, verbose=0)[0])
    assert distiller.predict(x, verbose=0).shape == (7, 4)


def test_long_steps_are_taken_one_by_one():
    student = keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.Dense(30_000), keras.layers.Dense(4)]
    )
    distiller = kd.Distiller(student, pair()[1], teacher_answers="live")
    distiller.compile("sgd", loss=crossentropy(), steps_per_execution="auto")
    x, y = rows(2048)
    distiller.fit(x, y, batch_size=1024, steps_per_epoch=1, verbose=0)
    assert distiller.steps_per_execution == 1


def test_it_is_saved_and_datasets_take_several_steps_too(tmp_path):
    import tensorflow as tf

    x, y = rows(12)
    _, distiller, _ = _trained("auto", "live", (x, y))
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    loaded.fit(data, epochs=2, verbose=0)
    assert loaded.steps_per_execution == 3


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="iterators of tf.data")
@pytest.mark.parametrize("steps", [1, 2, "auto"])
def test_an_epoch_sets_up_one_iterator(monkeypatch, steps):
    # Keras makes one where an epoch ends and another where the next begins, and setting one up
    # takes as long as a few steps of a small student.
    import tensorflow as tf

    made = []
    before = tf.data.Dataset.__iter__

    def counted(self):
        made.append(self)
        return before(self)

    monkeypatch.setattr(tf.data.Dataset, "__iter__", counted)
    history, *_ = _trained(steps, "memory", rows(12), epochs=6)
    assert len(history["loss"]) == 6
    assert len(made) <= 7
