import os
import sys

import keras
import numpy as np
import pytest
from keras import layers

from keras_kd.compress import calibrate, n_of_m_mask, prune, quantize_aware, tfmot, tfmot_worker

pytest.importorskip("tensorflow")
pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="TFMOT works on TensorFlow tensors"
)


def test_schedules_and_masks_come_without_side_effects():
    import tensorflow as tf

    schedule = tfmot.pruning_schedule().PolynomialDecay(0.1, 0.8, 2, 12, frequency=5)
    utils = tfmot.pruning_utils()
    assert "TF_USE_LEGACY_KERAS" not in os.environ
    assert "tensorflow_model_optimization" not in sys.modules
    assert tf.keras.__version__ == keras.__version__
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="d")])
    layer = prune(model, schedule=schedule, sparsity=0.8).get_layer("d")
    assert layer.steps == (2, 7, 12)
    np.testing.assert_allclose(
        layer.sparsities,
        [0.8 + (0.1 - 0.8) * (1 - (s - 2) / 10) ** 3 for s in (2, 7, 12)],
        rtol=1e-5,
    )
    constant = tfmot.pruning_schedule().ConstantSparsity(0.5, begin_step=4, frequency=10)
    layer = prune(model, schedule=constant).get_layer("d")
    assert layer.steps[0] == 4
    assert layer.sparsities[0] == 0.5
    assert layer.repeat == 10
    for shape in [(12, 5), (3, 3, 10, 4)]:
        w = np.random.default_rng(0).normal(size=shape).astype("float32")
        theirs = utils.generate_m_by_n_mask(utils.weights_rearrange(tf.constant(w)))
        theirs = utils.m_by_n_sparsity_mask_prepare(theirs, tf.TensorShape(shape))
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(n_of_m_mask(w)), theirs.numpy())


def test_there_and_back(tmp_path):
    inputs = keras.Input((8, 6), name="steps")
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(inputs)
    x = layers.LayerNormalization()(layers.MultiHeadAttention(2, 4)(x, x))
    block = keras.Sequential(
        [keras.Input((8, 8)), layers.Conv1D(4, 3), layers.BatchNormalization(), layers.GRU(3)],
        name="block",
    )
    x = layers.LeakyReLU(negative_slope=0.1, name="leaky")(block(x))
    model = keras.Model({"steps": inputs}, {"out": layers.Dense(2)(x)})
    path = tmp_path / "model.keras"
    assert tfmot.to_tf_keras(model, path) < 1e-6
    again = tfmot.from_tf_keras(path)
    assert again.get_layer("leaky").negative_slope == pytest.approx(0.1)
    x = {"steps": np.random.default_rng(0).normal(size=(4, 8, 6)).astype("float32")}
    np.testing.assert_allclose(again(x)["out"], model(x)["out"], atol=1e-6)
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert "TF_USE_LEGACY_KERAS" not in os.environ


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("Dense", {"units": 2, "activation": "hard_sigmoid"}, "the activation `hard_sigmoid`"),
        ("LSTM", {"units": 2, "recurrent_activation": "hard_sigmoid"}, "the recurrent_activation"),
        ("GRU", {"units": 2, "time_major": True}, "set to time_major=True"),
    ],
)
def test_settings_of_another_meaning_are_refused(kind, config, message):
    with pytest.raises(ValueError, match=f"Layer `inner` (has|is) {message}"):
        tfmot_worker.make_layer({"name": "inner", "class": kind, "config": config}, keras)


def test_a_model_that_answers_otherwise_is_refused_by_layer(tmp_path):
    inputs = keras.Input((4,), name="x")
    x = layers.Dense(3, name="first")(inputs)
    x = layers.Dense(3, name="second")(x)
    model = keras.Model(inputs, layers.ReLU(name="last")(x))
    tfmot_worker.save_probe(model, tmp_path, keras)
    assert tfmot_worker.check_probe(model, tmp_path, keras) == 0
    kernel = model.get_layer("second").kernel
    kernel.assign(kernel * 1.001)
    with pytest.raises(ValueError, match="first at layer `second`"):
        tfmot_worker.check_probe(model, tmp_path, keras)


def test_second_opinion_agrees(small_cnn, images, fit):
    """Both quantize the same trained weights: their outputs lie close to each other."""
    x, y = images
    fit(small_cnn, images, epochs=6)
    reference = small_cnn.predict(x, verbose=0)
    opinion = tfmot.quantize(small_cnn, x, y, epochs=2, learning_rate=1e-5)
    ours = quantize_aware(small_cnn)
    calibrate(ours, x)
    outputs = ours.predict(x, verbose=0)
    assert opinion.tflite[4:8] == b"TFL3"
    assert np.mean(outputs.argmax(1) == opinion.outputs[0].argmax(1)) > 0.97

    def noise(values):
        return np.sqrt(np.mean((values - reference) ** 2))

    assert noise(outputs) < 1.5 * noise(opinion.outputs[0])


def test_refusals(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(inputs) * 2.0)
    with pytest.raises(ValueError, match="Received"):
        tfmot.to_tf_keras(model, tmp_path / "model.tflite")
    constant = keras.Model(inputs, keras.ops.sin(layers.Dense(2)(inputs)))
    with pytest.raises(ValueError, match="operation `Sin`"):
        tfmot.to_tf_keras(constant, tmp_path / "model.keras")
    with pytest.raises(FileNotFoundError, match="no file"):
        tfmot.from_tf_keras(tmp_path / "missing.keras")
    with pytest.raises(ValueError, match="`labels` are needed"):
        tfmot.quantize(model, np.zeros((2, 4), "float32"))
    assert not list(tmp_path.iterdir())
