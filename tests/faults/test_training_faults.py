"""Bad input to the distiller: one clear error before any work starts."""

import math
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from small_models import CLASSES, FEATURES, crossentropy, mlp, pair, rows

import keras_kd as kd
from keras_kd.distill import batch


def compiled(student, teacher, **options):
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), **{"loss": crossentropy(), **options})
    return distiller


def refuses(distiller, *data, match, error=ValueError, **options):
    """`fit` raises and the student is as it was."""
    before = distiller.student.get_weights()
    with pytest.raises(error, match=match):
        distiller.fit(*data, verbose=0, **options)
    for a, b in zip(before, distiller.student.get_weights()):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------ models


def test_class_counts_that_differ():
    distiller = kd.Distiller(mlp(classes=3, name="student"), mlp(classes=5, name="teacher"))
    with pytest.raises(ValueError, match="teacher has 5 classes and the student 3"):
        distiller.compile("sgd", loss=crossentropy())
    assert not distiller.compiled


class Subclassed(keras.Model):
    def __init__(self, classes=CLASSES, **options):
        super().__init__(**options)
        self.hidden = layers.Dense(3)
        self.last = layers.Dense(classes)

    def call(self, x):
        return self.last(self.hidden(x))


def test_class_counts_that_differ_in_subclassed_models():
    x, y = rows()
    teacher, student = Subclassed(5, name="teacher"), Subclassed(3, name="student")
    teacher(x), student(x)
    y = y % 3
    refuses(compiled(student, teacher), x, y, match="teacher has 5 classes and the student 3")


def test_the_same_transfer_between_layers_may_join_other_class_counts():
    x, y = rows()
    student, teacher = mlp(name="student"), mlp(classes=9, name="teacher")
    hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden")
    distiller = compiled(student, teacher, distillation_loss=hint)
    history = distiller.fit(x, y, verbose=0).history
    assert np.isfinite(history["hint"]).all()
    assert "agreement" not in history


def test_a_teacher_that_was_never_built():
    with pytest.raises(ValueError, match="teacher `novice` has no weights yet.*Load its trained"):
        kd.Distiller(mlp(), keras.Sequential([layers.Dense(CLASSES)], name="novice"))


def test_a_tf_keras_model():
    # What makes a tf_keras model is the module its class comes from.
    class Model:
        name = "old"

    Model.__module__ = "tf_keras.src.engine.training"
    for models in ((mlp(), Model()), (Model(), mlp())):
        with pytest.raises(TypeError, match=r"`old` is a tf_keras \(Keras 2\) model.*set_weights"):
            kd.Distiller(*models)


def test_things_that_are_no_models():
    with pytest.raises(TypeError, match=r"teacher must be an object.*`teacher\.keras`.*load_model"):
        kd.Distiller(mlp(), "teacher.keras")
    with pytest.raises(TypeError, match=r"student must be a `keras\.Model`.*Dense"):
        kd.Distiller(layers.Dense(3), mlp())
    with pytest.raises(ValueError, match="at least one model"):
        kd.Distiller(mlp(), [])


def test_the_student_as_its_own_teacher():
    model = mlp(name="narcissus")
    for teacher in (model, [mlp(), model]):
        with pytest.raises(ValueError, match=r"`narcissus` is the teacher itself.*clone_model"):
            kd.Distiller(model, teacher)


def test_a_student_without_trainable_weights():
    student, teacher = pair()
    student.trainable = False
    x, y = rows()
    refuses(
        compiled(student, teacher), x, y, match="No weight of the student `student` is trainable"
    )


# ------------------------------------------------------------------------ compile


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_temperatures(temperature):
    student, teacher = pair()
    with pytest.raises(ValueError, match="`temperature` must be positive and finite.*Received"):
        compiled(student, teacher, temperature=temperature)
    with pytest.raises(ValueError, match="`temperature` must be positive and finite.*Received"):
        kd.losses.SoftTargets(temperature=temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan, math.inf])
def test_alphas(alpha):
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"`alpha` weighs the hard loss and lies in \[0, 1\]"):
        compiled(student, teacher, alpha=alpha)


@pytest.mark.parametrize("name", ["student_loss_weight", "distillation_loss_weight"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_explicit_weights(name, value):
    student, teacher = pair()
    with pytest.raises(ValueError, match=f"`{name}` must be finite and not negative"):
        compiled(student, teacher, **{name: value})


def test_values_of_the_wrong_type():
    student, teacher = pair()
    with pytest.raises(TypeError, match="`temperature` is a number.*'hot'"):
        compiled(student, teacher, temperature="hot")
    with pytest.raises(TypeError, match=r"`alpha` is a number.*\[0.5\]"):
        compiled(student, teacher, alpha=[0.5])


def test_alpha_beside_explicit_weights():
    student, teacher = pair()
    with pytest.raises(ValueError, match="two ways to say the same"):
        compiled(student, teacher, alpha=0.5, distillation_loss_weight=1.0)


def test_alpha_without_labels():
    student, teacher = pair()
    with pytest.raises(ValueError, match="there is none with `loss=None`"):
        compiled(student, teacher, loss=None, alpha=0.5)
    with pytest.raises(ValueError, match="`student_loss_weight`.*there is none with `loss=None`"):
        compiled(student, teacher, loss=None, student_loss_weight=0.5)


def test_nothing_to_minimize():
    with pytest.raises(ValueError, match="no teacher and `loss=None`"):
        kd.Distiller(mlp()).compile("sgd")


def test_a_distillation_loss_without_a_teacher():
    with pytest.raises(ValueError, match="`distillation_loss`.*no teacher"):
        kd.Distiller(mlp()).compile(
            "sgd", loss=crossentropy(), distillation_loss=kd.losses.SoftTargets()
        )


def test_a_failed_compile_leaves_the_distiller_as_it_was():
    student, teacher = pair()
    distiller = compiled(student, teacher, alpha=0.25, temperature=3.0)
    with pytest.raises(ValueError, match="not a layer"):
        distiller.compile(
            "sgd",
            loss=crossentropy(),
            alpha=0.9,
            distillation_loss=kd.Transfer(kd.losses.Hint(), "nowhere", "hidden"),
        )
    assert float(distiller.alpha) == 0.25
    assert float(distiller.temperature) == 3.0
    x, y = rows()
    assert "soft_targets" in distiller.fit(x, y, verbose=0).history


def test_unknown_layers_with_close_matches():
    student, teacher = pair()
    for side, paths in (("teacher", ("hiden", "hidden")), ("student", ("hidden", "hiden"))):
        with pytest.raises(
            ValueError,
            match=f"`hiden` is not a layer of the {side} `{side}`. Did you mean `hidden`?",
        ):
            compiled(student, teacher, distillation_loss=kd.Transfer(kd.losses.Hint(), *paths))


@pytest.mark.parametrize(
    "loss",
    [
        kd.losses.SoftTargets(),
        kd.losses.DIST(),
        kd.losses.RKD(),
        kd.losses.CRD(),
        kd.losses.VID(),
        kd.losses.SimKD(),
        kd.losses.FactorTransfer(),
        keras.losses.MeanSquaredError(),
    ],
    ids=lambda loss: loss.name,
)
def test_several_layers_for_a_loss_that_compares_one(loss):
    student, teacher = pair()
    match = f"`{loss.name}` compares one layer with one layer.*one transfer for each pair"
    for listed in ({"teacher": ["hidden", "logits"]}, {"student": ["hidden"]}):
        transfer = kd.Transfer(loss, **{"teacher": "hidden", "student": "hidden", **listed})
        with pytest.raises(ValueError, match=match):
            compiled(student, teacher, distillation_loss=transfer)


def test_hints_of_layers_that_have_no_mean():
    tokens, units = np.zeros((2, 3, 4)), np.zeros((2, 4))
    with pytest.raises(ValueError, match="`hint` takes the mean over layers.*one transfer"):
        kd.losses.Hint()([tokens, units], [tokens, units])
    with pytest.raises(ValueError, match="`hint` compares layer with layer.*2 teacher layers"):
        kd.losses.Hint()([units, units], [units])


def test_two_transfers_of_one_name():
    student, teacher = pair()
    hints = [kd.Transfer(kd.losses.Hint(), "hidden", "hidden", name="hint") for _ in "ab"]
    with pytest.raises(ValueError, match="transfer name `hint` is used twice.*`name=`"):
        compiled(student, teacher, distillation_loss=hints)
    with pytest.raises(ValueError, match="transfer name `loss` is a log of the distiller"):
        compiled(
            student,
            teacher,
            distillation_loss=kd.Transfer(kd.losses.SoftTargets(), name="loss"),
        )


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.KLDivergence(),
        keras.losses.kl_divergence,
        keras.losses.CategoricalCrossentropy(),
        keras.losses.BinaryCrossentropy(),
    ],
)
def test_a_loss_of_probabilities_on_logits(loss):
    student, teacher = pair()
    match = "compares probabilities, and the teacher `teacher` ends in logits.*`keras_kd.losses.Sof"
    with pytest.raises(ValueError, match=match):
        compiled(student, teacher, distillation_loss=loss)
    told = kd.Distiller(student, teacher, from_logits=False)
    told.compile("adam", distillation_loss=loss)


def test_a_loss_of_probabilities_where_there_are_some():
    x, _ = rows()
    teacher = mlp(name="teacher", activation="softmax")
    with pytest.raises(ValueError, match="and the student `student` ends in logits"):
        compiled(mlp(name="student"), teacher, distillation_loss=keras.losses.KLDivergence())
    soft = kd.Transfer(keras.losses.CategoricalCrossentropy(from_logits=True))
    compiled(mlp(name="student"), teacher, distillation_loss=soft)
    student = mlp(name="student", activation="softmax")
    p, q = (np.array(model(x), "float64") for model in (teacher, student))
    divergence = keras.losses.KLDivergence()
    distiller = compiled(student, teacher, loss=None, distillation_loss=divergence)
    logs = distiller.fit(x, batch_size=len(x), verbose=0).history
    expected = (p * np.log(p / q)).sum(-1).mean()
    np.testing.assert_allclose(logs["distillation_loss"][0], expected, rtol=1e-4, atol=1e-6)


def test_a_distillation_loss_that_is_none():
    student, teacher = pair()
    with pytest.raises(TypeError, match=r"`loss` of a transfer.*Received: loss='soft_targets'"):
        compiled(student, teacher, distillation_loss="soft_targets")
    with pytest.raises(ValueError, match="empty"):
        compiled(student, teacher, distillation_loss=[])


def test_unknown_keys_of_outputs():
    inputs = keras.Input((FEATURES,))
    models = [
        keras.Model(inputs, {"color": layers.Dense(3)(inputs), "shape": layers.Dense(4)(inputs)})
        for _ in range(2)
    ]
    with pytest.raises(ValueError, match="unknown key 'colour'.*Did you mean 'color'"):
        kd.Distiller(*models).compile("sgd", distillation_loss={"colour": kd.losses.SoftTargets()})


def test_outputs_that_do_not_match():
    inputs = keras.Input((FEATURES,))
    teacher = keras.Model(inputs, [layers.Dense(3)(inputs), layers.Dense(4)(inputs)])
    with pytest.raises(ValueError, match="student has 1 outputs? and the teacher 2"):
        compiled(mlp(classes=3), teacher)


@pytest.mark.parametrize("kind", ["positions", "rank"])
def test_shapes_that_no_projector_joins(kind):
    inputs = keras.Input((8, 8, 1))

    def model(name, strides):
        x = layers.Conv2D(3, 3, strides=strides, padding="same", name="features")(inputs)
        pooled = layers.GlobalAveragePooling2D(name="pooled")(x)
        return keras.Model(inputs, layers.Dense(CLASSES)(pooled), name=name)

    student, teacher = model("student", 2), model("teacher", 1)
    tap = "features" if kind == "positions" else "pooled"
    transfer = kd.Transfer(kd.losses.Hint(), "features", tap, projector="linear", name="feet")
    distiller = compiled(student, teacher, distillation_loss=transfer)
    x = np.zeros((4, 8, 8, 1), "float32")
    refuses(
        distiller,
        x,
        np.zeros(4, "int32"),
        match="transfer `feet` cannot join the teacher's .* with the student's",
    )


def test_widths_that_differ_without_a_projector():
    student, teacher = pair()
    distiller = compiled(
        student, teacher, distillation_loss=kd.Transfer(kd.losses.Hint(), "hidden", "hidden")
    )
    x, y = rows()
    refuses(distiller, x, y, match='`hint` compares.*projector="linear"')


def test_a_softmax_loss_on_sigmoid_outputs():
    student = mlp(activation="sigmoid", name="student")
    teacher = mlp(activation="sigmoid", name="teacher")
    with pytest.raises(ValueError, match=r"`BinarySoftTargets|keras_kd.losses.BinarySoftTargets"):
        compiled(
            student,
            teacher,
            loss="binary_crossentropy",
            distillation_loss=kd.losses.SoftTargets(),
        )


def test_one_linear_unit_of_unknown_meaning():
    student, teacher = mlp(classes=1, name="student"), mlp(classes=1, name="teacher")
    with pytest.raises(ValueError, match=r"one linear output unit.*LogitMSE.*BinarySoftTargets"):
        compiled(student, teacher, loss="mse")


def test_probabilities_wanted_and_logits_given():
    student, teacher = pair()
    with pytest.warns(UserWarning, match=r"student ends in logits.*`from_logits=True`"):
        compiled(student, teacher, loss="sparse_categorical_crossentropy")


# --------------------------------------------------------------------------- data


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("data", ["arrays", "dict", "validation"])
def test_inputs_that_are_not_finite(value, data):
    student, teacher = pair()
    x, y = rows()
    bad = x.copy()
    bad[7, 2] = value
    match = "holds NaN or infinite values in 1 of 12 rows, the first is row 7"
    if data == "dict":
        distiller = kd.Distiller(
            student, teacher, teacher_inputs=lambda x: x["a"], student_inputs=lambda x: x["a"]
        )
        distiller.compile("sgd", loss=crossentropy())
        refuses(distiller, {"a": bad}, y, match=match)
    elif data == "validation":
        refuses(compiled(student, teacher), x, y, match=match, validation_data=(bad, y))
    else:
        refuses(compiled(student, teacher), bad, y, match=match)


def test_weights_that_are_not_finite():
    student, teacher = pair()
    x, y = rows()
    weight = np.ones(len(x))
    weight[3] = math.nan
    refuses(
        compiled(student, teacher), x, y, match="`sample_weight` holds NaN", sample_weight=weight
    )


@pytest.mark.parametrize("data", ["arrays", "dataset", "validation"])
@pytest.mark.parametrize("width", [3, CLASSES])
def test_weights_of_another_shape_than_what_they_weigh(data, width):
    student, teacher = pair()
    x, y = rows()
    weight = np.ones((len(x), width), "float32")
    match = rf"has the shape \(\w+, {width}\), and the student `student` returns \(None, {CLASSES}"
    if data == "arrays":
        refuses(compiled(student, teacher), x, y, match=match, sample_weight=weight)
    elif data == "dataset":
        given = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(4)
        refuses(compiled(student, teacher), given, match=match)
    else:
        given = (x, y, weight)
        refuses(compiled(student, teacher), x, y, match=match, validation_data=given)


@pytest.mark.parametrize("low", [True, False])
def test_labels_out_of_range(low):
    student, teacher = pair()
    x, y = rows()
    y[0], y[1], y[2] = 0, CLASSES - 1, -1 if low else CLASSES
    span = "from -1 to 3" if low else "from 0 to 4"
    refuses(
        compiled(student, teacher),
        x,
        y,
        match=f"Labels run {span}, and the student has 4 classes, numbered 0 to 3",
    )


def test_labels_that_are_ignored_may_be_out_of_range():
    student, teacher = pair()
    x, y = rows()
    y[0] = -1
    distiller = compiled(student, teacher, loss=crossentropy(ignore_class=-1))
    assert np.isfinite(distiller.fit(x, y, verbose=0).history["loss"]).all()


@pytest.mark.parametrize("data", ["array", "dataset"])
@pytest.mark.parametrize("loss", ["instance", "string"])
def test_float_labels_for_a_sparse_loss(data, loss):
    student = mlp(activation="softmax" if loss == "string" else None, name="student")
    losses = {"instance": crossentropy(), "string": "sparse_categorical_crossentropy"}
    distiller = compiled(student, mlp(name="teacher"), loss=losses[loss])
    x, y = rows()
    given = (x, y.astype("float32"))
    if data == "dataset":
        given = (tf.data.Dataset.from_tensor_slices(given).batch(4),)
    refuses(distiller, *given, match="reads integer labels, and `y` is float32.*astype")


def test_one_hot_labels_for_a_sparse_loss():
    student, teacher = pair()
    x, y = rows()
    refuses(
        compiled(student, teacher),
        x,
        np.eye(CLASSES, dtype="int32")[y],
        match=r"one label a sample.*\(12, 4\).*CategoricalCrossentropy",
    )


@pytest.mark.parametrize("epochs", [1, 2])
def test_lengths_that_differ(epochs):
    """From the second epoch on the teacher's answers are kept, and rows are picked by number."""
    distiller = compiled(*pair())
    x, y = rows()
    many, weights = np.concatenate([y, y]), np.ones(5, "float32")
    counted = kd.teachers.Numbered(x, np.arange(7))
    for data, options, told in (
        ((x, y[:-1]), {}, "x 12, y 11"),
        ((x, many), {}, "x 12, y 24"),
        ((x, y), {"sample_weight": weights}, "x 12, y 12, sample_weight 5"),
        ((counted, y), {}, "x 12, y 12, indices 7"),
    ):
        match = f"The arrays have different numbers of rows: {told}"
        refuses(distiller, *data, match=match, epochs=epochs, **options)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="AutoGraph is TensorFlow's")
def test_no_function_is_written_anew_by_autograph(tmp_path, monkeypatch):
    """It leaves a file for each, which a program that is killed does not clear."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, y = rows()
    compiled(*pair()).fit(x, y, epochs=2, verbose=0)
    kd.cache.write(pair()[1], x, tmp_path / "cache")
    assert not list(tmp_path.glob("__autograph*"))


@pytest.mark.parametrize("data", ["arrays", "dataset", "filtered", "generator", "pydataset"])
def test_empty_data(data):
    student, teacher = pair()
    x, y = rows(0)

    class Nothing(keras.utils.PyDataset):
        def __len__(self):
            return 0

        def __getitem__(self, index):
            raise IndexError

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    full = tf.data.Dataset.from_tensor_slices(rows(4)).batch(2)
    given = {
        "arrays": (x, y),
        "dataset": (dataset,),
        "filtered": (full.filter(lambda x, y: tf.reduce_sum(x) > 1e9),),
        "generator": ((_ for _ in ()),),
        "pydataset": (Nothing(),),
    }[data]
    refuses(compiled(student, teacher), *given, match="training data are empty")


@pytest.mark.parametrize("data", ["arrays", "dataset"])
def test_missing_labels(data):
    student, teacher = pair()
    x, _ = rows()
    given = x if data == "arrays" else tf.data.Dataset.from_tensor_slices(x).batch(4)
    refuses(compiled(student, teacher), given, match="no labels.*`loss=None`")


def test_inputs_of_another_shape():
    student, teacher = pair()
    _, y = rows()
    refuses(compiled(student, teacher), np.zeros((12, 9), "float32"), y, match="shape")


def test_fit_before_compile():
    x, y = rows()
    with pytest.raises(ValueError, match="compile"):
        kd.Distiller(*pair()).fit(x, y, verbose=0)


# ---------------------------------------------------------------- in mid-training


@keras.saving.register_keras_serializable(package="tests")
class FailsOn(layers.Layer):
    """Turns NaN where a sample's first feature is large."""

    def call(self, x):
        bad = ops.greater(x[:, :1], 50.0)
        return ops.where(bad, ops.full_like(x, float("nan")), x)


def fragile(name, value=None):
    inputs = keras.Input((FEATURES,))
    x = FailsOn()(inputs)
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Dense(7, name="hidden")(x)), name=name)


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"jit_compile": True}])
@pytest.mark.parametrize("taps", [False, True])
def test_a_teacher_that_fails_in_mid_training(tmp_path, how, taps):
    x, y = rows(16)
    student, teacher = mlp(name="student"), fragile("teacher")
    hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.Adam(0.01),
        loss=crossentropy(),
        distillation_loss=hint if taps else None,
        **how,
    )
    checkpoint = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "student.weights.h5"), save_weights_only=True
    )
    distiller.fit(x, y, batch_size=4, callbacks=[checkpoint], verbose=0)
    good = [np.array(w) for w in student.weights]
    kept = (tmp_path / "student.weights.h5").read_bytes()
    x[9, 0] = 100.0  # the third batch
    with pytest.raises(
        FloatingPointError, match="teacher `teacher` are NaN or infinite in batch 3 of epoch 2"
    ):
        distiller.fit(
            x,
            y,
            batch_size=4,
            epochs=3,
            initial_epoch=1,
            shuffle=False,
            callbacks=[checkpoint],
            verbose=0,
        )
    assert all(np.isfinite(w).all() for w in student.get_weights())
    assert any((a != b).any() for a, b in zip(good, student.get_weights()))
    assert (tmp_path / "student.weights.h5").read_bytes() == kept


def test_the_batch_is_named_as_well_as_it_is_known():
    x, y = rows(16)
    distiller = compiled(mlp(name="student"), fragile("teacher"), steps_per_execution=2)
    x[9, 0] = 100.0
    with pytest.raises(FloatingPointError, match="in one of the batches 3 to 4 of epoch 1"):
        distiller.fit(x, y, batch_size=4, shuffle=False, verbose=0)


def test_a_batch_that_fails_changes_no_weight():
    x, y = rows(4)
    student, teacher = mlp(name="student"), fragile("teacher")
    distiller = compiled(student, teacher)
    distiller.train_on_batch(x, y)
    before = student.get_weights()
    x[0, 0] = 100.0
    with pytest.raises(FloatingPointError, match="teacher `teacher` are NaN or infinite"):
        distiller.train_on_batch(x, y)
    for a, b in zip(before, student.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("numbers", "finite"),
    [([math.inf, -math.inf], False), ([math.nan, 1.0], False), ([6e4, 6e4], True)],
)
def test_what_counts_as_finite(numbers, finite, dtype):
    tensors = [ops.ones((2,)), ops.cast(np.array(numbers), dtype)]
    assert bool(batch.all_finite(tensors)) is finite


def test_a_teacher_whose_weights_are_nan_is_refused_at_once():
    student, teacher = pair()
    teacher.layers[-1].kernel.assign(np.full((9, CLASSES), np.nan))
    x, y = rows()
    with pytest.raises(
        ValueError, match="teacher `teacher` are NaN or infinite on the first rows.*weights"
    ):
        compiled(student, teacher).fit(x, y, verbose=0)


def test_a_student_that_diverges_is_not_blamed_on_the_teacher():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(1e38), loss=crossentropy())
    x, y = rows()
    history = distiller.fit(x, y, batch_size=4, epochs=3, verbose=0).history
    assert not np.isfinite(history["loss"][-1])
