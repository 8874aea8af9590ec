"""Assistants, generations, peers and exits, against the sums their papers state."""

import keras
import numpy as np
import pytest

import keras_kd as kd


def dense(units, name, activation=None):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(units, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, activation=activation)(hidden), name=name)


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    return generator.normal(size=(12, 4)).astype("float32"), generator.integers(0, 3, 12)


def log_softmax(z):
    z = np.asarray(z, "float64")
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def cross_entropy(z, y):
    return -log_softmax(z)[np.arange(len(y)), y].mean()


def kl(p, q):
    return (np.exp(log_softmax(p)) * (log_softmax(p) - log_softmax(q))).sum(-1).mean()


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_mutual_learning_is_its_formula_for_three_students(data):
    keras.utils.set_random_seed(0)
    x, y = data
    students = [dense(2, "a"), dense(3, "b"), dense(4, "c")]
    z = [student.predict(x, verbose=0) for student in students]
    peers = kd.MutualLearning(students)
    peers.compile(keras.optimizers.SGD(0.0), LOSS, metrics=["accuracy"], weight=0.5)
    logs = peers.train_on_batch(x, y, return_dict=True)
    mutual = sum(np.mean([kl(z[j], z[i]) for j in range(3) if j != i]) for i in range(3))
    np.testing.assert_allclose(logs["distillation_loss"], mutual, rtol=1e-5)
    np.testing.assert_allclose(
        logs["loss"], sum(cross_entropy(each, y) for each in z) + 0.5 * mutual, rtol=1e-5
    )
    for name, each in zip("abc", z):
        np.testing.assert_allclose(logs[f"{name}_loss"], cross_entropy(each, y), rtol=1e-5)
        np.testing.assert_allclose(logs[f"{name}_accuracy"], (each.argmax(-1) == y).mean())


def test_no_gradient_passes_between_the_peers(data):
    """A student's step depends on its peers' answers as on constants."""
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    x, y = data
    students = [dense(2, "a"), dense(3, "b")]
    z_b = students[1].predict(x, verbose=0)
    with tf.GradientTape() as tape:
        z_a = students[0](x)
        p = tf.nn.softmax(z_b)
        total = LOSS(y, z_a) + tf.reduce_mean(
            tf.reduce_sum(p * (tf.nn.log_softmax(z_b) - tf.nn.log_softmax(z_a)), -1)
        )
    gradients = tape.gradient(total, students[0].trainable_variables)
    expected = [v.numpy() - 0.1 * g.numpy() for v, g in zip(students[0].weights, gradients)]
    peers = kd.MutualLearning(students)
    peers.compile(keras.optimizers.SGD(0.1), LOSS)
    peers.train_on_batch(x, y)
    for got, want in zip(students[0].get_weights(), expected):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_softmax_students_are_compared_by_their_logits(data):
    keras.utils.set_random_seed(0)
    x, y = data
    students = [dense(2, "a", "softmax"), dense(3, "b", "softmax")]
    p, q = (np.log(student.predict(x, verbose=0)) for student in students)
    peers = kd.MutualLearning(students)
    peers.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    logs = peers.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], kl(p, q) + kl(q, p), rtol=1e-4)


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_last_exit_teaches_the_others(data, as_dict):
    keras.utils.set_random_seed(0)
    x, y = data
    inputs = keras.Input((4,))
    first = keras.layers.Dense(5, activation="relu")(inputs)
    second = keras.layers.Dense(5, activation="relu")(first)
    exits = [
        keras.layers.Dense(3, name="shallow")(first),
        keras.layers.Dense(3, name="deep")(second),
    ]
    outputs = {"shallow": exits[0], "deep": exits[1]} if as_dict else exits
    model = keras.Model(inputs, outputs)
    z = model.predict(x, verbose=0)
    shallow, deep = (z["shallow"], z["deep"]) if as_dict else z
    trainer = kd.SelfDistillation(model)
    trainer.compile(keras.optimizers.SGD(0.0), LOSS, metrics=["accuracy"])
    logs = trainer.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], kl(deep, shallow), rtol=1e-5)
    np.testing.assert_allclose(
        logs["loss"],
        cross_entropy(shallow, y) + cross_entropy(deep, y) + kl(deep, shallow),
        rtol=1e-5,
    )
    history = trainer.fit(x, y, epochs=2, validation_data=(x, y), verbose=0).history
    assert {"shallow_accuracy", "deep_accuracy", "val_deep_loss"} <= set(history)
    assert [p.shape for p in trainer.predict(x, verbose=0)] == [(12, 3), (12, 3)]


def test_a_chain_teaches_each_from_the_one_before(data):
    keras.utils.set_random_seed(0)
    x, y = data
    teacher, assistant, student = dense(8, "teacher"), dense(4, "assistant"), dense(2, "student")
    before = teacher.get_weights()
    seen = []

    def stage_arguments(stage):
        seen.append(stage)
        return {"optimizer": keras.optimizers.Adam(0.1), "loss": LOSS, "alpha": 0.0}

    histories = kd.distill_chain(
        [teacher, assistant, student], x, y, compile=stage_arguments, epochs=60, verbose=0
    )
    assert seen == [0, 1]
    assert [len(h.history["loss"]) for h in histories] == [60, 60]
    for a, b in zip(before, teacher.get_weights()):
        np.testing.assert_array_equal(a, b)
    # The assistant learned the teacher, so that it had something to hand on.
    assert histories[0].history["distillation_loss"][-1] < 0.02
    assert kl(assistant.predict(x, verbose=0), student.predict(x, verbose=0)) < 0.1


def named(units, name, classes=3):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(units, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(classes, name="head")(hidden), name=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: kd.Transfer(kd.losses.Hint(), "hidden", "hidden", "linear"),
        lambda: kd.Transfer(kd.losses.Hint(), "hidden", "hidden", keras.layers.Dense(6)),
        lambda: [kd.losses.SoftTargets(), kd.Transfer(kd.losses.VID(), "hidden", "hidden")],
    ],
    ids=["projector", "layer", "loss"],
)
@pytest.mark.parametrize("called", [False, True])
def test_each_stage_of_a_chain_learns_projectors_of_its_own(data, make, called, monkeypatch):
    x, y = data
    seen = []
    fit = kd.Distiller.fit
    monkeypatch.setattr(
        kd.Distiller, "fit", lambda self, *a, **k: (seen.append(self), fit(self, *a, **k))[1]
    )
    # The second pair has other widths than the first, but for what a given layer must meet.
    wide = 6 if isinstance(make(), kd.Transfer) and make().projector != "linear" else 8
    models = [named(6, "teacher"), named(wide, "assistant"), named(2, "student")]
    if wide == 6:
        models[1:] = [named(6, "assistant"), named(6, "student")]
    arguments = {"loss": LOSS, "distillation_loss": make(), "run_eagerly": True}
    kd.distill_chain(
        models, x, y, compile=(lambda stage: arguments) if called else arguments, verbose=0
    )
    first, second = (
        {id(v) for transfer in each.transfers for v in transfer.trainable_variables}
        for each in seen
    )
    assert first
    assert second
    assert not first & second


def test_a_transfer_with_a_projector_trains_in_one_distiller(data):
    x, y = data
    transfer = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", "linear", weight=3.0, name="mine")
    loss = kd.losses.VID()
    distiller = kd.Distiller(named(2, "student"), named(6, "teacher"))
    both = [transfer, kd.Transfer(loss, "hidden", "hidden")]
    for _ in range(2):
        # Compiled again, it goes on with what it has learned.
        distiller.compile("sgd", LOSS, distillation_loss=both, run_eagerly=True)
        distiller.fit(x, y, verbose=0)
    other = kd.Distiller(named(2, "student"), named(6, "teacher"))
    for taken in (transfer, kd.Transfer(loss, "hidden", "hidden", name="other")):
        with pytest.raises(ValueError, match=f"`{taken.name}` has a projector or a loss that"):
            other.compile("sgd", LOSS, distillation_loss=taken)
    fresh = transfer.fresh()
    assert (fresh.name, float(fresh.weight), fresh.built) == ("mine", 3.0, False)
    other.compile("sgd", LOSS, distillation_loss=fresh)
    # What learns nothing may be shared.
    plain = kd.Transfer(kd.losses.LogitMSE())
    for each in (distiller, other):
        each.compile("sgd", LOSS, distillation_loss=plain)


@pytest.mark.parametrize(
    ("models", "arguments", "message"),
    [
        (
            [(8, 3), (4, 3), (2, 3)],
            lambda stage: {
                "loss": LOSS,
                "distillation_loss": kd.Transfer(
                    kd.losses.Hint(), "hidden" if stage == 0 else "hiddn", "hidden", "linear"
                ),
            },
            "`hiddn` is not a layer",
        ),
        ([(8, 3), (4, 3), (2, 5)], {"loss": LOSS}, "classes"),
    ],
    ids=["layer", "classes"],
)
def test_a_chain_is_checked_to_its_end_before_it_begins(data, models, arguments, message):
    x, y = data
    chain = [named(units, f"m{i}", classes) for i, (units, classes) in enumerate(models)]
    before = chain[1].get_weights()
    with pytest.raises(ValueError, match=message):
        kd.distill_chain(chain, x, y, compile=arguments, verbose=0)
    for a, b in zip(before, chain[1].get_weights()):
        np.testing.assert_array_equal(a, b)


def test_a_chain_begins_with_any_teacher(data, tmp_path):
    x, y = data
    keras.utils.set_random_seed(0)
    a, b = named(8, "a"), named(6, "b")
    kd.cache.write(a, x, tmp_path / "cache")
    for first in (
        [a, b],
        kd.teachers.Ensemble([a, b], weights=[1, 3]),
        kd.teachers.CachedTeacher(tmp_path / "cache"),
    ):
        histories = kd.distill_chain(
            [first, named(4, "assistant"), named(2, "student")],
            x,
            y,
            compile={"loss": LOSS, "run_eagerly": True},
            verbose=0,
        )
        assert [len(h.history["agreement"]) for h in histories] == [1, 1]
    for first in ([a, b], kd.teachers.Ensemble([a, b])):
        with pytest.raises(ValueError, match="stands twice"):
            kd.distill_chain([first, named(4, "c"), b], x, y, compile={"loss": LOSS})
    with pytest.raises(TypeError, match="The teacher must be"):
        kd.distill_chain(["a", b], x, y, compile={"loss": LOSS})


def test_a_chain_of_models_that_their_training_builds(data):
    x, y = data
    lazy = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)], name="lazy")
    histories = kd.distill_chain(
        [named(8, "a"), lazy, named(2, "b")],
        x,
        y,
        compile={"loss": LOSS, "run_eagerly": True},
        verbose=0,
    )
    assert len(histories) == 2


def test_generations_are_fresh_copies_taught_by_their_parents(data):
    keras.utils.set_random_seed(0)
    x, y = data
    model = dense(4, "model")
    before = model.get_weights()
    children = kd.born_again(
        model, x, y, generations=2, compile={"optimizer": "adam", "loss": LOSS}, verbose=0
    )
    assert len(children) == 2
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(children[0].get_weights()[0], children[1].get_weights()[0])
    kd.Distiller(dense(2, "student"), kd.teachers.Ensemble([model, *children]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kd.MutualLearning([dense(2, "a")]), "at least two students"),
        (lambda: kd.MutualLearning([dense(2, "a"), dense(3, "a")]), "`a` is used twice"),
        (lambda: kd.SelfDistillation(dense(2, "a")), "at least two exits"),
        (lambda: kd.distill_chain([dense(2, "a")], compile={}), "a teacher and a student"),
        (
            lambda: kd.MutualLearning([dense(2, "a"), dense(2, "b")]).compile("adam"),
            "needs labels",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_peers_save_and_load(data, tmp_path):
    x, y = data
    peers = kd.MutualLearning([dense(2, "a"), dense(3, "b")])
    peers.compile("sgd", LOSS)
    peers.fit(x, y, verbose=0)
    peers.save(tmp_path / "peers.keras")
    loaded = keras.saving.load_model(tmp_path / "peers.keras")
    for a, b in zip(peers.predict(x, verbose=0), loaded.predict(x, verbose=0)):
        np.testing.assert_array_equal(a, b)


def _probabilities(kind):
    """A trainer whose outputs are softmax, the same weights every time."""
    keras.utils.set_random_seed(3)
    if kind is kd.MutualLearning:
        return kind([dense(2, "a", "softmax"), dense(3, "b", "softmax")])
    inputs = keras.Input((4,))
    exits = [keras.layers.Dense(3, "softmax", name=name)(inputs) for name in ("e1", "e2")]
    return kind(keras.Model(inputs, exits))


@pytest.mark.parametrize("kind", [kd.MutualLearning, kd.SelfDistillation])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_by_name_is_the_mean_over_the_batch(data, kind, weighted):
    """Loss and step are those of the Keras loss object, with weights too."""
    x, y = data
    weights = np.linspace(0, 2, len(x)).astype("float32") if weighted else None
    found = []
    for loss in (
        "sparse_categorical_crossentropy",
        keras.losses.sparse_categorical_crossentropy,
        keras.losses.SparseCategoricalCrossentropy(),
    ):
        trainer = _probabilities(kind)
        trainer.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
        logs = trainer.train_on_batch(x, y, weights, return_dict=True)
        found.append((logs, trainer.get_weights()))
    for logs, values in found[:-1]:
        np.testing.assert_allclose(logs["loss"], found[-1][0]["loss"], rtol=1e-6)
        for ours, theirs in zip(values, found[-1][1]):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_peers_with_one_unit_and_labels_without_its_axis():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.integers(0, 2, 8)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    students = [
        keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(inputs), name=name) for name in "ab"
    ]
    p = students[0].predict(x, verbose=0)[:, 0]
    peers = kd.MutualLearning(students)
    peers.compile(
        keras.optimizers.SGD(0.0),
        "binary_crossentropy",
        distillation_loss=kd.losses.BinarySoftTargets(),
    )
    logs = peers.train_on_batch(x, y, return_dict=True)
    expected = -np.where(y == 1, np.log(p), np.log(1 - p)).mean()
    np.testing.assert_allclose(logs["a_loss"], expected, rtol=1e-4)


def test_losses_between_peers_read_the_labels(data):
    x, y = data
    students = [dense(2, "a"), dense(3, "b")]
    z = [student.predict(x, verbose=0) for student in students]
    loss = kd.losses.DecoupledKD(temperature=1.0)
    peers = kd.MutualLearning(students)
    peers.compile(keras.optimizers.SGD(0.0), LOSS, distillation_loss=loss)
    logs = peers.train_on_batch(x, y, return_dict=True)
    expected = float(loss(z[1], z[0], labels=y)) + float(loss(z[0], z[1], labels=y))
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (kd.Transfer(kd.losses.Hint(), "dense", "dense"), ValueError, "transfer `hint`"),
        (kd.losses.VID(), ValueError, "no layers or memory"),
        ([kd.losses.SoftTargets()], TypeError, "one loss between logits"),
        ("kl_divergence", TypeError, "one loss between logits"),
    ],
)
def test_peers_refuse_losses_that_read_more_than_logits(loss, error, message):
    peers = kd.MutualLearning([dense(2, "a"), dense(3, "b")])
    with pytest.raises(error, match=message):
        peers.compile("sgd", LOSS, distillation_loss=loss)


def binary_kl(p, q):
    p, q = np.asarray(p, "float64"), np.asarray(q, "float64")
    return (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1).mean()


class Subclassed(keras.Model):
    def __init__(self, name, units, activation):
        super().__init__(name=name)
        self.last = keras.layers.Dense(units, activation)

    def call(self, x):
        return self.last(x)


@pytest.mark.parametrize("activation", ["sigmoid", None])
@pytest.mark.parametrize("subclassed", [False, True])
def test_peers_of_one_unit_compare_two_classes(activation, subclassed):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.integers(0, 2, 8).astype("float32")
    keras.utils.set_random_seed(0)
    students = [Subclassed(name, 1, activation) for name in "ab"]
    if not subclassed:
        inputs = keras.Input((4,))
        students = [keras.Model(inputs, each.last(inputs), name=each.name) for each in students]
    p, q = (ops_of(student.predict(x, verbose=0), activation) for student in students)
    peers = kd.MutualLearning(students)
    loss = keras.losses.BinaryCrossentropy(from_logits=activation is None)
    peers.compile(keras.optimizers.SGD(0.0), loss, metrics=["accuracy"], run_eagerly=True)
    logs = peers.train_on_batch(x, y, return_dict=True)
    assert logs["distillation_loss"] > 0.01
    np.testing.assert_allclose(
        logs["distillation_loss"], binary_kl(p, q) + binary_kl(q, p), rtol=1e-4
    )
    # As in Keras, 0.5 is the threshold whatever the output is.
    z = np.asarray(students[0](x))[:, 0]
    np.testing.assert_allclose(logs["a_accuracy"], np.mean((z > 0.5) == y), rtol=1e-6)


def ops_of(outputs, activation):
    return outputs if activation else 1 / (1 + np.exp(-outputs.astype("float64")))


@pytest.mark.parametrize("how", ["fit", "generator", "train_on_batch"])
def test_subclassed_peers_that_end_in_softmax_are_compared_by_their_logits(data, how):
    x, y = data
    keras.utils.set_random_seed(0)
    students = [Subclassed(name, 3, "softmax") for name in "ab"]
    p, q = (np.log(student.predict(x, verbose=0)) for student in students)
    peers = kd.MutualLearning(students)
    peers.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", run_eagerly=True)
    if how == "train_on_batch":
        found = peers.train_on_batch(x, y, return_dict=True)["distillation_loss"]
    else:
        given = (x, y) if how == "fit" else (((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)),)
        found = peers.fit(*given, batch_size=None, verbose=0).history["distillation_loss"][0]
    np.testing.assert_allclose(found, kl(p, q) + kl(q, p), rtol=1e-4)


def test_independent_exits_are_compared_unit_by_unit():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    y = np.random.default_rng(1).integers(0, 2, (8, 3)).astype("float32")
    inputs = keras.Input((4,))
    exits = [keras.layers.Dense(3, "sigmoid", name=name)(inputs) for name in ("low", "high")]
    model = keras.Model(inputs, exits)
    low, high = model.predict(x, verbose=0)
    trainer = kd.SelfDistillation(model)
    trainer.compile(keras.optimizers.SGD(0.0), "binary_crossentropy", run_eagerly=True)
    logs = trainer.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], binary_kl(high, low), rtol=1e-4)


def test_peers_that_read_tokens_take_a_weight_for_each_sample():
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).integers(0, 6, (5, 4))
    inputs = keras.Input((None,), dtype="int32")
    students = []
    for name in "ab":
        embedded = keras.layers.Embedding(6, 3, mask_zero=True)(inputs)
        students.append(keras.Model(inputs, keras.layers.Dense(6)(embedded), name=name))
    p, q = (student.predict(x, verbose=0) for student in students)
    weights = np.linspace(0, 2, 5).astype("float32")
    peers = kd.MutualLearning(students)
    peers.compile(keras.optimizers.SGD(0.0), LOSS, run_eagerly=True)
    logs = peers.train_on_batch(x, x, weights, return_dict=True)
    counted = (x != 0) * weights[:, None] / (x != 0).sum()
    hard = -np.take_along_axis(log_softmax(p), x[..., None], -1)[..., 0]
    np.testing.assert_allclose(logs["a_loss"], (hard * counted).sum(), rtol=1e-4)
    between = sum(
        (np.exp(log_softmax(a)) * (log_softmax(a) - log_softmax(b))).sum(-1)
        for a, b in ((p, q), (q, p))
    )
    np.testing.assert_allclose(logs["distillation_loss"], (between * counted).sum(), rtol=1e-4)


def test_losses_of_keras_between_peers_read_what_these_return(data):
    x, y = data
    keras.utils.set_random_seed(0)
    students = [dense(2, "a", "softmax"), dense(3, "b", "softmax")]
    p, q = (np.log(student.predict(x, verbose=0)) for student in students)
    peers = kd.MutualLearning(students)
    peers.compile(
        keras.optimizers.SGD(0.0),
        "sparse_categorical_crossentropy",
        distillation_loss=keras.losses.KLDivergence(),
        run_eagerly=True,
    )
    logs = peers.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], kl(p, q) + kl(q, p), rtol=1e-4)


def _one_unit():
    inputs = keras.Input((4,))
    return [keras.Model(inputs, keras.layers.Dense(1)(inputs), name=name) for name in "ab"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: kd.MutualLearning([_two_outputs(), dense(2, "b")]),
            "one output of each student, and `two` has 2",
        ),
        (
            lambda: kd.MutualLearning(_one_unit()).compile("sgd", "mse"),
            "one linear output unit",
        ),
        (
            lambda: kd.MutualLearning(_one_unit()).compile(
                "sgd", "binary_crossentropy", distillation_loss=kd.losses.SoftTargets()
            ),
            "the output `a` ends in one unit",
        ),
        (
            lambda: kd.MutualLearning([dense(2, "a"), dense(2, "b")]).compile(
                "sgd", LOSS, distillation_loss=keras.losses.KLDivergence()
            ),
            "the output `a` ends in logits",
        ),
        (
            lambda: kd.MutualLearning([dense(2, "a"), _one_unit()[1]]).compile(
                "sgd", LOSS, distillation_loss=kd.losses.LogitMSE()
            ),
            "the same classes",
        ),
        (
            lambda: kd.MutualLearning([dense(2, "a"), dense(2, "b")]).compile(
                "sgd", LOSS, weighted_metrics=["accuracy"]
            ),
            "reads no `weighted_metrics`",
        ),
    ],
    ids=["outputs", "regression", "softmax", "logits", "classes", "metrics"],
)
def test_peers_refuse_what_cannot_be_compared(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _two_outputs():
    inputs = keras.Input((4,))
    return keras.Model(inputs, [keras.layers.Dense(3)(inputs) for _ in range(2)], name="two")
