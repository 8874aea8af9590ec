"""What calibration refuses, names of outputs, and copies of adapted layers."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_kd.compress import (
    activation_ranges,
    calibrate,
    finalize,
    fold_batch_normalization,
    prune,
    quantize_aware,
    summary,
)
from keras_kd.compress.answers import decibels, spread
from keras_kd.export.signature import describe


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(64, 8)).astype("float32")


def of(make, size=8):
    inputs = keras.Input((size,), name="x")
    return keras.Model(inputs, make(inputs))


def test_signal_and_noise_against_numpy():
    rng = np.random.default_rng(0)
    exact, noise = rng.normal(3.0, 1.0, size=(200, 4)), rng.normal(0.0, 0.1, size=(200, 4))
    wanted = 10 * np.log10(np.var(exact, axis=0).sum() / np.mean(noise**2, axis=0).sum())
    assert decibels(exact, exact + noise) == pytest.approx(wanted)
    assert decibels(exact, exact) == float("inf")
    wanted = np.sqrt(np.var(exact, axis=0).sum() / np.mean(exact**2, axis=0).sum())
    assert spread(exact) == pytest.approx(wanted)
    assert spread(exact[:1]) == 0.0


def test_a_hidden_logarithm_that_becomes_infinite_is_named(rows):
    def make(x):
        x = layers.Dense(4, name="mel", kernel_initializer="ones")(ops.square(x) ** 4)
        return layers.Dense(3)(layers.Lambda(ops.log, name="hidden")(x))

    rows[0] *= 1e-3
    with pytest.raises(ValueError, match=r"no longer finite.*in layer `hidden`"):
        quantize_aware(of(make), calibration=rows)
    quantized = quantize_aware(of(make))
    before = activation_ranges(quantized)
    with pytest.raises(ValueError, match="hidden"):
        calibrate(quantized, rows)
    assert activation_ranges(quantized) == before


def test_features_of_different_size_behind_one_range_are_named(rows):
    rows[:, 0] *= 1e6
    normalization = layers.Normalization(name="standardized")
    normalization.adapt(rows)
    model = of(lambda x: layers.Dense(3, name="head")(normalization(x)))
    with pytest.raises(ValueError, match=r"`head` of .* loses its signal.*different size"):
        quantize_aware(model, calibration=rows)


def test_a_model_that_is_not_finite_before_is_told_apart(rows):
    model = of(lambda x: layers.Dense(3)(ops.log(x)))
    with pytest.raises(ValueError, match=r"before any rounding, first in layer `log`"):
        quantize_aware(model, calibration=rows)


@pytest.mark.parametrize("bits", [2, 8])
def test_what_trains_on_is_not_refused(rows, bits):
    def make(x):
        return layers.Dense(3)(layers.Dense(16, activation="relu")(x))

    quantize_aware(of(make), weight_bits=bits, calibration=rows)
    quantize_aware(of(make), weight_bits=bits, calibration=np.ones((4, 8), "float32"))


def test_an_untrained_softmax_over_many_classes_is_a_warning(rows):
    model = of(lambda x: layers.Dense(1000, activation="softmax", name="classes")(x))
    with pytest.warns(UserWarning, match="`classes`.*TFLite prescribes"):
        quantize_aware(model, calibration=rows)


def heads():
    inputs = keras.Input((8,), name="x")
    hidden = layers.Dense(6, activation="relu")(inputs)
    norm = layers.BatchNormalization(name="normed")(layers.Dense(2, name="inner")(hidden))
    power = ops.square(hidden) + 1e-3
    outputs = [layers.Dense(3, activation="softmax", name="default")(hidden), norm, power]
    return keras.Model(inputs, [*outputs, layers.Dense(1, name="logs")(ops.log(power))])


def test_outputs_keep_their_names(rows, tmp_path):
    model = heads()
    quantized = quantize_aware(model, calibration=rows)
    assert quantized.output_names == model.output_names
    quantized.compile("adam", dict.fromkeys(model.output_names, "mse"))
    targets = {n: np.zeros((64, s.shape[1])) for n, s in zip(model.output_names, model.outputs)}
    quantized.fit(rows, targets, verbose=0)
    quantized.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for each in (loaded, keras.models.clone_model(quantized), finalize(quantized)):
        assert each.output_names == model.output_names
    for one, other in zip(loaded(rows), quantized(rows), strict=True):
        np.testing.assert_array_equal(one, other)
    answers = quantized.predict(rows, verbose=0)
    assert [o.name for o in describe(quantized, rows, answers).outputs] == model.output_names


@pytest.mark.parametrize("kind", ["dict", "sequential", "nested"])
def test_names_of_other_structures(rows, kind):
    if kind == "dict":
        inputs = keras.Input((8,), name="x")
        outputs = {
            "cls": layers.Dense(3, name="a")(inputs),
            "age": layers.Dense(1, name="b")(inputs),
        }
        model, data = keras.Model({"x": inputs}, outputs), {"x": rows}
    else:
        model, data = keras.Sequential([keras.Input((8,)), layers.Dense(3, name="default")]), rows
        if kind == "nested":
            model = of(model)
    quantized = quantize_aware(model, calibration=data)
    wanted, found = (
        [o.name for o in describe(m, data, m.predict(data, verbose=0)).outputs]
        for m in (model, quantized)
    )
    assert found == wanted


@pytest.mark.parametrize("how", ["quantize", "finalize", "fold", "prune"])
def test_an_adapted_normalization_goes_on_normalizing(rows, how):
    """Its constants are made from the weights when it is adapted, not when these are set."""
    data = 5.0 * rows + 3.0
    normalization = layers.Normalization()
    normalization.adapt(data)
    block = keras.Sequential([keras.Input((8,)), normalization])
    model = of(lambda x: layers.Dense(3)(block(x)))
    make = {
        "quantize": lambda m: quantize_aware(m, calibration=data),
        "finalize": lambda m: finalize(quantize_aware(m, calibration=data)),
        "fold": fold_batch_normalization,
        "prune": lambda m: finalize(prune(m, 0.01)),
    }[how]
    wanted, found = model.predict(data, verbose=0), make(model).predict(data, verbose=0)
    np.testing.assert_allclose(found, wanted, atol=0.2)


def test_pruning_says_which_kernels_stay_dense():
    block = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.SeparableConv2D(6, 3, name="separable")], name="block"
    )
    inputs = keras.Input((8, 8, 3))
    x = layers.TimeDistributed(layers.DepthwiseConv1D(3), name="each")(block(inputs))
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="last")(x))
    with pytest.warns(UserWarning, match=r"`block/separable` \(depthwise_kernel\), `each`"):
        pruned = prune(model, 0.5)
    assert "depthwise_kernel dense" in " ".join(summary(pruned).split())
    kernels = {w.path: np.mean(np.asarray(w) == 0) for w in finalize(pruned).weights}
    assert kernels["separable/depthwise_kernel"] == 0.0
    assert kernels["separable/pointwise_kernel"] == pytest.approx(0.5, abs=0.06)
    named = finalize(prune(model, 0.5, layers=["block/separable", "each"]))
    kernels = {w.path: np.mean(np.asarray(w) == 0) for w in named.weights if "kernel" in w.path}
    assert min(v for path, v in kernels.items() if not path.startswith("last")) > 0.4
