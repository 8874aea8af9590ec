"""The step: what is minimized, on what kinds of data and models, and what stays untouched."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from small_models import (
    CLASSES,
    FEATURES,
    Counted,
    crossentropy,
    hard_loss,
    kl,
    mlp,
    pair,
    rows,
)

import keras_kd as kd


def sgd_update(student, loss_of, learning_rate=0.1):
    """The weights after one SGD step on a loss written by hand, and the loss."""
    with tf.GradientTape() as tape:
        loss = loss_of()
    gradients = tape.gradient(loss, student.trainable_variables)
    after = [
        np.array(v) - learning_rate * np.array(g)
        for v, g in zip(student.trainable_variables, gradients)
    ]
    return float(loss), after


def tf_kl(teacher, student, temperature):
    log_p = tf.nn.log_softmax(teacher / temperature)
    log_q = tf.nn.log_softmax(student / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), -1)


# ----------------------------------------------------------------- the objective


@pytest.mark.parametrize(
    ("weights", "hard_weight", "distillation_weight"),
    [
        ({"alpha": 0.3}, 0.3, 0.7),
        ({"alpha": 0.0}, 0.0, 1.0),
        ({"alpha": 1.0}, 1.0, 0.0),
        ({}, 0.5, 0.5),
        ({"student_loss_weight": 1.0, "distillation_loss_weight": 4.0}, 1.0, 4.0),
        ({"student_loss_weight": 0.2}, 0.2, 1.0),
        ({"distillation_loss_weight": 2.5}, 1.0, 2.5),
    ],
)
def test_the_total_and_its_gradient_are_the_formula(weights, hard_weight, distillation_weight):
    student, teacher = pair(kernel_regularizer=keras.regularizers.L2(0.03))
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.1), loss=crossentropy(), temperature=3.0, run_eagerly=True, **weights
    )
    x, y = rows()
    t, s = np.array(teacher(x)), np.array(student(x))
    penalty = 0.03 * sum(float((np.array(l.kernel) ** 2).sum()) for l in student.layers[1:])
    expected = (
        hard_weight * hard_loss(s, y).mean() + distillation_weight * kl(t, s, 3.0).mean() + penalty
    )

    def by_hand():
        logits = student(x)
        hard = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
        return (
            hard_weight * tf.reduce_mean(hard)
            + distillation_weight * tf.reduce_mean(tf_kl(t, logits, 3.0))
            + tf.add_n(student.losses)
        )

    by_tape, after = sgd_update(student, by_hand)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(by_tape, expected, rtol=1e-5)
    np.testing.assert_allclose(logs["student_loss"], hard_loss(s, y).mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["distillation_loss"], kl(t, s, 3.0).mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["soft_targets"], logs["distillation_loss"], rtol=1e-6)
    assert logs["agreement"] == pytest.approx((t.argmax(1) == s.argmax(1)).mean())
    for got, want in zip(student.get_weights(), after):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_the_defaults_are_one_and_one_half():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy())
    assert float(distiller.temperature) == 1.0
    assert float(distiller.alpha) == 0.5


def test_without_labels_the_loss_is_the_distillation_alone():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None, temperature=2.0)
    x, _ = rows()
    expected = kl(teacher(x), student(x), 2.0).mean()
    logs = distiller.train_on_batch(x, return_dict=True)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    assert "student_loss" not in logs
    history = distiller.fit(x, epochs=1, verbose=0).history
    assert {"loss", "distillation_loss", "agreement", "temperature"} <= set(history)
    assert "alpha" not in history


def test_without_a_teacher_it_trains_on_the_labels_alone():
    student = mlp()
    distiller = kd.Distiller(student)
    distiller.compile(keras.optimizers.SGD(0.1), loss=crossentropy(), metrics=["accuracy"])
    x, y = rows()
    expected = hard_loss(np.array(student(x)), y).mean()
    history = distiller.fit(x, y, batch_size=12, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-5)
    assert "distillation_loss" not in history
    assert "accuracy" in history


def test_pure_distillation_reaches_the_teacher():
    student, teacher = mlp(width=16, name="student"), pair()[1]
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.Adam(0.05), loss=None)
    x, _ = rows(64)
    agreement = distiller.fit(x, batch_size=64, epochs=60, verbose=0).history["agreement"]
    assert agreement[-1] > 0.9 > agreement[0]


# ------------------------------------------------------ weights, masks, additions


def test_sample_weights_act_on_both_losses():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy(), alpha=0.5, temperature=2.0)
    x, y = rows()
    weight = np.linspace(0, 2, len(x)).astype("float32")
    t, s = np.array(teacher(x)), np.array(student(x))
    logs = distiller.train_on_batch(x, y, sample_weight=weight, return_dict=True)
    # Keras divides weighted losses by the number of samples.
    np.testing.assert_allclose(logs["student_loss"], (weight * hard_loss(s, y)).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        logs["distillation_loss"], (weight * kl(t, s, 2.0)).mean(), rtol=1e-5
    )


def test_class_weights_act_on_both_losses():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy(), temperature=2.0)
    x, y = rows()
    class_weight = {0: 1.0, 1: 0.0, 2: 3.0, 3: 0.5}
    weight = np.array([class_weight[c] for c in y])
    t, s = np.array(teacher(x)), np.array(student(x))
    logs = distiller.train_on_batch(x, y, class_weight=class_weight, return_dict=True)
    np.testing.assert_allclose(logs["student_loss"], (weight * hard_loss(s, y)).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        logs["distillation_loss"], (weight * kl(t, s, 2.0)).mean(), rtol=1e-5
    )


def token_model(width, name, head=CLASSES):
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(8, width, mask_zero=True, name="embedding")(tokens)
    x = layers.LSTM(width, return_sequences=True, name="lstm")(x)
    model = keras.Model(tokens, layers.Dense(head, name="logits")(x), name=name)
    # Far from uniform, where single precision would drown the divergence.
    model.set_weights([4 * w for w in model.get_weights()])
    return model


def tokens(count=6):
    rng = np.random.default_rng(1)
    x = rng.integers(1, 8, (count, 5))
    for row, length in enumerate(rng.integers(2, 6, count)):
        x[row, length:] = 0
    return x, rng.integers(0, CLASSES, (count, 5))


def test_padded_tokens_count_for_nothing():
    student, teacher = token_model(4, "student"), token_model(7, "teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy(), temperature=2.0)
    x, y = tokens()
    mask = x != 0
    t, s = np.array(teacher(x)), np.array(student(x))
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["student_loss"], hard_loss(s, y)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["distillation_loss"], kl(t, s, 2.0)[mask].mean(), rtol=1e-5)
    assert logs["agreement"] == pytest.approx((t.argmax(-1) == s.argmax(-1))[mask].mean())


@pytest.mark.parametrize("per_token", [False, True])
def test_sample_weights_of_tokens(per_token):
    student, teacher = token_model(4, "student"), token_model(7, "teacher")
    distiller = kd.Distiller(student, teacher)
    # Keras's own losses take no weight a sample for values a token.
    distiller.compile("sgd", loss=crossentropy() if per_token else None, temperature=2.0)
    x, y = tokens()
    mask = (x != 0).astype("float32")
    rng = np.random.default_rng(2)
    weight = rng.uniform(0, 2, x.shape if per_token else len(x)).astype("float32")
    t, s = np.array(teacher(x)), np.array(student(x))
    each = weight if per_token else weight[:, None]
    logs = distiller.train_on_batch(x, y, sample_weight=weight, return_dict=True)
    expected = (each * mask * kl(t, s, 2.0)).sum() / mask.sum()
    np.testing.assert_allclose(logs["distillation_loss"], expected, rtol=1e-5)


def test_masks_reach_transfers_between_layers():
    student, teacher = token_model(4, "student"), token_model(4, "teacher")
    distiller = kd.Distiller(student, teacher)
    hint = kd.Transfer(kd.losses.Hint(), teacher="lstm", student="lstm")
    distiller.compile("sgd", loss=None, distillation_loss=hint)
    x, _ = tokens()
    lstm = [
        np.array(keras.Model(m.input, m.get_layer("lstm").output)(x)) for m in (teacher, student)
    ]
    valid = (x != 0)[..., None]
    logs = distiller.train_on_batch(x, return_dict=True)
    # Whatever the loss does with positions, padded ones are no part of it.
    rubbish = np.where(valid, 0.0, 1e3)
    loss = kd.losses.Hint()
    expected = float(loss(lstm[0] + rubbish, lstm[1], mask=ops.convert_to_tensor(x != 0)))
    np.testing.assert_allclose(logs["hint"], expected, rtol=1e-4)


def test_a_softmax_over_tokens_keeps_its_mask():
    def model(width, name):
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Embedding(8, width, mask_zero=True)(inputs)
        model = keras.Model(inputs, layers.Dense(CLASSES, "softmax")(x), name=name)
        model.set_weights([9 * w for w in model.get_weights()])
        return model

    student, teacher = model(3, "student"), model(5, "teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss="sparse_categorical_crossentropy", temperature=2.0)
    x, y = tokens()
    mask = x != 0
    t, s = np.log(np.array(teacher(x))), np.log(np.array(student(x)))
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], kl(t, s, 2.0)[mask].mean(), rtol=1e-4)


def test_everything_the_layers_add_is_in_the_total():
    class Adds(layers.Layer):
        def call(self, x):
            self.add_loss(0.25 * ops.mean(ops.square(x)))
            return x

    inputs = keras.Input((FEATURES,))
    x = layers.Dense(5, activity_regularizer=keras.regularizers.L1(0.1), name="hidden")(inputs)
    x = Adds()(x)
    student = keras.Model(inputs, layers.Dense(CLASSES, bias_regularizer="l2")(x))
    teacher = mlp(name="teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy(), alpha=0.4, temperature=2.0)
    x, y = rows()
    s = np.array(student(x))
    hidden = np.array(keras.Model(inputs, student.get_layer("hidden").output)(x))
    # Keras divides activity regularizers by the batch.
    added = 0.25 * (hidden**2).mean() + 0.1 * np.abs(hidden).sum() / len(x)
    expected = 0.4 * hard_loss(s, y).mean() + 0.6 * kl(teacher(x), s, 2.0).mean() + added
    logs = distiller.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


def test_the_teachers_own_losses_stay_out():
    teacher = mlp(name="teacher", kernel_regularizer=keras.regularizers.L2(10.0))
    student = mlp(name="student")
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None, temperature=2.0)
    x, _ = rows()
    expected = kl(teacher(x), student(x), 2.0).mean()
    assert distiller.train_on_batch(x, return_dict=True)["loss"] == pytest.approx(expected, 1e-5)


def test_gradient_accumulation_equals_one_large_batch():
    x, y = rows(8)
    results = []
    for steps in (2, 1):
        keras.utils.set_random_seed(3)
        student, teacher = pair()
        distiller = kd.Distiller(student, teacher)
        hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
        distiller.compile(
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=None if steps == 1 else steps),
            loss=crossentropy(),
            distillation_loss=[kd.losses.SoftTargets(), hint],
        )
        distiller.fit(x, y, batch_size=8 // steps, shuffle=False, verbose=0)
        results.append([*student.get_weights(), *hint.projection.get_weights()])
    for accumulated, whole in zip(*results):
        np.testing.assert_allclose(accumulated, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    student = mlp(name="student", dtype=policy)
    teacher = mlp(width=9, name="teacher", dtype=policy)
    distiller = kd.Distiller(student, teacher)
    hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
    distiller.compile(
        keras.optimizers.SGD(0.1),
        loss=crossentropy(),
        distillation_loss=[kd.losses.SoftTargets(), hint],
        temperature=2.0,
    )
    scaled = isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    x, y = rows()
    before = student.get_weights()
    t, s = (np.array(ops.cast(m(x), "float32")) for m in (teacher, student))
    logs = distiller.fit(x, y, batch_size=12, shuffle=False, verbose=0).history
    np.testing.assert_allclose(logs["soft_targets"], [kl(t, s, 2.0).mean()], rtol=2e-2)
    assert np.isfinite(logs["loss"]).all()
    assert any(np.abs(a - b).max() > 0 for a, b in zip(before, student.get_weights()))
    assert ops.dtype(student(x)) == policy.removeprefix("mixed_")


def test_half_precision_survives_large_logit_gaps():
    student, teacher = pair(dtype="mixed_float16")
    teacher.set_weights([20 * w for w in teacher.get_weights()])
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.Adam(0.01), loss=None, temperature=4.0)
    x, _ = rows(16)
    losses = distiller.fit(x, batch_size=16, epochs=30, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------- live values


@pytest.mark.parametrize(
    "how",
    [{}, {"jit_compile": True}, {"steps_per_execution": 2}, {"run_eagerly": True}],
    ids=["graph", "xla", "steps_per_execution", "eager"],
)
def test_temperature_and_alpha_are_live(how):
    inputs = keras.Input((FEATURES,))
    counted = Counted()
    student = keras.Model(inputs, layers.Dense(CLASSES)(counted(inputs)))
    teacher = mlp(name="teacher")
    distiller = kd.Distiller(student, teacher)
    transfer = kd.Transfer(kd.losses.LogitMSE(temperature=None), weight=0.5)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        loss=crossentropy(),
        distillation_loss=[kd.losses.SoftTargets(), transfer],
        alpha=0.5,
        temperature=1.0,
        **how,
    )
    x, y = rows(8)
    t, s = np.array(teacher(x)), np.array(student(x))
    distiller.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    traces = len(counted.calls)
    for temperature, alpha, weight in ((4.0, 0.1, 2.0), (2.0, 1.0, 0.0), (8.0, 0.0, 1.0)):
        distiller.temperature.assign(temperature)
        distiller.alpha.assign(alpha)
        transfer.weight.assign(weight)
        history = distiller.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0).history
        mse = (((t - s) / temperature) ** 2).mean()
        distillation = kl(t, s, temperature).mean() + weight * mse
        expected = alpha * hard_loss(s, y).mean() + (1 - alpha) * distillation
        np.testing.assert_allclose(history["loss"], [expected], rtol=1e-4)
        np.testing.assert_allclose(history["distillation_loss"], [distillation], rtol=1e-4)
        assert history["temperature"] == [temperature]
        assert history["alpha"] == [pytest.approx(alpha)]
    if "run_eagerly" not in how:
        assert len(counted.calls) == traces


def test_a_callback_changes_the_very_next_step():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=None, temperature=1.0)
    x, _ = rows(8)
    seen = []

    class Assigns(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.temperature.assign([1.0, 5.0][batch])

        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs["distillation_loss"])

    distiller.fit(x, batch_size=4, shuffle=False, callbacks=[Assigns()], verbose=0)
    t, s = np.array(teacher(x)), np.array(student(x))
    first, second = kl(t[:4], s[:4], 1.0).mean(), kl(t[4:], s[4:], 5.0).mean()
    np.testing.assert_allclose(seen, [first, (first + second) / 2], rtol=1e-4)


@pytest.mark.parametrize(
    "how", [{"jit_compile": True}, {"steps_per_execution": 3}], ids=["xla", "steps_per_execution"]
)
def test_compiled_ways_of_running_give_the_same_weights(how):
    x, y = rows(14)
    weights = []
    for options in ({}, how):
        keras.utils.set_random_seed(5)
        student, teacher = pair()
        distiller = kd.Distiller(student, teacher)
        hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
        distiller.compile(
            keras.optimizers.Adam(0.01),
            loss=crossentropy(),
            distillation_loss=[kd.losses.SoftTargets(), hint],
            **options,
        )
        distiller.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        weights.append(student.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ counted passes


def counted_pair(batch_norm=False):
    def model(width, name):
        inputs = keras.Input((FEATURES,))
        counted = Counted(name="counted")
        x = layers.Dense(width, activation="relu", name="hidden")(counted(inputs))
        if batch_norm:
            x = layers.BatchNormalization(name="norm")(x)
        x = layers.Dropout(0.5)(x)
        return keras.Model(inputs, layers.Dense(CLASSES, "softmax", name="head")(x), name=name)

    return model(5, "student"), model(9, "teacher")


def several_taps():
    return [
        kd.losses.SoftTargets(),
        kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear", name="first"),
        kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear", name="second"),
    ]


def test_a_step_runs_each_model_once():
    student, teacher = counted_pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd",
        loss="sparse_categorical_crossentropy",
        distillation_loss=several_taps(),
        run_eagerly=True,
    )
    x, y = rows(8)
    distiller.train_on_batch(x, y)  # the first step makes the projectors
    passes = [model.get_layer("counted").calls for model in (student, teacher)]
    for calls in passes:
        calls.clear()
    distiller.fit(x, y, batch_size=4, verbose=0)
    assert passes == [[True, True], [False, False]]


def test_evaluation_runs_the_teacher_only_when_asked():
    x, y = rows(10)
    for asked in (False, True):
        student, teacher = counted_pair(batch_norm=True)
        distiller = kd.Distiller(student, teacher)
        distiller.compile(
            "sgd",
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
            distillation_loss=several_taps(),
            evaluate_distillation=asked,
            run_eagerly=True,
            temperature=2.0,
        )
        distiller.fit(x, y, batch_size=4, verbose=0)
        calls = [model.get_layer("counted").calls for model in (student, teacher)]
        for each in calls:
            each.clear()
        before = [np.array(v) for v in distiller.variables]
        metrics = {id(v) for m in distiller.metrics for v in m.variables}
        logs = distiller.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
        assert calls == [[False] * 3, [False] * 3 if asked else []]
        t, s = (np.log(np.array(m(x))) for m in (teacher, student))
        np.testing.assert_allclose(logs["student_loss"], hard_loss(s, y).mean(), rtol=1e-4)
        assert logs["accuracy"] == pytest.approx((s.argmax(1) == y).mean())
        if asked:
            np.testing.assert_allclose(logs["soft_targets"], kl(t, s, 2.0).mean(), rtol=1e-3)
            assert logs["agreement"] == pytest.approx((t.argmax(1) == s.argmax(1)).mean())
        else:
            assert set(logs) == {"loss", "student_loss", "accuracy"}
            np.testing.assert_allclose(logs["loss"], logs["student_loss"], rtol=1e-5)
        for value, variable in zip(before, distiller.variables):
            if id(variable) not in metrics:
                np.testing.assert_array_equal(value, np.array(variable))


def test_validation_during_fit_leaves_training_as_it_is():
    x, y = rows(12)
    weights = []
    for validated in (False, True):
        keras.utils.set_random_seed(3)
        student, teacher = counted_pair(batch_norm=True)
        distiller = kd.Distiller(student, teacher)
        distiller.compile(
            "sgd", loss="sparse_categorical_crossentropy", distillation_loss=several_taps()
        )
        options = {"validation_data": (x[:5], y[:5])} if validated else {}
        history = distiller.fit(x, y, batch_size=5, epochs=2, verbose=0, **options).history
        weights.append(student.get_weights())
        assert ("val_student_loss" in history) == validated
        assert "val_distillation_loss" not in history
    for a, b in zip(*weights):
        np.testing.assert_array_equal(a, b)


def traced_step(distiller, x, y):
    """The graph of one training step."""
    distiller.train_on_batch(x, y)
    step = tf.function(distiller.train_step, autograph=False)
    data = (tf.convert_to_tensor(x), tf.convert_to_tensor(y))
    return step.get_concrete_function(data).graph


def test_the_graph_has_one_pass_of_each_and_no_gradient_of_the_teacher():
    # Widths that occur in one model alone tell the operations apart.
    def model(widths, name):
        inputs = keras.Input((FEATURES,))
        x = inputs
        for i, width in enumerate(widths):
            x = layers.Dense(width, activation="relu", name=f"hidden{i}")(x)
        return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name=name)

    student, teacher = model((5, 7), "student"), model((11, 13, 17), "teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        "sgd",
        loss=crossentropy(),
        distillation_loss=[
            kd.losses.SoftTargets(),
            kd.Transfer(kd.losses.Hint(), "hidden1", "hidden1", projector="linear"),
        ],
    )
    x, y = rows(8)
    products = [op for op in traced_step(distiller, x, y).get_operations() if op.type == "MatMul"]
    shapes = [
        tuple(op.inputs[1].shape.as_list() + op.outputs[0].shape.as_list()) for op in products
    ]
    teachers = [shape for shape in shapes if {11, 13, 17} & set(shape) and 7 not in shape]
    # Three layers of the teacher and its head, forwards; each once.
    assert len(teachers) == 4
    # Student: three layers forwards, three gradients of kernels, two of inputs.
    # Projector: one forwards, its kernel's and its input's gradient.
    assert len(products) == 4 + 3 + 3 + 2 + 3


# ------------------------------------------------------------ the teacher is sacred


def normed(width, name):
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(width, name="hidden")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.3, name="drop")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name=name)


def state_of(model):
    flags = [(layer.name, layer.trainable) for layer in model._flatten_layers()]
    return [np.array(w) for w in model.weights], flags


def assert_same_state(model, before):
    values, flags = state_of(model)
    assert flags == before[1]
    for a, b in zip(values, before[0]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("toggle", ["nothing", "before compile", "after compile", "frozen part"])
def test_the_teacher_never_changes(toggle):
    student, teacher = normed(5, "student"), normed(9, "teacher")
    if toggle == "frozen part":
        teacher.get_layer("hidden").trainable = False
    before = state_of(teacher)
    distiller = kd.Distiller(student, teacher)
    if toggle == "before compile":
        distiller.trainable = False
        distiller.trainable = True
    distiller.compile("adam", loss=crossentropy())
    if toggle == "after compile":
        distiller.trainable = False
        distiller.trainable = True
    x, y = rows()
    distiller.fit(x, y, batch_size=4, epochs=2, validation_data=(x, y), verbose=0)
    assert_same_state(teacher, before)
    assert teacher.trainable
    ours = {id(v) for v in distiller.variables}
    assert not ours & {id(v) for v in teacher.variables}


@pytest.mark.parametrize("toggled", [False, True])
def test_a_shared_layer_is_left_as_the_teacher_has_it(toggled):
    teacher = normed(9, "teacher")
    inputs = keras.Input((FEATURES,))
    x = teacher.get_layer("norm")(teacher.get_layer("hidden")(inputs))
    student = keras.Model(inputs, layers.Dense(CLASSES, name="own")(x), name="student")
    before = state_of(teacher)
    distiller = kd.Distiller(student, teacher)
    if toggled:
        distiller.trainable = False
        assert_same_state(teacher, before)
        distiller.trainable = True
    distiller.compile("adam", loss=crossentropy())
    x, y = rows()
    own = np.array(student.get_layer("own").kernel)
    distiller.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert_same_state(teacher, before)
    assert np.abs(own - np.array(student.get_layer("own").kernel)).max() > 0
    assert [v.path for v in distiller.trainable_variables] == [
        v.path for v in student.get_layer("own").trainable_variables
    ]


def test_the_teacher_may_be_frozen_by_its_owner():
    student, teacher = pair()
    teacher.trainable = False
    before = state_of(teacher)
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy())
    x, y = rows()
    distiller.fit(x, y, verbose=0)
    assert_same_state(teacher, before)


def test_the_student_keeps_its_own_frozen_layers():
    student, teacher = pair()
    student.get_layer("hidden").trainable = False
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy())
    x, y = rows()
    before = student.get_weights()
    distiller.fit(x, y, verbose=0)
    after = student.get_weights()
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[2] - after[2]).max() > 0


# ----------------------------------------------------------------------- inputs


def test_each_side_reads_what_its_function_makes_of_the_batch():
    teacher = mlp(features=3, name="teacher")
    student = mlp(features=2, name="student")
    distiller = kd.Distiller(
        student,
        teacher,
        teacher_inputs=lambda x: x["sound"],
        student_inputs=lambda x: ops.take(x["image"], [0, 1], axis=-1),
    )
    distiller.compile(
        keras.optimizers.SGD(0.0), loss=crossentropy(), metrics=["accuracy"], temperature=2.0
    )
    rng = np.random.default_rng(0)
    x = {
        "sound": rng.normal(size=(9, 3)).astype("float32"),
        "image": rng.normal(size=(9, 4)).astype("float32"),
    }
    y = rng.integers(0, CLASSES, 9)
    t, s = np.array(teacher(x["sound"])), np.array(student(x["image"][:, :2]))
    history = distiller.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["distillation_loss"], [kl(t, s, 2.0).mean()], rtol=1e-4)
    np.testing.assert_allclose(distiller.predict(x, verbose=0), s, rtol=1e-5, atol=1e-6)
    logs = distiller.evaluate(x, y, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["student_loss"], hard_loss(s, y).mean(), rtol=1e-5)


def sources(x, y):
    class Rows(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return x[4 * index : 4 * index + 4], y[4 * index : 4 * index + 4]

    def generate():
        for i in range(3):
            yield x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]

    return {
        "arrays": ((x, y), {"batch_size": 4}),
        "tensors": ((tf.constant(x), tf.constant(y)), {"batch_size": 4}),
        "dataset": ((tf.data.Dataset.from_tensor_slices((x, y)).batch(4),), {}),
        "pydataset": ((Rows(),), {}),
        "generator": ((generate(),), {}),
    }


@pytest.mark.parametrize("kind", ["arrays", "tensors", "dataset", "pydataset", "generator"])
def test_every_kind_of_data_trains_alike(kind):
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0), loss=crossentropy(), metrics=["accuracy"], temperature=2.0
    )
    x, y = rows(12)
    data, options = sources(x, y)[kind]
    history = distiller.fit(*data, shuffle=False, verbose=0, **options).history
    t, s = np.array(teacher(x)), np.array(student(x))
    expected = 0.5 * hard_loss(s, y).mean() + 0.5 * kl(t, s, 2.0).mean()
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-4)


def test_the_other_ways_in():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), loss=crossentropy(), metrics=["accuracy"])
    x, y = rows(12)
    np.testing.assert_allclose(
        distiller.predict_on_batch(x), student.predict_on_batch(x), rtol=1e-6
    )
    logs = distiller.test_on_batch(x, y, return_dict=True)
    assert set(logs) == {"loss", "student_loss", "accuracy"}
    first = distiller.fit(x, y, validation_split=0.25, verbose=0).history
    assert "val_accuracy" in first
    assert distiller.fit(x, y, verbose=0).history["loss"][0] < first["loss"][0]
    np.testing.assert_allclose(distiller(x), student(x), rtol=1e-6)


def test_sequences_of_any_length():
    def model(width, name):
        inputs = keras.Input((None, 3))
        return keras.Model(inputs, layers.Dense(CLASSES)(layers.GRU(width)(inputs)), name=name)

    student, teacher = model(3, "student"), model(5, "teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=crossentropy())
    rng = np.random.default_rng(0)

    def generate():
        for length in (2, 5, 3):
            yield rng.normal(size=(4, length, 3)).astype("float32"), rng.integers(0, CLASSES, 4)

    assert np.isfinite(distiller.fit(generate(), verbose=0).history["loss"]).all()


def test_an_unbuilt_student_is_built_by_the_first_batch():
    student = keras.Sequential([layers.Dense(5, name="hidden"), layers.Dense(CLASSES)])
    teacher = mlp(name="teacher")
    distiller = kd.Distiller(student, teacher)
    hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
    distiller.compile(
        "adam", loss=crossentropy(), distillation_loss=[kd.losses.SoftTargets(), hint]
    )
    x, y = rows()
    history = distiller.fit(x, y, epochs=2, verbose=0).history
    assert student.built
    assert len(distiller.trainable_variables) == 6
    assert np.isfinite(history["loss"]).all()
    np.testing.assert_allclose(distiller.predict(x, verbose=0), student(x), rtol=1e-5, atol=1e-6)


def test_an_unbuilt_subclassed_student_is_built_too():
    class Inner(layers.Layer):
        def __init__(self):
            super().__init__(name="inner")
            self.dense = layers.Dense(5, name="dense")

        def call(self, x):
            return self.dense(x)

    class Student(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Inner(), layers.Dense(CLASSES)

        def call(self, x):
            return self.head(self.inner(x))

    student = Student()
    hint = kd.Transfer(kd.losses.Hint(), "hidden", "inner/dense", projector="linear")
    distiller = kd.Distiller(student, mlp(name="teacher"))
    distiller.compile(
        "adam", loss=crossentropy(), distillation_loss=[kd.losses.SoftTargets(), hint]
    )
    x, y = rows()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    assert np.isfinite(distiller.fit(data, verbose=0).history["hint"]).all()
    assert len(distiller.trainable_variables) == 6


def test_an_unbuilt_distiller_predicts_and_evaluates():
    student = keras.Sequential([layers.Dense(5), layers.Dense(CLASSES)])
    distiller = kd.Distiller(student, mlp(name="teacher"))
    x, y = rows()
    assert distiller.predict(x, verbose=0).shape == (len(x), CLASSES)
    distiller.compile("sgd", loss=crossentropy())
    assert np.isfinite(distiller.evaluate(x, y, verbose=0, return_dict=True)["loss"])


def test_float64_runs_through():
    student, teacher = pair(dtype="float64")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=crossentropy(), temperature=2.0)
    x, y = rows()
    logs = distiller.train_on_batch(x.astype("float64"), y, return_dict=True)
    t, s = np.array(teacher(x)), np.array(student(x))
    expected = 0.5 * hard_loss(s, y).mean() + 0.5 * kl(t, s, 2.0).mean()
    assert logs["loss"] == pytest.approx(expected, 1e-5)


def test_recompiling_forgets_the_projectors_of_before():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    x, y = rows()
    for _ in range(2):
        hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
        distiller.compile("adam", loss=crossentropy(), distillation_loss=hint)
        distiller.fit(x, y, verbose=0)
        assert len(distiller.trainable_variables) == 4 + 2
    distiller.compile("adam", loss=crossentropy())
    logs = distiller.fit(x, y, verbose=0).history
    assert len(distiller.trainable_variables) == 4
    assert "hint" not in logs
    assert "soft_targets" in logs


def test_the_logs_of_a_step_add_up_over_uneven_batches():
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0), loss=crossentropy(), metrics=["accuracy"], temperature=2.0
    )
    x, y = rows(11)
    t, s = np.array(teacher(x)), np.array(student(x))
    history = distiller.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["student_loss"], [hard_loss(s, y).mean()], rtol=1e-5)
    np.testing.assert_allclose(history["distillation_loss"], [kl(t, s, 2.0).mean()], rtol=1e-5)
    np.testing.assert_allclose(history["soft_targets"], [kl(t, s, 2.0).mean()], rtol=1e-5)
    np.testing.assert_allclose(history["agreement"], [(t.argmax(1) == s.argmax(1)).mean()])
    np.testing.assert_allclose(history["accuracy"], [(s.argmax(1) == y).mean()], rtol=1e-6)


def test_the_student_is_a_plain_model_afterwards(tmp_path):
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
    distiller.compile("adam", loss=crossentropy(), distillation_loss=hint)
    x, y = rows()
    names = [w.path for w in student.weights]
    distiller.fit(x, y, verbose=0)
    assert distiller.student is student
    assert [w.path for w in student.weights] == names
    assert "call" not in vars(student.get_layer("hidden"))
    assert "call" not in vars(teacher.get_layer("hidden"))
    student.save(tmp_path / "student.keras")
    again = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(again(x), student(x))


def of_logs(loss, **options):
    student, teacher = pair()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=crossentropy(), distillation_loss=loss, **options)
    x, y = rows()
    history = distiller.fit(x, y, epochs=1, verbose=0).history
    return {k: v[0] for k, v in history.items() if "temperature" in k}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: kd.losses.DIST(temperature=4.0), {"temperature": 4.0}),
        (lambda: kd.losses.SoftTargets(), {"temperature": 3.0}),
        (lambda: kd.losses.SoftTargets(kd.losses.FLSW(5.0)), {"temperature": 5.0}),
        (lambda: kd.losses.SoftTargets(kd.losses.CWSM()), {"temperature": 3.0}),
        (
            lambda: [kd.losses.SoftTargets(), kd.losses.DIST(temperature=4.0)],
            {"temperature": 3.0, "dist_temperature": 4.0},
        ),
        (
            lambda: [kd.losses.SoftTargets(2.0), kd.losses.LogitMSE()],
            {"soft_targets_temperature": 2.0, "logit_mse_temperature": 1.0},
        ),
    ],
)
def test_the_logs_show_the_temperature_that_a_loss_has(make, expected):
    assert of_logs(make(), temperature=3.0) == expected


def test_losses_of_features_log_no_temperature():
    assert of_logs(kd.Transfer(kd.losses.RKD(), "hidden", "hidden")) == {}


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="how TensorFlow traces")
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("arrays", [False, True])
def test_a_step_with_metrics_is_traced_once(heads, arrays):
    """As one without: what they and the losses of several heads keep is there before."""
    traces = []

    class Counting(kd.Distiller):
        def train_step(self, data):
            traces.append(1)
            return super().train_step(data)

    x, y = rows(12)
    student, teacher = mlp(), mlp(9)
    metrics = ["accuracy"]
    loss = crossentropy()
    if heads:
        student, teacher = (
            keras.Model(
                model.input, {"a": model.output, "b": keras.layers.Identity()(model.output)}
            )
            for model in (student, teacher)
        )
        y = {"a": y, "b": y}
        loss, metrics = {"a": crossentropy(), "b": crossentropy()}, {"b": ["accuracy"]}
    distiller = Counting(student, teacher)
    distiller.compile("sgd", loss, metrics=metrics)
    if arrays:
        logs = distiller.fit(x, y, batch_size=4, epochs=2, verbose=0).history
    else:
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
        logs = distiller.fit(data, epochs=2, verbose=0).history
    assert len(traces) == 1
    assert ("b_accuracy" if heads else "accuracy") in logs
