"""Masks, losses, ranges and several outputs: where quantization must not change what Keras does."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_kd.compress import (
    Annotation,
    FakeQuantize,
    FreezeObservers,
    QuantizedLayer,
    activation_ranges,
    calibrate,
    cluster,
    finalize,
    is_calibrated,
    prune,
    quantize_aware,
    sparsity,
    summary,
)
from keras_kd.compress.masking import masked_layers
from keras_kd.compress.quantized_sequences import QuantizedRecurrent
from keras_kd.export.verification.metrics import sqnr
from keras_kd.models.output_kinds import outputs_of
from keras_kd.models.taps import find, read


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


@keras.saving.register_keras_serializable(package="test_quantize_edges")
class Penalized(layers.Dense):
    def call(self, inputs, training=None):
        outputs = super().call(inputs)
        self.add_loss(0.5 * ops.mean(ops.square(outputs)))
        return outputs


def regularized():
    l2 = keras.regularizers.L2
    inputs = keras.Input((6, 6, 2))
    kept = {"activity_regularizer": l2(0.3), "kernel_regularizer": l2(0.2)}
    x = layers.Conv2D(4, 3, name="folded", **kept)(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.SeparableConv2D(
        4,
        2,
        activation="relu",
        activity_regularizer=l2(0.1),
        depthwise_regularizer=l2(0.1),
        pointwise_regularizer=l2(0.2),
        bias_regularizer=l2(0.3),
    )(x)
    x = layers.Reshape((2, 18))(x)
    x = layers.Dense(4, activation="swish", name="swish", **kept)(x)
    x = layers.LayerNormalization(activity_regularizer=l2(0.01))(x)
    x = layers.GRU(4, name="gru", **kept)(x)
    model = keras.Model(inputs, Penalized(3, name="own")(x))
    rng = np.random.default_rng(0)
    for layer in ("folded", "norm"):
        layer = model.get_layer(layer)
        layer.set_weights([rng.uniform(0.2, 1.0, w.shape) for w in layer.get_weights()])
    return model


@pytest.mark.parametrize("how", ["quantize_aware", "training", "prune", "cluster", "all"])
def test_regularization_stays(how):
    model = regularized()
    x = np.random.default_rng(1).normal(size=(16, 6, 6, 2)).astype("float32")
    made = model
    if how in ("prune", "all"):
        made = prune(made, 0.01, layers=["swish", "gru", "own"])
    if how in ("cluster", "all"):
        made = cluster(made, 200, layers=["swish", "gru", "own"])
    if how not in ("prune", "cluster"):
        annotation = {"own": Annotation(weights={"kernel": (-1,)})}
        made = quantize_aware(made, annotations=annotation, calibration=x)
    wanted, found = [], []
    for each, into in ((model, wanted), (made, found)):
        each(x, training=how == "training")
        into.extend(float(loss) for loss in each.losses)
    assert len(found) == len(wanted)
    np.testing.assert_allclose(sum(found), sum(wanted), rtol=0.03)
    if how == "all":
        plain = finalize(made)
        for name in ("folded", "swish", "gru"):
            assert plain.get_layer(name).activity_regularizer is not None


def small():
    inputs = keras.Input((8,))
    return keras.Model(inputs, layers.Dense(4)(layers.Dense(8, activation="relu")(inputs)))


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(96, 8)).astype("float32") * 10


def train(model, rows, epochs, freeze):
    model.compile("adam", "mse")
    callback = FreezeObservers(epoch=freeze)
    model.fit(rows, np.zeros((len(rows), 4)), epochs=epochs, verbose=0, callbacks=[callback])


def test_ranges_are_not_frozen_before_they_have_seen_data(rows):
    model = quantize_aware(small())
    with pytest.raises(ValueError, match="before any data has been seen"):
        train(model, rows, epochs=2, freeze=-2)
    assert not is_calibrated(model)
    observer = FakeQuantize()
    observer.frozen.assign(1.0)
    observer(rows, training=True)
    assert observer.limits() == pytest.approx((rows.min(), rows.max()))
    observer(2 * rows, training=True)
    assert observer.limits() == pytest.approx((rows.min(), rows.max()))
    train(model, rows, epochs=2, freeze=-1)
    assert is_calibrated(model)


def test_calibration_sets_frozen_ranges_anew_and_they_stay_frozen(rows):
    model = quantize_aware(small(), calibration=rows)
    train(model, rows, epochs=1, freeze=0)
    calibrate(model, 5 * rows)
    name = next(iter(activation_ranges(model)))
    assert activation_ranges(model)[name] == pytest.approx((5 * rows.min(), 5 * rows.max()))
    model(9 * rows, training=True)
    assert activation_ranges(model)[name] == pytest.approx((5 * rows.min(), 5 * rows.max()))


@pytest.mark.parametrize("kind", ["array", "iterable"])
def test_a_bad_later_batch_changes_no_range(rows, kind):
    model = quantize_aware(small(), calibration=rows)
    before = activation_ranges(model)
    bad = 9 * rows
    bad[-1] = np.nan
    data = bad if kind == "array" else iter(np.split(bad, 3))
    with pytest.raises(ValueError, match="NaN"):
        calibrate(model, data)
    assert activation_ranges(model) == before
    assert is_calibrated(model)


@keras.saving.register_keras_serializable(package="test_quantize_edges")
class Two(layers.Layer):
    def build(self, input_shape):
        self.matrix = self.add_weight(shape=(input_shape[-1], 4), name="matrix")

    def call(self, inputs):
        return ops.matmul(inputs, self.matrix), ops.sum(inputs, axis=-1, keepdims=True)


def test_layers_of_several_outputs_stay_float(tmp_path):
    inputs = keras.Input((4, 6))
    outputs, state, cell = layers.LSTM(5, return_state=True, name="states")(inputs)
    one, other = Two(name="two")(layers.Concatenate(name="join")([outputs, state, cell]))
    model = keras.Model(inputs, [layers.Dense(2)(one), other])
    x = np.random.default_rng(0).normal(size=(16, 4, 6)).astype("float32")
    annotations = {"two": Annotation(weights={"matrix": (-1,)})}
    for chosen in (None, annotations):
        quantized = quantize_aware(model, calibration=x, annotations=chosen)
        for a, b in zip(model(x), quantized(x), strict=True):
            assert sqnr(np.asarray(a), np.asarray(b)) > 25
    lines = {line.split()[0]: line for line in summary(quantized).splitlines()}
    assert "gives several tensors" in lines["states"]
    assert "several outputs stay float" in lines["two"]
    assert "join_quantize" in activation_ranges(quantized)


def test_zeros_stay_in_every_kind_of_layer():
    inputs = keras.Input((2, 8))
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = layers.Bidirectional(layers.SimpleRNN(3, return_sequences=True), name="float")(x)
    x = Two(name="two")(layers.LSTM(5, name="recurrent")(x))[0]
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    pruned = finalize(prune(model, 0.5))
    two = pruned.get_layer("two")
    two.matrix.assign(np.where(np.arange(20).reshape(5, 4) % 2, two.matrix, 0.0))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 2, 8)).astype("float32")
    annotations = {"two": Annotation(weights={"matrix": (-1,)})}
    quantized = quantize_aware(pruned, keep_zeros=True, calibration=x, annotations=annotations)
    quantized.compile("adam", "mse", run_eagerly=True)
    quantized.fit(x, rng.normal(size=(8, 3)), verbose=0)
    plain = finalize(quantized)
    assert sparsity(plain) >= sparsity(pruned)
    assert np.mean(np.asarray(plain.get_layer("two").matrix) == 0) >= 0.5


@pytest.mark.parametrize("how", ["prune", "cluster", "quantize_aware"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "layer"])
def test_logits_are_read_behind_what_was_wrapped(how, activation, rows):
    inputs = keras.Input((8,))
    x = layers.Dense(4, activation="relu")(inputs)
    x = layers.Dense(3, activation=None if activation == "layer" else activation, name="end")(x)
    x = layers.Softmax()(x) if activation == "layer" else x
    model = keras.Model(inputs, x)
    wrap = {"prune": prune, "cluster": cluster, "quantize_aware": quantize_aware}[how]
    (output,) = outputs_of(wrap(model))
    assert output.kind == {"layer": "softmax"}.get(activation, activation)
    if activation == "layer":
        return
    wrapped = quantize_aware(model, calibration=rows) if how == "quantize_aware" else wrap(model)
    tap = find(wrapped, "end:preactivation", "student")
    for each in (tap, outputs_of(wrapped)[0].tap):
        answer, seen = read(wrapped, rows, {"logits": each}, False)
        values = keras.activations.get(activation)(seen["logits"])
        np.testing.assert_allclose(answer, values, atol=1 / 255)


def test_errors_say_what_cannot_be():
    model = small()
    name = model.layers[1].name
    for axes in ((5,), (-3,)):
        with pytest.raises(ValueError, match="which has 2 axes"):
            quantize_aware(model, annotations={name: Annotation(weights={"kernel": axes})})
    with pytest.raises(ValueError, match="`layers` is empty"):
        prune(model, layers=[])
    nested = keras.Sequential([keras.Input((8,)), model], name="outer")
    with pytest.raises(ValueError, match="lies in a model nested in `outer`"):
        prune(nested, pattern="channels")


def test_the_sigmoid_inside_swish_is_rounded(rows, tmp_path):
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layers.Dense(4, activation="swish", name="swish")(inputs))
    quantized = quantize_aware(model, calibration=rows)
    quantized.compile("adam", "mse")
    quantized.save(tmp_path / "compiled.keras")
    layer = keras.models.load_model(tmp_path / "compiled.keras").get_layer("swish")
    kernel = np.asarray(layer.quantized_pairs(False)[0][1])
    product = np.asarray(layer.linear_quantizer(rows @ kernel))
    gate = np.clip(np.round(256 / (1 + np.exp(-product))), 0, 255) / 256
    np.testing.assert_allclose(np.asarray(layer(rows)), product * gate, atol=1e-4)
