"""Quantization-aware models as TFLite files: true int8, and the Keras model's integers."""

import keras
import numpy as np
import onnxruntime
import pytest
from keras import layers
from litert_files import COMPUTE, convert, float_compute, on_grid, run, shake

from keras_kd.compress import quantize_aware
from keras_kd.export.verification.metrics import sqnr

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert.interpreter")

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="the TFLite converter reads TensorFlow graphs"
)


def convolutional():
    inputs = keras.Input((12, 12, 3))
    x = layers.Rescaling(1 / 3.0)(inputs)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    y = layers.ReLU(6)(layers.BatchNormalization()(y))
    y = layers.BatchNormalization()(layers.Conv2D(8, 1)(y))
    z = layers.ReLU()(layers.Add()([x, y]))
    w = layers.Concatenate()([z, layers.SeparableConv2D(4, 3, padding="same")(z)])
    w = layers.AveragePooling2D(2)(w)
    w = layers.ReLU()(layers.BatchNormalization()(w))
    w = layers.Conv2DTranspose(6, 3, activation="swish")(w)
    w = layers.Dense(16, activation="relu")(layers.GlobalAveragePooling2D()(w))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(w))


def sequence():
    inputs = keras.Input((8, 6))
    x = layers.Conv1D(12, 3, padding="same", activation="relu")(inputs)
    x = layers.LSTM(6, return_sequences=True)(layers.MaxPooling1D()(x))
    return keras.Model(inputs, layers.Dense(4)(layers.GRU(5)(x)))


def attention():
    inputs = keras.Input((8, 16))
    x = layers.Dense(16)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 8)(x, x))
    x = layers.Dense(24, activation="hard_swish")(x)
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def nested():
    inputs = keras.Input((8, 8, 3))
    block = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(6, 3), layers.BatchNormalization(), layers.ReLU()]
    )
    x = layers.Flatten()(block(inputs))
    return keras.Model(inputs, layers.Dense(3, activation="sigmoid")(x))


def shared_input():
    inputs = keras.Input((9, 4))
    a = layers.Dense(4)(layers.ZeroPadding1D(1)(inputs))
    b = layers.Conv1DTranspose(4, 3)(inputs)
    c = layers.DepthwiseConv1D(3, padding="same", activation="tanh")(a)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Subtract()([b, c]))))


def encoder():
    inputs = keras.Input((8, 16))
    x = layers.Dense(16)(inputs)
    x = layers.LayerNormalization()(layers.Add()([x, layers.MultiHeadAttention(2, 8)(x, x)]))
    y = layers.Dense(16)(layers.Dense(32, activation="gelu")(x))
    return keras.Model(inputs, layers.LayerNormalization()(layers.Add()([x, y])))


def squeeze_excite():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same")(layers.BatchNormalization()(inputs))
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = layers.Conv2D(8, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="swish")(s))
    x = layers.AveragePooling2D(2)(layers.Multiply()([x, s]))
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


ZOO = {
    f.__name__: f
    for f in (
        convolutional,
        sequence,
        attention,
        nested,
        shared_input,
        encoder,
        squeeze_excite,
    )
}


@pytest.mark.parametrize("name", ZOO)
def test_true_int8_and_the_same_integers(name):
    model = shake(ZOO[name]())
    shape = model.input.shape[1:]
    x = np.random.default_rng(1).normal(size=(48, *shape)).astype("float32")
    quantized = quantize_aware(model, calibration=x)
    blob = convert(quantized)
    x = on_grid(blob, x)
    expected = quantized.predict(x, verbose=0)
    np.testing.assert_array_equal(quantized(x), expected)
    for kernels in ("AUTO", "BUILTIN_REF"):
        outputs, step, operators = run(blob, x, kernels)
        assert not float_compute(operators)
        assert {op for op, _ in operators} & {"CONV_2D", "FULLY_CONNECTED"}
        off = np.abs(outputs - expected) / step
        # The reference kernels round products of two activations, and convolutions, twice; LiteRT
        # takes those of XNNPACK, which do not.
        assert off.max() <= (3.01 if kernels == "BUILTIN_REF" else 2.01)
        assert np.mean(off > 0.5) < (0.5 if kernels == "BUILTIN_REF" else 0.05)


def alone(layer, *shape):
    inputs = keras.Input(shape)
    calls = (inputs, inputs) if isinstance(layer, layers.MultiHeadAttention) else (inputs,)
    return shake(keras.Model(inputs, layer(*calls)))


def test_layer_normalization_alone():
    """Padded with constant rows, which have no deviation and must not cost the others theirs."""
    model = alone(layers.LayerNormalization(), 16, 32)
    x = np.random.default_rng(1).normal(size=(32, 16, 32)).astype("float32")
    x[:, 12:] = 0.0
    quantized = quantize_aware(model, calibration=x)
    outputs, step, operators = run(convert(quantized), x)
    assert not float_compute(operators)
    off = np.abs(outputs - quantized.predict(x, verbose=0)) / step
    assert off.max() <= 2.01
    # The converter's own mean alone is off in a quarter of the rows.
    assert off.mean() < 0.02
    gamma, beta = (np.asarray(w, "float64") for w in model.get_weights())
    centered = x - x.mean(-1, keepdims=True, dtype="float64")
    variance = np.mean(centered**2, axis=-1, keepdims=True)
    exact = centered / np.sqrt(variance + model.layers[-1].epsilon) * gamma + beta
    assert sqnr(exact, outputs) > 33


@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_alone(use_bias):
    model = alone(layers.MultiHeadAttention(2, 16, use_bias=use_bias), 8, 16)
    x = np.random.default_rng(1).normal(size=(32, 8, 16)).astype("float32")
    quantized = quantize_aware(model, calibration=x)
    outputs, step, operators = run(convert(quantized), x)
    assert not float_compute(operators)
    expected = quantized.predict(x, verbose=0)
    assert (np.abs(outputs - expected) / step).max() <= 2.01
    # The biases of key and value are computed elsewhere than in their projections.
    assert sqnr(model.predict(x, verbose=0), expected) > 29


def test_attention_exported_by_keras_is_onnx_that_loads(tmp_path):
    model = alone(layers.MultiHeadAttention(2, 8), 6, 16)
    x = np.random.default_rng(1).normal(size=(32, 6, 16)).astype("float32")
    quantized = quantize_aware(model, calibration=x)
    quantized.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x})
    assert sqnr(quantized.predict(x, verbose=0), outputs) > 30


@pytest.mark.parametrize("name", sorted({*ZOO} - {"sequence"}))
def test_no_worse_than_post_training_quantization(name):
    """The file of the calibrated model, before any training, against the converter's own int8.

    There is none of LSTM and GRU: the converter refuses them with a free batch, and dies with a
    batch of one.
    """
    model = shake(ZOO[name]())
    x = np.random.default_rng(1).normal(size=(48, *model.input.shape[1:])).astype("float32")
    reference = model.predict(x, verbose=0)
    ours = sqnr(reference, run(convert(quantize_aware(model, calibration=x)), x)[0])
    theirs = sqnr(reference, run(convert(model, calibration=x), x)[0])
    assert ours > theirs - 0.2


def test_tokens_stay_integers():
    inputs = keras.Input((10,), dtype="int32")
    x = layers.Dense(12, activation="relu")(layers.Embedding(30, 16)(inputs))
    model = shake(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x))))
    tokens = np.random.default_rng(0).integers(0, 30, (32, 10)).astype("int32")
    quantized = quantize_aware(model, calibration=tokens)
    outputs, step, operators = run(convert(quantized), tokens)
    assert dict(operators)["GATHER"] == {"int8", "int32"}
    assert np.abs(outputs - quantized.predict(tokens, verbose=0)).max() <= 2.01 * step


def test_tokens_exported_by_keras_are_onnx_that_loads(tmp_path):
    inputs = keras.Input((10,), dtype="int32")
    x = layers.Dense(12, activation="relu")(layers.Embedding(30, 16)(inputs))
    model = shake(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x))))
    tokens = np.random.default_rng(0).integers(0, 30, (32, 10)).astype("int32")
    quantized = quantize_aware(model, calibration=tokens)
    quantized.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: tokens})
    assert sqnr(quantized.predict(tokens, verbose=0), outputs) > 35


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_by_arithmetic_is_that_of_the_operator(bits):
    from keras_kd.compress import fake_quantize, tflite_rounding

    x = np.random.default_rng(2).normal(0, 3, 4000).astype("float32")
    for low, high in ((-1.0, 2.0), (0.0, 5.0), (-4.0, 0.0), (-0.003, 6.1)):
        # Halves of a step as well, and what lies outside.
        step = (high - low) / (2**bits - 1)
        values = np.concatenate([x, (np.arange(20, dtype="float32") + 0.5) * np.float32(step)])
        want = fake_quantize.fake_quantized(values, low, high, bits)

        def export_onnx(values=values, low=low, high=high):
            assert tflite_rounding.traced_for_onnx()
            return fake_quantize.fake_quantized(values, low, high, bits)

        off = np.abs(np.asarray(export_onnx()) - np.asarray(want)) / step
        # Where a float quotient is a half but for its last bit, either integer is right.
        assert np.mean(off > 0.01) < 0.002
        assert off.max() < 1.01


@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolution_without_bias_is_int8(bias):
    inputs = keras.Input((4, 4, 3))
    transposed = layers.Conv2DTranspose(4, 3, strides=2, use_bias=bias, activation="relu")
    model = keras.Model(inputs, transposed(inputs))
    x = np.random.default_rng(1).normal(size=(8, 4, 4, 3)).astype("float32")
    quantized = quantize_aware(model, calibration=x)
    outputs, step, operators = run(convert(quantized), x)
    assert not [op for op, kinds in operators if op in COMPUTE and "float32" in kinds]
    assert np.abs(outputs - quantized.predict(x, verbose=0)).max() <= 1.01 * step
