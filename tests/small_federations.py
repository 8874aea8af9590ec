"""Three clients of a few dozen weights and of different kinds, for the tests of federations."""

import keras
import numpy as np

from keras_kd import federated

FEATURES, CLASSES = 4, 4


def rows(seed, count, classes=range(CLASSES)):
    """Rows that a small model learns at once, and their classes."""
    rng = np.random.default_rng(seed)
    y = rng.choice(np.asarray(list(classes)), count)
    x = (
        rng.normal(size=(count, FEATURES)).astype("float32") * 0.3
        + np.eye(FEATURES, dtype="float32")[y] * 2
    )
    return x, y


def public(count=60):
    """The rows that everybody has."""
    return rows(100, count)[0]


def model(kind, seed=0):
    """A small model: `logits`, which is not compiled, `softmax`, or `compiled` for logits."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(6 if kind == "logits" else 9, activation="tanh")(inputs)
    end = "softmax" if kind == "softmax" else None
    found = keras.Model(inputs, keras.layers.Dense(CLASSES, activation=end)(hidden))
    if kind != "logits":
        found.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=end is None),
            metrics=["accuracy"],
        )
    return found


KINDS = ("logits", "softmax", "compiled")
SHARES = ((0, 1, 2), (1, 2, 3), (2, 3, 0))


METHOD = {"batch_size": 20, "learning_rate": 0.01, "student_epochs": 10}


def student():
    """A server's model that learns at once by a method with these numbers."""
    found = model("softmax", 7)
    found.compile(keras.optimizers.Adam(0.03))
    return found


def client(number, **options):
    """One of three clients, of which each lacks a class."""
    x, y = rows(number, 60, SHARES[number])
    return federated.Client(model(KINDS[number], number), x, y, epochs=8, batch_size=10, **options)


def maker(number, **options):
    """What makes it."""
    return lambda: client(number, **options)


def makers():
    """All three."""
    return [maker(i) for i in range(3)]
