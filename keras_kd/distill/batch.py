"""One batch on its way through the step: with the teacher's answer, made safe for the student.

A `Batch` is what the data deliver with what the teacher says of it; a `Step` is one batch under way
in one thread, which takes the student's answer as well. The functions below work on tensors alone.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kd import backends
from keras_kd.losses.vocabulary import is_large
from keras_kd.models.model_reader import Answer
from keras_kd.transfers.output_pairing import Match
from keras_kd.utils.masks import keras_mask, with_keras_mask
from keras_kd.utils.types import Tensor, Tensors


class Batch(NamedTuple):
    """What one step of the distiller reads: a pytree, so that any backend passes it on.

    Attributes:
        x: What the student reads.
        answer: What the teacher says of the batch.
        indices: `(batch,)` row numbers in the data, where they are known.
        finite: Whether the teacher's tensors are all finite, a boolean scalar.
    """

    x: Any
    answer: Answer
    indices: Any
    finite: Any


class Step:
    """One step under way: what the teacher said, and what the student answers.

    Attributes:
        batch: The batch with the teacher's answer.
        lent: The teacher's variables with their values, while penalties may run it.
        student: The student's answer, once it has run.
    """

    def __init__(self, batch: Batch, lent: Sequence[tuple[Any, Any]] = ()) -> None:
        self.batch = batch
        self.lent = lent
        self.student: Answer | None = None
        self._taken = False

    def take(self) -> Batch | None:
        """The batch, for the first pass of the student; later passes read something else."""
        if self._taken:
            return None
        self._taken = True
        return self.batch


class UnderWay(threading.local):
    """The step that is under way in this thread; replicas of TensorFlow have one each.

    Attributes:
        step: It, or `None`.
    """

    step: Step | None = None


def paired(match: Match, teacher: Answer, student: Answer) -> list[tuple[Any, Any]]:
    """For each flat output the teacher's logits, `None` where it has no such output, and ours."""
    pairs: list[tuple[Any, Any]] = []
    for i, ours in enumerate(student.logits):
        index = match.order[i] if i < len(match.order) else None
        known = index is not None and index < len(teacher.logits)
        pairs.append((teacher.logits[index or 0] if known else None, ours))
    return pairs


def read_on(answer: Answer, before: Tensors, after: Tensors) -> Answer:
    """The student's answer with its output replaced as logits, not as what the model returned."""
    if after is before:
        return answer
    return answer._replace(logits=[after if z is before else z for z in answer.logits])


def for_positions(sample_weight: Tensors, output: Tensors) -> Any:
    """Weights `(batch,)` or `(batch, 1)` as one for every position of outputs with positions.

    Keras broadcasts weights over the last axes only where they have as many axes as
    the values of the loss.

    Args:
        sample_weight: A tensor, or one for each output in their structure, or `None`.
        output: What the student returned.

    Returns:
        The weights; one tensor for several outputs stays as it is.
    """
    if sample_weight is None:
        return None

    def fitted(tensor: Tensor, weight: Tensor) -> Any:
        if weight is None or len(tensor.shape) < 3:
            return weight
        column = all(length == 1 for length in weight.shape[1:])
        if not column or tuple(weight.shape[1:]) == tuple(tensor.shape[1:-1]):
            return weight
        weight = ops.reshape(weight, (-1, *[1] * (len(tensor.shape) - 2)))
        # For every position, since Keras multiplies a mask into it, on PyTorch in place.
        return weight * ops.ones_like(tensor[..., 0], dtype=weight.dtype)

    if ops.is_tensor(output) and ops.is_tensor(sample_weight):
        return fitted(output, sample_weight)
    outputs, weights = keras.tree.flatten(output), keras.tree.flatten(sample_weight)
    if len(outputs) != len(weights):
        return sample_weight
    fit = [fitted(tensor, weight) for tensor, weight in zip(outputs, weights)]
    return keras.tree.pack_sequence_as(sample_weight, fit)


def apart(sample_weight: Tensors) -> Any:
    """Weights that a loss of Keras may change: on PyTorch it multiplies a mask into them."""
    if sample_weight is None or keras.config.backend() != "torch":
        return sample_weight
    return keras.tree.map_structure(ops.copy, sample_weight, none_is_leaf=False)


def pick(answer: Answer, taps: list[str] | str | None, output: int, logits: bool) -> Any:
    """What a transfer reads of one model's answer."""
    if taps is None:
        return (answer.logits if logits else keras.tree.flatten(answer.output))[output]
    if isinstance(taps, list):
        return [answer.tensors[path] for path in taps]
    return answer.tensors[taps]


def shapes(tensors: Any) -> Any:
    """The shape of a tensor, or of each of a list of them, for any batch."""
    if isinstance(tensors, list):
        return [shapes(tensor) for tensor in tensors]
    return (None, *tensors.shape[1:])


def added_up(terms: Sequence[Tensor]) -> Tensor:
    """The sum, in float32 or in double precision where a term has it."""
    if not terms:
        return ops.zeros(())
    dtype = keras.backend.result_type("float32", *(term.dtype for term in terms))
    result: Any = 0.0
    for term in terms:
        result = result + ops.cast(term, dtype)
    return result


def times(weight: Tensor, value: Tensor) -> Tensor:
    """`weight * value`, where the weight is a float32 scalar and the value may be double."""
    dtype = keras.backend.result_type(weight.dtype, value.dtype)
    return ops.cast(weight, dtype) * ops.cast(value, dtype)


def or_nan(value: Tensor, finite: Tensor) -> Tensor:
    """A scalar, or NaN in its place, in float32 or in double precision where it has it.

    Args:
        value: A scalar.
        finite: Whether to keep it, a boolean scalar.
    """
    value = added_up([value])
    return value + ops.cast(ops.where(finite, 0.0, float("nan")), value.dtype)


def without_gradient(
    answer: Answer, with_output: bool, sound: bool = False
) -> tuple[Answer, Tensor | None]:
    """The answer without gradients, zeroed and flagged if anything in it is not finite.

    Args:
        answer: The teacher's.
        with_output: Whether a loss reads its output.
        sound: Whether it is known to be finite: nothing is looked at, and the flag is `None`.
    """
    # What nobody reads is left out: each part costs a pass over its tensors.
    read = Answer(answer.output if with_output else None, answer.logits, answer.tensors)
    if sound:
        return _each(lambda tensor: _stopped(tensor, tensor), read), None
    taps = keras.tree.flatten(answer.tensors) if answer.tensors else []
    finite = all_finite([*answer.logits, *taps])
    if keras.config.backend() == "tensorflow":
        kept = zeros_unless(finite, read)
    else:
        kept = _each(lambda tensor: zeros_unless(finite, tensor), read)

    return _each(_stopped, kept, read), finite


def _stopped(tensor: Tensor, before: Tensors) -> Any:
    return with_keras_mask(ops.stop_gradient(tensor), keras_mask(before))


def _each(fn: Callable[..., Any], *answers: Answer) -> Answer:
    """An answer made of others, tensor by tensor.

    `keras.tree` leaves circles of references on PyTorch that hold what it went through until the
    garbage is collected. Logits can be as large as all else in the step, so it is not given them.
    """

    def mapped(*parts: Tensors) -> Any:
        return keras.tree.map_structure(fn, *parts, none_is_leaf=False)

    first = answers[0]
    return Answer(
        None if first.output is None else mapped(*(each.output for each in answers)),
        [fn(*tensors) for tensors in zip(*(each.logits for each in answers), strict=True)],
        mapped(*(each.tensors for each in answers)) if first.tensors else {},
    )


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every number in some tensors is finite, a boolean scalar.

    float32 numbers whose sum overflows are no use to a loss and count as not finite.
    """
    finite: Any = ops.convert_to_tensor(True)
    for tensor in tensors:
        if keras.backend.standardize_dtype(tensor.dtype) == "float32":
            # In one pass and without a tensor of answers. Not by max and min, in which XLA
            # loses a NaN.
            each = ops.isfinite(ops.sum(tensor))
        else:
            each = ops.all(ops.isfinite(tensor))
        finite = ops.logical_and(finite, each)
    return finite


def zeros_unless(finite: Tensor, tensors: Tensors) -> Any:
    """The tensors as they are, or zeros in their place.

    Args:
        finite: Whether to keep them, a boolean scalar.
        tensors: A structure of tensors; `None` stays.
    """
    if keras.config.backend() == "tensorflow":
        # Passed on, where `where` would read and write them once more.
        return ops.cond(
            finite,
            lambda: keras.tree.map_structure(ops.convert_to_tensor, tensors, none_is_leaf=False),
            lambda: keras.tree.map_structure(ops.zeros_like, tensors, none_is_leaf=False),
        )

    def gate(tensor: Tensor) -> Any:
        # A scalar zero, since `zeros_like` of logits over a vocabulary is no small thing.
        return ops.where(finite, tensor, ops.zeros((), tensor.dtype))

    if ops.is_tensor(tensors):
        return gate(tensors)
    return keras.tree.map_structure(gate, tensors, none_is_leaf=False)


def top_class(logits: Tensor) -> Tensor:
    """The index of the greatest logit, `(batch, ...)`."""
    # TensorFlow's argmax holds the logits once and a half again, its top_k nothing.
    if is_large(logits):
        return ops.top_k(logits, k=1)[1][..., 0]
    return backends.first_of_greatest(logits)


def zero_if_not_finite(finite: Tensor, x: Tensors) -> Any:
    """The batch, or zeros where what made the teacher fail would make the student fail as well.

    Args:
        finite: Whether the teacher's answer is finite.
        x: What the models read.
    """
    flat = keras.tree.flatten(x)
    places = [i for i, tensor in enumerate(flat) if _holds_floats(tensor)]
    if not places:
        return x
    floats = [flat[i] for i in places]
    if keras.config.backend() == "tensorflow":
        # A finite batch does no harm, and a student that need not wait for the teacher's
        # answer runs beside it.
        kept = ops.cond(
            all_finite(floats),
            lambda: [ops.convert_to_tensor(tensor) for tensor in floats],
            lambda: zeros_unless(finite, floats),
        )
    else:
        kept = zeros_unless(finite, floats)
    for i, tensor in zip(places, kept):
        flat[i] = tensor
    return keras.tree.pack_sequence_as(x, flat)


def _holds_floats(tensor: Tensor) -> bool:
    if tensor is None or type(tensor).__name__ in ("RaggedTensor", "SparseTensor"):
        return False
    return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)))
