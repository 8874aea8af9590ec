"""Shrunk models: counted by hand, of the teacher's kind and shapes, and plain."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_kd as kd
from keras_kd.students import shrink
from keras_kd.students.shrink import rounded

sys.path.insert(0, str(Path(__file__).parent))

from students_models import (
    batch,
    mobile,
    resnet,
    resnet_parameters,
    run,
    transformer,
    transformer_parameters,
)


@pytest.mark.parametrize(
    ("size", "width", "divisor", "expected"),
    [
        (64, 0.5, 8, 32),
        (64, 0.3, 8, 16),  # 19.2, to a multiple of 8
        (100, 0.5, 8, 48),  # 50
        (24, 0.5, 8, 12),  # 12 is under 2 * 8: to a multiple of 4
        (20, 0.25, 8, 6),  # 5: to a multiple of 2
        (4, 0.5, 8, 2),
        (3, 0.5, 8, 2),  # 1.5
        (1, 0.1, 8, 1),
        (64, 0.5, 1, 32),
        (10, 0.33, 1, 3),
        (13, 1.0, 8, 13),
    ],
)
def test_widths_are_rounded_to_a_multiple(size, width, divisor, expected):
    assert rounded(size, width, divisor) == expected


def test_a_residual_network_has_the_parameters_of_a_narrower_one():
    teacher = resnet(blocks=2, width=16)
    assert teacher.count_params() == resnet_parameters(2, (16, 32, 64))
    student = shrink(teacher, width=0.5)
    assert student.count_params() == resnet_parameters(2, (8, 16, 32))
    assert student.count_params() == resnet(blocks=2, width=8).count_params()
    assert [layer.name for layer in student.layers] == [layer.name for layer in teacher.layers]
    assert student.input_shape == teacher.input_shape
    assert student.output_shape == teacher.output_shape
    assert type(student) is type(keras.Model(teacher.input, teacher.output))
    assert not student.compiled


def test_depth_keeps_the_last_of_repeated_blocks():
    teacher = resnet(blocks=5, width=8)
    student = shrink(teacher, width=1.0, depth=0.5)
    sums = [layer.name for layer in student.layers if layer.name.startswith("add")]
    # Stage 0 repeats five times and keeps 3; the later ones repeat four behind a projection.
    assert sums == ["add01", "add03", "add04", "add10", "add12", "add14", "add20", "add22", "add24"]
    before, after = resnet_parameters(5, (8, 16, 32)), resnet_parameters(3, (8, 16, 32))
    assert (teacher.count_params(), student.count_params()) == (before, after)


@pytest.mark.parametrize("after", [False, True])
def test_a_transformer_loses_heads_and_blocks_but_not_the_size_of_a_head(after):
    teacher = transformer(4, 16, 4, after)
    assert teacher.count_params() == transformer_parameters(4, 16, 4, 4, final=not after)
    student = shrink(teacher, width=0.5, depth=0.5)
    assert student.count_params() == transformer_parameters(2, 8, 2, 4, final=not after)
    assert [layer.name for layer in student.layers if layer.name.startswith("att")] == [
        "att1",
        "att3",
    ]
    attention = student.get_layer("att1")
    assert (attention.num_heads, attention.key_dim) == (2, 4)
    assert run(student, batch(student)).shape == (4, 5)


def test_a_single_head_grows_narrower():
    teacher = transformer(1, 16, 1)
    attention = shrink(teacher, width=0.5).get_layer("att0")
    assert (attention.num_heads, attention.key_dim, attention.value_dim) == (1, 8, 8)


def test_mobile_parts_fit_together():
    student = shrink(mobile(16), width=0.5)
    assert student.get_layer("depthwise").kernel.shape == (3, 3, 8, 1)
    assert student.get_layer("separable").pointwise_kernel.shape == (1, 1, 8, 8)
    assert student.get_layer("gate1").units == 2
    assert student.get_layer("gate2").units == 8
    assert student.get_layer("head").kernel.shape == ((8 + 16) * 16, 4)
    assert student.count_params() == mobile(8).count_params()


def test_what_is_added_to_the_input_or_returned_keeps_its_width():
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(4, 3, padding="same", name="tied")(inputs)
    x = layers.Add()([inputs, x])
    x = layers.Conv2D(16, 3, padding="same", name="free")(x)
    y = layers.Conv2D(8, 1, name="returned")(x)
    z = layers.BatchNormalization()(y)
    model = keras.Model(inputs, {"map": z, "deep": layers.Conv2D(2, 1, name="deep")(z)})
    student = shrink(model, width=0.5)
    filters = {name: student.get_layer(name).filters for name in ("tied", "free", "returned")}
    assert filters == {"tied": 4, "free": 8, "returned": 8}
    assert {k: v.shape for k, v in student.output.items()} == {
        "map": (None, 6, 6, 8),
        "deep": (None, 6, 6, 2),
    }


def test_an_autoencoder_unfolds_what_it_flattened():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, 2, "same", name="down")(inputs)
    x = layers.Dense(10, name="code")(layers.Flatten()(x))
    x = layers.Dense(4 * 4 * 8, name="up")(x)
    x = layers.Reshape((4, 4, 8), name="map")(x)
    x = layers.Conv2DTranspose(3, 3, 2, "same", name="image")(x)
    student = shrink(keras.Model(inputs, x), width=0.5)
    assert student.get_layer("up").units == 4 * 4 * 4
    assert student.get_layer("map").target_shape == (4, 4, 4)
    assert student.get_layer("image").kernel.shape == (3, 3, 3, 4)
    assert student.get_layer("code").units == 6  # 5, to a multiple of 2
    assert student.output_shape == (None, 8, 8, 3)


def test_nested_and_shared_models_shrink_inside():
    core = keras.Sequential(
        [keras.Input((8,)), layers.Dense(16, "relu", name="a"), layers.Dense(8, name="b")],
        name="core",
    )
    left, right = keras.Input((4,)), keras.Input((4,))
    stem = layers.Dense(8, name="stem")
    joined = layers.Concatenate()([core(stem(left)), core(stem(right))])
    teacher = keras.Model([left, right], layers.Dense(3, name="head")(joined))
    student = shrink(teacher, width=0.5)
    inner = student.get_layer("core")
    assert inner.input_shape == (None, 4)
    assert [inner.get_layer(n).units for n in "ab"] == [8, 4]
    assert student.get_layer("head").kernel.shape == (8, 3)
    assert student.count_params() == (4 * 4 + 4) + (4 * 8 + 8) + (8 * 4 + 4) + (8 * 3 + 3)
    x = [np.ones((2, 4), "float32")] * 2
    assert student(x).shape == (2, 3)


def test_operations_and_group_normalization():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(24, 3, padding="same", name="c1")(inputs)
    x = layers.GroupNormalization(8, name="groups")(x)
    x = ops.relu(x) + ops.sigmoid(layers.Conv2D(24, 1, name="c2")(x))
    x = ops.mean(x, axis=(1, 2)) * 0.5
    student = shrink(keras.Model(inputs, layers.Dense(3)(x)), width=0.5)
    # 12 channels: at most 4 of the 8 groups divide them.
    assert student.get_layer("groups").groups == 4
    assert student(np.ones((1, 8, 8, 3))).shape == (1, 3)


def test_normalization_keeps_its_statistics():
    norm = layers.Normalization(name="norm")
    norm.adapt(np.array([[1.0, 10.0], [3.0, 30.0]], "float32"))
    inputs = keras.Input((2,))
    x = layers.Dense(8, name="hidden")(norm(inputs))
    student = shrink(keras.Model(inputs, layers.Dense(2)(x)), width=0.5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(student.get_layer("norm")(np.array([[3.0, 10.0]]))), [[1.0, -1.0]]
    )


class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x


def _with(layer, shape=(8, 8, 3), width=8):
    inputs = keras.Input(shape)
    x = layers.Conv2D(width, 3, name="conv")(inputs)
    x = layers.GlobalAveragePooling2D()(layer(x))
    return keras.Model(inputs, layers.Dense(2)(x), name="teacher")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Doubled(name="odd"), "custom layer"),
        (layers.Conv2D(8, 3, groups=2, name="odd"), "grouped"),
        (layers.Lambda(lambda x: x, name="odd"), "not known"),
        (layers.DepthwiseConv2D(3, depth_multiplier=2, name="odd"), "depth_multiplier"),
        (layers.BatchNormalization(axis=1, name="odd"), "another axis"),
        (layers.Permute((3, 1, 2), name="odd"), "moves the channels"),
        (layers.Reshape((6, 12, 4), name="odd"), "splits the channels"),
    ],
)
def test_what_cannot_be_shrunk_is_named(layer, reason):
    with pytest.raises(ValueError, match=rf"Layer `odd` of class `\w+`.*{reason}"):
        shrink(_with(layer))


def test_custom_layers_are_kept_where_widths_are():
    inputs = keras.Input((4,))
    x = inputs
    for name in "abcd":
        x = layers.Add(name=name)([x, Doubled()(layers.Dense(4)(x))])
    teacher = keras.Model(inputs, x)
    student = shrink(teacher, width=1.0, depth=0.5)
    assert [layer.name for layer in student.layers if layer.name in "abcd"] == ["b", "d"]


def test_bad_values_are_refused():
    model = resnet(1)
    with pytest.raises(ValueError, match=r"`width`.*Received: width=0"):
        shrink(model, width=0)
    with pytest.raises(ValueError, match=r"`depth`.*Received: depth=1.5"):
        shrink(model, depth=1.5)
    with pytest.raises(ValueError, match="`divisor`"):
        shrink(model, divisor=0)
    with pytest.raises(ValueError, match=r"`depth=0.5` drops residual blocks.*`mobile` has none"):
        shrink(mobile(), depth=0.5)
    with pytest.raises(TypeError, match="Received: str"):
        shrink("resnet")
    with pytest.raises(ValueError, match="Call it on a batch"):
        shrink(keras.Sequential([layers.Dense(3)]))

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="class Own has no graph"):
        shrink(Own())


@pytest.mark.parametrize(
    "make", [lambda: resnet(1, 8, size=8), lambda: transformer(1, 16), mobile], ids=list("rtm")
)
def test_the_teacher_stays_and_the_student_trains_and_reloads(make, tmp_path):
    teacher = make()
    teacher.trainable = False
    x = batch(teacher, 8)
    before = [w.copy() for w in teacher.get_weights()]
    nodes = len(teacher.layers[1]._inbound_nodes)
    student = shrink(teacher, width=0.5)
    assert len(teacher.layers[1]._inbound_nodes) == nodes
    assert student.trainable_variables
    distiller = kd.Distiller(student, teacher)
    distiller.compile("adam", loss=None)
    start = [w.copy() for w in student.get_weights()]
    history = distiller.fit(x, epochs=1, batch_size=4, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert any((a != b).any() for a, b in zip(start, student.get_weights()))
    assert all((a == b).all() for a, b in zip(before, teacher.get_weights()))
    student.save(tmp_path / "student.keras")
    again = keras.saving.load_model(tmp_path / "student.keras", safe_mode=True)
    np.testing.assert_array_equal(run(again, x), run(student, x))


def test_mixed_precision_is_kept():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        teacher = resnet(1)
    finally:
        keras.config.set_dtype_policy(before)
    student = shrink(teacher)
    assert student.get_layer("stem").dtype_policy.name == "mixed_bfloat16"
    assert student.get_layer("head").dtype_policy.name == "mixed_bfloat16"


def _stack(units, widths=(), size=(8, 8, 3)):
    """A plain chain of units, `unit(x, width, k)` makes one."""
    x = inputs = keras.Input(size)
    for k, width in enumerate(widths):
        x = units(x, width, k)
    if len(x.shape) == 4:
        x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(5, name="head")(x), name="plain")


def _dense_unit(x, width, k):
    return layers.Dense(width, activation="relu", name=f"d{k}")(x)


def _conv_unit(x, width, k):
    x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"c{k}")(x)
    return layers.ReLU(name=f"r{k}")(layers.BatchNormalization(name=f"b{k}")(x))


def _separable_unit(x, width, k):
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=f"dw{k}")(x)
    x = layers.ReLU(name=f"dr{k}")(layers.BatchNormalization(name=f"db{k}")(x))
    x = layers.Conv2D(width, 1, use_bias=False, name=f"pw{k}")(x)
    return layers.ReLU(name=f"pr{k}")(layers.BatchNormalization(name=f"pb{k}")(x))


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize(
    ("teacher", "depth", "gone"),
    [
        # The first makes the width, the others repeat it.
        (lambda: _stack(_dense_unit, [32] * 6, (10,)), 0.5, {"d1", "d2", "d4"}),
        (lambda: _stack(_dense_unit, [32] * 6, (32,)), 0.1, {"d1", "d2", "d3", "d4"}),
        (lambda: _stack(_conv_unit, [16] * 5), 0.6, {"1", "3"}),
        # Two runs: each keeps its first and its last.
        (lambda: _stack(_conv_unit, [16] * 3 + [32] * 4), 0.5, {"1", "4", "5"}),
        (lambda: _stack(_separable_unit, [8, 16, 16, 16, 16]), 0.5, {"2", "3"}),
    ],
    ids=["dense", "two", "conv", "runs", "separable"],
)
def test_depth_drops_units_of_a_plain_chain(teacher, depth, gone, width):
    teacher = teacher()
    student = shrink(teacher, width=width, depth=depth)
    names = [layer.name for layer in teacher.layers]
    dropped = [n for n in names if n in gone or (n[-1] in gone and not n.startswith("input"))]
    kept = [n for n in names[1:] if n not in dropped]
    assert [layer.name for layer in student.layers[1:]] == kept
    assert student.output_shape == teacher.output_shape
    x = batch(teacher)
    assert run(student, x).shape == run(teacher, x).shape
    copied = kd.students.initialize_from(student, teacher, "names" if width == 1 else "importance")
    if width == 1:
        assert {row.how for row in copied} == {"whole"}
        # The graph is the teacher's, without the units that are gone.
        z = ops.convert_to_tensor(x)
        for name in kept:
            z = (
                teacher.get_layer(name)(z, training=False)
                if name[0] in "bd"
                else (teacher.get_layer(name)(z))
            )
        np.testing.assert_allclose(run(student, x), z, rtol=1e-5, atol=1e-6)


def test_a_chain_within_a_model_is_shortened_by_itself():
    inner = _stack(_conv_unit, [16] * 4)
    inputs = keras.Input((8, 8, 3))
    x = layers.Dense(16, "relu", name="f0")(inner(inputs))
    x = layers.Dense(16, "tanh", name="f1")(x)
    teacher = keras.Model(inputs, layers.Dense(5, name="last")(x))
    student = shrink(teacher, width=1.0, depth=0.5)
    assert [layer.name for layer in student.get_layer("plain").layers if layer.weights] == [
        "c0", "b0", "c3", "b3", "head",
    ]  # fmt: skip
    # Another activation is no repetition.
    assert [layer.name for layer in student.layers[2:]] == ["f0", "f1", "last"]


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: _stack(_dense_unit, [32, 32], (10,)),
        lambda: _stack(_dense_unit, [32, 24, 16, 8], (32,)),
        lambda: _stack(_conv_unit, [16, 8, 16, 8]),
    ],
    ids=["two", "narrowing", "alternating"],
)
def test_depth_is_refused_where_nothing_can_go(teacher):
    with pytest.raises(ValueError, match="so few that none is dropped"):
        shrink(teacher(), depth=0.5)
