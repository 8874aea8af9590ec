"""Transfers between layers: which layers, through which projector, with which weight."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import CLASSES, FEATURES, crossentropy, kl, mlp, pair, rows

import keras_kd as kd


def functional(width, name):
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(width, activation="tanh", name="block")(inputs)
    return keras.Model(inputs, layers.Dense(CLASSES)(x), name=name), "block"


def sequential(width, name):
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(width, activation="tanh", name="block"),
            layers.Dense(CLASSES),
        ],
        name=name,
    ), "block"


def nested(width, name):
    backbone = functional(width, "backbone")[0]
    inner = keras.Model(backbone.input, backbone.get_layer("block").output, name="backbone")
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, layers.Dense(CLASSES)(inner(inputs)), name=name), "backbone/block"


class Subclassed(keras.Model):
    def __init__(self, width, **options):
        super().__init__(**options)
        self.block = layers.Dense(width, activation="tanh")
        self.head = layers.Dense(CLASSES)

    def call(self, x):
        return self.head(self.block(x))


def subclassed(width, name):
    model = Subclassed(width, name=name)
    model(np.zeros((1, FEATURES)))
    return model, "block"


class Block(layers.Layer):
    def __init__(self, width, **options):
        super().__init__(**options)
        self.inner = layers.Dense(width, activation="tanh", name="dense")

    def call(self, x):
        return self.inner(x)


class Deep(keras.Model):
    def __init__(self, width, **options):
        super().__init__(**options)
        self.blocks = [Block(width, name="first")]
        self.head = layers.Dense(CLASSES)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def deep(width, name):
    model = Deep(width, name=name)
    model(np.zeros((1, FEATURES)))
    return model, "first/dense"


KINDS = [functional, sequential, nested, subclassed, deep]


def features(model, path, x):
    layer = model
    for name in path.split("/"):
        layer = getattr(layer, name, None) or next(
            l for l in layer._flatten_layers(include_self=False, recursive=False) if l.name == name
        )
    return np.tanh(x @ np.array(layer.kernel) + np.array(layer.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_projector_joins_layers_of_every_kind_of_model(kind):
    (student, student_tap), (teacher, teacher_tap) = kind(3, "student"), kind(7, "teacher")
    transfer = kd.Transfer(kd.losses.Hint(), teacher_tap, student_tap, projector="linear")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.1),
        loss=None,
        distillation_loss=transfer,
    )
    x, _ = rows()
    names = [w.path for w in student.weights]
    distiller.train_on_batch(x)
    kernel, bias = (np.array(w) for w in transfer.projection.weights)
    assert kernel.shape == (3, 7)
    t, s = features(teacher, teacher_tap, x), features(student, student_tap, x)
    expected = ((s @ kernel + bias - t) ** 2).mean()
    logs = distiller.train_on_batch(x, return_dict=True)
    np.testing.assert_allclose(logs["hint"], expected, rtol=1e-4)
    # It trains, and stays out of the student.
    assert np.abs(kernel - transfer.projection.get_weights()[0]).max() > 0
    assert [w.path for w in student.weights] == names
    assert not any(w is v for w in transfer.weights for v in student.variables)


def test_the_projector_is_updated_by_the_gradient():
    import tensorflow as tf

    student, teacher = pair()
    transfer = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear", weight=3.0)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), loss=crossentropy(), distillation_loss=transfer)
    x, y = rows()
    distiller.train_on_batch(x, y)
    kernel, bias = (tf.Variable(w) for w in transfer.projection.get_weights())
    t, s = features(teacher, "hidden", x), features(student, "hidden", x)
    with tf.GradientTape() as tape:
        mse = tf.reduce_mean((tf.matmul(s.astype("float32"), kernel) + bias - t) ** 2)
        loss = 0.5 * 3.0 * mse
    gradient = tape.gradient(loss, kernel)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(
        transfer.projection.get_weights()[0],
        kernel.numpy() - 0.1 * gradient.numpy(),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(logs["distillation_loss"], 3 * logs["hint"], rtol=1e-5)


def test_a_linear_projector_of_images_is_a_1x1_convolution():
    def model(width, name):
        inputs = keras.Input((6, 6, 1))
        x = layers.Conv2D(width, 3, name="features")(inputs)
        return keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(x)), name=name)

    student, teacher = model(2, "student"), model(5, "teacher")
    transfer = kd.Transfer(kd.losses.Hint(), "features", "features", projector="linear")
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None, distillation_loss=transfer)
    logs = distiller.train_on_batch(np.ones((3, 6, 6, 1), "float32"), return_dict=True)
    assert np.isfinite(logs["hint"])
    assert transfer.projection.weights[0].shape[-2:] == (2, 5)


def two_maps(widths, name):
    inputs = keras.Input((8, 8, 1))
    first = layers.Conv2D(widths[0], 3, padding="same", name="first")(inputs)
    second = layers.Conv2D(widths[1], 3, strides=2, padding="same", name="second")(first)
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(second)), name=name)


def test_several_layers_get_a_projector_each():
    student, teacher = two_maps((2, 3), "student"), two_maps((5, 7), "teacher")
    flow = kd.Transfer(
        kd.losses.FSP(), ["first", "second"], ["first", "second"], projector="linear"
    )
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=None, distillation_loss=flow)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
    logs = distiller.train_on_batch(x, return_dict=True)
    kernels = [[np.array(w) for w in layer.weights] for layer in flow.projection]
    assert [kernel.shape[-2:] for kernel, _ in kernels] == [(2, 5), (3, 7)]

    def flow_matrix(model, projected):
        maps = keras.Model(model.inputs, [model.get_layer(n).output for n in ("first", "second")])
        first, second = (np.array(m, "float64") for m in maps(x))
        if projected:
            first, second = (
                m @ kernel.reshape(kernel.shape[-2:]) + bias
                for m, (kernel, bias) in zip((first, second), kernels)
            )
        first = first.reshape(4, 4, 2, 4, 2, -1).mean((2, 4))
        return np.einsum("bhwi,bhwj->bij", first, second) / 16

    gap = flow_matrix(teacher, False) - flow_matrix(student, True)
    np.testing.assert_allclose(logs["fsp"], np.mean(gap**2), rtol=1e-4)
    (row,) = distiller.summary_of_transfers()
    assert row["projection"].count("linear") == 2


def test_one_layer_as_projector_of_several_is_refused():
    student, teacher = two_maps((2, 3), "student"), two_maps((5, 7), "teacher")
    flow = kd.Transfer(
        kd.losses.FSP(), ["first", "second"], ["first", "second"], projector=layers.Dense(3)
    )
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None, distillation_loss=flow)
    with pytest.raises(ValueError, match="is one layer, and several layers are read"):
        distiller.train_on_batch(np.ones((4, 8, 8, 1), "float32"))


def test_a_layer_as_projector():
    student, teacher = pair()
    projector = keras.Sequential([layers.Dense(6, activation="relu"), layers.Dense(9)])
    transfer = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector=projector)
    distiller = kd.Distiller(student, teacher)
    distiller.compile("adam", loss=crossentropy(), distillation_loss=transfer)
    x, y = rows()
    distiller.fit(x, y, verbose=0)
    assert len(distiller.trainable_variables) == 4 + 4
    assert len(student.trainable_variables) == 4


def test_none_reads_the_final_output():
    student, teacher = pair()
    # Any Keras loss compares any two tensors.
    transfer = kd.Transfer(
        keras.losses.MeanSquaredError(),
        teacher=None,
        student="hidden",
        projector=layers.Dense(CLASSES),
    )
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=None, distillation_loss=transfer)
    x, _ = rows()
    distiller.train_on_batch(x)
    kernel, bias = transfer.projection.get_weights()
    expected = ((features(student, "hidden", x) @ kernel + bias - np.array(teacher(x))) ** 2).mean()
    logs = distiller.train_on_batch(x, return_dict=True)
    np.testing.assert_allclose(logs["mean_squared_error"], expected, rtol=1e-4)


def test_a_function_as_loss():
    def cosine(teacher, student):
        return 1 - ops.sum(ops.normalize(teacher) * ops.normalize(student), axis=-1)

    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None, distillation_loss=kd.Transfer(cosine))
    x, _ = rows()
    t, s = np.array(teacher(x)), np.array(student(x))
    expected = 1 - (t * s).sum(1) / np.linalg.norm(t, axis=1) / np.linalg.norm(s, axis=1)
    weight = np.linspace(0, 2, len(x)).astype("float32")
    logs = distiller.train_on_batch(x, sample_weight=weight, return_dict=True)
    np.testing.assert_allclose(logs["cosine"], (weight * expected).mean(), rtol=1e-4)


def test_names_taken_from_losses_are_numbered(tmp_path):
    """In logs, callbacks, summary and file alike; a given name goes before them."""
    student, teacher = mlp(name="student"), mlp(name="teacher")
    hints = [
        kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear"),
        kd.Transfer(kd.losses.Hint(), "logits", "logits", weight=0.5),
        kd.Transfer(kd.losses.Hint(), "hidden", "hidden", name="hint_1"),
    ]
    given = [*hints, kd.losses.SoftTargets(), kd.losses.SoftTargets(4.0)]
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), distillation_loss=given, temperature=1.0)
    names = ["hint", "hint_2", "hint_1", "soft_targets", "soft_targets_1"]
    assert [transfer.name for transfer in distiller.transfers] == names
    # Once more, as for every `compile`: the same names.
    distiller.compile(keras.optimizers.SGD(0.0), distillation_loss=given, temperature=1.0)
    assert [row["name"] for row in distiller.summary_of_transfers()] == names
    x, _ = rows()
    gap = (features(teacher, "hidden", x) - features(student, "hidden", x)) ** 2
    z_t, z_s = (model.predict(x, verbose=0) for model in (teacher, student))
    annealing = kd.callbacks.TransferWeightAnnealing("hint_2", start=0.5, end=0.5, epochs=1)
    logs = distiller.fit(x, batch_size=len(x), verbose=0, callbacks=[annealing]).history
    assert logs["hint_2_weight"] == [0.5]
    np.testing.assert_allclose(logs["hint_1"][0], gap.mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["hint_2"][0], ((z_t - z_s) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["soft_targets"][0], kl(z_t, z_s, 1.0).mean(), rtol=1e-4)
    np.testing.assert_allclose(logs["soft_targets_1"][0], kl(z_t, z_s, 4.0).mean(), rtol=1e-4)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    assert [transfer.name for transfer in loaded.transfers] == names
    again = loaded.fit(x, batch_size=len(x), verbose=0).history
    assert {name: again[name] for name in names} == {name: logs[name] for name in names}


def test_names_of_several_losses_on_each_output():
    inputs = keras.Input((FEATURES,))
    heads = {name: layers.Dense(3, name=name)(inputs) for name in ("a", "b")}
    teacher = keras.Model(inputs, heads, name="teacher")
    distiller = kd.Distiller(keras.models.clone_model(teacher), teacher)
    two = [kd.losses.SoftTargets(), kd.losses.SoftTargets(4.0)]
    distiller.compile("adam", distillation_loss={"a": two, "b": kd.losses.SoftTargets()})
    names = [transfer.name for transfer in distiller.transfers]
    assert names == ["a_soft_targets", "a_soft_targets_1", "b_soft_targets"]


def test_a_lambda_has_a_name_too():
    transfer = kd.Transfer(lambda teacher, student: ops.mean(ops.abs(teacher - student), axis=-1))
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None, distillation_loss=transfer)
    x, _ = rows()
    logs = distiller.train_on_batch(x, return_dict=True)
    assert np.isfinite(logs[transfer.name])
    assert transfer.name.isidentifier()


def test_per_token_weights_beside_a_pooled_layer():
    def model(width, name):
        inputs = keras.Input((5, FEATURES))
        x = layers.Dense(width, name="tokens")(inputs)
        return keras.Model(inputs, layers.Dense(CLASSES)(x), name=name)

    student, teacher = model(3, "student"), model(3, "teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd",
        loss=None,
        distillation_loss=[
            kd.losses.SoftTargets(),
            kd.Transfer(kd.losses.Hint(), "tokens", "tokens"),
        ],
        run_eagerly=True,
    )
    x = np.random.default_rng(0).normal(size=(4, 5, FEATURES)).astype("float32")
    for shape in ((4,), (4, 5), (4, 1)):
        logs = distiller.train_on_batch(x, sample_weight=np.ones(shape), return_dict=True)
        assert np.isfinite(logs["hint"]), shape
        assert np.isfinite(logs["soft_targets"]), shape


def test_weights_are_checked():
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`weight` of a transfer is finite and not negative"):
            kd.Transfer(kd.losses.Hint(), weight=weight)
    with pytest.raises(TypeError, match="`teacher` of a transfer is a layer's path"):
        kd.Transfer(kd.losses.Hint(), teacher=3)
    with pytest.raises(TypeError, match="`student` of a transfer is a layer's path"):
        kd.Transfer(kd.losses.Hint(), student=["a", None])
    with pytest.raises(TypeError, match="`projector` of a transfer"):
        kd.Transfer(kd.losses.Hint(), projector=3)
    with pytest.raises(TypeError, match="`loss` of a transfer"):
        kd.Transfer("mse")


def test_an_unknown_projector_is_named():
    with pytest.raises(ValueError, match="`projector='liner'`.*'linear'"):
        kd.Transfer(kd.losses.Hint(), "a", "b", projector="liner")


def test_the_config_round_trip():
    transfer = kd.Transfer(
        kd.losses.SoftTargets(temperature=3.0),
        teacher=["a", "b/c"],
        student=("d", "e"),
        projector=layers.Dense(3),
        weight=0.5,
        name="mine",
    )
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(transfer))
    assert (again.name, again.teacher, again.student) == ("mine", ["a", "b/c"], ["d", "e"])
    assert again.loss.temperature == 3.0
    assert again.projector.units == 3
    assert float(again.weight) == 0.5


def test_summary_of_transfers():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear", weight=7.0)
    distiller.compile("sgd", loss=None, distillation_loss=[kd.losses.SoftTargets(), hint])
    first, second = distiller.summary_of_transfers()
    assert first["loss"] == "SoftTargets"
    assert (first["teacher"], first["student"]) == ("output", "output")
    assert (second["name"], second["weight"], second["projector"]) == ("hint", 7.0, "linear")


def test_a_loss_that_reads_labels_gets_them():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    loss = kd.losses.DecoupledKD(temperature=4.0)
    distiller.compile(keras.optimizers.SGD(0.0), loss=crossentropy(), distillation_loss=loss)
    x, y = rows()
    logs = distiller.train_on_batch(x, y, return_dict=True)
    expected = float(loss(teacher(x), student(x), labels=y))
    other = float(loss(teacher(x), student(x), labels=(y + 1) % CLASSES))
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-5)
    assert abs(expected - other) > 1e-3


def test_an_mlp_keeps_its_layers_callable_after_an_error():
    student, teacher = mlp(name="student"), mlp(name="teacher", width=7)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd", loss=None, distillation_loss=kd.Transfer(kd.losses.Hint(), "hidden", "hidden")
    )
    x, _ = rows()
    with pytest.raises(ValueError, match="Hint|hint"):
        distiller.train_on_batch(x)
    assert "call" not in vars(student.get_layer("hidden"))
    student(x), teacher(x)
