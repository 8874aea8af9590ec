"""What may cross between a client and the server, record by record; anything else is refused.

A `Packet` is all that is ever sent, whatever carries it. `DOWN` and `UP` name the records of each
kind of packet, with their dtypes and shapes; both sides check what they send and what they receive.
Nothing of a client's rows, labels or weights fits any of them. Another record needs a line here.
Imports nothing of this package.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = Any
"""A NumPy array."""


@dataclass(frozen=True)
class Packet:
    """One message.

    Attributes:
        kind: What it is: a key of `DOWN` or `UP`.
        arrays: Arrays by name.
        numbers: Numbers, lists of integers, and words of a closed list, by name.
    """

    kind: str
    arrays: Mapping[str, Array] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of arrays as `.npy` and numbers as JSON; what carries them adds its own.

        Of what may not cross, and is neither, the bytes are those of its representation.
        """
        told = {"kind": self.kind, **self.numbers}
        numbers = json.dumps(told, separators=(",", ":"), default=repr, skipkeys=True)
        return sum(_npy_bytes(a) for a in self.arrays.values()) + len(numbers.encode())


def _npy_bytes(array: Array) -> int:
    if not isinstance(array, np.ndarray):
        return len(repr(array))
    header = io.BytesIO()
    described = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(header, described)
    return len(header.getvalue()) + int(array.nbytes)


class Reply(NamedTuple):
    """What came back from a client.

    Attributes:
        node: The client, as the link calls it.
        packet: What it sent, or `None` if nothing came.
        why: Why nothing came: `"late"` (not within the time), or what was lost.
        refused: Whether something came that may not cross, which `why` tells.
    """

    node: int
    packet: Packet | None
    why: str = ""
    refused: bool = False


class Link(Protocol):
    """The server's way to its clients."""

    def nodes(self) -> list[int]:
        """The clients that can be reached now, by numbers of the link's own."""

    def exchange(self, packets: Mapping[int, Packet]) -> list[Reply]:
        """Send packets and wait for the replies.

        Args:
            packets: One for each client that is to get one.

        Returns:
            A reply of each, and replies to earlier packets that came too late.
        """


class BorderError(ValueError):
    """A packet holds what may not cross."""


class Record(NamedTuple):
    """An array that may cross.

    Attributes:
        dtype: Its dtype.
        shape: Names of sizes that both sides know; a name that they do not know is of any size.
        optional: Whether a packet may lack it.
        span: The least and the largest value, `None` for any.
    """

    dtype: str
    shape: tuple[str, ...]
    optional: bool = False
    span: tuple[int, int] | None = None


class Kind(NamedTuple):
    """What a kind of packet holds.

    Attributes:
        arrays: Its arrays.
        numbers: Types of its numbers: `"int"`, `"float"`, `"ints"`, `"word"`, `"names"`;
            `"count"`, an integer from 0 to 2**31 - 1, `"counts"`, several of them, `"flag"`, 0 or
            1, `"share"`, in [0, 1], and `"cost"`, finite and from 0 on; with a question mark where
            a packet may lack it.
    """

    arrays: dict[str, Record]
    numbers: dict[str, str]


_TOLD = {
    "told_rows": Record("int32", ("told",), optional=True),
    "told": Record("float16", ("told", "classes"), optional=True),
    "known": Record("uint8", ("classes",), optional=True, span=(0, 1)),
}
_SETTINGS = {
    "run": "int",
    "round": "int",
    "number": "int",
    "seed": "int",
    "method": "word",
    "epochs": "int",
    "batch_size": "int",
    "learning_rate": "float",
    "pretrain": "int?",
    "noise_multiplier": "float?",
    "delta": "float?",
    "max_epsilon": "float?",
}

DOWN = {
    # The names of the classes, so that a client can tell whether it has the same ones.
    "hello": Kind(
        {},
        {"run": "int", "number": "int", "outputs": "int", "public": "ints", "inputs": "ints",
         "private": "int", "names": "names?"},
    ),
    "round": Kind({"ask": Record("int32", ("queries",)), **_TOLD}, _SETTINGS),
    "finish": Kind(_TOLD, _SETTINGS),
}  # fmt: skip
UP = {
    "hello": Kind(
        {
            # Of each of its classes the place in the server's list, -1 for none.
            "order": Record("int32", ("own",)),
            "has": Record("uint8", ("own",), optional=True, span=(0, 1)),
        },
        # `names` is a checksum: two clients that name other classes can be told apart by it.
        {"number": "count", "inputs": "counts", "public": "flag", "names": "count?"},
    ),
    "answers": Kind(
        {
            "rows": Record("int32", ("queries",)),
            "answers": Record("float16", ("queries", "classes")),
        },
        {"round": "count", "epsilon": "cost?"},
    ),
    # No more answers, since they would cost more privacy than was agreed.
    "spent": Kind({}, {"round": "count", "epsilon": "cost"}),
    # Accuracies, which are left out where noise protects the answers.
    "report": Kind(
        {},
        {"round": "count", "before": "share?", "alone": "share?", "after": "share?",
         "kept": "flag?", "epsilon": "cost?"},
    ),
    # The name of an exception's class; its words, which may hold data, stay with the client.
    "failed": Kind({}, {"round": "count", "error": "word", "number": "count?"}),
}  # fmt: skip

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")


def word_of(error: BaseException) -> str:
    """The name of an exception's class, or of the nearest of its bases that has one that may cross.

    Args:
        error: What was raised.
    """
    names = [kind.__name__ for kind in type(error).__mro__]
    return next(name for name in names if _WORD.fullmatch(name))


def check(packet: Packet, allowed: Mapping[str, Kind], sizes: Mapping[str, int]) -> Packet:
    """Return a packet in which every record is one that may cross.

    Args:
        packet: The packet.
        allowed: `DOWN` or `UP`.
        sizes: Sizes of the shapes' names, as far as they are known.

    Raises:
        BorderError: If a record is not on the list, missing, or of another type or shape.
    """
    if type(packet.kind) is not str or packet.kind not in allowed:
        named = shown(packet.kind, quote="'")
        raise BorderError(
            f"A packet of kind {named} may not cross. Allowed are: {', '.join(allowed)}."
        )
    kind = allowed[packet.kind]
    found: dict[str, int] = dict(sizes)
    for name, array in packet.arrays.items():
        if name not in kind.arrays:
            raise BorderError(
                f"The array {shown(name)} may not cross in `{packet.kind}`. Allowed are: "
                f"{', '.join(kind.arrays) or 'none'}."
            )
        _check_array(packet.kind, name, array, kind.arrays[name], found)
    for name, value in packet.numbers.items():
        if name not in kind.numbers or not _is(value, kind.numbers[name].rstrip("?")):
            raise BorderError(
                f"The value {shown(name)} may not cross in `{packet.kind}` as this "
                f"{type(value).__name__}. Allowed are: "
                f"{', '.join(f'{k} ({v})' for k, v in kind.numbers.items())}."
            )
    needed = {k for k, v in kind.arrays.items() if not v.optional}
    needed |= {k for k, v in kind.numbers.items() if not v.endswith("?")}
    missing = needed - set(packet.arrays) - set(packet.numbers)
    if missing:
        raise BorderError(f"`{packet.kind}` lacks {', '.join(f'`{m}`' for m in sorted(missing))}.")
    told = set(_TOLD) & set(packet.arrays)
    if told and told != set(_TOLD):
        raise BorderError(f"`{packet.kind}` has {sorted(told)}, which come together or not at all.")
    return packet


def _check_array(kind: str, name: str, array: Array, record: Record, sizes: dict[str, int]) -> None:
    if type(array) is not np.ndarray or array.dtype != record.dtype:
        have = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise BorderError(f"`{name}` in `{kind}` is {record.dtype}. Received: {have}.")
    if array.dtype.metadata:
        raise BorderError(f"The dtype of `{name}` in `{kind}` comes with metadata.")
    wanted = tuple(sizes.get(size, size) for size in record.shape)
    if array.ndim != len(wanted) or any(
        isinstance(b, int) and a != b for a, b in zip(array.shape, wanted)
    ):
        raise BorderError(
            f"`{name}` in `{kind}` has shape {wanted}. Received: {tuple(array.shape)}."
        )
    sizes.update(zip(record.shape, array.shape))
    if record.span is not None and array.size:
        least, most = record.span
        if array.min() < least or array.max() > most:
            raise BorderError(f"`{name}` in `{kind}` holds values beyond {least} to {most}.")


def shown(name: object, quote: str = "`") -> str:
    """A name that came, in quotes, for messages that are kept and printed.

    Of a name that is no word nothing is repeated: it could hold data, or steer a terminal.

    Args:
        name: What came in place of a name.
        quote: The quotes.
    """
    if type(name) is str and _WORD.fullmatch(name):
        return f"{quote}{name}{quote}"
    return f"with a name of {len(name)} characters" if type(name) is str else "without a name"


_WHOLE = {"int": (-math.inf, math.inf), "count": (0, 2**31 - 1), "flag": (0, 1)}
_REAL = {"float": (-math.inf, math.inf), "share": (0.0, 1.0), "cost": (0.0, math.inf)}


def _is(value: Any, wanted: str) -> bool:
    # Of exactly these types: what derives from one of them could carry more.
    if wanted in _WHOLE:
        low, high = _WHOLE[wanted]
        return type(value) is int and low <= value <= high
    if wanted in _REAL:
        low, high = _REAL[wanted]
        return type(value) is float and math.isfinite(value) and low <= value <= high
    if wanted == "word":
        return type(value) is str and _WORD.fullmatch(value) is not None
    if type(value) is not list:
        return False
    if wanted == "names":
        return all(type(each) is str for each in value)
    return len(value) <= 16 and all(_is(each, wanted.removesuffix("s")) for each in value)


def problem(answers: Array, probabilities: bool, noisy: bool) -> str | None:
    """What is wrong with answers whose shape and type are right, or `None`.

    Args:
        answers: `(rows, classes)`.
        probabilities: Whether rows are to be probabilities.
        noisy: Whether noise was added, which hides what can be told of exact answers.
    """
    values = answers.astype("float64")
    if not np.isfinite(values).all():
        rows = int((~np.isfinite(values)).any(axis=-1).sum())
        return f"not finite: {rows} of {len(values)} rows hold NaN or infinity"
    if noisy:
        return None
    if probabilities:
        # Rounding to float16 moves a sum by less than this.
        off = np.abs(values.sum(axis=-1) - 1.0)
        if values.min() < -1e-3 or values.max() > 1 + 1e-3 or off.max() > 1e-2:
            return "no probabilities: they are not in [0, 1] or do not sum to 1"
    if len(values) > 1:
        spread = float(np.ptp(values, axis=0).max())
        if spread <= 1e-3 * max(1.0, float(np.abs(values).max())):
            return "constant: the same answer to every row"
    return None
