"""Calibration, noisy labels and corruptions, against NumPy, SciPy and scikit-learn."""

import io
import itertools

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image
from scipy import ndimage, optimize
from small_models import CLASSES, FEATURES, log_softmax, mlp, rows

import keras_kd as kd
from keras_kd.robust import calibration


def by_hand(p, y, bins):
    """The sum over bins `(lo, hi]`, one at a time."""
    confidence, right = p.max(-1), p.argmax(-1) == y
    total = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_expected_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4) * 0.4, 500)
    y = rng.integers(0, 4, 500)
    for bins in (1, 10, 15):
        got = kd.robust.expected_calibration_error(p, y, bins=bins)
        assert got == pytest.approx(by_hand(p, y, bins), abs=1e-9)
    # On the edge of a bin, which belongs to the lower one.
    edge = np.array([[0.6, 0.4], [0.6, 0.4], [0.7, 0.3]])
    assert kd.robust.expected_calibration_error(edge, [0, 1, 0], bins=5) == pytest.approx(
        by_hand(edge, np.array([0, 1, 0]), 5)
    )
    edge = np.array([[0.5, 0.5], [0.75, 0.25]])
    assert kd.robust.expected_calibration_error(edge, [0, 1], bins=2) == pytest.approx(0.625)
    # One unit, and one-hot labels.
    one = kd.robust.expected_calibration_error(p[:, :1], (y == 0).astype(int))
    both = np.stack([1 - p[:, 0], p[:, 0]], -1)
    assert one == kd.robust.expected_calibration_error(both, np.eye(2)[(y == 0).astype(int)])
    # Bins of equal mass hold equally many.
    bins = calibration.reliability(p, y, 10, equal_mass=True)
    assert bins.count.tolist() == [50] * 10
    with pytest.raises(ValueError, match="softmax"):
        kd.robust.expected_calibration_error(np.log(p), y)
    with pytest.raises(ValueError, match="bins"):
        kd.robust.expected_calibration_error(p, y, bins=0)


def test_other_figures_of_sureness():
    from sklearn.metrics import log_loss

    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(300, 4)) * 2, rng.integers(0, 4, 300)
    found = calibration.sureness(z, y)
    p = np.exp(log_softmax(z))
    assert found.nll == pytest.approx(log_loss(y, p, labels=range(4)))
    assert found.brier == pytest.approx(np.square(p - np.eye(4)[y]).sum(-1).mean())
    assert found.ece_low < found.ece_high
    assert found.ece == kd.robust.expected_calibration_error(p, y)


MODELS = {
    "logits": lambda: mlp(),
    "nested": lambda: keras.Sequential(
        [keras.Input((FEATURES,)), mlp(), layers.Activation("softmax")]
    ),
    "convolution": lambda: keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Reshape((FEATURES, 1)),
            layers.Conv1D(CLASSES, 2, use_bias=False),
            layers.GlobalAveragePooling1D(),
        ]
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_temperature_is_folded_and_decisions_stay(name):
    x, _ = rows(400)
    keras.utils.set_random_seed(1)
    model = MODELS[name]()
    probabilities = name == "nested"

    def logits(m):
        out = m.predict(x, verbose=0)
        return np.log(out) if probabilities else out

    rng = np.random.default_rng(0)
    p = np.exp(log_softmax(logits(model) / 3))
    # Labels as though the logits were three times too great.
    y = (p.cumsum(-1) > rng.random((400, 1))).argmax(-1)
    before = model.get_weights()
    found = kd.robust.calibrate(model, x, y)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [type(layer) for layer in found.layers] == [type(layer) for layer in model.layers]
    nll = lambda t: -log_softmax(logits(model) / t)[np.arange(400), y].mean()  # noqa: E731
    best = optimize.minimize_scalar(nll, bounds=(0.1, 19.0), method="bounded").x
    expected = np.exp(log_softmax(logits(model) / best))
    np.testing.assert_allclose(np.exp(log_softmax(logits(found))), expected, atol=2e-4)
    np.testing.assert_array_equal(logits(found).argmax(-1), logits(model).argmax(-1))


def test_one_unit_is_calibrated_too():
    x, _ = rows(300)
    model = mlp(classes=1, activation="sigmoid")
    y = np.random.default_rng(0).integers(0, 2, 300)
    y = np.where(np.arange(300) < 200, model.predict(x, verbose=0)[:, 0] > 0.5, y).astype(int)
    found = kd.robust.calibrate(model, x, y)
    before, after = (m.predict(x, verbose=0)[:, 0] for m in (model, found))
    np.testing.assert_array_equal(before > 0.5, after > 0.5)


def test_what_cannot_be_calibrated_is_refused():
    x, y = rows(50)
    inputs = keras.Input((FEATURES,))
    scaled = keras.Model(inputs, layers.Rescaling(2.0)(layers.Dense(CLASSES)(inputs)))
    with pytest.raises(ValueError, match="Rescaling, which cannot hold it"):
        kd.robust.calibrate(scaled, x, y)
    added = keras.Model(inputs, layers.add([layers.Dense(CLASSES)(inputs)] * 2))
    with pytest.raises(ValueError, match="Add, which cannot"):
        kd.robust.calibrate(added, x, y)
    with pytest.raises(ValueError, match="no rows"):
        kd.robust.calibrate(mlp(), x[:0], y[:0])
    with pytest.raises(ValueError, match="`x` holds NaN"):
        kd.robust.calibrate(mlp(), np.where(x > 1, np.nan, x), y)
    with pytest.raises(ValueError, match="`batch_size` is at least 1"):
        kd.robust.calibrate(mlp(), x, y, batch_size=0)
    # A mean of probabilities is no softmax of what a kernel makes.
    steps = keras.Input((5, FEATURES))
    each = layers.Dense(CLASSES, activation="softmax")(steps)
    averaged = keras.Model(steps, layers.GlobalAveragePooling1D()(each))
    with pytest.raises(ValueError, match="probabilities are off by up to"):
        kd.robust.calibrate(averaged, 4 * np.stack([x, -x, 2 * x, x[::-1], -x[::-1]], 1), y)
    tied = layers.Dense(FEATURES)
    twice = keras.Model(inputs, tied(layers.Activation("tanh")(tied(inputs))))
    with pytest.raises(ValueError, match="used more than once"):
        kd.robust.calibrate(twice, 3 * x, y)
    model = mlp()
    right = model.predict(x, verbose=0).argmax(-1)
    with pytest.warns(UserWarning, match="too easy"):
        kd.robust.calibrate(model, x, right)


# ------------------------------------------------------------------------------- labels


def test_noisy_labels():
    y = np.arange(1000) % 5
    for rate in (0.0, 0.2, 0.6, 1.0):
        got = kd.robust.noisy_labels(y, rate)
        assert (got != y).sum() == round(rate * 1000)
    assert got.dtype == y.dtype
    got = kd.robust.noisy_labels(y, 0.5)
    shift = (got - y)[got != y] % 5
    counts = np.bincount(shift, minlength=5)
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 125) < 40).all()
    pairs = kd.robust.noisy_labels(y, 0.4, kind="pairs")
    assert set(((pairs - y)[pairs != y] % 5).tolist()) == {1}
    np.testing.assert_array_equal(kd.robust.noisy_labels(y, 0.3), kd.robust.noisy_labels(y, 0.3))
    # A greater rate changes the rows of a smaller one, in the same way.
    less, more = (kd.robust.noisy_labels(y, rate) for rate in (0.2, 0.4))
    np.testing.assert_array_equal(more[less != y], less[less != y])
    one_hot = kd.robust.noisy_labels(np.eye(5, dtype="float32")[y], 0.4)
    np.testing.assert_array_equal(one_hot.argmax(-1), more)
    assert kd.robust.noisy_labels(y[:, None], 0.4).shape == (1000, 1)
    for bad, words in (
        ({"rate": 1.2}, "share"),
        ({"kind": "pair"}, "Did you mean 'pairs'"),
        ({"classes": 3}, "at least 5"),
        ({"y": np.array([0.5, 1.0])}, "class numbers"),
        ({"y": np.array(["a", "b"])}, "class numbers"),
        ({"y": np.eye(5)[y], "classes": 7}, "5 columns"),
        # Labels of tokens, several labels and none were taken for one-hot rows.
        ({"y": y.reshape(-1, 4)}, "not one-hot"),
        ({"y": np.ones((9, 3))}, "not one-hot"),
        ({"y": np.zeros((9, 3))}, "not one-hot"),
        ({"y": y.astype("uint8"), "classes": 300}, "Class 299 does not fit into uint8"),
        ({"y": y > 2, "classes": 3}, "yes and no"),
        ({"y": np.ma.masked_equal(y, 2)}, "are masked"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=words):
            kd.robust.noisy_labels(**{"y": y, **bad})
    with pytest.raises(TypeError, match="`classes` is a whole number"):
        kd.robust.noisy_labels(y, classes=5.5)
    assert kd.robust.noisy_labels(y[:0]).shape == (0,)


# -------------------------------------------------------------------------- corruptions


@pytest.fixture(scope="module")
def images():
    digits = kd.datasets.load("digits").x_test[:24]
    rng = np.random.default_rng(0)
    color = ndimage.gaussian_filter(rng.uniform(size=(8, 32, 32, 3)), (0, 3, 3, 0))
    color = (color - color.min()) / (color.max() - color.min())
    return {"digits": digits, "color": color.astype("float32")}


@pytest.mark.parametrize("name", kd.robust.corruptions("image"))
def test_severities_of_images_grow(name, images):
    for x in images.values():
        sizes = []
        for severity in (1, 2, 3, 4, 5):
            got = kd.robust.corrupt(x, name, severity, seed=3)
            assert got.shape == x.shape
            assert got.dtype == x.dtype
            assert got.min() >= 0
            assert got.max() <= 1
            sizes.append(np.sqrt(np.square(got - x).mean()))
        assert sizes[0] > 0
        assert all(a <= b + 1e-7 for a, b in itertools.pairwise(sizes))
    again = kd.robust.corrupt(x, name, 2, seed=3)
    np.testing.assert_array_equal(again, kd.robust.corrupt(x, name, 2, seed=3))
    # A row's numbers are its own, whoever is beside it.
    np.testing.assert_array_equal(kd.robust.corrupt(x[:3], name, 2, seed=3), again[:3])


def test_corruptions_of_images_are_what_they_say(images):
    x = images["color"].astype("float64")
    noise = np.stack([np.random.default_rng((0, i)).standard_normal(x.shape[1:]) for i in range(8)])
    got = kd.robust.corrupt(x, "gaussian_noise", 3)
    np.testing.assert_allclose(got, np.clip(x + 0.08 * noise, 0, 1))
    mean = x.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(kd.robust.corrupt(x, "contrast", 2), (x - mean) * 0.5 + mean)
    blurred = np.stack([ndimage.gaussian_filter(i, (0.7, 0.7, 0), mode="nearest") for i in x])
    np.testing.assert_allclose(kd.robust.corrupt(x, "gaussian_blur", 3), blurred)
    stored = io.BytesIO()
    Image.fromarray(np.round(x[0] * 255).astype("uint8")).save(stored, "JPEG", quality=58)
    np.testing.assert_allclose(
        kd.robust.corrupt(x, "jpeg_compression", 3)[0], np.asarray(Image.open(stored)) / 255
    )
    gray = x[:, :, :, 0]
    np.testing.assert_allclose(kd.robust.corrupt(gray, "brightness", 1), np.minimum(gray + 0.05, 1))
    blocks = x.reshape(8, 16, 2, 16, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(kd.robust.corrupt(x, "pixelate", 1), blocks)
    np.testing.assert_allclose(kd.robust.corrupt(x, "stripe", 5)[:, :, 8:24], 1 - x[:, :, 8:24])


def test_bytes_and_other_bounds(images):
    x = images["color"]
    as_bytes = np.round(255 * x).astype("uint8")
    got = kd.robust.corrupt(as_bytes, "contrast", 3)
    assert got.dtype == "uint8"
    np.testing.assert_allclose(got / 255.0, kd.robust.corrupt(x, "contrast", 3), atol=0.005)
    wide = kd.robust.corrupt(4 * x - 2, "gaussian_noise", 3, bounds=(-2, 2))
    np.testing.assert_allclose(wide, 4 * kd.robust.corrupt(x, "gaussian_noise", 3) - 2, atol=1e-5)
    for bad, kind, words in (
        ({"x": 2 * x}, ValueError, "outside of the bounds"),
        ({"name": "gausian_noise"}, ValueError, "Did you mean 'gaussian_noise'"),
        ({"severity": 6}, ValueError, "severity"),
        ({"severity": True}, ValueError, "severity"),
        ({"severity": 3.0}, ValueError, "severity"),
        ({"severity": np.array([1, 2])}, ValueError, "severity"),
        ({"seed": 0.5}, TypeError, "`seed` is a whole number"),
        ({"x": x[0]}, ValueError, "one image with its channels"),
        ({"name": ["contrast"]}, ValueError, "corruption is one of"),
        ({"bounds": (0, 1, 2)}, TypeError, "least and the greatest"),
        ({"x": x[0, 0]}, TypeError, "height"),
        ({"name": "typos"}, TypeError, "strings"),
        ({"bounds": (1, 0)}, ValueError, "lesser"),
        ({"name": "typos", "x": [b"\xff"]}, ValueError, "UTF-8"),
        ({"name": "typos", "x": [["ab"], ["cd"]]}, TypeError, "lists within a list"),
    ):
        with pytest.raises(kind, match=words):
            kd.robust.corrupt(**{"x": x, "name": "contrast", **bad})
    with pytest.raises(ValueError, match="Did you mean 'image'"):
        kd.robust.corruptions("images")


@pytest.mark.parametrize("name", kd.robust.corruptions("audio"))
def test_severities_of_audio_grow(name):
    t = np.arange(1600) / 8000
    x = np.stack([0.4 * np.sin(2 * np.pi * (100 + 20 * i) * t) for i in range(4)])
    x = x.astype("float32")
    sizes = []
    for severity in (1, 2, 3, 4, 5):
        got = kd.robust.corrupt(x, name, severity)
        assert got.shape == x.shape
        assert np.abs(got).max() <= 1
        # A later beginning is longer silence; a sine is as far from itself as it can be at once.
        silent = np.abs(got) < 1e-6
        size = silent.mean() if name == "shift" else np.sqrt(np.square(got - x).mean())
        sizes.append(size)
    assert all(a < b for a, b in itertools.pairwise(sizes))
    whole = kd.robust.corrupt((x * 32767).astype("int16"), name, 3)
    np.testing.assert_allclose(whole / 32768, kd.robust.corrupt(x, name, 3), atol=2e-3)


def test_audio_is_what_it_says():
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 1000, 2))
    np.testing.assert_allclose(kd.robust.corrupt(x, "gain", 2), x * 10 ** (-6 / 20))
    noise = kd.robust.corrupt(x, "noise", 4) - x
    ratio = 10 * np.log10(np.square(x).mean((1, 2)) / np.square(noise).mean((1, 2)))
    np.testing.assert_allclose(ratio, 10, atol=0.5)


@pytest.mark.parametrize("name", kd.robust.corruptions("text"))
def test_severities_of_texts_grow(name):
    import difflib

    texts = ["The quick brown fox jumps over the lazy dog, as ever.", "My card has not come yet."]
    likeness = []
    for severity in (1, 2, 3, 4, 5):
        got = kd.robust.corrupt(texts * 6, name, severity)
        assert isinstance(got, list)
        likeness.append(
            sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in zip(texts * 6, got))
        )
    assert all(a >= b for a, b in itertools.pairwise(likeness))
    assert likeness[-1] < likeness[0] < 12
    array = kd.robust.corrupt(np.array(texts, dtype=object), name, 5)
    assert array.tolist() == kd.robust.corrupt(texts, name, 5)
    assert kd.robust.corrupt(np.array(texts, dtype="S60"), name, 5).dtype.kind == "S"
    assert kd.robust.corrupt([], name, 1) == []
    with pytest.raises(TypeError, match="strings"):
        kd.robust.corrupt("one text", name)
