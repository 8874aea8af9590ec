"""Data that come task by task, each with its test part.

A `Stream` owns the cut into tasks and checks it; a `Task` is what `Learner.fit` takes. A new kind
of stream is a classmethod that ends in `_made`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_kd.utils import checks
from keras_kd.utils.checks import require_finite
from keras_kd.utils.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One part of a stream.

    Args:
        name: What it is called in reports.
        x: Training inputs, `(samples, ...)`.
        y: Their classes, integers, `(samples,)`.
        x_test: Test inputs, or `None`.
        y_test: Their classes, or `None`.
        returning: Whether classes that an earlier task brought may come back in it.
        stream: The stream that it is a part of, or `None`.

    Attributes:
        classes: The classes of its training rows, ascending.
    """

    name: str
    x: Array = dataclasses.field(repr=False)
    y: Array = dataclasses.field(repr=False)
    x_test: Array | None = dataclasses.field(default=None, repr=False)
    y_test: Array | None = dataclasses.field(default=None, repr=False)
    returning: bool = False
    stream: Stream | None = dataclasses.field(default=None, repr=False)

    @property
    def classes(self) -> Array:
        """The classes of the training rows, ascending."""
        return np.unique(self.y)

    def __len__(self) -> int:
        """The number of training rows."""
        return len(self.y)


class Stream(Sequence[Task]):
    """Tasks in the order in which they are learned.

    Made by `by_class`, `by_domain` or `by_task`; iterating gives each `Task`.

    Args:
        tasks: The tasks.
        kind: `"class"`, `"domain"` or `"task"`.

    Examples:
        >>> stream = Stream.by_class(x, y, tasks=5, seed=0, test=(x_test, y_test))
        >>> [task.classes.tolist() for task in stream]
        [[2, 8], [4, 9], [1, 6], [3, 7], [0, 5]]
    """

    def __init__(self, tasks: Sequence[Task], kind: str) -> None:
        self.tasks = [dataclasses.replace(task, stream=self) for task in tasks]
        self.kind = kind

    @property
    def samples(self) -> int:
        """The number of training rows of all tasks."""
        return sum(map(len, self.tasks))

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        """The tasks, in order."""
        return iter(self.tasks)

    def __getitem__(self, index: Any) -> Any:
        """One task, or a list of them."""
        return self.tasks[index]

    @classmethod
    def by_class(
        cls,
        x: Array,
        y: Array,
        tasks: int | Sequence[Sequence[int]] = 5,
        seed: int | None = 0,
        test: object = None,
    ) -> Stream:
        """Cut data so that each task brings classes of its own.

        Args:
            x: Training inputs, `(samples, ...)`.
            y: Their classes, integers, `(samples,)`.
            tasks: How many tasks, of as equal numbers of classes as can be; or the classes of each
                task. Rows of classes that such a list leaves out are left out.
            seed: Of the order of the classes; `None` is ascending. One order is one sample: report
                three or more.
            test: `(x_test, y_test)`; or a share such as 0.2 of the rows of each class, which are
                then not trained on; or `None`, and no accuracy can be reported.

        Raises:
            TypeError: If data are no arrays, or `tasks` is neither.
            ValueError: If there are fewer classes than tasks, a class stands in two tasks, or data
                and labels do not fit together.
        """
        _require_seed(seed)
        x, y = _rows(x, y, "x", "y")
        known = np.unique(y)
        groups = _groups(tasks)
        if groups is not None:
            _require_apart(groups, known)
        else:
            assert isinstance(tasks, int | np.integer)
            count = int(tasks)
            if not 1 <= count <= len(known):
                raise ValueError(
                    f"{len(known)} classes cannot be cut into tasks={tasks}: each task brings one "
                    f"at least. Pass a number from 1 to {len(known)}."
                )
            order = known if seed is None else np.random.default_rng(seed).permutation(known)
            groups = [np.sort(group).tolist() for group in np.array_split(order, count)]
        (x, y), (u, v) = _with_test(x, y, test, seed)
        if v is not None and len(missing := np.setdiff1d(np.unique(v), known)):
            raise ValueError(
                f"The test data hold the classes {missing.tolist()}, which no task trains. Leave "
                "these rows out, or train on the classes."
            )
        parts = []
        for group in groups:
            rows, tests = np.isin(y, group), None if v is None else np.isin(v, group)
            parts.append((x[rows], y[rows], *((None, None) if v is None else (u[tests], v[tests]))))
        names = [f"classes {', '.join(map(str, group))}" for group in groups]
        return cls._made("class", names, parts, returning=False)

    @classmethod
    def by_domain(
        cls, x: Array, y: Array, domain: Array, test: object = None, seed: int | None = None
    ) -> Stream:
        """Cut data by where they come from; the classes are the same in every task.

        Args:
            x: Training inputs, `(samples, ...)`.
            y: Their classes, integers, `(samples,)`.
            domain: The domain of each row, `(samples,)`: numbers or strings.
            test: `(x_test, y_test, domain_test)`; or a share such as 0.2 of each task's rows; or
                `None`.
            seed: Of the order of the domains; `None` is ascending.

        Raises:
            TypeError: If data are no arrays.
            ValueError: If there is a single domain, one of the test data is never trained on, or
                data and labels do not fit together.
        """
        _require_seed(seed)
        x, y = _rows(x, y, "x", "y")
        domain = _domains(domain, len(x), "domain")
        known = np.unique(domain)
        if len(known) < 2:
            raise ValueError(
                f"`domain` holds the single value {known.tolist()[0]!r}, and a stream has two "
                "tasks or more."
            )
        share = _is_share(test)
        where: Any = None
        if test is not None and not share:
            u, v, where = _test_of(test, 3, "(x_test, y_test, domain_test)")
            u, v = _rows(u, v, "x_test", "y_test", x)
            where = _domains(where, len(u), "domain_test")
            if len(missing := np.setdiff1d(np.unique(where), known)):
                raise ValueError(
                    f"The test data hold the domains {missing.tolist()}, which no task trains."
                )
        order = known if seed is None else np.random.default_rng(seed).permutation(known)
        parts = []
        for name in order:
            rows = domain == name
            train = x[rows], y[rows]
            if where is not None:
                parts.append((*train, u[where == name], v[where == name]))
            else:
                (a, b), (c, d) = _with_test(*train, test if share else None, seed)
                parts.append((a, b, c, d))
        return cls._made("domain", [str(name) for name in order], parts, returning=True)

    @classmethod
    def by_task(
        cls,
        parts: Sequence[Any],
        test: Any = None,
        returning: bool = False,
        names: Sequence[str] | None = None,
    ) -> Stream:
        """Take tasks as they are given.

        Args:
            parts: `(x, y)` of each task.
            test: `(x_test, y_test)` of each task; or a share such as 0.2 of each task's rows; or
                `None`.
            returning: Whether a class may come back in a later task. Without it that is an error,
                since tasks that each count their classes from zero would be taken for one another.
            names: Names of the tasks. Defaults to `task 0`, `task 1` and so on.

        Raises:
            TypeError: If data are no arrays.
            ValueError: If a class comes back unannounced, shapes differ between tasks, or data and
                labels do not fit together.
        """
        parts = list(parts)
        if not parts or any(not isinstance(part, list | tuple) or len(part) != 2 for part in parts):
            raise ValueError(
                "`by_task` takes a list of `(x, y)`, one a task. Received: "
                f"{len(parts)} parts of {sorted({type(part).__name__ for part in parts})}."
            )
        share = _is_share(test)
        if test is not None and not share and not isinstance(test, list | tuple):
            raise ValueError(
                "`test` is a list of `(x_test, y_test)`, one a task, or a share such as 0.2. "
                f"Received: {type(test).__name__}."
            )
        tests = [test if share else None] * len(parts) if test is None or share else list(test)
        if len(tests) != len(parts):
            raise ValueError(
                f"There are {len(parts)} tasks and {len(tests)} test parts. Pass `(x_test, "
                "y_test)` for each task."
            )
        made: list[Any] = []
        for i, ((x, y), held) in enumerate(zip(parts, tests)):
            x, y = _rows(x, y, f"x of task {i}", f"y of task {i}", made[0][0] if made else None)
            (x, y), (u, v) = _with_test(x, y, held, 0)
            made.append((x, y, u, v))
        names = [f"task {i}" for i in range(len(made))] if names is None else [*map(str, names)]
        if len(names) != len(made):
            raise ValueError(f"There are {len(made)} tasks and {len(names)} names.")
        return cls._made("task", names, made, returning)

    @classmethod
    def _made(
        cls, kind: str, names: Sequence[str], parts: Sequence[Any], returning: bool
    ) -> Stream:
        seen: dict[int, str] = {}
        tasks = []
        for name, (x, y, u, v) in zip(names, parts):
            if not len(y):
                raise ValueError(f"The task `{name}` has no training rows.")
            task = Task(name, x, y, u, v, returning)
            for label in task.classes.tolist():
                if label in seen and not returning:
                    raise ValueError(
                        f"Class {label} of `{name}` was in `{seen[label]}` before. If it is the "
                        "same class that comes back, pass `returning=True`; if each task counts "
                        "its classes from zero, give them numbers of their own."
                    )
                seen.setdefault(label, name)
            if v is not None and not np.isin(v, list(seen)).all():
                extra = np.setdiff1d(v, list(seen)).tolist()
                raise ValueError(
                    f"The test part of `{name}` holds the classes {extra}, which neither it nor an "
                    "earlier task trains."
                )
            tasks.append(task)
        return cls(tasks, kind)


def held_out(y: Array, share: float, seed: int | None) -> tuple[Array, Array]:
    """Numbers of the rows that stay and of those held out, each class in proportion.

    Args:
        y: Classes, `(samples,)`.
        share: Of each class, in (0, 1); one row at least of a class that has two.
        seed: Of the choice.
    """
    rng = np.random.default_rng(0 if seed is None else seed)
    out = np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        out[rows[:count]] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def _with_test(x: Array, y: Array, test: object, seed: int | None) -> tuple[Any, Any]:
    if test is None:
        return (x, y), (None, None)
    if _is_share(test):
        share = float(test)  # type: ignore[arg-type]
        if not 0 < share < 1:
            raise ValueError(f"A share of test rows lies between 0 and 1. Received: test={test!r}.")
        stay, out = held_out(y, share, seed)
        return (x[stay], y[stay]), (x[out], y[out])
    u, v = _test_of(test, 2, "(x_test, y_test)")
    return (x, y), _rows(u, v, "x_test", "y_test", x)


def _test_of(test: object, count: int, form: str) -> Any:
    if not isinstance(test, list | tuple) or len(test) != count:
        said = f"{len(test)} parts" if isinstance(test, list | tuple) else type(test).__name__
        raise ValueError(f"`test` is `{form}`, or a share such as 0.2. Received: {said}.")
    return test


def rows_of(x: object, y: object) -> tuple[Array, Array]:
    """Inputs and classes as arrays, checked.

    Args:
        x: Inputs, `(samples, ...)`.
        y: Classes, integers, `(samples,)` or `(samples, 1)`.

    Raises:
        TypeError: If they are no arrays.
        ValueError: If they do not fit together.
    """
    return _rows(x, y, "x", "y")


def _rows(
    x: Array, y: Array, x_name: str, y_name: str, like: Array | None = None
) -> tuple[Array, Array]:
    if isinstance(x, dict) or not hasattr(x, "__array__") or not hasattr(y, "__array__"):
        raise TypeError(
            f"`{x_name}` and `{y_name}` are arrays. Received: {type(x).__name__} and "
            f"{type(y).__name__}. A stream is cut by rows, so that datasets and dicts of inputs "
            "have to be turned into one array each."
        )
    x, y = checks.as_array(x), checks.as_array(y)
    if x.ndim < 2 or x.dtype.kind not in "biuf":
        raise ValueError(
            f"`{x_name}` has shape {x.shape} and dtype {x.dtype}, and rows of numbers, "
            "`(samples, ...)`, are needed."
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ValueError(
            f"`{y_name}` holds one class number a row, `(samples,)`. Received: shape {y.shape}. Of "
            "one-hot rows take `y.argmax(-1)`."
        )
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"`{x_name}` has {len(x)} rows and `{y_name}` {len(y)}; both have the same number, one "
            "at least."
        )
    if y.dtype.kind not in "iu" and not (y.dtype.kind == "f" and (y == np.round(y)).all()):
        raise ValueError(
            f"`{y_name}` holds class numbers, which are integers. Received: dtype {y.dtype}."
        )
    y = y.astype("int64")
    if y.min() < 0:
        raise ValueError(f"`{y_name}` holds the class {int(y.min())}, and classes count from zero.")
    require_finite(x, x_name)
    if like is not None and x.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"The rows of `{x_name}` have shape {x.shape[1:]}, and those before {like.shape[1:]}."
        )
    return x, y


def _domains(domain: Array, count: int, name: str) -> Array:
    domain = checks.as_array(domain)
    if domain.ndim != 1 or len(domain) != count:
        raise ValueError(
            f"`{name}` tells the domain of each of the {count} rows. Received: shape "
            f"{domain.shape}."
        )
    if domain.dtype.kind == "O" and all(isinstance(each, str) for each in domain.tolist()):
        domain = domain.astype(str)
    if domain.dtype.kind not in "biufUS":
        raise TypeError(f"`{name}` holds numbers or strings. Received: dtype {domain.dtype}.")
    if domain.dtype.kind == "f":
        require_finite(domain, name)
        if (domain != np.round(domain)).any():
            raise ValueError(
                f"`{name}` holds {len(np.unique(domain))} different values between whole numbers, "
                "each of which would be a task of its own. Cut it into parts first, as with "
                "`np.digitize`."
            )
    return domain


def _is_share(test: object) -> bool:
    return isinstance(test, float | np.floating)


def _require_seed(seed: object) -> None:
    if seed is not None:
        checks.whole("seed", seed, 0)


def _groups(tasks: object) -> list[list[int]] | None:
    """The classes of each task where they are listed, `None` where tasks are counted."""
    if checks.is_whole(tasks):
        return None
    listed = tasks.tolist() if isinstance(tasks, np.ndarray) else tasks
    groups: list[Any] = list(listed) if isinstance(listed, list | tuple) else [None]
    groups = [group.tolist() if isinstance(group, np.ndarray) else group for group in groups]
    if not all(
        isinstance(group, list | tuple) and all(map(checks.is_whole, group)) for group in groups
    ):
        raise TypeError(
            "`tasks` is how many there are, or the classes of each, as `[[0, 1], [2, 3]]`. "
            f"Received: tasks={tasks!r}."
        )
    return [[int(label) for label in group] for group in groups]


def _require_apart(groups: Sequence[Sequence[int]], known: Array) -> None:
    flat = [label for group in groups for label in group]
    twice = sorted({label for label in flat if flat.count(label) > 1})
    if twice:
        raise ValueError(
            f"The classes {twice} stand in more than one of the tasks {groups}. Each class belongs "
            "to one task; for data whose classes come back use `by_domain` or `by_task`."
        )
    unknown = sorted(set(flat) - set(known.tolist()))
    if unknown or not groups or not all(groups):
        raise ValueError(
            f"`tasks` names the classes of each task, one at least. The data have no {unknown}; "
            f"their classes are {known.tolist()}."
        )
