import gzip

import keras
import numpy as np
import pytest
from keras import layers

from keras_kd.compress import cluster, finalize, kmeans, prune, quantize_aware, sparsity


def test_kmeans_is_a_fixed_point_of_lloyd():
    values = np.random.default_rng(0).normal(size=2000)
    centers = kmeans(values, 8, iterations=500)
    assert len(centers) == 8
    nearest = np.abs(values[:, None] - centers[None]).argmin(1)
    np.testing.assert_allclose(centers, [values[nearest == i].mean() for i in range(8)], atol=1e-10)
    error = np.mean((values - centers[nearest]) ** 2)
    even = np.linspace(values.min(), values.max(), 8)
    assert error < 0.7 * np.mean(np.min((values[:, None] - even[None]) ** 2, axis=1))


def test_few_values_are_kept_as_they_are():
    np.testing.assert_array_equal(kmeans(np.array([2.0, 1.0, 2.0]), 4), [1.0, 2.0])


def test_trains_and_stays_clustered(small_cnn, images, fit, tmp_path):
    clustered = cluster(small_cnn, clusters=8)
    layer = clustered.get_layer("hidden")
    before = np.asarray(layer.centers[0]).copy()
    history = fit(clustered, images, epochs=4)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert np.abs(np.asarray(layer.centers[0]) - before).max() > 1e-4
    plain = finalize(clustered)
    for name in ("stem", "pointwise", "hidden", "logits"):
        assert len(np.unique(plain.get_layer(name).get_weights()[0])) <= 8
    x = images[0]
    np.testing.assert_allclose(
        plain.predict(x, verbose=0), clustered.predict(x, verbose=0), rtol=1e-6, atol=1e-6
    )
    clustered.save(tmp_path / "c.keras")
    again = keras.models.load_model(tmp_path / "c.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), clustered.predict(x, verbose=0))
    assert len(again.trainable_variables) == len(clustered.trainable_variables)

    def zipped(model):
        weights = b"".join(np.asarray(w, "float32").tobytes() for w in model.get_weights())
        return len(gzip.compress(weights, mtime=0))

    assert zipped(plain) < 0.4 * zipped(small_cnn)


def test_center_gradient_is_the_sum_over_members():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3, use_bias=False, name="d")])
    clustered = cluster(model, clusters=3)
    layer = clustered.get_layer("d")
    clustered.compile(keras.optimizers.SGD(0.1), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 6)).astype("float32")
    y = rng.normal(size=(5, 3)).astype("float32")
    centers = np.asarray(layer.centers[0], "float64")
    assignment = np.asarray(layer.assignments[0])
    gradient = 2 * x.T.astype("float64") @ (x @ centers[assignment] - y) / y.size
    clustered.fit(x, y, batch_size=5, epochs=1, verbose=0)
    expected = centers - 0.1 * np.array([gradient[assignment == i].sum() for i in range(3)])
    np.testing.assert_allclose(np.asarray(layer.centers[0]), expected, atol=1e-6)


def test_zeros_of_a_pruned_model_stay(small_cnn, images, fit):
    pruned = prune(small_cnn, 0.5)
    fit(pruned, images)
    clustered = cluster(pruned, clusters=8)
    assert clustered.get_layer("hidden").keep_zeros
    assert not clustered.get_layer("depthwise").keep_zeros
    fit(clustered, images)
    plain = finalize(clustered)
    kernel = plain.get_layer("hidden").get_weights()[0]
    assert abs(np.mean(kernel == 0) - 0.5) < 0.01
    assert len(np.unique(kernel)) <= 8
    assert sparsity(clustered) == pytest.approx(sparsity(pruned), abs=1e-6)


def test_refusals(small_cnn):
    with pytest.raises(ValueError, match="at least 2"):
        cluster(small_cnn, clusters=1)
    with pytest.raises(ValueError, match="no layer with a kernel"):
        cluster(keras.Sequential([keras.Input((3,)), layers.ReLU()]))
    with pytest.raises(TypeError, match=r"keras.Model"):
        cluster(np.zeros(3))


def test_clusters_survive_quantization_in_every_kind_of_layer():
    layers = keras.layers
    inputs = keras.Input((4, 6))
    x = layers.Conv1D(5, 2, padding="same", name="conv")(inputs)
    x = layers.DepthwiseConv1D(2, padding="same", name="depthwise")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Conv1DTranspose(5, 2, padding="same", name="transposed")(x)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    model = keras.Model(inputs, layers.LSTM(3, name="recurrent")(x))
    rng = np.random.default_rng(0)
    norm = model.get_layer("norm")
    norm.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in norm.get_weights()])
    data = rng.normal(size=(8, 4, 6)).astype("float32")
    quantized = quantize_aware(cluster(model, 4), calibration=data)
    plain = finalize(quantized)
    for name in ("conv", "transposed", "attention", "recurrent"):
        for kernel in plain.get_layer(name).get_weights():
            assert kernel.ndim < 2 or len(np.unique(kernel)) <= 4
    # The normalization's scale is in the kernel of each channel.
    kernel = plain.get_layer("depthwise").get_weights()[0]
    integers = kernel[..., 0] / np.max(np.abs(kernel[..., 0]), axis=0)
    assert len(np.unique(np.round(integers, 4))) < integers.size
    scale = 1.0 / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon) * np.asarray(norm.gamma)
    assert len(np.unique(np.round(kernel[..., 0] / scale, 4))) <= 4


def test_frozen_layers_stay_frozen():
    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, name="frozen")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4, name="free")(x))
    model.get_layer("frozen").trainable = False
    clustered = cluster(model, 4)
    assert [v.path for v in clustered.trainable_variables] == ["free/centers_0", "free/bias"]
    clustered.get_layer("frozen").trainable = True
    names = [v.name for v in clustered.trainable_variables]
    assert sorted(names) == ["bias", "bias", "centers_0", "centers_0"]
