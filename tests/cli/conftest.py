"""Small models and data on disk, and the command line run in this process."""

import keras
import numpy as np
import pytest

from keras_kd.cli import main


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run `keras-kd` in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def command(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return command


def classifier(shape=(6, 6, 1), classes=3, built=True):
    layers = [
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(classes),
    ]
    if built:
        layers.insert(0, keras.Input(shape, name="image"))
    return keras.Sequential(layers, name="tiny")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Paths of saved models, good and bad, by name."""
    folder = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(7)
    paths = {name: folder / f"{name}.keras" for name in ("good", "classes", "shape", "unbuilt")}
    classifier().save(paths["good"])
    classifier(classes=4).save(paths["classes"])
    classifier(shape=(5, 5, 1)).save(paths["shape"])
    classifier(built=False).save(paths["unbuilt"])
    diverged = classifier()
    diverged.set_weights([np.full_like(weight, np.nan) for weight in diverged.get_weights()])
    paths["diverged"] = folder / "diverged.keras"
    diverged.save(paths["diverged"])
    paths["lambda"] = folder / "lambda.keras"
    keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Flatten(),
            keras.layers.Lambda(lambda x: x),
            keras.layers.Dense(3),
        ]
    ).save(paths["lambda"])
    return paths


@pytest.fixture(scope="session")
def image_file(tmp_path_factory):
    """A data set of 60 images in three classes that differ in brightness."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    generator = np.random.default_rng(1)
    labels = np.arange(60) % 3
    images = generator.integers(0, 60, (60, 6, 6)) + 90 * labels[:, None, None]
    images = images.astype("uint8")
    np.savez(path, x_train=images, y_train=labels, x_test=images[:30], y_test=labels[:30])
    return path
