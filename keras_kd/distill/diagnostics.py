"""The terms of the objective on one batch, and their gradients, measured and left no trace of."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_kd.distill import batch as step
from keras_kd.distill import hooks, objective, pairing, penalties, row_numbers
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor


class Measured(keras.Model):
    """The part of the distiller that tells what each term of its objective is worth.

    Attributes:
        student: The model that is trained.
        transfers: What is transferred to it.
        temperature: The live temperature.
    """

    student: Any
    transfers: list[Transfer]
    temperature: Any
    _setup: Any
    _with_answer: Any
    _transformed: Any
    _prepare: Any

    def _terms(self, data: Any) -> Callable[[], dict[str, Tensor]]:
        """What computes the terms of the objective on one batch, unweighted and unbooked."""
        if not self.compiled:
            raise ValueError("The distiller is not compiled. Call `distiller.compile` first.")
        self._setup.require_teacher()
        if not self._setup.prepared:
            self._prepare(checks.first_rows(keras.utils.unpack_x_y_sample_weight(data)[0], True)[0])
        data = pairing.plain_batch(data)
        # What the transform draws and keeps is dropped with the scope.
        with keras.StatelessScope(), _own_random_numbers():
            data, _ = self._transformed(data, ())
        batch, y, sample_weight = self._with_answer(data)
        row_numbers.require({} if batch.indices is None else {"indices": 0}, self.transfers)

        def terms() -> dict[str, Tensor]:
            answer = self(batch, training=True)
            found: dict[str, Tensor] = {}
            labeled: list[Any] = []
            if self._compile_loss:
                pairs = step.paired(self._setup.match, batch.answer, answer)
                found["student_loss"], _, labeled = step.hard_loss(
                    self._compile_loss,
                    y,
                    answer.output,
                    sample_weight,
                    self.loss,
                    [theirs for theirs, _ in pairs],
                )
            counted = self._setup.counted(batch, answer, sample_weight, labeled)
            values, _ = objective.distillation(
                self._setup, batch, y, answer, counted, self.temperature, True
            )
            of_hooks = hooks.answered(batch.x, y, sample_weight, answer, batch.answer)
            worth = penalties.values(self, of_hooks, counted)
            return {**found, **values, **{term.name: value for term, value in worth}}

        return terms

    def term_losses(self, data: Any) -> dict[str, float]:
        """Measure the terms of the objective on one batch, each without its weight.

        Nothing changes: neither weights and statistics nor metrics, random
        states and memories.

        Args:
            data: One batch `(x, y)`, `(x, y, sample_weight)` or `(x,)`, as
                `fit` reads it.

        Returns:
            The value of `student_loss`, of every transfer and of every penalty,
            by name, with `training=True`.

        Raises:
            ValueError: If the distiller is not compiled or lacks its teacher.
        """
        return losses(self._terms(data))

    def gradient_norms(self, data: Any) -> dict[str, float]:
        """Measure how strongly each term pulls on the student, without its weight.

        Args:
            data: As for `term_losses`.

        Returns:
            `||d term / d theta||` by the name of the term, the Euclidean norm
            over all trainable parameters `theta` of the student.

        Raises:
            ValueError: If the distiller is not compiled or lacks its teacher.
        """
        terms = self._terms(data)
        ours = {id(v) for v in self.student.trainable_variables}
        variables = [v for v in self.trainable_variables if id(v) in ours]
        # Dynamic in float16, and 1 elsewhere.
        scale = float(ops.convert_to_numpy(self.optimizer.scale_loss(ops.ones(()))))
        return gradient_norms(terms, variables, scale)

    def sample_rows(self, count: int = 256) -> Any:
        """Take some rows of the arrays that `fit` is reading.

        Args:
            count: How many at most; they are spread evenly over the data.

        Returns:
            `(x, y, sample_weight)`, or `None` outside of `fit` and where it
            reads no arrays or has `class_weight`. A `CachedTeacher`'s answers
            are joined to them.
        """
        arrays, teacher = self._setup.arrays, self._setup.teacher
        if arrays is None:
            return None
        chosen = objective.spread(arrays, count)
        found = objective.rows(arrays, chosen)
        return found if teacher is None else teacher.joined(found, chosen)


def losses(terms: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
    """The value of each term.

    Args:
        terms: `fn()`: scalars by name.
    """
    # What layers, metrics and random generators note in there is dropped with the scope.
    with keras.StatelessScope(), _own_random_numbers():
        found = terms()
    return {name: float(ops.convert_to_numpy(value)) for name, value in found.items()}


def gradient_norms(
    terms: Callable[[], dict[str, Tensor]], variables: list[Any], scale: float
) -> dict[str, float]:
    """`||d term / d variables||`, the Euclidean norm over all of them, for each term.

    Args:
        terms: `fn()`: scalars by name; the student runs in it once.
        variables: The student's parameters.
        scale: What terms are multiplied by before the gradient is taken, so
            that it does not vanish in half precision.

    Returns:
        Norms by name.
    """
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


def _norm(gradients: Any) -> Tensor:
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


def _tensorflow(terms: Any, variables: list[Any], scale: float) -> dict[str, Tensor]:
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


def _jax(terms: Any, variables: list[Any], scale: float) -> dict[str, Tensor]:
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


def _torch(terms: Any, variables: list[Any], scale: float) -> dict[str, Tensor]:
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
