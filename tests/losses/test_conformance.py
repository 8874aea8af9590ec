"""Every loss passes this table. A new loss adds one row to `ROWS`, its formula to numpy_losses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy_losses as formulas
import pytest
from keras import ops

import keras_kd
from keras_kd import losses

# On torch, Keras's own mean of float64 values is a float32.
TIGHT = 1e-6 if keras.backend.backend() == "torch" else 1e-9


def logits(rng, batch):
    return rng.normal(0, 2, (batch, 5)), rng.normal(0, 2, (batch, 5))


def token_logits(rng, batch):
    return rng.normal(0, 2, (batch, 6, 5)), rng.normal(0, 2, (batch, 6, 5))


def images(rng, batch):
    return rng.normal(0, 1, (batch, 4, 4, 3)), rng.normal(0, 1, (batch, 4, 4, 3))


def tokens(rng, batch):
    return rng.normal(0, 1, (batch, 6, 8)), rng.normal(0, 1, (batch, 6, 8))


def unequal_maps(rng, batch):
    return rng.normal(0, 1, (batch, 3, 3, 6)), rng.normal(0, 1, (batch, 5, 5, 4))


def two_layers(rng, batch):
    """Two maps on each side, of other sizes, with the same channels."""
    shapes = ((6, 6, 3), (3, 3, 4)), ((5, 5, 3), (5, 5, 4))
    return tuple([rng.normal(0, 1, (batch, *shape)) for shape in side] for side in shapes)


def two_images(rng, batch):
    """Two maps on each side, of two sizes, alike on both sides."""
    shapes = (4, 4, 3), (2, 2, 5)
    return tuple([rng.normal(0, 1, (batch, *shape)) for shape in shapes] for _ in range(2))


def levels(rng, batch):
    """Three levels, shallow to deep, the last one pooled."""
    shapes = ((6, 6, 4), (3, 3, 6), (8,)), ((8, 8, 3), (4, 4, 5), (6,))
    return tuple([rng.normal(0, 1, (batch, *shape)) for shape in side] for side in shapes)


def two_states(rng, batch):
    return tuple([rng.normal(0, 1, (batch, 6, 8)) for _ in range(2)] for _ in range(2))


def embeddings(rng, batch):
    return rng.normal(0, 1, (batch, 7)), rng.normal(0, 1, (batch, 2, 2))


def scores(rng, batch):
    """Attention scores, in part forbidden by numbers that differ."""
    teacher, student = rng.normal(0, 1, (2, batch, 2, 6, 6))
    forbidden = np.triu(np.ones((6, 6), "bool"), 4)
    return np.where(forbidden, -1e4, teacher), np.where(forbidden, -1e3, student)


def queries_keys_values(rng, batch):
    """Of other widths; the student's by attention head, as Keras's layer gives them."""
    teacher = [rng.normal(0, 1, (batch, 6, 12)) for _ in range(3)]
    student = [rng.normal(0, 1, (batch, 6, 4, 2)) for _ in range(3)]
    return teacher, student


@dataclass(frozen=True)
class Row:
    """One loss, or one loss with options, and what is true of it.

    Attributes:
        make: Builds the loss from `dtype`, `reduction` and the like.
        formula: `(teacher, student, **context)` in NumPy: the values before weights.
        owns: Whether the loss has layers; its formula then takes the loss first.
        data: `(rng, batch)`: teacher and student arrays, or lists of them.
        sequences: The same with an axis of tokens, where a mask can act.
        context: `(rng, shape)`: further call arguments, `labels=` for one.
        minimum: The value where student and teacher are the same tensor; `None` where
            layers stand between them.
        tolerance: Of the minimum; DIST keeps 1e-8 in a denominator.
        steep: Whether a confident, wrong student still gets a gradient of order one.
        adaptive: Whether temperatures adapt to the logits. They take no gradient, and the
            formula keeps them where the student's logits are `at`.
    """

    make: Callable[..., losses.DistillationLoss]
    formula: Callable[..., np.ndarray]
    data: Callable[..., Any] = logits
    owns: bool = False
    sequences: Callable[..., Any] | None = None
    context: Callable[..., dict[str, Any]] = lambda rng, shape: {}
    minimum: float | None = 0.0
    tolerance: float = 1e-9
    steep: bool = False
    adaptive: bool = False

    def loss(self, **kwargs):
        # Layers that a loss owns start alike whenever it is made.
        keras.utils.set_random_seed(3)
        return self.make(**kwargs)

    def expected(self, loss, teacher, student, **context):
        first = (loss,) if self.owns else ()
        return self.formula(*first, teacher, student, **context)


ROWS = {
    "soft_targets": Row(
        losses.SoftTargets, formulas.soft_targets, sequences=token_logits, steep=True
    ),
    "soft_targets_4": Row(
        lambda **kwargs: losses.SoftTargets(temperature=4.0, **kwargs),
        lambda t, s: formulas.soft_targets(t, s, 4.0),
        sequences=token_logits,
        steep=True,
    ),
    "soft_targets_standardized": Row(
        lambda **kwargs: losses.SoftTargets(temperature=2.0, standardize=True, **kwargs),
        lambda t, s: formulas.soft_targets(formulas.standardized(t), formulas.standardized(s), 2.0),
        sequences=token_logits,
    ),
    "binary_soft_targets": Row(
        lambda **kwargs: losses.BinarySoftTargets(temperature=2.0, **kwargs),
        lambda t, s: formulas.binary_soft_targets(t, s, 2.0),
        sequences=token_logits,
        steep=True,
    ),
    "logit_mse": Row(
        lambda **kwargs: losses.LogitMSE(temperature=2.0, **kwargs),
        lambda t, s: formulas.logit_mse(t, s, 2.0),
        sequences=token_logits,
        steep=True,
    ),
    "logit_mse_standardized": Row(
        lambda **kwargs: losses.LogitMSE(standardize=True, **kwargs),
        lambda t, s: formulas.logit_mse(formulas.standardized(t), formulas.standardized(s)),
        sequences=token_logits,
    ),
    "logit_huber": Row(
        lambda **kwargs: losses.LogitHuber(delta=0.7, temperature=2.0, **kwargs),
        lambda t, s: formulas.logit_huber(t, s, 2.0, 0.7),
        sequences=token_logits,
        steep=True,
    ),
    "reverse_kl": Row(
        lambda **kwargs: losses.ReverseKL(temperature=0.9, **kwargs),
        lambda t, s: formulas.reverse_kl(t, s, 0.9),
        sequences=token_logits,
    ),
    "jensen_shannon": Row(
        lambda **kwargs: losses.JensenShannon(temperature=0.9, **kwargs),
        lambda t, s: formulas.jensen_shannon(t, s, 0.9),
        sequences=token_logits,
    ),
    "jensen_shannon_0.2": Row(
        lambda **kwargs: losses.JensenShannon(0.2, **kwargs),
        lambda t, s: formulas.jensen_shannon(t, s, beta=0.2),
    ),
    "jensen_shannon_0": Row(
        lambda **kwargs: losses.JensenShannon(0, **kwargs), formulas.soft_targets, steep=True
    ),
    "jensen_shannon_1": Row(
        lambda **kwargs: losses.JensenShannon(1, **kwargs), formulas.reverse_kl
    ),
    "total_variation": Row(
        lambda **kwargs: losses.TotalVariation(temperature=2.0, **kwargs),
        lambda t, s: formulas.total_variation(t, s, 2.0),
        sequences=token_logits,
    ),
    "decoupled_kd": Row(
        lambda **kwargs: losses.DecoupledKD(temperature=4.0, **kwargs),
        lambda t, s, labels: formulas.decoupled_kd(t, s, labels, 4.0),
        context=lambda rng, shape: {"labels": rng.integers(0, 5, shape)},
        sequences=token_logits,
        steep=True,
    ),
    "decoupled_kd_one_hot": Row(
        lambda **kwargs: losses.DecoupledKD(alpha=0.5, beta=2.0, standardize=True, **kwargs),
        lambda t, s, labels: formulas.decoupled_kd(
            formulas.standardized(t), formulas.standardized(s), labels, alpha=0.5, beta=2.0
        ),
        context=lambda rng, shape: {"labels": np.eye(5)[rng.integers(0, 5, shape)]},
        sequences=token_logits,
    ),
    "dist": Row(losses.DIST, formulas.dist, sequences=token_logits, tolerance=1e-4),
    "dist_4": Row(
        lambda **kwargs: losses.DIST(beta=0.5, gamma=2.0, temperature=4.0, **kwargs),
        lambda t, s: formulas.dist(t, s, 4.0, 0.5, 2.0),
        sequences=token_logits,
        tolerance=1e-4,
    ),
    "soft_targets_flsw": Row(
        lambda **kwargs: losses.SoftTargets(losses.FLSW(base=4.0), **kwargs),
        formulas.flsw_soft_targets,
        sequences=token_logits,
        steep=True,
        adaptive=True,
    ),
    "soft_targets_cwsm": Row(
        lambda **kwargs: losses.SoftTargets(losses.CWSM(base=4.0), **kwargs),
        formulas.cwsm_soft_targets,
        sequences=token_logits,
        steep=True,
        adaptive=True,
    ),
    "hint": Row(losses.Hint, formulas.hint, images, sequences=tokens),
    "hint_units": Row(losses.Hint, formulas.hint, logits),
    "hint_layers": Row(
        losses.Hint, formulas.mean_of(formulas.hint), two_images, sequences=two_states
    ),
    "attention_transfer": Row(
        losses.AttentionTransfer, formulas.rows_of(formulas.attention_transfer), unequal_maps
    ),
    "attention_transfer_layers": Row(
        losses.AttentionTransfer,
        lambda t, s: np.mean(
            [formulas.rows_of(formulas.attention_transfer)(*pair) for pair in zip(t, s)], 0
        ),
        two_layers,
    ),
    "fsp": Row(losses.FSP, formulas.rows_of(formulas.fsp), two_layers),
    "nst": Row(losses.NST, formulas.rows_of(formulas.nst), unequal_maps),
    "nst_few_positions": Row(
        losses.NST,
        formulas.rows_of(formulas.nst),
        lambda rng, batch: (rng.normal(0, 1, (batch, 2, 2, 7)), rng.normal(0, 1, (batch, 2, 2, 5))),
    ),
    "ickd": Row(losses.ICKD, formulas.rows_of(formulas.ickd), images),
    "ickd_layers": Row(losses.ICKD, formulas.mean_of(formulas.rows_of(formulas.ickd)), two_images),
    "factor_transfer": Row(
        losses.FactorTransfer, formulas.rows_of(formulas.factor_transfer), images
    ),
    "factor_transfer_learned": Row(
        lambda **kwargs: losses.FactorTransfer(rate=0.5, **kwargs),
        formulas.factor_transfer_learned,
        unequal_maps,
        owns=True,
        minimum=None,
    ),
    "vid": Row(losses.VID, formulas.vid, unequal_maps, owns=True, minimum=None),
    "simkd": Row(losses.SimKD, formulas.simkd, unequal_maps, owns=True, minimum=None),
    "reviewkd": Row(losses.ReviewKD, formulas.reviewkd, levels, owns=True, minimum=None),
    "similarity_preserving": Row(
        losses.SimilarityPreserving, formulas.similarity_preserving, embeddings
    ),
    "rkd": Row(losses.RKD, formulas.rkd, embeddings),
    "rkd_distances": Row(
        lambda **kwargs: losses.RKD(distance_weight=2.0, angle_weight=0.0, **kwargs),
        lambda t, s: formulas.rkd(t, s, 2.0, 0.0),
        embeddings,
    ),
    "correlation_congruence": Row(
        losses.CorrelationCongruence, formulas.correlation_congruence, embeddings
    ),
    "pkt": Row(losses.PKT, formulas.pkt, embeddings),
    "crd_in_batch": Row(losses.CRD, formulas.crd_in_batch, embeddings, owns=True, minimum=None),
    "hidden_state": Row(losses.HiddenState, formulas.hint, tokens, sequences=tokens),
    "hidden_state_layers": Row(
        losses.HiddenState,
        lambda t, s: np.mean([formulas.hint(*pair) for pair in zip(t, s)], 0),
        two_states,
        sequences=two_states,
    ),
    "hidden_state_cosine": Row(
        lambda **kwargs: losses.HiddenState("cosine", **kwargs),
        formulas.hidden_cosine,
        tokens,
        sequences=tokens,
    ),
    "attention_scores": Row(losses.AttentionScores, formulas.attention_scores, scores),
    "minilm": Row(
        lambda **kwargs: losses.MiniLM(relation_heads=2, **kwargs),
        lambda t, s: formulas.minilm(t, s, 2),
        queries_keys_values,
        sequences=queries_keys_values,
    ),
    "pkd": Row(losses.PKD, formulas.pkd, tokens),
    "pkd_layers": Row(
        losses.PKD,
        lambda t, s: np.mean([formulas.pkd(*pair) for pair in zip(t, s)], 0),
        two_states,
    ),
}

FEATURES = {name for name, row in ROWS.items() if not row.make().reads_logits}
LOGITS = set(ROWS) - FEATURES
STEEP = {name for name, row in ROWS.items() if row.steep}
SEQUENCES = {name for name, row in ROWS.items() if row.sequences is not None}


def rows(names=tuple(ROWS)):
    return pytest.mark.parametrize("row", [pytest.param(ROWS[n], id=n) for n in sorted(names)])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def cast(structure, dtype):
    return keras.tree.map_structure(lambda array: ops.cast(array, dtype), structure)


def numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float64"))


def finite(structure):
    return all(np.isfinite(numpy(leaf)).all() for leaf in keras.tree.flatten(structure))


def alike(loss, other, teacher, student):
    """`loss` with the layers of `other`."""
    loss.build(*mapped(lambda array: tuple(array.shape), teacher, student))
    for layer, source in zip(loss.layers, other.layers):
        layer.set_weights(source.get_weights())
    return loss


def mapped(function, teacher, student):
    return (
        keras.tree.map_structure(function, teacher),
        keras.tree.map_structure(function, student),
    )


def slope_is_the_formulas(row, loss, teacher, student, found, rng, context):
    """Hold the gradients of the summed values against the formula along a random direction."""
    direction = keras.tree.map_structure(lambda a: rng.normal(size=a.shape), student)
    still = {"at": student} if row.adaptive else {}

    def along(step):
        moved = keras.tree.map_structure(lambda a, d: a + step * d, student, direction)
        return row.expected(loss, teacher, moved, **context, **still).sum()

    expected = (along(1e-5) - along(-1e-5)) / 2e-5
    slope = sum(
        (g * d).sum() for g, d in zip(keras.tree.flatten(found), keras.tree.flatten(direction))
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-7)


@rows()
def test_value_is_the_formula(row, rng):
    for data, shape in ((row.data, (7,)), (row.sequences, (7, 6))):
        if data is None:
            continue
        teacher, student = data(rng, 7)
        context = row.context(rng, shape)
        loss = row.loss(dtype="float64", reduction=None)
        value = loss(teacher, student, **context)
        expected = row.expected(loss, teacher, student, **context)
        assert value.shape == expected.shape
        np.testing.assert_allclose(numpy(value), expected, rtol=1e-6, atol=1e-12)
        assert (expected > 0).any()


@rows({name for name, row in ROWS.items() if row.minimum is not None})
def test_minimum_where_student_is_teacher(row, rng):
    teacher, _ = row.data(rng, 6)
    context = row.context(rng, (6,))
    loss = row.loss(dtype="float64", reduction=None)
    value = numpy(loss(teacher, teacher, **context))
    np.testing.assert_allclose(value, row.minimum, atol=row.tolerance)
    _, student = row.data(rng, 6)
    assert numpy(loss(teacher, student, **context)).mean() > row.minimum


@rows()
def test_gradient_reaches_the_student_alone(row, rng, gradient):
    teacher, student = row.data(rng, 6)
    context = row.context(rng, (6,))
    loss = row.loss(dtype="float64")
    found = gradient(lambda s: loss(teacher, s, **context), student)
    assert finite(found)
    assert any(np.abs(leaf).max() > 1e-8 for leaf in keras.tree.flatten(found))
    to_teacher = gradient(lambda t: loss(t, student, **context), teacher)
    assert all((leaf == 0).all() for leaf in keras.tree.flatten(to_teacher))


@rows()
def test_gradient_is_the_slope_of_the_formula(row, rng, gradient):
    teacher, student = row.data(rng, 4)
    context = row.context(rng, (4,))
    loss = row.loss(dtype="float64", reduction="sum")
    found = gradient(lambda s: loss(teacher, s, **context), student)
    slope_is_the_formulas(row, loss, teacher, student, found, rng, context)


@rows()
def test_weights_and_reductions(row, rng):
    teacher, student = row.data(rng, 7)
    context = row.context(rng, (7,))
    weight = rng.uniform(0.5, 2.0, 7)
    weight[2] = 0.0
    kept = weight > 0

    def rest(array):
        return np.asarray(array)[kept]

    # What weighs nothing is in no relation either: the values are those of the other samples.
    others = {name: rest(array) for name, array in context.items()}
    found = numpy(
        row.loss(dtype="float64", reduction=None)(*mapped(rest, teacher, student), **others)
    )
    values = np.zeros((7, *found.shape[1:]))
    values[kept] = found
    spread = weight.reshape((7,) + (1,) * (values.ndim - 1)) * np.ones_like(values)

    def reduced(reduction):
        loss = row.loss(dtype="float64", reduction=reduction)
        return numpy(loss(teacher, student, sample_weight=weight, **context))

    np.testing.assert_allclose(reduced(None), spread * values, rtol=TIGHT)
    np.testing.assert_allclose(reduced("sum"), (spread * values).sum(), rtol=TIGHT)
    mean = (spread * values).sum() / values.size
    np.testing.assert_allclose(reduced("mean"), mean, rtol=TIGHT)
    np.testing.assert_allclose(reduced("sum_over_batch_size"), mean, rtol=TIGHT)
    weighted = np.average(values, weights=spread)
    np.testing.assert_allclose(reduced("mean_with_sample_weight"), weighted, rtol=TIGHT)


@rows(SEQUENCES)
def test_masked_positions_count_for_nothing(row, rng, gradient):
    teacher, student = row.sequences(rng, 5)
    context = row.context(rng, (5, 6))
    mask = np.arange(6) < np.array([6, 4, 1, 5, 3])[:, None]
    loss = row.loss(dtype="float64")

    def noisy(array):
        wide = mask.reshape(mask.shape + (1,) * (array.ndim - 2))
        return np.where(wide, array, rng.normal(0, 9, array.shape))

    value = numpy(loss(teacher, student, mask=mask, **context))
    changed = numpy(loss(*mapped(noisy, teacher, student), mask=mask, **context))
    np.testing.assert_allclose(value, changed, rtol=TIGHT)
    whole = numpy(loss(teacher, student, mask=np.ones_like(mask), **context))
    np.testing.assert_allclose(whole, numpy(loss(teacher, student, **context)), rtol=TIGHT)
    found = gradient(lambda s: loss(teacher, s, mask=mask, **context), student)
    assert all((leaf[~mask] == 0).all() for leaf in keras.tree.flatten(found))
    if loss.per_position:
        # Under a mask of the whole, padded positions keep the other values in place.
        values = numpy(
            row.loss(dtype="float64", reduction="none")(teacher, student, mask=mask, **context)
        )
        assert values.shape == mask.shape
        assert (values[~mask] == 0).all()
        np.testing.assert_allclose(value, values[mask].mean(), rtol=TIGHT)
        weight = np.array([1.0, 0.0, 2.0, 0.5, 3.0])
        weighted = numpy(loss(teacher, student, sample_weight=weight, mask=mask, **context))
        counts = mask & (weight > 0)[:, None]
        values = numpy(
            row.loss(dtype="float64", reduction="none")(teacher, student, mask=counts, **context)
        )
        spread = (weight[:, None] * mask) * values
        np.testing.assert_allclose(weighted, spread.sum() / mask.sum(), rtol=TIGHT)


@rows(SEQUENCES)
def test_all_positions_masked_is_zero(row, rng, gradient):
    teacher, student = row.sequences(rng, 3)
    context = row.context(rng, (3, 6))
    mask = np.zeros((3, 6), "bool")
    loss = row.loss(dtype="float64")
    found = gradient(lambda s: loss(teacher, s, mask=mask, **context), student)
    assert finite(found)
    assert finite(loss(teacher, student, mask=mask, **context))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@rows()
def test_half_precision(row, dtype, rng, gradient):
    teacher, student = row.data(rng, 6)
    context = row.context(rng, (6,))
    exact = row.loss(dtype="float64")
    reference = float(exact(teacher, student, **context))
    half_teacher, half_student = cast(teacher, dtype), cast(student, dtype)
    # Inputs in half, computed in float32: as exact as the inputs are.
    mixed = alike(row.loss(), exact, teacher, student)(half_teacher, half_student, **context)
    assert keras.backend.standardize_dtype(mixed.dtype) == "float32"
    np.testing.assert_allclose(float(mixed), reference, rtol=0.1)
    # Computed in half as well: finite, in the right range.
    loss = alike(row.loss(dtype=dtype), exact, teacher, student)
    np.testing.assert_allclose(
        float(ops.cast(loss(half_teacher, half_student, **context), "float32")),
        reference,
        rtol=0.3,
        atol=0.02,
    )
    found = gradient(lambda s: ops.cast(loss(half_teacher, s, **context), "float32"), half_student)
    assert finite(found)


WIDE = ("similarity_preserving", "rkd", "correlation_congruence", "pkt")


@rows()
def test_large_inputs_in_float16(row, rng, gradient):
    """Squares of them, their sums and slopes are past 65504; what is not is as exact as float16.

    What is past it is infinite, of which dynamic loss scaling hears.
    """
    teacher, student = row.data(rng, 4)
    context = row.context(rng, (4,))
    large = mapped(lambda a: np.clip(300 * a, -6e4, 6e4).astype("float16"), teacher, student)
    exact = row.loss(dtype="float64")
    wide = cast(large, "float64")
    reference = float(exact(*wide, **context))
    loss = alike(row.loss(dtype="float16"), exact, teacher, student)
    found = loss(*large, **context)
    assert keras.backend.standardize_dtype(found.dtype) == "float16"
    np.testing.assert_allclose(float(found), min(reference, 65504), rtol=1e-2, atol=1e-4)
    slopes = gradient(lambda s: ops.cast(loss(large[0], s, **context), "float32"), large[1])
    expected = gradient(lambda s: exact(wide[0], s, **context), wide[1])
    for slope, true in zip(keras.tree.flatten(slopes), keras.tree.flatten(expected)):
        fits = np.abs(true) < 65000
        assert fits.mean() > 0.9
        top = np.abs(true[fits]).max()
        np.testing.assert_allclose(slope[fits], true[fits], rtol=1e-2, atol=2e-3 * top + 1e-7)


@pytest.mark.parametrize("name", WIDE)
def test_wide_features_in_float16(name, rng, gradient):
    """Sums over so many units are past 65504; constant features have no direction."""
    row = ROWS[name]
    teacher, student = 3 * rng.normal(size=(2, 8, 8192)).astype("float16")
    loss = row.loss(dtype="float16")
    reference = row.loss(dtype="float64")(teacher.astype("float64"), student.astype("float64"))
    np.testing.assert_allclose(float(loss(teacher, student)), float(reference), rtol=1e-2)
    for side in (student, np.ones_like(student)):
        assert finite(gradient(lambda s: ops.cast(loss(teacher, s), "float32"), side))


@rows(LOGITS)
def test_two_classes(row, rng, gradient):
    teacher, student = (side[..., :2] for side in row.data(rng, 5))
    context = {}
    if "labels" in row.context(rng, (5,)):
        context["labels"] = np.array([0, 1, 1, 0, 1])
    loss = row.loss(dtype="float64", reduction=None)
    np.testing.assert_allclose(
        numpy(loss(teacher, student, **context)),
        row.expected(loss, teacher, student, **context),
        rtol=1e-6,
        atol=1e-12,
    )
    whole = row.loss(dtype="float64")
    assert finite(gradient(lambda s: whole(teacher, s, **context), student))


@rows(STEEP)
def test_confident_and_wrong_still_learns(row, rng, gradient):
    """Clipped probabilities lose this gradient; log space keeps it."""
    teacher = np.zeros((4, 5), "float32")
    student = np.zeros((4, 5), "float32")
    teacher[:, 0] = 50.0
    teacher[:, 1] = -50.0
    student[:, 0] = -50.0
    student[:, 1] = 50.0
    context = row.context(rng, (4,))
    loss = row.loss(reduction="sum")
    found = gradient(lambda s: loss(teacher, s, **context), student)
    assert finite(found)
    assert (np.abs(found).max(-1) > 0.05).all()


def extremes(gap):
    """Logits `(6, 5)` of a teacher and a student who are certain, and of opposite opinions."""
    sharp = gap * np.eye(5, dtype="float32")[[0, 1, 2, 3, 4, 0]]
    other = gap * np.eye(5, dtype="float32")[[1, 1, 3, 0, 4, 2]]
    flat = np.zeros((6, 5), "float32")
    return (sharp, other), (sharp, flat), (flat, sharp), (-sharp, other)


@pytest.mark.parametrize("gap", [1e2, 1e4])
@rows(LOGITS)
def test_huge_logit_gaps_stay_finite(row, gap, rng, gradient):
    context = row.context(rng, (6,))
    loss = row.loss()
    for teacher, student in extremes(gap):
        assert finite(loss(teacher, student, **context))
        assert finite(gradient(lambda s, t=teacher: loss(t, s, **context), student))


@rows(LOGITS)
def test_uniform_student_learns_from_a_confident_teacher(row, rng, gradient):
    context = row.context(rng, (6,))
    teacher = 100.0 * np.eye(5, dtype="float32")[[0, 1, 2, 3, 4, 0]]
    student = rng.normal(0, 0.1, (6, 5)).astype("float32")
    loss = row.loss(reduction="sum")
    found = gradient(lambda s: loss(teacher, s, **context), student)
    assert (np.abs(found).max(-1) > 0.05).all()


@rows()
def test_batch_of_one(row, rng, gradient):
    teacher, student = row.data(rng, 1)
    context = row.context(rng, (1,))
    loss = row.loss(dtype="float64")
    assert finite(loss(teacher, student, **context))
    assert finite(gradient(lambda s: loss(teacher, s, **context), student))


@pytest.mark.parametrize("constant", [0.0, 1.5])
@rows()
def test_constant_input(row, constant, rng, gradient):
    teacher, student = row.data(rng, 4)
    context = row.context(rng, (4,))
    flat_teacher, flat_student = mapped(
        lambda a: np.full(a.shape, constant, "float32"), teacher, student
    )
    loss = row.loss()
    student, teacher = cast(student, "float32"), cast(teacher, "float32")
    for t, s in ((flat_teacher, flat_student), (teacher, flat_student), (flat_teacher, student)):
        assert finite(loss(t, s, **context))
        found = gradient(lambda x, t=t: loss(t, x, **context), s)
        assert finite(found)
        assert all(np.abs(leaf).max() < 1e4 for leaf in keras.tree.flatten(found))


@rows()
def test_config_round_trip(row, rng):
    teacher, student = row.data(rng, 6)
    context = row.context(rng, (6,))
    loss = row.loss(dtype="float64", reduction="sum", name="renamed")
    again = type(loss).from_config(loss.get_config())
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    for copy in (again, restored):
        assert type(copy) is type(loss)
        assert copy.get_config() == loss.get_config()
        assert (copy.name, copy.reduction, copy.dtype) == ("renamed", "sum", "float64")
    expected = numpy(loss(teacher, student, **context))
    restored = alike(restored, loss, teacher, student)
    np.testing.assert_array_equal(numpy(restored(teacher, student, **context)), expected)
    registered = keras.saving.get_registered_name(type(loss))
    assert registered == f"keras_kd>{type(loss).__name__}"
    assert type(loss).__name__ in losses.__all__


def tapped(shapes, name):
    """A model from `(8,)` to three logits, with a layer `tap0`, `tap1`, ... of every shape."""
    inputs = keras.Input((8,))
    x, taps = inputs, []
    for number, shape in enumerate(shapes):
        x = keras.layers.Dense(int(np.prod(shape)), "tanh", name=f"dense{number}")(x)
        taps.append(keras.layers.Reshape(shape, name=f"tap{number}")(x))
    flat = [keras.layers.Flatten()(tap) for tap in taps]
    x = keras.layers.Concatenate()(flat) if len(flat) > 1 else flat[0]
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x), name=name)


FITS = {
    "logits": sorted(name for name in LOGITS if name != "jensen_shannon_0"),
    "maps": ["attention_transfer", "nst", "factor_transfer_learned", "vid", "simkd"],
    "alike": ["hint", "ickd", "factor_transfer"],
    "layers": ["fsp", "attention_transfer_layers"],
    "levels": ["reviewkd"],
    "relations": [
        "similarity_preserving",
        "rkd",
        "correlation_congruence",
        "pkt",
        "crd_in_batch",
    ],
    "tokens": ["hidden_state", "hidden_state_cosine", "pkd"],
    "token_layers": ["hidden_state_layers", "pkd_layers"],
    "attention": ["attention_scores"],
    "queries": ["minilm"],
}


def test_every_loss_is_fitted():
    fitted = {type(ROWS[name].make()).__name__ for names in FITS.values() for name in names}
    assert fitted == set(losses.__all__) - {"DistillationLoss", "CWSM", "FLSW"}


@pytest.mark.parametrize("family", sorted(FITS))
def test_fit(family, rng):
    """One graph for the losses of a family; the last batch is smaller than the others."""
    names = FITS[family]
    if family == "logits":
        shapes, layer = ([(6,)], [(6,)]), {}
    else:
        data = ROWS[names[0]].data(rng, 1)
        single = not isinstance(data[0], list)
        shapes = [[side.shape[1:]] if single else [a.shape[1:] for a in side] for side in data]
        taps = "tap0" if single else [f"tap{number}" for number in range(len(shapes[0]))]
        layer = {"teacher": taps, "student": taps}
    keras.utils.set_random_seed(5)
    teacher, student = tapped(shapes[0], "teacher"), tapped(shapes[1], "student")
    transfers = [keras_kd.Transfer(ROWS[name].make(), name=name, **layer) for name in names]
    distiller = keras_kd.Distiller(student, teacher)
    distiller.compile(
        optimizer=keras.optimizers.SGD(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss=transfers,
    )
    x, y = rng.normal(0, 1, (11, 8)).astype("float32"), rng.integers(0, 3, 11)
    distiller.fit(x, y, batch_size=4, epochs=1, verbose=0)
    owned = [weight for transfer in transfers for weight in transfer.trainable_weights]
    before = [numpy(weight) for weight in owned]
    logs = distiller.fit(x, y, batch_size=4, epochs=2, verbose=0).history
    for name in names:
        assert np.isfinite(logs[name]).all()
    # What a loss owns reaches the optimizer: the variances of VID did not, elsewhere.
    moved = [not np.array_equal(b, numpy(weight)) for b, weight in zip(before, owned)]
    assert all(moved)
    expected = sum(len(loss.trainable_weights) for t in transfers for loss in t.loss.layers)
    assert len(owned) == expected
