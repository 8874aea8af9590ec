"""The teacher's answers to the rows of `fit`, asked for once and kept in memory.

`AnswerMemory` decides whether that is right, asks, joins the answers to the rows as those of a
cache are, and stops where the teacher turns out to be another. What speaks against it is a
sentence of `_against`; a new reason is one more of them.
"""

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd import backends
from keras_kd.cache import join_arrays
from keras_kd.cache.join_datasets import Joined
from keras_kd.cache.memory import Form, Remembered, fields_of, joined_rows
from keras_kd.distill import hooks
from keras_kd.distill.pairing import Pairing
from keras_kd.models.model_reader import Answer
from keras_kd.teachers.base import AnswerError
from keras_kd.teachers.row_numbers import Numbered
from keras_kd.utils import checks
from keras_kd.utils.data import are_arrays
from keras_kd.utils.free_memory import free_memory
from keras_kd.utils.types import Data, Tensors

MODES = ("auto", "live", "memory")
SHARE = 0.1
"""The part of free memory that `"auto"` takes at most."""

# Rows on which `teacher_inputs` is tried, and how often, to see whether it gives the same.
_TRIED, _TRIALS = 64, 8
# Bytes of the data of which a checksum is taken, beside the sums of all rows.
_SAMPLED = 1 << 20


class AnswerMemory:
    """What a teacher said of arrays, as long as it is the same teacher.

    Args:
        pairing: The models.
        mode: `"auto"`, `"live"` or `"memory"`, as for `Distiller`.
        name: The distiller's, for messages.

    Raises:
        ValueError: If there is no such mode.
    """

    def __init__(self, pairing: Pairing, mode: str, name: str) -> None:
        checks.one_of("teacher_answers", mode, MODES)
        self.mode = mode
        self._pairing = pairing
        self._name = name
        self._held: Remembered | None = None
        self._of: list[Any] = []
        self._marks: list[Any] = []
        self._probe: list[Any] = []
        self._probe_marks: list[Any] = []
        self._told = False

    # ---------------------------------------------------------------------- joining

    def for_fit(
        self,
        distiller: hooks.Trained,
        data: tuple[Any, Any, int | None, dict[str, Any]],
        epochs: int,
    ) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """What `fit` was given, joined to the answers where these are remembered.

        Args:
            distiller: What is trained.
            data: `x`, `y`, `batch_size` and the other arguments of `fit`.
            epochs: Index of the epoch at which training ends.

        Returns:
            The same four.

        Raises:
            ValueError: With `teacher_answers="memory"`, if they cannot be.
        """
        x, y, batch_size, arguments = data
        self._pairing.forget()
        if self.mode == "live":
            return data
        reason = self._against(distiller, x, arguments)
        inner, indices = (x.x, x.indices) if isinstance(x, Numbered) else (x, None)
        rows: Any = None
        if reason is None:
            rows = join_arrays.row_data(inner, y, arguments)
            several = epochs - (arguments.get("initial_epoch") or 0) > 1
            reason = self._ask(rows, indices, batch_size, arguments, several)
        if not backends.agreed(reason is None):
            reason = reason or "another of the processes that train together cannot"
        if reason is not None:
            if self.mode == "memory":
                raise ValueError(
                    f'`teacher_answers="memory"` cannot be had here: {reason}. Pass "auto", which '
                    "remembers answers where it can."
                )
            return data
        self._pairing.remember(self._source())
        inner, y, weight = rows
        arguments = {k: v for k, v in arguments.items() if k != "class_weight"}
        arguments["sample_weight"] = weight
        return Joined(inner, self._source().fields), y, batch_size, arguments

    def _source(self) -> Remembered:
        if self._held is None:
            raise ValueError("Nothing is remembered.")
        return self._held

    def _against(self, distiller: hooks.Trained, x: Data, arguments: dict[str, Any]) -> str | None:
        """What speaks against remembering before anything is asked, or `None`."""
        pairing = self._pairing
        if pairing.teacher is None:
            return "there is no teacher"
        if pairing.reads_records:
            return "the answers of this teacher are read from a cache already"
        inner = x.x if isinstance(x, Numbered) else x
        if not are_arrays(inner):
            return (
                "`fit` was given no arrays, and the rows of a dataset have no numbers. Write its "
                "answers with `keras_kd.cache.write` and train from a `CachedTeacher`"
            )
        if any(np.asarray(leaf[:1]).dtype.kind not in "fiub" for leaf in keras.tree.flatten(inner)):
            return "the inputs are no numbers"
        if distiller.batch_transforms:
            return "`batch_transform` changes what the teacher is asked about"
        if arguments.get("class_weight") and arguments.get("sample_weight") is not None:
            return "`class_weight` stands beside `sample_weight`"
        if not isinstance(arguments.get("class_weight") or {}, dict):
            return "`class_weight` is no dict"
        return None

    # ----------------------------------------------------------------------- asking

    def _ask(
        self,
        rows: tuple[Tensors, Tensors | None, Tensors | None],
        indices: np.ndarray | None,
        batch_size: int | None,
        arguments: dict[str, Any],
        several: bool,
    ) -> str | None:
        """Have the answers to these rows; returns what speaks against it, or `None`."""
        x, _, _ = rows
        count = len(keras.tree.flatten(x)[0])
        split = arguments.get("validation_split")
        if (
            split
            and arguments.get("validation_data") is None
            and not self._pairing.compiled.asks_in_evaluation
        ):
            count = join_arrays.rows_trained_on(split, count)
        if not several and self._held is None and self.mode == "auto":
            return "there is one epoch"
        marks = backends.marks(self._variables())
        of = [self._read_as(), count, _marks_of(x, count), _marks_of(indices, count)]
        teacher = self._pairing.teacher
        # Of a function on the host nothing tells whether it still answers as before.
        follows = teacher is not None and teacher.compiled
        if follows and self._held is not None and self._of == of and self._marks == marks:
            return None
        self._held = None
        if not several and self.mode == "auto":
            return "there is one epoch"
        size = min(batch_size or 32, count)
        form: list[Form] = []

        def fields(batch: Tensors) -> dict[str, Any]:
            found, told = fields_of(self._answer(batch))
            form[:] = [told]
            return found

        def some(start: int, stop: int) -> Any:
            # Of one shape, so that no program is made for the last batch; who answers on the host
            # may be paid by the row.
            width = size if follows else min(stop, count) - start
            return keras.tree.map_structure(lambda leaf: _rows(leaf, start, stop, width), x)

        try:
            ask = backends.local_program(fields, self._models()) if follows else _eager(fields)
        except ValueError as error:
            return str(error)
        # What it draws is dropped with the scope, so that looking changes no training.
        with keras.StatelessScope():
            stays = self._inputs_stay(x, min(_TRIED, count))
        if not stays:
            return "`teacher_inputs` does not give the same twice"

        def asked(start: int) -> dict[str, np.ndarray]:
            try:
                return ask(some(start, start + size))
            except AnswerError as error:
                raise error.placed("the data", start) from error.__cause__

        parts = [asked(0)]
        half = (size + 1) // 2
        # The same rows beside others: nothing random, and nothing of other rows, is in an answer.
        beside = ask(some(0, half)) if follows else {}
        if not all(_alike(parts[0][name][:half], beside[name][:half]) for name in beside):
            return "the teacher does not answer a row alike in every batch"
        need = sum(field.nbytes // len(field) for field in parts[0].values()) * count
        free = free_memory()
        if self.mode == "auto" and need > SHARE * free:
            return f"the answers take {_shown(need)}, more than a tenth of the free memory"
        if need > 0.8 * free:
            return f"the answers take {_shown(need)}, and {_shown(free)} of memory are free"
        parts += [asked(start) for start in range(size, count, size)]
        found = joined_rows(parts, count)
        odd = [rows for field in found.values() if (rows := _odd_rows(field)).size]
        if odd:
            # Asked in every step, it stops the training at the batch with that row.
            return f"the teacher's answer to row {min(map(min, odd))} is NaN or infinite"
        numbers = np.arange(count) if indices is None else np.asarray(indices)[:count]
        self._held = Remembered({"indices": numbers.astype("int32"), **found}, form[0])
        self._of, self._marks = of, marks
        self._tell(count)
        return None

    def _inputs_stay(self, x: Tensors, count: int) -> bool:
        """Whether `teacher_inputs` makes the same of the same rows, and of each by itself."""
        if self._pairing.teacher_inputs is None:
            return True

        def read(rows: int) -> list[np.ndarray]:
            part = keras.tree.map_structure(lambda leaf: ops.convert_to_tensor(leaf[:rows]), x)
            return [
                ops.convert_to_numpy(leaf)
                for leaf in keras.tree.flatten(self._pairing.for_teacher(part))
            ]

        first, half = read(count), (count + 1) // 2
        return all(
            len(a) == count and _alike(a[:rows], b)
            for rows in [count] * _TRIALS + [half]
            for a, b in zip(first, read(rows))
        )

    def _answer(self, x: Tensors) -> Answer:
        """What the teacher says of a batch, as far as it is read."""
        pairing = self._pairing
        answer = pairing.ask(pairing.for_teacher(x))
        output = answer.output if pairing.reads_output else None
        return Answer(output, answer.logits, answer.tensors)

    def _models(self) -> list[Any]:
        teacher = self._pairing.teacher
        return teacher.models if teacher is not None else []

    def _variables(self) -> list[Any]:
        return [v for model in self._models() for v in model.variables]

    def _read_as(self) -> list[Any]:
        """What of the teacher is read, and how."""
        pairing, teacher = self._pairing, self._pairing.teacher
        taps = sorted({str(p.transfer.teacher) for p in pairing.placed})
        own = [id(teacher), teacher.precisions] if teacher is not None else []
        return [*own, pairing.match.teacher_units, taps, pairing.reads_output]

    def _tell(self, count: int) -> None:
        if self._told or self.mode == "memory":
            return
        self._told = True
        warnings.warn(
            f"`{self._name}` asked its teacher once about each of the {count} rows and keeps the "
            f"answers in memory ({_shown(self._source().nbytes)}); "
            '`Distiller(..., teacher_answers="live")` asks it in every step.',
            stacklevel=6,
        )

    # --------------------------------------------------------------------- watching

    def changed(self, first: bool) -> bool:
        """Whether the teacher is not the one that was asked, so that its answers are dropped.

        Args:
            first: Whether an epoch begins, so that all weights are looked at, and not one alone.
        """
        if self._pairing.remembered is None:
            return False
        if first:
            variables = self._variables()
            same = backends.marks(variables) == self._marks
            self._probe = _probed(variables)
            self._probe_marks = backends.marks(self._probe)
        else:
            same = backends.marks(self._probe) == self._probe_marks
        if same:
            return False
        self._held = None
        self._pairing.forget(for_good=True)
        warnings.warn(
            f"The weights of the teacher of `{self._name}` changed during the training. Its "
            "answers in memory are those of before, so it is asked in every step from here on. "
            'Pass `teacher_answers="live"` to do so from the first.',
            stacklevel=2,
        )
        return True


def _eager(fields: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of batches from arrays to arrays, outside of any program: its errors come out."""

    def ask(x: Tensors) -> Any:
        found = fields(keras.tree.map_structure(ops.convert_to_tensor, x))
        return keras.tree.map_structure(ops.convert_to_numpy, found)

    return ask


def _probed(variables: list[Any]) -> list[Any]:
    """The smallest of the variables, and the smallest that is trained: both are looked at often."""
    by_size: Callable[[Any], int] = lambda v: int(np.prod(v.shape))  # noqa: E731
    trained = [v for v in variables if v.trainable]
    return [min(group, key=by_size) for group in (variables, trained) if group]


def _marks_of(arrays: Tensors, count: int) -> list[Any]:
    """What tells whether arrays hold other numbers: the sum of each row, and some rows in full."""
    found: list[Any] = []
    for leaf in keras.tree.flatten(arrays) if arrays is not None else []:
        array = np.ascontiguousarray(np.asarray(leaf)[:count])
        rows = array.reshape(count, -1).view("u1")
        words = rows.shape[1] // 8 * 8
        sums = [np.ascontiguousarray(rows[:, :words]).view("uint64").sum(1)] if words else []
        if words < rows.shape[1]:
            sums.append(rows[:, words:].sum(1, dtype="uint64"))
        step = max(1, rows.nbytes // _SAMPLED)
        some = np.ascontiguousarray(rows[::step])
        found.append(
            (array.shape, str(array.dtype), zlib.crc32(np.stack(sums).tobytes()), zlib.crc32(some))
        )
    return found


def _odd_rows(field: np.ndarray) -> np.ndarray:
    """The rows that hold a number which is not finite."""
    if field.dtype.kind in "biu":
        return np.empty(0, int)
    # Types of other packages, as bfloat16, know no `isfinite` of NumPy.
    finite = np.isfinite(field if field.dtype.kind == "f" else field.astype("float32"))
    return np.flatnonzero(~finite.reshape(len(field), -1).all(axis=1))


def _rows(leaf: np.ndarray, start: int, stop: int, size: int) -> Any:
    """Some rows, and the last of them so often that there are as many as in every batch."""
    found = leaf[start:stop]
    return np.concatenate([found, np.repeat(found[-1:], size - len(found), axis=0)])


def _alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two answers are the same to the precision of float32."""
    if first.shape != second.shape:
        return False
    if first.dtype.kind != "f":
        return bool(np.array_equal(first, second))
    finite = first[np.isfinite(first)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    return bool(np.allclose(first, second, rtol=1e-5, atol=1e-5 * scale, equal_nan=True))


def _shown(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
