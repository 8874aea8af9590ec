"""The terms of the objective on one batch, and their gradients, measured and left no trace of.

`term_losses` and `gradient_norms` evaluate functions that return terms by name; which terms there
are, and on what batch, is the distiller's to say.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras import ops

from keras_kd.distill import row_numbers
from keras_kd.distill.batch import Step
from keras_kd.distill.objective import Objective, seen_in_step
from keras_kd.distill.pairing import Pairing
from keras_kd.utils.types import Data, Tensor


@contextlib.contextmanager
def no_trace() -> Iterator[None]:
    """Drop what layers, metrics and random generators note in here."""
    with keras.StatelessScope(), _own_random_numbers():
        yield


def terms_of(
    distiller: keras.Model, pairing: Pairing, objective: Objective, data: Data
) -> Callable[[], dict[str, Tensor]]:
    """What computes the terms of an objective on one batch, unweighted and unbooked.

    Args:
        distiller: The distiller, which runs its student when it is called.
        pairing: Its models.
        objective: Its objective.
        data: The batch as the step reads it, behind the batch transform.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    batch = pairing.answered(x)
    row_numbers.require({} if batch.indices is None else {"indices": 0}, distiller.transfers)

    def terms() -> dict[str, Tensor]:
        with pairing.taking(Step(batch)):
            distiller(x, training=True)
            seen = seen_in_step(pairing, y, sample_weight, True)
        return objective.measured(seen) if seen is not None else {}

    return terms


def term_losses(terms: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
    """The value of each term.

    Args:
        terms: `fn()`: scalars by name.
    """
    with no_trace():
        found = terms()
    return {name: float(ops.convert_to_numpy(value)) for name, value in found.items()}


def gradient_norms(
    terms: Callable[[], dict[str, Tensor]], distiller: keras.Model
) -> dict[str, float]:
    """`||d term / d theta||`, the norm over the student's trainable parameters, for each term.

    Args:
        terms: `fn()`: scalars by name; the student runs in it once.
        distiller: The distiller.

    Returns:
        Norms by name.
    """
    ours = {id(v) for v in distiller.student.trainable_variables}
    variables = [v for v in distiller.trainable_variables if id(v) in ours]
    # What terms are multiplied by before the gradient is taken, so that it does not vanish in half
    # precision: dynamic in float16, and 1 elsewhere.
    scale = float(ops.convert_to_numpy(distiller.optimizer.scale_loss(ops.ones(()))))
    backend = keras.config.backend()
    measured = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[backend]
    with _own_random_numbers():
        norms = measured(terms, variables, scale)
    return {name: float(ops.convert_to_numpy(norm)) / scale for name, norm in norms.items()}


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Draw nothing from the random numbers of the training.

    Keras's generators are variables, whose changes the scope drops. On PyTorch
    dropout draws from PyTorch's own numbers, and here from the same every time.
    """
    if keras.config.backend() != "torch":
        yield
        return
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """The norm over all gradients, in float32; a parameter that is not reached has none."""
    wide = [ops.cast(g, "float32") for g in gradients if g is not None]
    # Divided by the largest number, since squares of scaled gradients may overflow.
    if not wide:
        return ops.zeros(())
    top = ops.max(ops.stack([ops.max(ops.abs(g)) for g in wide]))
    safe = ops.where(top > 0, top, ops.ones_like(top))
    return top * ops.sqrt(sum(ops.sum(ops.square(g / safe)) for g in wide))


def _scaled(term: Tensor, scale: float) -> Tensor:
    return term * ops.cast(scale, term.dtype)


def _tensorflow(
    terms: Callable[[], dict[str, Tensor]], variables: list[Any], scale: float
) -> dict[str, Tensor]:
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as tape:
        with keras.StatelessScope():
            found = terms()
        scaled = {name: _scaled(term, scale) for name, term in found.items()}
    values = [v.value for v in variables]
    norms = {}
    for name, term in scaled.items():
        gradients = tape.gradient(term, values)
        # Embeddings have gradients row by row, where a row may come more than once.
        norms[name] = _norm([g if g is None else tf.convert_to_tensor(g) for g in gradients])
    return norms


def _jax(
    terms: Callable[[], dict[str, Tensor]], variables: list[Any], scale: float
) -> dict[str, Tensor]:
    import jax

    def values(held: list[Any]) -> dict[str, Tensor]:
        with keras.StatelessScope(state_mapping=list(zip(variables, held))):
            return {name: _scaled(term, scale) for name, term in terms().items()}

    found, pullback = jax.vjp(values, [v.value for v in variables])
    norms = {}
    for name in found:
        # One for this term and zero for the others.
        seed = {other: ops.full_like(v, float(other == name)) for other, v in found.items()}
        norms[name] = _norm(pullback(seed)[0])
    return norms


def _torch(
    terms: Callable[[], dict[str, Tensor]], variables: list[Any], scale: float
) -> dict[str, Tensor]:
    import torch

    with torch.enable_grad(), keras.StatelessScope():
        found = {name: _scaled(term, scale) for name, term in terms().items()}
    values = [v.value for v in variables]
    return {
        name: _norm(torch.autograd.grad(term, values, retain_graph=True, allow_unused=True))
        if term.requires_grad
        else ops.zeros(())
        for name, term in found.items()
    }
