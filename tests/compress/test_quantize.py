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
    has_activation_quantization,
    is_calibrated,
    is_quantize_aware,
    prune,
    quantize_aware,
    quantized_weights,
    sparsity,
    summary,
)
from keras_kd.export.verification.metrics import sqnr


def numpy_fake_quant(x, low, high, bits=8):
    """Nudged affine quantization as TensorFlow documents it."""
    levels = 2**bits - 1
    step = (high - low) / levels
    zero = np.clip(np.round(-low / step), 0, levels)
    q = np.clip(np.floor(x / step + zero + 0.5), 0, levels)
    return (q - zero) * step


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7), (2, 1)])
def test_weights_against_numpy(bits, levels):
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype("float32")
    w[..., 2] = 0.0
    w[0, 0, 0, 0] = 0.0
    limit = np.abs(w).max(axis=(0, 1, 2), keepdims=True)
    step = np.maximum(limit, 1e-12) / levels
    expected = np.round(w / step) * step
    got = ops.convert_to_numpy(quantized_weights(w, bits, (-1,)))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert (got[w == 0] == 0).all()
    assert len(np.unique(got[..., 0])) <= 2 * levels + 1
    one_step = np.abs(w).max() / levels
    np.testing.assert_allclose(
        ops.convert_to_numpy(quantized_weights(w, bits)),
        np.round(w / one_step) * one_step,
        atol=1e-6,
    )


def test_activations_follow_a_moving_range():
    layer = FakeQuantize(momentum=0.9)
    rng = np.random.default_rng(0)
    low = high = None
    for index in range(4):
        x = rng.normal(0.5, 1.0 + index, size=(16, 5)).astype("float32")
        out = ops.convert_to_numpy(layer(x, training=True))
        batch = min(x.min(), 0.0), max(x.max(), 0.0)
        if low is None:
            low, high = batch
        else:
            low, high = 0.9 * low + 0.1 * batch[0], 0.9 * high + 0.1 * batch[1]
        np.testing.assert_allclose(layer.limits(), (low, high), rtol=1e-5)
        np.testing.assert_allclose(out, numpy_fake_quant(x, low, high), atol=1e-5)
    before = layer.limits()
    layer(100.0 * x, training=False)
    layer(100.0 * x, training=True, observe=False)
    layer.frozen.assign(1.0)
    layer(100.0 * x, training=True)
    assert layer.limits() == before


def test_range_holds_zero_and_integers_pass():
    layer = FakeQuantize()
    layer(np.array([3.0, 4.0], "float32"), training=True)
    assert layer.limits() == (0.0, 4.0)
    ids = np.array([1, 2, 3], "int32")
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(ids)), ids)
    for arguments in ({"bits": 1}, {"momentum": 1.0}, {"fixed": (0.5, 1.0)}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            FakeQuantize(**arguments)


def test_folded_and_rounded_against_numpy():
    """One Dense with its normalization: the device's arithmetic written out."""
    inputs = keras.Input((5,))
    dense, norm = layers.Dense(3, name="d"), layers.BatchNormalization(epsilon=0.01, name="n")
    model = keras.Model(inputs, norm(dense(inputs)))
    rng = np.random.default_rng(0)
    norm.set_weights(
        [rng.uniform(0.5, 2, 3), rng.normal(size=3), rng.normal(size=3), rng.uniform(0.5, 2, 3)]
    )
    x = rng.normal(size=(64, 5)).astype("float32")
    model = quantize_aware(model, calibration=x)
    kernel, bias = (np.asarray(w, "float64") for w in dense.get_weights())
    gamma, beta, mean, variance = (np.asarray(w, "float64") for w in norm.get_weights())
    scale = gamma / np.sqrt(variance + 0.01)
    kernel, bias = kernel * scale, (bias - mean) * scale + beta
    step = np.abs(kernel).max(0) / 127
    kernel = np.round(kernel / step) * step
    ranges = list(activation_ranges(model).values())
    low, high = min(x.min(), 0), max(x.max(), 0)
    np.testing.assert_allclose(ranges[0], (low, high), rtol=1e-4)
    expected = numpy_fake_quant(numpy_fake_quant(x, *ranges[0]) @ kernel + bias, *ranges[1])
    off = np.abs(ops.convert_to_numpy(model(x)) - expected)
    lsb = (ranges[1][1] - ranges[1][0]) / 255
    assert off.max() < 1.01 * lsb
    assert np.mean(off > 0.01 * lsb) < 0.02


def test_frozen_statistics_train_as_they_infer():
    """With frozen statistics, training and inference compute the same function."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, name="c", use_bias=False)(inputs)
    model = keras.Model(inputs, layers.BatchNormalization(name="n")(x))
    data = np.random.default_rng(0).normal(1.0, 2.0, size=(32, 6, 6, 3)).astype("float32")
    quantized = quantize_aware(model, calibration=data)
    layer = quantized.get_layer("c")
    before = np.asarray(layer.norm.moving_mean).copy()
    live = ops.convert_to_numpy(layer(data, training=True))
    # Batch statistics: every channel is centered, and the moving mean follows.
    np.testing.assert_allclose(live.mean(axis=(0, 1, 2)), 0.0, atol=1e-4)
    moved = np.asarray(layer.norm.moving_mean)
    assert np.abs(moved - before).max() > 1e-4
    layer.frozen.assign(1.0)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(data, training=True)),
        ops.convert_to_numpy(layer(data, training=False)),
        atol=1e-4,
    )
    np.testing.assert_array_equal(np.asarray(layer.norm.moving_mean), moved)


def test_trains_freezes_saves_and_finalizes(small_cnn, images, fit, tmp_path):
    x, _ = images
    before = [w.copy() for w in small_cnn.get_weights()]
    model = quantize_aware(small_cnn)
    assert is_quantize_aware(model)
    assert not is_quantize_aware(small_cnn)
    assert not is_calibrated(model)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(activation_ranges(model))

    kernel = np.asarray(model.get_layer("stem").layer.kernel).copy()
    history = fit(model, images, epochs=4, callbacks=[FreezeObservers(epoch=-2), Watch()])
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert is_calibrated(model)
    assert np.abs(np.asarray(model.get_layer("stem").layer.kernel) - kernel).max() > 1e-3
    assert seen[0] != seen[1]
    assert seen[1] == seen[2] == seen[3]
    model.save(tmp_path / "q.keras")
    again = keras.models.load_model(tmp_path / "q.keras", safe_mode=True)
    outputs = model.predict(x, verbose=0)
    np.testing.assert_array_equal(again.predict(x, verbose=0), outputs)
    plain = finalize(model)
    assert {type(layer).__module__.split(".")[0] for layer in plain.layers} == {"keras"}
    assert sqnr(plain.predict(x, verbose=0), outputs) > 25
    assert len(np.unique(plain.get_layer("stem").get_weights()[0][..., 0])) <= 27
    for old, new in zip(before, small_cnn.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_names_and_taps_stay(small_cnn):
    quantized = quantize_aware(small_cnn)
    for layer in small_cnn.layers:
        assert quantized.get_layer(layer.name).output.shape == layer.output.shape


def test_where_activations_are_rounded(small_cnn):
    names = {p.removesuffix("_quantize") for p in activation_ranges(quantize_aware(small_cnn))}
    # Not where a ReLU follows, nor after pooling and flattening, which move values.
    assert names == {"image", "stem_relu", "depthwise", "pointwise", "sum", "hidden", "logits"}


def test_joined_tensors_share_one_range():
    inputs = keras.Input((6, 6, 3))
    a = layers.Conv2D(4, 3, padding="same", name="a")(inputs)
    b = layers.MaxPooling2D(1, name="pooled")(layers.Conv2D(4, 1, name="b")(inputs))
    c = layers.Concatenate(name="ab")([a, b])
    d = layers.Concatenate(name="all")([c, layers.Conv2D(2, 1, name="c")(a)])
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="last")(d))
    x = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype("float32")
    quantized = quantize_aware(model, calibration=x)
    assert set(activation_ranges(quantized)) == {
        "input_layer_quantize", "all_quantize", "last_quantize"
    }  # fmt: skip
    joined = keras.Model(model.inputs, model.get_layer("all").output)(x)
    low, high = activation_ranges(quantized)["all_quantize"]
    assert low == pytest.approx(float(np.min(joined)), rel=0.05)
    assert high == pytest.approx(float(np.max(joined)), rel=0.05)


def test_fixed_ranges_of_bounded_activations():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax", name="d")])
    quantized = quantize_aware(model, calibration=np.ones((4, 4), "float32"))
    ranges = activation_ranges(quantized)
    assert ranges["d_quantize"] == (0.0, 255 / 256)
    assert "d:linear" in ranges
    plain = finalize(quantized)
    assert plain.layers[-1].activation is keras.activations.softmax


def test_weight_only_four_bits(small_cnn, images, fit):
    model = quantize_aware(small_cnn, weight_bits=4, activation_bits=None)
    assert is_quantize_aware(model)
    assert not has_activation_quantization(model)
    fit(model, images)
    plain = finalize(model)
    x = images[0]
    np.testing.assert_allclose(
        plain.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5
    )
    for name in ("stem", "pointwise", "hidden"):
        kernel = plain.get_layer(name).get_weights()[0]
        assert (
            max(
                len(np.unique(np.round(column, 5)))
                for column in kernel.reshape(-1, kernel.shape[-1]).T
            )
            <= 15
        )


def test_sparsity_and_clusters_survive(small_cnn, images, fit, tmp_path):
    pruned = prune(small_cnn, 0.75)
    fit(pruned, images, epochs=1)
    both = cluster(pruned, clusters=8, layers=["hidden", "logits"])
    model = quantize_aware(both)
    fit(model, images, epochs=1)
    assert sparsity(model) == pytest.approx(sparsity(pruned), abs=1e-6)
    plain = finalize(model)
    hidden = plain.get_layer("hidden").get_weights()[0]
    assert abs(np.mean(hidden == 0) - 0.75) < 0.01
    assert len(np.unique(hidden)) <= 8
    assert abs(np.mean(plain.get_layer("stem").get_weights()[0] == 0) - 0.75) < 0.01
    model.save(tmp_path / "pcq.keras")
    again = keras.models.load_model(tmp_path / "pcq.keras")
    x = images[0]
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    kept = quantize_aware(finalize(pruned), keep_zeros=True)
    fit(kept, images, epochs=1)
    assert sparsity(kept) == pytest.approx(sparsity(pruned), abs=1e-6)


def test_nested_and_shared_layers(images):
    block = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="c"), layers.BatchNormalization(name="n"),
         layers.ReLU(name="r")], name="block",
    )  # fmt: skip
    inputs = keras.Input((8, 8, 3))
    x = block(inputs)
    shared = layers.Dense(4, activation="relu", name="shared")
    x = layers.Flatten()(x)
    x = shared(layers.Dense(4, name="to_four")(x))
    model = keras.Model(inputs, shared(x))
    quantized = quantize_aware(model, calibration=images[0])
    assert isinstance(quantized.get_layer("block").get_layer("c"), QuantizedLayer)
    assert "block/r_quantize" in activation_ranges(quantized)
    # An input that another model feeds is rounded there.
    assert not [p for p in activation_ranges(quantized) if p.startswith("block/input")]
    x = images[0]
    assert sqnr(model.predict(x, verbose=0), quantized.predict(x, verbose=0)) > 25


@keras.saving.register_keras_serializable(package="test_quantize")
class Mixer(layers.Layer):
    def build(self, input_shape):
        self.matrix = self.add_weight(shape=(input_shape[-1], 4), name="matrix")

    def call(self, inputs):
        return ops.matmul(inputs, self.matrix)


def test_annotations(tmp_path):
    inputs = keras.Input((6,))
    x = Mixer(name="mixer")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    plain = quantize_aware(model, calibration=x)
    assert type(plain.get_layer("mixer")) is Mixer
    assert "custom layer" in summary(plain)
    annotations = {"mixer": Annotation(weights={"matrix": (-1,)}), "head": Annotation(float=True)}
    marked = quantize_aware(model, annotations=annotations, calibration=x)
    assert isinstance(marked.get_layer("mixer"), QuantizedLayer)
    assert type(marked.get_layer("head")) is layers.Dense
    matrix = finalize(marked).get_layer("mixer").get_weights()[0]
    step = np.abs(matrix).max(0) / 127
    np.testing.assert_allclose(matrix / step, np.round(matrix / step), atol=1e-3)
    marked.save(tmp_path / "a.keras")
    again = keras.models.load_model(tmp_path / "a.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), marked.predict(x, verbose=0))
    with pytest.raises(ValueError, match="Did you mean `mixer`"):
        quantize_aware(model, annotations={"mixr": Annotation()})
    with pytest.raises(ValueError, match="has no weight `kernel`"):
        quantize_aware(model, annotations={"mixer": Annotation(weights={"kernel": ()})})
    with pytest.raises(TypeError, match="Annotation"):
        quantize_aware(model, annotations={"mixer": "float"})


def test_summary_is_a_table_of_80_columns(small_cnn):
    inputs = keras.Input((8, 8, 3), name="a_rather_long_name_for_an_input_layer")
    x = small_cnn(inputs)
    x = layers.Dense(8, activation="elu", name="exponential")(x)
    x = layers.ELU(name="elu")(x)
    model = keras.Model(inputs, layers.Dense(2)(x * 2.0))
    text = summary(quantize_aware(model))
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 80
    rows = {line.split()[0]: line for line in lines[2:]}
    assert "int8/channel" in rows["small/stem"]
    assert "stem_norm folded in" in rows["small/stem"]
    assert "stays float: no int8 form of ELU" in " ".join(text.split())
    assert "a constant operand has no int8 form" in " ".join(text.split())
    assert "activation elu runs in float" in " ".join(text.split())
    assert "0 % zeros" not in text
    assert "50 % zeros" in summary(prune(small_cnn, 0.5))


def test_mixed_precision_trains(images):
    inputs = keras.Input((8, 8, 3), dtype="float32")
    x = layers.Conv2D(4, 3, dtype="mixed_bfloat16")(inputs)
    x = layers.BatchNormalization(dtype="mixed_bfloat16")(x)
    x = layers.Flatten(dtype="mixed_bfloat16")(layers.ReLU(dtype="mixed_bfloat16")(x))
    model = keras.Model(inputs, layers.Dense(4, dtype="float32")(x))
    quantized = quantize_aware(model, calibration=images[0])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    quantized.compile("adam", loss)
    assert np.isfinite(quantized.fit(*images, verbose=0).history["loss"][0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((0, 8, 8, 3), "float32"), "empty"),
        ([], "empty"),
        (np.full((4, 8, 8, 3), np.nan, "float32"), "NaN"),
        (np.zeros((4, 8, 8, 1), "float32"), "has shape"),
        ([np.zeros((4, 8, 8, 3))] * 2, "has 1 inputs"),
    ],
)
def test_bad_calibration_changes_nothing(small_cnn, data, message):
    model = quantize_aware(small_cnn)
    before = activation_ranges(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, data)
    assert activation_ranges(model) == before


def test_refusals(small_cnn, images, fit):
    quantized = quantize_aware(small_cnn)
    with pytest.raises(ValueError, match="quantization-aware already"):
        quantize_aware(quantized)
    with pytest.raises(ValueError, match="quantized already"):
        prune(quantized)
    with pytest.raises(ValueError, match="weight_bits"):
        quantize_aware(small_cnn, weight_bits=16)
    with pytest.raises(ValueError, match="activation_bits"):
        quantize_aware(small_cnn, activation_bits=4)
    with pytest.raises(ValueError, match="no activation to calibrate"):
        calibrate(small_cnn, images[0])
    with pytest.raises(ValueError, match="found no observers"):
        fit(small_cnn, images, callbacks=[FreezeObservers()])

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs)

    model = Subclassed()
    model(np.ones((1, 3), "float32"))
    with pytest.raises(ValueError, match="Python code"):
        quantize_aware(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: layers.LSTM(4, name="steps")(x),
        lambda x: layers.GRU(4, name="steps")(x),
        lambda x: layers.MultiHeadAttention(2, 3, name="steps")(x, x),
    ],
    ids=["lstm", "gru", "attention"],
)
def test_finalized_layers_of_sequences_hold_the_rounded_kernels(make):
    keras.utils.set_random_seed(0)
    rows = np.random.default_rng(0).normal(size=(8, 5, 6)).astype("float32")
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, make(inputs))
    plain = finalize(quantize_aware(model, calibration=rows))
    kernels = 0
    for before, after in zip(
        model.get_layer("steps").weights, plain.get_layer("steps").weights, strict=True
    ):
        if "kernel" not in before.name:
            continue
        # A matrix (inputs, outputs) with one step for each output.
        matrix = np.array(before, "float64")
        matrix = matrix.reshape(-1, matrix.shape[-1]) if matrix.shape[0] != 6 else matrix
        matrix = matrix.reshape(matrix.shape[0], -1)
        step = np.abs(matrix).max(axis=0) / 127
        wanted = np.round(matrix / step) * step
        np.testing.assert_allclose(np.array(after).reshape(wanted.shape), wanted, atol=1e-6)
        kernels += 1
    assert kernels >= 2
