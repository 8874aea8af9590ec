"""`keras.config.set_floatx`: everything trains in double and in half precision as in single."""

import keras
import numpy as np
import pytest
from keras import layers
from small_models import crossentropy, hard_loss, kl

import keras_kd as kd
from keras_kd.distill import training_metrics

FLOATS = ("float64", "float16")


@pytest.fixture
def floatx():
    """Sets the precision; what was set before comes back."""
    before, policy = keras.config.floatx(), keras.config.dtype_policy()

    def use(precision):
        keras.config.set_floatx(precision)
        # What layers of before have fixed; a process that begins with `set_floatx` has not.
        keras.config.set_dtype_policy(precision)

    yield use
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)


def _seeded(model, seed):
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(0, 0.7, w.shape) for w in model.get_weights()])
    return model


def _images(width, name):
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(width, 3, padding="same", activation="relu", name="map")(inputs)
    x = layers.MaxPooling2D(name="small")(x)
    x = layers.Dense(6, activation="tanh", name="hidden")(layers.Flatten()(x))
    return _seeded(keras.Model(inputs, layers.Dense(4, name="logits")(x), name=name), width)


def _tokens(width, name):
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, width, mask_zero=True, name="words")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Dense(6, name="hidden")(x)
    return _seeded(keras.Model(inputs, layers.Dense(4, name="logits")(x), name=name), width)


def _both(loss, layer):
    return kd.Transfer(loss, layer, layer)


def _logit_losses():
    found = [
        kd.losses.SoftTargets(),
        kd.losses.SoftTargets(kd.losses.FLSW(base=4.0), name="focal"),
        kd.losses.SoftTargets(kd.losses.CWSM(), standardize=True, name="confidence"),
        kd.losses.ReverseKL(),
        kd.losses.JensenShannon(),
        kd.losses.TotalVariation(),
        kd.losses.LogitMSE(),
        kd.losses.LogitHuber(),
        kd.losses.DecoupledKD(),
        kd.losses.DIST(),
    ]
    return [*found, kd.Transfer(keras.losses.MeanSquaredError(name="of_keras"))]


def _feature_losses():
    names = ("SimilarityPreserving", "RKD", "CorrelationCongruence", "PKT")
    found = [_both(getattr(kd.losses, name)(), "hidden") for name in names]
    found += [_both(getattr(kd.losses, name)(), "map") for name in ("AttentionTransfer", "NST")]
    return [*found, _both(kd.losses.Hint(), "hidden"), _both(kd.losses.FactorTransfer(), "hidden")]


def _learning_losses():
    """With layers of their own, which start from other numbers in every precision."""
    levels = ["map", "small"]
    return [
        _both(kd.losses.VID(), "map"),
        _both(kd.losses.CRD(width=4), "hidden"),
        _both(kd.losses.CRD(samples=8, negatives=4, width=4, name="memory"), "hidden"),
        _both(kd.losses.FactorTransfer(0.5, name="factors"), "map"),
        _both(kd.losses.ReviewKD(), levels),
        _both(kd.losses.SimKD(), "small"),
        kd.Transfer(kd.losses.Hint(name="linear"), "map", "map", projector="linear"),
        kd.Transfer(kd.losses.Hint(name="auto"), "small", "map", projector="auto"),
    ]


def _token_losses():
    parts = [f"attention:{part}" for part in ("query", "key", "value")]
    return [
        kd.losses.SoftTargets(),
        kd.losses.DIST(),
        _both(kd.losses.HiddenState(), "hidden"),
        _both(kd.losses.HiddenState("cosine", name="cosine"), "hidden"),
        _both(kd.losses.AttentionScores(), "attention:scores"),
        _both(kd.losses.MiniLM(2), parts),
        _both(kd.losses.PKD(), "hidden"),
        _both(kd.losses.PKT(), "hidden"),
    ]


KINDS = {
    "logits": (_images, _logit_losses),
    "features": (_images, _feature_losses),
    "layers": (_images, _learning_losses),
    "tokens": (_tokens, _token_losses),
}


def _data(build):
    rng = np.random.default_rng(0)
    if build is _tokens:
        y = rng.integers(0, 4, (8, 5))
        return rng.integers(0, 9, (8, 5)), np.where(rng.random(y.shape) < 0.8, y, -1)
    return rng.normal(size=(8, 6, 6, 2)), rng.integers(0, 4, 8)


def _logs(build, losses, teacher=None, **options):
    x, y = _data(build)
    student = build(3, "student")
    assert student.get_layer("logits").compute_dtype == keras.config.floatx()
    distiller = kd.Distiller(student, teacher or build(4, "teacher"))
    distiller.compile(
        keras.optimizers.SGD(0.0),
        crossentropy(ignore_class=-1),
        metrics=["accuracy"],
        distillation_loss=losses,
        run_eagerly=options.pop("eager", True),
    )
    weight = np.linspace(0, 2, 8)
    logs = distiller.fit(x, y, sample_weight=weight, batch_size=8, verbose=0, **options).history
    found = distiller.evaluate(x, y, verbose=0, return_dict=True)
    assert np.isfinite(found["loss"])
    return {name: values[-1] for name, values in logs.items()}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("precision", FLOATS)
def test_every_loss_trains(floatx, precision, kind):
    build, losses = KINDS[kind]
    single = _logs(build, losses())
    floatx(precision)
    found = _logs(build, losses())
    assert single.keys() == found.keys()
    assert all(np.isfinite(value) for value in found.values())
    if kind != "layers":
        tolerance = {"rtol": 1e-4, "atol": 1e-6}
        if precision == "float16":
            # Where halves lie close together a logit may change its rank.
            tolerance = {"rtol": 0.05, "atol": 0.01}
        for name, value in single.items():
            if name not in ("accuracy", "agreement") or precision == "float64":
                np.testing.assert_allclose(found[name], value, err_msg=name, **tolerance)


@pytest.mark.parametrize("precision", FLOATS)
def test_a_compiled_step_and_a_cache(floatx, precision, tmp_path):
    """The same numbers as live, in double precision as far as the cache's float32 goes."""
    floatx(precision)
    for build in (_images, _tokens):
        teacher = build(4, "teacher")
        live = _logs(build, None, teacher, eager=False)
        path = tmp_path / build.__name__
        kd.cache.write(teacher, _data(build)[0], path, dtype="float32")
        cached = _logs(build, None, kd.teachers.CachedTeacher(path), eager=False)
        for name, value in live.items():
            # Two halves that lie side by side are 1e-3 apart.
            near = {"rtol": 1e-5, "atol": 1e-7} if precision == "float64" else {"rtol": 3e-3}
            np.testing.assert_allclose(cached[name], value, err_msg=name, **near)
        both = kd.teachers.CachedTeacher([path, path])
        assert np.isfinite(_logs(build, None, both)["loss"])


@pytest.mark.parametrize("precision", FLOATS)
def test_the_numbers_themselves(floatx, precision):
    floatx(precision)
    student, teacher = _images(3, "student"), _images(4, "teacher")
    x, y = _data(_images)
    z_t, z_s = (model.predict(x, verbose=0).astype("float64") for model in (teacher, student))
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), crossentropy(), alpha=0.25, temperature=2.0)
    logs = distiller.fit(x, y, batch_size=8, verbose=0).history
    rtol = {"float64": 1e-12, "float16": 2e-3}[precision]
    hard, soft = hard_loss(z_s, y).mean(), kl(z_t, z_s, 2.0).mean()
    # Alpha and the temperature are float32, of which 0.25 and 2 are numbers.
    np.testing.assert_allclose(logs["student_loss"][0], hard, rtol=rtol)
    np.testing.assert_allclose(logs["distillation_loss"][0], soft, rtol=rtol)
    np.testing.assert_allclose(logs["loss"][0], 0.25 * hard + 0.75 * soft, rtol=rtol)


def test_more_samples_are_counted_than_a_half_holds(floatx):
    """A mean of Keras in float16 is NaN from 65504 samples on."""
    floatx("float16")
    books = training_metrics.TrainingMetrics()
    books.keep(["agreement"])
    for value in (1.0, 0.0):
        books.add("agreement", np.full(50_000, value), None)
    assert float(books.means["agreement"].result()) == 0.5


@pytest.mark.parametrize("precision", FLOATS)
def test_the_rest_of_the_package(floatx, precision, tmp_path):
    """Annealing, balancing, several teachers, peers, exits, saving and measuring."""
    floatx(precision)
    x, y = _data(_images)
    student, teacher = _images(3, "student"), _images(4, "teacher")
    distiller = kd.Distiller(student, [teacher, _images(5, "other")])
    hint = kd.Transfer(kd.losses.Hint(), "teacher/hidden", "hidden", projector="linear")
    distiller.compile(
        "adam",
        crossentropy(),
        distillation_loss=[kd.losses.SoftTargets(), hint],
        run_eagerly=True,
    )
    callbacks = [
        kd.callbacks.TemperatureAnnealing(4.0, 1.0, epochs=2),
        kd.callbacks.AlphaAnnealing(0.2, 0.5, epochs=2),
        kd.callbacks.TransferWeightAnnealing("hint", 0.0, 1.0, epochs=2),
    ]
    logs = distiller.fit(x, y, epochs=2, verbose=0, callbacks=callbacks).history
    assert all(np.isfinite(values).all() for values in logs.values())
    terms = distiller.term_losses((x, y))
    norms = distiller.gradient_norms((x, y))
    assert terms.keys() == norms.keys()
    assert all(np.isfinite(value) for value in (*terms.values(), *norms.values()))
    balancing = kd.callbacks.LossBalancing()
    logs = distiller.fit(x, y, verbose=0, callbacks=[balancing]).history
    assert np.isfinite(logs["loss"][0])
    distiller.save(tmp_path / "d.keras")
    again = kd.load_distiller(tmp_path / "d.keras", teacher=[teacher, _images(5, "other")])
    assert np.isfinite(again.fit(x, y, verbose=0).history["loss"][0])
    peers = kd.MutualLearning([_images(3, "a"), _images(4, "b")])
    peers.compile("sgd", crossentropy(), metrics=["accuracy"], run_eagerly=True)
    assert np.isfinite(peers.fit(x, y, verbose=0).history["loss"][0])
