"""Trains one model on task after task, and can be killed at any moment.

`Learner.fit` is one task: the head grows, a `Plan` says what each step reads, a `Lesson` is
trained, the method corrects the head and fills the memory, and all test parts are measured. What is
true between two tasks lies in one file, which is written under another name and renamed; within a
task `ResumableBackup` keeps the step. Everything else is made anew from these two and the program.
"""

from __future__ import annotations

import json
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import keras
import numpy as np

from keras_kd import backends
from keras_kd.callbacks.resume import ResumableBackup
from keras_kd.lifelong.batches import AtTheEnd, Batches, Epochs, Plan, Pool, held_out, reading
from keras_kd.lifelong.heads import GrowingHead, carried, frozen_copy
from keras_kd.lifelong.lesson import Lesson
from keras_kd.lifelong.measuring import accuracies
from keras_kd.lifelong.memory import Memory
from keras_kd.lifelong.method import Ending, Method
from keras_kd.lifelong.report import Report
from keras_kd.lifelong.requirements import (
    fresh,
    has_shape,
    known_classes,
    require_loss,
    rows_to_train,
)
from keras_kd.lifelong.state import State, plain_value
from keras_kd.lifelong.streams import Task
from keras_kd.utils import checks
from keras_kd.utils.types import Array, Losses, StepOptions

if TYPE_CHECKING:
    import os


_COMPILE = ("run_eagerly", "jit_compile", "steps_per_execution", "auto_scale_loss")


class Learner:
    """Trains a model on a stream of tasks without losing what it knows.

    Args:
        model: A Functional or Sequential `keras.Model` that ends in a Dense layer without an
            activation. Its layers are trained where they are; the Dense layer is replaced by one
            with a column for each class that came so far. Columns that the given layer has for
            classes from 0 on give these their first values.
        method: What keeps the knowledge, such as `DarkReplay()`; an object, not a class.
        memory: A new `Memory`, for methods that replay. Others read none.
        folder: Where the state goes. A program that was killed is run again, and ends with the same
            weights: finished tasks are passed over, the one that was under way goes on at its
            step. `None` keeps nothing on disk.
        classes: Classes that the columns of the model's head stand for already, where it was
            trained before.
        seed: Of the order of the rows, of what is replayed, and of the first values of columns.
        save_freq: Batches between two backups within a task, or `"epoch"`.

    Attributes:
        classes: The class of each column of `model`, ascending. As soon as all classes from 0 on
            are known, `argmax` is the class.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the model's head cannot grow, or the method needs a memory and has none.

    Examples:
        >>> stream = Stream.by_class(x, y, tasks=5, seed=0, test=(x_test, y_test))
        >>> learner = Learner(model, method=DarkReplay(), memory=Memory(200), folder="runs/stream")
        >>> learner.compile("sgd", metrics=["accuracy"])
        >>> for task in stream:
        ...     history = learner.fit(task, epochs=1, batch_size=10)
        >>> print(learner.report().table())
        >>> learner.model.save("student.keras")
    """

    def __init__(
        self,
        model: keras.Model,
        method: Method,
        memory: Memory | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        classes: Sequence[int] | None = None,
        seed: int = 0,
        save_freq: int | str = 500,
    ) -> None:
        if not isinstance(method, Method):
            hint = " Pass an instance, not the class." if isinstance(method, type) else ""
            raise TypeError(
                f"`method` is a method of `keras_kd.lifelong`, as `DarkReplay()`. Received: "
                f"{method!r}.{hint}"
            )
        if memory is not None and not isinstance(memory, Memory):
            raise TypeError(f"`memory` is a `Memory`. Received: {memory!r}.")
        if method.uses_memory and memory is None:
            raise ValueError(
                f"`{method.name}` replays rows of a memory. Pass `memory=keras_kd.lifelong.Memory("
                "200)`."
            )
        if memory is not None and len(memory):
            raise ValueError(
                f"The memory holds {len(memory)} rows already, perhaps of another learner. Pass a "
                "new one."
            )
        if memory is not None and not method.uses_memory:
            warnings.warn(
                f"`{method.name}` reads no memory: the one that was passed stays empty.",
                stacklevel=2,
            )
            memory = None
        inputs = getattr(model, "inputs", None) or []
        if len(inputs) > 1:
            raise ValueError(
                f"The model `{model.name}` has {len(inputs)} inputs, and the rows of a stream are "
                "one array. Give it one input, and take it apart inside."
            )
        self._given = known_classes(classes, method)
        self.method, self.memory = method, memory
        self.seed = checks.whole("seed", seed, 0)
        self.head = GrowingHead(model, method.cosine, self._given, self.seed)
        self._answering = model
        self._state = State(folder)
        self._backup_every = save_freq
        self._backup(folder if folder is not None else "")
        self._tasks: list[Task] = []
        self._compiled: dict[str, Any] | None = None
        self._optimizer: list[Array] | None = None
        self._per_row: Any = None
        self._rows: list[dict[str, Any]] = []
        self._loaded = False
        self._continues: dict[str, Any] | None = None
        self._trained: int | None = None

    @property
    def model(self) -> Any:
        """The plain `keras.Model` that answers: of Keras's own layers but for those given."""
        return self._answering

    @property
    def classes(self) -> Array:
        """The class of each column of `model`."""
        return self.head.classes.copy()

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "sgd",
        loss: Losses = None,
        metrics: Sequence[object] | Mapping[str, object] | None = None,
        **kwargs: Unpack[StepOptions],
    ) -> None:
        """Configure the training of every task.

        Args:
            optimizer: As in `keras.Model.compile`. Its state goes on from task to task; columns
                that come begin without any.
            loss: `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`, which is the
                default, or `fn(columns, logits)` with one value a row.
            metrics: As in `keras.Model.compile`, of the rows of the task.
            **kwargs: `run_eagerly`, `jit_compile`, `steps_per_execution`, `auto_scale_loss`.

        Raises:
            ValueError: If the loss takes no integers or no logits, or an argument is unknown.
        """
        unknown = set(kwargs) - set(_COMPILE)
        if unknown:
            raise ValueError(
                f"`compile` takes {', '.join(map(repr, _COMPILE))} beside optimizer, loss and "
                f"metrics. Received: {sorted(unknown)}."
            )
        if loss is None:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self._compiled = {
            "optimizer": keras.optimizers.get(optimizer),
            "loss": require_loss(loss),
            "metrics": metrics,
            **kwargs,
        }

    # ------------------------------------------------------------------------ fit

    def fit(
        self,
        task: Task,
        epochs: int = 1,
        batch_size: int = 32,
        *,
        verbose: int | str = "auto",
        callbacks: Sequence[Any] | None = None,
        validation_split: float = 0.0,
        validation_data: tuple[Array, Array] | None = None,
    ) -> Any:
        """Learn a task, and measure all test parts.

        Args:
            task: One of a `Stream`.
            epochs: Passes over its rows.
            batch_size: Rows of the task a step.
            verbose: As in `keras.Model.fit`.
            callbacks: Keras callbacks; their `model` is the one around the model that is trained.
            validation_split: Share of the task's rows, from the end, that are not trained on but
                measured after each epoch.
            validation_data: `(x, y)` to measure after each epoch in place of it.

        Returns:
            The Keras `History`; of a task that an earlier run has finished, what that had.

        Raises:
            TypeError: If `task` is none.
            ValueError: If the task does not fit those before it, the model or the memory, or the
                folder holds another training. Nothing has changed then.
        """
        if self._compiled is None:
            raise ValueError("Call `learner.compile(optimizer)` before `fit`.")
        train, validation = rows_to_train(
            task, epochs, batch_size, validation_split, validation_data
        )
        index = len(self._tasks)
        identity = {
            "data": [list(task.x.shape), zlib.crc32(np.ascontiguousarray(task.x))],
            "labels": zlib.crc32(np.ascontiguousarray(task.y)),
            "epochs": epochs,
            "batch_size": batch_size,
            "validation_split": validation_split,
        }
        self._load()
        if index < len(self._rows):
            self._state.require_same(self._rows[index]["identity"], identity, f"task {index}")
            self._tasks.append(task)
            return _history(self._rows[index]["history"])
        if self._trained != index:
            self._require_fits(task, train, validation)
        if self._continues is not None:
            self._state.set_random_state(self._continues)
            self._continues = None
        before = self._arrays()
        try:
            self._tasks.append(task)
            began = time.perf_counter()
            with_all = self._with_earlier(train)
            if self._trained == index:
                history = _history({})
            else:
                history = self._train(
                    index, train, with_all, epochs, batch_size, verbose, callbacks, validation,
                    identity,
                )  # fmt: skip
            self._end(index, with_all)
            row = {
                "name": task.name,
                "classes": task.classes.tolist(),
                "identity": identity,
                "history": plain_value(history.history),
                **accuracies(self._parts(index), self.head, self.scores),
                "bytes": self._bytes(),
            }
            self._rows.append({**row, "seconds": time.perf_counter() - began})
            self._trained = None
            self._save()
        except BaseException:
            # As it was before the task, which can be learned again.
            self._tasks.pop()
            del self._rows[index:]
            self._trained = None
            self._restore(before)
            raise
        return history

    def _require_fits(self, task: Task, train: tuple[Array, Array], validation: Any) -> None:
        """Raise `ValueError` for a task that cannot follow those before it."""
        new = np.setdiff1d(np.unique(train[1]), self.head.classes)
        back = np.setdiff1d(np.intersect1d(task.classes, self.head.classes), new)
        known_before = bool(self._tasks) or len(self.head.classes)
        if len(back) and known_before and not task.returning:
            raise ValueError(
                f"The classes {back.tolist()} of `{task.name}` are known already. If they come "
                "back on purpose, take the task from a stream that says so: `by_domain`, or "
                "`by_task(..., returning=True)`."
            )
        if self.method.needs_new and known_before and not len(new):
            raise ValueError(
                f"`{self.method.name}` works on the columns of new classes, and `{task.name}` "
                "brings none. Choose another method for such streams."
            )
        measured = np.zeros(0, "int64") if validation is None else np.unique(validation[1])
        if len(unknown := np.setdiff1d(measured, [*self.head.classes, *new])):
            raise ValueError(
                f"The validation rows hold the classes {unknown.tolist()}, of which no row is "
                "trained. `validation_split` takes rows from the end as they lie: shuffle them "
                "first, or pass `validation_data` of the classes that are known by then."
            )
        shape = tuple(self.head.inputs[0].shape[1:])
        if len(self.head.inputs) != 1 or not has_shape(task.x.shape[1:], shape):
            raise ValueError(
                f"The model takes inputs of shape {shape}, and the rows of `{task.name}` have "
                f"shape {task.x.shape[1:]}."
            )
        if self.memory is None:
            return
        self.memory.require_fits(task.x)
        columns = len(self.head.classes) + len(new) if self.method.stores_logits else None
        capacity = self.memory.capacity(task.x[0], columns)
        samples = task.stream.samples if task.stream is not None else None
        if samples is not None and not self._tasks and capacity > samples:
            raise ValueError(
                f"The memory has room for {capacity} rows, and the whole stream has {samples}. "
                "Then nothing would be forgotten: use `Joint()`, or a smaller memory."
            )

    def _with_earlier(self, train: tuple[Array, Array]) -> tuple[Array, Array]:
        if not self.method.keeps_all or len(self._tasks) == 1:
            return train
        earlier = self._tasks[:-1]
        return (
            np.concatenate([*(task.x for task in earlier), train[0]]),
            np.concatenate([*(task.y for task in earlier), train[1]]),
        )

    def _train(
        self,
        index: int,
        train: tuple[Array, Array],
        rows: tuple[Array, Array],
        epochs: int,
        batch_size: int,
        verbose: int | str,
        callbacks: Sequence[Any] | None,
        validation: Any,
        identity: dict[str, Any],
    ) -> Any:
        method, head, memory = self.method, self.head, self.memory
        before, trained_before = head.classes.copy(), head.trained_classes.copy()
        taps = method.taps(head)
        old = frozen_copy(head.reader(taps)) if method.reads_old and len(before) else None
        imprint = method.imprint(*train, self._outputs) if len(before) else None
        positions = head.grow(np.unique(rows[1]), method.freezes, imprint)
        columns = len(head.classes)
        method.grown(positions, columns)
        slots = None
        if memory is not None:
            memory.spread(positions, columns)
            slots = memory.begin(train[0][0], columns if method.stores_logits else None)
        pool = Pool(memory, *rows)
        streams = bool(method.draws) and memory is not None and memory.policy != "herding"
        plan = Plan(
            pool,
            self._trained_rows(pool, index),
            epochs,
            batch_size,
            np.random.default_rng([self.seed, index]),
            slots=slots if streams else None,
            held=range(pool.held),
            draws=method.draws,
            draw_size=method.draw_size or batch_size,
        )
        lesson = Lesson(
            head.reader(taps),
            method,
            head=head.layer,
            old=old,
            ranks=head.ranks,
            old_columns=positions,
            task_columns=head.columns_of(np.unique(train[1])).tolist(),
            stored=self._stored(slots, columns),
            identity={"task": index, **identity, **self._settings()},
        )
        self._compile(lesson)
        if self._optimizer is not None:
            self._carry(lesson, trained_before)
        known = np.full(len(pool.y), columns, "int32")
        if memory is not None and memory.logits is not None:
            known[: pool.held] = memory.known
        read = reading(pool, head.columns_of(pool.y), known, method.stores_logits)
        batches = Batches(plan, read)
        kept: list[Any] = [Epochs(batches), *(callbacks or [])]
        if self._state.folder is not None:
            kept += [
                AtTheEnd(lambda: self._keep_trained(index, lesson, plan, streams)),
                self._backup(self._state.folder / f"task-{index}"),
            ]
        if validation is not None:
            validation = {"x": validation[0]}, head.columns_of(validation[1])
        history = lesson.fit(
            batches,
            epochs=epochs,
            verbose=verbose,
            callbacks=kept,
            shuffle=False,
            validation_data=validation,
            validation_batch_size=256,
        )
        if self._state.folder is None:
            self._take(lesson, plan, streams)
        return history

    def _backup(self, folder: Any) -> Any:
        return ResumableBackup(folder, self._backup_every)

    def _trained_rows(self, pool: Pool, index: int) -> Array:
        rows = np.arange(pool.held if not self.method.joins else 0, len(pool.y))
        return np.setdiff1d(rows, self._out(pool, index))

    def _out(self, pool: Pool, index: int) -> Array:
        """Rows that are held out of the training."""
        rng = np.random.default_rng([self.seed, index, 1])
        return held_out(pool, self.method.holds_out, rng)

    def _stored(self, slots: Array, columns: int) -> Array:
        if slots is None or not self.method.stores_logits or self.memory is None:
            return None
        stored = np.zeros((slots.capacity + 1, columns), "float32")
        if self.memory.logits is not None:
            stored[: len(self.memory)] = self.memory.logits
        return stored

    def _compile(self, lesson: Lesson) -> None:
        given = dict(self._compiled or {})
        optimizer = given.pop("optimizer")
        self._per_row = given["loss"]
        given["metrics"] = keras.tree.map_structure(fresh, given["metrics"])
        lesson.compile(type(optimizer).from_config(optimizer.get_config()), **given)
        lesson.optimizer.build(lesson.trainable_variables)

    def _carry(self, lesson: Lesson, trained_before: Array) -> None:
        """Go on with the state that the optimizer had."""
        optimizer = lesson.optimizer
        body_only = type(optimizer).from_config(optimizer.get_config())
        head = {id(v) for v in self.head.layer.trainable_variables}
        body_only.build([v for v in lesson.trainable_variables if id(v) not in head])
        pairs = carried(
            self._optimizer, optimizer, body_only, trained_before, self.head.trained_classes
        )
        for variable, value in pairs:
            variable.assign(value)

    def _take(self, lesson: Lesson, plan: Plan, streams: bool) -> None:
        """Take over what the training has changed beside the model itself."""
        self._optimizer = [plain_value(v) for v in lesson.optimizer.variables]
        if not streams or self.memory is None:
            return
        held, pool = np.array(plan.held, "int64"), plan.pool
        known = np.full(len(pool.y), len(self.head.classes), "int32")
        if self.memory.logits is not None:
            known[: pool.held] = self.memory.known
        logits = None if lesson.stored is None else plain_value(lesson.stored)[: len(held)]
        self.memory.replace(pool.x(held), pool.y[held], logits, known[held])

    def _keep_trained(self, index: int, lesson: Lesson, plan: Plan, streams: bool) -> None:
        self._take(lesson, plan, streams)
        self._trained = index
        self._save()

    # ------------------------------------------------------------------ after a task

    def _end(self, index: int, rows: tuple[Array, Array]) -> None:
        """Correct the head, fill the memory, remember, and make the model that answers."""
        method, memory = self.method, self.memory
        pool = Pool(memory, *rows)
        out = self._out(pool, index)
        stay = np.setdiff1d(np.arange(pool.held, len(pool.y)), out) - pool.held
        new = self._new_columns(index)
        ending = Ending(
            head=self.head,
            memory=memory,
            x=rows[0][stay],
            y=rows[1][stay],
            held_x=pool.x(out) if len(out) else None,
            held_y=pool.y[out] if len(out) else None,
            old=[i for i in range(len(self.head.classes)) if i not in new] if new else [],
            new=new,
            index=index,
            seed=self.seed,
            outputs=self._outputs,
            per_row=self._per_row or (self._compiled or {})["loss"],
        )
        method.correct(ending)
        if memory is not None and (memory.policy == "herding" or not method.draws):
            order = np.random.default_rng([self.seed, index, 2]).permutation(len(rows[1]))
            x, y = rows[0][order], rows[1][order]
            herds = memory.policy == "herding"
            outputs = self._outputs(x) if herds or method.stores_logits else {}
            logits = outputs["logits"] if method.stores_logits else None
            memory.add(x, y, logits, features=outputs.get("features") if herds else None)
        method.finish(ending)
        self._answering = method.answering(self.head)

    def _new_columns(self, index: int) -> list[int]:
        """Columns of classes that neither the given model nor an earlier task had."""
        known = {*self._given, *(c for task in self._tasks[:index] for c in task.classes.tolist())}
        if not known:
            return []
        new = np.setdiff1d(self._tasks[index].classes, sorted(known))
        return self.head.columns_of(np.intersect1d(new, self.head.classes)).tolist()

    def _outputs(self, x: Array) -> dict[str, Array]:
        """Logits and features of rows, in inference mode."""
        return backends.answers(self.head.reader(), x)

    def scores(self, x: Array) -> Array:
        """What `model` answers, a column for each of `classes`.

        Args:
            x: Rows, `(samples, ...)`.

        Returns:
            Array `(samples, classes)`.
        """
        return backends.answers(self._answering, x)

    def predict(self, x: Array) -> Array:
        """The class of each row, among all that are known.

        Args:
            x: Rows, `(samples, ...)`.

        Returns:
            Integers `(samples,)`.
        """
        return self.head.classes[self.scores(x).argmax(-1)]

    def _parts(self, index: int) -> list[Task]:
        """The tasks so far, and those of the same stream that are still to come."""
        stream = self._tasks[-1].stream
        if stream is not None and self._tasks == stream.tasks[: index + 1]:
            return stream.tasks
        return self._tasks

    def _bytes(self) -> int:
        held = 0 if self.memory is None else self.memory.nbytes
        if self.method.keeps_all:
            held += sum(int(task.x.nbytes + task.y.nbytes) for task in self._tasks)
        return held + self.method.nbytes

    def report(self, known_task: bool = False) -> Report:
        """What has been learned and forgotten so far.

        Args:
            known_task: Whether accuracies are those among the classes of the row's task, which is
                told, in place of those among all classes that are known.

        Returns:
            The report.

        Raises:
            ValueError: If no task has been learned, or no task has a test part.
        """
        if not self._tasks:
            raise ValueError("No task has been learned yet. Call `learner.fit(task)` first.")
        names = [task.name for task in self._parts(len(self._tasks) - 1)]
        return Report(self._rows[: len(self._tasks)], names, repr(self.method), known_task)

    # ------------------------------------------------------------------------ disk

    def _settings(self) -> dict[str, Any]:
        given = self._compiled or {}
        optimizer, loss = given["optimizer"], given["loss"]
        config = {k: v for k, v in optimizer.get_config().items() if k != "name"}
        named = isinstance(loss, keras.losses.Loss)
        return {
            "method": repr(self.method),
            "memory": None if self.memory is None else self.memory.settings(),
            "optimizer": [type(optimizer).__name__, plain_value(config)],
            "loss": type(loss).__name__ if named else getattr(loss, "__name__", "function"),
            "seed": self.seed,
            "features": list(map(str, self.head.features.shape[1:])),
            "weights": [list(map(int, v.shape)) for v in self.head.body],
        }

    def _arrays(self) -> dict[str, Array]:
        """All that is true between two tasks."""
        begun = len(self.head.classes) > 0
        arrays = {
            "classes": self.head.classes,
            "ranks": self.head.ranks,
            "trained": self.head.trained_classes,
            **{f"head:{k}": v for k, v in (self.head.arrays() if begun else {}).items()},
            **{f"body:{i}": plain_value(v) for i, v in enumerate(self.head.body)},
            **{f"method:{name}": value for name, value in self.method.state().items()},
        }
        if self._optimizer is not None:
            arrays |= {f"optimizer:{i}": value for i, value in enumerate(self._optimizer)}
        if self.memory is not None:
            arrays |= {f"memory:{name}": value for name, value in self.memory.state().items()}
        return dict(arrays)

    def _save(self) -> None:
        if self._state.folder is None:
            return
        about = {
            "settings": plain_value(self._settings()),
            "tasks": self._rows,
            "trained": self._trained,
        }
        self._state.write(about, self._arrays())

    def _load(self) -> None:
        """Take up what an earlier run has finished, once."""
        if self._loaded:
            return
        self._loaded = True
        try:
            found = self._state.read()
            if found is None:
                return
            about, arrays = found
            now = json.loads(json.dumps(plain_value(self._settings())))
            self._state.require_same(about["settings"], now, "the learner")
            self._restore(arrays)
        except BaseException:
            self._loaded = False
            raise
        self._rows, self._trained = about["tasks"], about["trained"]
        self._continues = arrays

    def _restore(self, arrays: dict[str, Array]) -> None:
        def part(kind: str) -> dict[str, Array]:
            prefix = f"{kind}:"
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        head = self.head
        if len(arrays["classes"]):
            head.load(arrays["classes"], arrays["ranks"], part("head"), arrays["trained"])
        else:
            head.reset()
        body = part("body")
        for i, variable in enumerate(head.body):
            variable.assign(body[str(i)])
        values = part("optimizer")
        self._optimizer = [values[str(i)] for i in range(len(values))] or None
        if self.memory is not None:
            self.memory.load_state(part("memory"))
        self.method.load_state(part("method"))
        self._answering = self.method.answering(head) if len(head.classes) else head.model


def _history(values: dict[str, Any]) -> Any:
    history = keras.callbacks.History()
    history.history = dict(values)
    history.epoch = list(range(len(next(iter(values.values()), []))))
    return history
