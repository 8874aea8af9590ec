"""How often the student decides as its teacher does, over what the losses count."""

from typing import Any

from keras import ops

from keras_kd import checks, meaning, step
from keras_kd.losses.base import joint_mask
from keras_kd.reader import Answer
from keras_kd.typing import Tensor


def book(
    books: step.Books, setup: Any, teacher: Answer, student: Answer, y: Any, sample_weight: Any
) -> None:
    """Book the agreement of every output that makes decisions.

    `sum_i w_i a_i / sum_i w_i` over all samples, tokens or pixels `i` of these outputs:
    `a_i` is 1 where the greatest logit is of the same class on both sides and 0
    elsewhere, or of independent units the share whose logits have the same sign;
    `w_i` is what the losses weigh it with, 0 where it does not count.

    Args:
        books: Where to.
        setup: The distiller's `Wiring`.
        teacher: The teacher's answer.
        student: The student's answer.
        y: Labels.
        sample_weight: Weights, as Keras passes them.
    """
    if "agreement" not in books.means:
        return
    match, template = setup.match, setup.student.template
    labels = checks.per_output(y, template)
    weights = checks.per_output(sample_weight, template)
    losses = checks.per_output(setup.compiled_with.get("loss"), template)
    for i, ours in enumerate(student.logits):
        index = match.order[i] if i < len(match.order) else None
        if index is None or not match.decides[i] or index >= len(teacher.logits):
            continue
        theirs = teacher.logits[index]
        if len(theirs.shape) != len(ours.shape) or theirs.shape[-1] != ours.shape[-1]:
            continue
        if match.units[i] == meaning.INDEPENDENT:
            same = ops.equal(ops.greater(ours, 0), ops.greater(theirs, 0))
            same = ops.mean(ops.cast(same, "float32"), axis=-1)
        else:
            same = ops.cast(ops.equal(step.top_class(ours), step.top_class(theirs)), "float32")
        weight = counted(same, joint_mask(theirs, ours), weights[i], labels[i], losses[i])
        books.add("agreement", same, weight)


def counted(same: Tensor, mask: Tensor, sample_weight: Tensor, y: Tensor, loss: Any) -> Tensor:
    """What each decision counts: its weight, and 0 where it is masked or its label is ignored.

    Args:
        same: `(batch, ...)`, one number a decision.
        mask: Boolean, `(batch, ...)`, or `None`.
        sample_weight: `(batch,)`, or one for each decision, or `None`.
        y: Labels, or `None`.
        loss: The hard loss, which may ignore a class.

    Returns:
        Tensor of the shape of `same`, float32.
    """
    weight = ops.ones_like(same)
    if mask is not None:
        weight = weight * _fitted(ops.cast(mask, "float32"), same)
    if sample_weight is not None:
        weight = weight * _fitted(ops.cast(sample_weight, "float32"), same)
    ignored = meaning.ignored_class(loss)
    if ignored is not None and y is not None:
        kept = ops.not_equal(ops.convert_to_tensor(y), ignored)
        weight = weight * _fitted(ops.cast(kept, "float32"), same)
    return weight


def _fitted(weight: Tensor, same: Tensor) -> Tensor:
    """Weights with as many axes as the decisions; several for one decision count as their mean."""
    rank = len(same.shape)
    while len(weight.shape) > rank:
        weight = ops.mean(weight, axis=-1)
    while len(weight.shape) < rank:
        weight = ops.expand_dims(weight, -1)
    return weight
