"""The teacher's answers in memory: one a row, and the losses of a teacher asked in every step."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import CLASSES, FEATURES, Counted, crossentropy, mlp, pair, rows

import keras_kd as kd
from keras_kd import backends
from keras_kd.cache import join_arrays
from keras_kd.cache.memory import Held


def _distiller(answers, teacher=None, compiled=None, **options):
    keras.utils.set_random_seed(1)
    student, own = pair()
    distiller = kd.Distiller(student, teacher or own, teacher_answers=answers, **options)
    arguments = {"loss": crossentropy(), "run_eagerly": True, **(compiled or {})}
    distiller.compile(keras.optimizers.SGD(0.1), **arguments)
    return distiller


def _fit(distiller, x, y=None, seed=3, **options):
    keras.utils.set_random_seed(seed)
    options = {"epochs": 3, "batch_size": 5, "verbose": 0, **options}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = distiller.fit(x, y, **options).history
    return history, [str(each.message) for each in said if "teacher" in str(each.message)]


def _same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


class Asked(keras.callbacks.Callback):
    """Whether the teacher's answers came from memory, at the end of each epoch."""

    def on_train_begin(self, logs=None):
        self.remembered = []

    def on_epoch_end(self, epoch, logs=None):
        self.remembered.append(self.model._pairing.remembered is not None)


CASES = {
    "plain": {},
    "graph": {"compiled": {"run_eagerly": False, "jit_compile": False}},
    "xla": {"compiled": {"run_eagerly": False, "jit_compile": True, "steps_per_execution": 2}},
    "unshuffled": {"fit": {"shuffle": False}},
    "weighted": {"fit": {"sample_weight": np.linspace(0, 2, 12)}},
    "classes": {"fit": {"class_weight": {0: 3.0, 1: 0.5}}},
    "split": {"fit": {"validation_split": 0.25}},
    "held": {
        "fit": {"validation_split": 0.25},
        "compiled": {"evaluate_distillation": True},
    },
    "resumed": {"fit": {"initial_epoch": 1, "epochs": 4}},
    "steps": {"fit": {"batch_size": None, "steps_per_epoch": 4, "shuffle": False}},
    "features": {
        "compiled": {
            "distillation_loss": [
                kd.losses.SoftTargets(),
                kd.Transfer(kd.losses.RKD(), teacher="hidden", student="hidden"),
            ]
        }
    },
    "returned": {"compiled": {"distillation_loss": "mse"}},
    "inputs": {"options": {"teacher_inputs": lambda x: x * 2.0}},
    "rows": {
        "compiled": {
            "distillation_loss": [
                kd.losses.SoftTargets(),
                kd.Transfer(
                    kd.losses.CRD(samples=12, negatives=4),
                    teacher="hidden",
                    student="hidden",
                ),
            ]
        }
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_a_teacher_asked_in_every_step(case):
    options = CASES[case]
    x, y = rows(12)
    found = {}
    for answers in ("live", "memory"):
        compiled = dict(options.get("compiled", {}))
        losses = compiled.get("distillation_loss")
        if isinstance(losses, list):
            # A transfer with layers belongs to one distiller.
            compiled["distillation_loss"] = [
                each.fresh() if isinstance(each, kd.Transfer) else each for each in losses
            ]
        distiller = _distiller(answers, compiled=compiled, **options.get("options", {}))
        asked = Asked()
        found[answers], _ = _fit(distiller, x, y, callbacks=[asked], **options.get("fit", {}))
        assert set(asked.remembered) == {answers == "memory"}
    _same(found["memory"], found["live"])


def test_the_teacher_is_asked_once_a_row_and_says_so_once():
    x, y = rows(12)
    student, _ = pair()
    counter = Counted()
    inputs = keras.Input((FEATURES,))
    teacher = keras.Model(inputs, layers.Dense(CLASSES)(counter(inputs)), name="teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    _, said = _fit(distiller, x, y)
    assert len(said) == 1
    assert "each of the 12 rows" in said[0]
    count = len(counter.calls)
    _, said = _fit(distiller, x, y)
    assert (len(counter.calls), said) == (count, [])
    # One epoch alone takes what is there.
    _fit(distiller, x, y, epochs=1)
    assert len(counter.calls) == count


def test_one_epoch_is_not_worth_it():
    x, y = rows(12)
    distiller = _distiller("auto")
    asked = Asked()
    _, said = _fit(distiller, x, y, epochs=1, callbacks=[asked])
    assert (asked.remembered, said) == ([False], [])


def test_weights_that_change_between_fits_are_followed():
    x, y = rows(12)
    logs = {}
    for answers in ("live", "auto"):
        distiller = _distiller(answers)
        _fit(distiller, x, y)
        distiller.teacher.set_weights([2.0 * w for w in distiller.teacher.get_weights()])
        logs[answers], _ = _fit(distiller, x, y)
        # So are rows that change in place.
        x[3] += 1.0
        again, _ = _fit(distiller, x, y)
        logs[answers] |= {f"again_{name}": values for name, values in again.items()}
        x[3] -= 1.0
    _same(logs["auto"], logs["live"])


@pytest.mark.parametrize("graph", [False, True])
def test_weights_that_change_during_the_training_are_noticed(graph):
    """As of a teacher that follows the student: it is asked in every step from then on."""

    class Move(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                teacher = self.model.teacher
                teacher.set_weights([0.5 * w for w in teacher.get_weights()])

    x, y = rows(12)
    logs, asked = {}, Asked()
    for answers in ("live", "auto"):
        distiller = _distiller(answers, compiled={"run_eagerly": not graph})
        logs[answers], said = _fit(distiller, x, y, callbacks=[Move(), asked], epochs=4)
    _same(logs["auto"], logs["live"])
    assert asked.remembered == [True, False, False, False]
    assert "changed during the training" in said[-1]
    # The next training remembers what the teacher says now.
    _fit(distiller, x, y, callbacks=[asked])
    assert asked.remembered == [True, True, True]


@pytest.mark.parametrize("shape", [(3,), (), (40, 50), (1, 4099)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_variable_that_changes_has_another_mark(shape, dtype):
    variable = keras.Variable(np.ones(shape), dtype=dtype, trainable=False)
    before = backends.marks([variable])
    assert backends.marks([variable]) == before
    changed = np.ones(shape)
    changed.reshape(-1)[-1] = 2.0
    variable.assign(changed)
    assert backends.marks([variable]) != before
    variable.assign(np.ones(shape))
    # On JAX each assignment counts.
    assert keras.config.backend() == "jax" or backends.marks([variable]) == before


def test_the_first_of_the_greatest_decides():
    logits = np.array([[0.0, 3.0, 3.0], [-1.0, -0.0, 0.0], [2.0, 1.0, -5.0]], "float32")
    found = ops.convert_to_numpy(backends.first_of_greatest(ops.convert_to_tensor(logits)))
    assert found[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="shapes of tf.data")
@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, None)])
@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_batches_of_one_size_have_a_known_one(count, size, shuffle):
    """As where Keras reads arrays: a step that knows its size takes half the operations less."""
    held = Held({"indices": np.arange(count, dtype="int32")})
    data = (np.arange(count, dtype="float32")[:, None], np.arange(count), None)
    found, *_ = join_arrays.drawn_for_fit(held, data, 4, {"shuffle": shuffle}, False)
    assert {leaf.shape[0] for leaf in keras.tree.flatten(found.element_spec)} == {size}
    batches = [(batch.x[:, 0], y, batch.record["indices"]) for batch, y in found]
    for x, y, indices in batches:
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(y, indices)
    rows = np.concatenate([indices for *_, indices in batches])
    assert sorted(rows) == list(range(count))


class _Normed(keras.Model):
    """Its answer to a row depends on the other rows."""

    def __init__(self):
        super().__init__(name="teacher")
        self.inner = mlp(7, name="inner")

    def call(self, x):
        return self.inner(x - ops.mean(x, axis=0, keepdims=True))


def _noise(x):
    return x + keras.random.normal(ops.shape(x))


AGAINST = {
    "noise": ({"teacher_inputs": _noise}, {}, "`teacher_inputs` does not give the same twice"),
    "means": (
        {"teacher_inputs": lambda x: x - ops.mean(x, axis=0, keepdims=True)},
        {},
        "`teacher_inputs` does not give the same twice",
    ),
    "transform": (
        {},
        {"batch_transform": lambda batch, distiller: batch._replace(x=batch.x + 1.0)},
        "`batch_transform` changes",
    ),
    "batch": ({"teacher": _Normed}, {}, "alike in every batch"),
}


@pytest.mark.parametrize("case", AGAINST)
def test_what_speaks_against_it(case):
    options, compiled, reason = AGAINST[case]
    x, y = rows(12)
    teacher = options.get("teacher")
    options = {k: v for k, v in options.items() if k != "teacher"}

    def made(answers):
        own = None if teacher is None else teacher()
        if own is not None:
            own(x)
        return _distiller(answers, own, compiled, **options)

    asked = Asked()
    _, said = _fit(made("auto"), x, y, callbacks=[asked])
    assert (set(asked.remembered), said) == ({False}, [])
    with pytest.raises(ValueError, match=reason):
        _fit(made("memory"), x, y)


def test_answers_that_do_not_fit(monkeypatch):
    x, y = rows(12)
    monkeypatch.setattr("keras_kd.distill.memory.free_memory", lambda: 1000)
    asked = Asked()
    _fit(_distiller("auto"), x, y, callbacks=[asked])
    assert set(asked.remembered) == {False}
    # Ten times as much is enough where it is insisted on: 12 rows of 4 numbers take 192 bytes.
    _fit(_distiller("memory"), x, y, callbacks=[asked])
    assert set(asked.remembered) == {True}
    monkeypatch.setattr("keras_kd.distill.memory.free_memory", lambda: 100)
    with pytest.raises(ValueError, match="of memory are free"):
        _fit(_distiller("memory"), x, y)


def test_it_insists_or_says_why_not(tmp_path):
    import tensorflow as tf

    x, y = rows(12)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    with pytest.raises(ValueError, match="no arrays.*kd.cache.write"):
        _distiller("memory").fit(data, epochs=2, verbose=0)
    student, teacher = pair()
    kd.cache.write(teacher, x, tmp_path / "cache")
    distiller = kd.Distiller(
        student, kd.teachers.CachedTeacher(tmp_path / "cache"), teacher_answers="memory"
    )
    distiller.compile("sgd", loss=crossentropy())
    with pytest.raises(ValueError, match="read from a cache already"):
        distiller.fit(x, y, epochs=2, verbose=0)
    with pytest.raises(ValueError, match="one of 'auto', 'live', 'memory'.*Did you mean 'memory'"):
        kd.Distiller(student, teacher, teacher_answers="memmory")
    alone = kd.Distiller(student, teacher_answers="memory")
    alone.compile("sgd", loss=crossentropy())
    with pytest.raises(ValueError, match="there is no teacher"):
        alone.fit(x, y, verbose=0)


def test_masks_are_remembered():
    def reader(width, name):
        inputs = keras.Input((None,), dtype="int32")
        embedded = layers.Embedding(9, width, mask_zero=True)(inputs)
        return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(embedded), name=name)

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (12, 6)), rng.integers(0, CLASSES, (12, 6))
    keras.utils.set_random_seed(0)
    student, teacher = reader(3, "student"), reader(5, "teacher")
    start, logs = student.get_weights(), {}
    for answers in ("live", "memory"):
        student.set_weights(start)
        distiller = kd.Distiller(student, teacher, teacher_answers=answers)
        distiller.compile(keras.optimizers.SGD(0.1), loss=crossentropy(), run_eagerly=True)
        logs[answers], _ = _fit(distiller, x, y)
    _same(logs["memory"], logs["live"])


def test_a_teacher_that_fails_on_a_row_is_told():
    x, y = rows(12)
    student, _ = pair()

    class Fails(keras.Model):
        def __init__(self):
            super().__init__(name="teacher")
            self.inner = mlp(7, name="inner")

        def call(self, x):
            return self.inner(x) + ops.where(x[:, :1] > 50, np.nan, 0.0)

    teacher = Fails()
    teacher(x)
    x[9, 0] = 100.0
    distiller = kd.Distiller(student, teacher, from_logits=True)
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    with pytest.raises(FloatingPointError, match="batch 2 of epoch 1"):
        _fit(distiller, x, y, shuffle=False)
    assert x.shape[1] == FEATURES
    # What is kept in memory is finite: a step that reads it need not look.
    distiller = kd.Distiller(student, teacher, from_logits=True, teacher_answers="memory")
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    with pytest.raises(ValueError, match="answer to row 9 is NaN or infinite"):
        _fit(distiller, x, y, shuffle=False)
