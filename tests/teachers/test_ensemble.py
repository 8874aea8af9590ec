"""Weights of an ensemble that are not given by hand: by confidence, and learned on labels."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from scipy import optimize, special
from small_models import CLASSES, FEATURES, crossentropy, kl, log_softmax, mlp, rows

import keras_kd as kd
from keras_kd.teachers import Ensemble, mixtures


def three(scale=4, **options):
    models = [mlp(width=7, name=f"teacher{i}", **options) for i in range(3)]
    for model in models:
        model.set_weights([scale * w for w in model.get_weights()])
    return models


def entropy_weights(each, binary=False):
    """`softmax(-H)` over models, `(models, rows, 1 or units)`."""
    if binary:
        p = special.expit(each)
        entropy = special.entr(p) + special.entr(1 - p)
    else:
        entropy = special.entr(np.exp(log_softmax(each))).sum(-1, keepdims=True)
    return special.softmax(-entropy, axis=0)


def mixed(each, weights, combine, binary=False):
    each = np.asarray(each, "float64")
    if combine == "logits":
        return (weights * each).sum(0)
    if binary:
        return special.logit((weights * special.expit(each)).sum(0))
    return np.log((weights * np.exp(log_softmax(each))).sum(0))


# -------------------------------------------------------------------- confidence


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_confidence_is_the_softmax_of_negative_entropy(combine, binary):
    each = np.random.default_rng(0).normal(scale=3, size=(3, 20, 5))
    logits = [ops.convert_to_tensor(z, "float32") for z in each]
    got = mixtures.combined(logits, "confidence", combine, binary)
    expected = mixed(each, entropy_weights(each, binary), combine, binary)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


def test_two_models_weigh_as_in_ca_mkd_with_entropy_for_crossentropy():
    each = np.random.default_rng(1).normal(scale=3, size=(2, 9, 4))
    entropy = special.entr(np.exp(log_softmax(each))).sum(-1)
    reference = 1 - special.softmax(entropy, axis=0)
    got = mixtures.log_confidence([ops.convert_to_tensor(z, "float32") for z in each], False)
    np.testing.assert_allclose(np.exp(np.stack(got))[..., 0], reference, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_extreme_logits_stay_finite(combine, binary, dtype):
    big = 1e4 * np.array([[1.0, 0, 0], [0, -1, 1], [0, 0, 0]])
    logits = [ops.cast(ops.convert_to_tensor(z), dtype) for z in (big, -big, big[::-1].copy())]
    got = ops.convert_to_numpy(mixtures.combined(logits, "confidence", combine, binary))
    assert got.dtype == "float32"
    assert np.isfinite(got).all()
    # In the last row the third model is sure and the others know nothing.
    if combine == "logits":
        weight = 1 / (1 + 2 * (1 / 2 if binary else 1 / 3))
        assert got[2, 0] == pytest.approx(weight * 1e4, rel=1e-2)


def test_a_ruled_out_class_has_no_say_in_the_entropy():
    z = np.array([[0.0, 1.0, -np.inf]], "float32")
    got = mixtures.log_confidence([ops.convert_to_tensor(z), ops.zeros((1, 2 + 1))], False)
    entropy = [special.entr(special.softmax(z)).sum(), np.log(3)]
    np.testing.assert_allclose(
        np.exp(np.ravel(got)), special.softmax(-np.array(entropy)), rtol=1e-5
    )


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_the_distiller_reads_it(combine):
    models, student = three(), mlp(name="student")
    x, _ = rows()
    distiller = kd.Distiller(student, Ensemble(models, "confidence", combine))
    distiller.compile(keras.optimizers.SGD(0.0), loss=None, temperature=2.0)
    got = distiller.train_on_batch(x, return_dict=True)["distillation_loss"]
    each = np.array([model(x) for model in models], "float64")
    expected = kl(mixed(each, entropy_weights(each), combine), student(x), 2.0).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_one_unit_is_weighed_as_a_probability_or_refused():
    models = [mlp(classes=1, activation="sigmoid", name=f"m{i}") for i in range(2)]
    distiller = kd.Distiller(
        mlp(classes=1, activation="sigmoid", name="s"), Ensemble(models, "confidence")
    )
    distiller.compile("sgd", loss=None, run_eagerly=True)
    assert np.isfinite(distiller.train_on_batch(rows()[0], return_dict=True)["loss"])
    regressors = [mlp(classes=1, name=f"m{i}") for i in range(2)]
    distiller = kd.Distiller(mlp(classes=1, name="s"), Ensemble(regressors, "confidence"))
    distiller.compile("sgd", loss=None, distillation_loss=kd.losses.LogitMSE())
    with pytest.raises(ValueError, match="'confidence'.*one unit"):
        distiller.fit(rows()[0], verbose=0)


# ----------------------------------------------------------------------- learned


def held_out(models, count=60, seed=3):
    """Labels that the second model predicts best, and the first at times."""
    x, _ = rows(count, seed=seed)
    rng = np.random.default_rng(seed)
    p = special.softmax(np.array(models[1](x)), axis=-1)
    p[: count // 3] = special.softmax(np.array(models[0](x)), axis=-1)[: count // 3]
    return x, np.array([rng.choice(p.shape[1], p=row / row.sum()) for row in p.astype("float64")])


def objective(each, y, combine, weight=None):
    """The cross-entropy of the mixture as SciPy sees it."""

    def value(w):
        if combine == "logits":
            log_p = log_softmax(np.einsum("k,knc->nc", w, each))
        else:
            log_p = np.log(np.einsum("k,knc->nc", w, np.exp(log_softmax(each))))
        return -np.average(log_p[np.arange(len(y)), y], weights=weight)

    return value


def least(value, count=3):
    found = optimize.minimize(
        value,
        np.full(count, 1 / count),
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return found.x, found.fun


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_learned_weights_are_those_of_scipy(combine, weighted):
    models = three()
    x, y = held_out(models)
    weight = np.random.default_rng(5).uniform(0, 2, len(x)) if weighted else None
    each = np.array([model(x) for model in models], "float64")
    value = objective(each, y, combine, weight)
    expected, minimum = least(value)
    teacher = Ensemble(models, combine=combine)
    before = teacher.fingerprint()
    got = teacher.learn_weights(x, y, weight, batch_size=17, tolerance=1e-9)
    assert value(np.array(got)) <= minimum + 1e-8
    np.testing.assert_allclose(got, expected, atol=2e-3)
    assert got == teacher.weights
    assert sum(got) == pytest.approx(1)
    assert value(np.array(got)) < value(np.full(3, 1 / 3)) - 1e-3
    assert teacher.fingerprint() != before


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_independent_units_learn_too(combine):
    models = three(classes=2, activation="sigmoid", scale=3)
    x, _ = rows(80)
    p = np.array([model(x) for model in models], "float64")
    y = (np.random.default_rng(0).uniform(size=p[1].shape) < p[1]).astype("int64")
    z = special.logit(p)

    def value(w):
        q = special.expit(np.einsum("k,knu->nu", w, z))
        if combine == "probabilities":
            q = np.einsum("k,knu->nu", w, p)
        return -np.mean(special.xlogy(y, q) + special.xlogy(1 - y, 1 - q))

    _, minimum = least(value)
    got = Ensemble(models, combine=combine).learn_weights(x, y, tolerance=1e-7)
    assert value(np.array(got)) <= minimum + 1e-5


def test_soft_labels_are_those_of_scipy():
    models = three()
    x, _ = rows(40)
    each = np.array([model(x) for model in models], "float64")
    y = special.softmax(np.random.default_rng(2).normal(size=(40, CLASSES)) + each[2], axis=-1)
    p = np.exp(log_softmax(each))
    _, minimum = least(lambda w: -(y * np.log(np.einsum("k,knc->nc", w, p))).sum(-1).mean())
    got = Ensemble(models).learn_weights(x, y)
    reached = -(y * np.log(np.einsum("k,knc->nc", np.array(got), p))).sum(-1).mean()
    assert reached <= minimum + 2e-6


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_a_useless_model_gets_no_weight_and_says_nothing(combine):
    models = three(scale=1)
    x, _ = rows(50)
    y = np.array(models[0](x)).argmax(-1)
    models[2].layers[-1].bias.assign([1e4, 0.0, 0.0, 0.0])
    teacher = Ensemble(models, combine=combine)
    weights = teacher.learn_weights(x[y != 0], y[y != 0])
    assert weights[2] < 1e-4
    each = [np.array(model(x), "float64") for model in models[:2]]
    teacher.weights = [*weights[:2], 0.0]
    expected = mixed(each, np.array(teacher.weights[:2])[:, None, None], combine)
    got = teacher.answer(x, None, [False]).logits[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_datasets_and_several_outputs():
    def forked(name):
        inputs = keras.Input((FEATURES,))
        heads = {
            "a": layers.Dense(3, name="a")(inputs),
            "b": layers.Dense(1, activation="sigmoid", name="b")(inputs),
        }
        model = keras.Model(inputs, heads, name=name)
        model.set_weights([3 * w for w in model.get_weights()])
        return model

    models = [forked(f"m{i}") for i in range(3)]
    x, a = rows(40, classes=3)
    b = np.random.default_rng(1).integers(0, 2, 40)
    each = [model(x) for model in models]
    pa = special.softmax(np.array([o["a"] for o in each], "float64"), axis=-1)
    pb = np.array([o["b"] for o in each], "float64")[..., 0]

    def value(w):
        qa, qb = np.einsum("k,knc->nc", w, pa), w @ pb
        return -np.log(qa[np.arange(40), a]).mean() - np.log(np.where(b, qb, 1 - qb)).mean()

    _, minimum = least(value)
    teacher = Ensemble(models)
    arrays = teacher.learn_weights(x, {"a": a, "b": b})
    assert value(np.array(arrays)) <= minimum + 2e-6

    class Batches(keras.utils.PyDataset):
        num_batches = 4

        def __getitem__(self, i):
            part = slice(10 * i, 10 * i + 10)
            return x[part], {"a": a[part], "b": b[part]}

    np.testing.assert_allclose(teacher.learn_weights(Batches()), arrays, rtol=1e-6)


def test_padded_positions_do_not_count():
    def tagger(name):
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Embedding(9, 6, mask_zero=True)(inputs)
        model = keras.Model(inputs, layers.Dense(3)(x), name=name)
        model.set_weights([20 * w for w in model.get_weights()])
        return model

    models = [tagger(f"m{i}") for i in range(3)]
    rng = np.random.default_rng(0)
    x = rng.integers(1, 9, (30, 5))
    x[:, 3:] *= rng.integers(0, 2, (30, 1))
    y = np.array(models[1](x)).argmax(-1)
    y[x == 0] = 2
    noisy = rng.uniform(size=y.shape) < 0.3
    y[noisy] = rng.integers(0, 3, noisy.sum())
    each = np.array([model(x) for model in models], "float64")
    _, minimum = least(objective(each[:, x > 0], y[x > 0], "probabilities"))
    got = Ensemble(models).learn_weights(x, y)
    value = objective(each[:, x > 0], y[x > 0], "probabilities")
    assert value(np.array(got)) <= minimum + 2e-6


def test_the_next_fit_takes_new_weights():
    models, student = three(), mlp(name="student")
    x, y = held_out(models, 40)
    teacher = Ensemble(models)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=None, temperature=1.0)
    each = np.array([model(x) for model in models], "float64")

    def logged():
        return distiller.fit(x, verbose=0, batch_size=40).history["distillation_loss"][0]

    def expected(weights):
        w = np.array(weights)[:, None, None]
        return kl(mixed(each, w, "probabilities"), student(x), 1.0).mean()

    assert logged() == pytest.approx(expected(teacher.weights), rel=1e-4)
    teacher.learn_weights(x, y)
    assert logged() == pytest.approx(expected(teacher.weights), rel=1e-4)
    teacher.weights = [1, 0, 0]
    assert logged() == pytest.approx(expected([1, 0, 0]), rel=1e-4)
    function = distiller.train_function
    distiller.fit(x, verbose=0)
    assert distiller.train_function is function


def test_another_weighing_is_another_teacher(tmp_path):
    models = [mlp(name="a"), mlp(name="b")]
    prints = {Ensemble(models, w).fingerprint() for w in (None, [2, 1], [1, 0], "confidence")}
    assert len(prints) == 4
    distiller = kd.Distiller(mlp(name="student"), Ensemble(models, "confidence"))
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    distiller.fit(*rows(), verbose=0)
    distiller.save(tmp_path / "d.keras")
    kd.load_distiller(tmp_path / "d.keras", teacher=Ensemble(models, "confidence"))
    with pytest.raises(ValueError, match="Pass the same teacher"):
        kd.load_distiller(tmp_path / "d.keras", teacher=Ensemble(models))


def test_caches_weigh_by_confidence_too(tmp_path):
    models = three()
    x, _ = rows()
    for i, model in enumerate(models):
        kd.cache.write(model, x, tmp_path / f"{i}", dtype="float32")
    cached = kd.teachers.CachedTeacher([tmp_path / f"{i}" for i in range(3)], weights="confidence")
    record = {k: ops.convert_to_tensor(v) for k, v in cached.fetch(np.arange(len(x))).items()}
    got = cached.answer(None, record, [False]).logits[0]
    live = Ensemble(models, "confidence").answer(x, None, [False]).logits[0]
    np.testing.assert_allclose(got, live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": None}, "there are none"),
        ({"y": np.zeros(5, int)}, "same number of rows"),
        ({"y": np.full(12, 7)}, "classes 0 to 3"),
        ({"y": np.zeros(12)}, "needs integers"),
        ({"y": np.full((12, CLASSES), 2.0)}, r"probabilities in \[0, 1\]"),
        ({"y": np.full(12, np.nan)}, "finite numbers"),
        ({"sample_weight": np.zeros(12)}, "not all zero"),
        ({"sample_weight": np.ones((12, 3))}, "`sample_weight`.*shape"),
        ({"tolerance": 0.0}, "`tolerance` must be positive"),
        ({"batch_size": 0}, "`batch_size` must be positive"),
        ({"x": np.full((12, FEATURES), np.nan, "float32")}, "NaN or infinite"),
    ],
)
def test_bad_input_leaves_the_weights(arguments, message):
    x, y = rows()
    teacher = Ensemble([mlp(name="a"), mlp(name="b")], [3, 1])
    with pytest.raises(ValueError, match=message):
        teacher.learn_weights(**{"x": x, "y": y, **arguments})
    assert teacher.weights == [0.75, 0.25]


def test_a_search_that_ends_too_soon_says_so():
    models = three()
    x, y = held_out(models)
    with pytest.warns(UserWarning, match="not within tolerance"):
        Ensemble(models).learn_weights(x, y, max_iterations=1)


def test_bad_weights():
    models = [mlp(name="a"), mlp(name="b")]
    with pytest.raises(ValueError, match="'confidence' or None.*'confident'"):
        Ensemble(models, "confident")
    with pytest.raises(ValueError, match="one positive number"):
        Ensemble(models, [0, 0])
    teacher = Ensemble(models)
    with pytest.raises(ValueError, match="one positive number"):
        teacher.weights = [1.0]
    assert teacher.weights == [0.5, 0.5]


# ------------------------------------------------------------------------- inputs


def reads(name, sizes):
    """A model of a dict of inputs; its answer is linear in each."""
    inputs = {key: keras.Input((size,), name=key) for key, size in sizes.items()}
    parts = [layers.Dense(CLASSES)(tensor) for tensor in inputs.values()]
    return keras.Model(inputs, layers.Add()(parts) if len(parts) > 1 else parts[0], name=name)


@pytest.mark.parametrize("eager", [True, False])
def test_each_model_reads_the_inputs_that_it_declares(eager):
    rng = np.random.default_rng(0)
    sizes = {"audio": 4, "depth": 3, "image": 6}
    x = {key: rng.normal(size=(12, size)).astype("float32") for key, size in sizes.items()}
    sound, sight = reads("sound", {"audio": 4}), reads("sight", {"image": 6, "depth": 3})
    teacher = Ensemble([sound, sight], combine="logits")
    logits = [
        sound.predict({"audio": x["audio"]}, verbose=0),
        sight.predict({key: x[key] for key in ("depth", "image")}, verbose=0),
    ]
    student = reads("student", {"image": 6})
    z = student.predict({"image": x["image"]}, verbose=0)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), crossentropy(), temperature=2.0, run_eagerly=eager)
    y = rng.integers(0, CLASSES, 12)
    history = distiller.fit(x, y, verbose=0).history
    expected = kl((logits[0] + logits[1]) / 2, z, 2.0).mean()
    np.testing.assert_allclose(history["distillation_loss"], [expected], rtol=1e-5)
    np.testing.assert_allclose(distiller.predict(x, verbose=0), z, rtol=1e-5, atol=1e-6)
    weights = teacher.learn_weights(x, y)
    np.testing.assert_allclose(sum(weights), 1.0)


# --------------------------------------------------------------------- what is mixed


def _distilled(student, teacher, x, y, loss, **options):
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True, **options)
    history = distiller.fit(x, y, verbose=0, batch_size=len(x)).history
    return history["distillation_loss"][0]


def test_models_of_one_unit_that_regress_are_averaged():
    x = rows(8)[0]
    inputs = keras.Input((FEATURES,))
    models = [keras.Model(inputs, layers.Dense(1)(inputs), name=name) for name in "abc"]
    student = keras.Model(inputs, layers.Dense(1)(inputs), name="student")
    found = _distilled(
        student,
        Ensemble(models[:2], weights=[1, 3]),
        x,
        np.zeros(8),
        "mse",
        distillation_loss=kd.losses.LogitMSE(),
    )
    a, b, s = (model.predict(x, verbose=0) for model in (*models[:2], student))
    np.testing.assert_allclose(found, np.mean((0.25 * a + 0.75 * b - s) ** 2), rtol=1e-4)


@pytest.mark.parametrize("which", ["both", "second"])
def test_losses_of_keras_read_the_probabilities_of_the_mixture(which):
    x = rows(8)[0]
    inputs = keras.Input((FEATURES,))

    def model(name, activation="softmax"):
        return keras.Model(inputs, layers.Dense(CLASSES, activation)(inputs), name=name)

    teachers = [model("a", "softmax" if which == "both" else None), model("b")]
    student = model("student")
    found = _distilled(
        student,
        teachers,
        x,
        np.zeros(8, int),
        "sparse_categorical_crossentropy",
        distillation_loss=keras.losses.KLDivergence(),
    )
    a, b, s = (each.predict(x, verbose=0).astype("float64") for each in (*teachers, student))
    a = a if which == "both" else special.softmax(a, axis=-1)
    mixture = (a + b) / 2
    np.testing.assert_allclose(found, special.rel_entr(mixture, s).sum(-1).mean(), rtol=1e-4)


def test_outputs_that_cannot_be_averaged_are_refused():
    inputs = keras.Input((FEATURES,))

    def model(names, activation=None, name="m"):
        outputs = {each: layers.Dense(3, activation, name=each)(inputs) for each in names}
        return keras.Model(inputs, outputs, name=name)

    with pytest.raises(ValueError, match=r"same names.*`x` with \['a', 'b'\], `y` with \['b', 'c'"):
        Ensemble([model("ab", name="x"), model("cb", name="y")])
    # The order in which they are named is no difference.
    Ensemble([model("ab"), model("ba")])
    soft, independent = (
        keras.Model(inputs, layers.Dense(3, kind)(inputs), name=kind)
        for kind in ("softmax", "sigmoid")
    )
    with pytest.raises(ValueError, match="`softmax` with softmax, `sigmoid` with sigmoid"):
        Ensemble([soft, independent])


def test_weights_are_learned_for_what_the_models_were_trained_on():
    """Several logits of a binary loss are independent units; a regression has no crossentropy."""
    rng = np.random.default_rng(3)
    x, _ = rows(60)
    y = rng.integers(0, 2, (60, CLASSES))
    models = [mlp(5, name="a"), mlp(7, name="b")]
    for model in models:
        model.set_weights([rng.normal(0, 1, w.shape) for w in model.get_weights()])
    told = Ensemble(models).learn_weights(x, y, binary=True)
    for model in models:
        model.compile(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    np.testing.assert_allclose(Ensemble(models).learn_weights(x, y), told, rtol=1e-6)

    def crossentropy_of(weights):
        p = sum(w * special.expit(m.predict(x, verbose=0).astype("float64")) for w, m in weights)
        return -np.where(y == 1, np.log(p), np.log(1 - p)).mean()

    best = crossentropy_of(list(zip(told, models)))
    for w in np.linspace(0, 1, 21):
        assert best <= crossentropy_of([(w, models[0]), (1 - w, models[1])]) + 1e-6
    for model in models:
        model.compile(loss="mse")
    with pytest.raises(ValueError, match="trained with `loss='mse'`, that of a regression"):
        Ensemble(models).learn_weights(x, y)
