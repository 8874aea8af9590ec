"""One small CNN, trained and exported once, for all the facts that can be read off its files."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from keras import layers

import keras_kd.export


@pytest.fixture(scope="session")
def blobs():
    """Images of a bright spot in one of four corners, with noise: (x, y)."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    x = rng.normal(0.2, 0.1, (400, 8, 8, 1))
    for i, corner in enumerate(y):
        row, column = 4 * (corner // 2), 4 * (corner % 2)
        x[i, row : row + 4, column : column + 4] += 0.4
    return np.clip(x, 0, 1).astype("float32"), y


@pytest.fixture(scope="session")
def student(blobs):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(24, 3, padding="same", use_bias=False, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu", name="down"),
            layers.Flatten(name="flat"),
            layers.Dense(32, activation="relu", name="hidden"),
            layers.Dense(4, name="logits"),
        ],
        name="corners",
    )
    model.compile(
        keras.optimizers.Adam(0.005),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


@pytest.fixture(scope="session")
def history(student, blobs):
    x, y = blobs
    return student.fit(
        x[:200], y[:200], epochs=4, verbose=0, validation_data=(x[200:], y[200:])
    ).history


@pytest.fixture(scope="session")
def stages():
    """What the progress callback was told during the shared export."""
    return []


@pytest.fixture(scope="session")
def report(student, history, blobs, stages, tmp_path_factory):
    x, y = blobs
    return keras_kd.export(
        student,
        tmp_path_factory.mktemp("shared") / "corners",
        calibration=x[:200],
        evaluation=(x[200:], y[200:]),
        labels=["nw", "ne", "sw", "se"],
        history=history,
        teacher={"accuracy": 0.99, "parameters": 94634},
        max_drop=0.05,
        progress=lambda *event: stages.append(event),
    )


@pytest.fixture(scope="session")
def colored():
    """Pixels and classes of images in which one color dominates: (uint8 pixels, y)."""
    rng = np.random.default_rng(3)
    y = np.arange(48) % 3
    pixels = rng.integers(0, 90, (48, 8, 8, 3))
    pixels[np.arange(48), :, :, y] += 130
    # The darkest and the brightest pixel are left out: no file may need them in its calibration.
    return pixels.astype("uint8"), y


@pytest.fixture(scope="session")
def images(colored, tmp_path_factory):
    """The report of an image classifier, exported with labels and normalization."""
    pixels, y = colored
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            layers.Conv2D(3, 1, activation="relu", name="conv"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(3, activation="softmax", name="color"),
        ],
        name="colors",
    )
    eye, zero = np.eye(3), np.zeros(3)
    model.set_weights([eye[None, None], zero, 8 * eye, zero])
    return keras_kd.export(
        model,
        tmp_path_factory.mktemp("images") / "colors",
        precisions=("float32", "int8", "uint8"),
        calibration=pixels / 255.0,
        evaluation=(pixels / 255.0, y),
        labels=["red", "green", "bluish"],
        normalization=(0, 255),
    )
