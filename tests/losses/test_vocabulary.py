"""Divergences over a large vocabulary: the same numbers, in the memory of the logits."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_kd
from keras_kd import losses
from keras_kd.losses import vocabulary
from keras_kd.losses.divergences import KL, at_once, mixture, over_tokens
from keras_kd.losses.vocabulary import LARGE, PARTS, label_or_rest


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_value_and_gradient_are_those_of_the_plain_formula(gradient, beta, adaptive):
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(0, 3, (2, 3, 4, 11))
    temperature = ops.convert_to_tensor(rng.uniform(0.5, 4, (3, 4, 1))) if adaptive else 2.0
    weight = ops.convert_to_tensor(rng.uniform(0, 1, (3, 4)))
    teacher, student = map(ops.convert_to_tensor, (teacher, student))

    def total(compare):
        return lambda s: ops.sum(weight * compare(mixture(beta), teacher, s, temperature))

    plain, lean = total(at_once), total(over_tokens)
    np.testing.assert_allclose(float(lean(student)), float(plain(student)), rtol=1e-12)
    np.testing.assert_allclose(gradient(lean, student), gradient(plain, student), rtol=1e-9)


def test_crossentropy_of_a_label_and_the_rest(gradient):
    """The loss of all classes, sure and unsure, right and wrong, to the last bit or so."""
    rng = np.random.default_rng(0)
    student = np.concatenate([rng.normal(0, 3, (4, 5, 7)), 90.0 * np.eye(7)[None, :5]])
    labels = rng.integers(0, 7, (5, 5))
    loss = keras.losses.SparseCategoricalCrossentropy(True, dtype="float64", reduction="sum")

    def halved(s):
        return loss(np.zeros_like(labels), label_or_rest(ops.convert_to_tensor(labels), s)[0])

    def whole(s):
        return loss(labels, s)

    student = ops.convert_to_tensor(student)
    np.testing.assert_allclose(float(halved(student)), float(whole(student)), rtol=1e-6)
    np.testing.assert_allclose(
        gradient(halved, student), gradient(whole, student), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("order", ["one", "both", "other first"])
def test_two_losses_of_the_same_logits(gradient, order):
    """The gradient is the sum of both, whoever else reads the logits that were passed on."""
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(0, 3, (2, 2, 6, 9))
    labels = ops.convert_to_tensor(rng.integers(0, 9, (2, 6)))
    teacher = ops.convert_to_tensor(teacher)

    def hard(halves):
        return ops.sum(ops.softplus(halves[..., 1] - halves[..., 0]))

    def chained(s):
        halves, passed = label_or_rest(labels, s)
        soft = ops.sum(over_tokens(KL, teacher, passed, 2.0))
        if order == "both":
            # One number for all entries, of no memory of its own.
            soft = soft + ops.sum(passed) + ops.sum(at_once(KL, teacher, passed, 2.0))
        elif order == "other first":
            soft = ops.sum(passed)
        return hard(halves) + soft

    def apart(s):
        crossentropy = -ops.take_along_axis(ops.log_softmax(s), labels[..., None], -1)
        soft = at_once(KL, teacher, s, 2.0)
        factor = {"one": 1.0, "both": 2.0, "other first": 0.0}[order]
        return ops.sum(crossentropy) + factor * ops.sum(soft) + (order != "one") * ops.sum(s)

    student = ops.convert_to_tensor(student)
    np.testing.assert_allclose(float(chained(student)), float(apart(student)), rtol=1e-6)
    np.testing.assert_allclose(gradient(chained, student), gradient(apart, student), rtol=1e-9)


@pytest.mark.parametrize("gap", [1e2, 1e4])
def test_certain_and_wrong_over_a_large_vocabulary(gradient, gap):
    """Float32 has no digits left for the sum of the largest logit and what is beside it."""
    teacher, student = np.zeros((2, 1, 3, 7))
    teacher[0, :, 1], student[0, :, 2] = gap, gap
    student[0, 1, 3] = gap - 1.0
    t, s = (ops.cast(z, "float32") for z in (teacher, student))
    found = gradient(lambda z: ops.sum(over_tokens(KL, t, z, 1.0)), s)
    shifted = np.exp(student - gap)
    expected = shifted / shifted.sum(-1, keepdims=True) - np.eye(7)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("tokens", [1, PARTS - 1, PARTS, 2 * PARTS + 5])
def test_any_number_of_tokens(gradient, tokens):
    """The last part is shorter than the others, or there are fewer tokens than parts."""
    teacher, student = np.random.default_rng(0).normal(0, 3, (2, 1, tokens, 3))

    def total(compare):
        return lambda s: ops.sum(compare(KL, ops.convert_to_tensor(teacher), s, 2.0))

    plain, lean = total(at_once), total(over_tokens)
    np.testing.assert_allclose(float(lean(student)), float(plain(student)), rtol=1e-12)
    np.testing.assert_allclose(gradient(lean, student), gradient(plain, student), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_summed_in_single(gradient, dtype):
    teacher, student = np.random.default_rng(0).normal(0, 3, (2, 2, 3, 500))
    teacher, student = (ops.cast(z, dtype) for z in (teacher, student))
    t, s = (ops.cast(z, "float64") for z in (teacher, student))
    found = over_tokens(KL, teacher, student, 2.0)
    np.testing.assert_allclose(found, at_once(KL, t, s, 2.0), rtol=1e-5)
    slopes = gradient(lambda s: ops.sum(over_tokens(KL, teacher, s, 2.0)), student)
    expected = (ops.softmax(s / 2.0) - ops.softmax(t / 2.0)) / 2.0
    np.testing.assert_allclose(slopes, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("loss", ["SoftTargets", "ReverseKL", "JensenShannon"])
def test_a_large_vocabulary_in_a_fit(loss):
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(5, 3, mask_zero=True)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(LARGE)(x))
    model.compile("adam", getattr(losses, loss)(temperature=2.0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 5, (5, 6))
    teacher = rng.normal(0, 3, (5, 6, LARGE)).astype("float32")
    logs = model.fit(tokens, teacher, batch_size=2, epochs=2, verbose=0).history["loss"]
    assert logs[1] < logs[0]


def test_a_step_is_that_of_the_plain_losses(monkeypatch):
    """Labels, padding and sample weights included."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (4, 6)), rng.integers(0, LARGE, (4, 6))

    def model():
        inputs = keras.Input((None,), dtype="int32")
        hidden = keras.layers.Embedding(5, 3, mask_zero=True)(inputs)
        return keras.Model(inputs, keras.layers.Dense(LARGE)(hidden))

    def step():
        keras.utils.set_random_seed(0)
        distiller = keras_kd.Distiller(model(), model())
        hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        distiller.compile(keras.optimizers.SGD(50.0), hard, temperature=2.0)
        before = distiller.student.get_weights()
        weight = np.array([1.0, 0.5, 2.0, 0.0], "float32")
        logs = distiller.train_on_batch(x, y, sample_weight=weight, return_dict=True)
        after = distiller.student.get_weights()
        return float(logs["loss"]), [b - a for a, b in zip(before, after)]

    loss, moved = step()
    monkeypatch.setattr(vocabulary, "LARGE", LARGE + 1)
    plain_loss, plain_moved = step()
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for found, expected in zip(moved, plain_moved):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


# A whole step, in a process of its own, counted in tensors of the logits' size and precision: what
# the process grows by at most in a step after the first one, or on JAX what XLA reserves for
# temporaries, less the two that the models make themselves. The gradient of the student's logits is
# one of what is left, of necessity.
SCRIPT = """
import sys
import keras
import numpy as np
import keras_kd as kd

LOSS, LABELED, DTYPE, XLA, BATCH = sys.argv[1:]
BATCH, TOKENS, CLASSES = int(BATCH), 16, 50_000
COPY = BATCH * TOKENS * CLASSES * (4 if DTYPE == "float32" else 2)

def status(key):
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(key)).split()[1])

def model(width):
    inputs = keras.Input((None,), dtype="int32")
    if DTYPE != "float32":
        # Products in half precision take memory of their own on a CPU.
        return keras.Model(inputs, keras.layers.Embedding(50, CLASSES, dtype=DTYPE)(inputs))
    x = keras.layers.Embedding(50, width)(inputs)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))

def data(batch, labeled):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 50, (batch, TOKENS))
    return x, rng.integers(0, CLASSES, (batch, TOKENS)) if labeled else None

def by_the_process(distiller, labeled):
    for batch in (2, BATCH, BATCH):
        # The peak begins again, and the code that such a step runs has been read from its files
        # before: its pages count as memory of the process too, and how many a fault brings in is
        # for the system to choose.
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = status("VmRSS")
        logs = distiller.fit(*data(batch, labeled), batch_size=batch, verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    return status("VmHWM") - before

def by_xla(distiller, labeled):
    import jax
    from keras_kd import backends

    distiller.train_on_batch(*data(2, labeled))
    state = tuple(
        [v.value for v in variables]
        for variables in (
            distiller.trainable_variables,
            distiller.non_trainable_variables,
            distiller.optimizer.variables,
            distiller.metrics_variables,
        )
    )
    x, y = data(BATCH, labeled)
    batch = (x,) if y is None else (x, y)
    batch = backends.Supplied(batch, [v.value for v in distiller.teacher.variables])
    compiled = jax.jit(distiller.train_step).lower(state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

measure = by_xla if keras.backend.backend() == "jax" else by_the_process
hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
for labeled in (each == "labeled" for each in LABELED.split(",")):
    distiller = kd.Distiller(model(4), model(6))
    distiller.compile(
        "sgd",
        hard if labeled else None,
        distillation_loss=getattr(kd.losses, LOSS)(),
        jit_compile=XLA == "xla",
    )
    # The logits of teacher and student are the models' own.
    print(measure(distiller, labeled) / COPY - 2)
"""


def copies_of(backend, *arguments):
    """How many copies a step takes, a number for each of the cases with labels and without."""
    # With oneDNN, on by default on some processors, TensorFlow allocates from pools that it
    # enlarges by doubling, so that the peak of the process says less about its tensors.
    settings = {"KERAS_BACKEND": backend, "TF_ENABLE_ONEDNN_OPTS": "0"}
    if backend == "torch":
        # PyTorch's tensors are blocks of the C library, which raises by itself the size from which
        # on freed ones go back, so that the peak depends on what was freed before.
        settings["MALLOC_MMAP_THRESHOLD_"] = "131072"
        # Its threads wait for each other by spinning, where others have the cores.
        settings["OMP_NUM_THREADS"] = "1"
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [float(number) for number in said[-len(arguments[1].split(",")) :]]


LINUX = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow" or sys.platform != "linux",
    reason="measures memory through Linux, each backend in a process of its own",
)


@LINUX
@pytest.mark.parametrize(
    ("loss", "labels", "copies"),
    [("SoftTargets", "labeled", 2.0), ("JensenShannon", "unlabeled", 1.5)],
)
def test_memory_of_a_step_over_a_large_vocabulary(loss, labels, copies):
    """Beyond the models' own logits a step holds their gradient, and as much again at most."""
    # What is below a twentieth of a copy is the process's own.
    assert max(copies_of("tensorflow", loss, labels, "float32", "plain", 24)) < copies + 0.05


@LINUX
def test_memory_of_a_step_in_half_precision():
    """Less than one float32 copy, which is two of these; the gradient alone is one."""
    assert max(copies_of("tensorflow", "SoftTargets", "unlabeled", "bfloat16", "plain", 96)) < 2.0


@LINUX
def test_memory_of_a_step_under_xla():
    """One copy, the gradient of both losses, and what the compiler itself takes meanwhile."""
    assert max(copies_of("tensorflow", "SoftTargets", "labeled", "float32", "xla", 72)) < 1.9


@LINUX
def test_memory_of_a_step_on_jax():
    """One copy for the gradient, of both losses where there are two, and the rows at hand."""
    pytest.importorskip("jax")
    cases = "labeled,unlabeled"
    assert max(copies_of("jax", "SoftTargets", cases, "float32", "xla", 24)) < 1.05


@LINUX
def test_memory_of_a_step_on_torch():
    """One copy for the gradient of both losses, the rows at hand, and what the process does."""
    pytest.importorskip("torch")
    assert max(copies_of("torch", "SoftTargets", "labeled", "float32", "plain", 24)) < 1.9
