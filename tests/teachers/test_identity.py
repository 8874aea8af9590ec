"""What tells one teacher from another: all that changes an answer, and nothing else."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_kd as kd
from keras_kd.teachers import fingerprint


def _filled(model):
    """Weights that do not depend on initializers, so that other processes draw the same."""
    rng = np.random.default_rng(0)
    model.set_weights(
        [rng.uniform(0.1, 1.0, w.shape).astype("float32") for w in model.get_weights()]
    )
    return model


def _net(factor=1.0, slope=0.3, strides=1, epsilon=1e-3, residual=True, times=2.0):
    inputs = keras.Input((8, 4))
    x = layers.Rescaling(factor)(inputs)
    x = layers.Conv1D(4, 3, strides=strides, padding="same")(x)
    x = layers.BatchNormalization(epsilon=epsilon)(x)
    h = layers.LeakyReLU(negative_slope=slope)(x)
    g = layers.Conv1D(4, 1)(h)
    h = layers.Add()([x if residual else h, g])
    h = ops.mean(h * times, axis=1)
    outputs = layers.Dense(3)(layers.Flatten()(h))
    return _filled(keras.Model(inputs, outputs))


@pytest.mark.parametrize(
    "other",
    [
        {"factor": 10.0},
        {"slope": 0.1},
        {"strides": 2},
        {"epsilon": 1e-5},
        {"residual": False},
        {"times": 3.0},
    ],
    ids=lambda other: next(iter(other)),
)
def test_nets_of_the_same_weights_that_answer_otherwise(other):
    one, two = _net(), _net(**other)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    x = np.random.default_rng(1).normal(size=(2, 8, 4)).astype("float32")
    assert np.abs(one.predict(x, verbose=0) - two.predict(x, verbose=0)).max() > 1e-3
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) == fingerprint(_net())


def test_functions_in_lambda_layers_count():
    def net(function):
        return keras.Sequential([keras.Input((4,)), layers.Lambda(function)])

    scale = 2.0
    prints = [fingerprint(net(f)) for f in (lambda x: x * 2.0, lambda x: x * 3.0, lambda x: x + 2)]
    prints.append(fingerprint(net(lambda x: x * scale)))
    assert len(set(prints)) == 4
    assert prints[0] == fingerprint(net(lambda x: x * 2.0))


def _transformer():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(layers.Dropout(0.1)(x))
    x = layers.TimeDistributed(layers.Dense(4, "gelu"))(x)
    return _filled(keras.Model(inputs, {"pooled": layers.GlobalAveragePooling1D()(x), "all": x}))


def _nested():
    inner = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Conv2D(2, 3, kernel_regularizer="l2"), layers.Flatten()]
    )
    a, b = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    x = layers.Concatenate()([inner(a), inner(layers.RandomFlip()(b))])
    x = layers.Dense(3, activation=layers.LeakyReLU(negative_slope=0.2))(x)
    return _filled(keras.Model([a, b], layers.Activation("softmax")(x)))


def _sequential():
    model = keras.Sequential([layers.Dense(4, "relu"), layers.Dense(2)])
    model(np.zeros((3, 5), "float32"))
    return _filled(model)


NETS = {"net": _net, "transformer": _transformer, "nested": _nested, "sequential": _sequential}


@pytest.mark.parametrize("name", NETS)
def test_clones_and_files_of_a_model_are_that_model(name, tmp_path):
    model = NETS[name]()
    expected = fingerprint(model)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert fingerprint(clone) == expected
    clone.trainable = False
    clone.compile("sgd", "mse")
    assert fingerprint(clone) == expected
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert fingerprint(loaded) == expected
    loaded.save(tmp_path / "again.keras")
    assert fingerprint(keras.saving.load_model(tmp_path / "again.keras")) == expected
    # Names count on within a process.
    assert fingerprint(NETS[name]()) == expected
    weights = model.get_weights()
    weights[0].flat[0] += 1e-3
    model.set_weights(weights)
    assert fingerprint(model) != expected


def test_another_process_and_backend_agree():
    """NumPy's backend starts fastest; the others are in the same hands."""
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from keras import layers; [layers.Dense(1) for _ in range(3)]\n"
        "import test_identity as t\n"
        "print(*(t.fingerprint(t.NETS[n]()) for n in sys.argv[1:]))\n"
    )
    # Without recurrence, which NumPy does not build.
    names = ["net", "nested", "sequential"]
    for backend in ("numpy", "jax"):
        run = subprocess.run(
            [sys.executable, "-c", code, *names],
            env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.split() == [fingerprint(NETS[name]()) for name in names]


class _Scaled(keras.Model):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.dense = layers.Dense(3)

    def get_config(self):
        return {"factor": self.factor}

    def call(self, x):
        return self.dense(x) * self.factor


class _Silent(keras.Model):
    """One that Keras cannot describe."""

    def __init__(self, slope, something):
        super().__init__()
        self.dense = layers.Dense(3)
        self.leaky = layers.LeakyReLU(negative_slope=slope)

    def call(self, x):
        return self.leaky(self.dense(x))


def test_subclassed_models_count_with_what_they_tell():
    x = np.zeros((1, 4), "float32")

    def made(model):
        model(x)
        return fingerprint(_filled(model))

    assert made(_Scaled(1.0)) == made(_Scaled(1.0))
    assert made(_Scaled(1.0)) != made(_Scaled(2.0))
    assert made(_Silent(0.1, object())) == made(_Silent(0.1, object()))
    # The layers in it are known all the same.
    assert made(_Silent(0.1, object())) != made(_Silent(0.2, object()))


def test_a_distiller_of_an_earlier_identity_says_so(tmp_path, monkeypatch):
    student = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    teacher = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None)
    monkeypatch.setattr("keras_kd.distill.saving.IDENTITY", 1)
    distiller.save(tmp_path / "d.keras")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"by an earlier version.*`distiller.student`"):
        kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
