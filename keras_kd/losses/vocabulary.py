"""The softened KL over large vocabularies, one sample of the batch at a time."""

from typing import Any

from keras import ops

from keras_kd.typing import Tensor

LARGE = 4096
"""Classes from which on the logits of tokens are compared sample by sample."""


def softened_kl_by_sample(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """The softened KL of `(batch, tokens, classes)` without copies of all its logits.

    Equal to `softened_kl`, value and gradient. Besides the logits and the gradient
    of the student's it holds temporaries of one sample, and while TensorFlow puts
    the gradient together outside XLA, the slopes of all samples once more. No
    probabilities of the whole batch exist on either side.

    Args:
        teacher: Logits `(batch, ..., tokens, classes)`, unnormalized; no
            gradient reaches them.
        student: Logits of the same shape.
        temperature: Positive scalar, or `(batch, ..., 1)`, dimensionless; no
            gradient reaches it.

    Returns:
        Tensor `(batch, ..., tokens)`, in nats.
    """
    teacher = ops.stop_gradient(teacher)
    temperature = ops.stop_gradient(ops.cast(temperature, student.dtype))
    each = len(temperature.shape) > 0

    def logs(logits: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of one sample, and its temperature."""
        own = ops.take(temperature, sample, axis=0) if each else temperature
        return ops.log_softmax(ops.take(logits, sample, axis=0) / own, axis=-1), own

    @ops.custom_gradient
    def divergence(student: Tensor) -> Any:
        samples = ops.arange(ops.shape(student)[0])

        def value(sample: Tensor) -> Tensor:
            log_p, own = logs(teacher, sample)
            log_q, _ = logs(student, sample)
            kl = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
            return ops.square(own[..., 0] if each else own) * kl

        def gradient(*args: Tensor, upstream: Tensor = None) -> Tensor:
            upstream = args[0] if upstream is None else upstream

            def slope(sample: Tensor) -> Tensor:
                log_p, own = logs(teacher, sample)
                log_q, _ = logs(student, sample)
                scale = ops.expand_dims(ops.take(upstream, sample, axis=0), -1) * own
                return scale * (ops.exp(log_q) - ops.exp(log_p))

            return ops.map(slope, samples)

        return ops.map(value, samples), gradient

    return divergence(student)
