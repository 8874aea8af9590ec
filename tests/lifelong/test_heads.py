"""A head that grows takes weights and the optimizer's state along, column by column."""

import keras
import numpy as np
import pytest
from keras import ops
from small_models import crossentropy
from small_streams import model, rows

from keras_kd.lifelong.heads import GrowingHead, carried


def numpy(value):
    return np.array(ops.convert_to_numpy(value))


def test_columns_stand_in_the_order_of_their_classes():
    head = GrowingHead(model(units=3), seed=1)
    given = head.given.get_weights()
    assert head.grow(np.array([1, 7])) == []
    assert head.classes.tolist() == [1, 7]
    first = head.arrays()
    # Class 1 begins as column 1 of the given layer; there is no column 7, so that it is drawn.
    np.testing.assert_array_equal(first["kernel"][:, 0], given[0][:, 1])
    assert np.abs(first["kernel"][:, 1]).max() > 0
    assert head.grow(np.array([0, 5, 7])) == [1, 3]
    assert head.classes.tolist() == [0, 1, 5, 7]
    assert head.ranks.tolist() == [2, 0, 3, 1]
    after = head.arrays()
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(after[name][..., [1, 3]], first[name])
    assert head.columns_of(np.array([7, 0])).tolist() == [3, 0]
    assert head.model.output_shape == (None, 4)


def test_the_same_seed_draws_the_same_columns():
    draws = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(len(draws))
        head = GrowingHead(model(units=1), seed=seed)
        head.grow(np.array([0, 1, 2]))
        draws.append(head.arrays()["kernel"])
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2])[:, 1:].min() > 0


def test_known_classes_keep_their_columns():
    head = GrowingHead(model(units=2), known=[8, 3])
    kernel = head.given.get_weights()[0]
    np.testing.assert_array_equal(head.arrays()["kernel"], kernel[:, [1, 0]])
    head.grow(np.array([1]))
    # Column 1 of the given layer is class 3, and no beginning for class 1.
    assert np.abs(head.arrays()["kernel"][:, 0] - kernel[:, 1]).max() > 0
    with pytest.raises(ValueError, match="2 columns, and `classes` names 1"):
        GrowingHead(model(units=2), known=[8])


@pytest.mark.parametrize(
    "make", [lambda: keras.optimizers.Adam(0.1), lambda: keras.optimizers.Adafactor(0.1)]
)
def test_optimizer_state_goes_along(make):
    head = GrowingHead(model(units=6))
    config = make().get_config()

    def optimizer():
        return type(make()).from_config(config)

    def trained(labels, steps, state=None, before=None):
        head.grow(np.array(labels))
        inner = head.model
        inner.compile(optimizer(), crossentropy(), jit_compile=False)
        inner.optimizer.build(inner.trainable_variables)
        if state is not None:
            body = optimizer()
            mine = {id(v) for v in head.layer.trainable_variables}
            body.build([v for v in inner.trainable_variables if id(v) not in mine])
            for variable, value in carried(
                state, inner.optimizer, body, before, head.trained_classes
            ):
                variable.assign(value)
        x, y = rows()
        mask = np.isin(y, head.classes)
        for _ in range(steps):
            inner.train_on_batch(x[mask], head.columns_of(y[mask]))
        return [numpy(v) for v in inner.optimizer.variables], inner.optimizer

    first, state = trained([1, 4], 3)
    second, _ = trained([0, 5], 0, state, np.array([1, 4]))
    assert len(first) == len(second)
    grown = 0
    for value, after in zip(first, second):
        if value.shape == after.shape:
            np.testing.assert_array_equal(after, value)
            continue
        grown += 1
        (axis,) = (i for i, n in enumerate(after.shape) if n != value.shape[i])
        # Positions of 1 and 4 among 0, 1, 4, 5.
        np.testing.assert_array_equal(np.take(after, [1, 2], axis), value)
        assert not np.take(after, [0, 3], axis).any()
    assert grown >= 2


def test_frozen_cosine_columns_do_not_move():
    head = GrowingHead(model(units=6), cosine=True)
    head.grow(np.array([1, 4]), freeze=True)
    head.grow(np.array([0, 4]), freeze=True)
    assert head.trained_classes.tolist() == [0, 4]
    before = head.arrays()["kernel"]
    inner = head.model
    inner.compile(keras.optimizers.SGD(1.0, weight_decay=0.1), crossentropy(), jit_compile=False)
    x, y = rows()
    mask = np.isin(y, head.classes)
    inner.train_on_batch(x[mask], head.columns_of(y[mask]))
    moved = np.abs(head.arrays()["kernel"] - before).max(0)
    assert moved[1] == 0
    assert moved[[0, 2]].min() > 0


def test_plain_model_of_a_cosine_head(tmp_path):
    head = GrowingHead(model(units=6), cosine=True)
    head.grow(np.array([0, 2, 5]))
    plain = head.plain()
    assert {type(layer).__module__.split(".")[0] for layer in plain.layers} == {"keras"}
    plain.save(tmp_path / "plain.keras")
    x, _ = rows()
    np.testing.assert_allclose(
        numpy(keras.saving.load_model(tmp_path / "plain.keras")(x)),
        numpy(head.model(x)),
        rtol=1e-4,
        atol=1e-5,
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def softmax_layer():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Softmax()(keras.layers.Dense(3)(inputs)))


def softmax_dense():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(inputs))


def two_outputs():
    inputs = keras.Input((4,))
    return keras.Model(inputs, [keras.layers.Dense(3)(inputs), keras.layers.Dense(2)(inputs)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Subclassed, "subclassed"),
        (softmax_layer, "cannot grow and is too small"),
        (softmax_dense, "activation softmax"),
        (two_outputs, "2 outputs"),
        (lambda: keras.Sequential([keras.layers.Dense(3)]), "not built"),
    ],
)
def test_heads_that_cannot_grow(make, message):
    with pytest.raises(ValueError, match=message):
        GrowingHead(make())


def test_no_model():
    with pytest.raises(TypeError, match="keras.Model"):
        GrowingHead("student.keras")
