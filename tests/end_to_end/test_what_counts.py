"""The table of `docs/data.md`: numerator and denominator of every number in the logs, in NumPy.

Mask, weight and ignored label, in all their combinations and for every reduction of Keras, against
formulas written out here and against Keras's own number for the hard loss.
"""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import hard_loss, kl

import keras_kd as kd
from keras_kd.utils.masks import with_keras_mask

WORDS, TAGS, LENGTH = 9, 4, 6
REDUCTIONS = ("sum_over_batch_size", "sum", "mean_with_sample_weight")
MASKS = ("none", "student", "teacher", "both")


def _tagger(width, name, masked=True):
    """A tagger of tokens; its convolution passes the mask on, where there is one."""
    inputs = keras.Input((LENGTH,), dtype="int32", name="words")
    x = layers.Embedding(WORDS, width, mask_zero=masked, name="embedding")(inputs)
    x = layers.Dense(width, activation="tanh", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(TAGS, name="tags")(x), name=name)
    rng = np.random.default_rng(width)
    model.set_weights([rng.normal(0, 1, w.shape) for w in model.get_weights()])
    return model


def _convolved(width, name):
    """The same for a model that has no mask: `Conv1D` drops it."""
    inputs = keras.Input((LENGTH,), dtype="int32", name="words")
    x = layers.Embedding(WORDS, width, mask_zero=False, name="embedding")(inputs)
    x = layers.Conv1D(width, 3, padding="same", activation="tanh", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(TAGS, name="tags")(x), name=name)
    rng = np.random.default_rng(width)
    model.set_weights([rng.normal(0, 1, w.shape) for w in model.get_weights()])
    return model


def _data():
    """Sentences; labels of which some, and of one sentence all, are -1; one sentence is empty."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, WORDS, (6, LENGTH))
    valid = np.arange(LENGTH) < np.array([6, 4, 0, 3, 5, 6])[:, None]
    y = rng.integers(0, TAGS, x.shape)
    known = rng.random(x.shape) < 0.7
    known[4] = False
    known[0, 0] = True
    return np.where(valid, x, 0), np.where(known, y, -1), valid


def _weights(x):
    rng = np.random.default_rng(3)
    tokens = rng.uniform(0.5, 2, x.shape) * (rng.random(x.shape) < 0.8)
    rows = np.array([1.0, 2.0, 0.5, 0.0, 3.0, 1.5])
    found = {"none": None, "rows": rows, "column": rows[:, None], "tokens": tokens}
    return {k: None if w is None else w.astype("float32") for k, w in found.items()}


def reduced(values, weight, counts, reduction):
    """The row of the table: what is added up, and what it is divided by."""
    numerator = (values * weight * counts).sum()
    divisor = {
        "sum": 1.0,
        "sum_over_batch_size": counts.sum(),
        "mean_with_sample_weight": (weight * counts).sum(),
    }
    return numerator / divisor[reduction]


def what_counts(mask, labeled):
    """Which positions count in the hard loss, and which in the distillation loss."""
    hard = mask & labeled
    unlabeled = ~hard.any(1, keepdims=True)
    return hard, mask & (labeled | unlabeled)


def _models(masks):
    student = _tagger(5, "student") if masks in ("student", "both") else _convolved(5, "student")
    teacher = _tagger(7, "teacher") if masks in ("teacher", "both") else _convolved(7, "teacher")
    return student, teacher


def _hard(reduction, ignore):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=-1 if ignore else None, reduction=reduction
    )


def _compiled(student, teacher, reduction, ignore, **options):
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        _hard(reduction, ignore),
        distillation_loss=[
            kd.losses.SoftTargets(reduction=reduction),
            kd.Transfer(kd.losses.Hint(reduction=reduction), "tags", "tags"),
            kd.Transfer(keras.losses.MeanSquaredError(reduction=reduction, name="mse")),
        ],
        temperature=2.0,
        **options,
    )
    return distiller


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_table(reduction, masks, ignore):
    student, teacher = _models(masks)
    x, y, valid = _data()
    mask = valid if masks != "none" else np.ones_like(valid)
    labeled = (y >= 0) if ignore else np.ones_like(valid)
    y = y if ignore else np.maximum(y, 0)
    z_t, z_s = teacher.predict(x, verbose=0), student.predict(x, verbose=0)
    same = z_t.argmax(-1) == z_s.argmax(-1)
    right = z_s.argmax(-1) == y
    distiller = _compiled(
        student,
        teacher,
        reduction,
        ignore,
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
        run_eagerly=True,
    )
    own = valid if masks in ("student", "both") else np.ones_like(valid)
    for name, given in _weights(x).items():
        weight = np.ones(x.shape)
        if given is not None:
            weight = given.reshape((6, -1)) * weight
        hard, soft = what_counts(mask, labeled)
        expected = {
            "student_loss": reduced(hard_loss(z_s, np.maximum(y, 0)), weight, hard, reduction),
            "soft_targets": reduced(kl(z_t, z_s, 2.0), weight, soft, reduction),
            "hint": reduced(((z_t - z_s) ** 2).mean(-1), weight, soft, reduction),
            "mse": reduced(((z_t - z_s) ** 2).mean(-1), weight, soft, reduction),
            "agreement": (same * weight * soft).sum() / (weight * soft).sum(),
            # Keras's metrics know the student's mask, and no ignored label.
            "accuracy": right[own].mean(),
            "weighted": (right * weight * own).sum() / (weight * own).sum(),
        }
        logs = distiller.train_on_batch(x, y, sample_weight=given, return_dict=True)
        for key, value in expected.items():
            if key == "weighted" and name == "rows":
                # Keras's metrics take one weight a sentence for values of tokens as a column.
                continue
            np.testing.assert_allclose(logs[key], value, rtol=2e-5, err_msg=f"{key}, {name}")
        # Keras's own number for what the student returns, under the mask of both.
        z = with_keras_mask(
            ops.convert_to_tensor(z_s), None if masks == "none" else ops.array(valid)
        )
        theirs = _hard(reduction, ignore)(y, z, None if given is None else weight)
        np.testing.assert_allclose(logs["student_loss"], float(theirs), rtol=1e-5, err_msg=name)
        distiller.reset_metrics()


def test_hard_and_distillation_loss_of_one_value_are_one_number():
    """Whatever counts: a hard loss that is 1 at every position, and so is the other."""

    def one(y_true, y_pred):
        return 1 + 0 * y_pred[..., 0]

    class Ones(keras.losses.Loss):
        def call(self, y_true, y_pred):
            values = one(y_true, y_pred)
            return with_keras_mask(values, ops.not_equal(y_true, -1))

    x, y, _ = _data()
    y[4] = y[2] = 1
    for masks, reduction in itertools.product(MASKS, REDUCTIONS):
        student, teacher = _models(masks)
        distiller = kd.Distiller(student, teacher)
        distiller.compile(
            keras.optimizers.SGD(0.0),
            Ones(reduction=reduction),
            distillation_loss=type(
                "One", (keras.losses.Loss,), {"call": lambda _, t, s: one(t, s)}
            )(reduction=reduction, name="one"),
            run_eagerly=True,
        )
        for given in _weights(x).values():
            logs = distiller.train_on_batch(x, y, sample_weight=given, return_dict=True)
            np.testing.assert_allclose(logs["student_loss"], logs["distillation_loss"], rtol=1e-5)
            distiller.reset_metrics()


def test_a_token_agrees_or_not_whatever_its_batch_is_padded_to():
    """Keras's mean of two batches is a mean over samples of means over their positions."""
    student, teacher = (_tagger(width, f"tagger_{width}") for width in (5, 7))
    lengths = keras.Input((None,), dtype="int32")
    free = []
    for model in (student, teacher):
        x = lengths
        for layer in model.layers[1:]:
            x = layer(x)
        free.append(keras.Model(lengths, x, name=f"free_{model.name}"))
    rng = np.random.default_rng(0)
    batches = [(rng.integers(1, WORDS, (2, n)), rng.integers(0, TAGS, (2, n))) for n in (2, 9)]
    agreed = []
    for x, _ in batches:
        z_t, z_s = np.array(free[1](x)), np.array(free[0](x))
        agreed.append(z_t.argmax(-1) == z_s.argmax(-1))
    distiller = kd.Distiller(*free)
    distiller.compile(keras.optimizers.SGD(0.0), _hard("sum_over_batch_size", False))
    logs = distiller.fit((batch for batch in batches), verbose=0).history
    flat = np.concatenate([each.ravel() for each in agreed])
    assert abs(flat.mean() - np.mean([each.mean() for each in agreed])) > 0.01
    np.testing.assert_allclose(logs["agreement"][0], flat.mean(), rtol=1e-6)


def _function(y_true, y_pred):
    return keras.losses.sparse_categorical_crossentropy(
        y_true, y_pred, from_logits=True, ignore_class=-1
    )


class _OfTheUser(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return _function(y_true, y_pred)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("loss", [_function, _OfTheUser()], ids=["function", "class"])
def test_ignored_labels_are_found_in_any_loss(loss, compiled):
    """A function around Keras's, and a class of the user's: what Keras is told, we read."""
    student, teacher = _models("none")
    x, y, valid = _data()
    z_t, z_s = teacher.predict(x, verbose=0), student.predict(x, verbose=0)
    hard, soft = what_counts(np.ones_like(valid), y >= 0)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        loss,
        # A loss of one's own does not say that the outputs are classes.
        distillation_loss=kd.losses.SoftTargets(),
        temperature=2.0,
        run_eagerly=not compiled,
    )
    logs = distiller.fit(x, y, batch_size=6, epochs=2, verbose=0).history
    np.testing.assert_allclose(
        logs["student_loss"], hard_loss(z_s, np.maximum(y, 0))[hard].mean(), 1e-5
    )
    np.testing.assert_allclose(logs["distillation_loss"], kl(z_t, z_s, 2.0)[soft].mean(), 1e-5)
    same = z_t.argmax(-1) == z_s.argmax(-1)
    np.testing.assert_allclose(logs["agreement"], same[soft].mean(), 1e-6)
    assert "call" not in vars(loss) if loss is not _function else True


@pytest.mark.parametrize("structure", ["dict", "list"])
def test_every_output_counts_by_its_own_labels_and_weights(structure):
    """Two outputs with one loss object between them, and a third without a loss."""

    def model(width, name):
        inputs = keras.Input((LENGTH,), dtype="int32")
        x = layers.Embedding(WORDS, width, mask_zero=True)(inputs)
        heads = {n: layers.Dense(c, name=n)(x) for n, c in (("tags", 4), ("forms", 3))}
        pooled = layers.GlobalAveragePooling1D()(x)
        heads["topic"] = layers.Dense(5, name="topic")(pooled)
        made = keras.Model(
            inputs, heads if structure == "dict" else list(heads.values()), name=name
        )
        rng = np.random.default_rng(width)
        made.set_weights([rng.normal(0, 1, w.shape) for w in made.get_weights()])
        return made

    student, teacher = model(5, "student"), model(7, "teacher")
    names = ["tags", "forms", "topic"]
    x, y, valid = _data()
    # Keras's pooling of a sentence without words is NaN.
    x[2, 0], valid[2, 0] = 3, True
    rng = np.random.default_rng(5)
    labels = {
        "tags": y,
        "forms": np.where(rng.random(x.shape) < 0.5, rng.integers(0, 3, x.shape), -1),
        "topic": np.array([0, -1, 1, 2, -1, 3]),
    }
    weights = {
        "tags": rng.uniform(0.5, 2, x.shape).astype("float32"),
        "forms": rng.uniform(0.5, 2, 6).astype("float32"),
        "topic": rng.uniform(0.5, 2, 6).astype("float32"),
    }
    shared = _hard("sum_over_batch_size", True)
    losses = {"tags": shared, "forms": shared, "topic": _hard("sum_over_batch_size", True)}

    def as_given(values):
        return values if structure == "dict" else [values[n] for n in names]

    z_t, z_s = teacher.predict(x, verbose=0), student.predict(x, verbose=0)
    if structure == "list":
        z_t, z_s = dict(zip(names, z_t)), dict(zip(names, z_s))
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), as_given(losses), temperature=2.0)
    logs = distiller.fit(
        x, as_given(labels), sample_weight=as_given(weights), batch_size=6, verbose=0
    ).history
    total, agreed, seen = 0.0, 0.0, 0.0
    for name in names:
        weight, mask = weights[name], np.ones(6, "bool") if name == "topic" else valid
        known = labels[name] >= 0
        if name == "topic":
            soft = mask
        else:
            weight = weight if weight.ndim == 2 else weight[:, None] * np.ones(x.shape)
            _, soft = what_counts(mask, known)
        values = kl(z_t[name], z_s[name], 2.0)
        found = logs[f"{name}_soft_targets"][0]
        np.testing.assert_allclose(found, (values * weight * soft).sum() / soft.sum(), rtol=2e-5)
        counts = mask & known
        hard = hard_loss(z_s[name], np.maximum(labels[name], 0))
        total += (hard * weight * counts).sum() / counts.sum()
        agreed += ((z_t[name].argmax(-1) == z_s[name].argmax(-1)) * weight * soft).sum()
        seen += (weight * soft).sum()
    np.testing.assert_allclose(logs["student_loss"][0], total, rtol=2e-5)
    np.testing.assert_allclose(logs["agreement"][0], agreed / seen, rtol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_default_loss_is_divided_as_the_hard_loss_is(reduction):
    student, teacher = _models("both")
    x, y, valid = _data()
    weight = _weights(x)["tokens"]
    z_t, z_s = teacher.predict(x, verbose=0), student.predict(x, verbose=0)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), _hard(reduction, True), run_eagerly=True)
    logs = distiller.train_on_batch(x, y, sample_weight=weight, return_dict=True)
    hard, soft = what_counts(valid, y >= 0)
    expected = reduced(hard_loss(z_s, np.maximum(y, 0)), weight, hard, reduction)
    np.testing.assert_allclose(logs["student_loss"], expected, rtol=2e-5)
    expected = reduced(kl(z_t, z_s, 1.0), weight, soft, reduction)
    np.testing.assert_allclose(logs["soft_targets"], expected, rtol=2e-5)
    peers = kd.MutualLearning([student, _tagger(7, "other")])
    peers.compile(keras.optimizers.SGD(0.0), _hard(reduction, True), run_eagerly=True)
    logs = peers.train_on_batch(x, y, sample_weight=weight, return_dict=True)
    z_o = peers.students[1].predict(x, verbose=0)
    expected = reduced(kl(z_o, z_s, 1.0) + kl(z_s, z_o, 1.0), weight, soft, reduction)
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=2e-5)
