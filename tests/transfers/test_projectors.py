"""Projectors against NumPy: what each computes, what `auto` chooses, what is refused."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_kd as kd
from keras_kd.transfers import projectors

RNG = np.random.default_rng(7)


def _made(kind, teacher, student, name="hint"):
    layer = projectors.make(kind, teacher, student, name)
    layer.build(student)
    return layer


def _run(layer, values):
    return ops.convert_to_numpy(layer(ops.convert_to_tensor(values)))


def _area_matrix(size, count):
    """Overlap of output cells with input cells, by counting on the finest common grid."""
    cells = np.zeros((size, count))
    for k in range(size * count):
        cells[k // count, k // size] += 1 / count
    return cells


def test_linear_is_wx_plus_b_at_every_position():
    layer = _made("linear", (None, 5, 3), (None, 5, 4))
    kernel, bias = RNG.normal(size=(4, 3)), RNG.normal(size=3)
    layer.set_weights([kernel, bias])
    x = RNG.normal(size=(2, 5, 4)).astype("float32")
    np.testing.assert_allclose(_run(layer, x), x @ kernel + bias, rtol=1e-5, atol=1e-6)
    assert layer.description == "linear"


def test_mlp_is_two_linear_maps_around_a_relu():
    layer = _made("mlp", (None, 3), (None, 4))
    w1, b1, w2, b2 = (RNG.normal(size=s) for s in ((4, 4), 4, (4, 3), 3))
    layer.set_weights([w1, b1, w2, b2])
    x = RNG.normal(size=(6, 4)).astype("float32")
    expected = np.maximum(x @ w1 + b1, 0) @ w2 + b2
    np.testing.assert_allclose(_run(layer, x), expected, rtol=1e-5, atol=1e-5)
    assert layer.count_params() == 4 * 4 + 4 + 4 * 3 + 3


def test_conv_of_equal_sizes_is_1x1():
    layer = _made("conv", (None, 4, 4, 3), (None, 4, 4, 2))
    kernel, bias = RNG.normal(size=(1, 1, 2, 3)), RNG.normal(size=3)
    layer.set_weights([kernel, bias])
    x = RNG.normal(size=(2, 4, 4, 2)).astype("float32")
    np.testing.assert_allclose(_run(layer, x), x @ kernel[0, 0] + bias, rtol=1e-5, atol=1e-6)


def test_conv_with_stride_is_a_sum_over_its_window():
    layer = _made("conv", (None, 2, 2, 1), (None, 4, 4, 1))
    assert layer.description == "conv 3x3 /2"
    layer.set_weights([np.ones((3, 3, 1, 1)), np.zeros(1)])
    x = RNG.normal(size=(1, 4, 4, 1)).astype("float32")
    # "same" padding of an even size puts the odd row and column behind.
    padded = np.pad(x[0, :, :, 0], ((0, 1), (0, 1)))
    expected = [[padded[i : i + 3, j : j + 3].sum() for j in (0, 2)] for i in (0, 2)]
    np.testing.assert_allclose(_run(layer, x)[0, :, :, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(4, 8), (6, 3), (5, 3), (3, 5), (7, 7)])
def test_pool_averages_over_equal_areas(sizes):
    count, size = sizes
    layer = _made("pool", (None, size, 2, 3), (None, count, 2, 3))
    x = RNG.normal(size=(2, count, 2, 3)).astype("float32")
    expected = np.einsum("ij,bjwc->biwc", _area_matrix(size, count), x)
    np.testing.assert_allclose(_run(layer, x), expected, rtol=1e-5, atol=1e-6)
    assert layer.count_params() == 0


def test_pool_takes_sizes_that_only_the_batch_shows():
    layer = _made("pool", (None, 2, 2, 3), (None, None, None, 3))
    # Unknown sizes count as equal, so nothing is resampled.
    assert layer.description == "none"
    layer = _made("pool", (None, 4, 2, 3), (None, 8, None, 3))
    assert layer.description == "pool to 4x2"
    x = RNG.normal(size=(1, 8, 6, 3)).astype("float32")
    expected = x.reshape(1, 4, 2, 2, 3, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(_run(layer, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("class_token", [0, 1])
def test_tokens_become_a_map_row_by_row(class_token):
    layer = _made("tokens", (None, 2, 3, 5), (None, 6 + class_token, 5))
    x = RNG.normal(size=(2, 6 + class_token, 5)).astype("float32")
    np.testing.assert_array_equal(_run(layer, x), x[:, class_token:].reshape(2, 2, 3, 5))


def test_tokens_of_a_finer_grid_are_averaged_into_the_map():
    layer = _made("tokens", (None, 2, 2, 5), (None, 17, 5))
    x = RNG.normal(size=(2, 17, 5)).astype("float32")
    expected = x[:, 1:].reshape(2, 2, 2, 2, 2, 5).mean(axis=(2, 4))
    np.testing.assert_allclose(_run(layer, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("class_token", [0, 1])
def test_a_map_becomes_tokens_with_its_mean_as_class_token(class_token):
    layer = _made("tokens", (None, 4 + class_token, 5), (None, 4, 4, 5))
    x = RNG.normal(size=(2, 4, 4, 5)).astype("float32")
    tokens = x.reshape(2, 2, 2, 2, 2, 5).mean(axis=(2, 4)).reshape(2, 4, 5)
    expected = np.concatenate([tokens.mean(1, keepdims=True)] * class_token + [tokens], axis=1)
    np.testing.assert_allclose(_run(layer, x), expected, rtol=1e-5, atol=1e-6)


def test_class_tokens_stay_apart_from_the_grid():
    layer = _made("auto", (None, 5, 6), (None, 17, 6))
    x = RNG.normal(size=(2, 17, 6)).astype("float32")
    grid = x[:, 1:].reshape(2, 2, 2, 2, 2, 6).mean(axis=(2, 4)).reshape(2, 4, 6)
    expected = np.concatenate([x[:, :1], grid], axis=1)
    np.testing.assert_allclose(_run(layer, x), expected, rtol=1e-5, atol=1e-6)
    assert layer.description == "tokens 4x4 to 2x2"


AUTO = [
    # teacher, student, what is chosen, its parameters
    ((None, 8), (None, 8), "none", 0),
    ((None, 8), (None, 4), "linear", 4 * 8 + 8),
    ((None, 10, 8), (None, 10, 4), "linear", 4 * 8 + 8),
    ((None, None, 8), (None, None, 4), "linear", 4 * 8 + 8),
    ((None, 7, 7, 8), (None, 7, 7, 8), "none", 0),
    ((None, 7, 7, 8), (None, 7, 7, 4), "conv 1x1", 4 * 8 + 8),
    ((None, None, None, 8), (None, 7, 7, 4), "conv 1x1", 4 * 8 + 8),
    ((None, 7, 7, 8), (None, 14, 14, 4), "conv 3x3 /2", 9 * 4 * 8 + 8),
    ((None, 7, 7, 8), (None, 13, 13, 4), "conv 3x3 /2", 9 * 4 * 8 + 8),
    ((None, 14, 14, 8), (None, 7, 7, 4), "conv 4x4 x2 up", 16 * 4 * 8 + 8),
    ((None, 7, 14, 8), (None, 14, 14, 4), "conv 3x1 /2x1", 3 * 4 * 8 + 8),
    ((None, 7, 7, 8), (None, 56, 56, 4), "pool to 7x7, linear", 4 * 8 + 8),
    ((None, 14, 7, 8), (None, 7, 14, 8), "pool to 14x7", 0),
    ((None, 5, 5, 8), (None, 7, 7, 8), "pool to 5x5", 0),
    ((None, 50, 8), (None, 25, 4), "conv 4 x2 up", 4 * 4 * 8 + 8),
    ((None, 4, 4, 4, 8), (None, 8, 8, 8, 8), "conv 3x3x3 /2", 27 * 8 * 8 + 8),
    ((None, 8), (None, 7, 7, 8), "mean of positions", 0),
    ((None, 8), (None, 9, 4), "mean of positions, linear", 4 * 8 + 8),
    ((None, 7, 7, 8), (None, 50, 4), "tokens to 7x7, linear", 4 * 8 + 8),
    ((None, 49, 8), (None, 7, 7, 4), "map to 49 tokens, linear", 4 * 8 + 8),
]


@pytest.mark.parametrize(("teacher", "student", "words", "parameters"), AUTO)
def test_auto_chooses_from_the_shapes(teacher, student, words, parameters):
    layer = _made("auto", teacher, student)
    assert layer.description == words == projectors.describe("auto", teacher, student)
    assert layer.count_params() == parameters
    filled = (2, *(5 if d is None else d for d in student[1:]))
    # A size that the teacher leaves open is the student's.
    expected = (2, *(filled[i] if d is None else d for i, d in enumerate(teacher) if i))
    assert _run(layer, np.ones(filled, "float32")).shape == expected
    assert len(layer.compute_output_shape(student)) == len(teacher)


@pytest.mark.parametrize(
    ("kind", "teacher", "student", "reason"),
    [
        ("auto", (None, 7, 7, 8), (None, 16), "a vector does not say what happens where"),
        ("auto", (None, 7, 7, 8), (None, 12, 16), "12 tokens fill no square grid"),
        ("auto", (None, 7, 7, 8), (None, 7, 7, 7, 16), "tokens are joined with"),
        ("auto", (None, None), (None, 16), "last axis of the teacher's"),
        ("linear", (None, 7, 7, 8), (None, 14, 14, 8), "changes the last axis alone"),
        ("mlp", (None, 7, 8), (None, 8), "changes the last axis alone"),
        ("conv", (None, 5, 5, 8), (None, 7, 7, 8), "no whole multiples"),
        ("conv", (None, 8), (None, 8), "a convolution joins maps"),
        ("pool", (None, 8), (None, 7, 8), "pooling joins maps"),
    ],
)
def test_shapes_that_cannot_be_joined_are_named(kind, teacher, student, reason):
    with pytest.raises(ValueError, match="cannot join") as caught:
        projectors.make(kind, teacher, student, "hint")
    message = str(caught.value)
    assert reason in message
    assert str(teacher) in message
    assert str(student) in message
    assert "`hint`" in message
    assert "a layer that maps one shape to the other" in message
    assert projectors.describe(kind, teacher, student) == "cannot join"


def test_an_unknown_kind_names_the_known():
    with pytest.raises(ValueError, match=r"'spline'.*'auto', 'linear', 'conv'"):
        projectors.make("spline", (None, 4), (None, 4), "hint")
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        projectors.describe("liner", (None, 4), (None, 4))


@pytest.mark.parametrize(("teacher", "student"), [((None, 2, 2, 3), (None, 5, 5, 2)), AUTO[2][:2]])
def test_computes_in_float32_whatever_the_policy(teacher, student):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layer = _made("auto", teacher, student)
        x = ops.ones((2, *student[1:]), dtype="float32") * 1e5  # past the range of float16
        y = layer(x)
    finally:
        keras.config.set_dtype_policy(before)
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    assert np.isfinite(ops.convert_to_numpy(y)).all()
    assert {keras.backend.standardize_dtype(w.dtype) for w in layer.weights} == {"float32"}


def _cnn(width, stride, name):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(width, 3, stride, "same", activation="relu", name="map")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name=name)


def _distiller():
    student, teacher = _cnn(4, 1, "student"), _cnn(6, 2, "teacher")
    hint = kd.Transfer(kd.losses.Hint(), "map", "map", projector="auto", weight=2.0)
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None, distillation_loss=[kd.losses.SoftTargets(), hint])
    return distiller


def test_the_summary_shows_projectors_and_shapes():
    distiller = _distiller()
    lines = []
    distiller.summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert "Total params: 127" in text  # the student alone: 3*9*4+4 + 4*3+3
    row = next(line for line in text.splitlines() if line.startswith(" hint"))
    cells = ["hint (x 2)", "map 4x4x6", "map 8x8x4", "conv 3x3 /2", "-"]
    assert row.split() == " ".join(cells).split()
    # Looking builds nothing.
    assert not distiller.transfers[1].built
    x = RNG.normal(size=(8, 8, 8, 3)).astype("float32")
    distiller.fit(x, epochs=1, verbose=0)
    rows = distiller.summary_of_transfers()
    assert rows[1]["projection"] == "conv 3x3 /2"
    assert (rows[1]["teacher_shape"], rows[1]["student_shape"]) == (
        (None, 4, 4, 6),
        (None, 8, 8, 4),
    )
    assert (rows[0]["parameters"], rows[1]["parameters"]) == (0, 9 * 4 * 6 + 6)
    assert max(map(len, text.splitlines())) <= 80


def test_projectors_train_and_stay_out_of_the_student(tmp_path):
    distiller = _distiller()
    student = distiller.student
    x = RNG.normal(size=(8, 8, 8, 3)).astype("float32")
    distiller.fit(x, epochs=1, verbose=0)
    kernel = distiller.transfers[1].projection.weights[0]
    before = ops.convert_to_numpy(kernel).copy()
    distiller.fit(x, epochs=1, verbose=0)
    assert (ops.convert_to_numpy(kernel) != before).any()
    assert student.count_params() == 127
    student.save(tmp_path / "student.keras")
    assert keras.saving.load_model(tmp_path / "student.keras").count_params() == 127
    distiller.save(tmp_path / "distiller.keras")
    again = kd.load_distiller(tmp_path / "distiller.keras", teacher=distiller.teacher)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(again.transfers[1].projection.weights[0]), ops.convert_to_numpy(kernel)
    )


def test_an_unknown_projector_is_refused_when_it_is_named():
    with pytest.raises(ValueError, match=r"'autp'.*Did you mean 'auto'"):
        kd.Transfer(kd.losses.Hint(), "map", "map", projector="autp")
