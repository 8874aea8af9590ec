"""Labeled and unlabeled rows in one `fit`, against a NumPy computation of the total loss."""

import keras
import numpy as np
import pytest
from keras import ops
from small_models import crossentropy, hard_loss, kl, pair, rows

import keras_kd as kd


class LabeledAccuracy(keras.metrics.SparseCategoricalAccuracy):
    """Accuracy over the rows that have a label; the others carry -1."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        labeled = ops.cast(ops.greater_equal(y_true, 0), "float32")
        weight = labeled if sample_weight is None else labeled * sample_weight
        super().update_state(ops.maximum(y_true, 0), y_pred, weight)


def _mixed():
    x, y = rows(12)
    return x, np.where(np.arange(12) % 3 == 0, y, -1)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_without_a_label_take_part_in_the_distillation_alone(weighted):
    student, teacher = pair()
    x, y = _mixed()
    weight = np.random.default_rng(1).uniform(0.5, 2, 12).astype("float32") if weighted else None
    z_t, z_s = teacher.predict(x, verbose=0), student.predict(x, verbose=0)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.1),
        crossentropy(ignore_class=-1),
        metrics=[LabeledAccuracy(name="accuracy")],
        alpha=0.3,
        temperature=2.0,
    )
    logs = distiller.fit(x, y, sample_weight=weight, batch_size=12, verbose=0).history
    w = np.ones(12) if weight is None else weight
    known = y >= 0
    hard = (w * hard_loss(z_s, np.maximum(y, 0)))[known].sum() / known.sum()
    soft = (w * kl(z_t, z_s, 2.0)).mean()
    np.testing.assert_allclose(logs["student_loss"][0], hard, rtol=1e-5)
    np.testing.assert_allclose(logs["distillation_loss"][0], soft, rtol=1e-5)
    np.testing.assert_allclose(logs["loss"][0], 0.3 * hard + 0.7 * soft, rtol=1e-5)
    np.testing.assert_allclose(
        logs["accuracy"][0], np.mean(z_s.argmax(-1)[known] == y[known]), rtol=1e-6
    )


def test_a_batch_without_any_label_trains_on_the_teacher_alone():
    student, teacher = pair()
    x, _ = rows(8)
    soft = kl(teacher.predict(x, verbose=0), student.predict(x, verbose=0), 1.0).mean()
    before = student.get_weights()
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), crossentropy(ignore_class=-1), alpha=0.5)
    logs = distiller.fit(x, np.full(8, -1), verbose=0).history
    assert logs["student_loss"][0] == 0
    np.testing.assert_allclose(logs["loss"][0], 0.5 * soft, rtol=1e-5)
    assert any(np.abs(a - b).max() > 0 for a, b in zip(before, student.get_weights()))


def test_a_weight_of_zero_leaves_a_row_out_of_both_losses():
    student, teacher = pair()
    x, y = rows(8)
    weight = np.array([1, 0] * 4, "float32")
    z_t, z_s = teacher.predict(x, verbose=0), student.predict(x, verbose=0)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), crossentropy())
    logs = distiller.fit(x, y, sample_weight=weight, verbose=0).history
    np.testing.assert_allclose(logs["student_loss"][0], (weight * hard_loss(z_s, y)).mean(), 1e-5)
    np.testing.assert_allclose(
        logs["distillation_loss"][0], (weight * kl(z_t, z_s, 1)).mean(), 1e-5
    )


def test_the_label_for_none_is_refused_where_the_loss_does_not_ignore_it():
    student, teacher = pair()
    x, y = _mixed()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", crossentropy())
    with pytest.raises(ValueError, match="Labels run from -1"):
        distiller.fit(x, y, verbose=0)
    distiller.compile("sgd", crossentropy(ignore_class=-2))
    with pytest.raises(ValueError, match="Labels run from -1"):
        distiller.fit(x, y, verbose=0)


@pytest.mark.parametrize("metrics", [None, ["accuracy"]])
def test_no_loss_is_made_up_where_none_is_computed(metrics):
    """A `val_loss` of 0 would stop the training early."""
    student, teacher = pair()
    x, y = rows(8)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), metrics=metrics)
    logs = distiller.fit(x, y, validation_data=(x, y), epochs=2, verbose=0).history
    assert "loss" in logs
    found = {name for name in logs if name.startswith("val_")}
    assert found == ({"val_accuracy"} if metrics else set())
    right = student.predict(x, verbose=0).argmax(-1) == y
    expected = {"accuracy": pytest.approx(right.mean())} if metrics else {}
    assert distiller.evaluate(x, y, verbose=0, return_dict=True) == expected
    assert distiller.evaluate(x, y, verbose=0) == (expected["accuracy"] if metrics else [])


def test_the_loss_is_that_of_the_teacher_where_evaluation_asks_for_it():
    student, teacher = pair()
    x, _ = rows(8)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), temperature=2.0, evaluate_distillation=True)
    soft = kl(teacher.predict(x, verbose=0), student.predict(x, verbose=0), 2.0).mean()
    found = distiller.evaluate(x, verbose=0, return_dict=True)
    np.testing.assert_allclose(found["loss"], soft, rtol=1e-5)
