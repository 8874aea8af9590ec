"""The teacher at inference speed: a private copy, folded and in lower precision."""

import math
import statistics
import time
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.losses.divergences import softened_kl
from keras_kd.models.graph import give_weights
from keras_kd.models.model_reader import Answer, Reader
from keras_kd.teachers.ensemble import Ensemble
from keras_kd.teachers.model import ModelTeacher, Teacher
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.masks import with_joint_mask

PRECISIONS = ("float32", "bfloat16", "float16", "auto")
AS_GIVEN = "as given"
LEAST_AGREEMENT = 0.999
MOST_DIVERGENCE = 1e-3
# What "auto" times, the most likely first, and the share of the time that ends the search.
_TRIALS = (("bfloat16",), ("float32", "float16"))
_ENOUGH = 0.7


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
        raise ValueError(
            f"`teacher_precision` is one of {', '.join(map(repr, PRECISIONS))}. Received: "
            f"{precision!r}." + did_you_mean(precision, PRECISIONS, quote="'")
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
        ValueError: If the model has no graph of layers that can be copied, or
            is quantized.
    """
    from keras_kd.models.graph import is_graph

    if not is_graph(model):
        raise ValueError(
            f"`teacher_precision` copies the teacher layer by layer, and `{model.name}` is a "
            "subclassed model whose layers are not known. Leave it out, or rebuild the teacher "
            "as a Functional model."
        )
    for layer in model._flatten_layers():
        mode = getattr(layer, "quantization_mode", None)
        if mode is not None:
            raise ValueError(
                f"`teacher_precision` copies the teacher's float weights, and `{model.name}` is "
                f"quantized: its layer `{layer.name}` holds {mode}. Leave it out, or pass the "
                "model as it was before `quantize`."
            )
    try:
        return _copied(model, dtype)
    except Exception as error:
        # What a user's layer raises when it is made anew may be anything.
        raise ValueError(
            f"`teacher_precision` copies the teacher layer by layer, and `{model.name}` cannot be "
            f"copied in {dtype}: {error!r}. Leave it out."
        ) from error


def _copied(model: Any, dtype: str) -> Any:
    from keras_kd.models.folding import fold_batch_normalization

    folded = fold_batch_normalization(model)
    if dtype == "float32":
        return folded

    def lower(layer: Any) -> Any:
        config = layer.get_config()
        if not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = dtype
        return type(layer).from_config(config)

    copy = keras.models.clone_model(folded, clone_function=lower, recursive=True)
    give_weights(copy, folded.get_weights())
    return copy


class FastTeacher(ModelTeacher):
    """A model that is answered for by a folded copy in lower precision.

    With `precision="auto"` a copy in bfloat16 is timed against the model on the
    first batch of the data, and those in float32 and float16 as well where it
    does not take less than 0.7 of the time. The fastest one is taken if it is
    faster than the model and agrees with it: top-1 on at least 99.9 % of the
    rows, with a KL divergence below 1e-3 nats. Which one is said
    once, as a warning; one that cannot be copied runs as it was given. A copy
    follows its model: where the weights are others than when it was made, the
    next `fit` or `evaluate` copies, and with `"auto"` chooses, again. Inner
    layers are read from the model as it was given, since folding changes what
    they compute.

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
        # How it runs, once that is known, and the weights that were copied.
        self._runs: str | None = None
        self._weights = 0
        self._copies = 0
        if precision != "auto":
            self._take(precision)

    def _take(self, precision: str, copy: Any = None) -> None:
        """Run a copy from now on, or the model as it was given."""
        self._runs = precision
        self._weights = checksum(self.model)
        self._copies += 1
        self._copy = None
        if precision != AS_GIVEN:
            copy = inference_copy(self.model, precision) if copy is None else copy
            self._copy = Reader(copy, "teacher", self.from_logits)

    @property
    def precisions(self) -> list[str]:
        """The precision of the copy, `"as given"` where none is run."""
        return [AS_GIVEN if self._taps or self._runs is None else self._runs]

    def take_precisions(self, precisions: Sequence[str]) -> None:
        """Run the model as another process chose, with `"auto"`."""
        if self.precision == "auto" and not self._taps:
            self._take(precisions[0])

    def refresh(self) -> bool:
        """Copy the weights again if they are others than when they were copied.

        Returns:
            Whether a precision is to be chosen anew.
        """
        if self._runs is None or checksum(self.model) == self._weights:
            return False
        if self.precision == "auto":
            # What was fast and agreed may do so no more.
            self._runs, self._copy = None, None
            return True
        if self._copy is not None:
            # Into the copy that compiled steps know.
            give_weights(self._copy.model, inference_copy(self.model, self._runs).get_weights())
            self._weights = checksum(self.model)
            self._copies += 1
        return False

    @property
    def baked(self) -> Any:
        """Which copy is run; a step that was compiled with another is made anew."""
        return self._copies

    @property
    def models(self) -> list[Any]:
        """The model, and its copy where one runs in its place."""
        return [self.model, *([self._copy.model] if self._copy is not None else [])]

    @property
    def settled(self) -> bool:
        """Whether nothing is left to find out from a batch."""
        return super().settled and self._runs is not None

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on."""
        super().reset(paths)
        self._taps = paths

    def inspect(self, x: Any) -> None:
        """Choose a precision on the first batch, with `"auto"`."""
        super().inspect(x)
        if self._runs is None and not self._taps:
            self._choose(x)

    def _choose(self, x: Any) -> None:
        copies: dict[str, Any] = {}
        chosen, share, best, given, why = AS_GIVEN, 1.0, math.nan, math.nan, ""
        before = self._reader.read(x, False).logits
        for kinds in _TRIALS:
            made = {}
            for kind in kinds:
                try:
                    made[kind] = inference_copy(self.model, kind)
                except ValueError as error:
                    why = f" {error}"
            if not made:
                continue
            given, *times = milliseconds([self.model, *made.values()], x)
            for (kind, copy), spent in zip(made.items(), times):
                reader = Reader(copy, "teacher", self.from_logits)
                if spent < share * given and agrees(before, reader.read(x, False).logits):
                    share, chosen, best = spent / given, kind, spent
            copies |= made
            if share < _ENOUGH:
                break
        self._take(chosen, copies.get(chosen))
        form = "as it was given" if chosen == AS_GIVEN else f"folded, in {chosen}"
        said = f"The teacher `{self.name}` runs {form}"
        if copies:
            spent = given if chosen == AS_GIVEN else best
            said += f": {spent:.3g} ms for {len_of(x)} rows, {given:.3g} ms as it was given"
        warnings.warn(f"{said}.{why}", stacklevel=2)

    def read(self, x: Any, record: Any, units: Sequence[str]) -> Answer:
        """Answer one batch, in float32 whatever computed it."""
        if self._copy is None or self._taps:
            return super().read(x, record, units)
        answer = self._copy.read(x, False, units)
        output, logits = keras.tree.map_structure(
            lambda tensor: with_joint_mask(ops.cast(tensor, "float32"), [tensor]),
            (answer.output, answer.logits),
        )
        return Answer(output, logits, {})


def checksum(model: Any) -> int:
    """A CRC-32 of a model's weights, to see whether they changed."""
    found = 0
    for weight in model.weights:
        value = np.ascontiguousarray(ops.convert_to_numpy(weight))
        found = zlib.crc32(value.reshape(-1).view("u1"), found)
    return found


def milliseconds(models: Sequence[Any], x: Any, repeats: int = 3) -> list[float]:
    """Median time of one `predict_on_batch` of each model, taken in turn.

    Args:
        models: The models.
        x: A batch.
        repeats: How often each is timed, after one call that compiles it; one that took
            more than twice the time of another in the first turn is not timed again.

    Returns:
        One time a model, in milliseconds.
    """
    for model in models:
        model.predict_on_batch(x)
    spent: list[list[float]] = [[] for _ in models]
    for _ in range(repeats):
        slow = 2.0 * min((own[0] for own in spent if own), default=math.inf)
        for model, own in zip(models, spent):
            if own and own[0] > slow:
                # float16 without hardware for it takes ten times as long.
                continue
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
        # PyTorch warns of numbers taken from tensors that still want a gradient.
        exact = ops.cast(ops.stop_gradient(ops.convert_to_tensor(exact)), "float32")
        fast = ops.cast(ops.stop_gradient(ops.convert_to_tensor(fast)), "float32")
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
