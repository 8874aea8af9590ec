"""The teacher at inference speed: a private copy, folded and in lower precision."""

import difflib
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_kd.losses.logits import softened_kl
from keras_kd.taps import Answer, Reader
from keras_kd.teachers.ensemble import Ensemble
from keras_kd.teachers.model import ModelTeacher, Teacher

PRECISIONS = ("float32", "bfloat16", "float16", "auto")
LEAST_AGREEMENT = 0.999
MOST_DIVERGENCE = 1e-3


def at_precision(teacher: Teacher | None, precision: str) -> Teacher | None:
    """Run a teacher's models as copies of this precision.

    Args:
        teacher: What was made of the user's teacher, or `None`.
        precision: `"float32"` leaves the teacher as it is given.

    Returns:
        The teacher, or one that answers in its place.

    Raises:
        ValueError: If the precision is unknown, there is no model to run, or
            a model cannot be copied.
    """
    if precision not in PRECISIONS:
        close = difflib.get_close_matches(str(precision), PRECISIONS, n=1)
        raise ValueError(
            f"`teacher_precision` is one of {', '.join(map(repr, PRECISIONS))}. Received: "
            f"{precision!r}." + (f" Did you mean {close[0]!r}?" if close else "")
        )
    if precision == "float32" or teacher is None:
        return teacher
    if isinstance(teacher, ModelTeacher):
        return FastTeacher(teacher.model, precision, teacher.from_logits)
    if isinstance(teacher, Ensemble):
        teacher.members = [
            FastTeacher(member.model, precision, member.from_logits) for member in teacher.members
        ]
        return teacher
    raise ValueError(
        f"`teacher_precision={precision!r}` runs models faster, and the teacher `{teacher.name}` "
        "runs none: its outputs are read from disk. Leave it out."
    )


def inference_copy(model: Any, dtype: str) -> Any:
    """Copy a model for inference: BatchNormalization folded, weights and computation in `dtype`.

    Args:
        model: A built Functional or Sequential model; it stays as it is.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Returns:
        A new model.

    Raises:
        ValueError: If the model has no graph of layers that can be copied.
    """
    from keras_kd.compress.fold import fold_batch_normalization
    from keras_kd.graph import is_graph

    if not is_graph(model):
        raise ValueError(
            f"`teacher_precision` copies the teacher layer by layer, and `{model.name}` is a "
            "subclassed model whose layers are not known. Leave it out, or rebuild the teacher "
            "as a Functional model."
        )
    folded = fold_batch_normalization(model)
    if dtype == "float32":
        return folded

    def lower(layer: Any) -> Any:
        config = layer.get_config()
        if not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = dtype
        return type(layer).from_config(config)

    copy = keras.models.clone_model(folded, clone_function=lower, recursive=True)
    copy.set_weights(folded.get_weights())
    return copy


class FastTeacher(ModelTeacher):
    """A model that is answered for by a folded copy in lower precision.

    With `precision="auto"` copies in float32, bfloat16 and float16 are timed
    against the model on the first batch of the data, and the fastest one is
    taken if it is faster than the model and agrees with it: top-1 on at least
    99.9 % of the rows, with a KL divergence below 1e-3 nats. Which one is said
    once, as a warning. Inner layers are read from the model as it was given,
    since folding changes what they compute.

    Args:
        model: A built Functional or Sequential model.
        precision: `"bfloat16"`, `"float16"` or `"auto"`.
        from_logits: Whether its outputs are logits; `None` finds out.

    Raises:
        ValueError: If the model cannot be copied.

    Reference:
        - [Jacob et al., 2018](https://arxiv.org/abs/1712.05877), section 3.2 (folding)
    """

    def __init__(self, model: Any, precision: str, from_logits: bool | None = None) -> None:
        super().__init__(model, from_logits)
        self.precision = precision
        self._taps: Sequence[str] = ()
        self._copy: Reader | None = None
        if precision != "auto":
            self._take(inference_copy(model, precision))

    def _take(self, copy: Any) -> None:
        self._copy = Reader(copy, "teacher", self.from_logits)

    @property
    def models(self) -> list[Any]:
        """The model, and its copy where one runs in its place."""
        return [self.model, *([self._copy.model] if self._copy is not None else [])]

    @property
    def settled(self) -> bool:
        """Whether nothing is left to find out from a batch."""
        return super().settled and self.precision != "auto"

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on."""
        super().reset(paths)
        self._taps = paths

    def inspect(self, x: Any) -> None:
        """Choose a precision on the first batch, with `"auto"`."""
        super().inspect(x)
        if self.precision == "auto" and not self._taps:
            self._choose(x)

    def _choose(self, x: Any) -> None:
        kinds = ("float32", "bfloat16", "float16")
        copies = {kind: inference_copy(self.model, kind) for kind in kinds}
        before = self._reader.read(x, False).logits
        times = milliseconds([self.model, *copies.values()], x)
        best, chosen = times[0], "as it was given"
        for (kind, copy), spent in zip(copies.items(), times[1:]):
            reader = Reader(copy, "teacher", self.from_logits)
            if spent < best and agrees(before, reader.read(x, False).logits):
                best, chosen, self._copy = spent, f"folded, in {kind}", reader
        self.precision = "chosen"
        warnings.warn(
            f"The teacher `{self.name}` runs {chosen}: {best:.3g} ms for {len_of(x)} rows, "
            f"{times[0]:.3g} ms as it was given.",
            stacklevel=2,
        )

    def read(self, x: Any, record: Any, binary: Sequence[bool]) -> Answer:
        """Answer one batch, in float32 whatever computed it."""
        if self._copy is None or self._taps:
            return super().read(x, record, binary)
        answer = self._copy.read(x, False, binary)
        output, logits = keras.tree.map_structure(
            lambda tensor: ops.cast(tensor, "float32"), (answer.output, answer.logits)
        )
        return Answer(output, logits, {})


def milliseconds(models: Sequence[Any], x: Any, repeats: int = 5) -> list[float]:
    """Median time of one `predict_on_batch` of each model, taken in turn.

    Args:
        models: The models.
        x: A batch.
        repeats: How often each is timed, after one call that compiles it.

    Returns:
        One time a model, in milliseconds.
    """
    for model in models:
        model.predict_on_batch(x)
    spent: list[list[float]] = [[] for _ in models]
    for _ in range(repeats):
        for model, own in zip(models, spent):
            began = time.perf_counter()
            model.predict_on_batch(x)
            own.append(1000 * (time.perf_counter() - began))
    return [statistics.median(own) for own in spent]


def agrees(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether two readings of one batch say the same, within the bounds above.

    Args:
        before: Logits of the model, one tensor an output, `(rows, ..., classes)`.
        after: Logits of its copy.

    Returns:
        True if every output agrees; one that is not finite does not.
    """
    for exact, fast in zip(before, after):
        exact, fast = ops.cast(exact, "float32"), ops.cast(fast, "float32")
        if exact.shape[-1] == 1:
            same = ops.equal(ops.greater(exact, 0), ops.greater(fast, 0))
            zeros = ops.zeros_like(exact)
            exact, fast = (ops.concatenate([zeros, z], axis=-1) for z in (exact, fast))
        else:
            same = ops.equal(ops.argmax(exact, axis=-1), ops.argmax(fast, axis=-1))
        divergence = float(ops.mean(softened_kl(exact, fast, 1.0)))
        # Written so that NaN fails too.
        if not divergence < MOST_DIVERGENCE:
            return False
        if float(ops.mean(ops.cast(same, "float32"))) < LEAST_AGREEMENT:
            return False
    return True


def len_of(x: Any) -> int:
    """Number of rows in a batch."""
    return int(keras.tree.flatten(x)[0].shape[0])
