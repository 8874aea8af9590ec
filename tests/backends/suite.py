"""What must hold on every backend: collected where that is TensorFlow, see `conftest.py`.

`test_backends.py` runs it for the others, each in its own process. The folder in `KERAS_KD_SUITE`
takes what they are compared by.
"""

import os
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops
from twenty_steps import (
    CLASSES,
    arrays,
    crossentropy,
    mlp,
    same,
    student_and_teacher,
    twenty_steps,
    weights_of,
)

import keras_kd as kd
import keras_kd.cache.reader
from keras_kd import backends
from keras_kd.distill.batch import without_gradient
from keras_kd.models.model_reader import Answer

BACKEND = keras.config.backend()


@pytest.fixture
def shared():
    return arrays()


@pytest.fixture
def pair(shared):
    return student_and_teacher(shared)


@pytest.fixture
def rows(shared):
    return shared["x"], shared["y"]


def softened_kl(teacher, student, temperature):
    def log_softmax(z):
        z = np.asarray(z, "float64") / temperature
        return (
            z
            - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - z.max(-1, keepdims=True)
        )

    p, q = log_softmax(teacher), log_softmax(student)
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)


def test_twenty_steps():
    numbers = twenty_steps()
    if "KERAS_KD_SUITE" in os.environ:
        np.savez(Path(os.environ["KERAS_KD_SUITE"]) / f"{BACKEND}.npz", **numbers)


def test_masks(shared):
    """Padded positions count for nothing, in the logits and in tapped layers."""

    def tokens(width, name):
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Embedding(11, width, "normal", mask_zero=True, name="embedding")(inputs)
        return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name=name)

    student, teacher = tokens(3, "student"), tokens(4, "teacher")
    teacher.set_weights([50 * w for w in teacher.get_weights()])
    x, y = shared["tokens"], shared["token_labels"]
    theirs, ours = (ops.convert_to_numpy(model(x)) for model in (teacher, student))
    expected = softened_kl(theirs, ours, 2.0)[x != 0].mean()
    agreement = (theirs.argmax(-1) == ours.argmax(-1))[x != 0].mean()
    embedding = np.mean(ops.convert_to_numpy(teacher.get_layer("embedding")(x))[x != 0] ** 2)
    distiller = kd.Distiller(student, teacher)
    zero = kd.Transfer(
        kd.losses.HiddenState(),
        teacher="embedding",
        student="embedding",
        projector=layers.Dense(4, kernel_initializer="zeros"),
    )
    distiller.compile(
        "sgd",
        loss=crossentropy(),
        distillation_loss=[kd.losses.SoftTargets(), zero],
        temperature=2.0,
        evaluate_distillation=True,
    )
    logs = distiller.evaluate(x, y, batch_size=len(x), return_dict=True, verbose=0)
    np.testing.assert_allclose(logs["soft_targets"], expected, rtol=1e-5)
    np.testing.assert_allclose(logs["agreement"], agreement, rtol=1e-5)
    np.testing.assert_allclose(logs["hidden_state"], embedding, rtol=1e-5)
    after = distiller.fit(x, y, batch_size=len(x), epochs=3, verbose=0).history["soft_targets"]
    np.testing.assert_allclose(after[0], expected, rtol=1e-5)
    assert after[-1] < after[0]


def test_what_counts(shared, tmp_path):
    """A mask of the teacher alone, weights and ignored labels, live and from a cache."""

    def tokens(width, name, masked):
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Embedding(11, width, mask_zero=masked)(inputs)
        model = keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name=name)
        rng = np.random.default_rng(width)
        model.set_weights([rng.normal(0, 1, w.shape) for w in model.get_weights()])
        return model

    teacher, student = tokens(4, "teacher", True), tokens(3, "student", False)
    x, y = shared["tokens"], np.array(shared["token_labels"])
    y[:, 1], y[0] = -1, -1
    weight = np.random.default_rng(0).uniform(0.5, 2, x.shape).astype("float32")
    weight[1, 0] = 0
    theirs, ours = (ops.convert_to_numpy(model(x)) for model in (teacher, student))
    hard = (x != 0) & (y >= 0)
    soft = (x != 0) & ((y >= 0) | ~hard.any(1, keepdims=True))
    p = ours - np.log(np.exp(ours).sum(-1, keepdims=True))
    crossentropies = -np.take_along_axis(p, np.maximum(y, 0)[..., None], -1)[..., 0]
    same = theirs.argmax(-1) == ours.argmax(-1)
    expected = {
        "student_loss": (crossentropies * weight * hard).sum() / hard.sum(),
        "soft_targets": (softened_kl(theirs, ours, 2.0) * weight * soft).sum() / soft.sum(),
        "agreement": (same * weight * soft).sum() / (weight * soft).sum(),
    }
    kd.cache.write(teacher, x, tmp_path / "cache", dtype="float32")
    for source in (teacher, kd.teachers.CachedTeacher(tmp_path / "cache")):
        distiller = kd.Distiller(student, source)
        distiller.compile(
            keras.optimizers.SGD(0.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1),
            distillation_loss=[kd.losses.SoftTargets(), kd.losses.DIST()],
            temperature=2.0,
        )
        logs = distiller.fit(x, y, sample_weight=weight, batch_size=len(x), verbose=0).history
        for name, value in expected.items():
            np.testing.assert_allclose(logs[name][0], value, rtol=1e-5, err_msg=name)
        expected["dist"] = logs["dist"][0]


@pytest.mark.parametrize("options", [{}, {"jit_compile": True, "steps_per_execution": 2}])
def test_a_black_box_is_asked_from_the_compiled_step(pair, rows, tmp_path, options):
    # Without statistics of batches.
    inputs = keras.Input((6,))
    student = keras.Model(inputs, layers.Dense(CLASSES)(inputs), name="student")
    model = pair[1]
    x, y = rows
    kernel = np.random.default_rng(4).normal(size=(6, CLASSES))
    seen = []

    def predict(x):
        assert type(x) is np.ndarray
        seen.append(len(x))
        return np.where(x[:, :1] > 90, np.nan, x @ kernel)

    if BACKEND == "torch":
        # It takes one step at a time, and compiles with a C++ compiler that may not be there.
        options = {}
    box = kd.teachers.BlackBox(predict, name="box")
    distiller = kd.Distiller(student, kd.teachers.Ensemble([model, box], combine="logits"))
    distiller.compile(keras.optimizers.SGD(0.0), crossentropy(), temperature=2.0, **options)
    logs = distiller.fit(x, y, batch_size=25, shuffle=False, verbose=0).history
    theirs = (ops.convert_to_numpy(model(x)) + x @ kernel) / 2
    expected = softened_kl(theirs, ops.convert_to_numpy(student(x)), 2.0).mean()
    np.testing.assert_allclose(logs["soft_targets"][0], expected, rtol=1e-4)
    assert sorted(seen)[-len(x) // 25 :] == [25] * (len(x) // 25)
    kd.cache.write(box, x, tmp_path / "cache", dtype="float32")
    record = kd.cache.reader.Records(tmp_path / "cache").read(np.arange(len(x)))
    np.testing.assert_allclose(record["logits_0"], x @ kernel, rtol=1e-4, atol=1e-5)
    wrong = np.array(x)
    wrong[40:42, 0] = 100
    distiller = kd.Distiller(student, box)
    distiller.compile("sgd", crossentropy(), **options)
    with pytest.raises(ValueError, match="`box` answered NaN or infinity for rows 15 to 16 of "):
        distiller.fit(wrong, y, batch_size=25, shuffle=False, verbose=0)
    assert all(np.isfinite(w).all() for w in weights_of(student))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy, rows):
    x, y = rows
    student, teacher = mlp(5, "student", dtype=policy), mlp(9, "teacher", dtype=policy)
    before = weights_of(teacher)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.Adam(0.02),
        loss=crossentropy(),
        distillation_loss=[
            kd.losses.SoftTargets(),
            kd.Transfer(kd.losses.Hint(), teacher="relu", student="relu", projector="linear"),
        ],
    )
    history = distiller.fit(x, y, batch_size=25, epochs=4, verbose=0).history
    assert np.isfinite(list(history.values())).all()
    assert history["loss"][-1] < history["loss"][0]
    assert same(before, weights_of(teacher))
    scaled = type(distiller.optimizer).__name__ == "LossScaleOptimizer"
    assert scaled == (policy == "mixed_float16")


def test_without_labels(pair, rows):
    student, teacher = pair
    x, _ = rows
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.Adam(0.02), loss=None)
    history = distiller.fit(x, epochs=3, batch_size=25, verbose=0).history
    assert history["soft_targets"][-1] < history["soft_targets"][0]
    assert "student_loss" not in history


def test_several_outputs_by_name(rows):
    x, y = rows

    def heads(width, name):
        inputs = keras.Input((6,))
        hidden = layers.Dense(width, activation="relu", name="hidden")(inputs)
        return keras.Model(
            inputs,
            {
                "kind": layers.Dense(CLASSES, name="kind")(hidden),
                "flags": layers.Dense(3, activation="sigmoid", name="flags")(hidden),
            },
            name=name,
        )

    flags = (x[:, :3] > 0).astype("float32")
    distiller = kd.Distiller(heads(4, "student"), heads(8, "teacher"))
    distiller.compile(
        keras.optimizers.Adam(0.02),
        loss={"kind": crossentropy(), "flags": "binary_crossentropy"},
        distillation_loss={
            "kind": kd.losses.SoftTargets(),
            "flags": kd.losses.BinarySoftTargets(),
        },
    )
    history = distiller.fit(
        x, {"kind": y, "flags": flags}, epochs=3, batch_size=25, verbose=0
    ).history
    assert history["loss"][-1] < history["loss"][0]
    assert {"kind_soft_targets", "flags_binary_soft_targets"} <= set(history)
    assert set(distiller.predict(x[:3], verbose=0)) == {"kind", "flags"}


def test_what_outputs_mean(shared):
    """A softmax at every step, a regression beside it, and decisions counted as the loss counts."""
    x = shared["tokens"][..., None] * np.float32([0.3, -0.2, 0.1])
    y = np.where(shared["tokens"] % 3 == 0, -1, shared["token_labels"])
    weight = shared["weights"][:12]

    def model(name):
        inputs = keras.Input((5, 3))
        last = layers.Dense(CLASSES, activation="softmax")
        steps = layers.TimeDistributed(last, name="steps")(inputs)
        age = layers.Dense(1, activation="softplus")(layers.Flatten()(inputs))
        return keras.Model(inputs, {"steps": steps, "age": age}, name=name)

    keras.utils.set_random_seed(3)
    student, teacher = model("student"), model("teacher")
    teacher.set_weights([30 * w for w in teacher.get_weights()])
    loss = {
        "steps": keras.losses.SparseCategoricalCrossentropy(ignore_class=-1),
        "age": "mse",
    }
    distiller = kd.Distiller(student, teacher)
    with pytest.raises(ValueError, match="output `age`.*a regression"):
        distiller.compile("sgd", loss)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        loss,
        distillation_loss={"steps": kd.losses.LogitMSE(), "age": "mse"},
    )
    logs = distiller.train_on_batch(
        x, {"steps": y, "age": weight[:, None]}, {"steps": weight, "age": None}, return_dict=True
    )
    kernels = [m.get_layer("steps").get_weights()[0] for m in (student, teacher)]
    s, t = (x @ kernel for kernel in kernels)
    labeled = y >= 0
    # A row without any label goes on distilling, and counts.
    counts = weight[:, None] * (labeled | ~labeled.any(axis=-1, keepdims=True))
    expected = ((s.argmax(-1) == t.argmax(-1)) * counts).sum() / counts.sum()
    np.testing.assert_allclose(logs["agreement"], expected, rtol=1e-5)
    a, b = (m.predict(x, verbose=0)["age"] for m in (student, teacher))
    np.testing.assert_allclose(logs["age_mean_squared_error"], ((a - b) ** 2).mean(), rtol=1e-4)
    inputs = keras.Input((5, 3))
    parts = [layers.Dense(CLASSES, activation="softmax")(inputs) for _ in range(2)]
    average = keras.Model(inputs, layers.Average()(parts))
    with pytest.raises(ValueError, match="computed from probabilities"):
        kd.Distiller(keras.Model(inputs, parts[0]), average).compile("sgd", None)


def test_saved_and_resumed_bit_for_bit(pair, rows, tmp_path):
    student, teacher = pair
    x, y = rows

    def compiled(distiller):
        distiller.compile(
            keras.optimizers.Adam(0.01),
            loss=crossentropy(),
            distillation_loss=[
                kd.losses.SoftTargets(),
                kd.Transfer(kd.losses.Hint(), teacher="relu", student="relu", projector="linear"),
            ],
            temperature=3.0,
        )
        return distiller

    whole = compiled(kd.Distiller(student, teacher))
    whole.fit(x, y, epochs=1, batch_size=25, shuffle=False, verbose=0)
    whole.save(tmp_path / "d.keras")
    resumed = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    for distiller in (whole, resumed):
        distiller.fit(x, y, epochs=2, batch_size=25, shuffle=False, verbose=0)
    assert same(weights_of(whole.student), weights_of(resumed.student))
    assert float(resumed.temperature) == 3.0
    student.save(tmp_path / "student.keras")
    smaller, larger = (os.path.getsize(tmp_path / f) for f in ("student.keras", "d.keras"))
    assert larger < 6 * smaller


def test_ensemble(pair, rows):
    student, teacher = pair
    x, y = rows
    other = mlp(7, "other")
    distiller = kd.Distiller(student, kd.teachers.Ensemble([teacher, other], weights=[3.0, 1.0]))
    distiller.compile("sgd", loss=crossentropy(), temperature=2.0, evaluate_distillation=True)
    logs = distiller.evaluate(x, y, batch_size=len(x), return_dict=True, verbose=0)

    def softmax(z):
        z = np.exp(np.asarray(ops.convert_to_numpy(z), "float64"))
        return z / z.sum(-1, keepdims=True)

    mixed = np.log(0.75 * softmax(teacher(x)) + 0.25 * softmax(other(x)))
    expected = softened_kl(mixed, ops.convert_to_numpy(student(x)), 2.0).mean()
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-5)
    distiller.fit(x, y, epochs=1, batch_size=25, verbose=0)


def test_evaluate_changes_nothing(pair, rows):
    student, teacher = pair
    x, y = rows
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy(), temperature=2.0, evaluate_distillation=True)
    before = weights_of(distiller)
    logs = distiller.evaluate(x, y, batch_size=20, return_dict=True, verbose=0)
    expected = softened_kl(ops.convert_to_numpy(teacher(x)), ops.convert_to_numpy(student(x)), 2.0)
    np.testing.assert_allclose(logs["soft_targets"], expected.mean(), rtol=1e-5)
    assert same(before, weights_of(distiller))
    np.testing.assert_allclose(
        distiller.predict(x, verbose=0), ops.convert_to_numpy(student(x)), rtol=1e-5, atol=1e-6
    )


def test_failing_teacher_stops_the_fit(pair, rows):
    student, teacher = pair
    x, y = rows
    broken = teacher.get_weights()
    broken[-1][0] = np.nan

    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                teacher.set_weights(broken)

    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy())
    with pytest.raises(FloatingPointError, match="teacher"):
        distiller.fit(x, y, epochs=3, batch_size=25, verbose=0, callbacks=[Break()])
    assert all(np.isfinite(w).all() for w in student.get_weights())


@pytest.mark.parametrize("classes", [3, 33, 100, 5000])
def test_one_nan_among_many_answers_is_found(classes):
    """XLA's max and min lose it; on TensorFlow this is compiled by XLA."""

    def finite(logits):
        return without_gradient(Answer(None, [logits], {}), False)[1]

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        finite = tf.function(finite, jit_compile=True)
    logits = np.zeros((4, 4, classes), "float32")
    assert bool(finite(ops.convert_to_tensor(logits)))
    for place in (0, classes // 2, classes - 1):
        broken = logits.copy()
        broken[2, 1, place] = np.nan
        assert not bool(finite(ops.convert_to_tensor(broken)))


def test_teacher_works_during_and_after_fit(pair, rows):
    """Its weights are neither given away to the step nor frozen into it."""
    student, teacher = pair
    x, _ = rows
    before = weights_of(teacher)
    arrays = [variable.value for variable in teacher.variables]
    answers = []

    class Ask(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            answers.append(ops.convert_to_numpy(teacher(x[:3])))

    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None)
    # A batch of all rows and a learning rate of zero: the loss depends on the teacher alone.
    distiller.optimizer.learning_rate = 0.0
    first = distiller.fit(x, batch_size=len(x), verbose=0, callbacks=[Ask()], shuffle=False)
    assert same(answers, [ops.convert_to_numpy(teacher(x[:3]))])
    assert same(before, weights_of(teacher))
    assert same(before, [ops.convert_to_numpy(array) for array in arrays])
    teacher.set_weights([2 * w for w in before])
    second = distiller.fit(x, batch_size=len(x), verbose=0, shuffle=False)
    assert first.history["loss"] != second.history["loss"]


def test_teacher_leaves_nothing_in_the_step(pair, rows):
    """No graph for its gradients on PyTorch, no constants of its size on JAX."""
    student, teacher = pair
    x, y = rows
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy())
    distiller.fit(x, y, batch_size=25, verbose=0)
    if BACKEND == "torch":
        seen = []
        with_grad = teacher.get_layer("logits").call

        def call(inputs, training=None):
            result = with_grad(inputs)
            seen.append(result.requires_grad)
            return result

        teacher.get_layer("logits").call = call
        distiller.fit(x, y, batch_size=25, verbose=0)
        assert seen
        assert not any(seen)
    elif BACKEND == "jax":
        import jax

        from keras_kd import backends

        state = tuple(
            [v.value for v in variables]
            for variables in (
                distiller.trainable_variables,
                distiller.non_trainable_variables,
                distiller.optimizer.variables,
                distiller.metrics_variables,
            )
        )
        weights = [v.value for v in teacher.variables]
        batch = backends.Supplied((x[:25], y[:25]), weights)
        traced = jax.make_jaxpr(distiller.train_step)(state, batch)
        assert all(np.size(constant) < 2 for constant in traced.consts)


class L2ToStart(kd.Penalty):
    def build(self, distiller):
        weights = distiller.student.trainable_variables
        self.start = [keras.Variable(ops.copy(w)) for w in weights]

    def __call__(self, distiller, batch):
        pairs = zip(distiller.student.trainable_variables, self.start, strict=True)
        return sum(ops.sum(ops.square(w - start)) for w, start in pairs)


def test_a_penalty_is_its_value_and_gradient(pair, rows):
    student, teacher = pair
    penalty = L2ToStart(weight=0.3)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), crossentropy(), penalties=[penalty])
    start = [np.array(v) for v in map(ops.convert_to_numpy, student.trainable_variables)]
    held = weights_of(student)
    rng = np.random.default_rng(3)
    for w in held:
        w += rng.uniform(0, 0.2, w.shape)
    after, logs = [], []
    for weight in (0.3, 0.0):
        student.set_weights(held)
        penalty.weight = weight
        moved = [np.array(v) for v in map(ops.convert_to_numpy, student.trainable_variables)]
        logs.append(distiller.train_on_batch(*rows, return_dict=True))
        distiller.reset_metrics()
        after.append([np.array(v) for v in map(ops.convert_to_numpy, student.trainable_variables)])
    value = sum(((a.astype("float64") - b) ** 2).sum() for a, b in zip(moved, start))
    for log in logs:
        assert float(log["l2_to_start"]) == pytest.approx(value, rel=1e-5)
    assert float(logs[0]["loss"] - logs[1]["loss"]) == pytest.approx(0.3 * value, rel=1e-4)
    for a, b, m, s in zip(*after, moved, start):
        np.testing.assert_allclose(b - a, 0.1 * 0.3 * 2 * (m - s), rtol=1e-3, atol=2e-6)
    assert distiller.term_losses(rows)["l2_to_start"] > 0
    assert len(distiller.trainable_variables) == len(student.trainable_variables)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow copies")
def test_a_weight_that_is_no_copy_is_refused(pair):
    student, teacher = pair

    class Alias(L2ToStart):
        def build(self, distiller):
            self.start = [keras.Variable(w) for w in distiller.student.trainable_variables]

    class View(L2ToStart):
        def build(self, distiller):
            weights = distiller.student.trainable_variables
            self.start = [w.value.detach().numpy() for w in weights]

    distiller = kd.Distiller(student, teacher)
    for penalty in [Alias(), View()] if BACKEND == "torch" else [Alias()]:
        with pytest.raises(ValueError, match="the weight itself and no record of it"):
            distiller.compile("sgd", crossentropy(), penalties=[penalty])
    assert not distiller.compiled


class Hostile:
    """Replayed rows from a Variable, noise, and a gradient step in the mode of training."""

    def __init__(self, x, y):
        self.x, self.y = keras.Variable(x, name="memory"), y
        self.calls = keras.Variable(0.0, trainable=False)
        self.seed = keras.random.SeedGenerator(3)
        self.noise = 0.0

    def __call__(self, batch, distiller):
        self.calls.assign_add(1.0)

        def loss(x):
            logits = distiller.student(x, training=True)
            return keras.losses.sparse_categorical_crossentropy(batch.y, logits, from_logits=True)

        x = batch.x + self.noise * keras.random.normal((10, 6), seed=self.seed)
        for _ in range(2):
            x = x + 0.1 * ops.sign(backends.gradient(loss, x))
        y = ops.cast(ops.convert_to_tensor(self.y), batch.y.dtype)
        return kd.Batch(ops.concatenate([x, self.x]), ops.concatenate([batch.y, y]))


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_transform_changes_the_batch_and_not_the_models(pair, rows, way):
    """The same weights and statistics as training on batches that were made before."""
    student, teacher = pair
    x, y = rows
    start, theirs = weights_of(student), weights_of(teacher)
    transform = Hostile(x[40:43], y[40:43])
    options = {"run_eagerly": True}
    if way == "compiled":
        options = {} if BACKEND == "torch" else {"jit_compile": True, "steps_per_execution": 2}
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.1), crossentropy(), batch_transform=transform, **options
    )
    distiller.fit(x[:40], y[:40], batch_size=10, shuffle=False, verbose=0)
    assert float(ops.convert_to_numpy(transform.calls)) == 4
    assert same(theirs, weights_of(teacher))
    found = weights_of(student)
    student.set_weights(start)
    plain = kd.Distiller(student, teacher)
    plain.compile(keras.optimizers.SGD(0.1), crossentropy(), run_eagerly=True)
    for i in range(0, 40, 10):
        held = weights_of(student)
        part = kd.Batch(*map(ops.convert_to_tensor, (x[i : i + 10], y[i : i + 10])))
        made = [ops.convert_to_numpy(each) for each in transform(part, plain)[:2]]
        student.set_weights(held)
        plain.train_on_batch(*made)
    for a, b in zip(found, weights_of(student)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # What it keeps is live, and its random numbers go on.
    losses = []
    distiller.optimizer.learning_rate = 0.0
    for x_kept in (x[40:43], 0 * x[40:43]):
        transform.x.assign(x_kept)
        losses.append(distiller.fit(x[:10], y[:10], batch_size=10, verbose=0).history["loss"][0])
    assert losses[0] != losses[1]
    before = np.array(ops.convert_to_numpy(transform.seed.state))
    distiller.fit(x[:10], y[:10], batch_size=10, verbose=0)
    assert (before != ops.convert_to_numpy(transform.seed.state)).any()


def test_hooks_run_the_teacher_as_it_is(pair, rows):
    student, teacher = pair
    x, y = rows

    def relabel(batch, distiller):
        answer = distiller.teacher(batch.x, training=False)
        return batch._replace(y=ops.argmax(answer, axis=-1))

    class Gap(kd.Penalty):
        def __call__(self, distiller, batch):
            theirs = ops.stop_gradient(distiller.teacher(batch.x, training=False))
            return ops.mean(ops.square(theirs), axis=-1)

    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0), crossentropy(), batch_transform=relabel, penalties=[Gap()]
    )
    for factor in (1.0, -1.0):
        teacher.set_weights(
            [*teacher.get_weights()[:-2], *(factor * w for w in teacher.get_weights()[-2:])]
        )
        history = distiller.fit(x, y, batch_size=50, verbose=0).history
        logits = teacher.predict(x, verbose=0)
        assert history["gap"][0] == pytest.approx((logits**2).mean(), rel=1e-4)
        evaluated = distiller.term_losses((x, logits.argmax(-1)))
        assert history["student_loss"][0] == pytest.approx(evaluated["student_loss"], rel=1e-4)


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere what the step assigns is assigned")
def test_a_variable_that_nobody_could_find_is_refused(pair, rows):
    import types

    hidden = types.ModuleType("hidden")
    hidden.count = keras.Variable(0.0)

    def transform(batch, distiller):
        hidden.count.assign_add(1.0)
        return batch

    distiller = kd.Distiller(*pair)
    distiller.compile("sgd", crossentropy(), batch_transform=transform)
    with pytest.raises(ValueError, match="which the distiller does not know"):
        distiller.fit(*rows, verbose=0)


def test_a_gradient_moves_statistics_and_dropout_as_any_pass_does(rows):
    inputs = keras.Input((6,))
    h = layers.Dropout(0.5, seed=3)(layers.BatchNormalization(momentum=0.5)(inputs))
    model = keras.Model(inputs, layers.Dense(1)(h))
    x, _ = rows
    backends.gradient(lambda x: model(x, training=True), x)
    mean = ops.convert_to_numpy(model.layers[1].moving_mean)
    np.testing.assert_allclose(mean, 0.5 * x.mean(0), rtol=1e-4, atol=1e-6)


def test_hooks_are_saved(pair, rows, tmp_path):
    student, teacher = pair
    x, y = rows

    def begun():
        distiller = kd.Distiller(student, teacher)
        distiller.compile(
            keras.optimizers.SGD(0.1), crossentropy(), penalties=[Pull()], batch_transform=shift
        )
        return distiller

    distiller = begun()
    distiller.fit(x, y, batch_size=25, verbose=0)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    losses = [d.term_losses(rows) for d in (distiller, loaded)]
    assert losses[0]["pull"] > 0
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=1e-5)
    histories = [d.fit(x, y, batch_size=50, verbose=0).history for d in (distiller, loaded)]
    for name, (value,) in histories[0].items():
        assert histories[1][name][0] == pytest.approx(value, rel=1e-4)


@keras.saving.register_keras_serializable(package="suite")
class Pull(L2ToStart):
    pass


@keras.saving.register_keras_serializable(package="suite")
def shift(batch, distiller):
    return batch._replace(x=batch.x + 0.1)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX alone compiles each operation by itself")
def test_the_first_look_compiles_as_much_for_a_deep_teacher(rows):
    import jax

    x, y = rows
    programs = []

    def note(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            programs.append(event)

    def deep(depth, name):
        # Every layer of another width, so that no operation is compiled for two of them.
        z = inputs = keras.Input((6,))
        for i in range(depth):
            z = layers.Dense(7 + i, activation="relu")(z)
            z = layers.BatchNormalization()(z)
        return keras.Model(inputs, layers.Dense(CLASSES)(z), name=name)

    jax.monitoring.register_event_duration_secs_listener(note)
    counts = []
    for depth in (2, 12):
        distiller = kd.Distiller(deep(2, "student"), deep(depth, "teacher"))
        distiller.compile("sgd", loss=crossentropy())
        programs.clear()
        distiller.fit(x, y, batch_size=25, verbose=0)
        counts.append(len(programs))
    assert 0 < counts[1] <= counts[0]


def test_shared_backbone_stays(rows):
    x, y = rows
    inputs = keras.Input((6,))
    backbone = keras.Sequential(
        [layers.Dense(8), layers.BatchNormalization(), layers.ReLU()], name="backbone"
    )
    features = backbone(inputs)
    teacher = keras.Model(inputs, layers.Dense(CLASSES)(features), name="teacher")
    student = keras.Model(inputs, layers.Dense(CLASSES)(features), name="student")
    before = weights_of(teacher)
    head = weights_of(student.layers[-1])
    distiller = kd.Distiller(student, teacher)
    distiller.compile("adam", loss=crossentropy())
    distiller.fit(x, y, epochs=2, batch_size=25, verbose=0)
    assert same(before, weights_of(teacher))
    assert not same(head, weights_of(student.layers[-1]))
    assert len(distiller.trainable_variables) == 2


def test_quantization_aware_student_under_a_cached_teacher(pair, rows, tmp_path):
    """Ranges follow the batches, then stand still; the weights learn from the cache."""
    student, teacher = pair
    x, y = rows
    kd.cache.write(teacher, x, tmp_path / "answers", taps=("hidden",))
    aware = kd.compress.quantize_aware(student, calibration=x)
    before, ranges = weights_of(aware), kd.compress.activation_ranges(aware)
    hint = kd.Transfer(
        kd.losses.Hint(), teacher="hidden", student="hidden", projector=layers.Dense(9), weight=0.1
    )
    distiller = kd.Distiller(aware, kd.teachers.CachedTeacher(tmp_path / "answers"))
    distiller.compile(
        keras.optimizers.Adam(0.01),
        crossentropy(),
        distillation_loss=[kd.losses.SoftTargets(), hint],
    )
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(kd.compress.activation_ranges(aware))
    )
    annealing = kd.callbacks.TemperatureAnnealing(start=4.0, end=1.0, epochs=6)
    freeze = kd.compress.FreezeObservers(epoch=-2)
    history = distiller.fit(
        x, y, batch_size=10, epochs=6, verbose=0, callbacks=[annealing, freeze, watch]
    ).history
    assert history["student_loss"][-1] < history["student_loss"][0]
    assert float(distiller.temperature) == pytest.approx(1.0)
    assert seen[0] != ranges
    assert seen[2] != seen[3] == seen[4] == seen[5]
    kernel = next(i for i, w in enumerate(aware.weights) if w.path.endswith("logits/kernel"))
    assert not np.array_equal(before[kernel], weights_of(aware)[kernel])
    distiller.save(tmp_path / "distiller.keras")
    aware.save(tmp_path / "aware.keras")
    again = keras.models.load_model(tmp_path / "aware.keras")
    answers = aware.predict(x, verbose=0)
    np.testing.assert_array_equal(again.predict(x, verbose=0), answers)
    plain = kd.compress.finalize(aware)
    kernel = plain.get_layer("logits").get_weights()[0]
    step = np.abs(kernel).max(0) / 127
    np.testing.assert_allclose(kernel / step, np.round(kernel / step), atol=1e-3)
    # What is left between them is the rounding of three activations.
    assert np.abs(plain.predict(x, verbose=0) - answers).max() < 0.1 * np.abs(answers).max()


def test_crd_reads_its_memory_banks(pair, rows):
    """Each batch finds its own rows of the banks, by the numbers that `fit` gives them."""
    student, teacher = pair
    x, y = rows
    loss = kd.losses.CRD(samples=len(x), negatives=16, width=8)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.Adam(0.01),
        crossentropy(),
        distillation_loss=[kd.Transfer(loss, teacher="hidden", student="hidden")],
    )
    history = distiller.fit(x, y, batch_size=10, epochs=8, verbose=0).history
    assert history["distillation_loss"][-1] < history["distillation_loss"][0]
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("together", [1, 2])
def test_live_temperature_without_retracing(together, shared):
    """A new value counts from the next step on, in the program that is compiled already."""
    if BACKEND == "torch" and together > 1:
        pytest.skip("Keras runs one step at a time on PyTorch")
    x, traced = shared["x"], []

    class Count(layers.Layer):
        def call(self, inputs):
            traced.append(1)
            return inputs

    def linear(name):
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(CLASSES)(Count()(inputs)), name=name)

    student, teacher = linear("student"), linear("teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=None, steps_per_execution=together)
    logits = [ops.convert_to_numpy(model(x)) for model in (teacher, student)]
    counts = []
    for temperature in (1.0, 4.0):
        distiller.temperature.assign(temperature)
        traced.clear()
        history = distiller.fit(x, batch_size=25, epochs=2, verbose=0, shuffle=False).history
        counts.append(len(traced))
        expected = softened_kl(*logits, temperature).mean()
        np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)
    if BACKEND != "torch":
        assert counts[1] == 0


def test_checkpoints_of_the_student(pair, rows, tmp_path):
    student, teacher = pair
    x, y = rows
    distiller = kd.Distiller(student, teacher)
    distiller.compile("adam", loss=crossentropy())
    path = tmp_path / "student.keras"
    checkpoint = kd.callbacks.StudentCheckpoint(path, monitor="loss", save_freq=2)
    distiller.fit(x, y, batch_size=25, verbose=0, callbacks=[checkpoint])
    # Written after the second batch of two, before the epoch ended.
    assert same(weights_of(keras.saving.load_model(path)), weights_of(student))


def test_single_batches(pair, rows):
    student, teacher = pair
    x, y = rows
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.Adam(0.02), loss=crossentropy())
    logs = [distiller.train_on_batch(x, y, return_dict=True) for _ in range(3)]
    assert logs[-1]["loss"] < logs[0]["loss"]
    held = distiller.test_on_batch(x, y, return_dict=True)
    assert "agreement" not in held
    assert np.isfinite(list(held.values())).all()


def test_weights_of_classes_and_samples(shared):
    """Both scale the hard loss, sample weights the distillation loss as well."""
    x, y, weights = shared["x"], shared["y"], shared["weights"]

    def linear(name):
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(CLASSES)(inputs), name=name)

    student, teacher = linear("student"), linear("teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=crossentropy(), temperature=2.0)
    logits = [ops.convert_to_numpy(model(x)) for model in (teacher, student)]
    soft = softened_kl(*logits, 2.0)
    log_q = logits[1] - np.log(np.exp(logits[1]).sum(-1, keepdims=True))
    hard = -log_q[np.arange(len(y)), y]
    options = {"batch_size": len(x), "verbose": 0, "shuffle": False}
    logs = distiller.fit(x, y, sample_weight=weights, **options).history
    np.testing.assert_allclose(logs["soft_targets"], np.mean(weights * soft), rtol=1e-5)
    np.testing.assert_allclose(logs["student_loss"], np.mean(weights * hard), rtol=1e-5)
    by_class = {0: 2.0, 1: 0.5, 2: 1.0, 3: 0.0}
    logs = distiller.fit(x, y, class_weight=by_class, **options).history
    scale = np.array([by_class[label] for label in y])
    np.testing.assert_allclose(logs["student_loss"], np.mean(scale * hard), rtol=1e-5)
    np.testing.assert_allclose(logs["soft_targets"], np.mean(scale * soft), rtol=1e-5)
