"""What does not count is as good as absent: every loss against itself on the rest of the batch."""

import keras
import numpy as np
import numpy_losses as formulas
import pytest
from keras import ops
from test_conformance import SEQUENCES, TIGHT, mapped, numpy, rows

from keras_kd import losses
from keras_kd.losses import counts
from keras_kd.utils.masks import with_keras_mask

# Samples that count, and their weights.
KEPT = np.array([True, False, True, True, False, True, True])
WEIGHT = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 3.0, 1.5])
RELATIONS = {
    "similarity_preserving",
    "rkd",
    "rkd_distances",
    "correlation_congruence",
    "pkt",
    "crd_in_batch",
    "dist",
    "dist_4",
    "soft_targets_flsw",
    "soft_targets_cwsm",
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def _data(row, rng):
    teacher, student = row.data(rng, len(KEPT))
    context = row.context(rng, (len(KEPT),))
    return teacher, student, context


def _kept(*sides):
    return mapped(lambda array: array[KEPT], *sides)


def _noisy(rng, *sides):
    """The same with other numbers in the samples that do not count."""

    def spoil(array):
        wide = KEPT.reshape((-1,) + (1,) * (array.ndim - 1))
        return np.where(wide, array, rng.normal(0, 9, array.shape))

    return mapped(spoil, *sides)


@rows()
def test_samples_of_weight_zero_are_in_no_relation(row, rng):
    teacher, student, context = _data(row, rng)
    spoiled = _noisy(rng, teacher, student)
    short = {name: value[KEPT] for name, value in context.items()}
    rest = _kept(teacher, student)
    for reduction in ("sum", "mean_with_sample_weight"):
        loss = row.loss(dtype="float64", reduction=reduction)
        alone = numpy(loss(*rest, sample_weight=WEIGHT[KEPT], **short))
        found = numpy(loss(*spoiled, sample_weight=WEIGHT, **context))
        np.testing.assert_allclose(found, alone, rtol=10 * TIGHT)
    # Keras divides by all samples, and so do we.
    loss = row.loss(dtype="float64")
    alone = numpy(loss(*rest, sample_weight=WEIGHT[KEPT], **short))
    found = numpy(loss(*spoiled, sample_weight=WEIGHT, **context))
    np.testing.assert_allclose(found, alone * KEPT.mean(), rtol=10 * TIGHT)


@rows()
def test_masked_samples_are_absent(row, rng, gradient):
    teacher, student, context = _data(row, rng)
    spoiled = _noisy(rng, teacher, student)
    short = {name: value[KEPT] for name, value in context.items()}
    loss = row.loss(dtype="float64")
    alone = numpy(loss(*_kept(teacher, student), **short))
    found = numpy(loss(*spoiled, mask=KEPT, **context))
    np.testing.assert_allclose(found, alone, rtol=10 * TIGHT)
    slopes = gradient(lambda s: loss(spoiled[0], s, mask=KEPT, **context), spoiled[1])
    for leaf in keras.tree.flatten(slopes):
        assert np.isfinite(leaf).all()
        assert (leaf[~KEPT] == 0).all()


@rows(RELATIONS)
def test_the_formula_sees_only_what_counts(row, rng):
    """Against NumPy, which is given the rest of the batch."""
    teacher, student, context = _data(row, rng)
    loss = row.loss(dtype="float64", reduction="sum")
    found = numpy(loss(teacher, student, sample_weight=WEIGHT, **context))
    values = row.expected(loss, *_kept(teacher, student))
    np.testing.assert_allclose(found, (WEIGHT[KEPT] * values).sum(), rtol=1e-5)


@rows(RELATIONS)
def test_nothing_that_counts_is_zero(row, rng, gradient):
    teacher, student, context = _data(row, rng)
    loss = row.loss(dtype="float64")
    for given in ({"sample_weight": np.zeros(7)}, {"mask": np.zeros(7, "bool")}):
        assert numpy(loss(teacher, student, **given, **context)) == 0
        slopes = gradient(lambda s, given=given: loss(teacher, s, **given, **context), student)
        assert all((leaf == 0).all() for leaf in keras.tree.flatten(slopes))


@rows(SEQUENCES)
def test_tokens_of_weight_zero_are_in_no_relation(row, rng):
    """Weights of 0 and 1 have the sums of a mask, and divide by all tokens."""
    teacher, student = row.sequences(rng, 5)
    context = row.context(rng, (5, 6))
    valid = np.arange(6) < np.array([6, 4, 1, 5, 3])[:, None]
    loss = row.loss(dtype="float64")
    masked = numpy(loss(teacher, student, mask=valid, **context))
    weighed = numpy(loss(teacher, student, sample_weight=valid * 1.0, **context))
    np.testing.assert_allclose(weighed, masked * valid.mean(), rtol=10 * TIGHT)


def test_dist_leaves_padding_out_of_its_columns():
    """The columns of the tokens that count, in NumPy; rows and columns weigh alike."""
    rng = np.random.default_rng(1)
    teacher, student = rng.normal(0, 2, (2, 4, 6, 5))
    weight = rng.uniform(0.5, 2, (4, 6)) * (rng.random((4, 6)) < 0.6)
    mask = rng.random((4, 6)) < 0.7
    seen = mask & (weight > 0)
    values = formulas.dist(teacher[seen], student[seen])
    loss = losses.DIST(dtype="float64")
    found = numpy(loss(teacher, student, sample_weight=weight, mask=mask))
    np.testing.assert_allclose(found, (weight[seen] * values).sum() / mask.sum(), rtol=1e-6)
    found = numpy(loss(teacher, student, sample_weight=weight))
    values = formulas.dist(teacher[weight > 0], student[weight > 0])
    expected = (weight[weight > 0] * values).sum() / weight.size
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["weight", "mask"])
def test_attention_scores_leave_out_queries_and_keys(kind):
    rng = np.random.default_rng(2)
    teacher, student = rng.normal(0, 1, (2, 3, 2, 5, 5))
    valid = np.arange(5) < np.array([5, 2, 3])[:, None]
    given = {"sample_weight": valid * 1.0} if kind == "weight" else {"mask": valid}
    found = numpy(losses.AttentionScores(dtype="float64")(teacher, student, **given))
    gap = ((teacher - student) ** 2).mean(1)
    values = (gap * valid[:, None, :]).sum(-1) / valid.sum(-1)[:, None]
    divisor = valid.size if kind == "weight" else valid.sum()
    np.testing.assert_allclose(found, (values * valid).sum() / divisor, rtol=1e-6)


def test_weights_of_queries_alone_in_attention_between_two_sequences():
    rng = np.random.default_rng(2)
    teacher, student = rng.normal(0, 1, (2, 3, 2, 4, 6))
    weight = np.array([[1.0, 0, 2, 1], [0, 0, 1, 1], [3, 1, 0, 0]])
    found = numpy(losses.AttentionScores(dtype="float64")(teacher, student, weight))
    values = ((teacher - student) ** 2).mean((1, 3))
    np.testing.assert_allclose(found, (weight * values).mean(), rtol=1e-6)


def _maps(rng):
    """Features of tokens, of which some do not count, and those of the rest by sample."""
    teacher, student = rng.normal(0, 1, (2, 4, 6, 3))
    valid = np.arange(6) < np.array([6, 4, 0, 3])[:, None]
    rest = [(teacher[i : i + 1, :n], student[i : i + 1, :n]) for i, n in enumerate((6, 4, 0, 3))]
    return teacher, student, valid, [pair for i, pair in enumerate(rest) if i != 2]


@pytest.mark.parametrize("kind", ["mask", "weight"])
@pytest.mark.parametrize(
    "make",
    [losses.AttentionTransfer, losses.NST, losses.ICKD, losses.FactorTransfer],
    ids=lambda make: make.__name__,
)
def test_values_of_samples_are_those_of_their_positions_that_count(make, kind, rng):
    """And a sample of which no position counts has none."""
    teacher, student, valid, rest = _maps(rng)
    loss = make(dtype="float64")
    alone = [numpy(loss(*pair)) for pair in rest]
    if kind == "mask":
        found = numpy(loss(teacher, student, mask=valid))
        np.testing.assert_allclose(found, np.mean(alone), rtol=1e-6)
    else:
        # A sample weighs the mean of its positions.
        found = numpy(loss(teacher, student, sample_weight=valid * 1.0))
        share = valid.mean(1)[[0, 1, 3]]
        np.testing.assert_allclose(found, (share * alone).sum() / 4, rtol=1e-6)


def test_flow_matrices_are_means_over_what_counts(rng):
    first, second = _maps(rng), _maps(rng)
    valid = first[2]
    loss = losses.FSP(dtype="float64")
    alone = [
        numpy(loss([a[0], b[0]], [a[1], b[1]])) for a, b in zip(first[3], second[3], strict=True)
    ]
    found = numpy(loss([first[0], second[0]], [first[1], second[1]], mask=valid))
    np.testing.assert_allclose(found, np.mean(alone), rtol=1e-6)


def test_a_pixel_of_weight_zero_is_no_part_of_a_hint(rng):
    teacher, student = rng.normal(0, 1, (2, 3, 4, 5, 2))
    weight = rng.uniform(0.5, 2, (3, 4, 5)) * (rng.random((3, 4, 5)) < 0.5)
    found = numpy(losses.Hint(dtype="float64")(teacher, student, sample_weight=weight))
    values = ((teacher - student) ** 2).mean(-1)
    np.testing.assert_allclose(found, (weight * values).mean(), rtol=1e-6)


def test_one_token_counts_or_does_not():
    rng = np.random.default_rng(3)
    teacher, student = rng.normal(0, 1, (2, 4, 3, 5))
    valid = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]], "bool")
    first = valid[:, 0]
    values = formulas.pkd(teacher, student)
    loss = losses.PKD(dtype="float64")
    found = numpy(loss(teacher, student, mask=valid))
    np.testing.assert_allclose(found, values[first].mean(), rtol=1e-6)
    weight = valid * np.array([1.0, 2.0, 3.0, 4.0])[:, None]
    found = numpy(loss(teacher, student, sample_weight=weight))
    np.testing.assert_allclose(found, (weight[:, 0] * values).mean(), rtol=1e-6)


def test_a_memory_learns_nothing_of_what_does_not_count():
    """Neither the bank nor its constant; a row that is there twice is written as it counts."""
    rng = np.random.default_rng(4)
    teacher, student = rng.normal(0, 1, (6, 4)), rng.normal(0, 1, (6, 3))
    indices = np.array([0, 1, 2, 3, 1, 5])
    weight = np.array([1.0, 1, 0, 1, 0, 0])
    kept = weight > 0
    found = []
    for which in (slice(None), kept):
        keras.utils.set_random_seed(5)
        loss = losses.CRD(samples=8, negatives=4, width=6, dtype="float64")
        loss.build((None, 4), (None, 3))
        before = [numpy(bank.bank) for bank in loss.banks]
        # Two draws of one shape are alike only if the generators are in one state.
        value = loss(
            teacher[which],
            student[which],
            sample_weight=weight[which],
            indices=indices[which],
            training=True,
        )
        assert np.isfinite(float(value))
        found.append([numpy(bank.bank) for bank in loss.banks])
        untouched = [i for i in range(8) if i not in indices[kept]]
        for bank, old in zip(found[-1], before, strict=True):
            np.testing.assert_array_equal(bank[untouched], old[untouched])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    loss = losses.CRD(samples=8, negatives=4, width=6, dtype="float64")
    assert float(loss(teacher, student, np.zeros(6), indices=indices, training=True)) == 0
    assert all(float(bank.constant_is_set) == 0 for bank in loss.banks)


def test_what_counts_of_an_output():
    """Positions by both masks and the labels; a row without a label goes on."""
    ours = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]], "bool")
    theirs = np.array([[1, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]], "bool")
    labeled = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]], "bool")
    logits = [
        with_keras_mask(ops.ones((4, 3, 2)), ops.convert_to_tensor(m)) for m in (theirs, ours)
    ]
    found = counts.counted(*logits, None, ops.convert_to_tensor(labeled))
    expected = [[1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(ops.convert_to_numpy(found.mask), np.array(expected, "bool"))
    assert found.weight is None
    # A label that weighs nothing is one all the same.
    weight = np.array([[1.0, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]])
    found = counts.counted(*logits, weight, ops.convert_to_tensor(labeled))
    np.testing.assert_array_equal(ops.convert_to_numpy(found.mask), np.array(expected, "bool"))
    over = ops.convert_to_numpy(found.over(logits[0][..., 0]))
    np.testing.assert_array_equal(over, weight * ops.convert_to_numpy(found.mask))
    assert counts.counted(None, ops.ones((4, 2)), None, ops.ones((4,), "bool")).mask is None
