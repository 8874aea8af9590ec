"""Reports: their figures against SciPy and scikit-learn, and what they say not to believe."""

import json

import keras
import numpy as np
import pytest
from keras import layers
from scipy import stats

import keras_kd as kd
from keras_kd.robust.evaluation import wilson


@pytest.fixture(scope="module")
def digits():
    return kd.datasets.load("digits")


@pytest.fixture(scope="module")
def model(digits):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = layers.Flatten()(inputs)
    x = layers.Dense(24, activation="relu")(x)
    found = keras.Model(inputs, layers.Dense(10)(x), name="small")
    found.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    found.fit(digits.x_train, digits.y_train, batch_size=64, epochs=8, verbose=0)
    return found


@pytest.fixture(scope="module")
def report(model, digits):
    steps = []
    found = kd.robust.evaluate(
        model,
        digits.x_test[:120],
        digits.y_test[:120],
        kd.robust.Linf(0.1, steps=20),
        corruptions=["contrast", "gaussian_noise"],
        severities=[1, 5],
        second_opinion="art",
        calibrate_on=(digits.x_validation, digits.y_validation),
        queries=60,
        progress=lambda *step: steps.append(step),
    )
    assert {stage for stage, _, _ in steps} == {
        "answers",
        "attacks",
        "second opinion",
        "corruptions",
    }
    return found


def test_the_figures_are_those_of_its_parts(model, digits, report):
    x, y = digits.x_test[:120], digits.y_test[:120]
    logits = model.predict(x, verbose=0)
    right = logits.argmax(-1) == y
    assert report.clean == right.mean()
    threat = kd.robust.Linf(0.1, steps=20)
    for kind in ("fgsm", "pgd"):
        attacked = kd.robust.attack(model, x, y, threat, kind=kind)
        kept = right & (model.predict(attacked, verbose=0).argmax(-1) == y)
        assert report.attacks[kind] == kept.mean()
    assert report.adversarial <= report.attacks["pgd"] <= report.attacks["fgsm"] < report.clean
    assert report.adversarial == report.attacks["square"]
    for severity in (1, 5):
        noisy = kd.robust.corrupt(x, "gaussian_noise", severity)
        kept = model.predict(noisy, verbose=0).argmax(-1) == y
        assert report.corrupted["gaussian_noise"][severity] == kept.mean()
    shares = [report.corrupted[name][s] for name in report.corrupted for s in (1, 5)]
    assert report.mean_corruption_error == pytest.approx(1 - np.mean(shares))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    assert report.ece == pytest.approx(kd.robust.expected_calibration_error(p, y), abs=1e-6)


def test_the_second_library_agrees_on_a_sound_model(report):
    assert abs(report.second_opinion - report.attacks["pgd"]) <= 0.02
    assert report.flags == ()


def test_intervals_are_those_of_scipy(report):
    for right, rows in ((0, 7), (7, 7), (93, 120)):
        low, high = wilson(right, rows)
        z = stats.norm.ppf(0.975)
        p = right / rows
        middle = (p + z**2 / (2 * rows)) / (1 + z**2 / rows)
        half = z / (1 + z**2 / rows) * np.sqrt(p * (1 - p) / rows + z**2 / (4 * rows**2))
        np.testing.assert_allclose((low, high), (middle - half, middle + half), atol=1e-12)
    low, high = report.intervals["clean"]
    assert low < report.clean < high
    assert report.intervals["contrast 5"][0] < report.corrupted["contrast"][5]


def test_table_and_page(report, tmp_path):
    text = report.table()
    assert "second opinion" in text
    assert f"{100 * report.adversarial:.2f}" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    page = report.save_html(tmp_path / "r.html").read_text()
    assert page.count("<svg") == 2
    assert "http-equiv" not in page
    assert "gaussian_noise" in page
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.temperature > 0
    assert report.calibrated_ece is not None


def two_class(slope):
    """A model of one number `x` in [0, 1]: class 1 above a half."""
    inputs = keras.Input((4, 4, 1))
    x = layers.GlobalAveragePooling2D()(inputs)
    return keras.Model(inputs, slope(x))


@keras.saving.register_keras_serializable(package="tests_robust")
class Steps(layers.Layer):
    """A decision with no slope anywhere: masked gradients."""

    def call(self, x):
        above = keras.ops.cast(x > 0.5, "float32")
        return keras.ops.concatenate([1 - above, above], axis=-1) * 4.0 - 2.0


@keras.saving.register_keras_serializable(package="tests_robust")
class Jitter(layers.Layer):
    """Noise in inference."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + 0.01 * keras.random.normal(keras.ops.shape(x), seed=self.seed)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(60, 4, 4, 1)).astype("float32")
    return x, (x.mean((1, 2, 3)) > 0.5).astype(int)


def test_masked_gradients_are_flagged(images):
    """Traps: zero gradients, a large ball that does not reach zero, square ahead of PGD."""
    x, y = images
    report = kd.robust.evaluate(two_class(Steps()), x, y, kd.robust.Linf(0.2, steps=5), queries=80)
    assert report.attacks["pgd"] > 0.5
    flags = " ".join(report.flags)
    for words in ("no gradient at all", "still right", "square attack"):
        assert words in flags
    assert report.adversarial < report.attacks["pgd"]


def test_randomness_and_probabilities_are_flagged(images):
    x, y = images
    weights = [np.array([[-9.0, 9.0]], "float32"), np.array([4.5, -4.5], "float32")]

    class Opaque(keras.Model):
        def __init__(self):
            super().__init__()
            self.pool, self.head = layers.GlobalAveragePooling2D(), layers.Dense(2)
            self.jitter = Jitter()

        def call(self, inputs):
            return keras.activations.softmax(self.jitter(self.head(self.pool(inputs))))

    model = Opaque()
    model(x[:1])
    model.head.set_weights(weights)
    report = kd.robust.evaluate(model, x, y, kd.robust.Linf(0.05, steps=5), queries=5)
    flags = " ".join(report.flags)
    assert "random" in flags
    assert "probabilities" in flags


def test_fgsm_ahead_of_pgd_is_flagged(images):
    """Trap: steps far too short to cross the ball."""
    x, y = images
    model = two_class(layers.Dense(2))
    model.layers[-1].set_weights(
        [np.array([[-9.0, 9.0]], "float32"), np.array([4.5, -4.5], "float32")]
    )
    threat = kd.robust.Linf(0.1, step=1e-4, steps=2)
    report = kd.robust.evaluate(model, x, y, threat, queries=2)
    assert any("FGSM" in flag for flag in report.flags)


def test_two_libraries_that_differ_are_flagged(images, monkeypatch):
    x, y = images
    from keras_kd.robust import second_opinion

    model = two_class(layers.Dense(2))
    model.layers[-1].set_weights(
        [np.array([[-9.0, 9.0]], "float32"), np.array([4.5, -4.5], "float32")]
    )
    monkeypatch.setattr(second_opinion, "attacked_by_art", lambda classifier, x, *_: x)
    report = kd.robust.evaluate(
        model, x, y, kd.robust.Linf(0.1, steps=5), second_opinion="art", queries=2
    )
    assert report.second_opinion == report.clean
    assert any("two libraries differ" in flag for flag in report.flags)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_second_library_gets_the_whole_threat(model, digits, norm, monkeypatch):
    """Traps: its defaults are others, its `predict` ignores the batch size, it draws globally."""
    from keras_kd.robust import second_opinion
    from keras_kd.robust.classifier import Classifier

    kind = {"Linf": kd.robust.Linf, "L2": kd.robust.L2}[norm]
    threat = kind(0.15, steps=7, restarts=2)
    x, y = digits.x_test[:40], digits.y_test[:40]
    classifier = Classifier(model, x[:2])
    sizes = []
    predict = classifier.predict
    monkeypatch.setattr(
        classifier, "predict", lambda rows, size: sizes.append(len(rows)) or predict(rows, size)
    )
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    got = second_opinion.attacked_by_art(classifier, x, y, threat, 3, 16)
    assert np.random.random() == expected
    assert max(sizes) <= 16
    change = (got - x).reshape(40, -1)
    length = np.abs(change).max(-1) if norm == "Linf" else np.linalg.norm(change, axis=-1)
    assert 0.05 < length.max() <= 0.15 + 1e-5
    assert got.min() >= 0
    assert got.max() <= 1
    again = second_opinion.attacked_by_art(classifier, x, y, threat, 3, 16)
    np.testing.assert_array_equal(again, got)


@pytest.fixture(scope="module")
def exported(model, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "files"
    kd.export(
        model,
        folder,
        formats=("tflite",),
        precisions=("int8",),
        calibration=digits.x_train[:100],
        evaluation=(digits.x_validation, digits.y_validation),
        max_drop=0.1,
    )
    return folder


def test_an_int8_file_is_attacked_by_transfer_and_square(model, digits, exported):
    x, y = digits.x_test[:60], digits.y_test[:60]
    threat = kd.robust.Linf(0.1, steps=20)
    report = kd.robust.evaluate(
        exported, x, y, threat, twin=model, queries=40, corruptions="contrast", severities=3
    )
    file = kd.export.load(exported)
    right = file(x).argmax(-1) == y
    assert report.clean == right.mean()
    attacked = kd.robust.attack(model, x, y, threat)
    kept = right & (file(attacked).argmax(-1) == y)
    assert report.attacks["transferred pgd"] == kept.mean()
    assert report.adversarial <= kept.mean()
    assert report.flags == ()
    dark = file(kd.robust.corrupt(x, "contrast", 3)).argmax(-1) == y
    assert report.corrupted["contrast"][3] == dark.mean()
    alone = kd.robust.evaluate(file, x, y, threat, queries=20)
    assert list(alone.attacks) == ["square"]
    assert any("without gradients" in flag for flag in alone.flags)
    own = kd.robust.attack(file, x, y, threat, kind="square", queries=20)
    assert np.abs(own - x).max() <= 0.1 + 1e-6
    with pytest.raises(ValueError, match="no gradients"):
        kd.robust.attack(file, x, y, threat, kind="pgd")
    with pytest.raises(ValueError, match="twin"):
        kd.robust.evaluate(file, x, y, threat, second_opinion="art")


def test_calibration_reaches_the_int8_file(model, digits, tmp_path):
    """Folded before the export, measured again on the file, decisions unchanged."""
    sharp = keras.models.clone_model(model)
    sharp.set_weights([*model.get_weights()[:2], *(6 * w for w in model.get_weights()[2:])])
    calibrated = kd.robust.calibrate(sharp, digits.x_validation, digits.y_validation)
    x, y = digits.x_test, digits.y_test
    before, after = (m.predict(x, verbose=0).argmax(-1) for m in (sharp, calibrated))
    np.testing.assert_array_equal(before, after)
    reports = []
    for name, each in (("sharp", sharp), ("calibrated", calibrated)):
        kd.export(
            each,
            tmp_path / name,
            formats=("tflite",),
            precisions=("int8",),
            calibration=digits.x_train[:100],
            evaluation=(digits.x_validation, digits.y_validation),
            max_drop=0.1,
        )
        reports.append(kd.robust.evaluate(tmp_path / name, x, y))
    assert reports[1].ece < reports[0].ece
    assert reports[1].adversarial is None
    assert abs(reports[1].clean - reports[0].clean) < 0.03


def test_corruptions_without_a_threat_have_bounds_of_their_own(model, digits):
    x, y = digits.x_test[:20], digits.y_test[:20]
    given = {"corruptions": "contrast", "severities": 2}
    usual = kd.robust.evaluate(model, x, y, **given)
    wide = keras.Sequential([keras.Input(x.shape[1:]), layers.Rescaling(1 / 255), model])
    same = kd.robust.evaluate(wide, 255 * x, y, bounds=(0, 255), **given)
    assert same.corrupted == usual.corrupted


def test_bad_input_is_refused(model, digits):
    x, y = digits.x_test[:20], digits.y_test[:20]
    threat = kd.robust.Linf(0.1)
    for change, kind, words in (
        ({"corruptions": "contrst"}, ValueError, "Did you mean 'contrast'"),
        ({"corruptions": ["shift", "blur"]}, ValueError, "corruption is one of"),
        ({"severities": [0]}, ValueError, "severities"),
        ({"severities": [1.0]}, ValueError, "severities"),
        ({"severities": None}, ValueError, "severities"),
        ({"corruptions": "audio"}, ValueError, "'noise' is a corruption of audio"),
        ({"corruptions": ["contrast", "typos"]}, ValueError, "'typos' is a corruption of text"),
        ({"corruptions": 3}, TypeError, "`corruptions` is a name"),
        (
            {"corruptions": "contrast", "threat": None, "x": 2 * x},
            ValueError,
            "outside of the bounds",
        ),
        ({"bounds": (0, 2)}, ValueError, "not those of the threat"),
        ({"queries": 0}, ValueError, "queries"),
        ({"seed": -1}, ValueError, "seed"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"calibrate_on": (np.full_like(x, np.nan), y)}, ValueError, "calibrate_on"),
        ({"second_opinion": "foolbox"}, ValueError, "'art'"),
        ({"threat": None, "second_opinion": "art"}, ValueError, "no `threat`"),
        ({"threat": 8 / 255}, TypeError, "Linf"),
        ({"threat": kd.robust.Linf(0.1, bounds=(0.2, 1))}, ValueError, "bounds"),
        ({"y": y[:5]}, ValueError, "each of the 20 rows"),
        ({"calibrate_on": x}, TypeError, "held-out"),
        ({"calibrate_on": (x[:, :4], y)}, ValueError, "rows of shape"),
        ({"twin": model}, ValueError, "exported file"),
        ({"x": x[:0], "y": y[:0]}, ValueError, "no rows"),
        ({"x": np.array(["a"] * 20)}, TypeError, "corrupt"),
        ({"model": "nowhere.tflite"}, FileNotFoundError, "nowhere"),
        ({"model": layers.Dense(10)}, TypeError, r"keras\.Model"),
    ):
        begun = []
        given = {"model": model, "x": x, "y": y, "threat": threat, **change}
        with pytest.raises(kind, match=words):
            kd.robust.evaluate(progress=lambda *said, to=begun: to.append(said), **given)
        assert not begun
