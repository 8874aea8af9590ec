"""Threats and attacks, against NumPy, and the traps of adversarial evaluation."""

import keras
import numpy as np
import pytest
from keras import layers
from small_models import CLASSES, FEATURES, hard_loss, mlp, rows

import keras_kd as kd
from keras_kd.robust import formulas, square
from keras_kd.robust.attacks import ascend

THREATS = {
    "linf": kd.robust.Linf(0.3, step=0.1, steps=5, bounds=(-4, 4)),
    "l2": kd.robust.L2(0.7, step=0.2, steps=5, restarts=2, bounds=(-4, 4)),
}


def gradient(model, x, labels):
    """Of the crossentropy of the model with `hidden` (tanh) and `logits`, by the chain rule."""
    w1, b1, w2, b2 = (np.asarray(w, "float64") for w in model.get_weights())
    hidden = np.tanh(x @ w1 + b1)
    z = hidden @ w2 + b2
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return ((p - np.eye(CLASSES)[labels]) @ w2.T * (1 - hidden**2)) @ w1.T


def inside(threat, attacked, x):
    change = (attacked - x).reshape(len(x), -1)
    length = np.abs(change).max(-1) if threat.norm == "Linf" else np.linalg.norm(change, axis=-1)
    low, high = threat.bounds
    assert (length <= threat.epsilon * (1 + 1e-5)).all()
    assert attacked.min() >= low
    assert attacked.max() <= high


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(3)
    found = mlp()
    found.set_weights([2 * w for w in found.get_weights()])
    return found


@pytest.fixture(scope="module")
def data(model):
    x, y = rows(24)
    right = model.predict(x, verbose=0).argmax(-1)
    # Three rows are wrong as they are.
    y = np.where(np.arange(24) < 3, (right + 1) % CLASSES, right)
    return x, y


def test_fgsm_is_one_signed_step(model, data):
    x, y = data
    for threat in THREATS.values():
        got = kd.robust.attack(model, x, y, threat, kind="fgsm")
        g = gradient(model, x.astype("float64"), y)
        if threat.norm == "Linf":
            unit = np.sign(g)
        else:
            unit = g / np.linalg.norm(g, axis=-1, keepdims=True)
        expected = np.clip(x + threat.epsilon * unit, -4, 4)
        np.testing.assert_allclose(got[3:], expected[3:], atol=2e-5)
        # What is wrong as it is needs no attack.
        np.testing.assert_array_equal(got[:3], x[:3])


@pytest.mark.parametrize("name", THREATS)
def test_pgd_walks_as_written(model, data, name):
    x, y = data
    threat = THREATS[name].with_changes(restarts=1, step=THREATS[name].step)
    got = kd.robust.attack(model, x, y, threat, kind="pgd", seed=4, batch_size=7)
    at = x + threat.noise(x.shape, (4, 0))
    at = np.clip(at, -4, 4).astype("float64")
    for _ in range(threat.steps):
        g = gradient(model, at, y)
        if name == "linf":
            at = np.clip(at + 0.1 * np.sign(g), x - 0.3, x + 0.3)
        else:
            at = at + 0.2 * g / np.linalg.norm(g, axis=-1, keepdims=True)
            length = np.linalg.norm(at - x, axis=-1, keepdims=True)
            at = x + (at - x) * np.minimum(1, 0.7 / length)
        at = np.clip(at, -4, 4)
    np.testing.assert_allclose(got[3:], at[3:], atol=1e-4)
    inside(threat, got, x)


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "square"])
@pytest.mark.parametrize("name", THREATS)
def test_attacks_stay_inside_and_find_something(model, data, kind, name):
    x, y = data
    threat = THREATS[name]
    got = kd.robust.attack(model, x, y, threat, kind=kind, queries=60, seed=1)
    assert got.dtype == "float32"
    inside(threat, got, x)
    before = hard_loss(model.predict(x, verbose=0), y)
    after = hard_loss(model.predict(got, verbose=0), y)
    assert after[3:].mean() > before[3:].mean() + 0.1
    again = kd.robust.attack(model, x, y, threat, kind=kind, queries=60, seed=1, batch_size=5)
    np.testing.assert_allclose(again, got, atol=1e-5)


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "square"])
def test_targeted_attacks_reach_their_class(model, data, kind):
    x, y = data
    target = (y + 1) % CLASSES
    threat = kd.robust.Linf(2.0, steps=20, bounds=(-6, 6))
    got = kd.robust.attack(model, x, target, threat, kind=kind, targeted=True, queries=200)
    reached = (model.predict(got, verbose=0).argmax(-1) == target).mean()
    start = (model.predict(x, verbose=0).argmax(-1) == target).mean()
    # One step of the length of the ball overshoots.
    assert reached >= start + (0.1 if kind == "fgsm" else 0.5)


def test_restarts_keep_the_worst(model, data):
    x, y = data
    kept = []
    for restarts in (1, 4):
        threat = kd.robust.Linf(0.2, step=0.05, steps=2, restarts=restarts, bounds=(-4, 4))
        got = kd.robust.attack(model, x, y, threat, seed=0)
        kept.append(hard_loss(model.predict(got, verbose=0), y))
    assert (kept[1] >= kept[0] - 1e-5).all() or (kept[1] > 0.6).all()
    assert kept[1].mean() >= kept[0].mean()


def test_noise_is_spread_evenly_over_the_ball():
    cube = kd.robust.Linf(0.5).noise((4000, 2), (0,))
    assert np.abs(cube).max() <= 0.5
    np.testing.assert_allclose(np.abs(cube).mean(), 0.25, atol=0.01)
    disk = kd.robust.L2(0.5).noise((4000, 2), (0,))
    radius = np.linalg.norm(disk, axis=-1)
    assert radius.max() <= 0.5 + 1e-6
    # In two dimensions the mean radius of an even spread is two thirds.
    np.testing.assert_allclose(radius.mean(), 0.5 * 2 / 3, atol=0.01)


def test_softmax_models_are_attacked_at_their_logits(data):
    """Trap: gradients through saturated probabilities vanish."""
    x, _ = data
    keras.utils.set_random_seed(3)
    plain, softmax = mlp(), mlp(activation="softmax")
    steep = [60 * w for w in plain.get_weights()]
    plain.set_weights(steep)
    softmax.set_weights(steep)
    labels = plain.predict(x, verbose=0).argmax(-1)
    threat = kd.robust.Linf(0.3, steps=5, bounds=(-4, 4))
    expected = kd.robust.attack(plain, x, labels, threat)
    np.testing.assert_array_equal(kd.robust.attack(softmax, x, labels, threat), expected)
    assert not np.array_equal(expected, x)


def test_inner_steps_leave_batch_norm_alone(data):
    x, y = data
    keras.utils.set_random_seed(0)
    inputs = keras.Input((FEATURES,))
    h = layers.BatchNormalization()(layers.Dense(5, activation="relu")(inputs))
    model = keras.Model(inputs, layers.Dense(CLASSES)(layers.Dropout(0.5)(h)))
    before = model.get_weights()
    first = kd.robust.attack(model, x, y, THREATS["linf"])
    np.testing.assert_array_equal(kd.robust.attack(model, x, y, THREATS["linf"]), first)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_unit_and_own_decisions(data):
    x, _ = data
    model = mlp(classes=1)
    own = kd.robust.attack(model, x, None, THREATS["linf"], kind="pgd")
    y = (model.predict(x, verbose=0)[:, 0] > 0).astype(int)
    np.testing.assert_array_equal(
        own, kd.robust.attack(model, x, y[:, None], THREATS["linf"], kind="pgd")
    )
    w1, b1, w2, _ = (np.asarray(w, "float64") for w in model.get_weights())
    got = kd.robust.attack(model, x, y, THREATS["linf"], kind="fgsm")
    hidden = np.tanh(x @ w1 + b1)
    slope = (1 - hidden**2) * w2[:, 0] @ w1.T * np.where(y, -1, 1)[:, None]
    np.testing.assert_allclose(got, np.clip(x + 0.3 * np.sign(slope), -4, 4), atol=1e-5)


def test_square_on_images_works_with_answers_alone():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(6, 8, 8, 3)).astype("float32")
    # Blocks of 4 by 4 pixels count together, as shapes do in images.
    weights = np.kron(rng.normal(size=(2, 2, 9)), np.ones((4, 4, 1))).reshape(192, 3)
    asked = []

    def predict(rows, batch_size):
        asked.append(len(rows))
        return rows.reshape(len(rows), -1) @ weights

    y = predict(x, 1).argmax(-1)

    def margin(rows):
        logits = np.sort(predict(rows, 1), axis=-1)
        return (logits[:, -1] - logits[:, -2]) * np.where(predict(rows, 1).argmax(-1) == y, 1, -1)

    for threat in (kd.robust.Linf(0.2), kd.robust.L2(1.5)):
        asked.clear()
        got = square.search(predict, x, y, threat, 150, 0)
        inside(threat, got, x)
        searches = sum(asked)
        assert (margin(got) < margin(x)).all()
        assert (margin(got) < 0).sum() >= (3 if threat.norm == "Linf" else 1)
        # Rows that are done cost nothing more, and none is asked about more often than allowed.
        assert searches <= 6 * 151


def test_divergences_are_summed_over_classes():
    """Trap: reference implementations average over the classes."""
    rng = np.random.default_rng(0)
    for classes in (3, 30):
        p, q = rng.normal(size=(2, 4, classes)).astype("float32")
        y = rng.integers(0, classes, 4)

        def log_softmax(z):
            return z - np.log(np.exp(z).sum(-1, keepdims=True))

        for temperature in (1.0, 4.0):
            log_p, log_q = (log_softmax(z.astype("float64") / temperature) for z in (p, q))
            expected = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
            np.testing.assert_allclose(formulas.divergence(p, q, temperature), expected, rtol=1e-4)
        expected = -log_softmax(p.astype("float64"))[np.arange(4), y]
        np.testing.assert_allclose(formulas.crossentropy(p, y), expected, rtol=1e-5)
        np.testing.assert_allclose(formulas.probability_of(p, y), np.exp(-expected), rtol=1e-4)


def test_a_gradient_that_is_no_number_moves_nothing():
    x = np.full((2, 3), 0.5, "float32")
    got = ascend(lambda at: keras.ops.sum(keras.ops.sqrt(at * 0.0), -1), x, x, kd.robust.Linf(0.1))
    np.testing.assert_allclose(got, x)


BAD = {
    "epsilon 0": (lambda: kd.robust.Linf(0), ValueError, "greater than 0"),
    "epsilon negative": (lambda: kd.robust.L2(-0.1), ValueError, "greater than 0"),
    "epsilon NaN": (lambda: kd.robust.L2(float("nan")), ValueError, "finite"),
    "epsilon text": (lambda: kd.robust.Linf("8/255"), TypeError, "number"),
    "step 0": (lambda: kd.robust.Linf(0.1, step=0), ValueError, "greater than 0"),
    "steps half": (lambda: kd.robust.Linf(0.1, steps=1.5), TypeError, "whole number"),
    "steps 0": (lambda: kd.robust.Linf(0.1, steps=0), ValueError, "at least 1"),
    "restarts 0": (lambda: kd.robust.Linf(0.1, restarts=0), ValueError, "at least 1"),
    "bounds turned": (lambda: kd.robust.Linf(0.1, bounds=(1, 0)), ValueError, "lesser"),
    "bounds of channels": (
        lambda: kd.robust.Linf(0.1, bounds=((0, 0), (1, 1))),
        TypeError,
        "the same for all channels",
    ),
    "bounds one": (lambda: kd.robust.Linf(0.1, bounds=1), TypeError, "bounds"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_threat_is_refused(name):
    make, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        make()


def words_model():
    words = keras.Input((FEATURES,), dtype="int32")
    return keras.Model(words, layers.Dense(3)(layers.Flatten()(layers.Embedding(5, 2)(words))))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"kind": "pdg"}, ValueError, "Did you mean 'pgd'"),
        ({"threat": 0.1}, TypeError, "Linf"),
        ({"threat": kd.robust.Linf(0.1)}, ValueError, "outside of the threat's bounds"),
        ({"x": np.zeros((24, 6), "uint8")}, TypeError, "floating-point"),
        ({"x": np.full((24, 6), np.nan, "float32")}, ValueError, "NaN"),
        ({"y": np.zeros(5, int)}, ValueError, "class number for each"),
        ({"y": np.full(24, CLASSES)}, ValueError, "classes"),
        # A row without a label, and one of several, would have been class 0.
        ({"y": np.zeros((24, CLASSES))}, ValueError, "24 of 24 rows are not one-hot"),
        ({"y": np.ones((24, CLASSES), int)}, ValueError, "not one-hot"),
        ({"y": np.ma.masked_equal(np.arange(24) % 2, 0)}, ValueError, "12 values.*are masked"),
        ({"x": np.zeros((24, 5), "float32")}, ValueError, "reads inputs of shape"),
        ({"x": np.zeros(24, "float32")}, ValueError, "reads inputs of shape"),
        ({"model": words_model()}, TypeError, "reads int32, which rounds them off"),
        ({"y": None, "targeted": True}, ValueError, "needs `y`"),
        ({"kind": "square", "queries": 0}, ValueError, "queries"),
        ({"queries": 2.5}, TypeError, "queries"),
        ({"seed": -1}, ValueError, "`seed` is at least 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` is at least 1"),
        ({"from_logits": "yes"}, TypeError, "`from_logits` is True, False"),
        ({"model": "nowhere.keras"}, FileNotFoundError, "nowhere"),
        ({"model": object()}, TypeError, r"keras\.Model"),
    ],
)
def test_bad_input_is_refused(model, data, change, kind, words):
    x, y = data
    given = {"model": model, "x": x, "y": y, "threat": THREATS["linf"], **change}
    with pytest.raises(kind, match=words):
        kd.robust.attack(**given)


def test_models_of_other_shapes_are_refused(data):
    x, y = data
    first, second = keras.Input((FEATURES,)), keras.Input((FEATURES,))
    two = keras.Model([first, second], layers.Dense(3)(layers.add([first, second])))
    heads = keras.Model(first, [layers.Dense(3)(first), layers.Dense(3)(first)])
    tokens = keras.Model(first, layers.RepeatVector(2)(layers.Dense(3)(first)))
    several = mlp(activation="sigmoid")
    for model, words in ((two, "one input"), (heads, "one output"), (tokens, "one decision")):
        with pytest.raises(ValueError, match=words):
            kd.robust.attack(model, x, y, THREATS["linf"])
    with pytest.raises(ValueError, match="independent"):
        kd.robust.attack(several, x, y, THREATS["linf"])


def test_a_threat_tells_of_itself():
    threat = kd.robust.Linf(0.1, steps=10, bounds=None)
    assert str(threat) == "Linf 0.1, 10 steps of 0.025, no bounds"
    assert threat == kd.robust.Linf.from_config(threat.get_config())
    assert threat.with_changes(steps=50).step == pytest.approx(0.005)
    assert threat != kd.robust.L2(0.1, steps=10, bounds=None)
    assert eval(repr(threat), {"Linf": kd.robust.Linf}) == threat
