"""Models of a few weights and streams of a few rows, for the tests of lifelong learning."""

import keras
import numpy as np

from keras_kd import lifelong


def model(units=6, features=4, width=5, seed=0, activation="tanh"):
    """Features behind one hidden layer, with weights drawn by NumPy, the same on each backend."""
    inputs = keras.Input((features,))
    hidden = keras.layers.Dense(width, activation=activation, name="hidden")(inputs)
    made = keras.Model(inputs, keras.layers.Dense(units, name="logits")(hidden), name="student")
    rng = np.random.default_rng(seed)
    made.set_weights([0.5 * rng.normal(size=w.shape).astype("float32") for w in made.weights])
    return made


def rows(count=48, features=4, classes=6, seed=0):
    """Rows around one point a class, classes in turn."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    centers = 2 * np.random.default_rng(7).normal(size=(classes, features))
    return (centers[y] + 0.3 * rng.normal(size=(count, features))).astype("float32"), y


def stream(tasks=3, **options):
    x, y = rows()
    return lifelong.Stream.by_class(x, y, tasks=tasks, seed=None, test=rows(24, seed=1), **options)


def learned(method, memory=None, of=None, student=None, optimizer=None, epochs=1, **options):
    """A learner that has learned a stream."""
    learner = lifelong.Learner(student or model(), method, memory, **options)
    # A few steps a task run sooner than they are compiled.
    learner.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.5), run_eagerly=True)
    for task in of or stream():
        learner.fit(task, epochs=epochs, batch_size=8, verbose=0)
    return learner
