"""Penalties and batch transforms: their values, their place in the step, and what is refused."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import CLASSES, FEATURES, Counted, crossentropy, hard_loss, kl, mlp, pair, rows

import keras_kd as kd
from keras_kd import backends


def _normed(width, name, **options):
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(width, activation="tanh", name="hidden")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name=name)


@keras.saving.register_keras_serializable(package="tests_hooks")
class L2ToStart(kd.Penalty):
    def build(self, distiller):
        weights = distiller.student.trainable_variables
        self.start = [keras.Variable(ops.copy(w)) for w in weights]

    def __call__(self, distiller, batch):
        pairs = zip(distiller.student.trainable_variables, self.start, strict=True)
        return sum(ops.sum(ops.square(w - start)) for w, start in pairs)


class Rows(kd.Penalty):
    """One value a sample."""

    def __call__(self, distiller, batch):
        return ops.sum(ops.square(distiller.student(batch.x)), axis=-1)


def compiled(student, teacher, optimizer=None, **options):
    distiller = kd.Distiller(student, teacher)
    options = {"loss": crossentropy(), "alpha": 0.5, "temperature": 2.0, **options}
    distiller.compile(optimizer or keras.optimizers.SGD(0.1), **options)
    return distiller


WAYS = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "several": {"jit_compile": False, "steps_per_execution": 3},
    "xla": {"jit_compile": True, "steps_per_execution": 2},
}


# ---------------------------------------------------------------------- penalties


@pytest.mark.parametrize("way", ["eager", "graph", "xla"])
def test_l2_to_start_is_its_value_and_gradient(way):
    x, y = rows()
    student, teacher = pair()
    penalty = L2ToStart(weight=0.3)
    distiller = compiled(
        student, teacher, penalties=[penalty], **{**WAYS[way], "steps_per_execution": 1}
    )
    start = student.get_weights()
    rng = np.random.default_rng(3)
    moved = [w + rng.normal(scale=0.2, size=w.shape).astype("float32") for w in start]

    def step(weight):
        student.set_weights(moved)
        penalty.weight = weight
        logs = distiller.train_on_batch(x, y, return_dict=True)
        distiller.reset_metrics()
        return {k: float(v) for k, v in logs.items()}, student.get_weights()

    logs, after = step(0.3)
    without, plain = step(0.0)
    value = sum(((a.astype("float64") - b) ** 2).sum() for a, b in zip(moved, start))
    assert logs["l2_to_start"] == pytest.approx(value, rel=1e-5)
    assert without["l2_to_start"] == pytest.approx(value, rel=1e-5)
    assert logs["loss"] - without["loss"] == pytest.approx(0.3 * value, rel=1e-4)
    student.set_weights(moved)
    hard = hard_loss(student.predict(x, verbose=0), y).mean()
    soft = kl(teacher.predict(x, verbose=0), student.predict(x, verbose=0), 2.0).mean()
    assert logs["loss"] == pytest.approx(0.5 * hard + 0.5 * soft + 0.3 * value, rel=1e-4)
    for a, b, m, s in zip(after, plain, moved, start):
        np.testing.assert_allclose(b - a, 0.1 * 0.3 * 2 * (m - s), rtol=1e-3, atol=1e-6)
    # The Variables that it keeps train with nobody.
    assert len(distiller.trainable_variables) == len(student.trainable_variables)
    for kept, s in zip(penalty.start, start):
        np.testing.assert_array_equal(kept, s)


def test_the_weight_is_live_without_retracing():
    x, y = rows()
    student, teacher = pair()
    traces = []

    class Noted(kd.Penalty):
        def __call__(self, distiller, batch):
            traces.append(batch)
            return ops.sum(distiller.student.trainable_variables[0])

    penalty = Noted(weight=2.0)
    foreign = type(
        "Foreign", (), {"name": "mine", "weight": 1, "__call__": lambda self, d, b: ops.ones(())}
    )()
    distiller = compiled(student, teacher, keras.optimizers.SGD(0.0), penalties=[penalty, foreign])
    first = distiller.train_on_batch(x, y, return_dict=True)
    distiller.reset_metrics()
    count = len(traces)
    penalty.weight = 5.0
    distiller.penalties[1].weight.assign(4.0)
    second = distiller.train_on_batch(x, y, return_dict=True)
    assert len(traces) == count
    gained = 3 * student.trainable_variables[0].numpy().sum() + 3
    assert second["loss"] - first["loss"] == pytest.approx(gained, rel=1e-4)
    assert second["mine"] == 1.0
    assert penalty.get_config() == {"weight": 5.0, "name": "noted"}


@pytest.mark.parametrize("with_teacher", [True, False])
def test_sample_weights_act_on_values_of_samples(with_teacher):
    x, y = rows()
    student, teacher = pair()
    distiller = compiled(
        student,
        teacher if with_teacher else None,
        keras.optimizers.SGD(0.0),
        penalties=[Rows(name="size")],
        **({} if with_teacher else {"alpha": None, "temperature": None}),
    )
    weight = np.linspace(0, 2, len(x)).astype("float32")
    history = distiller.fit(x, y, sample_weight=weight, batch_size=12, verbose=0).history
    expected = ((student.predict(x, verbose=0) ** 2).sum(-1) * weight).mean()
    assert history["size"][0] == pytest.approx(expected, rel=1e-5)
    rest = history["student_loss"][0]
    if with_teacher:
        rest = 0.5 * rest + 0.5 * history["distillation_loss"][0]
    assert history["loss"][0] == pytest.approx(rest + expected, rel=1e-5)


def test_masked_rows_have_no_value():
    tokens = np.array([[1, 2, 0], [0, 0, 0], [3, 0, 0]])
    inputs = keras.Input((3,), dtype="int32")
    x = layers.Embedding(5, 4, mask_zero=True)(inputs)
    student = keras.Model(inputs, layers.Dense(CLASSES)(x))
    teacher = keras.models.clone_model(student)

    class Sizes(kd.Penalty):
        def __call__(self, distiller, batch):
            return ops.cast(ops.sum(batch.x, axis=-1), "float32") + 1.0

    distiller = compiled(student, teacher, loss=None, alpha=None, penalties=[Sizes()])
    history = distiller.fit(tokens, verbose=0).history
    assert history["sizes"][0] == pytest.approx((4 + 4) / 2)


def test_evaluation_has_penalties_only_where_the_objective_is_asked_for():
    x, y = rows()
    student, teacher = pair()
    for asked in (False, True):
        distiller = compiled(
            student, teacher, penalties=[Rows(name="size")], evaluate_distillation=asked
        )
        logs = distiller.evaluate(x, y, return_dict=True, verbose=0)
        assert ("size" in logs) is asked
        history = distiller.fit(x, y, validation_data=(x, y), verbose=0).history
        assert ("val_size" in history) is asked
        assert "size" in history


def test_diagnostics_report_penalties():
    x, y = rows()
    student, teacher = pair()
    penalty = L2ToStart(weight=7.0, name="pull")
    distiller = compiled(student, teacher, penalties=[penalty, Rows(name="size")])
    start = student.get_weights()
    student.set_weights([w + 0.5 for w in start])
    losses, norms = distiller.term_losses((x, y)), distiller.gradient_norms((x, y))
    value = sum(0.25 * w.size for w in start)
    assert losses["pull"] == pytest.approx(value, rel=1e-5)
    assert norms["pull"] == pytest.approx(2 * np.sqrt(value), rel=1e-5)
    assert set(losses) == {"student_loss", "soft_targets", "pull", "size"} == set(norms)
    callback = kd.callbacks.LossBalancing(every=1)
    distiller.fit(x, y, verbose=0, callbacks=[callback])
    assert float(penalty.weight.numpy()) == 7.0


def test_several_outputs():
    inputs = keras.Input((FEATURES,))

    def two(name):
        h = layers.Dense(5)(inputs)
        heads = {n: layers.Dense(CLASSES, name=n)(h) for n in ("a", "b")}
        return keras.Model(inputs, heads, name=name)

    class Sizes(kd.Penalty):
        def __call__(self, distiller, batch):
            return ops.sum(batch.x, axis=-1)

    x, y = rows()
    weight = np.linspace(0, 1, len(x)).astype("float32")
    student, teacher = two("student"), two("teacher")
    options = {"loss": {"a": crossentropy(), "b": crossentropy()}, "penalties": [Sizes()]}
    labels = {"a": y, "b": y}
    distiller = compiled(student, teacher, **options)
    history = distiller.fit(x, labels, sample_weight=weight, verbose=0).history
    assert history["sizes"][0] == pytest.approx((x.sum(-1) * weight).mean(), rel=1e-4)
    history = distiller.fit(
        x, labels, sample_weight={"a": weight, "b": np.ones_like(weight)}, verbose=0
    ).history
    expected = (x.sum(-1) * (weight + 1) / 2).mean()
    assert history["sizes"][0] == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------- transforms


class Replay:
    """Appends rows that lie in Variables, and counts its calls in one."""

    def __init__(self, x, y):
        self.x = keras.Variable(x)
        self.y = keras.Variable(y, dtype="int32", trainable=False)
        self.calls = keras.Variable(0, dtype="int32", trainable=False)

    def __call__(self, batch, distiller):
        self.calls.assign_add(1)
        weight = batch.sample_weight
        if weight is not None:
            weight = ops.concatenate([weight, ops.ones(self.y.shape, weight.dtype)])
        return kd.Batch(
            ops.concatenate([batch.x, self.x]),
            ops.concatenate([batch.y, ops.cast(self.y, batch.y.dtype)]),
            weight,
        )


@pytest.mark.parametrize("way", list(WAYS))
def test_replayed_rows(way):
    x, y = rows(24)
    more_x, more_y = rows(5, seed=4)
    student, teacher = pair()
    replay = Replay(more_x, more_y)
    distiller = compiled(
        student,
        teacher,
        keras.optimizers.SGD(0.0),
        batch_transform=replay,
        metrics=["accuracy"],
        **WAYS[way],
    )
    history = distiller.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
    whole = np.concatenate([x, *[more_x] * 6])
    labels = np.concatenate([y, *[more_y] * 6])
    ours, theirs = student.predict(whole, verbose=0), teacher.predict(whole, verbose=0)
    assert history["student_loss"][0] == pytest.approx(hard_loss(ours, labels).mean(), rel=1e-5)
    assert history["soft_targets"][0] == pytest.approx(kl(theirs, ours, 2.0).mean(), rel=1e-5)
    assert history["accuracy"][0] == pytest.approx((ours.argmax(-1) == labels).mean())
    assert history["agreement"][0] == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean())
    assert int(replay.calls.numpy()) == 6
    assert len(distiller.trainable_variables) == 4
    # What it keeps may change between steps; evaluation knows nothing of it.
    replay.x.assign(np.zeros_like(more_x))
    again = distiller.fit(x, y, batch_size=24, shuffle=False, verbose=0).history
    whole, labels = np.concatenate([x, 0 * more_x]), np.concatenate([y, more_y])
    expected = hard_loss(student.predict(whole, verbose=0), labels).mean()
    assert again["student_loss"][0] == pytest.approx(expected, rel=1e-5)
    logs = distiller.evaluate(x, y, verbose=0, return_dict=True)
    expected = hard_loss(student.predict(x, verbose=0), y).mean()
    assert logs["student_loss"] == pytest.approx(expected, rel=1e-5)


def test_replayed_rows_with_weights_and_class_weights():
    x, y = rows(8)
    more = rows(4, seed=4)
    student, teacher = pair()
    distiller = compiled(student, teacher, keras.optimizers.SGD(0.0), batch_transform=Replay(*more))
    weight = np.linspace(0.5, 2, 8).astype("float32")
    history = distiller.fit(x, y, sample_weight=weight, batch_size=8, verbose=0).history
    whole, labels = np.concatenate([x, more[0]]), np.concatenate([y, more[1]])
    values = hard_loss(student.predict(whole, verbose=0), labels)
    expected = (values * np.concatenate([weight, np.ones(4)])).mean()
    assert history["student_loss"][0] == pytest.approx(expected, rel=1e-5)


def adversarial(batch, distiller, steps=2, training=True, size=0.1):
    """Signed steps up the crossentropy, with the student in the mode of training."""

    def loss(x):
        logits = distiller.student(x, training=training)
        return keras.losses.sparse_categorical_crossentropy(batch.y, logits, from_logits=True)

    x = batch.x
    for _ in range(steps):
        x = x + size * ops.sign(backends.gradient(loss, x))
    return batch._replace(x=x)


@pytest.mark.parametrize("way", list(WAYS))
def test_a_gradient_step_on_the_inputs_leaves_the_statistics(way):
    """The same numbers as training on inputs that were made before."""
    x, y = rows(12)
    results = []
    for inside in (True, False):
        keras.utils.set_random_seed(5)
        student, teacher = _normed(5, "student"), _normed(9, "teacher")
        before = teacher.get_weights()
        options = WAYS[way] if inside else {"run_eagerly": True}
        transform = functools.partial(adversarial) if inside else None
        distiller = compiled(
            student,
            teacher,
            batch_transform=transform,
            penalties=[Rows(name="size", weight=0.1)],
            **options,
        )
        if inside:
            distiller.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        else:
            for i in range(0, 12, 4):
                part = kd.Batch(ops.convert_to_tensor(x[i : i + 4]), y[i : i + 4])
                held = student.get_weights()
                made = ops.convert_to_numpy(adversarial(part, distiller).x)
                student.set_weights(held)
                assert np.abs(made - x[i : i + 4]).max() > 0.05
                distiller.train_on_batch(made, y[i : i + 4])
        for a, b in zip(before, teacher.get_weights()):
            np.testing.assert_array_equal(a, b)
        results.append(student.get_weights())
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_teacher_may_be_asked_in_the_transform():
    x, y = rows()
    student, teacher = pair()
    replaced = []

    def relabel(batch, distiller):
        replaced.append(1)
        answer = distiller.teacher(batch.x, training=False)
        return batch._replace(y=ops.argmax(answer, axis=-1), sample_weight=ops.ones((12,)) * 2)

    distiller = compiled(student, teacher, keras.optimizers.SGD(0.0), batch_transform=relabel)
    for factor in (1.0, -1.0):
        teacher.set_weights([factor * w for w in teacher.get_weights()])
        history = distiller.fit(x, y, verbose=0, batch_size=12, shuffle=False).history
        labels = teacher.predict(x, verbose=0).argmax(-1)
        expected = 2 * hard_loss(student.predict(x, verbose=0), labels).mean()
        assert history["student_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_random_transforms_draw_anew_and_measuring_draws_nothing():
    x, y = rows()
    student, teacher = pair()
    generator = keras.random.SeedGenerator(3)

    def noisy(batch, distiller):
        return batch._replace(x=batch.x + keras.random.normal(batch.x.shape, seed=generator))

    distiller = compiled(student, teacher, keras.optimizers.SGD(0.0), batch_transform=noisy)
    seed = generator.state.numpy()
    first = distiller.term_losses((x, y))
    assert first == distiller.term_losses((x, y))
    np.testing.assert_array_equal(seed, generator.state)
    losses = [float(distiller.train_on_batch(x, y, return_dict=True)["loss"])]
    distiller.reset_metrics()
    losses.append(float(distiller.train_on_batch(x, y, return_dict=True)["loss"]))
    assert losses[0] != losses[1]
    assert distiller.term_losses((x, y)) != first


def test_a_step_without_hooks_runs_each_model_once_and_with_them_no_more_traces():
    x, y = rows(24)
    student, teacher = pair()
    counter = Counted()
    inputs = keras.Input((FEATURES,))
    student = keras.Model(inputs, student(counter(inputs)))
    distiller = compiled(student, teacher, batch_transform=Replay(*rows(3)), jit_compile=False)
    distiller.fit(x, y, batch_size=4, verbose=0)
    count = counter.calls
    distiller.fit(x, y, batch_size=4, verbose=0)
    assert counter.calls == count


def test_row_numbers_stay_with_their_rows():
    x, y = rows()
    student, teacher = pair()
    crd = kd.Transfer(
        kd.losses.CRD(width=4, samples=len(x), negatives=3), teacher="hidden", student="hidden"
    )
    distiller = compiled(
        student, teacher, distillation_loss=crd, batch_transform=adversarial, run_eagerly=True
    )
    assert np.isfinite(distiller.fit(x, y, verbose=0).history["crd"]).all()
    distiller = compiled(
        student,
        teacher,
        distillation_loss=crd.fresh(),
        batch_transform=Replay(*rows(3)),
        run_eagerly=True,
    )
    with pytest.raises(ValueError, match="changes the number of rows.*12, 15"):
        distiller.fit(x, y, verbose=0)


def test_a_cached_teacher_answers_for_unchanged_inputs_alone(tmp_path):
    x, y = rows()
    student, teacher = pair()
    kd.cache.write(teacher, x, tmp_path / "cache")
    cached = kd.teachers.CachedTeacher(tmp_path / "cache")
    before = student.get_weights()
    for transform in (adversarial, Replay(*rows(3))):
        distiller = compiled(student, cached, batch_transform=transform)
        with pytest.raises(ValueError, match="changes the inputs, and the answers of the `Cached"):
            distiller.fit(x, y, verbose=0)
    for a, b in zip(before, student.get_weights()):
        np.testing.assert_array_equal(a, b)

    def flipped(batch, distiller):
        return batch._replace(y=CLASSES - 1 - batch.y)

    distiller = compiled(student, cached, keras.optimizers.SGD(0.0), batch_transform=flipped)
    history = distiller.fit(x, y, verbose=0).history
    expected = hard_loss(student.predict(x, verbose=0), CLASSES - 1 - y).mean()
    assert history["student_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_inputs_of_each_side_are_made_behind_the_transform():
    x, y = rows()
    student, teacher = pair()
    seen = []

    def doubled(batch, distiller):
        return batch._replace(x={"raw": 2 * batch.x["raw"]})

    class Seen(kd.Penalty):
        def __call__(self, distiller, batch):
            seen.append(batch)
            return ops.mean(batch.x)

    distiller = kd.Distiller(
        student,
        teacher,
        student_inputs=lambda x: x["raw"] + 1,
        teacher_inputs=lambda x: x["raw"] - 1,
    )
    distiller.compile(
        keras.optimizers.SGD(0.0), crossentropy(), batch_transform=doubled, penalties=[Seen()]
    )
    history = distiller.fit({"raw": x}, y, verbose=0).history
    ours = student.predict(2 * x + 1, verbose=0)
    theirs = teacher.predict(2 * x - 1, verbose=0)
    assert history["soft_targets"][0] == pytest.approx(kl(theirs, ours, 1.0).mean(), rel=1e-5)
    assert history["seen"][0] == pytest.approx((2 * x + 1).mean(), rel=1e-4)


# -------------------------------------------------------------------------- files


@keras.saving.register_keras_serializable(package="tests_hooks")
def registered_noise(batch, distiller):
    return batch._replace(x=batch.x + 0.125)


@keras.saving.register_keras_serializable(package="tests_hooks")
class Shift:
    """A transform with a state."""

    def __init__(self, by):
        self.by = by
        self.steps = keras.Variable(0.0)

    def __call__(self, batch, distiller):
        self.steps.assign_add(1.0)
        return batch._replace(x=batch.x + self.by * self.steps)

    def get_config(self):
        return {"by": self.by}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@pytest.mark.parametrize("make", [lambda: registered_noise, lambda: Shift(0.25)])
def test_saved_and_going_on(tmp_path, make):
    x, y = rows()

    def begun():
        keras.utils.set_random_seed(3)
        student, teacher = pair()
        penalty = L2ToStart(weight=0.5, name="pull")
        distiller = compiled(
            student,
            teacher,
            keras.optimizers.Adam(0.01),
            penalties=[penalty],
            batch_transform=make(),
            run_eagerly=True,
        )
        distiller.fit(x, y, epochs=2, batch_size=4, shuffle=False, verbose=0)
        penalty.weight = 0.25
        return distiller

    whole = begun()
    whole.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=whole.teacher)
    assert [term.name for term in loaded.penalties] == ["pull"]
    assert float(loaded.penalties[0].weight.numpy()) == 0.25
    assert loaded.get_compile_config()["penalties"] == whole.get_compile_config()["penalties"]
    for a, b in zip(whole.penalties[0].it.start, loaded.penalties[0].it.start, strict=True):
        np.testing.assert_array_equal(a, b)
    histories = [
        d.fit(x, y, epochs=2, batch_size=4, shuffle=False, verbose=0).history
        for d in (whole, loaded)
    ]
    assert histories[0] == histories[1]
    assert histories[0]["pull"][0] > 0


def test_what_no_file_can_name_is_refused_by_name(tmp_path):
    student, teacher = pair()

    def local(batch, distiller):
        return batch

    class Plain:
        name, weight = "mine", 1.0

        def __call__(self, distiller, batch):
            return ops.zeros(())

    for options, match in (
        ({"penalties": [Rows(name="size")]}, "the penalty `size` is `Rows`.*get_config"),
        ({"penalties": [Plain()]}, "the penalty `mine` is .*Plain`.*register_keras_serializable"),
        ({"batch_transform": local}, "`batch_transform` is .*local`.*register_keras_serializable"),
        ({"batch_transform": lambda batch, distiller: batch}, "lambda"),
        ({"batch_transform": functools.partial(adversarial, steps=1)}, "partial"),
    ):
        distiller = compiled(student, teacher, **options)
        (tmp_path / "d.keras").write_text("of before")
        with pytest.raises(ValueError, match=match):
            distiller.save(tmp_path / "d.keras")
        assert (tmp_path / "d.keras").read_text() == "of before"
        with pytest.raises(ValueError, match=match):
            keras.saving.save_model(distiller, tmp_path / "e.keras")
        distiller.save_weights(tmp_path / "d.weights.h5")
        distiller.load_weights(tmp_path / "d.weights.h5")


def test_a_backup_knows_the_hooks(tmp_path):
    x, y = rows()

    def train(stop, **options):
        keras.utils.clear_session()
        keras.utils.set_random_seed(3)
        distiller = compiled(*pair(), run_eagerly=True, **options)
        backup = kd.callbacks.ResumableBackup(tmp_path / "backup", save_freq=1)

        def stop_at(epoch, logs):
            if epoch == stop:
                raise KeyboardInterrupt

        callbacks = [backup, keras.callbacks.LambdaCallback(on_epoch_end=stop_at)]
        distiller.fit(x, y, epochs=3, batch_size=6, verbose=0, callbacks=callbacks)
        return distiller

    options = {"penalties": [L2ToStart(0.5)], "batch_transform": Shift(0.25)}
    whole = train(None, **options)
    fresh = {"penalties": [L2ToStart(0.5)], "batch_transform": Shift(0.25)}
    with pytest.raises(KeyboardInterrupt):
        train(0, **fresh)
    with pytest.raises(ValueError, match="backup of another training"):
        train(None, penalties=[L2ToStart(0.75)], batch_transform=Shift(0.25))
    with pytest.raises(ValueError, match="backup of another training"):
        train(None, penalties=[L2ToStart(0.5)], batch_transform=lambda batch, d: batch)
    again = train(None, penalties=[L2ToStart(0.5)], batch_transform=Shift(0.25))
    for a, b in zip(whole.student.get_weights(), again.student.get_weights()):
        np.testing.assert_array_equal(a, b)


# ----------------------------------------------------------------------- bad input


class Bare(kd.Penalty):
    pass


def _foreign(**attributes):
    return type("Foreign", (), {"__call__": lambda self, d, b: 0.0, **attributes})()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"penalties": L2ToStart()}, TypeError, r"is a list of penalties.*penalties=\[penalty\]"),
        ({"penalties": [L2ToStart]}, TypeError, "Pass an instance, not the class"),
        ({"penalties": [3]}, TypeError, r"`penalties\[0\]` is called with `\(distiller, batch\)`"),
        ({"penalties": [Bare()]}, TypeError, "`Bare`, defines no `__call__"),
        ({"penalties": [_foreign(name="a")]}, TypeError, "has no `weight`"),
        ({"penalties": [_foreign(weight=1.0)]}, TypeError, "has no `name`"),
        ({"penalties": [_foreign(name=3, weight=1.0)]}, TypeError, "`name`.*is a string"),
        ({"penalties": [_foreign(name="a", weight="1")]}, TypeError, "`weight` of the penalty `a`"),
        ({"penalties": [_foreign(name="a", weight=-1)]}, ValueError, "not negative"),
        (
            {"penalties": [_foreign(name="a", weight=1, __call__=lambda self, batch: 0.0)]},
            TypeError,
            r"it takes \(batch\)",
        ),
        ({"penalties": [Rows(name="a"), Rows(name="a")]}, ValueError, "`a` is used twice"),
        ({"penalties": [Rows(name="soft_targets")]}, ValueError, "`soft_targets` is used twice"),
        ({"penalties": [Rows(name="agreement")]}, ValueError, "is a log of the distiller"),
        ({"penalties": [Rows(name="loss")]}, ValueError, "is a log of the distiller"),
        ({"penalties": [Rows(name="val_a")]}, ValueError, "looks like, another log"),
        (
            {"penalties": [Rows(name="accuracy")], "metrics": ["accuracy"]},
            ValueError,
            "`accuracy` is, or looks like, another log",
        ),
        ({"batch_transform": 3}, TypeError, r"`batch_transform` is called with `\(batch, dist"),
        ({"batch_transform": lambda batch: batch}, TypeError, r"it takes \(batch\)"),
        ({"batch_transform": Shift}, TypeError, "Pass an instance"),
    ],
)
def test_refused_by_compile(options, error, match):
    student, teacher = pair()
    distiller = compiled(student, teacher, penalties=[Rows(name="size")])
    books, config = distiller.penalties[0], distiller.compile_settings()
    with pytest.raises(error, match=match):
        distiller.compile("sgd", **{"loss": crossentropy(), **options})
    assert distiller.penalties == [books]
    assert distiller.compile_settings() == config


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf, True, "1", None])
def test_weights_out_of_range(weight):
    with pytest.raises((TypeError, ValueError), match="`weight` of the penalty `rows`"):
        Rows(weight=weight)
    penalty = Rows()
    with pytest.raises((TypeError, ValueError), match="`weight` of the penalty `rows`"):
        penalty.weight = weight


def test_a_penalty_of_another_student():
    penalty = L2ToStart()
    compiled(*pair(), penalties=[penalty])
    with pytest.raises(ValueError, match="built for another student"):
        compiled(*pair(), penalties=[penalty])
    unbuilt = keras.Sequential([layers.Dense(CLASSES)], name="novice")
    with pytest.raises(ValueError, match="reads the weights of the student `novice`"):
        compiled(unbuilt, mlp(name="teacher"), penalties=[L2ToStart()])


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (lambda d, b: None, TypeError, "`mine` returns a tensor"),
        (lambda d, b: "3", TypeError, "`mine` returns"),
        (lambda d, b: b.x > 0, TypeError, "real numbers.*bool"),
        (lambda d, b: b.x, ValueError, r"`\(12,\)`.*shape \(12, 6\)"),
        (lambda d, b: d.student(b.x)[:, :1], ValueError, r"shape \(12, 1\)"),
        (lambda d, b: b.x[0], ValueError, r"shape \(6,\)"),
    ],
)
def test_penalties_that_return_something_else(returned, error, match):
    x, y = rows()
    penalty = _foreign(name="mine", weight=1.0, __call__=lambda self, d, b: returned(d, b))
    distiller = compiled(*pair(), penalties=[penalty], run_eagerly=True)
    with pytest.raises(error, match=match):
        distiller.train_on_batch(x, y)


@pytest.mark.parametrize(
    ("transform", "error", "match"),
    [
        (lambda b, d: None, TypeError, r"returns a `keras_kd\.Batch`.*NoneType"),
        (lambda b, d: (b.x, b.y), TypeError, "tuple"),
        (lambda b, d: b._replace(x=None), ValueError, "without inputs"),
        (lambda b, d: b._replace(y=None), ValueError, "without its labels"),
        (lambda b, d: b._replace(x=ops.concatenate([b.x, b.x])), ValueError, r"x \[24\], y \[12\]"),
        (lambda b, d: b._replace(sample_weight=ops.ones((3,))), ValueError, r"weight \[3\]"),
        (lambda b, d: kd.Batch(b.x[:0], b.y[:0]), ValueError, "at least one row"),
    ],
)
def test_transforms_that_return_something_else(transform, error, match):
    x, y = rows()
    for eager in (True, False):
        distiller = compiled(*pair(), batch_transform=transform, run_eagerly=eager)
        before = distiller.student.get_weights()
        with pytest.raises(error, match=match):
            distiller.train_on_batch(x, y)
        for a, b in zip(before, distiller.student.get_weights()):
            np.testing.assert_array_equal(a, b)


def test_hooks_of_before_are_forgotten():
    x, y = rows()
    distiller = compiled(*pair(), penalties=[L2ToStart()], batch_transform=Replay(*rows(3)))
    count = len(distiller.variables)
    distiller.compile(keras.optimizers.SGD(0.1), crossentropy())
    assert len(distiller.variables) < count
    history = distiller.fit(x, y, verbose=0).history
    assert "l2_to_start" not in history


# ------------------------------------------------------------------------ gradient


def test_the_gradient_of_inputs():
    x, _ = rows()
    w = np.random.default_rng(0).normal(size=(FEATURES,)).astype("float32")
    found = backends.gradient(lambda x: ops.square(ops.matmul(x, w)), x)
    np.testing.assert_allclose(found, 2 * (x @ w)[:, None] * w, rtol=1e-4, atol=1e-5)
    pairs = {"a": x, "b": 2 * x}
    found = backends.gradient(lambda p: p["a"] ** 3, pairs)
    np.testing.assert_allclose(found["a"], 3 * x**2, rtol=1e-5)
    np.testing.assert_array_equal(found["b"], np.zeros_like(x))
    gathered = backends.gradient(lambda x: ops.take(x, [0, 0, 3], axis=0), x)
    np.testing.assert_array_equal(ops.convert_to_numpy(gathered)[:, 0], [2, 0, 0, 1] + [0] * 8)
    with pytest.raises(TypeError, match="int32"):
        backends.gradient(lambda x: x, np.arange(3, dtype="int32"))


def test_a_penalty_on_gradients_is_differentiated_in_turn():
    """`sum_i |d f / d x|^2` of a linear model is `batch |w|^2`, with gradient `2 batch w`."""
    x, _ = rows()
    inputs = keras.Input((FEATURES,))
    student = keras.Model(inputs, layers.Dense(1, use_bias=False)(inputs))

    class Steepness(kd.Penalty):
        def __call__(self, distiller, batch):
            slope = backends.gradient(distiller.student, batch.x, differentiable=True)
            return ops.sum(ops.square(slope), axis=-1)

    distiller = kd.Distiller(student)
    distiller.compile(keras.optimizers.SGD(0.1), "mse", penalties=[Steepness()])
    (w,) = student.get_weights()
    logs = distiller.term_losses((x, x @ w)), distiller.gradient_norms((x, x @ w))
    assert logs[0]["steepness"] == pytest.approx((w**2).sum(), rel=1e-5)
    assert logs[1]["steepness"] == pytest.approx(2 * np.sqrt((w**2).sum()), rel=1e-5)
