"""Models seen at named layers in one pass."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import CLASSES, FEATURES, Counted, mlp, rows

from keras_kd.models import output_kinds, taps
from keras_kd.utils.masks import keras_mask


def seen(model, x, *paths, training=False):
    found = {path: taps.find(model, path, "teacher") for path in paths}
    return taps.read(model, x, found, training)


def test_a_pass_without_taps_is_a_call():
    model = mlp()
    x, _ = rows()
    np.testing.assert_array_equal(taps.read(model, x, {}, False).output, model(x))


def test_output_input_and_preactivation():
    model = mlp()
    x, _ = rows()
    reading = seen(model, x, "hidden", "hidden:input", "hidden:preactivation", "logits")
    tensors = {path: np.array(value) for path, value in reading.tensors.items()}
    layer = model.get_layer("hidden")
    z = x @ np.array(layer.kernel) + np.array(layer.bias)
    np.testing.assert_allclose(tensors["hidden:preactivation"], z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tensors["hidden"], np.tanh(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(tensors["hidden:input"], x)
    np.testing.assert_array_equal(tensors["logits"], reading.output)


def test_the_layers_are_as_before_even_after_an_error():
    class Fails(layers.Layer):
        def call(self, x):
            raise RuntimeError("no")

    inputs = keras.Input((FEATURES,))
    hidden = layers.Dense(3, activation="relu", name="hidden")
    x = hidden(inputs)
    model = keras.Model(inputs, x)
    model.fails = Fails()
    seen(model, rows()[0], "hidden", "hidden:preactivation")
    assert "call" not in vars(hidden)
    assert hidden.activation is keras.activations.relu

    class Broken(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = layers.Dense(3)
            self.fails = Fails()

        def call(self, x):
            return self.fails(self.hidden(x))

    broken = Broken()
    with pytest.raises(RuntimeError, match="no"):
        seen(broken, rows()[0], "hidden")
    assert "call" not in vars(broken.hidden)


def test_nested_layers_by_path_and_by_attribute():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__(name="block")
            self.first = layers.Dense(3, name="dense_of_another_name")

        def call(self, x):
            return self.first(x)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = Block()

        def call(self, x):
            return self.body(x)

    model = Model()
    x, _ = rows()
    model(x)
    for path in ("block/dense_of_another_name", "body/first", "block/first"):
        reading = seen(model, x, path)
        np.testing.assert_array_equal(reading.tensors[path], reading.output)


def test_operations_of_a_functional_graph():
    inputs = keras.Input((FEATURES,))
    x = ops.relu(layers.Dense(3, name="hidden")(inputs))
    name = x._keras_history.operation.name
    model = keras.Model(inputs, layers.Dense(CLASSES)(x))
    x, _ = rows()
    reading = seen(model, x, name, "hidden")
    np.testing.assert_array_equal(
        reading.tensors[name], np.maximum(np.array(reading.tensors["hidden"]), 0)
    )


def test_attention():
    inputs = keras.Input((5, 6))
    attention = layers.MultiHeadAttention(num_heads=2, key_dim=3, name="attention")
    model = keras.Model(inputs, attention(inputs, inputs))
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype("float32")
    kinds = ("query", "key", "value", "scores")
    tensors = seen(model, x, *(f"attention:{kind}" for kind in kinds)).tensors
    query, key, value, scores = (np.array(tensors[f"attention:{kind}"]) for kind in kinds)
    kernels = [np.array(d.kernel) for d in (attention._query_dense, attention._key_dense)]
    np.testing.assert_allclose(
        query, np.einsum("btf,fhd->bthd", x, kernels[0]), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(key, np.einsum("btf,fhd->bthd", x, kernels[1]), rtol=1e-4, atol=1e-5)
    assert value.shape == (2, 5, 2, 3)
    np.testing.assert_allclose(
        scores, np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(3), rtol=1e-4, atol=1e-5
    )


def test_grouped_attention():
    """Two heads of the queries read one of the keys."""
    inputs = keras.Input((5, 6))
    grouped = layers.GroupQueryAttention(3, 4, 2, name="attention")
    model = keras.Model(inputs, grouped(inputs, inputs))
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype("float32")
    kinds = ("query", "key", "value", "scores")
    tensors = seen(model, x, *(f"attention:{kind}" for kind in kinds)).tensors
    query, key, value, scores = (np.array(tensors[f"attention:{kind}"]) for kind in kinds)
    dense = grouped._query_dense, grouped._key_dense, grouped._value_dense
    for found, layer in zip((query, key, value), dense):
        expected = np.einsum("btf,fhd->bthd", x, np.array(layer.kernel))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    expected = np.einsum("bqhd,bkhd->bhqk", query, key[:, :, [0, 0, 1, 1]]) / np.sqrt(3)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def masks(model, x, *paths):
    found = {path: keras_mask(t) for path, t in seen(model, x, *paths).tensors.items()}
    return {path: None if mask is None else np.array(mask) for path, mask in found.items()}


ATTENTION = {
    "multi_head": lambda: layers.MultiHeadAttention(2, 3, name="attention"),
    "grouped": lambda: layers.GroupQueryAttention(3, 4, 2, name="attention"),
}


@pytest.mark.parametrize("kind", sorted(ATTENTION))
def test_the_masks_of_attention(kind):
    """Of queries and of keys, which Keras takes off the tensors that attention reads."""
    ours, theirs = keras.Input((4,), dtype="int32"), keras.Input((3,), dtype="int32")
    words = [layers.Embedding(9, 6, mask_zero=True, name=name) for name in ("ours", "theirs")]
    x = ATTENTION[kind]()(words[0](ours), words[1](theirs))
    model = keras.Model([ours, theirs], layers.Dense(2)(x))
    q, k = np.array([[1, 2, 3, 0], [4, 0, 0, 0]]), np.array([[5, 6, 0], [7, 8, 1]])
    taps_ = ["ours", "attention", *(f"attention:{k}" for k in taps.KINDS if "act" not in k)]
    found = masks(model, [q, k], *taps_)
    pairs = (q != 0)[:, None, :, None] & (k != 0)[:, None, None, :]
    for path in ("ours", "attention", "attention:input", "attention:query"):
        np.testing.assert_array_equal(found[path], q != 0, err_msg=path)
    for path in ("attention:key", "attention:value"):
        np.testing.assert_array_equal(found[path], k != 0, err_msg=path)
    np.testing.assert_array_equal(found["attention:scores"], pairs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", sorted(ATTENTION))
def test_the_padding_of_an_explicit_mask(kind, causal):
    """Keys that nobody may see are padding; what comes later is not."""
    inputs, valid = keras.Input((4, 6)), keras.Input((4,), dtype="bool")
    allowed = valid[:, None, :]
    if causal:
        allowed = ops.logical_and(allowed, np.tril(np.ones((4, 4), "bool"))[None])
    x = ATTENTION[kind]()(inputs, inputs, attention_mask=allowed)
    model = keras.Model([inputs, valid], layers.Dense(2, name="head")(x))
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
    valid = np.arange(4) < np.array([[4], [2]])
    found = masks(model, [x, valid], "attention:query", "attention:value", "attention:scores")
    np.testing.assert_array_equal(found["attention:query"], valid)
    np.testing.assert_array_equal(found["attention:value"], valid)
    expected = valid[:, None, :, None] & valid[:, None, None, :]
    np.testing.assert_array_equal(found["attention:scores"], expected)
    # The model itself reads no mask that it did not have.
    assert keras_mask(seen(model, [x, valid], "attention:query").output) is None


def test_a_mask_for_all_samples_is_no_padding():
    inputs = keras.Input((4, 6))
    x = layers.MultiHeadAttention(2, 3, name="attention")(
        inputs, inputs, attention_mask=np.tril(np.ones((1, 4, 4), "bool"))
    )
    model = keras.Model(inputs, x)
    assert masks(model, np.zeros((2, 4, 6)), "attention:scores") == {"attention:scores": None}


def test_a_layer_is_run_once_for_several_taps():
    inputs = keras.Input((FEATURES,))
    counted = Counted(name="counted")
    model = keras.Model(inputs, layers.Dense(CLASSES, name="head")(counted(inputs)))
    counted.calls.clear()
    seen(model, rows()[0], "counted", "counted:input", "head", "head:input", training=True)
    assert counted.calls == [True]


def test_layers_that_are_called_twice_or_never():
    inputs = keras.Input((FEATURES,))
    twice = layers.Dense(FEATURES, name="twice")
    model = keras.Model(inputs, layers.Dense(CLASSES)(twice(twice(inputs))), name="net")
    with pytest.raises(ValueError, match="Layer `twice` was called 2 times in one pass of `net`"):
        seen(model, rows()[0], "twice")

    class Lazy(keras.Model):
        def __init__(self):
            super().__init__(name="lazy")
            self.used, self.unused = layers.Dense(3), layers.Dense(3, name="unused")

        def call(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="Layer `unused` was not called in one pass of `lazy`"):
        seen(Lazy(), rows()[0], "unused")


def test_messages():
    inputs = keras.Input((FEATURES,))
    inner = keras.Input((FEATURES,))
    backbone = keras.Model(inner, layers.Dense(3, name="block3")(inner), name="backbone")
    model = keras.Model(inputs, layers.Dense(CLASSES, name="head")(backbone(inputs)), name="net")
    for path, match in (
        ("hed", "`hed` is not a layer of the teacher `net`. Did you mean `head`?"),
        ("block3", "There is `backbone/block3`"),
        ("backbone/blok3", "`blok3` of `backbone/blok3` is not a layer .* Did you mean `block3`?"),
        ("head:outputs", "asks for `outputs` of a layer.* Did you mean `output`"),
        ("backbone:preactivation", "has no activation of its own"),
        ("head:query", "is a Dense, not an attention layer"),
    ):
        with pytest.raises(ValueError, match=match):
            taps.find(model, path, "teacher")


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (lambda x: layers.Dense(3)(x), "logits"),
        (lambda x: layers.Dense(3, activation="softmax")(x), "softmax"),
        (lambda x: layers.Dense(3, activation="sigmoid")(x), "sigmoid"),
        (lambda x: layers.Softmax()(x), "softmax"),
        (lambda x: layers.Activation("sigmoid")(x), "sigmoid"),
        (lambda x: ops.sigmoid(x), "sigmoid"),
        (lambda x: ops.log_softmax(x), "logits"),
        (lambda x: layers.Dropout(0.1)(layers.Dense(3)(x)), "logits"),
        (lambda x: layers.Lambda(lambda z: z)(x), "unknown"),
        (lambda x: layers.Reshape((3, 2))(layers.Softmax()(x)), "unknown"),
    ],
)
def test_how_an_output_is_made(last, kind):
    inputs = keras.Input((FEATURES,))
    assert [o.kind for o in output_kinds.outputs_of(keras.Model(inputs, last(inputs)))] == [kind]


def test_inference_holds_for_the_shared_layers_alone():
    inputs = keras.Input((FEATURES,))
    shared, own = layers.BatchNormalization(name="shared"), layers.BatchNormalization(name="own")
    model = keras.Model(inputs, own(shared(inputs)))
    x = 5 + rows()[0]
    with taps.inference([shared]):
        model(x, training=True)
    assert not np.any(np.array(shared.moving_mean))
    assert np.any(np.array(own.moving_mean))
