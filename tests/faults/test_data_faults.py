"""Data and arguments that cannot work are refused before the first step, whatever holds them."""

import copy
import math
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from small_models import CLASSES, crossentropy, mlp, pair, rows

import keras_kd as kd
from keras_kd.distill import data_checks, label_checks


class Steps(keras.callbacks.Callback):
    """Counts the steps that were taken."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def on_train_batch_end(self, batch, logs=None):
        self.count += 1


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.fixture
def compiled(models):
    def make(student=None, teacher=None, **options):
        distiller = kd.Distiller(student or models[0], teacher or models[1])
        options = {"loss": crossentropy(), "run_eagerly": True, **options}
        distiller.compile(keras.optimizers.SGD(0.1), **options)
        return distiller

    return make


def refuses(distiller, *data, match, error=ValueError, steps=0, **options):
    """`fit` raises after no more than so many steps, and the student is as it was."""
    before, counted = distiller.student.get_weights(), Steps()
    with pytest.raises(error, match=match) as caught:
        distiller.fit(
            *data, verbose=0, callbacks=[counted], batch_size=options.pop("batch", None), **options
        )
    assert counted.count <= steps
    assert "\n" not in str(caught.value)
    if not steps:
        for a, b in zip(before, distiller.student.get_weights()):
            np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------- kinds of values


def odd_inputs(x):
    ragged = np.empty(len(x), object)
    for i in range(len(x)):
        ragged[i] = x[i, : 2 + i % 3]
    return {
        "text": (x.astype(str), "holds text"),
        "bytes": (x.astype("S8"), "holds text"),
        "objects": (x.astype(object), "holds Python objects"),
        "ragged": (ragged, "holds Python objects"),
        "dates": (x.astype("datetime64[s]"), "holds dates"),
        "complex": (x.astype("complex64"), "holds complex numbers"),
    }


@pytest.mark.parametrize("kind", list(odd_inputs(rows()[0])))
@pytest.mark.parametrize("where", ["training", "validation"])
def test_inputs_that_are_no_numbers(compiled, kind, where):
    x, y = rows()
    bad, reason = odd_inputs(x)[kind]
    if where == "training":
        refuses(compiled(), bad, y, match=f"^`x` {reason}")
    else:
        match = f"^The `x` of `validation_data` {reason}"
        refuses(compiled(), x, y, match=match, validation_data=(bad, y))


def odd_labels(y):
    return {
        "text": np.array(["cat", "dog", "cow"])[y % 3],
        "bytes": np.array([b"a", b"b", b"c"])[y % 3],
        "objects": y.astype(object),
        "dates": y.astype("timedelta64[s]"),
    }


@pytest.mark.parametrize("kind", list(odd_labels(rows()[1])))
@pytest.mark.parametrize("where", ["training", "validation", "dataset"])
def test_labels_that_are_no_numbers(compiled, kind, where):
    x, y = rows()
    bad = odd_labels(y)[kind]
    if where == "training":
        refuses(compiled(), x, bad, match="^`y` holds .*labels are numbers.*numpy.unique")
    elif where == "validation":
        match = "^`y` of `validation_data` holds .*labels are numbers"
        refuses(compiled(), x, y, match=match, validation_data=(x, bad))
    elif kind in ("text", "bytes"):
        data = tf.data.Dataset.from_tensor_slices((x, bad)).batch(4)
        refuses(compiled(), data, match="^`y` holds text, and labels are numbers")


def test_text_goes_to_a_student_that_reads_text():
    text = np.array(["a b", "b c", "c a", "b b"])

    def reader(name):
        inputs = keras.Input((), dtype="string")
        tokens = layers.TextVectorization(output_sequence_length=2, vocabulary=["a", "b", "c"])(
            inputs
        )
        x = layers.Flatten()(layers.Embedding(8, 2)(tokens))
        return keras.Model(inputs, layers.Dense(CLASSES)(x), name=name)

    distiller = kd.Distiller(reader("student"), reader("teacher"))
    distiller.compile("sgd", loss=crossentropy())
    setup = distiller._pairing
    data_checks.data(setup, tf.constant(text), np.array([0, 1, 2, 3]), {}, distiller.loss)


# ------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("label", "dtype"),
    [
        (CLASSES, "int32"),
        (2**32 + 1, "int64"),
        (2**64 - 1, "uint64"),
        (2**63, "uint64"),
        (-1, "int8"),
        (-(2**32), "int64"),
    ],
)
@pytest.mark.parametrize("data", ["arrays", "validation", "dataset", "pydataset", "generator"])
def test_labels_out_of_range(compiled, label, dtype, data):
    x, y = rows()
    bad = y.astype(dtype)
    bad[9] = np.array(label, dtype)
    batches = [(x[i : i + 4], bad[i : i + 4]) for i in range(0, 12, 4)]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return batches[index]

    if data == "arrays":
        refuses(compiled(), x, bad, match="Labels run from|holds labels from")
        return
    if data == "validation":
        match = "Labels run from|holds labels from"
        refuses(compiled(), x, y, match=match, validation_data=(x, bad))
        return
    given = {
        "dataset": tf.data.Dataset.from_tensor_slices((x, bad)).batch(4),
        "pydataset": Batches(),
        "generator": (batch for batch in batches),
    }[data]
    match = r"^The data yield labels from -?\d+ to -?\d+, and there are 4 classes, numbered from 0"
    # They are in the third batch.
    refuses(compiled(), given, match=match, steps=2)


@pytest.mark.parametrize("kind", ["known", "half read", "half compiled", "generator"])
def test_a_dataset_that_was_read_to_its_end_is_not_watched_again(compiled, kind, monkeypatch):
    """Each map that watches costs 25 ms a fit; labels that change are still compared."""
    x, y = rows()
    passes = [0]

    def batches():
        passes[0] += 1
        labels = np.where(np.arange(12) == 9, CLASSES, y) if passes[0] > 2 else y
        yield from ((x[i : i + 4], labels[i : i + 4]) for i in range(0, 12, 4))

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    if kind == "generator":
        signature = (tf.TensorSpec((4, x.shape[1])), tf.TensorSpec((4,), tf.int64))
        data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    watched = []
    monkeypatch.setattr(label_checks, "_mapped", lambda data, watch: watched.append(1) or data)
    distiller = compiled()
    distiller.fit(data, verbose=0, steps_per_epoch=2 if kind == "half read" else None)
    if kind == "half compiled":
        distiller.compile("sgd", loss=crossentropy(ignore_class=0), run_eagerly=True)
    distiller.fit(data, verbose=0)
    assert len(watched) == (1 if kind == "known" else 2)
    monkeypatch.undo()
    if kind == "generator":
        passes[0] = 2
        refuses(distiller, data, match="^The data yield labels from .* to 4, and", steps=2)


@pytest.mark.parametrize(
    ("labels", "found"),
    [([255, 1, 3, 255], None), ([255, 255], None), ([], None), ([255, 4, 1], "from 1 to 255")],
)
def test_the_watch_of_a_dataset_leaves_out_what_the_loss_ignores(labels, found):
    expected = [label_checks.Expected(crossentropy(ignore_class=255), (None, CLASSES), None, "s")]
    data = tf.data.Dataset.from_tensors((np.zeros((len(labels), 6)), np.array(labels, "uint8")))
    read = label_checks.watched(expected, data, None)
    if found is None:
        np.testing.assert_array_equal(next(iter(read))[1], labels)
        return
    match = f"^The data yield labels {found}"
    with pytest.raises(ValueError, match=match), label_checks.explaining():
        next(iter(read))


@pytest.mark.parametrize("label", [CLASSES, 2**32 + 1, -1])
def test_labels_out_of_range_in_validation_and_evaluation(compiled, label):
    x, y = rows()
    bad = y.astype("int64")
    bad[9] = label
    held = tf.data.Dataset.from_tensor_slices((x, bad)).batch(4)
    match = "^The data yield labels from .* and there are 4 classes"
    distiller = compiled(student=mlp(name="student"))
    with pytest.raises(ValueError, match=match):
        distiller.fit(x, y, validation_data=held, verbose=0)
    with pytest.raises(ValueError, match=match):
        distiller.evaluate(held, verbose=0)
    with pytest.raises(ValueError, match="Labels run from|holds labels from"):
        distiller.evaluate(x, bad, verbose=0)
    with pytest.raises(ValueError, match="holds text"):
        distiller.evaluate(x.astype(str), y, verbose=0)
    with pytest.raises(ValueError, match="has the shape"):
        distiller.evaluate(x[:, :3], y, verbose=0)


@pytest.mark.parametrize("data", ["dataset", "pydataset", "generator"])
def test_labels_that_are_classes_or_ignored_pass(compiled, data):
    x, y = rows()
    y[3] = -1
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return batches[index]

    given = {
        "dataset": tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
        "pydataset": Batches(),
        "generator": (batch for batch in batches),
    }[data]
    distiller = compiled(student=mlp(name="student"), loss=crossentropy(ignore_class=-1))
    history = distiller.fit(given, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_one_hot_labels_of_integers_are_not_taken_for_numbers(compiled):
    x, y = rows()
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    transfer = kd.losses.DecoupledKD()
    distiller = compiled(student=mlp(name="student"), loss=loss, distillation_loss=transfer)
    given = tf.data.Dataset.from_tensor_slices((x, np.eye(CLASSES, dtype="int64")[y])).batch(4)
    assert np.isfinite(distiller.fit(given, verbose=0).history["loss"]).all()


@pytest.mark.parametrize("label", [CLASSES, 2**32 + 1, -2, 1.5])
def test_labels_that_only_a_distillation_loss_reads(compiled, label):
    x, y = rows()
    bad = y.astype("float64" if isinstance(label, float) else "int64")
    bad[5] = label
    distiller = compiled(loss="mse", distillation_loss=kd.losses.DecoupledKD())
    match = "`y` (holds fractions|runs from).*`decoupled_kd` reads them as class numbers"
    refuses(distiller, x, bad, match=match)


def test_targets_of_another_width(compiled):
    x, y = rows()
    for loss in ("mse", keras.losses.CategoricalCrossentropy(from_logits=True)):
        # Of a regression the distillation loss is named.
        options = {"loss": loss, "distillation_loss": kd.losses.LogitMSE()}
        wide = np.eye(CLASSES + 1, dtype="float32")[y]
        match = r"y`.* has the shape \(12, 5\), and the student `student` returns \(None, 4\)"
        refuses(compiled(**options), x, wide, match=match)
        right = np.eye(CLASSES, dtype="float32")[y]
        refuses(compiled(**options), x, right, match=match, validation_data=(x, wide))


# ------------------------------------------------------------------- validation


class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.last = layers.Dense(CLASSES)

    def call(self, x):
        return self.last(x)


def validation(kind, x, y):
    return {
        "width": ((x[:, :5], y), "validation_data.* has the shape|cannot read `validation_data`"),
        "rank": ((x[:, :3, None], y), ""),
        "dataset": (
            tf.data.Dataset.from_tensor_slices((x[:, :5], y)).batch(4),
            "The `x` of `validation_data` has the shape",
        ),
        "lengths": ((x, y[:7]), "`validation_data` have different numbers of rows: x 12, y 7"),
        "weights": ((x, y, np.ones(5)), "different numbers of rows: x 12, y 12, sample_weight 5"),
        "nan weights": (
            (x, y, np.full(12, np.nan)),
            "`sample_weight` of `validation_data` is NaN or infinite in 12",
        ),
        "four": ((x, y, y, y), "Received: 4 values"),
        "nothing": ((), "Received: 0 values"),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["width", "dataset", "lengths", "weights", "nan weights", "four", "nothing"]
)
def test_validation_data_that_no_epoch_could_use(compiled, kind):
    x, y = rows()
    given, reason = validation(kind, x, y)
    refuses(compiled(), x, y, match=reason, validation_data=given)


def test_validation_data_of_no_kind(compiled):
    x, y = rows()
    refuses(compiled(), x, y, match="`validation_data` is", error=TypeError, validation_data=7)


@pytest.mark.parametrize("kind", ["width", "rank"])
def test_validation_data_of_another_form_for_students_without_a_graph(compiled, kind):
    x, y = rows()
    student = Subclassed(name="student")
    student(x)
    given, _ = validation(kind, x, y)
    if kind == "rank":
        given = (x[:, :3, None], y)
    match = "The student `student` cannot read `validation_data` of shape"
    refuses(compiled(student=student), x, y, match=match, validation_data=given)


def test_validation_data_of_another_form_for_mapped_inputs(models):
    x, y = rows()
    distiller = kd.Distiller(
        *models, student_inputs=lambda x: x["a"], teacher_inputs=lambda x: x["a"]
    )
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    match = "cannot read `validation_data`"
    refuses(distiller, {"a": x}, y, match=match, validation_data=({"a": x[:, :4]}, y))
    refuses(distiller, {"a": x}, y, match=match, validation_data=({"b": x}, y))


def test_sequences_may_have_other_lengths_in_validation():
    def model(name, width):
        inputs = keras.Input((None, 3))
        return keras.Model(inputs, layers.Dense(CLASSES)(layers.Dense(width)(inputs)), name=name)

    distiller = kd.Distiller(model("student", 2), model("teacher", 4))
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 5, 3)).astype("float32"), rng.integers(0, CLASSES, (4, 5))
    held = (x[:, :2], y[:, :2])
    assert "val_loss" in distiller.fit(x, y, validation_data=held, verbose=0).history


# ------------------------------------------------------------------- weights of classes


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({0: math.nan}, "finite and not negative. Received: nan for class 0"),
        ({0: 1.0, 2: math.inf}, "Received: inf for class 2"),
        ({1: -0.5}, "Received: -0.5 for class 1"),
        ({1: "2"}, "Received: '2' for class 1"),
        ({1: None}, "Received: None for class 1"),
        ({4: 1.0}, "the key 4, which is no class of 0 to 3"),
        ({-1: 1.0}, "the key -1, which is no class of 0 to 3"),
        ({"1": 1.0}, "the key '1', which is no class"),
        ({1.0: 1.0}, "the key 1.0, which is no class"),
        ({True: 1.0}, "the key True, which is no class"),
        ({0: 0.0, 1: 0.0}, "no weight that is more than 0"),
    ],
)
def test_weights_of_classes(compiled, weights, reason):
    x, y = rows()
    refuses(compiled(), x, y, match=f"`class_weight` is a dict.*{reason}", class_weight=weights)


def test_weights_of_classes_of_another_type(compiled):
    x, y = rows()
    for weights in ([1.0, 2.0], "balanced", np.ones(4)):
        refuses(
            compiled(),
            x,
            y,
            match="`class_weight` is a dict",
            error=TypeError,
            class_weight=weights,
        )


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (crossentropy(), (6, 5)),
        (crossentropy(), (6, 5, 1)),
        (keras.losses.CategoricalCrossentropy(from_logits=True), (6, 5, 4)),
        ("binary_crossentropy", (6, 4)),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_weights_of_classes_where_samples_have_several(loss, labels, piped):
    """Keras takes the place of the greatest label of a row for its class."""
    steps = labels[1:2] if len(labels) == 3 or labels == (6, 5) else ()
    inputs = keras.Input((*steps, 3))
    student, teacher = (keras.Model(inputs, keras.layers.Dense(4)(inputs)) for _ in range(2))
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss)
    x, y = np.zeros((6, *steps, 3), "float32"), np.zeros(labels, "int32")
    data = (x, y)
    if piped:
        tf = pytest.importorskip("tensorflow")
        data = (tf.data.Dataset.from_tensor_slices(data).batch(3),)
    with pytest.raises(ValueError, match="`class_weight` gives a weight to each sample"):
        distiller.fit(*data, class_weight={0: 2.0}, verbose=0)


def test_weights_of_classes_that_are_right(compiled):
    x, y = rows()
    weights = {np.int64(0): np.float32(2.0), 1: 1, 3: 0}
    distiller = compiled(student=mlp(name="student"))
    assert np.isfinite(distiller.fit(x, y, class_weight=weights, verbose=0).history["loss"]).all()


# ------------------------------------------------------------------- arguments


@pytest.mark.parametrize("value", ["yes", 1, 0.0, [True], {"teacher": "no"}, {"student": 1}])
def test_from_logits_of_another_type(models, value):
    with pytest.raises(TypeError, match="`from_logits` is True, False, or None"):
        kd.Distiller(*models, from_logits=value)
    if not isinstance(value, dict):
        with pytest.raises(TypeError, match="`from_logits` is True, False, or None"):
            kd.cache.write(models[1], rows()[0], "never-made", from_logits=value)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_logits_that_are_said_to_be_probabilities(models, side):
    x, y = rows()
    match = (
        f"The outputs of the {side} `{side}`: `from_logits=False` says that these are prob.* and "
    )
    distiller = kd.Distiller(*models, from_logits={side: False})
    with pytest.raises(ValueError, match=match + "the last layer makes any number"):
        distiller.compile("sgd", loss=crossentropy())
    # Where layers do not tell, the first rows do.
    hidden = [
        keras.Sequential([m, layers.Lambda(lambda z: 3 * z + 1)], name=m.name) for m in models
    ]
    distiller = kd.Distiller(*hidden, from_logits={"teacher": True, "student": True, side: False})
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    refuses(distiller, x, y, match=match + r"the values run from -?\d.* to \d")


def test_input_functions_that_are_none(models, tmp_path):
    for name in ("teacher_inputs", "student_inputs"):
        for value in ("x", 3, {"a": 1}):
            with pytest.raises(TypeError, match=f"`{name}` is a function from one batch"):
                kd.Distiller(*models, **{name: value})
            with pytest.raises(TypeError, match=f"`{name}` is a function from one batch"):
                kd.load_distiller(tmp_path / "none.keras", **{name: value})
    with pytest.raises(TypeError, match="`teacher_inputs` is a function"):
        kd.cache.write(models[1], rows()[0], tmp_path / "never-made", teacher_inputs="x")
    assert not (tmp_path / "never-made").exists()


@pytest.mark.parametrize("made", [None, [], {"a": None}])
@pytest.mark.parametrize("name", ["teacher_inputs", "student_inputs"])
def test_input_functions_that_give_nothing(models, made, name):
    x, y = rows()
    distiller = kd.Distiller(*models, **{name: lambda x: made})
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    refuses(distiller, x, y, match=f"`{name}` gave .* for a batch")


# ------------------------------------------------------------------- copies


def test_copies_never_lose_the_teacher(compiled, models, tmp_path):
    distiller = compiled()
    for make in (copy.deepcopy, copy.copy, pickle.dumps, lambda d: copy.deepcopy({"a": [d]})):
        with pytest.raises(TypeError, match="cannot be copied or pickled.*load_distiller"):
            make(distiller)
    assert distiller.teacher is models[1]
    # What is made again of a configuration does not train without a word on the labels alone.
    again = kd.Distiller.from_config(distiller.get_config())
    with pytest.raises(ValueError, match="trained with the teacher `teacher` and was made again"):
        again.compile("sgd", loss=crossentropy())
    alone = kd.Distiller(mlp(name="student"))
    alone.compile("sgd", loss=crossentropy())
    alone.build((None, 6))
    twin = copy.deepcopy(alone)
    for a, b in zip(alone.student.get_weights(), twin.student.get_weights()):
        np.testing.assert_array_equal(a, b)
