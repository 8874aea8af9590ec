"""How often the student decides as its teacher does, over what the losses count."""

from collections.abc import Sequence

from keras import ops

from keras_kd.distill import batch
from keras_kd.distill.training_metrics import TrainingMetrics
from keras_kd.losses.counts import Counted
from keras_kd.models import meaning
from keras_kd.models.model_reader import Answer
from keras_kd.transfers.output_pairing import Match


def book(
    metrics: TrainingMetrics,
    match: Match,
    teacher: Answer,
    student: Answer,
    counted: Sequence[Counted],
) -> None:
    """Book the agreement of every output that makes decisions.

    `sum_i w_i a_i / sum_i w_i` over all samples, tokens or pixels `i` of these outputs:
    `a_i` is 1 where the greatest logit is of the same class on both sides and 0
    elsewhere, or of independent units the share whose logits have the same sign;
    `w_i` is what the losses weigh it with, 0 where it does not count.

    Args:
        metrics: Where to.
        match: How the outputs meet.
        teacher: The teacher's answer.
        student: The student's answer.
        counted: What counts of each flat output of the student.
    """
    if "agreement" not in metrics.means:
        return
    for i, (theirs, ours) in enumerate(batch.paired(match, teacher, student)):
        if theirs is None or not match.decides[i]:
            continue
        if len(theirs.shape) != len(ours.shape) or theirs.shape[-1] != ours.shape[-1]:
            continue
        if match.units[i] == meaning.INDEPENDENT:
            same = ops.equal(ops.greater(ours, 0), ops.greater(theirs, 0))
            same = ops.mean(ops.cast(same, "float32"), axis=-1)
        else:
            same = ops.cast(ops.equal(batch.top_class(ours), batch.top_class(theirs)), "float32")
        weight = counted[i].over(same)
        # Keras's mean takes the mean over the positions of each sample first, so that a token
        # of a batch padded to a greater length would count for less.
        metrics.add(
            "agreement",
            ops.reshape(same, (-1,)),
            None if weight is None else ops.reshape(weight, (-1,)),
        )
