"""Masks, losses, ranges and several outputs: where quantization must not change what Keras does."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_kd.compress import QuantizedLayer, quantize_aware, summary
from keras_kd.compress.masking import masked_layers
from keras_kd.compress.quantized_sequences import QuantizedRecurrent


def sqnr(reference, other):
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - other) ** 2))


def mask_goes_in():
    tokens = keras.Input((6,), dtype="int32")
    nested = keras.Sequential([keras.Input((6, 8)), layers.LSTM(5, name="cell")], name="nested")
    return keras.Model(tokens, layers.Dense(2)(nested(embedding()(tokens)))), "nested/cell"


def mask_comes_out():
    tokens = keras.Input((6,), dtype="int32")
    nested = keras.Sequential([keras.Input((6,), dtype="int32"), embedding()], name="nested")
    x = layers.Dense(8, activation="relu")(nested(tokens))
    return keras.Model(tokens, layers.Dense(2)(layers.GRU(5, name="cell")(x))), "cell"


def embedding():
    return layers.Embedding(20, 8, mask_zero=True)


@pytest.mark.parametrize("make", [mask_goes_in, mask_comes_out])
def test_masks_are_followed_through_nested_models(make):
    model, path = make()
    tokens = np.random.default_rng(0).integers(1, 20, (32, 6))
    tokens[:, 3:] = 0
    quantized = quantize_aware(model, calibration=tokens)
    layer = quantized
    for name in path.split("/"):
        layer = layer.get_layer(name)
    assert type(layer) in (layers.LSTM, layers.GRU)
    assert sqnr(model.predict(tokens, verbose=0), quantized.predict(tokens, verbose=0)) > 25
    lines = summary(quantized).splitlines()
    assert any(line.startswith(path) and "masks have no int8 form" in line for line in lines)


def test_a_mask_that_ends_stops_nothing():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.LSTM(4, return_sequences=True, name="reads")(embedding()(tokens))
    x = layers.Conv1D(4, 2, name="ends")(x)
    x = layers.LSTM(4, name="free")(x)
    model = keras.Model(tokens, layers.Dense(2)(x))
    masked = masked_layers(model)
    assert {layer.name for layer in model.layers if id(layer) in masked} == {"reads", "ends"}
    quantized = quantize_aware(model)
    assert type(quantized.get_layer("reads")) is layers.LSTM
    assert isinstance(quantized.get_layer("free"), QuantizedRecurrent)
    assert isinstance(quantized.get_layer("ends"), QuantizedLayer)
