"""Divergences over a large vocabulary: the same numbers, in the memory of the logits."""

import os
import subprocess
import sys
from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

from keras_kd import losses
from keras_kd.losses import logits
from keras_kd.losses.vocabulary import LARGE, PARTS, in_parts

FORMULAS = {
    "softened": (logits.softened_kl, logits.softened_kl_slope),
    "reverse": (logits.reverse_kl, logits.reverse_kl_slope),
    **{
        f"mixture of {beta}": (
            partial(logits.jensen_shannon, beta=beta),
            partial(logits.jensen_shannon_slope, beta=beta),
        )
        for beta in (0, 0.3, 1)
    },
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("formula", FORMULAS)
def test_value_and_gradient_are_those_of_the_plain_formula(gradient, formula, adaptive):
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(0, 3, (2, 3, 4, 11))
    temperature = rng.uniform(0.5, 4, (3, 4, 1)) if adaptive else 2.0
    weight = rng.uniform(0, 1, (3, 4))
    value, slope = FORMULAS[formula]

    def total(function):
        return lambda s: ops.sum(weight * function(ops.convert_to_tensor(teacher), s, temperature))

    plain, lean = total(value), total(partial(in_parts, value, slope))
    student = ops.convert_to_tensor(student)
    np.testing.assert_allclose(float(lean(student)), float(plain(student)), rtol=1e-12)
    np.testing.assert_allclose(gradient(lean, student), gradient(plain, student), rtol=1e-9)


@pytest.mark.parametrize("tokens", [1, PARTS - 1, PARTS, 2 * PARTS + 5])
def test_any_number_of_tokens(gradient, tokens):
    """The last part is shorter than the others, or there are fewer tokens than parts."""
    teacher, student = np.random.default_rng(0).normal(0, 3, (2, 1, tokens, 3))
    value, slope = FORMULAS["softened"]

    def total(function):
        return lambda s: ops.sum(function(ops.convert_to_tensor(teacher), s, 2.0))

    plain, lean = total(value), total(partial(in_parts, value, slope))
    np.testing.assert_allclose(gradient(lean, student), gradient(plain, student), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_summed_in_single(gradient, dtype):
    teacher, student = np.random.default_rng(0).normal(0, 3, (2, 2, 3, 500))
    teacher, student = (ops.cast(z, dtype) for z in (teacher, student))
    value, slope = FORMULAS["softened"]
    found = in_parts(value, slope, teacher, student, 2.0)
    exact = value(ops.cast(teacher, "float64"), ops.cast(student, "float64"), 2.0)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    slopes = gradient(lambda s: ops.sum(in_parts(value, slope, teacher, s, 2.0)), student)
    expected = slope(ops.cast(teacher, "float64"), ops.cast(student, "float64"), 2.0)
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


# A whole step, in a process of its own, counted in float32 tensors of the logits' size.
SCRIPT = """
import sys
import keras
import numpy as np
import keras_kd as kd

BATCH, TOKENS, CLASSES = 24, 16, 50_000
COPY = BATCH * TOKENS * CLASSES * 4

def status(key):
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(key)).split()[1])

def model(width):
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(50, width)(inputs)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))

def extra(distiller, labeled):
    rng = np.random.default_rng(0)
    for batch in (2, BATCH):
        before = status("VmRSS")
        x = rng.integers(0, 50, (batch, TOKENS))
        y = rng.integers(0, CLASSES, (batch, TOKENS)) if labeled else None
        logs = distiller.fit(x, y, batch_size=batch, verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    # The logits of teacher and student are the models' own.
    return (status("VmHWM") - before) / COPY - 2

loss = getattr(kd.losses, sys.argv[1])()
labeled = sys.argv[2] == "labeled"
distiller = kd.Distiller(model(4), model(6))
hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if labeled else None
distiller.compile("sgd", hard, distillation_loss=loss, jit_compile=False)
print(extra(distiller, labeled))
"""


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow" or sys.platform != "linux",
    reason="measures TensorFlow's memory through Linux",
)
@pytest.mark.parametrize(
    ("loss", "labels", "copies"),
    [("SoftTargets", "labeled", 2.0), ("JensenShannon", "unlabeled", 1.5)],
)
def test_memory_of_a_step_over_a_large_vocabulary(loss, labels, copies):
    """Beyond the models' own logits a step holds their gradient, and less than as much again."""
    # With oneDNN, on by default on some processors, TensorFlow allocates from pools that it
    # enlarges by doubling, so that the peak of the process says less about its tensors.
    printed = subprocess.run(
        [sys.executable, "-c", SCRIPT, loss, labels],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert float(printed[-1]) < copies
