"""Losses weighed by what they are worth: the measurements, the weights, and when they change."""

import keras
import numpy as np
import pytest
from keras import layers
from small_models import CLASSES, FEATURES, Counted, crossentropy, hard_loss, kl, mlp, rows
from small_models import log_softmax as log_p

import keras_kd as kd
from keras_kd.callbacks import LossBalancing, ResumableBackup


def linear(name, scale=1.0):
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, layers.Dense(CLASSES, name="logits")(inputs), name=name)
    model.set_weights([scale * w for w in model.get_weights()])
    return model


def dropping(width, name, units=CLASSES):
    """Everything that a forward pass may change: statistics, random states, regularizers."""
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(width, activation="relu", kernel_regularizer="l2", name="hidden")(inputs)
    x = layers.Dropout(0.3)(layers.BatchNormalization(name="norm")(x))
    return keras.Model(inputs, layers.Dense(units, name="logits")(x), name=name)


def compiled(student, teacher, losses=None, eager=True, rate=0.0, **options):
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(rate),
        **{"loss": crossentropy(), "temperature": 2.0, "run_eagerly": eager, **options},
        distillation_loss=losses,
    )
    return distiller


def three_terms(eager=True, rate=0.0, **options):
    student, teacher = mlp(width=9, name="student"), mlp(width=9, name="teacher")
    losses = [
        kd.losses.SoftTargets(),
        kd.Transfer(kd.losses.Hint(), "hidden", "hidden", weight=100.0),
    ]
    return compiled(student, teacher, losses, eager, rate, **options)


def expected_losses(distiller, x, y):
    hidden = [
        np.array(keras.Model(m.input, m.get_layer("hidden").output)(x), "float64")
        for m in (distiller.teacher, distiller.student)
    ]
    return {
        "student_loss": hard_loss(distiller.student(x), y).mean(),
        "soft_targets": kl(distiller.teacher(x), distiller.student(x), 2.0).mean(),
        "hint": np.square(hidden[0] - hidden[1]).mean(),
    }


# ------------------------------------------------------------------- measurements


def test_term_losses_are_their_formulas_without_weights():
    distiller, (x, y) = three_terms(alpha=0.2), rows()
    found = distiller.term_losses((x, y))
    expected = expected_losses(distiller, x, y)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4)
    weight = np.arange(12.0)
    weighted = distiller.term_losses((x, y, weight))["student_loss"]
    assert weighted == pytest.approx((weight * hard_loss(distiller.student(x), y)).mean(), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_gradient_norms_of_a_linear_student(dtype):
    student, teacher = linear("student"), linear("teacher", 3.0)
    if dtype != "float32":
        inputs = keras.Input((FEATURES,))
        half = keras.Model(inputs, layers.Dense(CLASSES, dtype=dtype)(inputs), name="student")
        half.set_weights(student.get_weights())
        student = half
    distiller = compiled(student, teacher)
    x, y = rows(7)
    found = distiller.gradient_norms((x, y))
    p, t = np.exp(log_p(student(x))), np.exp(log_p(np.array(teacher(x)) / 2))
    soft = np.exp(log_p(np.array(student(x), "float64") / 2))
    # With respect to the logits: p - onehot(y), and T (softmax(s / T) - softmax(t / T)).
    for name, residual in (
        ("student_loss", p - np.eye(CLASSES)[y]),
        ("soft_targets", 2 * (soft - t)),
    ):
        residual = residual / len(x)
        kernel, bias = x.T.astype("float64") @ residual, residual.sum(0)
        norm = np.sqrt(np.square(kernel).sum() + np.square(bias).sum())
        assert found[name] == pytest.approx(norm, rel=1e-4 if dtype == "float32" else 3e-2)


def test_embeddings_and_projectors():
    """A row that comes twice adds up; what is not the student's own is left out."""
    inputs = keras.Input((2,), dtype="int32")
    hidden = layers.Flatten(name="flat")(layers.Embedding(4, 2, name="embedding")(inputs))
    student = keras.Model(inputs, layers.Dense(3, name="top")(hidden), name="student")
    teacher = keras.models.clone_model(student)
    hint = kd.Transfer(kd.losses.Hint(), "flat", "flat", projector="linear")
    distiller = compiled(student, teacher, hint)
    x = np.array([[1, 1], [1, 2]])
    found = distiller.gradient_norms((x, np.array([0, 1])))["hint"]
    kernel, bias = distiller.transfers[0].projection.get_weights()
    table, target = (
        student.get_layer("embedding").get_weights()[0],
        np.array(keras.Model(teacher.input, teacher.get_layer("flat").output)(x)),
    )
    residual = 2 * (table[x].reshape(2, 4) @ kernel + bias - target) / target.size
    gradient = np.zeros_like(table)
    np.add.at(gradient, x, (residual @ kernel.T).reshape(2, 2, 2))
    assert found == pytest.approx(np.linalg.norm(gradient), rel=1e-4)


def everything(distiller):
    return [
        np.array(v)
        for v in [*distiller.variables, *distiller.optimizer.variables]
        + [v for metric in distiller.metrics for v in metric.variables]
    ]


def test_measuring_leaves_no_trace(tmp_path):
    x, y = rows(16)
    inputs = keras.Input((FEATURES,))

    def forked(name):
        body = dropping(5, f"{name}_body")(inputs)
        heads = {"a": layers.Dense(4, name="a")(body), "b": layers.Dense(3, name="b")(body)}
        return keras.Model(inputs, heads, name=name)

    distiller = compiled(
        forked("student"),
        forked("teacher"),
        rate=0.1,
        loss={"a": crossentropy(), "b": crossentropy()},
        metrics={"a": "accuracy"},
    )
    labels = {"a": y, "b": y % 3}
    distiller.fit(x, labels, verbose=0)
    before = everything(distiller)
    first = distiller.term_losses((x[:4], {"a": y[:4], "b": y[:4] % 3}))
    norms = distiller.gradient_norms((x[:4], {"a": y[:4], "b": y[:4] % 3}))
    assert all(norm > 0 for norm in norms.values())
    for old, new in zip(before, everything(distiller), strict=True):
        np.testing.assert_array_equal(old, new)
    assert distiller.term_losses((x[:4], {"a": y[:4], "b": y[:4] % 3})) == first


def test_memory_banks_stay_and_need_row_numbers():
    loss = kd.losses.CRD(samples=12, negatives=4, width=3)
    distiller = compiled(
        mlp(name="student"), mlp(name="teacher"), kd.Transfer(loss, "hidden", "hidden")
    )
    x, y = rows()
    with pytest.raises(ValueError, match="bring no row numbers"):
        distiller.term_losses((x, y))
    found = distiller.term_losses((kd.teachers.Numbered(x, np.arange(12)), y))
    assert np.isfinite(list(found.values())).all()
    assert [float(bank.constant_is_set) for bank in loss.banks] == [0.0, 0.0]


# ------------------------------------------------------------------------ weights


@pytest.mark.parametrize("given", ["alpha", "explicit"])
def test_uncertainty_weighs_by_half_the_inverse_loss(given):
    weights = (
        {"alpha": 0.3}
        if given == "alpha"
        else {"student_loss_weight": 7.0, "distillation_loss_weight": 0.7}
    )
    distiller, (x, y) = three_terms(**weights), rows()
    logs = distiller.fit(
        x, y, batch_size=12, verbose=0, callbacks=[LossBalancing("uncertainty")]
    ).history
    values = expected_losses(distiller, x, y)
    for name, value in values.items():
        assert logs[f"{name}_weight"][0] == pytest.approx(1 / (2 * value), rel=1e-4)
    # Each balanced term is 1/2.
    outer = (0.3, 0.7) if given == "alpha" else (1.0, 0.7)
    assert logs["loss"][0] == pytest.approx(outer[0] * 0.5 + outer[1] * 1.0, rel=1e-4)


def test_that_is_the_optimum_of_the_papers_objective():
    from scipy import optimize

    for value in (0.02, 3.0):
        for form in (0.5, 1.0):
            best = optimize.minimize_scalar(
                lambda s, f=form, v=value: f * v * np.exp(-s) + 0.5 * s, bounds=(-20, 20)
            )
            assert form * np.exp(-best.x) == pytest.approx(1 / (2 * value), rel=1e-3)


def test_gradient_norm_makes_all_pull_alike():
    distiller, (x, y) = three_terms(), rows()
    callback = LossBalancing("gradient_norm", data=(x[:8], y[:8]))
    logs = distiller.fit(x, y, verbose=0, callbacks=[callback]).history
    norms = distiller.gradient_norms((x[:8], y[:8]))
    weights = {name: logs[f"{name}_weight"][0] for name in norms}
    pulls = [weights[name] * norm for name, norm in norms.items()]
    np.testing.assert_allclose(pulls, pulls[0], rtol=1e-4)
    assert sum(weights.values()) == pytest.approx(3)


def test_it_trains_without_labels_and_leaves_out_weights_of_zero():
    x, _ = rows()
    student, teacher = mlp(width=9, name="student"), mlp(width=9, name="teacher")
    losses = [
        kd.losses.SoftTargets(),
        kd.losses.LogitMSE(),
        kd.Transfer(kd.losses.Hint(), "hidden", "hidden", weight=0.0),
    ]
    distiller = compiled(student, teacher, losses, loss=None)
    logs = distiller.fit(x, verbose=0, callbacks=[LossBalancing("gradient_norm")]).history
    assert logs["soft_targets_weight"][0] + logs["logit_mse_weight"][0] == pytest.approx(2)
    assert not {"hint_weight", "student_loss_weight"} & set(logs)
    assert float(distiller.transfers[2].weight) == 0.0


class Record(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(logs["hint_weight"])


@pytest.mark.parametrize(("at_once", "changes"), [(1, [3, 6, 9]), (2, [2, 3, 5])])
def test_it_measures_every_so_many_steps_without_retracing(at_once, changes):
    """Six steps an epoch. Two at once show as one batch, and then steps 4, 6 and 10 are the first
    to come at or after a multiple of 3."""
    inputs = keras.Input((FEATURES,))
    counted = Counted(name="counted")
    hidden = layers.Dense(9, activation="tanh", name="hidden")(counted(inputs))
    student = keras.Model(inputs, layers.Dense(CLASSES)(hidden), name="student")
    hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden")
    distiller = compiled(
        student,
        mlp(width=9, name="teacher"),
        [kd.losses.SoftTargets(), hint],
        eager=False,
        rate=0.3,
        steps_per_execution=at_once,
    )
    x, y = rows(24)
    record, callback = Record(), LossBalancing("uncertainty", every=3)
    traces = []

    class Traces(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            counted.calls.clear()

        def on_train_batch_end(self, batch, logs=None):
            traces.append(len(counted.calls))

    distiller.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[callback, Traces(), record])
    seen = record.seen
    different = [i for i in range(1, len(seen)) if seen[i] != seen[i - 1]]
    assert different == changes
    # After the first step nothing of the student is traced anew.
    assert not any(traces[1:])


def test_values_reach_tensorboard(tmp_path):
    import tensorflow as tf

    distiller, (x, y) = three_terms(), rows()
    board = keras.callbacks.TensorBoard(tmp_path)
    logs = distiller.fit(x, y, verbose=0, callbacks=[board, LossBalancing()]).history
    found = {}
    for file in sorted((tmp_path / "train").iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                found[value.tag] = value.tensor
    tag = found["epoch_hint_weight"]
    assert float(tf.make_ndarray(tag)) == pytest.approx(logs["hint_weight"][0])


# ----------------------------------------------------------------------- resuming


class KilledError(Exception):
    pass


class Kill(keras.callbacks.Callback):
    """Dies at one batch of the second epoch."""

    def __init__(self, at):
        super().__init__()
        self.at, self.epoch = at, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 1 and batch == self.at:
            raise KilledError


def resumable():
    # As in a new process: the names of all variables begin anew.
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    hint = kd.Transfer(kd.losses.Hint(), "norm", "norm", projector="linear")
    return compiled(
        dropping(5, "student"),
        dropping(8, "teacher"),
        [kd.losses.SoftTargets(), hint],
        rate=0.2,
    )


def balanced(method):
    return LossBalancing(method, every=3)


def test_a_killed_training_resumes_to_the_same_bits(tmp_path):
    method = "gradient_norm"
    x, y = rows(8)
    whole = resumable()
    logs = whole.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[balanced(method)]).history

    def run(*callbacks):
        distiller = resumable()
        backup = ResumableBackup(tmp_path / "backup", save_freq=1)
        history = distiller.fit(
            x,
            y,
            batch_size=4,
            epochs=2,
            verbose=0,
            callbacks=[balanced(method), backup, *callbacks],
        ).history
        return distiller, history

    with pytest.raises(KilledError):
        run(Kill(0))
    resumed, history = run()
    for name in ("hint_weight", "student_loss_weight", "loss"):
        assert history[name] == logs[name][1:]
    for one, other in zip(whole.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))


def test_a_loaded_distiller_has_the_weights_and_goes_on(tmp_path):
    x, y = rows(8)
    distiller = resumable()
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    distiller.fit(x, y, epochs=1, callbacks=[balanced("uncertainty")], **options)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    assert float(loaded.student_loss_weight) == float(distiller.student_loss_weight) != 1.0
    assert float(loaded.transfers[1].weight) == float(distiller.transfers[1].weight) != 1.0
    logs = [
        each.fit(x, y, epochs=2, initial_epoch=1, callbacks=[balanced("uncertainty")], **options)
        for each in (distiller, loaded)
    ]
    assert logs[0].history == logs[1].history


# ------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "uncertain"}, "'gradient_norm'.*Did you mean 'uncertainty'"),
        ({"every": 0}, "`every`.*at least 1"),
        ({"every": 2.5}, "`every`.*2.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossBalancing(**arguments)


def test_what_cannot_be_balanced():
    import tensorflow as tf

    x, y = rows()
    distiller = compiled(mlp(name="student"), mlp(name="teacher"), loss=None)
    with pytest.raises(ValueError, match="at least two terms.*`soft_targets` with"):
        distiller.fit(x, verbose=0, callbacks=[LossBalancing()])
    distiller = compiled(mlp(name="student"), mlp(name="teacher"))
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    with pytest.raises(ValueError, match=r"Pass `data=\(x, y\)`"):
        distiller.fit(dataset, verbose=0, callbacks=[LossBalancing()])
    distiller.fit(dataset, verbose=0, callbacks=[LossBalancing(data=(x, y))])
    plain = mlp()
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="terms of a `keras_kd.Distiller`"):
        plain.fit(x, np.zeros((12, CLASSES)), verbose=0, callbacks=[LossBalancing()])

    def negative(teacher, student):
        return keras.ops.sum(student - student, axis=-1) - 1.0

    distiller = compiled(mlp(name="student"), mlp(name="teacher"), kd.Transfer(negative))
    with pytest.raises(ValueError, match="`negative` is -1 .*positive.*'gradient_norm'"):
        distiller.fit(x, y, verbose=0, callbacks=[LossBalancing()])
    assert int(distiller.optimizer.iterations) == 0


def test_a_term_without_gradient_keeps_its_weight():
    """Student and teacher begin alike, so that nothing pulls yet."""
    x, y = rows()
    student = mlp(name="student")
    teacher = keras.models.clone_model(student)
    teacher.set_weights(student.get_weights())
    distiller = compiled(student, teacher, kd.Transfer(kd.losses.LogitMSE(), weight=3.0))
    logs = distiller.fit(x, y, verbose=0, callbacks=[LossBalancing("gradient_norm")]).history
    assert logs["logit_mse_weight"] == [3.0]
    assert logs["student_loss_weight"] == [1.0]


def test_rows_are_spread_over_the_arrays_and_forgotten_after_fit():
    x, y = rows(100)
    distiller = compiled(mlp(name="student"), mlp(name="teacher"))
    found = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            found.append(self.model.sample_rows(5))

    distiller.fit(x, y, verbose=0, callbacks=[Look()])
    np.testing.assert_array_equal(found[0][0], x[[0, 25, 50, 74, 99]])
    np.testing.assert_array_equal(found[0][1], y[[0, 25, 50, 74, 99]])
    assert found[0][2] is None
    assert distiller.sample_rows() is None
    # Rows kept for validation tell nothing; labels weighed by class would be missing that weight.
    weight = np.arange(100.0)
    distiller.fit(x, y, sample_weight=weight, validation_split=0.5, verbose=0, callbacks=[Look()])
    np.testing.assert_array_equal(found[1][2], [0, 12, 24, 37, 49])
    distiller.fit(x, y, class_weight={0: 2.0}, verbose=0, callbacks=[Look()])
    assert found[2] is None


def test_a_joined_batch_of_a_cached_teacher(tmp_path):
    import tensorflow as tf

    x, y = rows()
    teacher = mlp(name="teacher")
    kd.cache.write(teacher, x, tmp_path / "cache", dtype="float32")
    cached = kd.teachers.CachedTeacher(tmp_path / "cache")
    live = compiled(mlp(name="student"), teacher)
    distiller = compiled(live.student, cached)
    joined = cached.join(tf.data.Dataset.from_tensor_slices((x, y)).batch(12))
    with pytest.raises(ValueError, match=r"`data=next\(iter\(cached.join\(dataset\)\)\)`"):
        distiller.fit(joined, verbose=0, callbacks=[LossBalancing()])
    batch = next(iter(cached.join(tf.data.Dataset.from_tensor_slices((x, y)).batch(12))))
    distiller.fit(x, y, verbose=0, callbacks=[LossBalancing("gradient_norm", data=batch)])
    measured, expected = distiller.gradient_norms(batch), live.gradient_norms((x, y))
    assert measured == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["uncertainty", "gradient_norm"])
def test_arrays_beside_a_cached_teacher_are_measured_with_its_answers(tmp_path, method):
    x, y = rows(300)
    teacher = mlp(name="teacher")
    kd.cache.write(teacher, x, tmp_path / "cache", dtype="float32")
    cached = kd.teachers.CachedTeacher(tmp_path / "cache")
    weight = np.linspace(0, 2, 300).astype("float32")
    histories = []
    for given in (teacher, cached):
        keras.utils.set_random_seed(0)
        distiller = compiled(mlp(name="student"), given)
        options = {"batch_size": 50, "validation_split": 0.2, "sample_weight": weight}
        fitted = distiller.fit(
            x, y, verbose=0, callbacks=[LossBalancing(method, every=2)], **options
        )
        histories.append(fitted.history)
    for name in ("student_loss_weight", "soft_targets_weight", "distillation_loss"):
        assert histories[0][name] == pytest.approx(histories[1][name], rel=1e-4), name
