"""Operators of one scale, dilated convolutions and float regions, against LiteRT on the file."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from litert_files import convert, float_compute, on_grid, run, shake

from keras_kd.compress import Annotation, finalize, quantize_aware, summary
from keras_kd.compress.tflite_rounding import plain_rounding
from keras_kd.export.verification.metrics import sqnr

tf = pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert.interpreter")

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="the TFLite converter reads TensorFlow graphs"
)


def convert_batch_of_one(model, folder):
    """As `kd.export` does it: the traced model with a fixed batch, without kernels' rounding."""

    def call(x):
        with plain_rounding():
            return {"y": tf.identity(model(x, training=False))}

    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = tf.TensorSpec((1, *model.input.shape[1:]), "float32")
    archive.add_endpoint("serve", call, input_signature=[spec])
    archive.write_out(str(folder), verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=["serve"])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def off_by(model, folder=None, rows=12, data=None, annotations=None):
    """Most steps between file and model, the share that differs, operators, and the model."""
    shake(model)
    x = data
    if x is None:
        x = np.random.default_rng(1).normal(size=(rows, *model.input.shape[1:])).astype("float32")
    quantized = quantize_aware(model, calibration=x, annotations=annotations)
    blob = convert(quantized) if folder is None else convert_batch_of_one(quantized, folder)
    x = on_grid(blob, x)
    outputs, step, operators = run(blob, x, "AUTO")
    off = np.abs(outputs - quantized.predict(x, verbose=0)) / step
    return off.max(), np.mean(off > 0.5), operators, quantized


def around(operation, shape=(8, 8, 3), behind=True):
    """A convolution, the operation, and a convolution behind it, which adds up its errors."""
    if isinstance(operation, layers.Layer):
        # Made when the tests were collected, with a name that may be another's by now.
        config = {**operation.get_config(), "name": "between"}
        operation = type(operation).from_config(config)
    inputs = keras.Input(shape)
    conv = layers.Conv2D if len(shape) == 3 else layers.Conv1D
    x = operation(conv(6, 3, padding="same")(inputs))
    return keras.Model(inputs, conv(4, 1)(x) if behind else x)


ONE_SCALE = {
    "up_bilinear": layers.UpSampling2D(2, interpolation="bilinear"),
    "up_bilinear_3": layers.UpSampling2D((3, 2), interpolation="bilinear"),
    "up_nearest": layers.UpSampling2D((2, 3)),
    "resizing": layers.Resizing(16, 4),
    "resize": lambda x: ops.image.resize(x, (12, 6), interpolation="nearest"),
    "average": lambda x: ops.average_pool(x, 2),
    "max_pool": lambda x: ops.max_pool(x, 2),
    "slice": lambda x: x[:, 1:5, 2:, :3],
    "flip": lambda x: ops.flip(x, axis=1),
    "take": lambda x: ops.take(x, [0, 2, 3], axis=-1),
    "tile": lambda x: ops.tile(x, (1, 2, 1, 1)),
    "repeat": lambda x: ops.repeat(x, 3, axis=2),
    "split": lambda x: ops.split(x, 2, axis=-1)[1],
    "unstack": lambda x: ops.expand_dims(ops.unstack(x, axis=1)[2], 1),
    "stack": lambda x: ops.stack([x, 3.0 * x], axis=1)[:, 1],
    "where": lambda x: ops.where(x > 0.3, x, 3.0 * x),
    "minimum": lambda x: ops.minimum(x, layers.Conv2D(6, 1)(x)),
    "maximum_constant": lambda x: ops.maximum(x, 0.5),
    "clip": lambda x: ops.clip(x, -0.7, 1.2),
    "clip_one": lambda x: ops.clip(x, -1, 1),
    "largest": lambda x: ops.max(x, axis=1, keepdims=True),
    "mirror": lambda x: ops.pad(x, ((0, 0), (2, 1), (1, 1), (0, 0)), mode="reflect"),
    "pad_constant": lambda x: ops.pad(
        x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=3.0
    ),
    "depth_to_space": lambda x: ops.nn.depth_to_space(layers.Conv2D(8, 1)(x), 2),
    "space_to_depth": lambda x: ops.nn.space_to_depth(x, 2),
    "log_softmax": lambda x: ops.log_softmax(x),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_SCALE)
def test_operators_of_one_scale_have_one_range(name):
    steps, share, operators, _ = off_by(around(ONE_SCALE[name]))
    assert steps <= 2.01
    # XNNPACK's resizing has weights of 11 bits: thirds are not exact.
    assert share < 0.1
    # A comparison, as in "where", is float.
    assert not {op for op in float_compute(operators) if "CONV" in op}


@pytest.mark.parametrize(
    "layer",
    [
        layers.UpSampling1D(3),
        lambda x: layers.RepeatVector(5)(layers.GlobalMaxPooling1D()(x)),
        lambda x: ops.swapaxes(layers.ZeroPadding1D(2)(x), 1, 2)[:, :, 1:9],
    ],
)
def test_sequences_too(layer):
    steps, share, operators, _ = off_by(around(layer, (9, 4)))
    assert steps <= 2.01
    assert share < 0.05
    assert not float_compute(operators)


class PooledLast(layers.Layer):
    """An own layer whose last operator has the scale that is behind it."""

    def call(self, inputs):
        return ops.average_pool(ops.abs(inputs), 2)


def nested(*stack):
    return lambda x: keras.Sequential([keras.Input(x.shape[1:]), *(make() for make in stack)])(x)


def bilinear():
    return layers.UpSampling2D(2, interpolation="bilinear")


AVERAGED = {
    "own": lambda x: PooledLast()(x),
    "adaptive": lambda x: layers.AdaptiveAveragePooling2D((3, 2))(x),
    "wrapped": lambda x: layers.TimeDistributed(layers.AveragePooling1D(2))(x),
    "nested": lambda x: nested(layers.MaxPooling2D, lambda: layers.AveragePooling2D(2))(x),
    "behind_nested": lambda x: bilinear()(nested(lambda: layers.Conv2D(5, 3))(x)),
    "hard_tanh": layers.Conv2D(5, 3, activation="hard_tanh"),
    "left_float": lambda x: layers.AveragePooling2D(2)(layers.Conv2D(5, 3, name="left")(x)),
    "joined_float": lambda x: ops.concatenate([x, layers.Conv2D(5, 1, name="left")(x)], -1),
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGED)
def test_no_scale_is_handed_to_an_average_from_elsewhere(name):
    left = {"left": Annotation(float=True)} if name.endswith("_float") else None
    steps, share, *_ = off_by(around(AVERAGED[name]), annotations=left)
    assert steps <= 2.01
    assert share < 0.1


def test_averages_over_the_states_of_an_lstm():
    inputs = keras.Input((6, 4))
    states = layers.LSTM(5, return_sequences=True)(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.AveragePooling1D(2)(states)))
    steps, share, *_ = off_by(model)
    assert steps <= 2.01
    assert share < 0.1


def test_leaky_relus_round_as_xnnpack_does(tmp_path):
    """Its factors have eight binary places: four in a row were 4 steps off, half of all values."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activation="leaky_relu")(inputs)
    x = layers.LeakyReLU(0.3)(layers.BatchNormalization()(layers.Conv2D(8, 3)(x)))
    x = ops.leaky_relu(layers.Conv2D(8, 3)(x), 0.4)
    steps, share, operators, quantized = off_by(keras.Model(inputs, layers.Conv2D(4, 1)(x)))
    assert steps <= 1.01
    assert share < 0.01
    assert [kind for kind, _ in operators].count("LEAKY_RELU") == 3
    quantized.save(tmp_path / "leaky.keras")
    again = keras.saving.load_model(tmp_path / "leaky.keras")
    rows = np.random.default_rng(2).normal(size=(4, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(again(rows), quantized(rows))


def test_borders_change_no_names():
    quantized = quantize_aware(around(PooledLast(name="between"), behind=False))
    assert quantized.output_names == ["between"]
    assert "between" in summary(quantized)


DILATED = {
    "same": layers.Conv2D(4, 3, dilation_rate=2, padding="same", activation="relu"),
    "valid": layers.Conv2D(4, (2, 3), dilation_rate=(3, 2)),
    "no_bias": layers.Conv2D(4, 3, dilation_rate=2, use_bias=False),
    "swish": layers.Conv2D(4, 3, dilation_rate=2, activation="swish"),
    "depthwise": layers.DepthwiseConv2D(3, dilation_rate=2, padding="same"),
    "strided": layers.DepthwiseConv2D(3, dilation_rate=2, strides=2, padding="same"),
    "separable": layers.SeparableConv2D(4, 3, dilation_rate=2, padding="same"),
    "groups": layers.Conv2D(6, 3, groups=3),
    "normalized": lambda x: layers.ReLU()(
        layers.BatchNormalization()(layers.Conv2D(4, 3, dilation_rate=2)(x))
    ),
}


@pytest.mark.parametrize("name", DILATED)
def test_dilated_convolutions_are_int8(name):
    steps, _, operators, quantized = off_by(around(DILATED[name], behind=False))
    assert steps <= 1.01
    assert not [op for op, kinds in operators if kinds & {"float32"}]
    assert not {op for op, _ in operators} & {"SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"}
    assert "stays float" not in summary(quantized)


@pytest.mark.parametrize("padding", ["same", "valid", "causal"])
@pytest.mark.parametrize("static", [False, True])
def test_dilated_sequences_are_int8(padding, static, tmp_path):
    makers = [layers.Conv1D, layers.SeparableConv1D]
    if padding != "causal":
        makers.append(layers.DepthwiseConv1D)
    for maker in makers:
        filters = () if maker is layers.DepthwiseConv1D else (5,)
        if padding == "causal" and maker is layers.SeparableConv1D:
            continue
        layer = maker(*filters, 3, dilation_rate=4, padding=padding, activation="relu")
        folder = tmp_path / maker.__name__ if static else None
        steps, _, operators, _ = off_by(around(layer, (20, 3)), folder)
        assert steps <= 1.01
        assert not [op for op, kinds in operators if kinds & {"float32"}]


def test_dilated_training_and_inference_agree_when_frozen():
    """The operator for converters is a second form; what Keras computes must not move."""
    inputs = keras.Input((9, 9, 2))
    conv = layers.Conv2D(3, 3, dilation_rate=2, padding="same", name="conv")
    model = shake(keras.Model(inputs, conv(inputs)))
    x = np.random.default_rng(0).normal(size=(4, 9, 9, 2)).astype("float32")
    quantized = quantize_aware(model, calibration=x)
    quantized.compile("sgd", "mse")
    quantized.fit(x, np.zeros((4, 9, 9, 3)), verbose=0)
    np.testing.assert_allclose(quantized.predict(x, verbose=0), quantized(x), atol=1e-5)
    traced = tf.function(lambda v: quantized(v, training=False))
    np.testing.assert_allclose(traced(x), quantized(x), atol=1e-5)


def power_spectrum(x):
    real, imaginary = (layers.Conv1D(12, 8, strides=4, use_bias=False)(x) for _ in range(2))
    return real * real + imaginary * imaginary


def mel(x):
    start = keras.initializers.RandomUniform(0.0, 1.0)
    return layers.Dense(8, use_bias=False, kernel_initializer=start, name="mel")(x)


def behind(x):
    x = layers.Conv1D(8, 3, activation="relu", name="behind")(x)
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x))


def both(values):
    """A logarithm and a layer of integers read the same values."""
    integers = layers.Dense(2, name="integers")(layers.Flatten()(values))
    return layers.Concatenate()([behind(ops.log(values + 1e-4)), integers])


FRONT_ENDS = {
    "issue": lambda x: layers.Dense(3)(layers.Flatten()(ops.log(ops.square(x) + 1e-4))),
    "floor": lambda x: behind(ops.log10(ops.maximum(mel(power_spectrum(x)), 1e-6))),
    "sum": lambda x: behind(ops.log(mel(power_spectrum(x)) + 1e-5)),
    "input_floor": lambda x: behind(ops.log(ops.maximum(x, 1e-5))),
    "clip": lambda x: behind(ops.log(ops.clip(ops.abs(x), 1e-4, 3.0))),
    "power": lambda x: behind(ops.power(ops.square(x) + 1e-6, 0.2)),
    "divided": lambda x: behind(ops.square(x) / (ops.mean(ops.square(x), 1, keepdims=True) + 1e-5)),
    "joined": lambda x: behind(
        ops.log(layers.Concatenate()([ops.square(x), layers.ReLU()(x)]) + 1e-3)
    ),
    "probabilities": lambda x: behind(ops.log(layers.Dense(8, activation="sigmoid")(x) + 1e-6)),
    "two_readers": lambda x: both(mel(ops.square(x))),
}


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("static", [False, True])
def test_front_ends_keep_small_values(name, static, tmp_path):
    inputs = keras.Input((64, 1))
    model = keras.Model(inputs, FRONT_ENDS[name](inputs))
    steps, share, operators, quantized = off_by(model, tmp_path / "m" if static else None)
    assert steps <= 2.01
    assert share < 0.02
    x = np.random.default_rng(1).normal(size=(12, 64, 1)).astype("float32")
    wanted, found = model.predict(x, verbose=0), quantized.predict(x, verbose=0)
    assert np.isfinite(found).all()
    assert sqnr(wanted, found) > 15
    kinds = {kind for op, seen in operators if op in ("LOG", "POW", "DIV") for kind in seen}
    assert kinds == {"float32"}
    np.testing.assert_allclose(
        finalize(quantized).predict(x, verbose=0), wanted, rtol=0.1, atol=0.1
    )


def test_summary_says_what_a_front_end_is():
    inputs = keras.Input((64, 1))
    model = keras.Model(inputs, FRONT_ENDS["floor"](inputs))
    quantized = quantize_aware(model)
    for each in (model, quantized):
        text = summary(each)
        rows = {
            line.split()[0]: line.split()[1:3] for line in text.splitlines()[2:] if line[0] > " "
        }
        assert rows["mel"] == ["float", "float"]
        assert "`log10` (Log10) reads it" in " ".join(text.split())
    assert rows["multiply"][0] == rows["maximum"][0] == rows["log10"][0] == "float"
    assert rows["behind"] == ["int8/channel", "int8"]
    assert "(rounded to int8 behind it)" in " ".join(text.split())


def test_regions_cross_nested_models():
    inner_inputs = keras.Input((16,))
    power = keras.Model(inner_inputs, ops.square(inner_inputs) + 1e-4, name="power")
    logs_inputs = keras.Input((8,))
    logs = keras.Model(logs_inputs, layers.Dense(4)(ops.log(logs_inputs + 1e-4)), name="logs")
    inputs = keras.Input((16,))
    feeds = layers.Dense(8, activation="relu", name="feeds")
    model = keras.Model(inputs, layers.Dense(3)(logs(feeds(ops.log(power(inputs))))))
    steps, share, _, quantized = off_by(model)
    assert steps <= 1.01
    assert share < 0.02
    assert type(quantized.get_layer("feeds")) is layers.Dense


@pytest.mark.parametrize(
    "layer",
    [
        layers.LayerNormalization(axis=1),
        layers.GroupNormalization(2),
        layers.Softmax(axis=1),
        layers.Lambda(lambda v: v / (1.0 + ops.mean(ops.abs(v), axis=-1, keepdims=True))),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_layers_that_stay_float_are_float_in_the_file(layer, nested):
    """The converter gives MEAN its input's scale and SOFTMAX a prescribed one, unless held off."""
    block = keras.Sequential([keras.Input((6, 4)), layer]) if nested else layer
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, block(layers.Dense(4)(inputs)))
    steps, _, operators, _ = off_by(model)
    assert steps <= 1.01
    assert ("MEAN", {"int8", "int32"}) not in operators
    assert ("SOFTMAX", {"int8"}) not in operators


@pytest.mark.parametrize("channels", [2, 3, 5, 7])
def test_layer_normalization_over_few_channels(channels):
    inputs = keras.Input((6, channels))
    model = keras.Model(inputs, layers.LayerNormalization()(inputs))
    steps, share, operators, _ = off_by(model, rows=100)
    assert steps <= 2.01
    assert share < 0.01
    assert not float_compute(operators)


def _over_the_root_of_squares(x):
    return x / ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-6)


def _softmax_by_hand(x):
    raised = ops.exp(x - ops.max(x, axis=-1, keepdims=True))
    return raised / ops.sum(raised, axis=-1, keepdims=True)


@pytest.mark.parametrize("operation", [_over_the_root_of_squares, _softmax_by_hand])
def test_the_converter_makes_no_operator_of_a_prescribed_scale_from_several(operation):
    # It made L2_NORMALIZATION and SOFTMAX of these, with steps of 1/128 and 1/256.
    inputs = keras.Input((16,))
    hidden = operation(layers.Dense(8)(inputs))
    steps, share, operators, _ = off_by(keras.Model(inputs, layers.Dense(4)(hidden)), rows=24)
    assert not {"L2_NORMALIZATION", "SOFTMAX"} & {name for name, _ in operators}
    assert steps <= 1.01
    assert share < 0.05
