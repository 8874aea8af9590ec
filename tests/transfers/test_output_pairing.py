"""Several outputs, and logits recovered from models that end in probabilities."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import CLASSES, FEATURES, crossentropy, hard_loss, kl, mlp, rows

import keras_kd as kd

# --------------------------------------------------------------- several outputs

SIZES = {"color": 3, "shape": 5}


def two_heads(structure, width, name, order=("color", "shape")):
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(width, activation="tanh", name="hidden")(inputs)
    heads = {key: layers.Dense(SIZES[key], name=key)(x) for key in order}
    outputs = {"dict": heads, "list": list(heads.values()), "tuple": tuple(heads.values())}
    model = keras.Model(inputs, outputs[structure], name=name)
    model.set_weights([3 * w for w in model.get_weights()])
    return model


def two_labels(count=10):
    x, _ = rows(count)
    rng = np.random.default_rng(3)
    return x, {key: rng.integers(0, size, count) for key, size in SIZES.items()}


def flat(model, x):
    """What a model says, by the name of the head."""
    output = model(x)
    if isinstance(output, dict):
        return {key: np.array(value) for key, value in output.items()}
    return {key: np.array(value) for key, value in zip(SIZES, output)}


@pytest.mark.parametrize("structure", ["list", "tuple", "dict"])
@pytest.mark.parametrize("one_for_all", [True, False])
def test_every_output_is_distilled(structure, one_for_all):
    student, teacher = (
        two_heads(structure, 4, "student"),
        two_heads(structure, 7, "teacher"),
    )
    x, y = two_labels()
    hard = {key: crossentropy() for key in SIZES}
    if structure == "dict":
        loss, labels = hard, y
    else:
        loss, labels = list(hard.values()), list(y.values())
    distiller = kd.Distiller(student, teacher)
    distillation = kd.losses.SoftTargets() if one_for_all else None
    distiller.compile("sgd", loss=loss, distillation_loss=distillation, alpha=0.3, temperature=2.0)
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, labels, return_dict=True)
    each = {key: kl(t[key], s[key], 2.0).mean() for key in SIZES}
    hard_sum = sum(hard_loss(s[key], y[key]).mean() for key in SIZES)
    np.testing.assert_allclose(logs["student_loss"], hard_sum, rtol=1e-5)
    np.testing.assert_allclose(logs["distillation_loss"], sum(each.values()), rtol=1e-4)
    np.testing.assert_allclose(logs["loss"], 0.3 * hard_sum + 0.7 * sum(each.values()), rtol=1e-4)
    agreement = np.mean([(s[key].argmax(1) == t[key].argmax(1)).mean() for key in SIZES])
    assert logs["agreement"] == pytest.approx(agreement)


def test_dicts_are_matched_by_name_whatever_their_order():
    student = two_heads("dict", 4, "student", order=("color", "shape"))
    teacher = two_heads("dict", 7, "teacher", order=("shape", "color"))
    x, y = two_labels()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss={key: crossentropy() for key in SIZES}, temperature=2.0)
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    expected = sum(kl(t[key], s[key], 2.0).mean() for key in SIZES)
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-4)


def test_dict_keys_need_not_be_the_names_of_layers():
    def model(width, name, keys):
        inputs = keras.Input((FEATURES,))
        x = layers.Dense(width)(inputs)
        outputs = {key: layers.Dense(SIZES[key])(x) for key in keys}
        built = keras.Model(inputs, outputs, name=name)
        built.set_weights([3 * w for w in built.get_weights()])
        return built

    student, teacher = model(4, "student", ("shape", "color")), model(7, "teacher", SIZES)
    x, y = two_labels()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd",
        loss={key: crossentropy() for key in SIZES},
        metrics={"color": ["accuracy"]},
        distillation_loss={"shape": kd.losses.SoftTargets(), "color": kd.losses.LogitMSE()},
        temperature=2.0,
    )
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    shape = kl(t["shape"], s["shape"], 2.0).mean()
    color = ((t["color"] - s["color"]) ** 2).mean()
    np.testing.assert_allclose(logs["distillation_loss"], shape + color, rtol=1e-4)
    np.testing.assert_allclose(logs["shape_soft_targets"], shape, rtol=1e-4)
    np.testing.assert_allclose(logs["color_logit_mse"], color, rtol=1e-4)


@pytest.mark.parametrize("structure", ["list", "tuple", "dict"])
def test_each_output_may_have_losses_of_its_own_or_none(structure):
    student, teacher = two_heads(structure, 4, "student"), two_heads(structure, 7, "teacher")
    x, _ = two_labels()
    losses = {"color": None, "shape": [kd.losses.SoftTargets(), kd.losses.LogitMSE()]}
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd",
        loss=None,
        distillation_loss=losses if structure == "dict" else list(losses.values()),
        temperature=2.0,
    )
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, return_dict=True)
    expected = kl(t["shape"], s["shape"], 2.0).mean() + ((t["shape"] - s["shape"]) ** 2).mean()
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-4)


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_outputs_may_be_weighted_apart(structure):
    student, teacher = two_heads(structure, 4, "student"), two_heads(structure, 7, "teacher")
    x, y = two_labels()
    rng = np.random.default_rng(4)
    weight = {key: rng.uniform(0, 2, len(x)).astype("float32") for key in SIZES}
    loss = {key: crossentropy() for key in SIZES}
    if structure == "list":
        loss, labels, weights = (list(d.values()) for d in (loss, y, weight))
    else:
        labels, weights = y, weight
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=loss, temperature=2.0)
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, labels, sample_weight=weights, return_dict=True)
    expected = sum((weight[key] * kl(t[key], s[key], 2.0)).mean() for key in SIZES)
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-4)


def test_one_weight_a_sample_serves_all_outputs():
    student, teacher = two_heads("dict", 4, "student"), two_heads("dict", 7, "teacher")
    x, y = two_labels()
    weight = np.linspace(0, 2, len(x)).astype("float32")
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss={key: crossentropy() for key in SIZES}, temperature=2.0)
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, y, sample_weight=weight, return_dict=True)
    expected = sum((weight * kl(t[key], s[key], 2.0)).mean() for key in SIZES)
    hard = sum((weight * hard_loss(s[key], y[key])).mean() for key in SIZES)
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(logs["student_loss"], hard, rtol=1e-5)


def test_labels_of_some_outputs_only():
    student, teacher = two_heads("dict", 4, "student"), two_heads("dict", 7, "teacher")
    x, y = two_labels()
    distiller = kd.Distiller(student, teacher)
    with pytest.raises(ValueError, match="output `shape`.*5 linear.*no hard loss.*SoftTargets"):
        distiller.compile("sgd", loss={"color": crossentropy()}, temperature=2.0)
    distiller.compile(
        "sgd",
        loss={"color": crossentropy()},
        distillation_loss=kd.losses.SoftTargets(),
        temperature=2.0,
    )
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, {"color": y["color"]}, return_dict=True)
    np.testing.assert_allclose(
        logs["student_loss"], hard_loss(s["color"], y["color"]).mean(), rtol=1e-5
    )
    expected = sum(kl(t[key], s[key], 2.0).mean() for key in SIZES)
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-4)


def test_a_teacher_may_have_more_named_outputs_than_the_student():
    teacher = two_heads("dict", 7, "teacher")
    student = two_heads("dict", 4, "student", order=("shape",))
    x, y = two_labels()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss={"shape": crossentropy()}, temperature=2.0)
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, {"shape": y["shape"]}, return_dict=True)
    np.testing.assert_allclose(
        logs["distillation_loss"], kl(t["shape"], s["shape"], 2.0).mean(), rtol=1e-4
    )


class SubclassedHeads(keras.Model):
    def __init__(self, width, reverse=False, **options):
        super().__init__(**options)
        self.hidden = layers.Dense(width, activation="tanh")
        self.heads = [layers.Dense(SIZES[key], name=key) for key in SIZES]
        self.reverse = reverse

    def call(self, x):
        x = self.hidden(x)
        outputs = {head.name: head(x) for head in self.heads}
        return dict(reversed(outputs.items())) if self.reverse else outputs


def test_subclassed_models_that_return_dicts():
    x, y = two_labels()
    student, teacher = SubclassedHeads(4, name="student"), SubclassedHeads(7, name="teacher")
    teacher(x), student(x)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd",
        loss={key: crossentropy() for key in SIZES},
        distillation_loss=dict.fromkeys(SIZES, kd.losses.SoftTargets()),
        temperature=2.0,
    )
    s, t = flat(student, x), flat(teacher, x)
    history = distiller.fit(x, y, batch_size=len(x), verbose=0).history
    expected = sum(kl(t[key], s[key], 2.0).mean() for key in SIZES)
    np.testing.assert_allclose(history["distillation_loss"], [expected], rtol=1e-3)


def test_a_subclassed_student_of_a_functional_teacher():
    x, y = two_labels()
    student, teacher = SubclassedHeads(4, name="student"), two_heads("dict", 7, "teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss={key: crossentropy() for key in SIZES}, temperature=2.0)
    history = distiller.fit(x, y, batch_size=len(x), epochs=2, verbose=0).history
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    expected = sum(kl(t[key], s[key], 2.0).mean() for key in SIZES)
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-3)
    assert np.isfinite(history["loss"]).all()


def test_a_transfer_serves_both_outputs_and_layers_beside_it():
    student, teacher = two_heads("list", 4, "student"), two_heads("list", 7, "teacher")
    x, _ = two_labels()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd",
        loss=None,
        distillation_loss=[
            kd.Transfer(kd.losses.SoftTargets(), weight=2.0),
            kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear"),
        ],
        temperature=2.0,
    )
    s, t = flat(student, x), flat(teacher, x)
    logs = distiller.train_on_batch(x, return_dict=True)
    soft = sum(kl(t[key], s[key], 2.0).mean() for key in SIZES)
    np.testing.assert_allclose(logs["distillation_loss"], 2 * soft + logs["hint"], rtol=1e-4)


# ----------------------------------------------------- logits from probabilities


def ending(kind, units=CLASSES):
    """A model that ends in a softmax or sigmoid in one of the ways users write it."""
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(5, activation="tanh")(inputs)
    dense = layers.Dense(units, name="last")
    if kind == "dense":
        x = layers.Dense(units, activation="softmax", name="last")(x)
    elif kind == "layer":
        x = layers.Softmax()(dense(x))
    elif kind == "activation":
        x = layers.Activation("softmax")(dense(x))
    elif kind == "ops":
        x = ops.softmax(dense(x))
    elif kind == "activations":
        x = keras.activations.softmax(dense(x))
    elif kind == "float32 head":
        x = layers.Activation("softmax", dtype="float32")(dense(x))
    elif kind == "identity behind":
        x = layers.Identity()(layers.Softmax()(dense(x)))
    elif kind == "nested":
        inner = keras.Input((5,))
        x = keras.Model(inner, layers.Softmax()(dense(inner)))(x)
    elif kind == "nested sequential":
        x = keras.Sequential([keras.Input((5,)), dense, layers.Softmax()])(x)
    elif kind == "sequential":
        return keras.Sequential([inputs, layers.Dense(5), dense, layers.Softmax()])
    elif kind == "subclassed":
        return Subclassed(units)
    elif kind == "subclassed layer":
        return SubclassedWithLayer(units)
    return keras.Model(inputs, x)


class Subclassed(keras.Model):
    def __init__(self, units):
        super().__init__()
        self.hidden = layers.Dense(5)
        self.last = layers.Dense(units, activation="softmax", name="last")

    def call(self, x):
        return self.last(self.hidden(x))


class SubclassedWithLayer(keras.Model):
    def __init__(self, units):
        super().__init__()
        self.last = layers.Dense(units, name="last")
        self.softmax = layers.Softmax()

    def call(self, x):
        return self.softmax(self.last(x))


ENDINGS = [
    "dense",
    "layer",
    "activation",
    "ops",
    "activations",
    "float32 head",
    "identity behind",
    "nested",
    "nested sequential",
    "sequential",
    "subclassed",
    "subclassed layer",
]


def far_apart(model, x):
    """Weights with which single precision shows 0 and 1 alone."""
    model(x)
    model.set_weights([40 * w for w in model.get_weights()])
    return model


@pytest.mark.parametrize("kind", ENDINGS)
def test_logits_are_recovered_exactly(kind):
    x, y = rows(10)
    teacher, student = far_apart(ending(kind), x), ending(kind)
    student(x)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        loss="sparse_categorical_crossentropy",
        distillation_loss=kd.losses.LogitMSE(),
        run_eagerly=True,
    )

    def logits(model):
        last = next(l for l in model._flatten_layers() if l.name == "last")
        seen = []
        original = last.activation
        last.activation = lambda z: seen.append(np.array(z)) or original(z)
        model(x)
        last.activation = original
        return seen[0]

    t, s = logits(teacher), logits(student)
    assert np.ptp(t, axis=1).max() > 50
    history = distiller.fit(x, y, batch_size=10, verbose=0).history
    np.testing.assert_allclose(history["distillation_loss"], [((t - s) ** 2).mean()], rtol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "layer", "subclassed"])
def test_the_recovered_logits_train_in_a_graph(kind):
    x, y = rows(12)
    teacher, student = ending(kind), ending(kind)
    teacher(x), student(x)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0), loss="sparse_categorical_crossentropy", temperature=2.0
    )
    t, s = (np.log(np.array(m(x))) for m in (teacher, student))
    history = distiller.fit(x, y, batch_size=12, verbose=0).history
    np.testing.assert_allclose(history["distillation_loss"], [kl(t, s, 2.0).mean()], rtol=1e-3)


def sigmoid_model(ends, name, units=3):
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(5, activation="tanh")(inputs)
    if ends == "logits":
        x = layers.Dense(units, name="last")(x)
    elif ends == "dense":
        x = layers.Dense(units, activation="sigmoid", name="last")(x)
    elif ends == "activation":
        x = layers.Activation("sigmoid")(layers.Dense(units, name="last")(x))
    elif ends == "ops":
        x = ops.sigmoid(layers.Dense(units, name="last")(x))
    model = keras.Model(inputs, x, name=name)
    model.set_weights([3 * w for w in model.get_weights()])
    return model


def bernoulli_kl(teacher, student, temperature):
    p, q = (1 / (1 + np.exp(-np.asarray(z, "float64") / temperature)) for z in (teacher, student))
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return temperature**2 * each.sum(-1)


@pytest.mark.parametrize("ends", ["dense", "activation", "ops"])
@pytest.mark.parametrize("units", [1, 3])
def test_sigmoid_models_distil_independent_outputs(ends, units):
    teacher, student = (sigmoid_model(ends, name, units) for name in ("teacher", "student"))
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss="binary_crossentropy", temperature=2.0)
    x, _ = rows(10)
    y = np.random.default_rng(0).integers(0, 2, (10, units)).astype("float32")
    p, q = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    t, s = np.log(p / (1 - p)), np.log(q / (1 - q))
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(
        logs["binary_soft_targets"], bernoulli_kl(t, s, 2.0).mean(), rtol=1e-3
    )
    assert logs["agreement"] == pytest.approx(((t > 0) == (s > 0)).mean())


def test_one_linear_unit_that_classifies():
    teacher, student = (sigmoid_model("logits", name, 1) for name in ("teacher", "student"))
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd", loss=keras.losses.BinaryCrossentropy(from_logits=True), temperature=2.0
    )
    x, _ = rows(10)
    y = np.random.default_rng(0).integers(0, 2, (10, 1)).astype("float32")
    t, s = np.array(teacher(x)), np.array(student(x))
    logs = distiller.train_on_batch(x, y, return_dict=True)
    expected = bernoulli_kl(t, s, 2.0).mean()
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-3)


def test_a_regression_distils_by_logit_mse():
    teacher, student = (sigmoid_model("logits", name, 1) for name in ("teacher", "student"))
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss="mse", distillation_loss=kd.losses.LogitMSE())
    x, _ = rows(10)
    y = np.zeros((10, 1), "float32")
    t, s = np.array(teacher(x)), np.array(student(x))
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], ((t - s) ** 2).mean(), rtol=1e-4)


class Hides(keras.Model):
    """Makes probabilities where no layer shows how."""

    def __init__(self, function="softmax", **options):
        super().__init__(**options)
        self.hidden = layers.Dense(5)
        self.last = layers.Dense(CLASSES)
        self.function = {"softmax": ops.softmax, "sigmoid": ops.sigmoid, "none": lambda z: 3 * z}[
            function
        ]

    def call(self, x):
        return self.function(self.last(self.hidden(x)))


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_hidden_probabilities_are_refused_by_name(side):
    x, y = rows()
    models = {"teacher": mlp(name="teacher"), "student": mlp(name="student")}
    models[side] = Hides(name=side)
    models[side](x)
    distiller = kd.Distiller(models["student"], models["teacher"])
    distiller.compile("sgd", loss="sparse_categorical_crossentropy")
    before = models["student"].get_weights()
    with pytest.raises(ValueError, match=rf"outputs of the {side} .*`from_logits=False`"):
        distiller.fit(x, y, verbose=0)
    for a, b in zip(before, models["student"].get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("data", ["dataset", "generator", "train_on_batch"])
def test_hidden_probabilities_are_refused_whatever_the_data(data):
    import tensorflow as tf

    x, y = rows()
    teacher, student = Hides(name="teacher"), mlp(name="student")
    teacher(x)
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy())
    with pytest.raises(ValueError, match="`from_logits=False`"):
        if data == "dataset":
            distiller.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(4), verbose=0)
        elif data == "generator":
            distiller.fit((batch for batch in [(x, y)]), verbose=0)
        else:
            distiller.train_on_batch(x, y)


def test_from_logits_false_distils_the_logarithm():
    x, y = rows()
    teacher, student = Hides(name="teacher"), Hides(name="student")
    teacher(x), student(x)
    distiller = kd.Distiller(student, teacher, from_logits=False)
    distiller.compile(
        keras.optimizers.SGD(0.0), loss="sparse_categorical_crossentropy", temperature=2.0
    )
    t, s = (np.log(np.array(m(x))) for m in (teacher, student))
    history = distiller.fit(x, y, batch_size=12, verbose=0).history
    np.testing.assert_allclose(history["distillation_loss"], [kl(t, s, 2.0).mean()], rtol=1e-3)


def test_from_logits_false_of_one_side_and_sigmoids():
    x, _ = rows()
    teacher, student = Hides("sigmoid", name="teacher"), sigmoid_model("dense", "student", CLASSES)
    teacher(x)
    distiller = kd.Distiller(student, teacher, from_logits={"teacher": False, "student": None})
    distiller.compile(
        "sgd", loss=None, distillation_loss=kd.losses.BinarySoftTargets(), temperature=2.0
    )
    p, q = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    t, s = np.log(p / (1 - p)), np.log(q / (1 - q))
    logs = distiller.train_on_batch(x, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], bernoulli_kl(t, s, 2.0).mean(), rtol=1e-3)


def test_logits_that_no_layer_shows_are_taken_as_they_are():
    x, y = rows()
    teacher, student = Hides("none", name="teacher"), mlp(name="student")
    teacher(x)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=crossentropy(), temperature=2.0)
    t, s = np.array(teacher(x)), np.array(student(x))
    history = distiller.fit(x, y, batch_size=12, verbose=0).history
    np.testing.assert_allclose(history["distillation_loss"], [kl(t, s, 2.0).mean()], rtol=1e-4)


def test_a_softmax_student_of_a_logit_teacher():
    x, y = rows()
    teacher, student = mlp(name="teacher"), mlp(activation="softmax", name="student")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd", loss="sparse_categorical_crossentropy", metrics=["accuracy"], temperature=2.0
    )
    t, s = np.array(teacher(x)), np.log(np.array(student(x)))
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], kl(t, s, 2.0).mean(), rtol=1e-4)
    np.testing.assert_allclose(logs["student_loss"], hard_loss(s, y).mean(), rtol=1e-4)
