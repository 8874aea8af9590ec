"""Adversarial training against its formulas in NumPy, and what it leaves alone."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import CLASSES, FEATURES, crossentropy, hard_loss, kl, log_softmax, pair, rows

import keras_kd as kd
from keras_kd.utils import lazy_registration

THREAT = kd.robust.Linf(0.2, step=0.1, steps=3, bounds=(-4, 4))
# With it attacks end where they begin, so that terms can be written down.
STILL = kd.robust.Linf(1e-7, step=1e-7, steps=1, bounds=(-4, 4))
ROBUST = pytest.mark.filterwarnings("ignore:The teacher")
METHODS = {
    "pgd": kd.robust.PGDTraining,
    "trades": kd.robust.TRADES,
    "ard": kd.robust.ARD,
    "rslad": kd.robust.RSLAD,
    "iad": kd.robust.IAD,
    "adaad": kd.robust.AdaAD,
}
NO_TEACHER = ("pgd", "trades")


def distiller_of(name, student, teacher, optimizer=None, threat=THREAT, **options):
    distiller = kd.Distiller(student, None if name in NO_TEACHER else teacher)
    ways = {key: options.pop(key) for key in ("run_eagerly", "jit_compile") if key in options}
    distiller.compile(
        optimizer or keras.optimizers.SGD(0.0),
        crossentropy(),
        adversary=METHODS[name](threat, **options),
        # Tracing takes longer than a few steps.
        **(ways or {"run_eagerly": True}),
    )
    return distiller


def expected_at(name, s, t, y, options):
    """The loss where attacked inputs are the inputs."""
    hard, soft = hard_loss(s, y), kl(t, s, options.get("temperature", 1.0))
    if name in NO_TEACHER:
        return hard
    if name == "ard":
        alpha = options["alpha"]
        return alpha * soft + (1 - alpha) * hard
    if name == "iad":
        return options["alpha"] * soft + (1 - options["alpha"]) * hard
    return kl(t, s, 1.0)


@ROBUST
@pytest.mark.parametrize("name", METHODS)
def test_where_nothing_moves_the_loss_is_the_formula(name):
    x, y = rows()
    student, teacher = pair()
    options = {
        "ard": {"alpha": 0.7, "temperature": 3.0},
        "iad": {"alpha": 0.6, "temperature": 2.0},
    }.get(name, {})
    distiller = distiller_of(name, student, teacher, threat=STILL, **options)
    logs = distiller.fit(x, y, batch_size=12, verbose=0).history
    s, t = (model.predict(x, verbose=0) for model in (student, teacher))
    expected = expected_at(name, s, t, y, options).mean()
    # TRADES, RSLAD and AdaAD begin a thousandth away.
    assert logs["loss"][0] == pytest.approx(expected, rel=2e-3)


@ROBUST
@pytest.mark.parametrize("name", [n for n in METHODS if n != "pgd"])
def test_the_terms_are_the_formulas(name, monkeypatch):
    """With attacked inputs given, value and gradient are those written in NumPy."""
    x, y = rows()
    student, teacher = pair()
    moved = (x + 0.2 * np.sign(np.random.default_rng(1).normal(size=x.shape))).astype("float32")
    from keras_kd.robust import adversary as home

    monkeypatch.setattr(home, "ascend", lambda goal, x, start, threat: ops.convert_to_tensor(moved))
    options = {"iad": {"beta": 0.4, "temperature": 2.0}, "ard": {"temperature": 5.0}}.get(name, {})
    distiller = distiller_of(name, student, teacher, threat=THREAT, **options)
    value = distiller.term_losses((x, y))[name]
    s, t = (model.predict(x, verbose=0) for model in (student, teacher))
    s_moved, t_moved = (model.predict(moved, verbose=0) for model in (student, teacher))
    trust = np.exp(-hard_loss(t_moved, y)) ** 0.4
    expected = {
        "trades": kl(s, s_moved, 1.0),
        "ard": kl(t, s_moved, 5.0),
        "rslad": kl(t, s_moved, 1.0),
        "iad": kl(t, s_moved, 2.0) + (1 - trust) * kl(s, s_moved, 1.0),
        "adaad": kl(t_moved, s_moved, 1.0),
    }[name].mean()
    assert value == pytest.approx(expected, rel=1e-4)
    # And the whole of the objective.
    logs = distiller.train_on_batch(x, y, return_dict=True)
    hard, soft = hard_loss(s, y).mean(), kl(t, s, 1.0).mean()
    whole = {
        "trades": hard + 6 * expected,
        "ard": expected,
        "rslad": 5 / 6 * expected + soft / 6,
        "iad": expected,
        "adaad": expected,
    }[name]
    assert float(logs["loss"]) == pytest.approx(whole, rel=1e-4)


@ROBUST
def test_trades_has_a_gradient_through_both_sides(monkeypatch):
    x, y = rows()
    student, _ = pair()
    moved = (x + 0.3).astype("float32")
    from keras_kd.robust import adversary as home

    monkeypatch.setattr(home, "ascend", lambda goal, x, start, threat: ops.convert_to_tensor(moved))
    distiller = distiller_of("trades", student, None, keras.optimizers.SGD(1.0))
    bias = student.get_layer("logits").bias
    before = np.array(bias)
    hard = np.exp(log_softmax(student.predict(x, verbose=0))) - np.eye(CLASSES)[y]
    log_p, log_q = (log_softmax(student.predict(z, verbose=0)) for z in (x, moved))
    p, q, ratio = np.exp(log_p), np.exp(log_q), log_p - log_q
    # d KL / d z of the first side, and of the second.
    both = p * (ratio - (p * ratio).sum(-1, keepdims=True)) + q - p
    distiller.train_on_batch(x, y)
    np.testing.assert_allclose(before - bias, (hard + 6 * both).mean(0), rtol=1e-3, atol=1e-5)


@ROBUST
@pytest.mark.parametrize("way", [{"run_eagerly": True}, {"jit_compile": True}])
def test_every_step_is_alike(way):
    """Eager, in a graph and under XLA, whose random numbers are others: a start is near to x."""
    x, y = rows()
    results = []
    for each in ({"jit_compile": False}, way):
        keras.utils.set_random_seed(1)
        student, teacher = pair()
        distiller = distiller_of("adaad", student, teacher, keras.optimizers.SGD(0.1), **each)
        history = distiller.fit(x, y, batch_size=5, epochs=2, shuffle=False, verbose=0)
        results.append(history.history["loss"])
    np.testing.assert_allclose(*results, rtol=1e-4 if "run_eagerly" in way else 2e-2)


class Watched(layers.Layer):
    """Notes the inputs that it sees, eagerly."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, inputs, training=None):
        if hasattr(inputs, "numpy"):
            self.seen.append((inputs.numpy(), bool(training)))
        return inputs


def normed(width=5, watched=False):
    inputs = keras.Input((FEATURES,))
    x = Watched()(inputs) if watched else inputs
    x = layers.Dense(width, activation="tanh", name="hidden")(x)
    x = layers.BatchNormalization(momentum=0.5, name="norm")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x))


@ROBUST
@pytest.mark.parametrize("name", METHODS)
def test_inner_steps_run_in_inference_mode(name):
    """Trap: a training-mode attack moves the statistics of BatchNorm at each of its steps."""
    x, y = rows()
    keras.utils.set_random_seed(0)
    student, teacher = normed(watched=True), normed(9)
    norm = student.get_layer("norm")
    before = np.array(norm.moving_mean)
    distiller = distiller_of(name, student, teacher, run_eagerly=True)
    watched = next(layer for layer in student.layers if isinstance(layer, Watched))
    watched.seen.clear()
    distiller.train_on_batch(x, y)
    # Once for what it is trained on; twice where that is the inputs and the attacked ones.
    trained = [inputs for inputs, training in watched.seen if training]
    assert len(trained) == (1 if name == "pgd" else 2)
    hidden = student.get_layer("hidden")
    expected = before
    for inputs in trained:
        mean = np.tanh(inputs @ np.array(hidden.kernel) + np.array(hidden.bias)).mean(0)
        expected = 0.5 * expected + 0.5 * mean
    np.testing.assert_allclose(norm.moving_mean, expected, atol=1e-5)
    attacked = trained[-1]
    assert 0.05 < np.abs(attacked - x).max() <= 0.2 * (1 + 1e-5)
    # The attack itself runs the student in each of its steps.
    assert sum(not training for _, training in watched.seen) >= THREAT.steps


def test_the_attack_finds_what_it_looks_for():
    """The penalty with steps is greater than without."""
    x, y = rows(40)
    for name in ("trades", "rslad", "adaad"):
        values = []
        for threat in (STILL, THREAT.with_changes(steps=8, step=0.05)):
            keras.utils.set_random_seed(0)
            student, teacher = pair()
            distiller = distiller_of(name, student, teacher, threat=threat)
            values.append(distiller.term_losses((x, y))[name])
        assert values[1] > values[0] + 1e-3


@ROBUST
def test_adaad_searches_through_the_teacher():
    """Its attack follows the gradient of `KL(T(x') || S(x'))`, the teacher's part included."""
    x, _ = rows()
    student, teacher = pair()
    start = (x + 0.001).astype("float32")
    distiller = distiller_of("adaad", student, teacher)
    term = distiller.penalties[0].it
    from keras_kd.robust import classifier, formulas

    goal = term.objective(distiller, None, x, classifier.of_student(distiller))
    got = ops.convert_to_numpy(kd.backends.gradient(goal, ops.convert_to_tensor(start)))
    nudge = 1e-3
    for i in range(FEATURES):
        step = nudge * np.eye(FEATURES, dtype="float32")[i]
        sides = []
        for sign in (1, -1):
            z = [m.predict(start + sign * step, verbose=0) for m in (teacher, student)]
            sides.append(kl(*z, 1.0))
        np.testing.assert_allclose(
            got[:, i], (sides[0] - sides[1]) / (2 * nudge), rtol=0.05, atol=5e-3
        )
    assert formulas.divergence(*(m(start) for m in (teacher, student))).shape == (12,)


@ROBUST
@pytest.mark.parametrize("name", ["pgd", "iad"])
def test_saved_and_restored(name, tmp_path):
    x, y = rows(20)
    student, teacher = pair()
    adam = keras.optimizers.Adam(0.01)
    distiller = distiller_of(name, student, teacher, adam, jit_compile=False)
    distiller.fit(x, y, batch_size=8, verbose=0)
    distiller.save(tmp_path / "d.keras")
    again = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    histories = [
        d.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
        for d in (distiller, again)
    ]
    assert histories[0] == histories[1]
    for a, b in zip(student.get_weights(), again.student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_a_config_brings_everything_back(name):
    options = {
        "trades": {"beta": 2.0},
        "ard": {"alpha": 0.3, "temperature": 7.0},
        "rslad": {"adversarial": 0.4, "temperature": 2.0, "name": "mine"},
        "iad": {"alpha": 0.3, "beta": 0.2, "temperature": 7.0, "introspection": 0.5},
        "adaad": {"alpha": 0.3},
    }.get(name, {})
    given = METHODS[name](kd.robust.L2(0.3, steps=4, restarts=2, bounds=None), **options)
    config = keras.saving.serialize_keras_object(given)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(given)
    assert again.threat == given.threat
    assert again.get_config() == given.get_config()
    for key, value in options.items():
        assert again.get_config()[key] == pytest.approx(value)


def test_a_distiller_loads_before_the_module():
    """Keras finds the classes by stand-ins where `keras_kd.robust` is not imported yet."""
    known = keras.saving.get_custom_objects()
    ours = {
        name: kind
        for name, kind in known.items()
        if kind.__module__.startswith("keras_kd.robust") and name.startswith("keras_kd>")
    }
    assert set(ours) == {f"keras_kd>{n}" for n in lazy_registration.CLASSES["keras_kd.robust"]}
    config = keras.saving.serialize_keras_object(kd.robust.RSLAD(THREAT))
    for name in ours:
        del known[name]
    try:
        lazy_registration.register(keras)
        again = keras.saving.deserialize_keras_object(config)
    finally:
        known.update(ours)
    assert isinstance(again, kd.robust.RSLAD)
    assert again.threat == THREAT


def test_cached_teachers_serve_ard_and_rslad_alone(tmp_path):
    """Trap: answers to the inputs say nothing of attacked inputs."""
    x, y = rows(20)
    results = {}
    for name in ("ard", "rslad"):
        losses = []
        for cached in (False, True):
            keras.utils.set_random_seed(0)
            student, teacher = pair()
            if cached:
                kd.cache.write(teacher, x, str(tmp_path / name), dtype="float32")
                teacher = kd.teachers.CachedTeacher(str(tmp_path / name))
            distiller = distiller_of(name, student, teacher, keras.optimizers.SGD(0.1))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                history = distiller.fit(x, y, batch_size=20, shuffle=False, verbose=0)
            losses.append(history.history["loss"][0])
        results[name] = losses
    for live, cached in results.values():
        assert cached == pytest.approx(live, rel=1e-4)
    student, _ = pair()
    teacher = kd.teachers.CachedTeacher(str(tmp_path / "ard"))
    for name in ("iad", "adaad", "pgd"):
        with pytest.raises(ValueError, match="attacked inputs"):
            kd.Distiller(student, teacher).compile(
                "sgd", crossentropy(), adversary=METHODS[name](THREAT)
            )


def test_a_teacher_that_is_not_robust_is_told_before_training():
    """Trap: students of natural teachers are less robust than students of none."""
    x, y = rows(40)
    student, teacher = pair()
    weak = kd.robust.Linf(1e-6, bounds=(-4, 4))
    strong = kd.robust.Linf(2.0, step=0.5, steps=5, bounds=(-4, 4))
    assert kd.robust.kept_decisions(teacher, x, weak) == 1.0
    kept = kd.robust.kept_decisions(teacher, x, strong)
    assert kept < 1 / 3
    said = []

    class Before(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            said.append("training")

    for name in ("rslad", "ard", "iad", "adaad"):
        for threat in (strong, weak):
            said.clear()
            distiller = distiller_of(name, student, teacher, threat=threat)
            with warnings.catch_warnings():
                warnings.simplefilter("always")

                def note(message, *_, **__):
                    if "is not robust" in str(message):
                        said.append("warning")

                warnings.showwarning = note
                distiller.fit(x, y, verbose=0, callbacks=[Before()])
            assert said == (["warning", "training"] if threat is strong else ["training"])
    with pytest.warns(UserWarning, match=rf"keeps {100 * kept:.0f} % of its decisions on 40 rows"):
        distiller_of("rslad", student, teacher, threat=strong).fit(x, y, verbose=0)


def test_no_labels_are_needed_where_none_is_read():
    x, _ = rows()
    student, teacher = pair()
    for adversary in (kd.robust.RSLAD(STILL), kd.robust.AdaAD(STILL)):
        distiller = kd.Distiller(student, teacher)
        distiller.compile("sgd", loss=None, adversary=adversary)
        assert np.isfinite(distiller.fit(x, verbose=0).history["loss"][0])
    distiller.compile("sgd", loss=None, adversary=kd.robust.ARD(STILL))
    with pytest.raises(ValueError, match="attacks the labels"):
        distiller.fit(x, verbose=0)


@ROBUST
def test_labels_in_every_form_are_attacked_alike():
    x, y = rows()
    losses = {}
    for form, labels in (("flat", y), ("column", y[:, None]), ("one-hot", np.eye(CLASSES)[y])):
        keras.utils.set_random_seed(0)
        student, _ = pair()
        distiller = kd.Distiller(student, None)
        loss = (
            keras.losses.CategoricalCrossentropy(from_logits=True)
            if form == "one-hot"
            else crossentropy()
        )
        distiller.compile("sgd", loss, adversary=kd.robust.PGDTraining(THREAT))
        losses[form] = distiller.fit(x, labels, verbose=0, shuffle=False).history["loss"][0]
    assert losses["column"] == pytest.approx(losses["flat"], rel=1e-5)
    assert losses["one-hot"] == pytest.approx(losses["flat"], rel=1e-5)


@ROBUST
def test_with_a_teacher_pgd_distils_on_attacked_inputs():
    x, y = rows()
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        crossentropy(),
        alpha=0.25,
        adversary=kd.robust.PGDTraining(STILL),
    )
    logs = distiller.fit(x, y, batch_size=12, verbose=0).history
    s, t = (model.predict(x, verbose=0) for model in (student, teacher))
    expected = 0.25 * hard_loss(s, y).mean() + 0.75 * kl(t, s, 1.0).mean()
    assert logs["loss"][0] == pytest.approx(expected, rel=1e-4)


@ROBUST
def test_users_weights_and_hooks_stay():
    x, y = rows()
    student, teacher = pair()

    class Size(kd.Penalty):
        def __call__(self, distiller, batch):
            x, y, weight = batch
            assert weight is None
            assert len(x.shape) == 2
            assert len(y.shape) == 1
            return ops.sum(batch.student.logits[0] ** 2, axis=-1)

    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        crossentropy(),
        penalties=[Size()],
        student_loss_weight=0.5,
        adversary=kd.robust.RSLAD(STILL),
    )
    logs = distiller.fit(x, y, batch_size=12, verbose=0).history
    s, t = (model.predict(x, verbose=0) for model in (student, teacher))
    assert logs["size"][0] == pytest.approx((s**2).sum(-1).mean(), rel=1e-4)
    expected = kl(t, s, 1.0).mean() + 0.5 * hard_loss(s, y).mean() + (s**2).sum(-1).mean()
    assert logs["loss"][0] == pytest.approx(expected, rel=2e-3)


@ROBUST
def test_introspection_is_live():
    x, y = rows()
    student, teacher = pair()
    distiller = distiller_of("iad", student, teacher, threat=STILL, beta=0.9)
    adversary = distiller.penalties[0].it
    shares = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: adversary.introspection.assign(100.0 * epoch)
    )
    logs = distiller.fit(x, y, batch_size=12, epochs=2, verbose=0, callbacks=[shares]).history
    # Nothing moves, so that the student does not differ from itself.
    assert logs["iad"][1] == pytest.approx(logs["iad"][0], abs=1e-3)
    distiller = distiller_of("iad", student, teacher, threat=THREAT, beta=0.9)
    adversary = distiller.penalties[0].it
    logs = distiller.fit(x, y, batch_size=12, epochs=2, verbose=0, callbacks=[shares]).history
    assert logs["iad"][1] > 2 * logs["iad"][0]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"adversary": kd.robust.RSLAD}, TypeError, "instance"),
        ({"adversary": "rslad"}, TypeError, "RSLAD"),
        ({"teacher": None}, ValueError, "the distiller has none"),
        ({"alpha": 0.3}, ValueError, "sets both weights"),
        ({"student_inputs": lambda x: x}, ValueError, "student_inputs"),
    ],
)
def test_a_distiller_that_cannot_be_trained_so_is_refused(change, kind, words):
    student, teacher = pair()
    given = {"adversary": kd.robust.RSLAD(THREAT), "teacher": teacher, **change}
    distiller = kd.Distiller(
        student, given.pop("teacher"), student_inputs=given.pop("student_inputs", None)
    )
    with pytest.raises(kind, match=words):
        distiller.compile("sgd", crossentropy(), **given)
    assert not distiller.compiled


@pytest.mark.parametrize("name", METHODS)
def test_attacks_begin_where_their_papers_say(name):
    """Near to the input those by a divergence, which has no gradient there; else anywhere."""
    adversary = METHODS[name](kd.robust.Linf(0.3, bounds=None))
    x = np.zeros((50, 40), "float32")
    near = name in ("trades", "rslad", "adaad")
    start = ops.convert_to_numpy((adversary.start if near else adversary.draw)(ops.array(x)))
    if name in ("ard", "iad"):
        start = ops.convert_to_numpy(adversary.start(ops.array(x)))
    wanted = 0.001 if near else 0.3 / np.sqrt(3)
    assert start.std() == pytest.approx(wanted, rel=0.1)
    assert np.abs(start).max() <= 0.3


def test_other_refusals():
    x, y = rows()
    student, teacher = pair()
    for make, words in (
        (lambda: kd.robust.RSLAD(THREAT, adversarial=1.5), r"weight in \[0, 1\]"),
        (lambda: kd.robust.ARD(THREAT, temperature=0), "greater than 0"),
        (lambda: kd.robust.IAD(THREAT, beta=-1), "not negative"),
        (lambda: kd.robust.TRADES(THREAT, beta=-1), "not negative"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(TypeError, match="threat"):
        kd.robust.TRADES(0.1)
    distiller = kd.Distiller(student, None)
    with pytest.raises(ValueError, match="batch transform"):
        distiller.compile(
            "sgd",
            crossentropy(),
            batch_transform=lambda batch, distiller: batch,
            adversary=kd.robust.PGDTraining(THREAT),
        )
    # Data that leave the bounds, before the first step.
    before = student.get_weights()
    distiller.compile("sgd", crossentropy(), adversary=kd.robust.PGDTraining(kd.robust.Linf(0.1)))
    with pytest.raises(ValueError, match="outside of the threat's bounds"):
        distiller.fit(x, y, verbose=0)
    for a, b in zip(student.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    shown = kd.Distiller(student, teacher, teacher_inputs=lambda x: x)
    with pytest.raises(ValueError, match="teacher_inputs"):
        shown.compile("sgd", crossentropy(), adversary=kd.robust.AdaAD(THREAT))
