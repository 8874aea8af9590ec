"""What a row of the conformance table must hold on every backend.

`tests/backends/test_backends.py` runs this for each backend but TensorFlow, which has the whole
table, in a process of its own; it is named so that pytest does not collect it by itself. Each test
is one function with its gradients, which JAX then compiles as one.
"""

import keras
import numpy as np
from keras import ops
from test_conformance import (
    LOGITS,
    alike,
    cast,
    extremes,
    finite,
    rng,
    rows,
    slope_is_the_formulas,
)

__all__ = ["rng"]

ON_TORCH = keras.backend.backend() == "torch"

# Logits and computation. JAX spends a second of compilation on each, so it has the harder one.
KINDS = [("float16", "float16")]
if ON_TORCH:
    KINDS += [("bfloat16", "bfloat16"), ("float16", "float32"), ("bfloat16", "float32")]


def ready(row, teacher, student, **options):
    """The loss of a row, built: layers come into being outside of what JAX compiles."""
    loss = row.loss(**options)
    return alike(loss, loss, teacher, student)


@rows()
def test_value_and_gradients(row, rng, compiled):
    teacher, student = row.data(rng, 4)
    context = row.context(rng, (4,))
    loss = ready(row, teacher, student, dtype="float64", reduction=None)
    run = compiled(lambda sides: loss(*sides, **context), (teacher, student))
    values, (to_teacher, to_student) = run((teacher, student))
    expected = row.expected(loss, teacher, student, **context)
    assert values.shape == expected.shape
    # On PyTorch, Keras takes the mean of float64 values in float32.
    np.testing.assert_allclose(values, expected, rtol=1e-5 if ON_TORCH else 1e-6, atol=1e-12)
    assert all((leaf == 0).all() for leaf in keras.tree.flatten(to_teacher))
    assert finite(to_student)
    assert any(np.abs(leaf).max() > 1e-8 for leaf in keras.tree.flatten(to_student))
    slope_is_the_formulas(row, loss, teacher, student, to_student, rng, context)


@rows()
def test_half_precision(row, rng, compiled):
    """Half logits compared in half, and on PyTorch in float32 as well."""
    teacher, student = row.data(rng, 6)
    context = row.context(rng, (6,))
    exact = ready(row, teacher, student, dtype="float64")
    reference = row.expected(exact, teacher, student, **context).mean()
    kinds = [
        (dtype, alike(row.loss(dtype=computed), exact, teacher, student))
        for dtype, computed in KINDS
    ]

    def values_of(sides):
        values = [loss(*cast(sides, dtype), **context) for dtype, loss in kinds]
        return ops.stack([ops.cast(value, "float32") for value in values])

    sides = keras.tree.map_structure(lambda a: a.astype("float32"), (teacher, student))
    values, gradients = compiled(values_of, sides)(sides)
    for value, (_, computed) in zip(values, KINDS, strict=True):
        tolerance = (0.1, 0) if computed == "float32" else (0.3, 0.02)
        np.testing.assert_allclose(value, reference, *tolerance)
    assert finite(gradients)


@rows(LOGITS)
def test_extreme_logits(row, rng, compiled):
    context = row.context(rng, (6,))
    pairs = [pair for gap in (1e2, 1e4) for pair in extremes(gap)]
    loss = ready(row, *pairs[0], reduction=None)
    run = compiled(lambda sides: loss(*sides, **context), pairs[0])
    for pair in pairs:
        values, gradients = run(pair)
        assert finite(values)
        assert finite(gradients)
