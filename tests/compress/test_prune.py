import keras
import numpy as np
import pytest
from keras import layers

from keras_kd.compress import (
    PrunedLayer,
    finalize,
    magnitude_mask,
    n_of_m_mask,
    prune,
    sparsity,
)
from keras_kd.compress.prune import _table


def zeros(model):
    return {
        layer.name: float(np.mean(np.asarray(layer.get_weights()[0]) == 0))
        for layer in model.layers
        if layer.weights and layer.get_weights()[0].ndim > 1
    }


@pytest.mark.parametrize("share", [0.1, 0.5, 0.83])
def test_magnitude_mask_keeps_the_largest(share):
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype("float32")
    kept = max(round(w.size * (1 - share)), 1)
    threshold = np.sort(np.abs(w).ravel())[::-1][kept - 1]
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(magnitude_mask(w, share)), np.abs(w) >= threshold
    )


@pytest.mark.parametrize("shape", [(8, 5), (10, 3), (3, 3, 8, 4), (3, 6, 2)])
def test_two_of_four_along_the_inputs(shape):
    w = np.random.default_rng(0).normal(size=shape).astype("float32")
    mask = keras.ops.convert_to_numpy(n_of_m_mask(w))
    assert mask.shape == shape
    inner = np.moveaxis(np.abs(w), -2, -1)
    chosen = np.moveaxis(mask, -2, -1)
    for row, keep in zip(inner.reshape(-1, shape[-2]), chosen.reshape(-1, shape[-2]), strict=True):
        for start in range(0, shape[-2], 4):
            group, kept = row[start : start + 4], keep[start : start + 4]
            assert kept.sum() == min(2, len(group))
            assert group[kept > 0].min() >= np.max(group[kept == 0], initial=0.0)


def test_ties_still_leave_two():
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(n_of_m_mask(np.ones((4, 1), "float32")))[:, 0], [1, 1, 0, 0]
    )


def test_one_shot_trains_and_keeps_zeros(small_cnn, images, fit):
    before = [w.copy() for w in small_cnn.get_weights()]
    pruned = prune(small_cnn, sparsity=0.75)
    history = fit(pruned, images, epochs=4)
    assert history.history["loss"][-1] < history.history["loss"][0]
    plain = finalize(pruned)
    found = zeros(plain)
    assert found.pop("depthwise") == 0.0
    assert all(abs(value - 0.75) < 0.01 for value in found.values())
    assert not [layer for layer in plain.layers if isinstance(layer, PrunedLayer)]
    np.testing.assert_array_equal(
        plain.predict(images[0], verbose=0), pruned.predict(images[0], verbose=0)
    )
    assert abs(sparsity(pruned) - sparsity(plain)) < 1e-9
    for old, new in zip(before, small_cnn.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_pruned_weights_take_no_gradient(small_cnn, images):
    pruned = prune(small_cnn, sparsity=0.5, layers=["hidden"])
    pruned.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    kernel = pruned.get_layer("hidden").layer.kernel
    mask = np.asarray(pruned.get_layer("hidden").masks[0])
    before = np.asarray(kernel).copy()
    pruned.fit(*images, batch_size=64, epochs=1, verbose=0)
    moved = np.asarray(kernel) != before
    assert not moved[mask == 0].any()
    assert moved[mask == 1].any()


def test_schedule_is_followed_in_the_layer(small_cnn, images, fit):
    # 192 samples in batches of 32 are 6 steps an epoch.
    pruned = prune(
        small_cnn, 0.8, schedule="polynomial", end_step=9, frequency=3, layers=["hidden"]
    )
    layer = pruned.get_layer("hidden")
    expected = [0.8 + (0 - 0.8) * (1 - s / 9) ** 3 for s in (0, 3, 6, 9)]
    assert layer.steps == (0, 3, 6, 9)
    np.testing.assert_allclose(layer.sparsities, expected, atol=1e-6)
    fit(pruned, images, epochs=1)
    share = float(np.mean(np.asarray(layer.masks[0]) == 0))
    assert abs(share - expected[1]) < 0.01
    fit(pruned, images, epochs=1)
    assert abs(float(np.mean(np.asarray(layer.masks[0]) == 0)) - 0.8) < 0.01
    assert int(layer.step) == 12


def test_evaluation_counts_no_step(small_cnn, images, fit):
    pruned = prune(small_cnn, 0.8, schedule="polynomial", end_step=9, frequency=3)
    pruned.predict(images[0], verbose=0)
    fit(pruned, images, epochs=1)
    pruned.evaluate(*images, verbose=0)
    assert int(pruned.get_layer("hidden").step) == 6


def test_keras_schedules_are_sparsities(small_cnn):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([10], [0.25, 0.5])
    pruned = prune(small_cnn, 0.5, schedule=schedule, begin_step=5, end_step=20, frequency=5)
    assert pruned.get_layer("hidden").steps == (5, 10, 15, 20)
    assert pruned.get_layer("hidden").sparsities == (0.25, 0.25, 0.25, 0.5)


def test_global_threshold(small_cnn):
    pruned = prune(small_cnn, 0.6, scope="global")
    kernels = [
        small_cnn.get_layer(name).get_weights()[0].ravel()
        for name in ("stem", "pointwise", "hidden", "logits")
    ]
    threshold = np.quantile(np.abs(np.concatenate(kernels)), 0.6)
    for name, kernel in zip(("stem", "pointwise", "hidden", "logits"), kernels, strict=True):
        share = float(np.mean(np.asarray(pruned.get_layer(name).masks[0]) == 0))
        assert abs(share - np.mean(np.abs(kernel) < threshold)) < 0.02


def test_two_of_four_model_and_round_trip(small_cnn, images, fit, tmp_path):
    pruned = prune(small_cnn, pattern="2:4")
    fit(pruned, images)
    kernel = finalize(pruned).get_layer("hidden").get_weights()[0]
    groups = kernel.T.reshape(16, -1, 4)
    assert ((groups == 0).sum(-1) >= 2).all()
    pruned.save(tmp_path / "pruned.keras")
    again = keras.models.load_model(tmp_path / "pruned.keras", safe_mode=True)
    np.testing.assert_array_equal(
        again.predict(images[0], verbose=0), pruned.predict(images[0], verbose=0)
    )
    fit(again, images, epochs=1)
    np.testing.assert_array_equal(
        np.asarray(again.get_layer("hidden").masks[0]),
        np.asarray(pruned.get_layer("hidden").masks[0]),
    )


def test_attention_and_recurrent_kernels():
    inputs = keras.Input((6, 8))
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = layers.Bidirectional(layers.LSTM(4), name="lstm")(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    x = np.random.default_rng(0).normal(size=(8, 6, 8)).astype("float32")
    pruned = prune(model, 0.5)
    plain = finalize(pruned)
    np.testing.assert_allclose(plain(x), pruned(x), rtol=1e-6)
    assert np.mean(plain.get_layer("attention").query_dense.kernel == 0) == 0.5
    assert len(pruned.get_layer("lstm").masks) == 4
    nested = keras.Sequential([keras.Input((6, 8)), model], name="outer")
    assert abs(sparsity(prune(nested, 0.5)) - 0.5) < 0.01


def test_channels_give_a_smaller_equal_model():
    """Channels made zero beforehand are the ones removed, and the outputs do not change."""
    rng = np.random.default_rng(0)
    inputs = keras.Input((8, 8, 3))
    a = layers.Conv2D(8, 3, padding="same", name="a", use_bias=False)(inputs)
    a = layers.BatchNormalization(name="a_norm")(a)
    a = layers.ReLU()(a)
    b = layers.DepthwiseConv2D(3, padding="same", name="depthwise", use_bias=False)(a)
    b = layers.Conv2D(8, 1, name="b", use_bias=False)(b)
    summed = layers.Add()([a, b])
    c = layers.SeparableConv2D(6, 3, padding="same", name="c", use_bias=False)(summed)
    d = layers.Conv2DTranspose(4, 2, strides=2, name="d", use_bias=False)(c)
    d = layers.AveragePooling2D(2)(d)
    joined = layers.Concatenate()([summed, d])
    flat = layers.Flatten()(layers.MaxPooling2D()(joined))
    hidden = layers.Dense(10, activation="relu", name="hidden", use_bias=False)(flat)
    model = keras.Model(inputs, layers.Dense(3, name="out")(hidden))
    norm = model.get_layer("a_norm")
    norm.set_weights([rng.uniform(0.5, 1, 8), np.zeros(8), np.zeros(8), rng.uniform(0.5, 1, 8)])
    dead = {
        "a": [1, 3, 4, 6],
        "b": [1, 3, 4, 6],
        "c": [0, 2, 5],
        "d": [1, 2],
        "hidden": [0, 4, 5, 7, 9],
    }
    for name, channels in dead.items():
        layer = model.get_layer(name)
        weights = layer.get_weights()
        if name == "d":
            weights[-1][:, :, channels] = 0.0
        else:
            weights[-1][..., channels] = 0.0
        layer.set_weights(weights)
    smaller = prune(model, 0.5, pattern="channels")
    widths = {
        name: smaller.get_layer(name).output.shape[-1] for name in [*dead, "depthwise", "out"]
    }
    assert widths == {"a": 4, "b": 4, "c": 3, "d": 2, "hidden": 5, "depthwise": 4, "out": 3}
    x = rng.normal(size=(4, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(smaller(x), model(x), rtol=1e-4, atol=1e-5)
    assert smaller.count_params() < 0.4 * model.count_params()


def test_channels_of_fixed_readers_stay(images, fit):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="grouped_reader")(inputs)
    x = layers.Conv2D(8, 3, groups=2, name="grouped")(x)
    x = layers.Conv2D(6, 1, name="free")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(4, name="out")(x))
    smaller = prune(model, 0.5, pattern="channels")
    widths = [
        smaller.get_layer(n).output.shape[-1] for n in ("grouped_reader", "grouped", "free", "out")
    ]
    assert widths == [8, 8, 3, 4]
    assert np.isfinite(fit(smaller, images, epochs=1).history["loss"][0])
    with pytest.raises(ValueError, match="No layer of"):
        prune(model, 0.5, pattern="channels", layers=["out"])


def test_tfmot_table_of_constant_and_table_errors(small_cnn):
    with pytest.raises(TypeError, match="`schedule` must be"):
        prune(small_cnn, schedule=0.5)
    with pytest.raises(ValueError, match="are sparsities"):
        _table(keras.optimizers.schedules.PolynomialDecay(2.0, 10), 0.5, 0, 10, 1)
    with pytest.raises(ValueError, match="`frequency` must be"):
        _table("polynomial", 0.5, 0, 10, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.0}, "between 0 and 1"),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"pattern": "4:2"}, "`pattern` must be"),
        ({"scope": "model"}, "`scope` must be"),
        ({"layers": ["hiden"]}, "Did you mean `hidden`"),
        ({"layers": ["pool"]}, "has no kernel"),
        ({"pattern": "channels", "schedule": "polynomial"}, "at once"),
        ({"pattern": "2:4", "scope": "global"}, "leave out"),
    ],
)
def test_refusals(small_cnn, arguments, message):
    with pytest.raises(ValueError, match=message):
        prune(small_cnn, **arguments)


class Given(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that gives what it was given."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value


class PruningSchedule:
    """What TFMOT calls a schedule."""

    def __init__(self, value, begin_step=0, end_step=10, frequency=5, due=True):
        self.value, self.due = value, due
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency

    def __call__(self, step):
        import tensorflow as tf

        return tf.constant(self.due), tf.constant(self.value, tf.float32)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"begin_step": "5"}, ValueError, "`begin_step` must be an integer of at least 0.*'5'"),
        ({"begin_step": None}, ValueError, "`begin_step` must be an integer"),
        ({"begin_step": 1.0}, ValueError, "`begin_step` must be an integer"),
        ({"begin_step": 7, "end_step": 7}, ValueError, "`end_step` must be .* at least 8"),
        ({"end_step": "9"}, ValueError, "`end_step` must be an integer"),
        ({"frequency": True}, ValueError, "`frequency` must be an integer"),
        ({"end_step": 10**9}, ValueError, "10,000,000 masks, and at most 1,000,000"),
        ({"schedule": Given(float("nan"))}, ValueError, r"must lie in \[0, 1\). It gives nan"),
        ({"schedule": Given(1.0)}, ValueError, r"must lie in \[0, 1\)"),
        ({"schedule": Given(-0.1)}, ValueError, r"must lie in \[0, 1\)"),
        ({"schedule": Given(0.0)}, ValueError, "prunes nothing: it gives 0 at each of 11 steps"),
        ({"schedule": PruningSchedule(float("nan"))}, ValueError, "It gives nan to nan"),
        ({"schedule": PruningSchedule(1.5)}, ValueError, "It gives 1.5 to 1.5 between steps 0"),
        ({"schedule": PruningSchedule(0.5, due=False)}, ValueError, "prunes at no step from 0"),
        (
            {"schedule": PruningSchedule(0.5, end_step=10**9)},
            ValueError,
            "has 1,000,000,000 steps, and at most",
        ),
        ({"schedule": "linear"}, TypeError, "Received: 'linear'"),
        ({"schedule": lambda step: 0.5}, TypeError, "`schedule` must be None"),
        ({"schedule": np.array([0.1, 0.2])}, TypeError, "`schedule` must be None"),
    ],
)
def test_schedules_that_cannot_prune(small_cnn, options, error, reason):
    with pytest.raises(error, match=reason):
        prune(small_cnn, 0.5, **{"schedule": "polynomial", "end_step": 1000, **options})


def test_steps_of_numpy_count_as_integers(small_cnn):
    steps = {"begin_step": np.int64(2), "end_step": np.int32(8), "frequency": np.int64(3)}
    table = _table("polynomial", 0.5, **steps)
    assert table == _table("polynomial", 0.5, 2, 8, 3)
    assert all(type(step) is int for step in table[0])
