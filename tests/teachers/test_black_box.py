"""Teachers that are asked on the host: functions, estimators, files."""

import keras
import numpy as np
import pytest
from small_models import CLASSES, FEATURES, crossentropy, kl, log_softmax, mlp, rows

import keras_kd as kd
from keras_kd.teachers import BlackBox, CachedTeacher, Ensemble

WEIGHTS = np.random.default_rng(5).normal(size=(FEATURES, CLASSES))


class Linear:
    """A classifier in NumPy that counts its calls."""

    def __init__(self, form="logits"):
        self.form, self.sizes = form, []

    def __call__(self, x):
        assert type(x) is np.ndarray
        self.sizes.append(len(x))
        logits = x.astype("float64") @ WEIGHTS
        return logits if self.form == "logits" else np.exp(log_softmax(logits))


def distiller(teacher, student=None, loss=None, answers="auto", **options):
    made = kd.Distiller(student or mlp(name="student"), teacher, teacher_answers=answers)
    made.compile(keras.optimizers.SGD(0.0), loss=loss, **{"temperature": 2.0, **options})
    return made


@pytest.mark.parametrize("form", ["logits", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 3}, {"run_eagerly": True}])
def test_one_call_a_batch_and_the_right_numbers(form, options):
    x, y = rows(count=20)
    ask, student = Linear(form), mlp(name="student")
    made = distiller(BlackBox(ask, form), student, crossentropy(), answers="live", **options)
    history = made.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    # A first look at eight rows or at a whole batch, then each batch once.
    assert sorted(ask.sizes)[:2] == [4, 4]
    assert len(ask.sizes) in (7, 8)
    expected = kl(x @ WEIGHTS, student(x), 2.0).mean()
    np.testing.assert_allclose(history["soft_targets"], expected, rtol=1e-5)
    assert history["agreement"][0] == pytest.approx(
        np.mean((x @ WEIGHTS).argmax(-1) == np.array(student(x)).argmax(-1)), abs=1e-6
    )


def test_each_row_is_asked_once_where_answers_stay_in_memory():
    x, y = rows(count=20)
    ask, student = Linear("logits"), mlp(name="student")
    made = distiller(BlackBox(ask, "logits"), student, crossentropy(), answers="memory")
    history = made.fit(x, y, batch_size=8, epochs=3, verbose=0).history
    # A first look at eight rows, then every row once, and not again in a later epoch.
    assert ask.sizes == [8, 8, 8, 4]
    expected = kl(x @ WEIGHTS, student(x), 2.0).mean()
    np.testing.assert_allclose(history["soft_targets"], expected, rtol=1e-5)


def test_a_function_that_works_in_place_leaves_the_batch_alone():
    x, y = rows()

    def halved(x):
        x /= 2.0
        return x @ WEIGHTS

    student = mlp(name="student")
    logs = distiller(BlackBox(halved), student, crossentropy()).fit(x, y, verbose=0).history
    expected = kl(x @ WEIGHTS / 2, student(x), 2.0).mean()
    assert logs["soft_targets"][0] == pytest.approx(expected, rel=1e-4)


def test_one_unit_of_probability_and_values_of_a_regression():
    x, _ = rows()
    p = 1 / (1 + np.exp(-x[:, 0].astype("float64")))
    student = mlp(classes=1, name="student")
    made = distiller(
        BlackBox(lambda x: 1 / (1 + np.exp(-x[:, 0])), "probabilities"),
        student,
        keras.losses.BinaryCrossentropy(from_logits=True),
    )
    logs = made.train_on_batch(x, (p > 0.5).astype("float32")[:, None], return_dict=True)
    q = 1 / (1 + np.exp(-np.array(student(x), "float64")[:, 0] / 2))
    t = 1 / (1 + np.exp(-np.log(p / (1 - p)) / 2))
    expected = 4 * (t * np.log(t / q) + (1 - t) * np.log((1 - t) / (1 - q))).mean()
    assert logs["distillation_loss"] == pytest.approx(expected, rel=1e-4)
    values = BlackBox(lambda x: x[:, :1] * 30, "values", name="price", version="3")
    made = distiller(values, student, "mse", distillation_loss=kd.losses.LogitMSE(), temperature=1)
    logs = made.train_on_batch(x, x[:, :1], return_dict=True)
    expected = ((x[:, :1] * 30 - np.array(student(x))) ** 2).mean()
    assert logs["distillation_loss"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="`price` answers values.*logits of classes"):
        distiller(
            BlackBox(lambda x: x[:, :4], "values", name="price"), loss=crossentropy()
        ).train_on_batch(x, np.zeros(len(x), int))


def test_several_outputs_by_name():
    x, _ = rows()

    def heads():
        inputs = keras.Input((FEATURES,))
        outputs = {
            "kind": keras.layers.Dense(CLASSES, name="kind")(inputs),
            "age": keras.layers.Dense(1, name="age")(inputs),
        }
        return keras.Model(inputs, outputs, name="heads")

    teacher = BlackBox(
        lambda x: {"age": x[:, 1], "kind": x @ WEIGHTS, "unused": None},
        {"kind": "logits", "age": "values"},
        name="two",
    )
    student = heads()
    made = distiller(
        teacher,
        student,
        {"kind": crossentropy(), "age": "mse"},
        distillation_loss={"kind": kd.losses.SoftTargets(), "age": kd.losses.LogitMSE()},
    )
    labels = {"kind": np.zeros(len(x), int), "age": x[:, :1]}
    logs = made.train_on_batch(x, labels, return_dict=True)
    ours = {name: np.array(value) for name, value in student(x).items()}
    expected = kl(x @ WEIGHTS, ours["kind"], 2.0).mean()
    assert logs["kind_soft_targets"] == pytest.approx(expected, rel=1e-4)
    expected = ((ours["age"][:, 0] - x[:, 1]) ** 2).mean()
    assert logs["age_logit_mse"] == pytest.approx(expected, rel=1e-4)


def test_probabilities_of_zero_are_clipped_at_what_the_dtype_can_express():
    x, _ = rows(count=2)
    p = np.array([[0.0, 0.25, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0]])
    for dtype, smallest in (
        ("float64", np.finfo("float64").tiny),
        ("float32", np.finfo("float32").tiny),
        ("float16", 2.0**-24),
    ):
        teacher = BlackBox(lambda x, dtype=dtype: p.astype(dtype), "probabilities")
        found = np.array(teacher.answer(x).logits[0])
        np.testing.assert_allclose(found, np.log(np.maximum(p, smallest)), rtol=1e-6)
    teacher = BlackBox(lambda x: p, "probabilities", smallest=1e-4)
    np.testing.assert_allclose(
        np.array(teacher.answer(x).logits[0]), np.log(np.maximum(p, 1e-4)), rtol=1e-6
    )
    flags = BlackBox(lambda x: p.astype("float32"), "probabilities", binary=True)
    found = np.array(flags.answer(x).logits[0])
    assert found[1, 0] == pytest.approx(-np.log(np.finfo("float32").epsneg), rel=1e-6)
    assert found[0, 1] == pytest.approx(np.log(0.25 / 0.75), rel=1e-5)
    assert flags.kinds == ["sigmoid"]


# ------------------------------------------------------------------------- failures


def only_bad(bad, rows_of_bad):
    """Logits with something wrong in rows whose first feature is large."""

    def predict(x):
        logits = (x @ WEIGHTS).astype("float64")
        return bad(x, logits, rows_of_bad(x))

    return predict


def marked(x):
    return x[:, 0] > 50


def _raise(x, logits, rows):
    if rows.any():
        raise ConnectionError("the service is away")
    return logits


def _nan(x, logits, rows):
    logits[rows, 1] = np.nan
    return logits


def _shape(x, logits, rows):
    return logits[:, :3] if rows.any() else logits


def _count(x, logits, rows):
    return logits[~rows]


def _text(x, logits, rows):
    return np.full(logits.shape, "no") if rows.any() else logits


BAD = {
    "raises": (_raise, r"failed on {all}: ConnectionError: the service is away\."),
    "nan": (_nan, r"answered NaN or infinity for {some}"),
    "shape": (_shape, r"answered rows of shape \(3,\) for {all}, and it is known to answer rows"),
    "count": (_count, r"answered 5 rows for {all}\."),
    "text": (_text, r"answered no array of numbers for {all}"),
}


@pytest.mark.parametrize("answers", ["live", "auto"])
@pytest.mark.parametrize("kind", BAD)
def test_what_goes_wrong_names_the_rows(kind, answers, tmp_path):
    bad, message = BAD[kind]
    x, y = rows(count=24)
    x[18:21, 0] = 100.0
    teacher = BlackBox(only_bad(bad, marked), name="api")
    student = mlp(name="student")
    before = student.get_weights()
    made = kd.Distiller(student, teacher, teacher_answers=answers)
    made.compile("sgd", loss=crossentropy())
    said = {"all": "rows 16 to 23 of the data", "some": "rows 18 to 20 of the data"}
    if answers == "live":
        where = "of batch 3 of epoch 1"
        said = {"all": f"rows 0 to 7 {where}", "some": f"rows 2 to 4 {where}"}
    with pytest.raises(ValueError, match="`api` " + message.format(**said)):
        made.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    assert np.isfinite(np.concatenate([w.ravel() for w in student.get_weights()])).all()
    said = {"all": "rows 16 to 23 of the data", "some": "rows 18 to 20 of the data"}
    with pytest.raises(ValueError, match="`api` " + message.format(**said)):
        kd.cache.write(teacher, x, tmp_path / "cache", batch_size=8)
    if kind == "raises":
        # What was wrong is told once; with a service that answers the training goes on.
        made.fit(x[:16], y[:16], batch_size=8, verbose=0)
        assert not all(map(np.array_equal, before, student.get_weights()))
        said = {"all": "rows 0 to 23 of a batch of 24"}
        made.compile("sgd", loss=crossentropy(), evaluate_distillation=True)
        with pytest.raises(ValueError, match="`api` " + message.format(**said)):
            made.evaluate(x, y, batch_size=8, verbose=0)


def test_probabilities_that_are_none():
    x, y = rows(count=8)
    for change, message in (
        (lambda p: p * 1.5, r"below 0 or above 1|do not sum to 1"),
        (lambda p: np.where(np.arange(8)[:, None] == 3, p / 2, p), r"do not sum to 1 for row 3 of"),
        (lambda p: np.log(p), r"below 0 or above 1 for rows 0 to 7.*`outputs='logits'`"),
    ):
        teacher = BlackBox(lambda x, c=change: c(Linear("probabilities")(x)), "probabilities")
        with pytest.raises(ValueError, match=message):
            distiller(teacher, loss=crossentropy()).fit(x, y, verbose=0)


def test_answers_that_are_no_answers():
    class MuteError(Exception):
        def __str__(self):
            raise RuntimeError

    def fails(error):
        def predict(x):
            raise error

        return predict

    x = np.ones((4, 3), "float32")
    for predict, message in (
        (lambda x: np.ma.masked_greater(x, 0), "masked numbers for rows 0 to 3"),
        (lambda x: x.astype("float64") * 1e39, "that float32 does not hold for rows 0 to 3"),
        (fails(MuteError()), "failed on rows 0 to 3 .*: MuteError: no message"),
        (fails(SystemExit(3)), "failed on rows 0 to 3 .*: SystemExit: 3"),
        (fails(ValueError("{rows} {}")), r"of a batch of 4: ValueError: \{rows\} \{\}"),
        (lambda x: {"a": [0.5] * 4, "b": [0.5] * 3}, r"'b': \(3,\)\} .* one number a row, \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            BlackBox(predict, classes=["a", "b"] if "one number" in message else None).inspect(x)
    with pytest.raises(ValueError, match=r"answered \['a', 'c'\] .*names \['a', 'b'\]"):
        BlackBox(lambda x: {"a": x, "c": x}, {"a": "logits", "b": "logits"}).inspect(x)
    stopped = BlackBox(fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        stopped.inspect(x)


def test_outputs_of_another_rank_are_refused():
    x, y = rows(count=8)
    teacher = BlackBox(lambda x: Linear("logits")(x)[:, None], "logits")
    with pytest.raises(ValueError, match=r"shape \(None, 1, \d\) and the student's \(None, \d\)"):
        distiller(teacher, loss=crossentropy()).fit(x, y, verbose=0)
    flat = BlackBox(Linear("logits"), "logits")
    for each in (flat, teacher):
        each.inspect(x)
    with pytest.raises(ValueError, match="must answer in the same shape"):
        Ensemble([flat, teacher])
    for weights in (0.5, {"a": 1}, ["1", "2"], [True, False]):
        with pytest.raises(TypeError, match="a list with a number for each"):
            Ensemble([flat, flat], weights=weights)


def test_classes_in_another_order():
    class Frame:
        columns = ("dog", "cat")

        def __array__(self, dtype=None, copy=None):
            return np.full((2, 2), 0.5)

    x = np.zeros((2, 3), "float32")
    teacher = BlackBox(lambda x: Frame(), "probabilities", classes=["cat", "dog"])
    with pytest.raises(ValueError, match=r"\['dog', 'cat'\].*\['cat', 'dog'\], in this order"):
        teacher.inspect(x)
    named = BlackBox(
        lambda x: {"dog": [0.1, 0.2], "cat": [0.9, 0.8]}, "probabilities", classes=["cat", "dog"]
    )
    np.testing.assert_allclose(np.array(named.answer(x).output), [[0.9, 0.1], [0.8, 0.2]], 1e-6)
    with pytest.raises(ValueError, match="same classes in the same order"):
        Ensemble([named, BlackBox(lambda x: x[:, :2], classes=["dog", "cat"])])
    for wrong in ("logit", "probs"):
        with pytest.raises(ValueError, match=f"`outputs` is one of.*{wrong}"):
            BlackBox(lambda x: x, wrong)
    with pytest.raises(TypeError, match="the path `t.onnx`.*`keras_kd.teachers.from_onnx`"):
        kd.Distiller(mlp(), "t.onnx")
    with pytest.raises(TypeError, match="`predict` is a function"):
        BlackBox("a model")


# -------------------------------------------------------------------- company, caches


def test_beside_a_model_in_an_ensemble_and_in_a_cache(tmp_path):
    x, y = rows(count=20)
    model, student = mlp(width=7, name="model"), mlp(name="student")
    ask = Linear("probabilities")
    both = Ensemble([model, BlackBox(ask, "probabilities", name="box")], [3, 1])
    p = 0.75 * np.exp(log_softmax(model(x))) + 0.25 * np.exp(log_softmax(x @ WEIGHTS))
    expected = kl(np.log(p), student(x), 2.0).mean()
    made = distiller(both, student, crossentropy())
    found = made.fit(x, y, batch_size=10, shuffle=False, verbose=0).history["soft_targets"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    ask.sizes.clear()
    manifest = kd.cache.write(both, x, tmp_path / "both", dtype="float32", batch_size=8)
    assert sorted(ask.sizes) == [4, 8, 8]
    assert manifest.teacher["runs"] == ["as given", "as given"]
    cached = distiller(CachedTeacher(tmp_path / "both", teacher=both), student, crossentropy())
    found = cached.fit(x, y, batch_size=10, verbose=0).history["soft_targets"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="answers rows by their number"):
        Ensemble([model, CachedTeacher(tmp_path / "both")])


def test_a_cache_is_bound_to_name_and_version(tmp_path):
    x, _ = rows()

    def box(version, **options):
        return BlackBox(Linear(), name="rules", version=version, **options)

    kd.cache.write(box("1", classes="abcd"), x, tmp_path)
    assert CachedTeacher(tmp_path, teacher=box("1", classes="abcd")).classes == list("abcd")
    with pytest.raises(ValueError, match="cache of another teacher, `rules`"):
        kd.cache.write(box("2", classes="abcd"), x, tmp_path)
    named = [BlackBox(f, name="f").fingerprint() for f in (lambda x: x, lambda x: x + 1)]
    assert named[0] != named[1]
    with pytest.raises(ValueError, match="shows its answers alone"):
        kd.cache.write(box("1"), x, tmp_path / "taps", taps=["hidden"])


def test_saved_and_resumed_with_its_box(tmp_path):
    x, y = rows()
    made = kd.Distiller(mlp(name="student"), BlackBox(Linear(), name="rules", version="1"))
    made.compile("sgd", loss=crossentropy())
    made.fit(x, y, verbose=0)
    made.save(tmp_path / "d.keras")
    again = kd.load_distiller(
        tmp_path / "d.keras", teacher=BlackBox(Linear(), name="rules", version="1")
    )
    assert again.fit(x, y, verbose=0).history == made.fit(x, y, verbose=0).history
    with pytest.raises(ValueError, match="trained with the teacher `rules`"):
        kd.load_distiller(tmp_path / "d.keras", teacher=BlackBox(Linear(), name="rules"))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="XLA calls no host there")
def test_a_step_of_xla_that_calls_the_host_is_compiled_without_it():
    x, y = rows()
    with pytest.warns(UserWarning, match="jit_compile"):
        made = distiller(BlackBox(Linear()), loss=crossentropy(), jit_compile=True)
    assert made.jit_compile is False
    made.fit(x, y, verbose=0)


class SeesXla(keras.layers.Layer):
    """Notes whether the step in which it runs is compiled by XLA."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x, training=False):
        from keras_kd.backends import tensorflow as backend

        self.seen.append((bool(training), backend.in_xla()))
        return x


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="XLA calls no host there")
@pytest.mark.parametrize("steps", [1, 2, "auto"])
def test_xla_stays_on_where_the_answers_are_in_memory(steps):
    x, y = rows()
    sees = SeesXla()
    inputs = keras.Input((x.shape[1],))
    student = keras.Model(inputs, keras.layers.Dense(CLASSES)(sees(inputs)))
    made = kd.Distiller(student, BlackBox(Linear()))
    made.compile("sgd", loss=crossentropy(), jit_compile=True, steps_per_execution=steps)

    def seen(**options):
        sees.seen.clear()
        made.fit(x, y, batch_size=4, verbose=0, **options)
        return {xla for training, xla in sees.seen if training}

    remembered = made.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert (True, True) in sees.seen
    # A single epoch asks in each step, and the next two read memory again.
    assert seen(epochs=1) == {False}
    assert seen(epochs=2) == {True}
    assert made.jit_compile is False
    assert np.isfinite(made.evaluate(x, y, verbose=0)[0])
    assert np.isfinite(remembered.history["distillation_loss"]).all()
