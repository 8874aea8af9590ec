"""Answers that exist already, as a language-model API or another program gave them, as a cache."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.cache import layout, shards, sources, writer
from keras_kd.cache.answers import AnswerSource
from keras_kd.cache.from_teacher import check_arguments
from keras_kd.cache.layout import Layout, Manifest, Output
from keras_kd.utils import checks
from keras_kd.utils.types import Data, PathLike, Tensors

_NUMBERS = 1 << 21
_POSITIVE = 1e-4
# float16 holds no more than 65504; nothing is lost below exp(-60000).
_LEAST = -60000.0
_LEAST_SHARE = 1e-9


def write_answers(
    path: PathLike,
    inputs: Data,
    *,
    logits: Tensors | None = None,
    probabilities: Tensors | None = None,
    top_k: tuple[Any, Any] | None = None,
    vocabulary: int | None = None,
    mask: np.ndarray | None = None,
    binary: bool | None = None,
    name: str = "answers",
    dtype: str = "float32",
    batch_size: int = 128,
    shard_size: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Manifest:
    """Write a cache from answers that exist already, without a teacher to ask.

    Exactly one of `logits`, `probabilities` and `top_k` is given, with one row for each row of the
    inputs; classes, or tokens, come last. All of them are looked at before the first byte is
    written. A call that was killed is continued by the same call.

    What `top_k` does not name shares evenly what is left: with `m` known classes of a token, each
    of the other `vocabulary - m` has the probability `(1 - sum of the m) / (vocabulary - m)`, and
    1e-9 where rounding leaves nothing.

    Args:
        path: Folder of the cache, or a URL that `etils.epath` reads.
        inputs: What the answers are to, as the `data` of `keras_kd.cache.write`.
        logits: Numbers `(rows, ..., classes)`, or `(rows,)` of one unit; values of a regression
            too.
        probabilities: Numbers `(rows, ..., classes)` that sum to 1 over the classes, or `(rows,)`
            of one unit. 0 becomes the smallest normal number of their dtype.
        top_k: `(indices, log_probabilities)`, both `(rows, ..., K)`: class numbers, -1 where fewer
            than K are known, and the natural logarithms of their probabilities at temperature
            1. They need not be the K most probable ones.
        vocabulary: Number of classes; needed with `top_k`, else compared.
        mask: Booleans `(rows, ...)`, one for each position: false for padding, of which nothing
            counts and nothing is looked at.
        binary: Whether units are independent (multi-label). Defaults to `None`: where there is
            one.
        name: Of the teacher, for messages and records.
        dtype: `"float32"` or `"float16"`.
        batch_size: Samples that are written at a time, for arrays.
        shard_size: As for `keras_kd.cache.write`.
        progress: As for `keras_kd.cache.write`.

    Returns:
        The manifest. The fingerprint of the teacher is a SHA-256 of the answers.

    Raises:
        ValueError: If not one kind of answers is given, their rows are not as many as those of
            the inputs, numbers are NaN, probabilities do not sum to 1, log-probabilities are
            positive or sum to more than 1, `K` is larger than the vocabulary, a class is unknown
            or named twice, the mask does not fit; or as for `keras_kd.cache.write`.
        TypeError: If answers are of another type.

    Examples:
        >>> indices, log_probabilities = ask_the_api(texts)  # (rows, tokens, 20), -1 where unknown
        >>> keras_kd.cache.write_answers(
        ...     "cache", tokens, top_k=(indices, log_probabilities), vocabulary=32_000,
        ...     mask=tokens != 0,
        ... )
        >>> distiller = keras_kd.Distiller(student, keras_kd.teachers.CachedTeacher("cache"))

    Reference:
        - [Kim and Rush, 2016](https://arxiv.org/abs/1606.07947), section 3.1 (word level)
    """
    kind, given = _one_kind(logits, probabilities, top_k)
    check_arguments(batch_size=batch_size, shard_size=shard_size, process_index=0, process_count=1)
    layout.require_dtype(dtype)
    if vocabulary is not None and (not checks.is_whole(vocabulary) or vocabulary < 1):
        raise ValueError(
            "`vocabulary` is the number of classes, a positive integer. Received: vocabulary="
            f"{vocabulary!r}."
        )
    answers = GivenAnswers(kind, given, vocabulary, mask, binary, name, dtype)
    if not isinstance(name, str) or not name:
        raise TypeError(f"`name` is the name of the teacher. Received: name={name!r}.")
    if binary is not None and not isinstance(binary, bool | np.bool_):
        raise TypeError(f"`binary` is True, False or None. Received: binary={binary!r}.")
    source = sources.source(inputs, batch_size)
    if source.count is not None and source.count != answers.count:
        raise ValueError(
            f"Each row of the inputs has one row of answers. Received: {source.count} rows of "
            f"inputs and {answers.count} rows of `{kind}`."
        )
    # So that a stream of another length is an error as well.
    source.count = source.estimate = answers.count
    answers.look()
    return writer.run(
        path,
        source,
        answers,
        precision="float32",
        views=shards.Views(None, 0, 1),
        process=(0, 1),
        progress=progress,
        shard_size=shard_size,
    )


def check_answers(
    *,
    logits: Tensors | None = None,
    probabilities: Tensors | None = None,
    top_k: tuple[Any, Any] | None = None,
    vocabulary: int | None = None,
    mask: np.ndarray | None = None,
    binary: bool | None = None,
) -> None:
    """Look at answers as `write_answers` does, and write nothing.

    Args:
        logits: As there, and the others too.
        probabilities: The same.
        top_k: The same.
        vocabulary: The same.
        mask: The same.
        binary: The same.

    Raises:
        ValueError: If a row is none that a teacher can answer.
        TypeError: If answers are of another type.
    """
    kind, given = _one_kind(logits, probabilities, top_k)
    GivenAnswers(kind, given, vocabulary, mask, binary, "answers", "float32").look()


def _one_kind(
    logits: Tensors | None, probabilities: Tensors | None, top_k: tuple[Any, Any] | None
) -> tuple[str, Any]:
    given = {"logits": logits, "probabilities": probabilities, "top_k": top_k}
    kinds = [kind for kind, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise ValueError(
            "Pass answers of one kind: `logits`, `probabilities` or `top_k`. Received: "
            f"{' and '.join(f'`{kind}`' for kind in kinds) or 'none of them'}."
        )
    return kinds[0], given[kinds[0]]


class _Known(NamedTuple):
    """Some rows of answers, checked, in double precision.

    Attributes:
        values: `(rows, ..., classes)` logits, or `(rows, ..., K)` log-probabilities.
        classes: `(rows, ..., K)` class numbers with `top_k`.
        mask: `(rows, ...)` booleans, or `None`.
    """

    values: np.ndarray
    classes: np.ndarray | None
    mask: np.ndarray | None


class GivenAnswers(AnswerSource):
    """Answers in arrays, in the form in which they are stored.

    Args:
        kind: `"logits"`, `"probabilities"` or `"top_k"`.
        given: As in `write_answers`.
        vocabulary: Number of classes, or `None`.
        mask: As in `write_answers`.
        binary: As in `write_answers`.
        name: Of the teacher.
        dtype: `"float16"` or `"float32"`.
    """

    def __init__(
        self,
        kind: str,
        given: Any,
        vocabulary: int | None,
        mask: np.ndarray | None,
        binary: bool | None,
        name: str,
        dtype: str,
    ) -> None:
        self.kind, self.name = kind, name
        self.indices: np.ndarray | None = None
        if kind == "top_k":
            self.indices, self.values = _pair(given)
            if vocabulary is None:
                raise ValueError(
                    "`top_k` names some classes of a vocabulary. Pass how many there are in all: "
                    "`vocabulary=32_000`."
                )
            classes, k = int(vocabulary), self.values.shape[-1]
            if k > classes:
                raise ValueError(
                    f"`top_k` holds {k} classes a position, and the vocabulary has {classes}. "
                    "Pass at most as many, or the number of all classes as `vocabulary`."
                )
        else:
            self.values = _numbers(given, kind)
            classes = self.values.shape[-1]
            if vocabulary not in (None, classes):
                raise ValueError(
                    f"`{kind}` has {classes} classes on its last axis. Received: vocabulary="
                    f"{vocabulary}."
                )
        if self.indices is not None and binary:
            raise ValueError(
                "`top_k` holds the probabilities of exclusive classes. Received: binary=True. Pass "
                "`probabilities` of all units."
            )
        self.binary = classes == 1 if binary is None else bool(binary)
        self.count = len(self.values)
        if self.count == 0:
            raise ValueError(f"There is nothing to cache: `{kind}` has no rows.")
        self.mask = None if mask is None else self._fitting(mask)
        shape = (*self.values.shape[1:-1], classes)
        made = {"logits": "logits", "top_k": "logits"}
        end = made.get(kind, "sigmoid" if self.binary else "softmax")
        output = Output(
            shape,
            end,
            self.binary,
            None if self.indices is None else self.values.shape[-1],
            None if self.mask is None else self.mask.shape[1:],
            self.indices is not None,
        )
        self.layout = Layout((output,), (), dtype)
        self._classes = classes
        self._digest = ""
        # Rows that are looked at together, in double precision.
        self._step = max(1, _NUMBERS // int(np.prod(self.values.shape[1:])))

    def _fitting(self, mask: np.ndarray | None) -> np.ndarray:
        found = checks.as_array(mask)
        positions = self.values.shape[:-1]
        if len(positions) < 2:
            raise ValueError(
                "`mask` tells of the positions of a sample, and these answers have one each. Leave "
                "rows out, or give them the `sample_weight` 0 in `fit`."
            )
        if found.shape != positions or found.dtype.kind not in "biuf" or np.ma.is_masked(mask):
            raise ValueError(
                f"`mask` has one boolean for each position, shape {positions}. Received: shape "
                f"{found.shape} of {found.dtype}."
            )
        if not np.isin(found, (0, 1)).all():
            odd = found[~np.isin(found, (0, 1))][0]
            raise ValueError(f"`mask` holds True and False, or 1 and 0. Received: {odd}.")
        if not found.any():
            raise ValueError(
                "`mask` is False everywhere, and nothing would count. It is True for what counts "
                "and False for padding: `~mask` turns it around."
            )
        return found.astype(bool)

    # ------------------------------------------------------------- what the writer asks

    def look(self) -> None:
        """Look at all answers, and remember by what they are known.

        Raises:
            ValueError: If a row is none that a teacher can answer.
        """
        digest = hashlib.sha256(f"{self.kind}{self.binary}{self.layout.to_json()}".encode())
        for start in range(0, self.count, self._step):
            stop = min(start + self._step, self.count)
            digest.update(self._rows(start, stop).tobytes())
        self._digest = digest.hexdigest()

    def prepare(self, x: Tensors, seeded: bool) -> np.ndarray:
        """The records of the first batch."""
        return self.records(x, 0)

    def records(self, x: Tensors, row: int) -> np.ndarray:
        """The records of a batch that begins at row `row`."""
        stop = row + len(keras.tree.flatten(x)[0])
        if stop > self.count:
            raise ValueError(
                f"The inputs have more than {self.count} rows, and there are as many rows of "
                f"`{self.kind}`."
            )
        return self._rows(row, stop)

    def fingerprint(self) -> str:
        """Identify the answers by what is stored of them."""
        return self._digest

    def _rows(self, start: int, stop: int) -> np.ndarray:
        records = np.empty(stop - start, self.layout.record)
        for row in range(start, stop, self._step):
            end = min(row + self._step, stop)
            self._fill(records[row - start : end - start], row, end)
        return records

    def _fill(self, records: np.ndarray, start: int, stop: int) -> None:
        """Write the answers of some rows into their records."""
        known = self._known(start, stop)
        if known.classes is None:
            with np.errstate(over="ignore"):
                records["logits_0"] = known.values
            held = np.isfinite(records["logits_0"])
            if not held.all():
                where = self._where(~held.all(axis=-1), start)
                held_in = self.layout.dtype
                raise ValueError(
                    f"`{self.kind}` of {where} are larger than {held_in} holds. "
                    + ('Pass dtype="float32".' if held_in == "float16" else "Scale them down.")
                )
        else:
            records["values_0"], records["classes_0"] = known.values, known.classes
        if known.mask is not None:
            records["mask_0"] = known.mask

    # -------------------------------------------------------------------------- checks

    def _known(self, start: int, stop: int) -> _Known:
        values = np.asarray(self.values[start:stop]).astype("float64")
        mask = None if self.mask is None else self.mask[start:stop]
        counts = np.ones(values.shape[:-1], bool) if mask is None else mask
        if self.indices is not None:
            found = np.asarray(self.indices[start:stop])
            # Before they are cast, which would wrap the largest to negative ones.
            self._refuse(
                counts[..., None] & (found > self._classes - 1),
                start,
                f"name a class beyond the vocabulary of {self._classes}.",
                "The indices",
            )
            self._refuse(
                counts[..., None] & (found < -1),
                start,
                "are below -1. Class numbers begin at 0, and -1 marks what is not known.",
                "The indices",
            )
            indices = np.where(counts[..., None], found.astype("int64"), -1)
            return _Known(*self._shares(indices, values, start), mask)
        values = np.where(counts[..., None], values, 0.0 if self.kind == "logits" else 0.5)
        bad = ~np.isfinite(values).all(axis=-1)
        if bad.any():
            raise ValueError(
                f"`{self.kind}` of {self._where(bad, start)} are NaN or infinite."
                + (_UNKNOWN if self.kind == "logits" else "")
            )
        if self.kind == "logits":
            if start == 0:
                self._refuse_probabilities(values, counts)
            return _Known(values, None, mask)
        return _Known(self._log(values, counts, start), None, mask)

    def _refuse_probabilities(self, values: np.ndarray, counts: np.ndarray) -> None:
        seen = values[counts]
        sums = seen.sum(axis=-1)
        if (
            values.shape[-1] > 1
            and seen.size
            and seen.min() >= 0
            and np.abs(sums - 1).max() <= 1e-3
        ):
            raise ValueError(
                "`logits` are never negative and sum to 1: they look like probabilities. Pass them "
                "as `probabilities=`."
            )

    def _log(self, p: np.ndarray, counts: np.ndarray, start: int) -> np.ndarray:
        """Logits of probabilities."""
        floats = self.values.dtype if self.values.dtype.kind == "f" else np.dtype("float32")
        info = np.finfo(floats)
        slack = 1e-3 if floats.itemsize > 2 else 1e-2
        bad = ((p < 0) | (p > 1 + slack)).any(axis=-1)
        if bad.any():
            raise ValueError(
                f"`probabilities` of {self._where(bad, start)} are below 0 or above 1. Pass logits "
                "and log-probabilities of all classes as `logits=`."
            )
        if not self.binary:
            bad = counts & (np.abs(p.sum(axis=-1) - 1) > slack)
            if bad.any():
                raise ValueError(
                    f"`probabilities` of {self._where(bad, start)} sum to "
                    f"{p.sum(axis=-1)[bad][0]:.6g}, not to 1. Normalize them, or pass "
                    "`binary=True` if units are independent."
                )
        logits = np.log(np.maximum(p, float(info.tiny)))
        if self.binary:
            logits -= np.log(np.maximum(1.0 - p, float(info.epsneg)))
        return np.where(counts[..., None], logits, 0.0)

    def _shares(
        self, indices: np.ndarray, values: np.ndarray, start: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and classes, the unknown ones with their share of what is left."""
        known = indices >= 0
        values = np.where(known, values, -np.inf)
        self._refuse(np.isnan(values), start, f"are NaN.{_UNKNOWN}")
        positive = values > _POSITIVE
        if positive.any():
            shown = values[known]
            probable = shown.size and shown.min() >= 0 and shown.max() <= 1
            self._refuse(
                positive,
                start,
                "lie between 0 and 1: they look like probabilities. Pass their logarithms, "
                "`np.log(p)`."
                if probable
                else "are positive. A logarithm of a probability is at most 0; subtract the "
                "logsumexp from logits.",
            )
        ordered = np.sort(np.where(known, indices, -1 - np.arange(indices.shape[-1])), axis=-1)
        self._refuse(np.diff(ordered, axis=-1) == 0, start, "name a class twice.", "The indices")
        values = np.minimum(values, 0.0)
        total = np.exp(values).sum(axis=-1)
        slack = 1e-3 if self.values.dtype.itemsize > 2 else 1e-2
        self._refuse(
            (total > 1 + slack)[..., None],
            start,
            f"belong to probabilities that sum to {total.max():.6g}, which is more than 1. They "
            "are not normalized: subtract the logsumexp over the vocabulary.",
        )
        every = known.sum(axis=-1) == self._classes
        short = every & (total < 1 - slack)
        self._refuse(
            short[..., None],
            start,
            f"are those of all {self._classes} classes and belong to probabilities that sum to "
            f"{total[short].min() if short.any() else 1:.6g}, not to 1. Normalize them: subtract "
            "the logsumexp.",
        )
        values = np.maximum(values, _LEAST)
        count = known.sum(axis=-1, keepdims=True)
        if known.all():
            return values, indices
        left = np.maximum(1.0 - total, 0.0)[..., None]
        others = np.maximum(self._classes - count, 1)
        share = np.log(np.maximum(left / others, _LEAST_SHARE))
        return np.where(known, values, share), np.where(known, indices, self._free(indices))

    def _free(self, indices: np.ndarray) -> np.ndarray:
        """For each place without a class another one that is not named at this position."""
        k = indices.shape[-1]
        flat = indices.reshape(-1, k)
        # Of twice as many classes at least K are free, or the vocabulary is smaller.
        size = min(self._classes, 2 * k)
        used = np.zeros((len(flat), size), bool)
        row, place = np.nonzero((flat >= 0) & (flat < size))
        used[row, flat[row, place]] = True
        free = np.argsort(used, axis=-1, kind="stable")[:, :k]
        which = np.maximum(np.cumsum(flat < 0, axis=-1) - 1, 0)
        return np.take_along_axis(free, which, axis=-1).reshape(indices.shape)

    def _refuse(
        self, bad: np.ndarray, start: int, said: str, what: str = "The log-probabilities"
    ) -> None:
        wrong = bad.any(axis=-1)
        if wrong.any():
            raise ValueError(f"{what} of {self._where(wrong, start)} {said}")

    def _where(self, bad: np.ndarray, start: int) -> str:
        """The first place that is marked, and how many rows hold one."""
        rows = bad.reshape(len(bad), -1).any(axis=1)
        first = np.argwhere(bad)[0]
        place = f"row {start + int(first[0])}"
        if len(first) > 1:
            place += f", position {', '.join(str(int(i)) for i in first[1:])}"
        return place + (f" and {int(rows.sum()) - 1} more rows" if rows.sum() > 1 else "")


_UNKNOWN = " Mark what is not known by the index -1 in `top_k`, and padding by `mask`."


def _numbers(given: Any, kind: str) -> np.ndarray:
    """Answers as an array with classes on the last axis; a file in memory stays where it is."""
    try:
        array = given if isinstance(given, np.ndarray) else checks.as_array(given)
    except ValueError as error:
        raise ValueError(
            f"`{kind}` has rows of several lengths. Pad them to one, and mark what is not known by "
            "the index -1 in `top_k`, and padding by `mask`."
        ) from error
    if np.ma.is_masked(given):
        raise ValueError(
            f"`{kind}` is a masked array, and what is masked is missing. Fill it in; mark what is "
            "not known by the index -1 in `top_k`, and padding by `mask`."
        )
    if array.dtype.name == "bfloat16":
        array = array.astype("float32")
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        raise TypeError(
            f"`{kind}` is an array of numbers, classes last. Received: {type(given).__name__} of "
            f"type {array.dtype} and shape {array.shape}."
        )
    return array[:, None] if array.ndim == 1 else array


def _pair(given: Any) -> tuple[np.ndarray, np.ndarray]:
    """Indices and log-probabilities of one shape."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise TypeError(
            "`top_k` is a pair `(indices, log_probabilities)`. Received: "
            f"{type(given).__name__} of {len(given) if hasattr(given, '__len__') else 1}."
        )
    indices, values = (_numbers(each, "top_k") for each in given)
    if indices.dtype.kind not in "iu" or values.dtype.kind not in "f":
        swapped = values.dtype.kind in "iu" and indices.dtype.kind == "f"
        raise TypeError(
            "`top_k` is `(indices, log_probabilities)`: integers and floats. Received: "
            f"{indices.dtype} and {values.dtype}." + (" Swap them." if swapped else "")
        )
    if indices.shape != values.shape:
        raise ValueError(
            "The indices and log-probabilities of `top_k` have one shape, `(rows, ..., K)`. "
            f"Received: {indices.shape} and {values.shape}."
        )
    return indices, values
