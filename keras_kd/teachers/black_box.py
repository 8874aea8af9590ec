"""A teacher that is asked on the host: a function, a file in its runtime, an estimator, an API.

`BlackBox` owns the checks of what comes back and what is made of it; where it comes from is a
function `predict(x) -> array`. A new source is a function that returns one, as `from_onnx` does.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd import backends
from keras_kd.models.fingerprint import code_of
from keras_kd.models.model_reader import Answer, like_probabilities
from keras_kd.teachers.base import AnswerError, Teacher
from keras_kd.teachers.mixtures import returned
from keras_kd.teachers.model import require_ranks
from keras_kd.utils import checks
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Tensor, Tensors

LOGITS, PROBABILITIES, VALUES = "logits", "probabilities", "values"
UNKNOWN = "unknown"
"""What a file ends in that does not say it: numbers that look like probabilities are refused."""

_FORMS = (LOGITS, PROBABILITIES, VALUES)
_SUM_TOLERANCE = 1e-3


class Told(NamedTuple):
    """What is known of one flat output.

    Attributes:
        form: `"logits"`, `"probabilities"`, `"values"` or `"unknown"`.
        shape: Shape of one row, `None` before the first answer.
        smallest: The smallest probability that the source can express; `None` takes that of the
            dtype of its answers.
        step: The distance of two neighboring probabilities where they are quantized, else 0.
    """

    form: str
    shape: tuple[int, ...] | None = None
    smallest: float | None = None
    step: float = 0.0


class BlackBox(Teacher):
    """Any Python function as teacher: an API, a rules engine, a model of another library.

    It is asked on the host, once a batch, also from within the compiled step of the distiller; with
    `keras_kd.cache.write` it is asked once for all. On TensorFlow XLA calls no host: there a step
    that asks it is compiled without XLA, which is told where `jit_compile=True` was asked for, and
    one that reads its answers from memory with it. JAX and PyTorch compile around the call.

    Probabilities become logits, `log p`, or `log p - log (1 - p)` for a single or independent
    unit. Where `p` is 0 (or `1 - p` is), the smallest probability that the source can express
    stands for it: the smallest normal number of the answer's dtype, 2.2e-308 for float64 and
    1.2e-38 for float32, 6e-8 for float16, and for `1 - p` the distance of 1 from the number
    before it; `smallest` says another one.

    Args:
        predict: `fn(x)`, from one batch as arrays of NumPy, structured like the batch, to an array
            `(batch, ..., units)` or, for one unit, `(batch,)`; floats come as Keras hands them to
            its layers, in float32. With `classes` also to a dict of one array `(batch,)` for
            each class. It must not run the backend that trains, which waits for it.
        outputs: `"logits"`; `"probabilities"`, of exclusive classes, which sum to 1 over the last
            axis, or of one unit; or `"values"`, those of a regression. A dict of these where
            `predict` returns a dict of several outputs.
        name: For messages and records. Defaults to the name of the function.
        version: What changes when the answers change. A cache of one version is not continued with
            another. `None` takes the code of `predict`, and not what it calls.
        classes: Names of the classes in the order of the outputs. They are compared with the
            columns of a data frame that `predict` returns, and with those of other teachers in an
            `Ensemble`.
        binary: Whether each unit is a yes or no of its own (multi-label), so that probabilities
            need not sum to 1. One unit always is.
        smallest: The smallest probability above 0 that `predict` can return.

    Raises:
        TypeError: If `predict` cannot be called.
        ValueError: If an argument is none of those above.

    Examples:
        >>> def rules(x):
        ...     p = np.where(x[:, 0] > 3.0, 0.9, 0.2)
        ...     return np.stack([1 - p, p], axis=-1)
        >>> teacher = BlackBox(rules, outputs="probabilities", name="rules", version="2026-11")
        >>> distiller = keras_kd.Distiller(student, teacher)

    Reference:
        - [Orekondy et al., 2019](https://arxiv.org/abs/1812.02766), section 3 (behind an API)
    """

    compiled = False

    def __init__(
        self,
        predict: Callable[[Any], Any],
        outputs: str | Mapping[str, str] = LOGITS,
        *,
        name: str | None = None,
        version: str | None = None,
        classes: Sequence[Any] | None = None,
        binary: bool = False,
        smallest: float | None = None,
    ) -> None:
        if not callable(predict):
            raise TypeError(
                "`predict` is a function from one batch to its answers. Received: predict of type "
                f"{type(predict).__name__}."
                + (" Pass `from_sklearn(estimator)`." if hasattr(predict, "predict") else "")
            )
        by_name = isinstance(outputs, Mapping)
        # Keras flattens a dict in the order of its keys.
        named = outputs if isinstance(outputs, Mapping) else {"output": outputs}
        forms = dict(sorted(named.items()))
        for form in forms.values():
            if form not in (*_FORMS, UNKNOWN):
                raise ValueError(
                    f"`outputs` is one of {', '.join(map(repr, _FORMS))}, or a dict of them by the "
                    f"names of the outputs. Received: outputs={form!r}."
                    + did_you_mean(form, _FORMS, quote="'")
                )
        if smallest is not None and not 0 < smallest < 1:
            raise ValueError(f"`smallest` is a probability. Received: smallest={smallest!r}.")
        if classes is not None and len({str(c) for c in classes}) < len(classes):
            raise ValueError(f"`classes` names a class twice. Received: classes={list(classes)}.")
        if by_name and (classes is not None or not forms):
            raise ValueError(
                "`outputs` names several outputs, and `classes` those of a single one. Received: "
                f"outputs={dict(forms)}, classes={classes}."
            )
        self.name = str(name or getattr(predict, "__name__", type(predict).__name__))
        self.version = version
        self.binary = binary
        self._predict = predict
        self._by_name = by_name
        self._classes = None if classes is None else [str(each) for each in classes]
        self.told = {key: Told(form, smallest=smallest) for key, form in forms.items()}
        # The shapes of the flat inputs, batch first, where the source knows them.
        self.reads: list[tuple[Any, ...]] = []
        # A runtime answers one batch at a time, and its steps may run in several threads.
        self._asking = threading.Lock()
        self._failed: BaseException | None = None
        # What `inspect` was answered; the next call is often for the same rows.
        self._first: tuple[list[np.ndarray], list[np.ndarray]] | None = None

    # ------------------------------------------------------------------ what is known

    def expect(self, **told: Told) -> "BlackBox":
        """Take note of what a source knows of its outputs before it is asked, by their names."""
        self.told |= told
        return self

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of the outputs, where they are known."""
        return self._classes

    @property
    def kinds(self) -> list[str]:
        """How each flat output is made; unknown before it shows how many units there are."""
        return [self._kind(told) for told in self.told.values()]

    def _kind(self, told: Told) -> str:
        if told.form == UNKNOWN or (told.form == PROBABILITIES and told.shape is None):
            return "sigmoid" if told.form == PROBABILITIES and self.binary else "unknown"
        if told.form != PROBABILITIES or told.shape is None:
            return "logits"
        return "sigmoid" if self.binary or told.shape[-1] == 1 else "softmax"

    def output_template(self) -> Any:
        """The names of the outputs, in a dict where there are several."""
        return {name: name for name in self.told} if self._by_name else "output"

    def output_shapes(self) -> list[Any] | None:
        """The shapes of the flat outputs, or `None` before the first answer."""
        shapes = [told.shape for told in self.told.values()]
        return None if None in shapes else [(None, *shape) for shape in shapes if shape is not None]

    @property
    def settled(self) -> bool:
        """Never: it is asked about rows of the data, and not about zeros in their shape."""
        return False

    def own_loss(self, output: int) -> Any:
        """That of a regression, for values."""
        told = list(self.told.values())
        return "mean_squared_error" if told[output].form == VALUES else None

    def require_logits(self, output: int) -> None:
        """Raise `ValueError` where classes would be read from the values of a regression."""
        name, told = list(self.told.items())[output]
        if told.form == VALUES:
            raise ValueError(
                f"The teacher `{self.name}` answers values, by `outputs={VALUES!r}`, and `{name}` "
                "is compared as the logits of classes. Say what it answers, 'logits' or "
                "'probabilities', or train on the loss of a regression."
            )

    def require_batch(self, x: Tensors) -> None:
        """Raise `ValueError` for single samples, where the source knows what it reads."""
        leaves = keras.tree.flatten(x)
        if len(leaves) == len(self.reads):
            require_ranks(self.name, leaves, self.reads)

    def fingerprint(self) -> str:
        """Identify the teacher by its name, what it answers, and its version or code."""
        said = [*self.described(), code_of(self._predict) if self.version is None else None]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def described(self) -> list[Any]:
        """What tells it from another teacher of the same source, in what JSON holds."""
        forms = {name: told.form for name, told in self.told.items()}
        return [self.name, self.version, forms, self._classes, self.binary]

    # ------------------------------------------------------------------------- asking

    def inspect(self, x: Tensors) -> None:
        """Ask about a concrete batch, which shows the shapes of the answers."""
        leaves = [_plain(checks.as_array(leaf)) for leaf in keras.tree.flatten(x)]
        self._first = None
        self._first = leaves, self._ask(_skeleton(x), leaves)

    def refresh(self) -> bool:
        """Forget what an earlier run was answered."""
        self._first, self._failed = None, None
        return False

    def failure(self) -> BaseException | None:
        """Take the error of a call from within a compiled step."""
        failed, self._failed = self._failed, None
        return failed

    def answer(
        self, x: Tensors, record: Mapping[str, Tensor] | None = None, units: Sequence[str] = ()
    ) -> Answer:
        """Answer one batch, by one call of `predict`.

        Raises:
            AnswerError: Outside of a compiled step, if `predict` fails or answers what it must
                not; in one the answer is NaN, and `failure` tells why.
        """
        if self.output_shapes() is None:
            try:
                self.inspect(x)
            except (TypeError, NotImplementedError) as error:
                raise ValueError(
                    f"The teacher `{self.name}` was never asked, so that a compiled step cannot "
                    "know the shape of its answers. Call `teacher.inspect(x)` on a batch before."
                ) from error
        skeleton, dtype = _skeleton(x), _dtype()
        like = [(shape[1:], dtype) for shape in self.output_shapes() or []]

        def ask(*leaves: np.ndarray) -> list[np.ndarray]:
            return self._ask(skeleton, [_plain(leaf) for leaf in leaves])

        def ask_quietly(*leaves: np.ndarray) -> list[np.ndarray]:
            try:
                if self._failed is None:
                    return ask(*leaves)
            except BaseException as error:
                # Whatever it is, Ctrl-C too: a compiled step would lose it, and `failure` tells it.
                self._failed = error
            return [np.full((len(leaves[0]), *shape), np.nan, dtype) for shape, _ in like]

        logits = backends.host_call(ask, ask_quietly, keras.tree.flatten(x), like)
        flat = [returned(z, kind) for z, kind in zip(logits, self.kinds)]
        output = keras.tree.pack_sequence_as(self.output_template(), flat)
        return Answer(output, logits, {})

    def _ask(self, skeleton: Tensors, leaves: list[np.ndarray]) -> list[np.ndarray]:
        """The logits, or values, of each flat output for one batch."""
        first, self._first = self._first, None
        if first is not None and _same(first[0], leaves):
            return first[1]
        count = len(leaves[0])
        with self._asking:
            try:
                raw = self._predict(keras.tree.pack_sequence_as(skeleton, leaves))
            except AnswerError:
                raise
            except (Exception, SystemExit) as error:
                # Whatever the user's code raises, or a service that does not answer.
                raise self._refusal(
                    f"failed on {{rows}}: {type(error).__name__}: {_shortened(error)}", count
                ) from error
        if not self._by_name:
            raw = {"output": raw}
        elif not isinstance(raw, Mapping) or not set(self.told) <= set(raw):
            found = list(raw) if isinstance(raw, Mapping) else type(raw).__name__
            raise self._refusal(
                f"answered {found} for {{rows}}, and `outputs` names {list(self.told)}", count
            )
        return [self._read(name, raw[name], count) for name in self.told]

    def _read(self, name: str, raw: object, count: int) -> np.ndarray:
        """The logits, or values, of one output, checked."""
        array = self._array(raw, count)
        where = f" in `{name}`" if self._by_name else ""
        if array.dtype.kind not in "fiub" or array.ndim == 0:
            raise self._refusal(
                f"answered no array of numbers{where} for {{rows}}, but {type(raw).__name__} of "
                f"type {array.dtype} and shape {array.shape}",
                count,
            )
        if len(array) != count:
            raise self._refusal(f"answered {len(array)} rows{where} for {{rows}}", count)
        array = array[:, None] if array.ndim == 1 else array
        told = self.told[name]
        if told.shape is not None and array.shape[1:] != told.shape:
            raise self._refusal(
                f"answered rows of shape {array.shape[1:]}{where} for {{rows}}, and it is known to "
                f"answer rows of shape {told.shape}",
                count,
            )
        if self._classes is not None and array.shape[-1] not in (len(self._classes), 1):
            raise self._refusal(
                f"answered {array.shape[-1]} units{where} for {{rows}}, and has "
                f"{len(self._classes)} classes: {self._classes}",
                count,
            )
        self._refuse_rows(~_by_row(np.isfinite(array)), f"answered NaN or infinity{where}")
        if told.form == UNKNOWN:
            seen = like_probabilities(array) if array.size else ""
            if seen:
                raise self._refusal(
                    f"answered numbers{where} for {{rows}} that {seen}, and nothing in it says "
                    "what they are. Pass `outputs='probabilities'`, or 'logits' or 'values'",
                    count,
                )
            told = told._replace(form=LOGITS)
        told = told._replace(shape=array.shape[1:])
        result = array
        if told.form == PROBABILITIES:
            result = self._log_probabilities(array, told, where)
        with np.errstate(over="ignore"):
            held = np.ascontiguousarray(result, _dtype())
        self._refuse_rows(
            ~_by_row(np.isfinite(held)),
            f"answered numbers{where} that {_dtype()} does not hold",
            ". Scale them down",
        )
        self.told[name] = told
        return held

    def _array(self, raw: object, count: int) -> np.ndarray:
        """What was answered as an array, its classes in the order of their names."""
        columns = getattr(raw, "columns", None)
        names = list(raw) if isinstance(raw, Mapping) else columns
        if self._classes is not None and names is not None:
            found = [str(each) for each in names]
            mapped = isinstance(raw, Mapping) and sorted(found) == sorted(self._classes)
            if found != self._classes and not mapped:
                raise self._refusal(
                    f"answered the classes {found} for {{rows}}, and its classes are "
                    f"{self._classes}, in this order",
                    count,
                )
        if isinstance(raw, Mapping):
            if self._classes is None:
                raise self._refusal(
                    f"answered a dict of {list(raw)} for {{rows}}. Pass `classes=`, or a dict as "
                    "`outputs` for several outputs",
                    count,
                )
            by_name = {str(key): np.asarray(value) for key, value in raw.items()}
            sizes = {each: by_name[each].shape for each in self._classes}
            if set(sizes.values()) != {(count,)}:
                raise self._refusal(
                    f"answered arrays of the shapes {sizes} for {{rows}}, and each class has one "
                    f"number a row, ({count},)",
                    count,
                )
            raw = np.stack([by_name[each] for each in self._classes], axis=-1)
        if np.ma.is_masked(raw):
            raise self._refusal("answered masked numbers for {rows}, which are missing", count)
        try:
            return checks.as_array(raw)
        except ValueError as error:
            raise self._refusal("answered rows of several lengths for {rows}", count) from error

    def _log_probabilities(self, p: np.ndarray, told: Told, where: str) -> np.ndarray:
        """Logits of probabilities, checked."""
        floats = p.dtype if p.dtype.kind == "f" else np.dtype("float32")
        info, wide = np.finfo(floats), p.astype("float64")
        units = wide.shape[-1]
        exclusive = not self.binary and units > 1
        slack = max(_SUM_TOLERANCE, told.step, float(info.eps))
        out = ~_by_row((wide >= -slack) & (wide <= 1 + slack))
        self._refuse_rows(
            out,
            f"answered numbers{where} below 0 or above 1",
            f". They are said to be probabilities: pass `outputs={LOGITS!r}` if they are logits",
        )
        if exclusive:
            slack = max(slack, units * max(told.step, float(info.eps)) / 2)
            sums = wide.sum(axis=-1)
            off = ~_by_row(np.abs(sums - 1) <= slack)
            first = int(np.argmax(off))
            self._refuse_rows(
                off,
                f"answered probabilities{where} that do not sum to 1",
                f". The first of these sums is {_first_off(sums[first], slack):.6g}. Divide each "
                "row by its sum, or pass `binary=True` if each unit is a yes or no of its own",
            )
        tiny = info.smallest_subnormal if floats.itemsize == 2 else info.tiny
        smallest = told.smallest or told.step or float(tiny)
        logits = np.log(np.maximum(wide, smallest))
        if exclusive:
            return logits
        rest = told.smallest or told.step or float(info.epsneg)
        return logits - np.log(np.maximum(1.0 - wide, rest))

    def _refuse_rows(self, wrong: np.ndarray, said: str, advice: str = "") -> None:
        """Raise `AnswerError` where rows are marked as wrong."""
        if wrong.any():
            rows = np.flatnonzero(wrong)
            many = f" ({len(rows)} of them)" if len(rows) <= rows[-1] - rows[0] else ""
            raise AnswerError(
                f"The teacher `{self.name}` {said} for {{rows}}{many}{advice}.",
                int(rows[0]),
                int(rows[-1]),
                len(wrong),
            )

    def _refusal(self, said: str, count: int) -> AnswerError:
        return AnswerError(f"The teacher `{self.name}` {said}.", 0, max(count - 1, 0), count)


def _dtype() -> str:
    """float32, or double precision where the backend computes in it."""
    return str(keras.backend.result_type("float32", keras.config.floatx()))


def _plain(leaf: object) -> np.ndarray:
    """A copy of an input as any library takes it: floats as Keras hands them to its layers.

    What comes from a tensor may be its memory, and a function that works in place would change the
    batch of the student.
    """
    array = np.asarray(leaf)
    floats = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return np.array(array, _dtype() if floats else None)


def _skeleton(x: Tensors) -> Any:
    """The structure of a batch, without its tensors."""
    return keras.tree.map_structure(lambda _: 0, x)


def _same(known: list[np.ndarray], leaves: list[np.ndarray]) -> bool:
    return len(known) == len(leaves) and all(map(np.array_equal, known, leaves))


def _first_off(sums: np.ndarray, slack: float) -> float:
    """Of the sums of one row's positions the first that is not 1."""
    flat = np.atleast_1d(sums).ravel()
    return float(flat[np.argmax(np.abs(flat - 1) > slack)])


def _by_row(good: np.ndarray) -> np.ndarray:
    """For each row whether all of it is good."""
    return good.reshape(len(good), -1).all(axis=1)


def _shortened(error: BaseException) -> str:
    """The first line of what an error says."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        # Somebody else's error that cannot say what it is.
        return "no message"
    return lines[0][:300].rstrip(".") if lines else "no message"
