"""What attacks and adversarial training are made of: divergences and losses, one value a row.

All of them sum over the classes. Reference implementations of RSLAD and others average over them,
so that their weights mean other things for 10 classes than for 100; here a weight means the same
for any number of classes. May import: Keras.
"""

import keras
from keras import ops

from keras_kd.utils.types import Tensor


def divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T**2 * KL(softmax(p / T) || softmax(q / T))`, summed over the classes.

    Args:
        p_logits: `(batch, classes)`, the distribution that weighs.
        q_logits: `(batch, classes)`.
        temperature: Positive float.

    Returns:
        `(batch,)`, in float32 or wider.
    """
    log_p, log_q = (_log_softmax(z, temperature) for z in (p_logits, q_logits))
    return temperature**2 * ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


def crossentropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log softmax(z)[y]`; 0 for a negative label, which stands for none.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)` class numbers.

    Returns:
        `(batch,)`.
    """
    log_p = _log_softmax(logits, 1.0)
    return -ops.sum(ops.one_hot(labels, log_p.shape[-1], dtype=log_p.dtype) * log_p, axis=-1)


def probability_of(logits: Tensor, labels: Tensor) -> Tensor:
    """`softmax(z)[y]`, `(batch,)`."""
    log_p = _log_softmax(logits, 1.0)
    return ops.sum(ops.one_hot(labels, log_p.shape[-1], dtype=log_p.dtype) * ops.exp(log_p), -1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    dtype = keras.backend.result_type(logits.dtype, "float32")
    return ops.log_softmax(ops.cast(logits, dtype) / temperature, axis=-1)


def two_sided(logits: Tensor) -> Tensor:
    """Logits of classes; of one unit, a yes or no, those of its two classes, `(0, z)`."""
    if logits.shape[-1] != 1:
        return logits
    return ops.concatenate([ops.zeros_like(logits), logits], axis=-1)


def class_numbers(labels: Tensor, classes: int) -> Tensor:
    """Labels `(batch,)` of labels in any form that a crossentropy takes.

    Args:
        labels: `(batch,)` or `(batch, 1)` class numbers, or `(batch, classes)` one-hot.
        classes: How many classes there are.
    """
    if len(labels.shape) == 2 and labels.shape[-1] == classes and classes > 1:
        return ops.argmax(labels, axis=-1)
    if len(labels.shape) == 2 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    return ops.cast(labels, "int32")
