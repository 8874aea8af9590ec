"""CRD with memory banks: the formula, what moves when, and the row numbers it needs."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy import special

import keras_kd
from keras_kd import losses

SAMPLES, NEGATIVES, WIDTH = 20, 6, 4
INDICES = np.array([3, 0, 7, 19, 5])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def built(rng, **options):
    """A loss with fixed draws, and one batch of features."""
    options = {"reduction": None, "dtype": "float64", **options}
    loss = losses.CRD(samples=SAMPLES, negatives=NEGATIVES, width=WIDTH, **options)
    loss.build((None, 6), (None, 3))
    drawn = rng.integers(0, SAMPLES, (5, NEGATIVES))
    fixed = ops.convert_to_tensor(np.column_stack([INDICES, drawn]).astype("int32"))
    loss.draws = lambda indices: fixed
    return loss, np.array(fixed), rng.normal(size=(5, 6)), rng.normal(size=(5, 3))


def embedded(loss, side, features):
    kernel, bias = loss.embeddings[side].get_weights()
    return unit(features @ kernel + bias)


def expected(anchors, bank, drawn, constant=None):
    """The reference's loss of one side, and its constant."""
    p = np.exp(np.einsum("bd,bkd->bk", anchors, bank[drawn]) / 0.07)
    constant = p.mean() * SAMPLES if constant is None else constant
    p, noise = p / constant, NEGATIVES / SAMPLES
    positive = np.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
    negative = np.log(noise / (p[:, 1:] + noise + 1e-7)).sum(1)
    return -positive - negative, constant


@pytest.fixture
def rng():
    keras.utils.set_random_seed(1)
    return np.random.default_rng(1)


def test_value_is_the_formula_and_the_first_batch_sets_the_constant(rng):
    loss, drawn, teacher, student = built(rng)
    banks = [np.array(bank.bank) for bank in loss.banks]
    ours, z_ours = expected(embedded(loss, 1, student), banks[0], drawn)
    theirs, z_theirs = expected(embedded(loss, 0, teacher), banks[1], drawn)
    value = loss(teacher, student, indices=INDICES, training=True)
    np.testing.assert_allclose(value, ours + theirs, rtol=1e-6)
    for bank, constant in zip(loss.banks, (z_ours, z_theirs)):
        np.testing.assert_allclose(float(bank.log_constant), np.log(constant), rtol=1e-6)
    # The banks have moved by now, the constants stay.
    banks = [np.array(bank.bank) for bank in loss.banks]
    student = student + 1.0
    ours, _ = expected(embedded(loss, 1, student), banks[0], drawn, z_ours)
    theirs, _ = expected(embedded(loss, 0, teacher), banks[1], drawn, z_theirs)
    value = loss(teacher, student, indices=INDICES, training=True)
    np.testing.assert_allclose(value, ours + theirs, rtol=1e-6)


def test_banks_move_in_training_alone(rng):
    loss, _, teacher, student = built(rng)
    before = [np.array(bank.bank) for bank in loss.banks]
    loss(teacher, student, indices=INDICES)
    for bank, old in zip(loss.banks, before):
        np.testing.assert_array_equal(np.array(bank.bank), old)
        assert float(bank.constant_is_set) == 0.0
    loss(teacher, student, indices=INDICES, training=True)
    for side, features in enumerate((teacher, student)):
        new = np.array(loss.banks[side].bank)
        moved = unit(0.5 * before[side][INDICES] + 0.5 * embedded(loss, side, features))
        np.testing.assert_allclose(new[INDICES], moved, rtol=1e-6)
        others = np.setdiff1d(np.arange(SAMPLES), INDICES)
        np.testing.assert_array_equal(new[others], before[side][others])


def test_gradient_reaches_student_and_embeddings(rng, gradient):
    loss, _, teacher, student = built(rng, reduction="sum")
    found = gradient(lambda s: loss(teacher, s, indices=INDICES), student)
    assert np.isfinite(found).all()
    assert (np.abs(found).max(-1) > 1e-3).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precision_is_finite(rng, dtype):
    loss, _, teacher, student = built(rng, dtype=dtype)
    for _ in range(2):
        value = loss(100 * teacher, student, indices=INDICES, training=True)
        assert np.isfinite(ops.convert_to_numpy(ops.cast(value, "float32"))).all()


def test_row_numbers_are_asked_for():
    loss = losses.CRD(samples=SAMPLES)
    assert loss.reads_indices
    assert not losses.CRD().reads_indices
    with pytest.raises(ValueError, match="row numbers"):
        loss(np.ones((2, 3)), np.ones((2, 3)))


def test_draws_are_rows_of_the_data_with_the_own_row_first():
    loss = losses.CRD(samples=SAMPLES, negatives=500, width=WIDTH)
    loss.build((None, 6), (None, 3))
    drawn = ops.convert_to_numpy(loss.draws(ops.convert_to_tensor(INDICES.astype("int32"))))
    assert drawn.shape == (5, 501)
    np.testing.assert_array_equal(drawn[:, 0], INDICES)
    assert set(drawn[:, 1:].ravel()) == set(range(SAMPLES))


def test_memory_is_no_trainable_weight():
    transfer = keras_kd.Transfer(losses.CRD(samples=SAMPLES, negatives=NEGATIVES, width=WIDTH))
    transfer.build((None, 6), (None, 3))
    assert len(transfer.trainable_weights) == 4
    banks = [w for w in transfer.non_trainable_weights if w.shape == (SAMPLES, WIDTH)]
    assert len(banks) == 2


@pytest.mark.parametrize(
    "options", [{"momentum": 1.0}, {"samples": 0}, {"negatives": 0}, {"contrast": 0}, {"width": 0}]
)
def test_bad_arguments_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        losses.CRD(**options)


def test_in_batch_finds_its_own_pair():
    """Perfectly aligned embeddings that are far apart have next to no loss."""
    loss = losses.CRD(width=3, dtype="float64")
    loss.build((None, 3), (None, 3))
    for layer in loss.layers:
        layer.set_weights([np.eye(3), np.zeros(3)])
    assert float(loss(np.eye(3), 5 * np.eye(3))) < 1e-5
    worst = float(loss(np.eye(3), np.roll(np.eye(3), 1, 0)))
    expected = 2 * (special.logsumexp([1 / 0.07, 0, 0]))
    assert worst == pytest.approx(expected)
