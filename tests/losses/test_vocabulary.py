"""The KL over a large vocabulary: the same numbers, in the memory of the logits."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_kd import losses
from keras_kd.losses.logits import softened_kl
from keras_kd.losses.vocabulary import LARGE, softened_kl_by_sample


@pytest.mark.parametrize("adaptive", [False, True])
def test_value_and_gradient_are_those_of_the_plain_formula(gradient, adaptive):
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(0, 3, (2, 3, 4, 11))
    temperature = rng.uniform(0.5, 4, (3, 4, 1)) if adaptive else 2.0
    weight = rng.uniform(0, 1, (3, 4))

    def total(function):
        return lambda s: ops.sum(weight * function(ops.convert_to_tensor(teacher), s, temperature))

    plain, lean = total(softened_kl), total(softened_kl_by_sample)
    student = ops.convert_to_tensor(student)
    np.testing.assert_allclose(float(lean(student)), float(plain(student)), rtol=1e-12)
    np.testing.assert_allclose(gradient(lean, student), gradient(plain, student), rtol=1e-9)


def test_soft_targets_over_a_large_vocabulary_in_a_fit():
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(5, 3, mask_zero=True)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(LARGE)(x))
    model.compile("adam", losses.SoftTargets(temperature=2.0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 5, (5, 6))
    teacher = rng.normal(0, 3, (5, 6, LARGE)).astype("float32")
    logs = model.fit(tokens, teacher, batch_size=2, epochs=2, verbose=0).history["loss"]
    assert logs[1] < logs[0]


SCRIPT = """
import resource
import tensorflow as tf
from keras_kd import losses

BATCH, TOKENS, CLASSES = 16, 16, 50_000
COPY = BATCH * TOKENS * CLASSES * 4

loss = losses.SoftTargets(temperature=2.0)

@tf.function
def slope(teacher, student):
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = loss(teacher, student)
    return tape.gradient(value, student)

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def peak():
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

slope(*tf.random.normal((2, 2, 2, CLASSES)))
teacher = tf.repeat(tf.random.normal((1, TOKENS, CLASSES)), BATCH, axis=0)
student = tf.repeat(tf.random.normal((1, TOKENS, CLASSES)), BATCH, axis=0)
before = held()
found = slope(teacher, student)
print((peak() - before) / COPY, float(tf.reduce_max(tf.abs(found))) > 0)
"""


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow" or sys.platform != "linux",
    reason="measures TensorFlow's memory through Linux",
)
def test_memory_of_a_large_vocabulary():
    """Beyond the gradient, which is one copy of the logits, less than two copies."""
    printed = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(printed[-2]) < 1 + 2
    assert printed[-1] == "True"
