"""A few rows of the past, chosen by a policy, within so many samples or bytes.

`Slots` decides by labels alone which row takes which place, so that a task's replay can be planned
before any model runs. `Memory` holds the rows. A new policy that looks at one row after the other
is a branch of `Slots.place`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_kd.lifelong.streams import rows_of
from keras_kd.utils import archives, checks, files
from keras_kd.utils.types import Array

POLICIES = ("reservoir", "balanced", "herding")


class Slots:
    """Which slot of the memory each new row takes.

    Args:
        policy: `"reservoir"` or `"balanced"`.
        capacity: Number of slots.
        rng: What is drawn from.

    Attributes:
        labels: The label in each slot that is taken.
        seen: How many rows came by.
        seen_of: How many of each class.
        full: Classes that were once the largest, which "balanced" no longer lets grow.

    Reference:
        - [Vitter, 1985](https://doi.org/10.1145/3147.3165), algorithm R
        - [Chrysakis and Moens, 2020](https://proceedings.mlr.press/v119/chrysakis20a.html),
          algorithm 1
    """

    def __init__(self, policy: str, capacity: int, rng: np.random.Generator) -> None:
        self.policy = policy
        self.capacity = capacity
        self.rng = rng
        self.labels: list[int] = []
        self.seen = 0
        self.seen_of: dict[int, int] = {}
        self.full: set[int] = set()

    def place(self, label: int) -> int:
        """The slot that a row takes, or -1 where it is not kept.

        Args:
            label: Its class.
        """
        before = self.seen
        self.seen += 1
        self.seen_of[label] = self.seen_of.get(label, 0) + 1
        if len(self.labels) < self.capacity:
            self.labels.append(label)
            slot = len(self.labels) - 1
        elif self.policy == "balanced":
            slot = self._balanced(label)
        else:
            # Inclusive: the row is one of `before + 1`, each of which is as likely to be kept.
            slot = int(self.rng.integers(0, before, endpoint=True))
        if not 0 <= slot < self.capacity:
            return -1
        self.labels[slot] = label
        if self.policy == "balanced" and len(self.labels) == self.capacity:
            self.full |= set(self._largest())
        return slot

    def _largest(self) -> list[int]:
        values, counts = np.unique(self.labels, return_counts=True)
        return [int(value) for value in values[counts == counts.max()]]

    def _balanced(self, label: int) -> int:
        labels = np.asarray(self.labels)
        if label not in self.full:
            crowded = self._largest()
            chosen = crowded[int(self.rng.integers(len(crowded)))]
            return int(self.rng.choice(np.flatnonzero(labels == chosen)))
        mine = np.flatnonzero(labels == label)
        if not len(mine) or self.rng.random() > len(mine) / self.seen_of[label]:
            return -1
        return int(self.rng.choice(mine))

    def shrink(self, capacity: int) -> Array:
        """Numbers of the slots that stay where fewer are allowed.

        Args:
            capacity: Number of slots from now on.
        """
        stay = np.arange(len(self.labels))
        if self.policy == "balanced":
            while len(stay) > capacity:
                labels = np.asarray(self.labels)[stay]
                values, counts = np.unique(labels, return_counts=True)
                largest = np.flatnonzero(labels == values[counts.argmax()])
                stay = np.delete(stay, self.rng.choice(largest))
        elif len(stay) > capacity:
            # A part of a reservoir by chance is a reservoir.
            stay = np.sort(self.rng.permutation(stay)[:capacity])
        self.capacity = capacity
        self.labels = [self.labels[i] for i in stay]
        return stay

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, as plain values."""
        return {
            "capacity": self.capacity,
            "labels": self.labels,
            "seen": self.seen,
            "seen_of": sorted(self.seen_of.items()),
            "full": sorted(self.full),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.capacity, self.seen = state["capacity"], state["seen"]
        self.labels = list(state["labels"])
        self.seen_of = {int(label): count for label, count in state["seen_of"]}
        self.full = set(state["full"])
        self.rng.bit_generator.state = state["rng"]


def herding(features: Array, count: int) -> Array:
    """Row numbers whose mean stays nearest to that of all rows, the best first.

    Features are L2-normalized; each step takes the row that brings the running mean of those taken
    nearest to the mean of all: `argmin_i ||mu - (f_i + sum of those taken) / k||`. The first `m` of
    a longer choice are the choice of `m`.

    Args:
        features: `(samples, width)`.
        count: How many; all rows where there are fewer.

    Returns:
        Integers, `(count,)`.

    Raises:
        TypeError: If `count` is no whole number.
        ValueError: If it is negative, or features are no rows of finite numbers.

    Reference:
        - [Rebuffi et al., 2017](https://arxiv.org/abs/1611.07725), algorithm 4
    """
    checks.whole("count", count, 0)
    features = _features_of(features)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    features = features / np.maximum(norms, 1e-12)
    mean, taken = features.mean(0), np.zeros(features.shape[1])
    chosen: list[int] = []
    free = np.ones(len(features), bool)
    for k in range(1, min(count, len(features)) + 1):
        distances = np.linalg.norm(mean - (taken + features) / k, axis=1)
        best = int(np.where(free, distances, np.inf).argmin())
        free[best] = False
        taken += features[best]
        chosen.append(best)
    return np.array(chosen, "int64")


class Memory:
    """Rows of earlier tasks, for replay.

    Args:
        samples: How many rows it holds at most. Either this or `bytes`.
        bytes: How many bytes of rows, labels and logits it holds at most. Logits take 4 bytes a
            class that is known, so that fewer rows fit as classes come.
        policy: `"reservoir"`: each row seen so far is as likely to be in it. `"balanced"`: classes
            have as equal shares as they can, whatever their order. `"herding"`: of each class the
            rows whose mean feature is nearest to that of the class, chosen when a task ends.
        seed: Of what is drawn.

    Attributes:
        x: Its rows, `(held, ...)`, or `None` before the first.
        y: Their classes, `(held,)`, int64.
        logits: What a model said of them, `(held, classes)`, float32, or `None`.
        known: How many columns of `logits` were there when a row came, `(held,)`, int32; the others
            hold zeros that mean nothing.

    Raises:
        TypeError: If a number is none.
        ValueError: If a number is not positive, both or neither are given, or the policy is
            unknown.

    Examples:
        >>> memory = Memory(200, policy="reservoir", seed=0)
        >>> memory.add(x, y)
        >>> len(memory), memory.x.shape
        (200, (200, 28, 28, 1))

    Reference:
        - [Rolnick et al., 2019](https://arxiv.org/abs/1811.11682)
    """

    def __init__(
        self,
        samples: int | None = None,
        *,
        bytes: int | None = None,
        policy: str = "reservoir",
        seed: int = 0,
    ) -> None:
        if (samples is None) == (bytes is None):
            raise ValueError(
                "A memory is bounded by `samples` or by `bytes`. Received: "
                f"samples={samples!r}, bytes={bytes!r}."
            )
        self.samples = None if samples is None else checks.whole("samples", samples)
        self.bytes = None if bytes is None else checks.whole("bytes", bytes)
        checks.one_of("policy", policy, POLICIES)
        self.policy, self.seed = policy, checks.whole("seed", seed, 0)
        self.x: Array = None
        self.y: Array = np.zeros(0, "int64")
        self.logits: Array = None
        self.known: Array = np.zeros(0, "int32")
        self.slots: Slots | None = None
        # Of herding: which call of `add` brought a row, since each keeps its order.
        self._group = np.zeros(0, "int64")
        self._groups = 0

    def __len__(self) -> int:
        """The number of rows that it holds."""
        return len(self.y)

    def __repr__(self) -> str:
        """Its bound, policy and number of rows."""
        bound = f"{self.samples}" if self.samples is not None else f"bytes={self.bytes}"
        return f"Memory({bound}, policy={self.policy!r}) holding {len(self)} rows"

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, labels and logits that it holds."""
        if self.x is None:
            return 0
        logits = 0 if self.logits is None else self.logits.nbytes + self.known.nbytes
        return int(self.x.nbytes + self.y.nbytes + logits)

    def capacity(self, row: Array, columns: int | None = None) -> int:
        """How many rows fit.

        Args:
            row: One of them, as it is stored.
            columns: Number of logits a row, or `None` where none are stored.

        Raises:
            ValueError: If not one row fits.
        """
        if self.samples is not None:
            return int(self.samples)
        each = np.asarray(row).nbytes + 8 + (0 if columns is None else 4 * columns + 4)
        count = int(self.bytes or 0) // each
        if not count:
            raise ValueError(
                f"A row takes {each} bytes, and the memory is bounded by bytes={self.bytes}. Allow "
                f"{each} or more."
            )
        return count

    def require_fits(self, x: Array) -> None:
        """Raise `ValueError` for rows of another shape or type than those that it holds.

        Args:
            x: Rows, `(samples, ...)`.
        """
        if self.x is not None and (x.shape[1:] != self.x.shape[1:] or x.dtype != self.x.dtype):
            raise ValueError(
                f"The memory holds rows of shape {self.x.shape[1:]} and dtype {self.x.dtype}, and "
                f"these have shape {x.shape[1:]} and dtype {x.dtype}. Give all tasks one form, or "
                "make a new memory."
            )

    def begin(self, row: Array, columns: int | None = None) -> Slots:
        """Make room for rows of this form, and return what places them.

        Args:
            row: One of them.
            columns: Number of logits a row from now on, or `None`.
        """
        capacity = self.capacity(row, columns)
        if self.slots is None:
            # Herding draws nothing; its rows are placed by `add`.
            self.slots = Slots(self.policy, capacity, np.random.default_rng(self.seed))
        if self.policy == "herding":
            self.slots.capacity = capacity
            self._keep(self._truncated(capacity))
        elif capacity < len(self):
            self._keep(self.slots.shrink(capacity))
        else:
            self.slots.capacity = capacity
        return self.slots

    def add(
        self, x: Array, y: Array, logits: Array | None = None, *, features: Array | None = None
    ) -> None:
        """Offer rows to the memory, which keeps some of them.

        Args:
            x: Rows, `(samples, ...)`.
            y: Their classes, integers, `(samples,)`.
            logits: What a model says of them, `(samples, classes known)`; rows that came before
                and had fewer get zeros there, which `known` tells apart. Either all rows have
                logits, or none.
            features: What herding compares, `(samples, width)`. Defaults to the rows themselves;
                other policies read none.

        Raises:
            TypeError: If they are no arrays.
            ValueError: If they do not fit together, or not what is held.
        """
        x, y = rows_of(x, y)
        self.require_fits(x)
        logits = self._logits_of(logits, len(x))
        columns = None if logits is None else logits.shape[1]
        if self.policy == "herding":
            features = _features_of(x if features is None else features)
            if len(features) != len(x):
                raise ValueError(f"There are {len(x)} rows and {len(features)} rows of features.")
        slots = self.begin(x[0], columns)
        if self.policy == "herding":
            self._herd(x, y, logits, features)
            return
        placed = [(slots.place(int(label)), i) for i, label in enumerate(y)]
        # A later row of one call may take the slot of an earlier one.
        last = {slot: i for slot, i in placed if slot >= 0}
        self.put(np.array([*last], "int64"), *(_at(a, [*last.values()]) for a in (x, y, logits)))

    def _logits_of(self, logits: Array, count: int) -> Array:
        if len(self) and (logits is None) != (self.logits is None):
            raise ValueError(
                "Either all rows of a memory have logits or none. It holds rows "
                f"{'without' if self.logits is None else 'with'} logits."
            )
        if logits is None:
            return None
        logits = np.asarray(logits, "float32")
        held = 0 if self.logits is None else self.logits.shape[1]
        if logits.ndim != 2 or len(logits) != count or logits.shape[1] < held:
            raise ValueError(
                f"`logits` has shape ({count}, classes), and classes never become fewer; {held} "
                f"are known. Received: shape {logits.shape}."
            )
        checks.require_finite(logits, "logits")
        return logits

    def put(self, slots: Array, x: Array, y: Array, logits: Array | None = None) -> None:
        """Write rows into slots, new ones at the end.

        Args:
            slots: Their places, each once, `(samples,)`.
            x: Rows.
            y: Classes.
            logits: Logits, or `None`.
        """
        size = max(int(slots.max()) + 1 if len(slots) else 0, len(self))
        if self.x is None:
            self.x = np.zeros((0, *x.shape[1:]), x.dtype)
        self.x, self.y = _grown(self.x, size), _grown(self.y, size)
        self.known = _grown(self.known, size)
        self.x[slots], self.y[slots] = x, y
        if logits is not None:
            width = logits.shape[1]
            held = self.logits if self.logits is not None else np.zeros((0, width), "float32")
            self.logits = np.pad(_grown(held, size), ((0, 0), (0, width - held.shape[1])))
            self.logits[slots] = logits
            self.known[slots] = width

    def replace(self, x: Array, y: Array, logits: Array, known: Array) -> None:
        """Hold these rows, slot by slot, in place of those that it held.

        Args:
            x: Rows.
            y: Classes.
            logits: Logits, or `None`.
            known: How many columns of them were known, `(samples,)`.
        """
        self.x, self.y = x, y.astype("int64")
        self.logits = None if logits is None else logits.astype("float32")
        self.known = (np.zeros(len(y)) if logits is None else known).astype("int32")

    def _herd(self, x: Array, y: Array, logits: Array, features: Array) -> None:
        capacity = self.slots.capacity if self.slots is not None else 0
        labels = np.unique(y)
        new = {int(label): self._groups + i for i, label in enumerate(labels)}
        self._groups += len(labels)
        # Of each new group as many as could ever stay; its quota cuts it below.
        for label, group in new.items():
            rows = np.flatnonzero(y == label)
            rows = rows[herding(features[rows], capacity)]
            places = np.arange(len(self), len(self) + len(rows))
            self._group = np.concatenate([self._group, np.full(len(rows), group)])
            self.put(places, *(_at(a, rows) for a in (x, y, logits)))
        self._keep(self._truncated(capacity))

    def _truncated(self, capacity: int) -> Array:
        """Numbers of the rows within the quotas: equal ones a class, and in it a group."""
        quotas = _quotas(capacity, [int(label) for label in dict.fromkeys(self.y.tolist())])
        stay: list[int] = []
        for label, quota in quotas.items():
            mine = np.flatnonzero(self.y == label)
            groups = [int(group) for group in dict.fromkeys(self._group[mine].tolist())]
            for group, share in _quotas(quota, groups).items():
                stay.extend(mine[self._group[mine] == group][:share].tolist())
        return np.array(stay, "int64")

    def _keep(self, rows: Array) -> None:
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return
        self.x, self.y, self.known = self.x[rows], self.y[rows], self.known[rows]
        self.logits = None if self.logits is None else self.logits[rows]
        if self.policy == "herding":
            self._group = self._group[rows]

    def spread(self, positions: Sequence[int], columns: int) -> None:
        """Move the logits to the columns of a head that has grown.

        Args:
            positions: The new column of each one that there was.
            columns: How many there are now.
        """
        if self.logits is None:
            return
        wider = np.zeros((len(self), columns), "float32")
        wider[:, list(positions)] = self.logits
        self.logits = wider

    # ---------------------------------------------------------------------- files

    def settings(self) -> dict[str, Any]:
        """Its bound, policy and seed, as plain values."""
        return {
            "samples": self.samples,
            "bytes": self.bytes,
            "policy": self.policy,
            "seed": self.seed,
        }

    def state(self) -> dict[str, Array]:
        """All that it holds, as arrays by name."""
        arrays = {
            "about": np.array(
                json.dumps(
                    {
                        **self.settings(),
                        "groups": self._groups,
                        "slots": None if self.slots is None else self.slots.state(),
                    }
                )
            ),
            "y": self.y,
            "known": self.known,
            "group": self._group,
        }
        if self.x is not None:
            arrays["x"] = self.x
        if self.logits is not None:
            arrays["logits"] = self.logits
        return arrays

    def load_state(self, arrays: dict[str, Array]) -> None:
        """Hold what a `state` holds.

        Args:
            arrays: What `state` returned.
        """
        about = json.loads(str(arrays["about"]))
        self.x, self.logits = arrays.get("x"), arrays.get("logits")
        self.y, self.known, self._group = arrays["y"], arrays["known"], arrays["group"]
        self._groups = about["groups"]
        self.slots = None
        if about["slots"] is not None:
            self.slots = Slots(self.policy, 0, np.random.default_rng(self.seed))
            self.slots.load(about["slots"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a `.npz` file, whole or not at all.

        Args:
            path: The file.
        """
        with files.replacing(path) as file:
            np.savez(file, **self.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Memory:
        """Read what `save` wrote; it goes on as if it had never been away.

        Args:
            path: The file.

        Raises:
            ValueError: If it is no such file.
        """
        arrays = archives.arrays(path)
        try:
            about = json.loads(str(arrays["about"]))
            memory = cls(
                about["samples"], bytes=about["bytes"], policy=about["policy"], seed=about["seed"]
            )
            memory.load_state(arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{os.fspath(path)}` is no file of `Memory.save`: {error}. Pass one that it wrote."
            ) from error
        return memory


def _features_of(features: Array) -> Array:
    """Rows of finite numbers, float64 `(samples, width)`."""
    found = np.asarray(features)
    if found.dtype.kind not in "biuf" or found.ndim < 2 or not len(found):
        raise ValueError(
            f"`features` holds rows of numbers, `(samples, width)`. Received: shape {found.shape}, "
            f"dtype {found.dtype}."
        )
    checks.require_finite(found, "features")
    return found.reshape(len(found), -1).astype("float64")


def _at(array: Array, rows: Array) -> Array:
    return None if array is None else array[np.asarray(rows, "int64")]


def _grown(array: Array, size: int) -> Array:
    more = np.zeros((size - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, more])


def _quotas(capacity: int, names: Sequence[int]) -> dict[int, int]:
    """Equal shares of a number, the first ones larger by one where it does not divide."""
    if not names:
        return {}
    share, rest = divmod(capacity, len(names))
    return {name: share + (i < rest) for i, name in enumerate(names)}
