"""A Keras model as teacher, as it was given or as a folded copy in lower precision."""

import copy
import inspect
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.models.fingerprint import fingerprint
from keras_kd.models.graph import give_weights
from keras_kd.models.model_reader import Answer, Reader
from keras_kd.teachers import precision
from keras_kd.teachers.base import Teacher
from keras_kd.utils import checks
from keras_kd.utils.masks import with_joint_mask
from keras_kd.utils.types import Tensor, Tensors


def require_ranks(name: str, leaves: Sequence[Any], shapes: Sequence[Sequence[Any]]) -> None:
    """Raise `ValueError` where single samples are given for batches.

    Args:
        name: Of the teacher that reads them.
        leaves: The flat inputs.
        shapes: The shapes that the teacher reads, batch first.
    """
    for leaf, expected in zip(leaves, shapes):
        if len(leaf.shape) == len(expected) - 1 and np.prod(leaf.shape) > 1:
            raise ValueError(
                f"The data yield inputs of shape {tuple(leaf.shape)}, and the teacher "
                f"`{name}` reads batches of shape {tuple(expected)}. Batch the data: "
                "`dataset.batch(128)`."
            )


class ModelTeacher(Teacher):
    """A Keras model as teacher.

    Args:
        model: A built `keras.Model`.
        from_logits: Whether its outputs are logits; `None` finds out.

    Raises:
        TypeError: If it is no Keras 3 model.
        ValueError: If it is not built.
    """

    def __init__(self, model: keras.Model, from_logits: bool | None = None) -> None:
        _refuse_others(model)
        checks.require_model(model, "teacher")
        if not model.built:
            raise ValueError(
                f"The teacher `{model.name}` has no weights yet: it was never built. Load its "
                "trained weights, or call it once on a batch, before distilling from it."
            )
        self.model = model
        self.name = model.name
        self.from_logits = from_logits
        self._reader = Reader(model, "teacher", from_logits)

    @property
    def original(self) -> Any:
        """The model, which the user passed."""
        return self.model

    @property
    def models(self) -> list[Any]:
        """The model."""
        return [self.model]

    @property
    def kinds(self) -> list[str]:
        """How each flat output is made."""
        return self._reader.kinds()

    def output_template(self) -> Any:
        """The structure of the outputs with names at its leaves, or `None` if unknown."""
        return self._reader.template

    def output_shapes(self) -> list[Any] | None:
        """The shapes of the flat outputs, or `None` for a model without a graph."""
        return self._reader.shapes

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on."""
        self._reader.reset(paths)

    def apart(self) -> Teacher:
        """The same model, with a choice of its own of the layers that are read."""
        twin = copy.copy(self)
        twin._reader = copy.copy(self._reader)
        return twin

    def at_precision(self, precision: str) -> Teacher:
        """A folded copy of the model in this precision."""
        return FastTeacher(self.model, precision, self.from_logits)

    def require_batch(self, x: Tensors) -> None:
        """Raise `ValueError` for single samples; only a model with a graph knows its rank."""
        inputs = getattr(self.model, "inputs", None)
        leaves = keras.tree.flatten(x)
        if inputs and len(inputs) == len(leaves):
            require_ranks(self.name, leaves, [tuple(tensor.shape) for tensor in inputs])

    @property
    def settled(self) -> bool:
        """Whether the layers tell all there is to know of the outputs."""
        return self._reader.settled

    def inspect(self, x: Tensors) -> None:
        """Find out from a concrete batch what the layers alone do not tell."""
        self._reader.inspect(x)

    def require_logits(self, output: int) -> None:
        """Raise `ValueError` unless the logits of a flat output can be read."""
        self._reader.require_logits(output)

    def is_last(self, output: int) -> bool:
        """Whether the classes of a flat output lie on its last axis, as far as that is known."""
        return self._reader.is_last(output)

    def is_doubtful(self, output: int) -> bool:
        """Whether a flat output that is read as it is may be no logits."""
        return self._reader.is_doubtful(output)

    def own_loss(self, output: int) -> Any:
        """The loss that the model was compiled with for a flat output, `None` if it was not."""
        loss = self.model.loss if getattr(self.model, "compiled", False) else None
        each = checks.per_output(loss, self.output_template())
        return each[output] if output < len(each) else None

    def answer(
        self, x: Tensors, record: Mapping[str, Tensor] | None = None, units: Sequence[str] = ()
    ) -> Answer:
        """Answer one batch."""
        return self._reader.read(x, False, units)

    def fingerprint(self) -> str:
        """Identify the teacher by its layers, how they are joined, and its weights."""
        return fingerprint(self.model)


class FastTeacher(ModelTeacher):
    """A model that is answered for by a folded copy in lower precision.

    With `wanted="auto"` a copy in bfloat16 is timed against the model on the
    first batch of the data, and those in float32 and float16 as well where it
    does not take less than 0.7 of the time. The fastest one is taken if it is
    faster than the model and precision.agrees with it: top-1 on at least 99.9 % of the
    rows, with a KL divergence below 1e-3 nats. Which one is said
    once, as a warning; one that cannot be copied runs as it was given. A copy
    follows its model: where the weights are others than when it was made, the
    next `fit` or `evaluate` copies, and with `"auto"` chooses, again. Inner
    layers are read from the model as it was given, since folding changes what
    they compute.

    Args:
        model: A built Functional or Sequential model.
        wanted: `"bfloat16"`, `"float16"` or `"auto"`.
        from_logits: Whether its outputs are logits; `None` finds out.

    Raises:
        ValueError: If the model cannot be copied.

    Reference:
        - [Jacob et al., 2018](https://arxiv.org/abs/1712.05877), section 3.2 (folding)
    """

    def __init__(self, model: keras.Model, wanted: str, from_logits: bool | None = None) -> None:
        super().__init__(model, from_logits)
        self.precision = wanted
        self._taps: Sequence[str] = ()
        self._copy: Reader | None = None
        # How it runs, once that is known, and the weights that were copied.
        self._runs: str | None = None
        self._weights = 0
        self._copies = 0
        if wanted != "auto":
            self._take(wanted)

    def _take(self, runs: str, copy: keras.Model | None = None) -> None:
        """Run a copy from now on, or the model as it was given."""
        self._runs = runs
        self._weights = precision.checksum(self.model)
        self._copies += 1
        self._copy = None
        if runs != precision.AS_GIVEN:
            copy = precision.inference_copy(self.model, runs) if copy is None else copy
            self._copy = Reader(copy, "teacher", self.from_logits)

    @property
    def precisions(self) -> list[str]:
        """The precision of the copy, `"as given"` where none is run."""
        return [precision.AS_GIVEN if self._taps or self._runs is None else self._runs]

    def take_precisions(self, precisions: Sequence[str]) -> None:
        """Run the model as another process chose, with `"auto"`."""
        if self.precision == "auto" and not self._taps:
            self._take(precisions[0])

    def refresh(self) -> bool:
        """Copy the weights again if they are others than when they were copied.

        Returns:
            Whether a precision is to be chosen anew.
        """
        if self._runs is None or precision.checksum(self.model) == self._weights:
            return False
        if self.precision == "auto":
            # What was fast and agreed may do so no more.
            self._runs, self._copy = None, None
            return True
        if self._copy is not None:
            # Into the copy that compiled steps know.
            give_weights(
                self._copy.model, precision.inference_copy(self.model, self._runs).get_weights()
            )
            self._weights = precision.checksum(self.model)
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

    def inspect(self, x: Tensors) -> None:
        """Choose a precision on the first batch, with `"auto"`."""
        super().inspect(x)
        if self._runs is None and not self._taps:
            self._choose(x)

    def _choose(self, x: Tensors) -> None:
        copies: dict[str, Any] = {}
        chosen, share, best, given, why = precision.AS_GIVEN, 1.0, math.nan, math.nan, ""
        before = self._reader.read(x, False).logits
        for kinds in precision.TRIALS:
            made = {}
            for kind in kinds:
                try:
                    made[kind] = precision.inference_copy(self.model, kind)
                except ValueError as error:
                    why = f" {error}"
            if not made:
                continue
            given, *times = precision.milliseconds([self.model, *made.values()], x)
            for (kind, fast), spent in zip(made.items(), times):
                if spent >= share * given:
                    continue
                after = Reader(fast, "teacher", self.from_logits).read(x, False).logits
                if precision.agrees(before, after):
                    share, chosen, best = spent / given, kind, spent
            copies |= made
            if share < precision.ENOUGH:
                break
        self._take(chosen, copies.get(chosen))
        form = "as it was given" if chosen == precision.AS_GIVEN else f"folded, in {chosen}"
        said = f"The teacher `{self.name}` runs {form}"
        if copies:
            spent = given if chosen == precision.AS_GIVEN else best
            said += (
                f": {spent:.3g} ms for {precision.len_of(x)} rows, {given:.3g} ms as it was given"
            )
        warnings.warn(f"{said}.{why}", stacklevel=2)

    def answer(
        self, x: Tensors, record: Mapping[str, Tensor] | None = None, units: Sequence[str] = ()
    ) -> Answer:
        """Answer one batch, in float32 whatever computed it."""
        if self._copy is None or self._taps:
            return super().answer(x, record, units)
        answer = self._copy.read(x, False, units)
        output, logits = keras.tree.map_structure(
            lambda tensor: with_joint_mask(ops.cast(tensor, "float32"), [tensor]),
            (answer.output, answer.logits),
        )
        return Answer(output, logits, {})


def _refuse_others(given: object) -> None:
    """Raise `TypeError` for what is a teacher only once it was opened or wrapped."""
    if isinstance(given, keras.Model):
        return
    if isinstance(given, str | os.PathLike):
        raise TypeError(
            f"The teacher must be an object. Received: the path `{os.fspath(given)}`. Open it "
            "with `keras.saving.load_model`, `keras_kd.teachers.from_onnx` or `from_tflite`, or "
            "`CachedTeacher`."
        )
    if isinstance(given, type):
        raise TypeError(
            f"The teacher must be an object. Received: the class `{given.__name__}`. Pass a fitted "
            "instance of it."
        )
    if inspect.isroutine(given):
        raise TypeError(
            "The teacher must be an object. Received: the function "
            f"`{getattr(given, '__name__', given)}`. Wrap it: `keras_kd.teachers.BlackBox(fn, "
            "outputs=...)`, and say what it answers."
        )
    if callable(getattr(given, "fit", None)) and callable(getattr(given, "get_params", None)):
        raise TypeError(
            f"The teacher must be a `keras.Model`. Received: a `{type(given).__name__}` of "
            "scikit-learn. Wrap it: `keras_kd.teachers.from_sklearn(estimator)`."
        )
