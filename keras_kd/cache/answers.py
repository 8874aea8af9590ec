"""Where the records of a cache come from: a teacher that is asked, batch by batch."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd import backends
from keras_kd.cache import layout, samples
from keras_kd.cache.layout import Layout, Output
from keras_kd.models import meaning
from keras_kd.teachers.base import AnswerError, Teacher
from keras_kd.utils.masks import keras_mask
from keras_kd.utils.types import Tensor, Tensors


class _Compiled(keras.Model):
    """What is stored of a batch, computed as `predict` computes."""

    def __init__(self, run: Callable[[Any], dict[str, Any]]) -> None:
        super().__init__(name="keras_kd_cache", autocast=False)
        self._run = run
        self.built = True

    def call(self, inputs: Tensors) -> dict[str, Any]:
        return self._run(inputs)


class AnswerSource(abc.ABC):
    """What the writer of a cache asks for records, whoever answers.

    Attributes:
        layout: The fields of a record, known once `prepare` has returned.
        name: Of the teacher.
    """

    layout: Layout
    name: str

    @abc.abstractmethod
    def prepare(self, x: Tensors, seeded: bool) -> np.ndarray:
        """Find the form of a record from a first batch, and give that batch's records.

        Args:
            x: The batch, or its views.
            seeded: Whether each record begins with the seed of its view.
        """

    @abc.abstractmethod
    def records(self, x: Tensors, row: int) -> np.ndarray:
        """The records of a batch that begins at row `row`."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Identify who answers."""

    @property
    def precisions(self) -> list[str]:
        """How each model runs that answers."""
        return ["as given"]

    def take_precisions(self, precisions: Sequence[str]) -> None:  # noqa: B027
        """Answer as another process did, where there is a choice."""

    def template(self) -> Any:
        """The structure of the outputs with names at its leaves, or `None` if unknown."""
        return None

    def classes(self) -> list[str] | None:
        """Names of the classes, where somebody named them."""
        return None

    def require_batch(self, x: Tensors) -> None:  # noqa: B027
        """Raise `ValueError` for single samples in place of batches, where that is known."""

    def given(self, x: Tensors) -> str:
        """What tells what is answered of one sample: a CRC-32, or that it is the batch.

        Args:
            x: A batch of one sample, or its view.
        """
        return "the batch as it is"


class Answers(AnswerSource):
    """A teacher, and the form in which its answers are stored.

    Args:
        teacher: The teacher, which reads the taps.
        taps: Paths of the layers that are stored too.
        top_k: How many classes are stored, `None` for all.
        dtype: `"float16"` or `"float32"`.
        teacher_inputs: What the teacher reads of a batch, `None` for the batch.
        binary: Whether the units of the outputs are independent; `None` finds
            out.
    """

    def __init__(
        self,
        teacher: Teacher,
        taps: list[str],
        top_k: int | None,
        dtype: str,
        teacher_inputs: Callable[[Any], Any] | None,
        binary: bool | None,
    ) -> None:
        self.teacher = teacher
        self.name = teacher.name
        self.taps = taps
        self.top_k = top_k
        self.dtype = dtype
        self._maps = teacher_inputs is not None
        self.reads = teacher_inputs or (lambda x: x)
        self.binary = binary
        self.is_binary: list[bool] = []
        self._shapes: list[tuple[int, ...]] = []
        self._compiled: Any = None

    def fingerprint(self) -> str:
        """Identify the teacher."""
        return self.teacher.fingerprint()

    @property
    def precisions(self) -> list[str]:
        """How each model of the teacher runs."""
        return self.teacher.precisions

    def take_precisions(self, precisions: Sequence[str]) -> None:
        """Run the models as another process did, where there is a choice."""
        self.teacher.take_precisions(precisions)

    def template(self) -> Any:
        """The structure of the teacher's outputs with names at its leaves."""
        return self.teacher.output_template()

    def classes(self) -> list[str] | None:
        """Names of the classes, where the teacher has any."""
        return self.teacher.classes

    def require_batch(self, x: Tensors) -> None:
        """Raise `ValueError` for single samples, as far as the teacher knows what it reads."""
        self.teacher.require_batch(x)

    def prepare(self, x: Tensors, seeded: bool) -> np.ndarray:
        """Find the form of a record from a first batch, and give that batch's records."""
        if "unknown" in self.teacher.kinds or not self.teacher.settled:
            self.teacher.inspect(self.reads(x))
        for i in range(len(self.teacher.kinds)):
            # A regression is stored as it is, whatever its values look like.
            if meaning.of_loss(self.teacher.own_loss(i)) != meaning.VALUES:
                self.teacher.require_logits(i)
        kinds = ["logits" if kind == "unknown" else kind for kind in self.teacher.kinds]
        self.is_binary = [bool(self.binary) or kind == "sigmoid" for kind in kinds]
        shapes = self.teacher.output_shapes()
        if shapes is not None:
            self._find_one_unit(shapes)
        answers = self._first(x)
        if shapes is None and self._find_one_unit(self._shapes):
            answers = self._first(x)
        for shape, is_binary in zip(self._shapes, self.is_binary):
            # Here and not while the teacher runs, where Keras would wrap the message.
            layout.require_top_k(self.top_k, shape[-1])
            if is_binary and self.top_k is not None:
                raise ValueError(
                    f"`top_k` keeps the most probable of exclusive classes. Received: top_k="
                    f"{self.top_k} and the teacher `{self.teacher.name}`, whose output has "
                    "independent units. Pass `top_k=None`."
                )
        self.layout = Layout(
            tuple(
                Output(shape, kind, binary, self.top_k, _mask_shape(answers, f"mask_{i}"))
                for i, (shape, kind, binary) in enumerate(zip(self._shapes, kinds, self.is_binary))
            ),
            tuple((path, answers[f"tap_{i}"].shape[1:]) for i, path in enumerate(self.taps)),
            self.dtype,
            seeded,
            tuple(_mask_shape(answers, f"tap_mask_{i}") for i in range(len(self.taps)))
            if any(name.startswith("tap_mask") for name in answers)
            else (),
        )
        return self._records(answers, 0)

    def _first(self, x: Tensors) -> dict[str, Any]:
        """The answers to a first batch, by a step that is compiled for it."""
        self._compiled = _Compiled(self._run)
        if not self.teacher.compiled and not backends.host_calls_in_jit():
            self._compiled.supports_jit = False
        return self._asked(x, 0)

    def _asked(self, x: Tensors, row: int) -> dict[str, Any]:
        """The answers to a batch that begins at row `row`."""
        failure: BaseException | None
        try:
            answers: dict[str, Any] = self._compiled.predict_on_batch(x)
            failure = self.teacher.failure()
        except Exception as error:
            # Where nothing is compiled, Keras raises another error in place of the teacher's.
            failure = _of_teacher(error)
            if failure is None:
                raise
        if isinstance(failure, AnswerError):
            failure = failure.placed("the data", row)
        if failure is not None:
            raise failure
        return answers

    def _find_one_unit(self, shapes: Sequence[Any]) -> bool:
        """Count outputs of one unit as binary; tells whether that was news."""
        if self.binary is not None:
            return False
        before = list(self.is_binary)
        self.is_binary = [known or shape[-1] == 1 for known, shape in zip(before, shapes)]
        return before != self.is_binary

    def records(self, x: Tensors, row: int) -> np.ndarray:
        """The records of a batch that begins at row `row`."""
        return self._records(self._asked(x, row), row)

    def given(self, x: Tensors) -> str:
        """What tells what the teacher reads of one sample: a CRC-32, or that it is the batch.

        Args:
            x: A batch of one sample, or its view.
        """
        if not self._maps:
            return "the batch as it is"
        read = self.reads(keras.tree.map_structure(_tensor, x))
        return f"{int(samples.digests(read)[0]):08x}"

    def _run(self, x: Tensors) -> dict[str, Any]:
        units = [meaning.INDEPENDENT if b else meaning.CLASSES for b in self.is_binary]
        answer = self.teacher.answer(self.reads(x), None, units)
        # Known while the function is traced, and needed for the form of a record.
        self._shapes = [tuple(int(n) for n in z.shape[1:]) for z in answer.logits]
        stored: dict[str, Any] = {}
        finite = []
        for i, logits in enumerate(answer.logits):
            logits = ops.cast(logits, "float32")
            finite.append(logits)
            if self.top_k is None:
                stored[f"logits_{i}"] = logits
                continue
            log_p = ops.log_softmax(logits, axis=-1)
            # float16 holds no more than 65504; nothing is lost below exp(-60000).
            stored[f"values_{i}"], stored[f"classes_{i}"] = ops.top_k(
                ops.maximum(log_p, -60000.0), min(self.top_k, int(logits.shape[-1]))
            )
        for i, path in enumerate(self.taps):
            stored[f"tap_{i}"] = ops.cast(answer.tensors[path], "float32")
            finite.append(stored[f"tap_{i}"])
        result = {
            name: tensor if name.startswith("classes") else ops.cast(tensor, self.dtype)
            for name, tensor in stored.items()
        }
        # What counts for nothing in the answers of the teacher that is run does so in these.
        for i, logits in enumerate(answer.logits):
            result.update(_stored_mask(f"mask_{i}", logits))
        for i, path in enumerate(self.taps):
            result.update(_stored_mask(f"tap_mask_{i}", answer.tensors[path]))
        result["finite"] = _all_finite(finite)
        held = [result[name] for name in stored if name.startswith(("logits", "tap"))]
        result["held"] = _all_finite(held) if held else result["finite"]
        return result

    def _records(self, answers: dict[str, Any], row: int) -> np.ndarray:
        for name, reason in (
            ("finite", "are NaN or infinite. Check that sample and the teacher's weights"),
            ("held", 'are larger than float16 holds, 65504. Write the cache with dtype="float32"'),
        ):
            if not answers[name].all():
                first = row + int(np.flatnonzero(~answers[name])[0])
                raise ValueError(
                    f"The answers of the teacher `{self.teacher.name}` to row {first} {reason}. "
                    "Finished shards are untouched."
                )
        records = np.empty(len(answers["finite"]), self.layout.record)
        for name in self.layout.record.names:
            if name != "seed":
                records[name] = answers[name]
        return records


def _stored_mask(name: str, tensor: Tensor) -> dict[str, Any]:
    """The Keras mask of a tensor by name, one for each sample; nothing where it has none."""
    mask = keras_mask(tensor)
    if mask is None:
        return {}
    each = ops.ones((ops.shape(tensor)[0], *[1] * (len(mask.shape) - 1)), dtype="bool")
    return {name: ops.logical_and(ops.cast(mask, "bool"), each)}


def _of_teacher(error: BaseException | None) -> AnswerError | None:
    """The error of a teacher that was asked on the host, of which this one was made."""
    while error is not None and not isinstance(error, AnswerError):
        error = error.__context__
    return error


def _mask_shape(answers: dict[str, Any], name: str) -> tuple[int, ...] | None:
    """The shape of one sample's mask, `None` where there is none."""
    return tuple(answers[name].shape[1:]) if name in answers else None


def _tensor(leaf: Tensor) -> Any:
    """A leaf as the compiled step hands it to `teacher_inputs`."""
    if ops.is_tensor(leaf):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind in "OSU":
        return array
    return ops.convert_to_tensor(array, keras.config.floatx() if array.dtype.kind == "f" else None)


def _all_finite(tensors: Sequence[Any]) -> Any:
    """For each sample whether all its values are finite."""
    result: Any = None
    for tensor in tensors:
        flat = ops.isfinite(ops.reshape(tensor, (ops.shape(tensor)[0], -1)))
        every = ops.all(flat, axis=-1)
        result = every if result is None else ops.logical_and(result, every)
    return result
