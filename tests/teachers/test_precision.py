"""The teacher as a folded copy in lower precision: only where it agrees, never in the original."""

import warnings

import keras
import numpy as np
import pytest

import keras_kd as kd
from keras_kd.teachers import precision


def convnet(name, width=4):
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(width, 3, use_bias=False, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="top")(x), name=name)


@pytest.fixture
def teacher():
    keras.utils.set_random_seed(0)
    model = convnet("teacher", 8)
    norm = model.get_layer("norm")
    generator = np.random.default_rng(0)
    norm.set_weights([generator.uniform(0.5, 2.0, 8).astype("float32") for _ in range(4)])
    return model


@pytest.fixture
def data():
    generator = np.random.default_rng(1)
    return generator.normal(size=(16, 6, 6, 1)).astype("float32"), generator.integers(0, 3, 16)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def rounded(values, dtype):
    """Nearest bfloat16 or float16, back in float32."""
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    return np.asarray(values, "float32").astype(kind).astype("float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_copy_holds_folded_weights_of_that_precision(teacher, dtype):
    copy = precision.inference_copy(teacher, dtype)
    kernel = teacher.get_layer("conv").get_weights()[0]
    gamma, beta, mean, variance = teacher.get_layer("norm").get_weights()
    scale = gamma / np.sqrt(variance + teacher.get_layer("norm").epsilon)
    got_kernel, got_bias = (np.asarray(w, "float32") for w in copy.get_layer("conv").get_weights())
    np.testing.assert_allclose(got_kernel, rounded(kernel * scale, dtype), rtol=1e-2)
    np.testing.assert_allclose(got_bias, rounded(beta - mean * scale, dtype), rtol=1e-2, atol=1e-3)
    assert {w.dtype for w in copy.weights} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_student_learns_from_the_copy_and_the_teacher_stays(teacher, data, dtype):
    x, y = data
    before = teacher.get_weights()
    student = convnet("student")
    distiller = kd.Distiller(student, teacher, teacher_precision=dtype)
    distiller.compile(keras.optimizers.SGD(0.0), LOSS, distillation_loss=kd.losses.LogitMSE())
    z = student(x, training=True)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    copied = np.asarray(precision.inference_copy(teacher, dtype)(x), "float32")
    np.testing.assert_allclose(logs["logit_mse"], np.mean((copied - np.array(z)) ** 2), rtol=1e-2)
    assert distiller.teacher is teacher
    assert {w.dtype for w in teacher.weights} == {"float32"}
    for a, b in zip(before, teacher.get_weights()):
        np.testing.assert_array_equal(a, b)
    history = distiller.fit(x, y, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def timing(given, float32, bfloat16, float16, seen=None):
    """Instead of a clock: milliseconds of the model and of its copies, by their precision."""
    times = {"float32": float32, "bfloat16": bfloat16, "float16": float16}

    def milliseconds(models, x):
        if seen is not None:
            seen.append((len(x), [copy.layers[-1].compute_dtype for copy in models[1:]]))
        return [given, *(times[copy.layers[-1].compute_dtype] for copy in models[1:])]

    return milliseconds


def chosen(monkeypatch, teacher, data, times, seen=None):
    monkeypatch.setattr(precision, "milliseconds", timing(*times, seen=seen))
    distiller = kd.Distiller(convnet("student"), teacher, teacher_precision="auto")
    distiller.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match="The teacher `teacher` runs") as said:
        distiller.fit(*data, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        distiller.fit(*data, verbose=0)
    ours = [str(w.message) for w in said if "The teacher `teacher`" in str(w.message)]
    assert len(ours) == 1
    return ours[0]


def test_auto_takes_the_fastest_that_agrees(monkeypatch, teacher, data):
    teacher.get_layer("top").set_weights(
        [np.eye(8, 3, dtype="float32") * 4, np.array([0.0, 1.0, 2.0], "float32")]
    )
    assert "folded, in float16: 1 ms" in chosen(monkeypatch, teacher, data, [4.0, 3.0, 5.0, 1.0])


def test_a_copy_of_twice_the_time_is_timed_once(monkeypatch):
    clock = [0.0]

    class Takes:
        def __init__(self, seconds):
            self.seconds, self.calls = seconds, 0

        def predict_on_batch(self, x):
            clock[0] += self.seconds
            self.calls += 1

    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    models = [Takes(0.01), Takes(0.019), Takes(0.1)]
    assert precision.milliseconds(models, None) == pytest.approx([10.0, 19.0, 100.0])
    # One call of each compiles it.
    assert [model.calls for model in models] == [4, 4, 2]


def test_auto_looks_no_further_than_a_copy_that_is_fast_and_agrees(monkeypatch, teacher, data):
    teacher.get_layer("top").set_weights(
        [np.eye(8, 3, dtype="float32") * 4, np.array([0.0, 1.0, 2.0], "float32")]
    )
    seen = []
    said = chosen(monkeypatch, teacher, data, [4.0, 1.0, 2.0, 1.0], seen)
    assert "folded, in bfloat16: 2 ms" in said
    assert [kinds for _, kinds in seen] == [["bfloat16"]]
    # Not fast enough to leave it at that.
    said = chosen(monkeypatch, teacher, data, [4.0, 2.9, 3.0, 3.5], seen)
    assert "folded, in float32: 2.9 ms for 16 rows, 4 ms as it was given" in said
    assert [kinds for _, kinds in seen[1:]] == [["bfloat16"], ["float32", "float16"]]


def test_auto_keeps_the_teacher_where_nothing_is_faster(monkeypatch, teacher, data):
    assert "as it was given: 1 ms" in chosen(monkeypatch, teacher, data, [1.0, 2.0, 2.0, 2.0])


def test_auto_refuses_a_fast_copy_that_disagrees(monkeypatch, teacher, data):
    """Logits beyond float16 become infinite there."""
    kernel, bias = teacher.get_layer("top").get_weights()
    teacher.get_layer("top").set_weights([kernel * 1e6, bias])
    assert "folded, in float32: 2 ms" in chosen(monkeypatch, teacher, data, [4.0, 2.0, 3.0, 1.0])


def test_agreement_is_top_1_and_kl():
    z = np.array([[2.0, 0.0], [0.0, 3.0]])
    assert precision.agrees([z], [z + 1e-3])
    assert not precision.agrees([z], [z[:, ::-1]])
    assert not precision.agrees([z], [z * 2])
    assert not precision.agrees([z], [z * np.nan])
    one = np.array([[2.0], [-1.0]])
    assert precision.agrees([one], [one])
    assert not precision.agrees([one], [-one])


def test_inner_layers_are_read_from_the_teacher_as_given(teacher, data):
    x, _ = data
    student = convnet("student", 8)
    hint = kd.Transfer(kd.losses.Hint(), teacher="conv", student="conv")
    distiller = kd.Distiller(student, teacher, teacher_precision="bfloat16")
    distiller.compile(keras.optimizers.SGD(0.0), distillation_loss=hint)
    logs = distiller.train_on_batch(x, return_dict=True)
    a, b = (np.array(model.get_layer("conv")(x)) for model in (teacher, student))
    np.testing.assert_allclose(logs["hint"], np.mean((a - b) ** 2), rtol=1e-5)


def test_ensembles_run_as_copies_too(teacher, data):
    distiller = kd.Distiller(
        convnet("student"), [teacher, convnet("other")], teacher_precision="bfloat16"
    )
    distiller.compile("sgd", LOSS)
    assert np.isfinite(distiller.fit(*data, verbose=0).history["loss"]).all()


def test_bad_arguments(teacher):
    with pytest.raises(ValueError, match="Did you mean 'bfloat16'"):
        kd.Distiller(convnet("student"), teacher, teacher_precision="bfloat")

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__(name="hidden")
            self.top = keras.layers.Dense(3)

        def call(self, x):
            return self.top(x)

    model = Subclassed()
    model(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="`hidden` is a subclassed model"):
        kd.Distiller(convnet("student"), model, teacher_precision="float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cache_in_lower_precision(teacher, data, tmp_path, dtype):
    x, _ = data
    kd.cache.write(teacher, x, tmp_path, dtype="float32", teacher_precision=dtype)
    stored = kd.teachers.CachedTeacher(tmp_path).caches[0].read(np.arange(len(x)))["logits_0"]
    copy = precision.inference_copy(teacher, dtype)
    expected = np.asarray(keras.ops.cast(copy(x), "float32"))
    step = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    np.testing.assert_allclose(stored, expected, rtol=2 * step, atol=2 * step)
    assert np.abs(stored - np.asarray(teacher(x))).max() > 0


def test_a_cache_is_not_continued_in_another_precision(teacher, data, tmp_path):
    x, _ = data
    kd.cache.write(teacher, x, tmp_path, teacher_precision="float16")
    with pytest.raises(ValueError, match="another precision: float16 there, float32 now"):
        kd.cache.write(teacher, x, tmp_path)


def test_a_cached_teacher_knows_its_model_whatever_the_precision(teacher, data, tmp_path):
    x, _ = data
    kd.cache.write(teacher, x, tmp_path, teacher_precision="bfloat16")
    kd.cache.verify(tmp_path, teacher=teacher, data=x)


def test_a_cache_chooses_its_precision_once_and_says_so(teacher, data, tmp_path, monkeypatch):
    x, _ = data
    monkeypatch.setattr(precision, "milliseconds", timing(9.0, 5.0, 8.0, 8.0))
    with pytest.warns(UserWarning, match="runs folded, in float32: 5 ms"):
        manifest = kd.cache.write(teacher, x, tmp_path, teacher_precision="auto")
    assert manifest.teacher["precision"] == "auto"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("mixed_bfloat16", "float32"), ("float32", "mixed_bfloat16"), ("mixed_float16", "float32")],
)
def test_teacher_and_student_in_precisions_of_their_own(data, theirs, ours):
    def mlp(name, width, dtype):
        inputs = keras.Input((6, 6, 1))
        x = keras.layers.Flatten()(inputs)
        x = keras.layers.Dense(width, activation="relu", dtype=dtype)(x)
        return keras.Model(inputs, keras.layers.Dense(3, dtype=dtype)(x), name=name)

    x, y = data
    keras.utils.set_random_seed(1)
    teacher, student = mlp("teacher", 8, theirs), mlp("student", 5, ours)
    z_t, z_s = (np.asarray(keras.ops.cast(m(x), "float64")) for m in (teacher, student))
    log_t, log_s = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (z_t, z_s))
    kl = np.mean(np.sum(np.exp(log_t) * (log_t - log_s), -1))
    hard = -np.mean(log_s[np.arange(len(y)), y])
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), LOSS, alpha=0.5, temperature=1.0)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["loss"], 0.5 * hard + 0.5 * kl, rtol=1e-3)
    assert {w.dtype for w in student.trainable_variables} == {"float32"}
    assert all(np.isfinite(w).all() for w in student.get_weights())


def test_a_teacher_of_int8_weights(data):
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Dense(8, activation="relu")(keras.layers.Flatten()(inputs))
    teacher = keras.Model(inputs, keras.layers.Dense(3)(x), name="teacher")
    x, _ = data
    exact = np.asarray(teacher(x))
    teacher.quantize("int8")
    before = [np.array(w) for w in teacher.weights]
    rounded_logits = np.asarray(teacher(x))
    assert 0 < np.abs(rounded_logits - exact).max() < 0.2
    student = convnet("student")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), loss=None, distillation_loss=kd.losses.LogitMSE())
    # Of a batch: the student's BatchNormalization is in training mode.
    expected = np.mean((rounded_logits - np.asarray(student(x, training=True))) ** 2)
    logs = distiller.train_on_batch(x, return_dict=True)
    np.testing.assert_allclose(logs["logit_mse"], expected, rtol=1e-4)
    for now, was in zip(teacher.weights, before):
        np.testing.assert_array_equal(np.array(now), was)


@pytest.mark.parametrize("form", ["arrays", "dataset"])
def test_the_whole_first_batch_is_timed(teacher, data, monkeypatch, form):
    seen = []
    monkeypatch.setattr(precision, "milliseconds", timing(1.0, 5.0, 8.0, 8.0, seen))
    given, batch_size = data, 12
    if form == "dataset":
        import tensorflow as tf

        given, batch_size = [tf.data.Dataset.from_tensor_slices(data).batch(12)], None
    distiller = kd.Distiller(convnet("student"), teacher, teacher_precision="auto")
    distiller.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match="as it was given"):
        distiller.fit(*given, batch_size=batch_size, verbose=0)
    assert seen == [(12, ["bfloat16"]), (12, ["float32", "float16"])]


def _loss_of(teacher, x, precision, before):
    student = convnet("student")
    student.set_weights([0.1 * np.ones_like(w) for w in student.get_weights()])
    distiller = kd.Distiller(student, teacher, teacher_precision=precision)
    distiller.compile(keras.optimizers.SGD(0.0), loss=None, distillation_loss=kd.losses.LogitMSE())
    before(distiller)
    return distiller.fit(x, verbose=0).history["loss"][0]


@pytest.mark.parametrize("kind", ["bfloat16", "auto", "ensemble"])
@pytest.mark.filterwarnings("ignore:The teacher")
def test_a_copy_follows_the_weights_of_its_model(monkeypatch, teacher, data, kind):
    x, _ = data
    monkeypatch.setattr(precision, "milliseconds", timing(9.0, 8.0, 7.0, 6.0))
    given = [teacher, teacher] if kind == "ensemble" else teacher
    precise = "auto" if kind == "auto" else "bfloat16"
    weights = teacher.get_weights()

    def change(distiller):
        distiller.fit(x, verbose=0)
        teacher.set_weights([w * 2.0 for w in weights])

    found = _loss_of(given, x, precise, before=change)
    expected = _loss_of(given, x, "float32", before=lambda distiller: None)
    teacher.set_weights(weights)
    stale = _loss_of(given, x, "float32", before=lambda distiller: None)
    assert abs(found / expected - 1) < 0.05 < abs(stale / expected - 1)


def test_evaluate_follows_the_weights_too(teacher, data):
    x, _ = data
    distiller = kd.Distiller(convnet("student"), teacher, teacher_precision="bfloat16")
    distiller.compile("sgd", loss=None, evaluate_distillation=True)
    first = distiller.evaluate(x, verbose=0, return_dict=True)["distillation_loss"]
    teacher.set_weights([w * 3.0 for w in teacher.get_weights()])
    assert distiller.evaluate(x, verbose=0, return_dict=True)["distillation_loss"] > 1.5 * first


class _Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="hidden")
        self.top = keras.layers.Dense(3)

    def call(self, x):
        return self.top(keras.ops.reshape(x, (-1, 36)))


def _quantized():
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Dense(8, activation="relu")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(x), name="quantized")
    model.quantize("int8")
    return model


@pytest.mark.parametrize("make", [_Subclassed, _quantized])
def test_a_model_that_cannot_be_copied(data, make):
    x, y = data
    model = make()
    model(x)
    with pytest.raises(ValueError, match=f"`{model.name}` is .*Leave it out, or"):
        kd.Distiller(convnet("student"), model, teacher_precision="bfloat16")
    distiller = kd.Distiller(convnet("student"), model, teacher_precision="auto")
    distiller.compile("sgd", LOSS)
    said = f"The teacher `{model.name}` runs as it was given. .*`{model.name}` is "
    with pytest.warns(UserWarning, match=said):
        distiller.fit(x, y, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert np.isfinite(distiller.fit(x, y, verbose=0).history["loss"]).all()
