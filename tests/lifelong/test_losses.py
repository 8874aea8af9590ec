"""What each method minimizes, against NumPy."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy.optimize import minimize
from scipy.special import expit
from small_models import Counted, crossentropy, hard_loss, log_softmax
from small_streams import model

from keras_kd import lifelong
from keras_kd.lifelong import correction, distilling, exemplars, regularizers, rehearsal
from keras_kd.lifelong.heads import GrowingHead, frozen_copy
from keras_kd.lifelong.lesson import Lesson

rng = np.random.default_rng(0)
OLD, NEW = [0, 2], [1, 3]
"""Positions of the columns: the classes 0 and 2 were there, 1 and 3 are the task's."""


def numbers(*shape):
    return rng.normal(size=shape).astype("float32")


def lesson(method, old=True, stored=None, columns=4, student=None):
    """A lesson of four columns, of which two were there before."""
    head = GrowingHead(student or model(units=4), method.cosine)
    before = None
    if old:
        head.grow(np.array(OLD))
        before = frozen_copy(head.reader(method.taps(head)))
        # The body goes on from there.
        for variable in head.body:
            variable.assign(variable + 0.1)
    head.grow(np.array(NEW if old else [0, 1, 2, 3]), method.freezes and old)
    made = Lesson(
        head.reader(method.taps(head)),
        method,
        head=head.layer,
        old=before,
        ranks=head.ranks,
        old_columns=OLD if old else [],
        task_columns=NEW if old else [0, 1, 2, 3],
        stored=stored,
    )
    made.compile(keras.optimizers.SGD(0.1), crossentropy(), jit_compile=False)
    return made


def terms(made, x, y, **parts):
    outputs = made({"x": x, **parts}, training=True)
    found = made.method.loss(made, {"x": x, **parts}, ops.convert_to_tensor(y), outputs)
    plain = {name: ops.convert_to_numpy(value) for name, value in outputs.items()}
    return {name: float(value) for name, value in found.items()}, plain


def soft(old, new, temperature):
    p = np.exp(log_softmax(old / temperature))
    return -(p * log_softmax(new / temperature)).sum(1)


def old_outputs(made, x):
    return {k: ops.convert_to_numpy(v) for k, v in made.old(x, training=False).items()}


def test_masked_mse_averages_over_known_columns_alone():
    stored, logits = numbers(3, 4), numbers(3, 4)
    stored[0, 2:] = 1e6
    known = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    found = ops.convert_to_numpy(rehearsal.masked_mse(stored, logits, known))
    expected = [
        np.mean((stored[0, :2] - logits[0, :2]) ** 2),
        np.mean((stored[1] - logits[1]) ** 2),
        0.0,
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_replay_is_the_mean_of_both_halves():
    made, x, y = lesson(lifelong.Replay(), old=False), numbers(3, 4), np.array([1, 3, 0])
    replayed, labels = numbers(5, 4), np.array([0, 1, 2, 3, 0])
    for weight in (1.0, 0.0):
        found, outputs = terms(
            made,
            x,
            y,
            replayed_x=replayed,
            replayed_y=labels,
            replayed_weight=np.full(5, weight, "float32"),
        )
        values = hard_loss(outputs["logits"], y)
        if weight:
            values = np.concatenate([values, hard_loss(outputs["replayed_logits"], labels)])
        assert found["label_loss"] == pytest.approx(values.mean(), rel=1e-5)


@pytest.mark.parametrize("forward", ["separate", "joint"])
def test_dark_replay(forward):
    """Draws of their own, passes of their own, old logits masked, and new ones stored behind."""
    counted = Counted(name="counted")
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, name="hidden")(counted(inputs))
    student = keras.Model(inputs, keras.layers.Dense(4, name="logits")(hidden))
    method = lifelong.DarkReplay(alpha=0.3, beta=0.7, forward=forward)
    stored = numbers(6, 4)
    made = lesson(method, old=False, stored=stored, student=student)
    x, y = numbers(2, 4), np.array([1, 3])
    parts = {
        "slots": np.array([4, 5], "int32"),
        "logits_x": numbers(3, 4),
        "logits_y": np.array([0, 0, 0]),
        "logits_slots": np.array([2, 0, 2], "int32"),
        "logits_known": np.array([2, 4, 3], "int32"),
        "logits_weight": np.ones(3, "float32"),
        "labels_x": numbers(3, 4),
        "labels_y": np.array([2, 0, 3]),
        "labels_weight": np.ones(3, "float32"),
    }
    counted.calls.clear()
    found, outputs = terms(made, x, y, **parts)
    assert counted.calls == [True] * (3 if forward == "separate" else 1)
    w = [ops.convert_to_numpy(v) for v in made.network.weights]

    def logits(rows):
        return (rows @ w[0] + w[1]) @ w[2] + w[3]

    assert found["label_loss"] == pytest.approx(hard_loss(logits(x), y).mean(), rel=1e-4)
    apart = [
        np.mean((stored[slot, :known] - logits(row)[:known]) ** 2)
        for row, slot, known in zip(parts["logits_x"], [2, 0, 2], [2, 4, 3])
    ]
    assert found["logit_loss"] == pytest.approx(0.3 * np.mean(apart), rel=1e-4)
    labels = hard_loss(logits(parts["labels_x"]), parts["labels_y"]).mean()
    assert found["replay_loss"] == pytest.approx(0.7 * labels, rel=1e-4)
    # The logits of this very pass, in the slots that the rows take; the others as they were.
    after = ops.convert_to_numpy(made.stored)
    np.testing.assert_allclose(after[4:], outputs["logits"], rtol=1e-5)
    np.testing.assert_array_equal(after[:4], stored[:4])

    # Before the memory holds a row nothing is compared with the zeros that stand there.
    none = {name: np.zeros(3, "float32") for name in ("logits_weight", "labels_weight")}
    found, _ = terms(made, x, y, **{**parts, **none})
    assert (found["logit_loss"], found["replay_loss"]) == (0.0, 0.0)


def test_der_draws_once():
    assert lifelong.DarkReplay(beta=0.0).draws == ("logits",)
    assert lifelong.DarkReplay(alpha=0.0).draws == ("labels",)


def test_learning_without_forgetting_asks_old_columns_alone():
    made, x, y = (
        lesson(lifelong.LearningWithoutForgetting(3.0, 2.0)),
        numbers(5, 4),
        np.arange(5) % 4,
    )
    found, outputs = terms(made, x, y)
    old = old_outputs(made, x)["logits"]
    assert old.shape == (5, 2)
    assert found["label_loss"] == pytest.approx(hard_loss(outputs["logits"], y).mean(), rel=1e-5)
    expected = 3.0 * soft(old, outputs["logits"][:, OLD], 2.0).mean()
    assert found["distillation_loss"] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(distilling.softened_crossentropy(old, old[::-1], 3.0)),
        soft(old, old[::-1], 3.0),
        rtol=1e-5,
    )


def test_icarl():
    x, y = numbers(5, 4), np.arange(5) % 4
    made = lesson(lifelong.ICaRL())
    found, outputs = terms(made, x, y)
    p, old = expit(outputs["logits"].astype("float64")), expit(old_outputs(made, x)["logits"])

    def bce(target, p):
        return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(1).mean()

    assert found["label_loss"] == pytest.approx(bce(np.eye(4)[y][:, NEW], p[:, NEW]), rel=1e-5)
    assert found["distillation_loss"] == pytest.approx(bce(old, p[:, OLD]), rel=1e-5)
    made = lesson(lifelong.ICaRL("ce", temperature=3.0))
    found, outputs = terms(made, x, y)
    expected = soft(old_outputs(made, x)["logits"], outputs["logits"][:, OLD], 3.0).mean()
    assert found["distillation_loss"] == pytest.approx(expected, rel=1e-5)


def test_less_forgetting():
    x, y = numbers(6, 4), np.array([0, 2, 1, 3, 0, 2])
    made = lesson(lifelong.LessForgetting(weight=5.0, margin=0.5, rivals=1))
    found, outputs = terms(made, x, y)
    f, before = outputs["features"], old_outputs(made, x)["features"]
    columns = ops.convert_to_numpy(made._head.columns())
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    cosines = unit @ (columns / np.linalg.norm(columns, axis=0))
    np.testing.assert_allclose(outputs["logits"], 10.0 * cosines, rtol=1e-4, atol=1e-5)
    apart = 1 - (unit * before / np.linalg.norm(before, axis=1, keepdims=True)).sum(1)
    assert found["feature_loss"] == pytest.approx(5.0 * np.sqrt(2 / 2) * apart.mean(), rel=1e-4)
    margins = [
        max(0.0, 0.5 - cosines[i, y[i]] + cosines[i, NEW].max()) for i in range(6) if y[i] in OLD
    ]
    assert found["margin_loss"] == pytest.approx(np.mean(margins), rel=1e-4)


def test_pod_net():
    inputs = keras.Input((6, 5, 2))
    maps = keras.layers.Conv2D(3, 3, name="one", activation="relu")(inputs)
    two = keras.layers.Conv2D(4, 2, name="two")(maps)
    x = keras.layers.GlobalAveragePooling2D(name="pooled")(two)
    student = keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))
    method = lifelong.PodNet(spatial=3.0, flat=1.0)
    made = lesson(method, student=student)
    assert method.taps(GrowingHead(student)) == ["one", "two"]
    x, y = numbers(4, 6, 5, 2), np.arange(4)
    found, outputs = terms(made, x, y)
    before = old_outputs(made, x)

    def pooled(maps):
        squares = maps.astype("float64") ** 2
        flat = np.concatenate([squares.sum(a).reshape(len(maps), -1) for a in (1, 2)], axis=1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    stages = [
        np.linalg.norm(pooled(before[name]) - pooled(outputs[name]), axis=1).mean()
        for name in ("one", "two")
    ]
    ratio = np.sqrt(4 / 2)
    assert found["spatial_loss"] == pytest.approx(3.0 * ratio * np.mean(stages), rel=1e-4)
    a, b = (
        v / np.linalg.norm(v, axis=1, keepdims=True)
        for v in (before["features"], outputs["features"])
    )
    assert found["flat_loss"] == pytest.approx(ratio * (1 - (a * b).sum(1)).mean(), rel=1e-3)
    same = exemplars.pooled_apart(before["one"], before["one"])
    assert float(ops.max(same)) == 0.0
    with pytest.raises(ValueError, match="Did you mean `one`"):
        lifelong.PodNet(layers=["onee"]).taps(GrowingHead(student))


@pytest.mark.parametrize("kind", [lifelong.WeightAligning, lifelong.BiasCorrection])
def test_share_of_the_old_answers(kind):
    made, x, y = lesson(kind()), numbers(5, 4), np.arange(5) % 4
    found, outputs = terms(made, x, y)
    hard = hard_loss(outputs["logits"], y).mean()
    old = soft(old_outputs(made, x)["logits"], outputs["logits"][:, OLD], 2.0).mean()
    assert found["label_loss"] == pytest.approx(0.5 * hard, rel=1e-5)
    assert found["distillation_loss"] == pytest.approx(0.5 * old, rel=1e-5)


def test_bias_is_fitted_on_logits_with_one_softmax():
    """Not on `softmax(softmax(z))`, which a crossentropy of probabilities would be."""
    y = rng.integers(0, 4, 60)
    logits = 2 * np.eye(4)[y] + rng.normal(size=(60, 4)) + [0, 3, 0, 3]

    def objective(point, twice=False):
        z = logits.copy()
        z[:, NEW] = point[0] * z[:, NEW] + point[1]
        z = np.exp(log_softmax(z)) if twice else z
        return hard_loss(z, y).mean() + 0.1 * point[1] ** 2 / 2

    found = correction.fitted_bias(logits, y, NEW, 0.1)
    best = minimize(objective, [1.0, 0.0], method="BFGS")
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    wrong = minimize(objective, [1.0, 0.0], args=(True,), method="BFGS").x
    assert np.abs(wrong - found).max() > 0.05
    assert found[1] < 0
    # Without a place for a shift the factor is the best one alone.
    alone = minimize(lambda a: objective([a[0], 0.0]), [1.0], method="BFGS").x[0]
    assert correction.fitted_bias(logits, y, NEW, np.inf) == (pytest.approx(alone, abs=1e-4), 0.0)


def test_a_factor_that_would_turn_new_classes_around_stays_one():
    y = np.array([0, 2] * 10 + [1, 3] * 10)
    logits = np.zeros((40, 4))
    # Rows of the new classes 1 and 3 are answered by the wrong one of the two.
    logits[y == 1, 3] = logits[y == 3, 1] = 2.0

    def objective(shift):
        z = logits + np.isin(np.arange(4), NEW) * shift[0]
        return hard_loss(z, y).mean()

    best = minimize(objective, [0.0], method="BFGS").x[0]
    assert correction.fitted_bias(logits, y, NEW) == (1.0, pytest.approx(best, abs=1e-4))


def test_a_row_whose_units_are_all_off_has_a_gradient():
    """Keras's `normalize` has none at zeros, and one such row makes all weights NaN."""
    student = model(units=4)
    hidden = student.get_layer("hidden")
    hidden.set_weights([hidden.get_weights()[0], np.zeros(5, "float32")])
    x = numbers(6, 4)
    x[0] = 0.0
    for method in (lifelong.LessForgetting(), lifelong.PodNet()):
        made = lesson(method, student=keras.models.clone_model(student))
        made.network.layers[1].set_weights(hidden.get_weights())
        made.compile("sgd", crossentropy(), run_eagerly=True)
        made.train_on_batch({"x": x}, np.array([0, 1, 2, 3, 0, 1]))
        assert all(np.isfinite(w).all() for w in made.network.get_weights())


def test_information_is_of_labels_that_the_model_draws(monkeypatch):
    """Not of those that it finds likeliest, nor of the given ones."""
    inputs = keras.Input((2,))
    sure = keras.Model(inputs, keras.layers.Dense(3, name="logits")(inputs))
    share = np.array([0.5, 0.3, 0.2])
    sure.set_weights([np.zeros((2, 3)), np.log(share)])
    drawn = []
    monkeypatch.setattr(
        regularizers, "fisher_information", lambda model, x, y: drawn.append(y) or [np.zeros(1)]
    )
    x = np.zeros((600, 2), "float32")
    learner = lifelong.Learner(sure, lifelong.ElasticWeights(samples=600))
    learner.compile(keras.optimizers.SGD(1e-9), run_eagerly=True)
    labels = np.arange(600) % 3
    learner.fit(lifelong.Stream.by_task([(x, labels)])[0], batch_size=600, verbose=0)
    np.testing.assert_allclose(np.bincount(drawn[0], minlength=3) / 600, share, atol=0.06)


def test_elastic_and_its_information():
    weights, fisher, anchor = ([numbers(3, 2), numbers(2)] for _ in range(3))
    expected = sum((f * (w - a) ** 2).sum() / 2 for w, f, a in zip(weights, fisher, anchor))
    assert float(regularizers.elastic(weights, fisher, anchor)) == pytest.approx(expected, rel=1e-5)
    inputs = keras.Input((3,))
    linear = keras.Model(inputs, keras.layers.Dense(4)(inputs))
    x, y = numbers(7, 3), rng.integers(0, 4, 7)
    kernel, bias = linear.get_weights()
    before = [w.copy() for w in (kernel, bias)]
    found = regularizers.fisher_information(linear, x, y.astype("int32"))
    residual = np.exp(log_softmax(x @ kernel + bias)) - np.eye(4)[y]
    gradients = x[:, :, None] * residual[:, None, :]
    # Squares of the gradients of rows, not the square of their mean.
    np.testing.assert_allclose(found[0], (gradients**2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(found[1], (residual**2).mean(0), rtol=1e-4)
    for w, b in zip(linear.get_weights(), before):
        np.testing.assert_array_equal(w, b)


def test_step_minimizes_the_sum_and_regularizers():
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, kernel_regularizer="l2", name="hidden")(inputs)
    student = keras.Model(inputs, keras.layers.Dense(4, name="logits")(hidden))
    made, x, y = (
        lesson(lifelong.LearningWithoutForgetting(), student=student),
        numbers(5, 4),
        np.arange(5) % 4,
    )
    found, _ = terms(made, x, y)
    extra = 0.01 * (ops.convert_to_numpy(made.network.weights[0]) ** 2).sum()
    logs = made.train_on_batch({"x": x}, y, return_dict=True)
    assert logs["loss"] == pytest.approx(sum(found.values()) + extra, rel=1e-5)
    for name, value in found.items():
        assert logs[name] == pytest.approx(value, rel=1e-5)
