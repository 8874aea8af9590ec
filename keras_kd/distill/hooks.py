"""What users put into the step: what they are handed, and the variables that they bring.

A hook is a penalty or a batch transform. What it remembers from step to step lies in Keras
Variables. JAX compiles a step in which any other value is a constant, so the distiller holds these
Variables as its own: they are arguments and results of the step, and go to disk with it. A new kind
of hook gets a `Held` and the checks below.
"""

import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from keras_kd import backends
from keras_kd.models.model_reader import Answer
from keras_kd.utils.types import Tensor, Tensors

HOOKS = ("penalties", "batch_transform")
"""The arguments of `compile` that are hooks."""


class Batch(NamedTuple):
    """One batch, as penalties and batch transforms read it.

    Attributes:
        x: Inputs, a tensor or a structure of tensors. For a batch transform what the
            data deliver; for a penalty what the student reads, behind the transform
            and `student_inputs`.
        y: Labels, or `None`.
        sample_weight: `(batch,)` or one for each position, for several outputs a
            structure of them, or `None`.

    Examples:
        >>> batch._replace(x=batch.x + 0.1)
    """

    x: Any
    y: Any = None
    sample_weight: Any = None


class Answered(Batch):
    """A batch as penalties read it, which also holds what the models said of it in this step.

    What a penalty reads here costs no pass of its own, and of a `CachedTeacher` it is all there is.

    Attributes:
        student: What the student said, with `training=True`: `student.logits` has a tensor for each
            flat output.
        teacher: The same of the teacher, without a gradient; `None` where there is no teacher.
    """

    student: Answer
    teacher: Answer | None


def answered(
    x: Tensors, y: Tensors | None, sample_weight: Tensors | None, student: Answer, teacher: Answer
) -> Answered:
    """Make the batch that penalties read.

    Args:
        x: What the student read.
        y: Labels.
        sample_weight: Weights, as Keras passes them.
        student: The student's answer.
        teacher: The teacher's answer; without logits, if there is no teacher.
    """
    batch = Answered(*map(tensors, (x, y, sample_weight)))
    batch.student, batch.teacher = student, teacher if teacher.logits else None
    return batch


class LooksFirst:
    """A hook that looks at the data once, before the first step of `fit`."""

    def look(self, distiller: "Trained", x: Tensors, rows: Tensors) -> None:
        """Refuse what cannot work, and warn of what does not.

        Args:
            distiller: With its student and teacher.
            x: What `fit` was given: arrays, or a dataset.
            rows: Its first rows, as the models read them.
        """


class Adversary:
    """What attacks the inputs while a student trains, as `compile(adversary=...)` takes it."""

    def arguments(self, distiller: "Trained", given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments of `compile` that make this adversary part of the training.

        Args:
            distiller: The distiller that is compiled.
            given: What the user gave of `distillation_loss`, `alpha`, `student_loss_weight`,
                `distillation_loss_weight`, `penalties` and `batch_transform`.

        Returns:
            The same arguments; this adversary is one of the penalties, or the batch transform.

        Raises:
            ValueError: If something that was given contradicts it.
        """
        raise NotImplementedError


def require_adversary(adversary: object) -> Adversary:
    """Return the adversary, or raise `TypeError` if it is none."""
    if not isinstance(adversary, Adversary):
        hint = " Pass an instance, not the class." if isinstance(adversary, type) else ""
        raise TypeError(
            "`adversary` is one of `keras_kd.robust`: `PGDTraining`, `TRADES`, `ARD`, `RSLAD`, "
            f"`IAD` or `AdaAD`. Received: adversary={adversary!r}.{hint}"
        )
    return adversary


class Trained(Protocol):
    """What hooks, and the parts of a distiller, read of the `Distiller` that they work for.

    Attributes:
        name: Its name.
        student: The model that is trained.
        teacher: The model, `Ensemble` or `Teacher` that it learns from, or `None`.
        transfers: What is transferred.
        penalties: The terms of the objective that the user gave.
        batch_transforms: The batch transform, or nothing.
        temperature: The live temperature, a `keras.Variable`.
        alpha: The live weight of the hard loss.
        student_loss_weight: The same beside `alpha`, or in its place.
        distillation_loss_weight: The live weight of what is transferred.
        loss: The hard loss that `compile` was given, or `None`.
        compiled: Whether `compile` was called.
        optimizer: The optimizer.
    """

    name: str
    student: Any
    transfers: list[Any]
    penalties: list[Any]
    batch_transforms: list[Any]
    temperature: Any
    alpha: Any
    student_loss_weight: Any
    distillation_loss_weight: Any
    loss: Any
    compiled: bool
    optimizer: Any

    @property
    def teacher(self) -> Any:
        """What it learns from."""

    @property
    def teacher_inputs(self) -> Any:
        """What makes the teacher's inputs of a batch, or `None`."""

    @property
    def student_inputs(self) -> Any:
        """What makes the student's inputs of a batch, or `None`."""

    @property
    def pairing(self) -> Any:
        """The `Pairing` of the models."""

    @property
    def trainable_variables(self) -> list[Any]:
        """What the optimizer changes."""

    @property
    def non_trainable_variables(self) -> list[Any]:
        """All other variables of the step."""

    @property
    def metrics_variables(self) -> list[Any]:
        """Variables of metrics."""

    @property
    def metrics_need_labels(self) -> bool:
        """Whether `compile` was given metrics."""

    def make_metrics(self, labels: Any, outputs: Any) -> None:
        """Make the metrics of `compile` before the first step."""

    def adopt(self, placed: list[Any]) -> None:
        """Transfer this from now on."""


class Held(keras.layers.Layer):
    """The Variables of a hook, where Keras finds them.

    Args:
        it: The hook.
        variables: Those of its Variables that belong to no model of the distiller.
        name: For its paths in files.
    """

    def __init__(self, it: object, variables: Sequence[Any], name: str) -> None:
        super().__init__(name=name, autocast=False)
        # Past Keras's tracking: it may hold the models themselves.
        object.__setattr__(self, "it", it)
        self.kept = list(variables)
        self.built = True


def tensors(part: Tensors) -> Any:
    """Arrays of a batch as tensors, where Keras hands them on as they were given."""

    def tensor(leaf: Tensor) -> Any:
        if keras.ops.is_tensor(leaf) or not hasattr(leaf, "__array__"):
            return leaf
        array = leaf.__array__()
        dtype = keras.config.floatx() if array.dtype.kind == "f" else None
        return keras.ops.convert_to_tensor(array, dtype=dtype)

    return keras.tree.map_structure(tensor, part, none_is_leaf=False)


def variables_of(hook: object, others: set[int]) -> list[Any]:
    """The Variables that a hook reads, states of random generators among them.

    They are found in its attributes, in what a function encloses or names, and in what these hold.

    Args:
        hook: A function or any object that is called.
        others: Identities of Variables that belong to somebody else.
    """
    found: dict[int, Any] = {}
    for thing in _all_parts(hook):
        if isinstance(thing, keras.Variable):
            found[id(thing)] = thing
        elif isinstance(thing, keras.random.SeedGenerator):
            found[id(thing.state)] = thing.state
        elif isinstance(thing, _KERAS):
            found.update((id(v), v) for v in thing.variables)
    return [v for key, v in found.items() if key not in others]


def require_own_memory(what: str, hook: object, kept: Sequence[Any], student: keras.Model) -> None:
    """Raise `ValueError` if what a hook remembers of a weight is the weight itself.

    Args:
        what: The hook, in the words of the message.
        hook: It.
        kept: Its Variables.
        student: The model that is trained.
    """
    arrays = [thing for thing in _all_parts(hook) if isinstance(thing, np.ndarray)]
    if backends.with_memory_of([*kept, *arrays], student.variables):
        raise ValueError(
            f"{what} holds a weight of the student `{student.name}` without a copy, which on this "
            "backend is the weight itself and no record of it. Copy it: "
            "`keras.Variable(keras.ops.copy(weight))`, or `numpy.array(weight)`."
        )


# Their own Variables are all there is to know of them.
_KERAS = (keras.layers.Layer, keras.metrics.Metric)


def _all_parts(hook: object) -> Iterator[Any]:
    """A hook and all that it holds, once each."""
    # Held here, so that no identity is used twice.
    seen: dict[int, Any] = {}
    waiting = [hook]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        yield thing
        if not isinstance(thing, (keras.Variable, keras.random.SeedGenerator, *_KERAS)):
            waiting.extend(_parts(thing))


def _parts(thing: object) -> Iterator[Any]:
    """What a value of Python holds, as far as it is told without running any code."""
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set):
        yield from thing
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif inspect.ismethod(thing):
        yield from (thing.__self__, thing.__func__)
    elif inspect.isfunction(thing):
        named = inspect.getclosurevars(thing)
        yield from (named.nonlocals, named.globals)
    elif not isinstance(thing, type | types.ModuleType) and isinstance(
        getattr(thing, "__dict__", None), dict
    ):
        yield vars(thing)
        yield from (vars(kind).get("__call__") for kind in type(thing).__mro__)


def require_called_with(hook: object, what: str, arguments: tuple[str, str]) -> None:
    """Raise `TypeError` unless a hook can be called with two arguments.

    Args:
        hook: What is called.
        what: It, in the words of the message.
        arguments: What it is called with.
    """
    if not callable(hook) or isinstance(hook, type):
        raise TypeError(
            f"{what} is called with `({', '.join(arguments)})`. Received: {hook!r}."
            + (" Pass an instance, not the class." if isinstance(hook, type) else "")
        )
    try:
        signature = inspect.signature(hook)
    except ValueError:
        # Code in C may tell nothing of its arguments.
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{what} is called with `({', '.join(arguments)})`, and it takes {signature}."
        ) from error


def require_registered(distiller: str, compiled_with: dict[str, Any]) -> None:
    """Raise `ValueError` for a hook that could not be found again when the file is loaded.

    Args:
        distiller: Name of the distiller.
        compiled_with: The arguments of `compile`.
    """
    hooks = [(f"the penalty `{p.name}`", p) for p in compiled_with.get("penalties") or ()]
    transform = compiled_with.get("batch_transform")
    hooks += [("the `batch_transform`", transform)] if transform is not None else []
    for what, hook in hooks:
        if not is_registered(hook):
            function = inspect.isroutine(hook)
            kind = hook if function else type(hook)
            kind = getattr(kind, "__qualname__", repr(kind))
            advice = "" if function else " and give it `get_config` and `from_config`"
            raise ValueError(
                f"The distiller `{distiller}` cannot be saved: {what} is `{kind}`, which no file "
                "can name. Decorate it with `@keras.saving.register_keras_serializable"
                f"(package=...)`{advice}; or save the weights, `distiller.save_weights(path)`, or "
                "the student alone, `distiller.student.save(path)`."
            )


def is_registered(hook: object) -> bool:
    """Whether a file can name this function, or the class of this object."""
    kind = hook if inspect.isroutine(hook) else type(hook)
    methods = () if inspect.isroutine(hook) else ("get_config", "from_config")
    if not all(callable(getattr(hook, method, None)) for method in methods):
        return False
    name = keras.saving.get_registered_name(kind)
    return keras.saving.get_registered_object(name) is kind


def serialized(value: object) -> Any:
    """Hooks as a file holds them; one that no file can name, by the name of its class alone."""
    if isinstance(value, list | tuple):
        return [serialized(each) for each in value]
    if value is None or is_registered(value):
        return keras.saving.serialize_keras_object(value)
    kind = value if inspect.isroutine(value) else type(value)
    return getattr(kind, "__qualname__", type(value).__name__)
