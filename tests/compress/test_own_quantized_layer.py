"""A quantized layer is one class: `quantize_aware` puts it in the place of those it names."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_kd import compress
from keras_kd.compress import quantized


@pytest.fixture(autouse=True)
def alone():
    """The classes of this file are known to its tests alone."""
    tables = (quantized.BY_KIND, quantized.BY_LAYER)
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


def quantized_prelu():
    @keras.saving.register_keras_serializable(package="tests")
    class QuantizedPReLU(quantized.Quantized):
        kind = "prelu"
        stands_for = (layers.PReLU,)

        def call(self, inputs):
            alpha = self.final_pairs()[0][1]
            return ops.relu(inputs) - alpha * ops.relu(-inputs)

        def final_pairs(self):
            return [(self.base.alpha, compress.quantized_weights(self.base.alpha, 8, ()))]

    return QuantizedPReLU


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, name="dense"),
            layers.PReLU(alpha_initializer="glorot_uniform", name="prelu"),
        ]
    )


def test_without_a_class_a_layer_stays_float():
    assert "no int8 form of PReLU" in compress.summary(network())


def test_one_class_is_a_quantized_layer(tmp_path):
    kind = quantized_prelu()
    model = network()
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    aware = compress.quantize_aware(model, calibration=x)
    assert type(aware.get_layer("prelu")) is kind
    assert "stays float" not in compress.summary(aware)
    alpha = np.asarray(model.get_layer("prelu").alpha)
    step = np.abs(alpha).max() / 127
    plain = compress.finalize(aware)
    assert type(plain.get_layer("prelu")) is layers.PReLU
    rounded = step * np.round(alpha / step)
    np.testing.assert_allclose(plain.get_layer("prelu").alpha, rounded, atol=1e-6)
    aware.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), aware.predict(x, verbose=0))
    with pytest.raises(ValueError, match="`prelu` of .* is quantized already"):
        compress.prune(keras.Sequential([keras.Input((5,)), aware.get_layer("prelu")]), 0.5)
