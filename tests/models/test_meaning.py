"""What an output means: by its hard loss, by its layers, by its first rows, or by asking."""

import functools
import re

import keras
import numpy as np
import pytest
from keras import layers, ops
from scipy.special import expit, log_softmax, rel_entr, softmax
from small_models import FEATURES, crossentropy, rows

import keras_kd as kd

ROWS = 12
LABELS = np.random.default_rng(1).integers(0, 4, ROWS)
FLAGS = np.random.default_rng(2).integers(0, 2, (ROWS, 4)).astype("float32")
NUMBERS = np.random.default_rng(3).normal(size=(ROWS, 4)).astype("float32")


def data():
    return rows(ROWS)[0]


def ending(*ends, units=4, name=None, activation=None):
    """A model that ends in `Dense(units)` and then these layers or functions."""
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(units, activation)(inputs)
    for end in ends:
        x = end(x)
    model = keras.Model(inputs, x, name=name)
    model.set_weights([2 * w for w in model.get_weights()])
    return model


def compiled(student, teacher, loss, from_logits=None, **options):
    distiller = kd.Distiller(student, teacher, from_logits=from_logits)
    distiller.compile(keras.optimizers.SGD(0.0), loss, **options)
    return distiller


def fitted(distiller, x, y=None, **options):
    options = {"batch_size": len(x), **options}
    history = distiller.fit(x, y, verbose=0, **options).history
    return {name: values[0] for name, values in history.items()}


def kl(teacher, student):
    """`sum_c p_c log(p_c / q_c)` of logits, averaged over rows and positions."""
    p, log_q = softmax(teacher.astype("float64"), -1), log_softmax(student.astype("float64"), -1)
    return (p * (np.log(p) - log_q)).sum(-1).mean()


def bernoulli_kl(teacher, student):
    p, q = expit(teacher.astype("float64")), expit(student.astype("float64"))
    return (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).sum(-1).mean()


# ---------------------------------------------------------- the hard loss says it


def mine(y, z):
    """A loss of the user's own, which says nothing."""
    return ops.mean(ops.square(y - z), axis=-1)


class OfMyOwn(keras.losses.MeanSquaredError):
    """A subclass is what its base is."""


REGRESSIONS = [
    "mse",
    "MAE",
    "Huber",
    keras.losses.LogCosh(),
    keras.losses.Poisson(),
    keras.losses.CosineSimilarity(),
    keras.losses.MeanSquaredError,
    functools.partial(keras.losses.huber, delta=2.0),
    OfMyOwn(),
]


def named(value):
    """A name of a parameter that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize("units", [1, 4])
@pytest.mark.parametrize("loss", REGRESSIONS, ids=named)
def test_a_regression_is_asked_for_its_loss(loss, units):
    student, teacher = ending(units=units), ending(units=units)
    with pytest.raises(ValueError, match=r"that of a regression.*`keras_kd.losses.LogitMSE\(\)`"):
        compiled(student, teacher, loss)


@pytest.mark.parametrize("given", [kd.losses.LogitMSE, "mse"])
def test_a_regression_of_several_units_is_compared_as_it_is(given, tmp_path):
    student, teacher = ending(), ending()
    s, t = student.predict(data(), verbose=0), teacher.predict(data(), verbose=0)
    loss = given if isinstance(given, str) else given()
    distiller = compiled(student, teacher, "mse", distillation_loss=loss)
    logs = fitted(distiller, data(), NUMBERS)
    np.testing.assert_allclose(logs["distillation_loss"], ((s - t) ** 2).mean(), rtol=1e-4)
    assert "agreement" not in logs
    distiller.save(tmp_path / "d.keras")
    again = fitted(kd.load_distiller(tmp_path / "d.keras", teacher=teacher), data(), NUMBERS)
    assert again == pytest.approx(logs, rel=1e-6)


@pytest.mark.parametrize("activation", ["relu", "softplus", "exponential", None])
def test_values_of_a_regression_may_look_like_anything(activation):
    if activation is None:

        def activation(z):
            return ops.sigmoid(z) / 2

    student, teacher = ending(activation=activation), ending(activation=activation)
    s, t = student.predict(data(), verbose=0), teacher.predict(data(), verbose=0)
    distiller = compiled(student, teacher, "mse", distillation_loss=kd.losses.LogitMSE())
    logs = fitted(distiller, data(), NUMBERS)
    np.testing.assert_allclose(logs["distillation_loss"], ((s - t) ** 2).mean(), rtol=1e-4)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_regression_that_ends_in_probabilities_is_asked(activation):
    student, teacher = ending(activation=activation), ending(activation=activation)
    with pytest.raises(ValueError, match=f"4 {activation} output units, and `loss='mse'`"):
        compiled(student, teacher, "mse")
    with pytest.raises(ValueError, match='would compare logits with values.*"mse"'):
        compiled(ending(), teacher, "mse", distillation_loss=kd.losses.LogitMSE())
    s, t = ending(), teacher
    expected = ((s.predict(data(), verbose=0) - t.predict(data(), verbose=0)) ** 2).mean()
    logs = fitted(compiled(s, t, "mse", distillation_loss="mse"), data(), NUMBERS)
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.BinaryCrossentropy(from_logits=True),
        keras.losses.BinaryFocalCrossentropy(from_logits=True),
        functools.partial(keras.losses.binary_crossentropy, from_logits=True),
    ],
    ids=named,
)
def test_several_logits_of_a_binary_loss_are_independent(loss):
    student, teacher = ending(), ending()
    s, t = student.predict(data(), verbose=0), teacher.predict(data(), verbose=0)
    logs = fitted(compiled(student, teacher, loss), data(), FLAGS)
    np.testing.assert_allclose(logs["binary_soft_targets"], bernoulli_kl(t, s), rtol=1e-4)
    np.testing.assert_allclose(logs["agreement"], ((s > 0) == (t > 0)).mean(), rtol=1e-6)


@pytest.mark.parametrize("units", [1, 4])
def test_where_nothing_tells_the_user_is_asked(units):
    with pytest.raises(ValueError, match=r"does not say whether it classifies.*LogitMSE\(\)"):
        compiled(ending(units=units), ending(units=units), mine)


def test_layers_tell_where_a_loss_of_ones_own_does_not():
    student, teacher = ending(), ending(activation="softmax")
    s, t = student.predict(data(), verbose=0), np.log(teacher.predict(data(), verbose=0))
    logs = fitted(compiled(student, teacher, mine), data(), NUMBERS)
    np.testing.assert_allclose(logs["soft_targets"], kl(t, s), rtol=1e-4)
    student, teacher = ending(), ending(activation="sigmoid")
    assert (
        "binary_soft_targets" in compiled(student, teacher, mine).summary_of_transfers()[0]["name"]
    )


def test_without_labels_the_loss_that_the_teacher_was_trained_with_tells():
    teacher = ending()
    teacher.compile("sgd", "mse")
    with pytest.raises(ValueError, match="teacher was compiled with `loss='mse'`"):
        compiled(ending(), teacher, None)
    teacher.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    assert compiled(ending(), teacher, None).transfers[0].name == "binary_soft_targets"
    with pytest.raises(ValueError, match="one linear output unit, and no hard loss"):
        compiled(ending(units=1), ending(units=1), None)
    assert compiled(ending(), ending(), None).transfers[0].name == "soft_targets"


def heads(name, **sizes):
    inputs = keras.Input((FEATURES,))
    outputs = {key: layers.Dense(size, name=key)(inputs) for key, size in sizes.items()}
    model = keras.Model(inputs, outputs, name=name)
    model.set_weights([3 * w for w in model.get_weights()])
    return model


def test_each_head_is_what_its_own_loss_says():
    student, teacher = (heads(name, age=1, cls=4, tags=3) for name in ("student", "teacher"))
    loss = {
        "age": "mse",
        "cls": crossentropy(),
        "tags": keras.losses.BinaryCrossentropy(from_logits=True),
    }
    labels = {"age": NUMBERS[:, :1], "cls": LABELS, "tags": FLAGS[:, :3]}
    with pytest.raises(ValueError, match=r"output `age`.*distillation_loss=\{'age': ...\}"):
        compiled(student, teacher, loss)
    with pytest.raises(ValueError, match="for all outputs.*output `age`.*a regression"):
        compiled(student, teacher, loss, distillation_loss=kd.losses.SoftTargets())
    own = {
        "age": kd.losses.LogitMSE(),
        "cls": kd.losses.SoftTargets(),
        "tags": kd.losses.BinarySoftTargets(),
    }
    s, t = student.predict(data(), verbose=0), teacher.predict(data(), verbose=0)
    logs = fitted(compiled(student, teacher, loss, distillation_loss=own), data(), labels)
    np.testing.assert_allclose(
        logs["age_logit_mse"], ((s["age"] - t["age"]) ** 2).mean(), rtol=1e-4
    )
    np.testing.assert_allclose(logs["cls_soft_targets"], kl(t["cls"], s["cls"]), rtol=1e-4)
    np.testing.assert_allclose(
        logs["tags_binary_soft_targets"], bernoulli_kl(t["tags"], s["tags"]), rtol=1e-4
    )
    # Of 12 decisions between classes and 12 tags each; no decision is made of an age.
    same = [
        s["cls"].argmax(-1) == t["cls"].argmax(-1),
        ((s["tags"] > 0) == (t["tags"] > 0)).mean(-1),
    ]
    np.testing.assert_allclose(logs["agreement"], np.mean(same), rtol=1e-6)
    del labels["age"], loss["age"], own["age"]
    del labels["cls"], loss["cls"], own["cls"]
    with pytest.raises(ValueError, match="for all outputs.*`tags`.*independent classes"):
        compiled(
            heads("s", tags=3, more=3),
            heads("t", tags=3, more=3),
            loss,
            distillation_loss=kd.losses.SoftTargets(),
        )


def nested_heads():
    inputs = keras.Input((FEATURES,))
    main = {"kind": layers.Dense(4, name="k")(inputs), "flags": layers.Dense(3, name="f")(inputs)}
    return keras.Model(inputs, {"main": main, "size": layers.Dense(1, name="s")(inputs)})


@pytest.mark.parametrize("given", ["nested", "by name", "list", "default"])
def test_losses_are_nested_as_the_outputs_are(given):
    student, teacher = nested_heads(), nested_heads()
    s, t = (keras.tree.flatten(m.predict(data(), verbose=0)) for m in (student, teacher))
    soft, binary = kd.losses.SoftTargets(), kd.losses.BinarySoftTargets()
    losses = {
        "nested": {"main": {"kind": soft, "flags": binary}, "size": "mse"},
        "by name": {"k": soft, "f": binary, "s": "mse"},
        "list": [binary, soft, "mse"],
        "default": None,
    }[given]
    entropy = keras.losses.BinaryCrossentropy(from_logits=True)
    hard = {"main": {"kind": crossentropy(), "flags": entropy}, "size": "mse"}
    labels = {"main": {"kind": LABELS, "flags": FLAGS[:, :3]}, "size": NUMBERS[:, :1]}
    if losses is None:
        hard["size"] = entropy
        labels["size"] = FLAGS[:, :1]
    distiller = compiled(student, teacher, hard, distillation_loss=losses, temperature=1.0)
    logs = fitted(distiller, data(), labels)
    want = bernoulli_kl(t[0], s[0]) + kl(t[1], s[1])
    want += bernoulli_kl(t[2], s[2]) if losses is None else ((t[2] - s[2]) ** 2).mean()
    assert logs["distillation_loss"] == pytest.approx(want, rel=1e-4)


def test_losses_nested_otherwise_are_refused():
    losses = {"main": {"kinds": "mse"}, "size": "mse"}
    with pytest.raises(ValueError, match="not nested as the outputs are"):
        compiled(nested_heads(), nested_heads(), "mse", distillation_loss=losses)


def test_regressors_are_averaged_by_what_they_return():
    models = [ending(name=name) for name in "ab"]
    student = ending(name="student")
    teacher = kd.teachers.Ensemble(models, weights=[1, 3])
    a, b, s = (model.predict(data(), verbose=0) for model in (*models, student))
    logs = fitted(
        compiled(student, teacher, "mse", distillation_loss=kd.losses.LogitMSE()), data(), NUMBERS
    )
    expected = ((0.25 * a + 0.75 * b - s) ** 2).mean()
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-4)
    teacher.weights = "confidence"
    distiller = compiled(student, teacher, "mse", distillation_loss=kd.losses.LogitMSE())
    with pytest.raises(ValueError, match="'confidence'.*this output is a regression"):
        distiller.fit(data(), NUMBERS, verbose=0)


def test_caches_of_regressors_are_averaged_and_hold_every_unit(tmp_path):
    models, student = [ending(name=name) for name in "ab"], ending(name="student")
    for model in models:
        kd.cache.write(model, data(), tmp_path / model.name, dtype="float32")
    cached = kd.teachers.CachedTeacher([tmp_path / "a", tmp_path / "b"], weights=[1, 3])
    distiller = compiled(student, cached, "mse", distillation_loss=kd.losses.LogitMSE())
    a, b, s = (model.predict(data(), verbose=0) for model in (*models, student))
    logs = fitted(distiller, data(), NUMBERS)
    expected = ((0.25 * a + 0.75 * b - s) ** 2).mean()
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-4)
    kd.cache.write(models[0], data(), tmp_path / "k", top_k=2)
    distiller = compiled(
        student,
        kd.teachers.CachedTeacher(tmp_path / "k"),
        "mse",
        distillation_loss=kd.losses.LogitMSE(),
    )
    with pytest.raises(ValueError, match="2 most probable classes.*a regression"):
        distiller.fit(data(), NUMBERS, verbose=0)


# ------------------------------------------- probabilities are not taken for logits


def average(units=4, name=None):
    inputs = keras.Input((FEATURES,))
    each = [layers.Dense(units, "softmax")(inputs) for _ in range(2)]
    return keras.Model(inputs, layers.Average()(each), name=name)


def concatenated(name=None):
    inputs = keras.Input((FEATURES,))
    parts = [layers.Dense(2, "softmax")(inputs), layers.Dense(2)(inputs)]
    return keras.Model(inputs, layers.Concatenate()(parts), name=name)


def nested_after(name=None):
    inner = keras.Input((4,))
    scaled = keras.Model(inner, layers.Rescaling(100.0)(inner))
    return ending(layers.Softmax(), scaled, name=name)


def of_groups(layer, name=None):
    """Eight probabilities, added in pairs by a layer with weights."""
    inputs = keras.Input((FEATURES,))
    fine = layers.Dense(8, "softmax")(inputs)
    pairs = np.kron(np.eye(4), np.ones((2, 1))).astype("float32")
    model = keras.Model(inputs, layer(fine), name=name)
    layer.set_weights([pairs.reshape(layer.get_weights()[0].shape)])
    return model


class Subclassed(keras.Model):
    """Ends in a weightless layer behind a softmax, which no graph shows."""

    def __init__(self, end, **options):
        super().__init__(**options)
        self.last = layers.Dense(4, "softmax")
        self.end = end

    def call(self, x):
        return self.end(self.last(x))


def softmax_of_my_own(z):
    return ops.softmax(z / 3)


softmax_of_my_own.__name__ = "softmax"


class Head(layers.Dense):
    """No layer of Keras, whatever its activation says."""

    def call(self, x):
        return ops.softmax(super().call(x))


HIDDEN = {
    "average": average,
    "concatenated with logits": concatenated,
    "custom activation": lambda name: ending(activation=softmax_of_my_own, name=name),
    "lambda activation": lambda name: ending(activation=lambda z: ops.softmax(z), name=name),
    "subclassed Dense": lambda name: ending(Head(4), name=name),
    "hard sigmoid": lambda name: ending(activation="hard_sigmoid", name=name),
    "Rescaling": lambda name: ending(layers.Softmax(), layers.Rescaling(100.0), name=name),
    "nested Rescaling": nested_after,
    "Dense": lambda name: of_groups(layers.Dense(4, use_bias=False), name),
    "EinsumDense": lambda name: of_groups(layers.EinsumDense("ab,bc->ac", 4), name),
    "Lambda in percent": lambda name: ending(
        layers.Softmax(), layers.Lambda(lambda p: 100 * p), name=name
    ),
    "Lambda that overshoots": lambda name: ending(
        layers.Softmax(), layers.Lambda(lambda p: 1.2 * p - 0.05), name=name
    ),
    "ReLU": lambda name: ending(layers.Softmax(), layers.ReLU(), name=name),
    "clip": lambda name: ending(layers.Softmax(), lambda p: ops.clip(p, 1e-7, 1), name=name),
    "Reshape": lambda name: ending(
        layers.Softmax(), layers.Reshape((2, 2)), layers.Reshape((4,)), name=name
    ),
    "log of a sigmoid": lambda name: ending(layers.Activation("sigmoid"), ops.log, name=name),
    "exponential": lambda name: ending(activation="exponential", name=name),
    "recurrent softmax": lambda name: ending(
        layers.Reshape((2, 2)), layers.SimpleRNN(4, activation="softmax"), name=name
    ),
    "subclassed Average": lambda name: Subclassed(lambda p: layers.Average()([p, p]), name=name),
    "subclassed Rescaling": lambda name: Subclassed(layers.Rescaling(7.0), name=name),
}


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_probabilities_that_layers_hide_are_refused_on_either_side(kind, side):
    models = {"teacher": ending(name="teacher"), "student": ending(name="student")}
    models[side] = HIDDEN[kind](name=side)
    models[side](data())
    with pytest.raises(ValueError, match=rf"outputs of the {side} .*`from_logits=False`"):
        distiller = compiled(models["student"], models["teacher"], crossentropy())
        distiller.fit(data(), LABELS, verbose=0)


KEPT = {
    "centered": [layers.Lambda(lambda z: z - ops.mean(z, axis=-1, keepdims=True))],
    "Reshape": [layers.Reshape((2, 2)), layers.Reshape((4,))],
    "linear activation": [layers.Activation("linear")],
    "float64 cast": [lambda z: ops.cast(z, "float32")],
    "Add": [lambda z: layers.Add()([z, z])],
    "temperature": [lambda z: z / 3.0],
    "log_softmax": [layers.Activation("log_softmax")],
    "log of softmax": [layers.Softmax(), ops.log],
    "BatchNormalization": [layers.BatchNormalization()],
    "hidden softmax": [layers.Softmax(), layers.Dense(4, kernel_initializer="random_normal")],
}


@pytest.mark.parametrize("kind", KEPT)
def test_logits_stay_logits_behind_layers_that_keep_them(kind):
    teacher, student = ending(*KEPT[kind], name="teacher"), ending(name="student")
    t, s = teacher.predict(data(), verbose=0), student.predict(data(), verbose=0)
    logs = fitted(compiled(student, teacher, crossentropy()), data(), LABELS)
    np.testing.assert_allclose(logs["soft_targets"], kl(t, s), rtol=1e-3)


PASSED = {
    "linear activation": [layers.Softmax(), layers.Activation("linear", dtype="float32")],
    "Dropout": [layers.Softmax(), layers.Dropout(0.5)],
    "Softmax as activation": [layers.Activation(layers.Softmax())],
    "ops as activation": [layers.Activation(ops.softmax)],
    "positive axis": [layers.Softmax(axis=1)],
    "twice": [layers.Softmax(), layers.Softmax()],
}


@pytest.mark.parametrize("kind", PASSED)
def test_the_logits_of_a_softmax_are_found_behind_layers_that_pass_it_on(kind):
    teacher, student = ending(*PASSED[kind], name="teacher"), ending(name="student")
    t, s = np.log(teacher.predict(data(), verbose=0)), student.predict(data(), verbose=0)
    logs = fitted(compiled(student, teacher, crossentropy()), data(), LABELS)
    np.testing.assert_allclose(logs["soft_targets"], kl(t, s), rtol=1e-3)


def test_the_average_of_softmax_nets_is_distilled_when_the_user_says_so():
    teacher, student = average(name="teacher"), ending(name="student")
    t, s = np.log(teacher.predict(data(), verbose=0)), student.predict(data(), verbose=0)
    told = {"teacher": False, "student": None}
    logs = fitted(compiled(student, teacher, crossentropy(), told), data(), LABELS)
    np.testing.assert_allclose(logs["soft_targets"], kl(t, s), rtol=1e-4)


def test_what_the_user_says_of_logits_is_compared_with_the_layers_and_rows():
    told = {"teacher": True, "student": None}
    with pytest.raises(ValueError, match="`from_logits=True` would take them for logits"):
        compiled(ending(), ending(activation="softmax"), crossentropy(), told)
    told = {"teacher": False, "student": None}
    with pytest.raises(ValueError, match="`from_logits=False`.*last layer makes any number"):
        compiled(ending(), ending(), crossentropy(), told)
    distiller = compiled(ending(), ending(lambda z: 3 * z), crossentropy(), told)
    with pytest.raises(ValueError, match="`from_logits=False`.*values run from"):
        distiller.fit(data(), LABELS, verbose=0)


def test_losses_of_keras_never_compare_probabilities_with_logits():
    soft, mine = ending(activation="softmax"), ending(activation=softmax_of_my_own)
    with pytest.raises(ValueError, match="teacher returns probabilities, the student logits"):
        compiled(ending(), soft, crossentropy(), distillation_loss="mse")
    distiller = compiled(ending(), mine, crossentropy(), distillation_loss="mse")
    with pytest.raises(ValueError, match="teacher returns probabilities, the student logits"):
        distiller.fit(data(), LABELS, verbose=0)


# ------------------------------------------------------------------- another axis


def image(*ends, name=None):
    """A segmentation of three classes; images of 4x4 with 2 channels."""
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 1)(inputs)
    for end in ends:
        x = end(x)
    return keras.Model(inputs, x, name=name)


IMAGES = np.random.default_rng(5).normal(size=(6, 4, 4, 2)).astype("float32")
FIRST = layers.Permute((3, 1, 2))


@pytest.mark.parametrize(
    "end",
    [
        layers.Softmax(axis=1),
        layers.Softmax(axis=(1, 2)),
        lambda z: ops.softmax(z, axis=1),
        lambda z: ops.log_softmax(z, axis=-3),
    ],
)
@pytest.mark.parametrize("told", [None, False])
def test_a_softmax_over_another_axis_is_refused(end, told):
    teacher = image(FIRST, end, name="teacher")
    student = image(FIRST, name="student")
    for loss in (None, kd.losses.SoftTargets(), kd.losses.LogitMSE()):
        with pytest.raises(ValueError, match="classes are on axis.*compared along the last"):
            compiled(
                student,
                teacher,
                None,
                {"teacher": told, "student": None},
                distillation_loss=loss,
            )


def test_probabilities_over_another_axis_are_seen_in_the_rows():
    teacher = image(FIRST, layers.Activation(lambda z: ops.softmax(z, axis=1)), name="teacher")
    distiller = compiled(image(FIRST), teacher, None, {"teacher": False, "student": None})
    with pytest.raises(ValueError, match="sum to 1 over axis 1, not over the last one"):
        distiller.fit(IMAGES, verbose=0)


def test_a_hard_loss_over_another_axis_is_refused():
    with pytest.raises(ValueError, match="has the classes on axis 1"):
        compiled(image(FIRST), image(FIRST), keras.losses.CategoricalCrossentropy(True, axis=1))


def test_upsampling_before_and_behind_a_softmax():
    student = image(layers.UpSampling2D(), name="student")
    for end in (layers.UpSampling2D(), layers.UpSampling2D(interpolation="bilinear")):
        with pytest.raises(ValueError, match="computed from probabilities"):
            compiled(student, image(layers.Softmax(), end, name="teacher"), None)
    teacher = image(layers.UpSampling2D(), layers.Softmax(axis=3), name="teacher")
    t, s = np.log(teacher.predict(IMAGES, verbose=0)), student.predict(IMAGES, verbose=0)
    logs = fitted(compiled(student, teacher, None), IMAGES)
    np.testing.assert_allclose(logs["soft_targets"], kl(t, s), rtol=1e-4)


# ----------------------------------------------------------------- TimeDistributed

TOKENS = np.random.default_rng(6).normal(size=(5, 7, FEATURES)).astype("float32")
TOKEN_LABELS = np.random.default_rng(7).integers(0, 4, (5, 7))


def tokens(end, length=7, masked=False, name=None):
    inputs = keras.Input((length, FEATURES))
    x = layers.Masking()(inputs) if masked else inputs
    model = keras.Model(inputs, end(x), name=name)
    model.set_weights([3 * w for w in model.get_weights()])
    return model


def stepwise(*ends):
    def end(x):
        for layer in ends:
            x = layers.TimeDistributed(layer)(x)
        return x

    return end


STEPS = {
    "Dense": lambda: stepwise(layers.Dense(4, "softmax")),
    "Softmax": lambda: stepwise(layers.Dense(4), layers.Softmax()),
    "Activation": lambda: stepwise(layers.Dense(4), layers.Activation("softmax")),
    "Sequential": lambda: stepwise(
        keras.Sequential([keras.Input((FEATURES,)), layers.Dense(4), layers.Softmax()])
    ),
}


@pytest.mark.parametrize("length", [7, None])
@pytest.mark.parametrize("kind", STEPS)
def test_a_softmax_at_every_step(kind, length):
    teacher, student = tokens(STEPS[kind](), length, name="t"), tokens(layers.Dense(4), name="s")
    t, s = np.log(teacher.predict(TOKENS, verbose=0)), student.predict(TOKENS, verbose=0)
    distiller = compiled(student, teacher, crossentropy())
    logs = fitted(distiller, TOKENS, TOKEN_LABELS)
    np.testing.assert_allclose(logs["soft_targets"], kl(t, s), rtol=1e-4)
    np.testing.assert_allclose(logs["agreement"], (t.argmax(-1) == s.argmax(-1)).mean(), rtol=1e-6)
    # The model is left as it was.
    np.testing.assert_allclose(teacher.predict(TOKENS, verbose=0), np.exp(t), rtol=1e-5)


def test_saturated_logits_at_every_step_of_a_masked_student():
    teacher, student = (
        tokens(stepwise(layers.Dense(4, "softmax")), masked=True, name=name) for name in "ts"
    )
    teacher.set_weights([40 * w for w in teacher.get_weights()])
    x = TOKENS.copy()
    x[:, 5:] = 0
    t, s = (x[:, :5] @ m.get_weights()[0] + m.get_weights()[1] for m in (teacher, student))
    distiller = compiled(
        student,
        teacher,
        "sparse_categorical_crossentropy",
        distillation_loss=kd.losses.LogitMSE(),
    )
    logs = fitted(distiller, x, TOKEN_LABELS)
    np.testing.assert_allclose(logs["logit_mse"], ((t - s) ** 2).mean(), rtol=1e-4)


# --------------------------------------------------- heads that one side alone has


@pytest.mark.parametrize("of_teacher", ["dict", "alone"])
@pytest.mark.parametrize("of_student", ["dict", "list"])
def test_a_head_of_the_student_alone_needs_no_counterpart(of_student, of_teacher, tmp_path):
    inputs = keras.Input((FEATURES,))
    main, aux = layers.Dense(4, name="main")(inputs), layers.Dense(3, name="aux")(inputs)
    student = keras.Model(
        inputs, {"main": main, "aux": aux} if of_student == "dict" else [aux, main]
    )
    answer = layers.Dense(4, name="answer" if of_teacher == "alone" else "main")(inputs)
    teacher = keras.Model(inputs, answer if of_teacher == "alone" else {"main": answer})
    labels, loss = (
        {"main": LABELS, "aux": LABELS % 3},
        dict.fromkeys(("main", "aux"), crossentropy()),
    )
    if of_student == "list":
        labels, loss = [LABELS % 3, LABELS], [crossentropy(), crossentropy()]
    distiller = compiled(
        student, teacher, loss, distillation_loss={"main": kd.losses.SoftTargets()}
    )
    s = keras.Model(inputs, main).predict(data(), verbose=0)
    t = keras.Model(inputs, answer).predict(data(), verbose=0)
    logs = fitted(distiller, data(), labels)
    np.testing.assert_allclose(logs["distillation_loss"], kl(t, s), rtol=1e-4)
    np.testing.assert_allclose(logs["agreement"], (t.argmax(-1) == s.argmax(-1)).mean(), rtol=1e-6)
    distiller.save(tmp_path / "d.keras")
    again = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    assert fitted(again, data(), labels)["loss"] == pytest.approx(logs["loss"], rel=1e-6)
    with pytest.raises(ValueError, match="outputs"):
        compiled(student, teacher, loss)


def test_lists_of_the_same_names_in_another_order_are_refused():
    inputs = keras.Input((FEATURES,))

    def model(*names):
        return keras.Model(inputs, [layers.Dense(4, name=name)(inputs) for name in names])

    with pytest.raises(ValueError, match="same names in another order"):
        compiled(model("a", "b"), model("b", "a"), [crossentropy()] * 2)


def test_what_a_teacher_of_more_heads_reads_follows_the_names():
    """A head that both have is read as what it is, wherever it stands."""
    student, teacher = heads("student", tags=3), heads("teacher", cls=4, tags=3, age=1)
    members = [teacher, heads("second", cls=4, tags=3, age=1)]
    loss = {"tags": keras.losses.BinaryCrossentropy(from_logits=True)}
    distiller = compiled(student, kd.teachers.Ensemble(members), loss)
    p = np.mean([expit(m.predict(data(), verbose=0)["tags"].astype("float64")) for m in members], 0)
    t, s = np.log(p / (1 - p)), student.predict(data(), verbose=0)["tags"]
    logs = fitted(distiller, data(), {"tags": FLAGS[:, :3]})
    np.testing.assert_allclose(logs["distillation_loss"], bernoulli_kl(t, s), rtol=1e-4)


# ------------------------------------------------------- losses as Keras takes them


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("mse", "mean_squared_error"),
        ("MeanSquaredError", "mean_squared_error"),
        (keras.losses.MeanSquaredError, "mean_squared_error"),
        (keras.losses.mean_squared_error, "mean_squared_error"),
        ({"class_name": "MeanSquaredError", "config": {}}, "mean_squared_error"),
        ([kd.losses.LogitMSE(), "mse"], "mean_squared_error"),
    ],
    ids=named,
)
def test_a_distillation_loss_as_keras_takes_it(given, name, tmp_path):
    student, teacher = ending(name="student"), ending(name="teacher")
    s, t = student.predict(data(), verbose=0), teacher.predict(data(), verbose=0)
    distiller = compiled(student, teacher, crossentropy(), distillation_loss=given)
    logs = fitted(distiller, data(), LABELS)
    np.testing.assert_allclose(logs[name], ((s - t) ** 2).mean(), rtol=1e-4)
    distiller.save(tmp_path / "d.keras")
    again = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    assert fitted(again, data(), LABELS)[name] == pytest.approx(logs[name], rel=1e-6)


class WithArguments(keras.losses.Loss):
    def __init__(self, share):
        super().__init__()
        self.share = share


def test_what_is_no_distillation_loss_is_said():
    student, teacher = ending(activation="softmax"), ending(activation="softmax")
    labels = "sparse_categorical_crossentropy"
    with pytest.raises(TypeError, match="Did you mean 'mean_squared_error'"):
        compiled(student, teacher, labels, distillation_loss="mean_square_error")
    for numbers in (labels, keras.losses.SparseCategoricalCrossentropy(), "ctc"):
        with pytest.raises(ValueError, match="reads class numbers"):
            compiled(student, teacher, labels, distillation_loss=numbers)
    with pytest.raises(ValueError, match="a class that needs arguments"):
        compiled(student, teacher, labels, distillation_loss=WithArguments)


# ----------------------------------------------------------------------- agreement


def test_agreement_counts_as_the_loss_does():
    """Weights of samples and tokens, masks and ignored labels, over uneven batches."""
    student, teacher = (tokens(layers.Dense(4), masked=True, name=name) for name in "st")
    x, y = TOKENS.copy(), TOKEN_LABELS.copy()
    x[:2, 4:] = 0
    y[:, :2] = -1
    valid = (x != 0).any(-1)
    s, t = student.predict(x, verbose=0), teacher.predict(x, verbose=0)
    same = s.argmax(-1) == t.argmax(-1)
    rng = np.random.default_rng(8)
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    for of, ignored in ((None, False), ("rows", False), ("tokens", False), ("tokens", True)):
        weight = {
            None: None,
            "rows": rng.uniform(0, 2, 5).astype("float32"),
            "tokens": rng.uniform(0, 2, (5, 7)).astype("float32"),
        }[of]
        counts = valid * (1 if weight is None else weight[:, None] if of == "rows" else weight)
        counts = counts * (y >= 0) if ignored else counts
        distiller = compiled(student, teacher, ignoring if ignored else crossentropy())
        labels = y if ignored else TOKEN_LABELS
        logs = fitted(distiller, x, labels, sample_weight=weight, batch_size=2)
        expected = (same * counts).sum() / counts.sum()
        np.testing.assert_allclose(logs["agreement"], expected, rtol=1e-5)
        if of is None:
            distiller.compile(keras.optimizers.SGD(0.0), crossentropy(), evaluate_distillation=True)
            found = distiller.evaluate(x, labels, batch_size=3, verbose=0, return_dict=True)
            np.testing.assert_allclose(found["agreement"], expected, rtol=1e-5)


def test_agreement_weighs_classes_as_fit_does():
    student, teacher = ending(name="student"), ending(name="teacher")
    s, t = student.predict(data(), verbose=0), teacher.predict(data(), verbose=0)
    weight = {0: 3.0, 1: 0.0, 2: 1.0, 3: 0.5}
    counts = np.array([weight[label] for label in LABELS])
    logs = fitted(compiled(student, teacher, crossentropy()), data(), LABELS, class_weight=weight)
    same = s.argmax(-1) == t.argmax(-1)
    np.testing.assert_allclose(logs["agreement"], (same * counts).sum() / counts.sum(), rtol=1e-5)


@pytest.mark.parametrize("loss", [None, mine])
def test_outputs_of_which_nothing_says_that_they_decide_have_no_agreement(loss):
    distiller = compiled(ending(), ending(), loss, distillation_loss=kd.losses.LogitMSE())
    assert "agreement" not in fitted(distiller, data(), None if loss is None else NUMBERS)
