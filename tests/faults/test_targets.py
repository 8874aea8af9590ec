"""Labels are compared with what the losses read, however loss and labels are given."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from small_models import CLASSES, crossentropy, hard_loss, mlp, pair, rows

import keras_kd as kd
from keras_kd.distill import label_checks
from keras_kd.models import meaning

sparse = keras.losses.sparse_categorical_crossentropy


class Sparse(keras.losses.SparseCategoricalCrossentropy):
    """A class of the user's own."""


# Each with how the student ends.
SPARSE = {
    "object": (crossentropy(), None),
    "name": ("sparse_categorical_crossentropy", "softmax"),
    "name of the class": ("SparseCategoricalCrossentropy", "softmax"),
    "class": (keras.losses.SparseCategoricalCrossentropy, "softmax"),
    "function": (sparse, "softmax"),
    "partial": (functools.partial(sparse, from_logits=True), None),
    "subclass": (Sparse(from_logits=True), None),
}
WAYS = ("arrays", "validation", "dataset", "held dataset", "generator", "batch", "test batch")


def give(trainer, way, x, y, good):
    """Have labels read in one of the ways."""
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    if way == "arrays":
        return trainer.fit(x, y, verbose=0)
    if way == "validation":
        return trainer.fit(x, good, validation_data=(x, y), verbose=0)
    if way == "dataset":
        return trainer.fit(dataset, verbose=0)
    if way == "held dataset":
        return trainer.fit(x, good, validation_data=dataset, verbose=0)
    if way == "generator":
        return trainer.fit(iter([(x, y)]), steps_per_epoch=1, verbose=0)
    return (trainer.train_on_batch if way == "batch" else trainer.test_on_batch)(x, y)


def compiled(loss, activation=None, student=None, **options):
    options = {"run_eagerly": True, **options}
    student = student or mlp(name="student", activation=activation)
    distiller = kd.Distiller(student, mlp(9, name="teacher"))
    distiller.compile(keras.optimizers.SGD(0.1), loss, **options)
    return distiller


@pytest.mark.parametrize("label", [CLASSES, 2**32 + 1, -1])
@pytest.mark.parametrize("given", list(SPARSE))
def test_whatever_says_that_labels_are_class_numbers(given, label):
    x, y = rows()
    bad = y.astype("int64")
    bad[5] = label
    distiller = compiled(*SPARSE[given])
    for way in ("arrays", "dataset", "batch"):
        with pytest.raises(ValueError, match=r"abels (run )?from -?\d+ to \d+, and .* 4 classes"):
            give(distiller, way, x, bad, y)
    assert np.isfinite(distiller.fit(x, y, verbose=0).history["loss"]).all()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_that_labels_go(way):
    x, y = rows()
    bad = y.astype("int64")
    bad[5] = 2**32 + 1
    loss = functools.partial(sparse, from_logits=True, ignore_class=-1)
    distiller = compiled(loss)
    with pytest.raises(ValueError, match=r"from 0 to 4294967297, and .* 4 classes"):
        give(distiller, way, x, bad, y)
    bad[5] = -1
    give(distiller, way, x, bad, y)


@pytest.mark.parametrize("way", WAYS)
def test_students_that_teach_each_other(way):
    x, y = rows()
    peers = kd.MutualLearning([mlp(name="a"), mlp(7, name="b")])
    peers.compile("sgd", crossentropy(), run_eagerly=True)
    for label in (CLASSES, 2**32 + 1, -1):
        bad = y.astype("int64")
        bad[5] = label
        with pytest.raises(ValueError, match=r"abels (run )?from -?\d+ to \d+, and .* 4 classes"):
            give(peers, way, x, bad, y)
    give(peers, way, x, y, y)
    with pytest.raises(ValueError, match="`y` holds Python objects.* do, and labels are numbers"):
        peers.fit(x, y.astype(object))


def test_a_student_shows_its_classes_with_the_first_rows():
    class Plain(keras.Model):
        def __init__(self):
            super().__init__(name="student")
            self.last = layers.Dense(CLASSES)

        def call(self, x):
            return self.last(x)

    x, y = rows()
    bad = y.copy()
    bad[5] = CLASSES
    for way in ("arrays", "validation", "dataset"):
        with pytest.raises(ValueError, match=r"abels (run )?from 0 to 4, and .* 4 classes"):
            give(compiled(crossentropy(), student=Plain()), way, x, bad, y)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32"])
@pytest.mark.parametrize("way", WAYS)
def test_labels_of_units_lie_between_0_and_1(way, dtype):
    x, _ = rows()
    good = np.random.default_rng(0).integers(0, 2, (len(x), CLASSES)).astype(dtype)
    bad = good.copy()
    bad[5, 1] = 255 if dtype == "uint8" else -1
    distiller = compiled(keras.losses.BinaryCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="`binary_crossentropy` reads numbers from 0 to 1"):
        give(distiller, way, x, bad, good)
    give(distiller, way, x, good, good)


def test_shares_of_classes_are_not_negative():
    x, y = rows()
    one_hot = np.eye(CLASSES, dtype="float32")[y]
    distiller = compiled(keras.losses.CategoricalCrossentropy(from_logits=True))
    for way in ("arrays", "dataset", "batch"):
        with pytest.raises(ValueError, match="reads shares of classes, at least 0"):
            give(distiller, way, x, one_hot - 1, one_hot)
        give(distiller, way, x, 0.9 * one_hot + 0.025, one_hot)
    # Values of a regression are any numbers.
    distiller = compiled("mse", distillation_loss="mse")
    give(distiller, "arrays", x, one_hot - 3, one_hot)


def test_batches_of_a_torch_loader():
    torch = pytest.importorskip("torch")
    x, y = rows()
    bad = y.copy()
    bad[5] = -1

    def loader(labels):
        data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(labels))
        return torch.utils.data.DataLoader(data, batch_size=4)

    distiller = compiled(crossentropy())
    with pytest.raises(ValueError, match=r"^The data yield labels from -1 to \d, and there are 4"):
        distiller.fit(loader(bad), verbose=0)
    z = distiller.student.predict(x, verbose=0)
    found = distiller.evaluate(loader(y), verbose=0, return_dict=True)
    np.testing.assert_allclose(found["loss"], hard_loss(z, y).mean(), rtol=1e-5)


def test_what_a_loss_was_given_is_read_however_it_is_given():
    given = functools.partial(sparse, from_logits=True, ignore_class=2)
    assert meaning.option(given, "ignore_class") == 2
    assert meaning.option(functools.partial(given, ignore_class=3), "ignore_class") == 3
    assert meaning.option(crossentropy(ignore_class=4), "ignore_class") == 4
    assert meaning.option(keras.losses.SparseCategoricalCrossentropy, "ignore_class") is None
    assert [label_checks.Expected(loss).is_sparse for loss, _ in SPARSE.values()] == [True] * 7
    assert not label_checks.Expected("mse").is_sparse


@pytest.mark.parametrize("given", ["name of the class", "class"])
def test_logits_under_a_loss_of_probabilities_are_warned_of(given):
    distiller = kd.Distiller(*pair())
    with pytest.warns(UserWarning, match="expects probabilities"):
        distiller.compile("sgd", SPARSE[given][0])


@pytest.mark.parametrize(
    ("end", "loss", "message"),
    [
        ("softmax", crossentropy(), r"ends in probabilities \(softmax\).*`from_logits=False`"),
        (None, keras.losses.KLDivergence(), "expects probabilities. End the student in a softmax"),
    ],
)
def test_a_loss_of_the_other_form_is_warned_of(end, loss, message):
    inputs = keras.Input((3,))
    student, teacher = (
        keras.Model(inputs, keras.layers.Dense(4, activation=end)(inputs)) for _ in range(2)
    )
    with pytest.warns(UserWarning, match=message):
        kd.Distiller(student, teacher).compile("sgd", loss)
