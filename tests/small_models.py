"""Models of a few dozen weights, and formulas in NumPy, for the tests of the training core."""

import keras
import numpy as np
from keras import layers

FEATURES = 6
CLASSES = 4


def mlp(width=5, classes=CLASSES, name=None, activation=None, features=FEATURES, **options):
    """Two dense layers: `hidden` and `logits`."""
    inputs = keras.Input((features,))
    x = layers.Dense(width, activation="tanh", name="hidden", **options)(inputs)
    return keras.Model(
        inputs, layers.Dense(classes, activation=activation, name="logits", **options)(x), name=name
    )


def pair(**options):
    """A student and a wider teacher that knows its mind."""
    student, teacher = mlp(name="student", **options), mlp(width=9, name="teacher", **options)
    teacher.set_weights([3 * w for w in teacher.get_weights()])
    return student, teacher


def rows(count=12, features=FEATURES, classes=CLASSES, seed=0):
    """Random inputs and integer labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features)).astype("float32")
    return x, rng.integers(0, classes, count)


def crossentropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def log_softmax(logits):
    logits = np.asarray(logits, "float64")
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(teacher, student, temperature):
    """`T**2 * KL(p || q)` of softened logits, one value a row."""
    log_p = log_softmax(np.asarray(teacher, "float64") / temperature)
    log_q = log_softmax(np.asarray(student, "float64") / temperature)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def hard_loss(student, labels):
    """Crossentropy of integer labels, one value a row."""
    log_q = log_softmax(student)
    return -np.take_along_axis(log_q, np.asarray(labels)[..., None], -1)[..., 0]


class Counted(keras.layers.Layer):
    """Passes its input on and counts in Python: runs when eager, traces in a graph."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def call(self, inputs, training=None):
        self.calls.append(bool(training))
        return inputs
