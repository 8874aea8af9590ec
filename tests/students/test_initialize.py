"""Where a student starts: whole layers equal, parts cut by hand, tables that say so."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_kd as kd
from keras_kd.students import initialize_from, shrink
from keras_kd.students.align import aligned

sys.path.insert(0, str(Path(__file__).parent))

from students_models import batch, mobile, resnet, run, transformer


def _weights(model, path):
    return [ops.convert_to_numpy(w) for w in model.get_layer(path).weights]


def _dense(widths, names, classes=3):
    x = inputs = keras.Input((4,))
    for width, name in zip(widths, names):
        x = layers.Dense(width, "relu", name=name)(x)
    return keras.Model(inputs, layers.Dense(classes, name="head")(x))


@pytest.mark.parametrize(
    ("make", "choice"),
    [
        (lambda: resnet(2, 8, size=8), "importance"),
        (lambda: transformer(2), "every_other"),
        (lambda: transformer(2), "importance"),
        (lambda: transformer(1, after=True), "names"),
        (mobile, "importance"),
    ],
    ids=["resnet", "repeated", "transformer", "post-norm", "mobile"],
)
def test_a_whole_copy_answers_like_the_teacher(make, choice):
    teacher = make()
    x = batch(teacher)
    student = shrink(teacher, width=1.0)
    copied = initialize_from(student, teacher, choice)
    np.testing.assert_array_equal(run(student, x), run(teacher, x))
    assert copied.parameters == teacher.count_params()
    assert {row.how for row in copied} == {"whole"}


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("axb", "axxb", [(0, 0), (1, 1), (2, 3)]),
        ("axxxb", "axxxxxxb", [(0, 0), (1, 1), (2, 3), (3, 5), (4, 7)]),
        ("apqpqz", "apqpqpqpqz", [(0, 0), (1, 1), (2, 2), (3, 5), (4, 6), (5, 9)]),
        ("abb", "abb", [(0, 0), (1, 1), (2, 2)]),
        ("axyyb", "axxyyyyb", [(0, 0), (1, 1), (2, 3), (3, 5), (4, 7)]),
        ("abx", "aby", 2),
        ("ab", "abc", 2),
        ("axxxb", "axxb", 3),
    ],
)
def test_repetitions_are_spread_evenly(student, teacher, expected):
    assert aligned(list(student), list(teacher)) == expected


def test_every_other_block_of_a_deeper_teacher():
    teacher, student = transformer(6), transformer(3)
    copied = initialize_from(student, teacher)
    for ours, theirs in ((0, 0), (1, 2), (2, 4)):
        for layer in ("att{}", "ln{}a", "ln{}b", "up{}", "down{}"):
            pair = _weights(student, layer.format(ours)), _weights(teacher, layer.format(theirs))
            for a, b in zip(*pair):
                np.testing.assert_array_equal(a, b)
    assert [row.teacher for row in copied if row.student.startswith("att")] == [
        "att0",
        "att2",
        "att4",
    ]
    assert copied.parameters == student.count_params()


def test_every_other_says_where_the_models_part():
    student, teacher = _dense([8, 7], "ab"), _dense([8, 8], "xy")
    before = student.get_weights()
    with pytest.raises(ValueError, match=r"`b` of the student.*\(8, 7\)"):
        initialize_from(student, teacher)
    assert all((a == b).all() for a, b in zip(before, student.get_weights()))


def test_a_mapping_copies_layers_blocks_and_nested_models():
    def nested(name, names):
        core = keras.Sequential([keras.Input((4,)), layers.Dense(5, name=names)], name=name)
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(3, name="head")(core(inputs)))

    student, teacher = nested("core", "a"), nested("body", "b")
    copied = initialize_from(student, teacher, {"core": "body"})
    np.testing.assert_array_equal(
        student.get_layer("core").get_weights()[0], teacher.get_layer("body").get_weights()[0]
    )
    assert [tuple(row) for row in copied] == [
        ("core", "body", "whole", 25, 25),
        ("head", "", "not", 0, 18),
    ]
    assert (_weights(student, "head")[0] != _weights(teacher, "head")[0]).any()
    initialize_from(student, teacher, {"core/a": "body/b", "head": "head"})
    x = np.ones((1, 4), "float32")
    np.testing.assert_array_equal(run(student, x), run(teacher, x))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_most_important_units_stay(norm):
    teacher, student = _dense([6], "a"), _dense([3], "a")
    kernel, bias = np.random.default_rng(1).normal(size=(4, 6)), np.arange(6.0)
    head = np.random.default_rng(2).normal(size=(6, 3))
    teacher.set_weights([kernel, bias, head, np.ones(3)])
    importance = np.abs(kernel).sum(0) if norm == "l1" else np.sqrt((kernel**2).sum(0))
    kept = np.sort(np.argsort(-importance)[:3])
    copied = initialize_from(student, teacher, "importance", norm=norm)
    expected = [kernel[:, kept], bias[kept], head[kept], np.ones(3)]
    for value, wanted in zip(student.get_weights(), expected):
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert [tuple(row) for row in copied] == [
        ("a", "a", "part", 15, 15),
        ("head", "head", "part", 12, 12),
    ]


def test_norms_that_differ_choose_differently():
    teacher, student = _dense([2], "a"), _dense([1], "a")
    kernel = np.array([[3, 0, 0, 0], [1, 1, 1, 1]], "float32").T  # l1: 3, 4; l2: 3, 2
    teacher.get_layer("a").kernel.assign(kernel)
    for norm, unit in (("l1", 1), ("l2", 0)):
        initialize_from(student, teacher, "importance", norm=norm)
        np.testing.assert_array_equal(_weights(student, "a")[0], kernel[:, [unit]])


def test_channels_that_are_added_are_kept_together():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(4, 1, name="one")(inputs)
    y = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 1, name="two")(inputs))
    z = layers.Flatten()(layers.Add()([x, y]))
    teacher = keras.Model(inputs, layers.Dense(2, name="head")(z))
    batch(teacher)
    # Importance 5, 1, 0, 6 and 0, 3, 9, 1: together 5, 4, 9, 7.
    teacher.get_layer("one").kernel.assign(np.array([5, 1, 0, 6.0] + [0] * 4).reshape(1, 1, 2, 4))
    teacher.get_layer("two").kernel.assign(np.array([0, 3, 9, 1.0] + [0] * 4).reshape(1, 1, 2, 4))
    student = shrink(teacher, width=0.5)
    initialize_from(student, teacher, "importance")
    kept = [2, 3]
    for name in ("one", "two"):
        theirs, ours = _weights(teacher, name), _weights(student, name)
        np.testing.assert_array_equal(ours[0], theirs[0][..., kept])
        np.testing.assert_array_equal(ours[1], theirs[1][kept])
    for a, b in zip(_weights(student, "bn"), _weights(teacher, "bn")):
        np.testing.assert_array_equal(a, b[kept])
    head = _weights(teacher, "head")[0].reshape(16, 4, 2)[:, kept].reshape(32, 2)
    np.testing.assert_array_equal(_weights(student, "head")[0], head)


def test_whole_heads_are_kept():
    inputs = keras.Input((5, 8))
    x = layers.Dense(8, name="in")(inputs)
    x = layers.MultiHeadAttention(4, 2, name="att")(x, x)
    teacher = keras.Model(inputs, layers.Dense(3, name="head")(x))
    attention = teacher.get_layer("att")
    for part in ("query", "key", "value"):
        kernel = np.random.default_rng(3).normal(size=(8, 4, 2))
        kernel[:, [0, 2]] *= 10
        getattr(attention, f"{part}_dense").kernel.assign(kernel)
    student = shrink(teacher, width=0.5)
    initialize_from(student, teacher, "importance")
    kernel = ops.convert_to_numpy(attention.query_dense.kernel)
    ours = ops.convert_to_numpy(student.get_layer("att").query_dense.kernel)
    assert ours.shape == (4, 2, 2)
    scores = np.abs(_weights(teacher, "in")[0]).sum(0)
    scores += np.abs(ops.convert_to_numpy(attention.output_dense.kernel)).sum((0, 1))
    stream = np.sort(np.argsort(-scores)[:4])
    np.testing.assert_array_equal(ours, kernel[stream][:, [0, 2]])


@pytest.mark.parametrize("make", [lambda: resnet(2, 8, size=8), lambda: transformer(2), mobile])
def test_a_shrunk_student_starts_from_its_teacher_throughout(make):
    teacher = make()
    x = batch(teacher)
    depth = 0.5 if teacher.name == "transformer" else 1.0
    student = shrink(teacher, width=0.5, depth=depth)
    copied = initialize_from(student, teacher, "importance")
    assert copied.parameters == student.count_params()
    assert np.isfinite(run(student, x)).all()


def test_units_without_weights_may_go_unnoticed():
    """Cutting channels that are zero changes nothing."""
    teacher = mobile(16)
    x = batch(teacher)
    dead = [1, 4, 5, 8, 9, 10, 12, 15]
    for name in ("stem", "separable", "gate2", "branch"):
        layer = teacher.get_layer(name)
        gone = dead if name != "branch" else [*dead, *(d + 16 for d in dead)]
        for variable in layer.weights:
            if variable.shape[-1] in (16, 32) and "depthwise" not in variable.name:
                value = ops.convert_to_numpy(variable).copy()
                # What the gate makes is summed with what the branch before it makes.
                value[..., gone] = 0
                variable.assign(value)
    for name in ("depthwise", "bn"):
        for variable in teacher.get_layer(name).weights:
            if variable.name in ("bias", "beta", "moving_mean"):
                value = ops.convert_to_numpy(variable).copy()
                value[dead] = 0
                variable.assign(value)
    student = shrink(teacher, width=0.5)
    # The inner gate is whole, so that only dead channels are lost.
    gates = teacher.get_layer("gate1")
    gates.kernel.assign(ops.convert_to_numpy(gates.kernel) * np.array([1, 0, 1, 0]))
    gates.bias.assign(ops.convert_to_numpy(gates.bias) * np.array([1, 0, 1, 0]))
    initialize_from(student, teacher, "importance")
    np.testing.assert_allclose(run(student, x), run(teacher, x), rtol=1e-4, atol=1e-5)


def test_the_table_says_what_was_copied():
    student = _dense([8, 7], "ab")
    copied = initialize_from(student, _dense([8, 9], "ab"), "names")
    text = str(copied)
    assert text.startswith("40 of 127 parameters of the student come from the teacher")
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split() for line in text.splitlines() if line.startswith(" a ")] == [
        ["a", "a", "whole", "40", "40"]
    ]


def test_bad_choices_are_refused_before_anything_is_copied():
    student, teacher = _dense([8], "a"), _dense([8], "b", classes=4)
    before = student.get_weights()
    with pytest.raises(ValueError, match=r"`layers='every_othr'` is unknown.*'every_other'\?"):
        initialize_from(student, teacher, "every_othr")
    with pytest.raises(ValueError, match="No layer of"):
        initialize_from(student, teacher, "names")
    with pytest.raises(ValueError, match=r"`head` of the student has weights of shapes.*\(8, 3\)"):
        initialize_from(student, teacher, {"a": "b", "head": "head"})
    with pytest.raises(ValueError, match=r"`heat` is not a layer.*`head`"):
        initialize_from(student, teacher, {"heat": "head"})
    with pytest.raises(ValueError, match="empty mapping"):
        initialize_from(student, teacher, {})
    with pytest.raises(ValueError, match="norm='l3'"):
        initialize_from(student, teacher, "importance", norm="l3")
    with pytest.raises(TypeError, match=r"Received: layers=\['a'\]"):
        initialize_from(student, teacher, ["a"])
    with pytest.raises(ValueError, match="has no weights yet"):
        initialize_from(keras.Sequential([layers.Dense(3)]), teacher)
    assert all((a == b).all() for a, b in zip(before, student.get_weights()))


def test_a_normalization_computes_with_what_it_was_given():
    def model():
        inputs = keras.Input((2,))
        return keras.Model(
            inputs, layers.Dense(2, name="d")(layers.Normalization(name="n")(inputs))
        )

    teacher, student = model(), model()
    teacher.get_layer("n").adapt(np.array([[1.0, 10.0], [3.0, 30.0]], "float32"))
    initialize_from(student, teacher, "names")
    x = np.array([[5.0, 1.0]], "float32")
    np.testing.assert_array_equal(run(student, x), run(teacher, x))


def test_a_started_student_begins_where_its_teacher_stands():
    teacher = _dense([16, 16], "ab")
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    losses = []
    for width in (1.0, 0.5):
        student = shrink(teacher, width=width)
        initialize_from(student, teacher, "importance")
        distiller = kd.Distiller(student, teacher)
        distiller.compile("sgd", loss=None)
        losses.append(distiller.fit(x, epochs=1, batch_size=16, verbose=0).history["loss"][0])
    assert losses[0] < 1e-6 < losses[1]


@pytest.mark.parametrize("choice", ["names", "every_other", "importance"])
@pytest.mark.parametrize("own", [False, True], ids=["plain", "updated"])
def test_updates_of_low_rank_are_copied_as_part_of_the_kernels(choice, own):
    teacher, student = transformer(2), transformer(2)
    for each in [teacher, student] if own else [teacher]:
        kd.students.enable_lora(each, rank=2)
        for variable in each.trainable_variables:
            variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    x = batch(teacher)
    copied = initialize_from(student, teacher, choice)
    assert {row.how for row in copied} == {"whole"}
    assert copied.parameters == sum(row.of for row in copied)
    np.testing.assert_allclose(run(student, x), run(teacher, x), rtol=1e-3, atol=1e-4)
    if own:
        assert any(
            ops.convert_to_numpy(v).any() for v in student.variables if "lora_kernel_a" in v.path
        )


def test_a_student_of_a_teacher_with_updates_has_none_and_its_channels():
    teacher = _dense([16], ["a"])
    teacher.layers[1].enable_lora(2)
    # Of the sum, the even channels are the large ones; of the kernel alone, the odd ones.
    kernel = np.tile([0.0, 1.0], (4, 8))
    a, b = np.ones((4, 2)), np.tile([2.0, -0.5], (2, 8))
    for variable, value in zip(teacher.layers[1].variables, (kernel, np.zeros(16), a, b)):
        variable.assign(value)
    student = shrink(teacher, width=0.5)
    assert not student.layers[1].lora_enabled
    assert len(student.trainable_variables) == 4
    initialize_from(student, teacher, "importance")
    np.testing.assert_array_equal(_weights(student, "a")[0], np.full((4, 8), 4.0))
