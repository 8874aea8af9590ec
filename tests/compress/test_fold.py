import keras
import numpy as np
import pytest
from keras import layers

from keras_kd.models.folding import fold_batch_normalization


def randomize(model, seed=0):
    """Move every weight, BatchNormalization statistics included, off its initial value."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed" in variable.path:
            continue
        value = rng.normal(0.0, 0.5, variable.shape)
        if variable.path.endswith("moving_variance"):
            value = np.abs(value) + 0.1
        variable.assign(value.astype("float32"))
    return model


def conv_stack(layer, shape):
    inputs = keras.Input(shape)
    x = layer(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    return randomize(keras.Model(inputs, x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.Conv1D(4, 3, use_bias=False, name="fold"), (9, 3)),
        (lambda: layers.Conv2D(4, 3, padding="same", strides=2, name="fold"), (8, 8, 3)),
        (lambda: layers.Conv2D(4, 3, groups=2, name="fold"), (8, 8, 4)),
        (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2, name="fold"), (9, 3)),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=3, name="fold"), (8, 8, 3)),
        (lambda: layers.SeparableConv1D(4, 3, use_bias=False, name="fold"), (9, 3)),
        (lambda: layers.SeparableConv2D(4, 3, depth_multiplier=2, name="fold"), (8, 8, 3)),
        (lambda: layers.Conv1DTranspose(5, 3, strides=2, name="fold"), (9, 3)),
        (lambda: layers.Conv2DTranspose(5, 3, use_bias=False, name="fold"), (6, 6, 3)),
        (lambda: layers.Conv3D(4, 2, name="fold"), (4, 4, 4, 2)),
        (lambda: layers.Dense(6, name="fold"), (5,)),
        (lambda: layers.Dense(6, use_bias=False, name="fold"), (7, 5)),
    ],
)
def test_outputs_stay_equal(layer, shape):
    model = conv_stack(layer(), shape)
    before = [w.copy() for w in model.get_weights()]
    folded = fold_batch_normalization(model)
    x = np.random.default_rng(1).normal(size=(4, *shape)).astype("float32")
    np.testing.assert_allclose(
        folded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5
    )
    assert not [w for w in folded.weights if "moving" in w.path]
    assert isinstance(folded.get_layer("norm"), layers.Identity)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_weights_follow_the_formula():
    inputs = keras.Input((5,))
    dense, norm = layers.Dense(3), layers.BatchNormalization(epsilon=0.01)
    model = randomize(keras.Model(inputs, norm(dense(inputs))))
    kernel, bias = (np.asarray(w, "float64") for w in dense.get_weights())
    gamma, beta, mean, variance = (np.asarray(w, "float64") for w in norm.get_weights())
    scale = gamma / np.sqrt(variance + 0.01)
    folded = fold_batch_normalization(model)
    np.testing.assert_allclose(folded.get_weights()[0], kernel * scale, rtol=1e-6)
    np.testing.assert_allclose(folded.get_weights()[1], (bias - mean) * scale + beta, rtol=1e-6)


def test_what_must_not_be_folded_stays():
    inputs = keras.Input((8, 8, 3))
    a = layers.Conv2D(4, 3, activation="relu", padding="same", name="activated")(inputs)
    a = layers.BatchNormalization(name="after_activation")(a)
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    b = layers.BatchNormalization(name="after_shared")(shared(a))
    c = layers.Conv2D(4, 3, padding="same", name="two_readers")(shared(b))
    d = layers.BatchNormalization(name="one_of_two")(c)
    e = layers.BatchNormalization(axis=1, name="other_axis")(layers.Conv2D(4, 3)(c + d))
    model = randomize(keras.Model(inputs, [e, d]))
    folded = fold_batch_normalization(model)
    kept = {layer.name for layer in folded.layers if type(layer) is layers.BatchNormalization}
    assert kept == {"after_activation", "after_shared", "one_of_two", "other_axis"}
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")
    for new, old in zip(folded(x), model(x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_nested_sequential_and_dict_outputs():
    block = keras.Sequential(
        [layers.Input((6, 6, 4)), layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization()],
        name="block",
    )
    first, second = keras.Input((6, 6, 4), name="first"), keras.Input((6, 6, 4), name="second")
    one, two = block(first), block(second)
    model = keras.Model(
        {"first": first, "second": second},
        {"sum": one + two * 2.0, "mean": layers.GlobalAveragePooling2D()(one)},
    )
    randomize(model)
    folded = fold_batch_normalization(model)
    assert len(folded.weights) == 2
    assert folded.get_layer("block").count_params() == 4 * 4 * 9 + 4
    rng = np.random.default_rng(1)
    x = {name: rng.normal(size=(3, 6, 6, 4)).astype("float32") for name in ("first", "second")}
    old, new = model(x), folded(x)
    assert set(new) == {"sum", "mean"}
    for name in old:
        np.testing.assert_allclose(new[name], old[name], rtol=1e-5, atol=1e-5)


def test_lambda_and_mixed_precision():
    inputs = keras.Input((5,))
    x = layers.Dense(6, dtype="mixed_float16")(inputs)
    x = layers.BatchNormalization(dtype="mixed_float16")(x)
    x = layers.Lambda(lambda z: z * 2, name="twice")(x)
    model = keras.Model(inputs, layers.Dense(3, dtype="float32")(x))
    folded = fold_batch_normalization(model)
    x = np.random.default_rng(1).normal(size=(4, 5)).astype("float32")
    np.testing.assert_allclose(folded(x), model(x), rtol=2e-2, atol=2e-2)
    assert folded.layers[1].compute_dtype == "float16"


@keras.saving.register_keras_serializable(package="test_fold")
class Subclassed(keras.Model):
    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units)
        self.norm = layers.BatchNormalization()

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.norm.build((*input_shape[:-1], self.units))

    def call(self, inputs, training=False):
        return self.norm(self.dense(inputs), training=training)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_subclassed_is_copied():
    model = Subclassed(4)
    x = np.random.default_rng(1).normal(size=(4, 5)).astype("float32")
    model(x)
    randomize(model)
    copy = fold_batch_normalization(model)
    assert copy is not model
    np.testing.assert_allclose(copy(x), model(x), rtol=1e-6)
    model.dense.kernel.assign(np.zeros(model.dense.kernel.shape))
    assert np.abs(copy.dense.kernel).max() > 0


def test_refusals():
    with pytest.raises(TypeError, match=r"Expected a `keras.Model`"):
        fold_batch_normalization("model.keras")
    with pytest.raises(ValueError, match="not built"):
        fold_batch_normalization(keras.Sequential([layers.Dense(3)]))

    class Unclonable(keras.Model):
        def __init__(self, matrix):
            super().__init__()
            self.dense = layers.Dense(2)
            self.matrix = matrix

        def call(self, inputs):
            return self.dense(inputs) @ self.matrix

    model = Unclonable(np.eye(2, dtype="float32"))
    model(np.ones((1, 3), "float32"))
    with pytest.raises(ValueError, match="cannot be copied"):
        fold_batch_normalization(model)
