import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _seeded():
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)


@pytest.fixture
def small_cnn():
    """BatchNormalization, a residual sum, depthwise, pooling, Dense; every weight off its start."""
    layers = keras.layers
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = layers.BatchNormalization(name="stem_norm")(x)
    x = layers.ReLU(name="stem_relu")(x)
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    y = layers.Conv2D(8, 1, name="pointwise")(y)
    x = layers.Add(name="sum")([x, y])
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(16, activation="relu", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(4, name="logits")(x), name="small")
    rng = np.random.default_rng(0)
    norm = model.get_layer("stem_norm")
    norm.set_weights(
        [
            rng.uniform(0.5, 1.5, 8),
            rng.normal(0, 0.3, 8),
            rng.normal(0, 0.3, 8),
            rng.uniform(0.5, 2, 8),
        ]
    )
    return model


@pytest.fixture
def images():
    """Four classes told by which quarter of the image is bright."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 192)
    x = rng.normal(0, 0.5, (192, 8, 8, 3)).astype("float32")
    for index, label in enumerate(labels):
        row, column = divmod(int(label), 2)
        x[index, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    return x, labels


@pytest.fixture
def fit():
    def run(model, data, epochs=2, **kwargs):
        model.compile(
            keras.optimizers.Adam(3e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model.fit(*data, batch_size=32, epochs=epochs, verbose=0, **kwargs)

    return run
