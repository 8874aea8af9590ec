"""What `compile(batch_transform=fn)` does to a batch, inside the step and before the forward pass.

The function may run the models, to find a worse input or to answer for replayed rows. Such inner
passes leave the models as they are, BatchNorm statistics included, while what the function itself
keeps in Keras Variables changes from step to step.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_kd import backends
from keras_kd.distill import hooks
from keras_kd.distill.pairing import Pairing
from keras_kd.teachers import Teacher
from keras_kd.utils.types import Data, Tensor


def require(transform: object) -> Any:
    """The batch transform, or `None`; raises `TypeError` for anything else."""
    if transform is not None:
        hooks.require_called_with(transform, "`batch_transform`", ("batch", "distiller"))
    return transform


def held(transform: object, others: set[int], student: keras.Model) -> list[hooks.Held]:
    """The transform with its Variables in a list, or nothing where there is none.

    Args:
        transform: What `compile` was given.
        others: Identities of the Variables that belong to somebody else.
        student: The model that is trained.
    """
    if transform is None:
        return []
    made = hooks.Held(transform, hooks.variables_of(transform, others), "batch_transform")
    hooks.require_own_memory("`batch_transform`", transform, made.kept, student)
    return [made]


def transformed(
    distiller: hooks.Trained, pairing: Pairing, data: Data, state: list[Any]
) -> tuple[Any, list[Any]]:
    """One batch behind the transform, and the state of the step.

    Args:
        distiller: The distiller with its batch transform, or without one.
        pairing: Its models.
        data: What the step was given.
        state: On JAX one tuple of the values that the step was given, or nothing where it runs on
            what the Variables hold.

    Returns:
        The same two; of the state only what the transform itself keeps has changed.

    Raises:
        TypeError: If the transform returns no `Batch`.
        ValueError: If what it returns does not fit together, or a cache has no answers to it.
    """
    for each in distiller.batch_transforms:
        data, state = _transformed(distiller, pairing, each.it, data, state)
    return data, state


def _transformed(
    distiller: hooks.Trained,
    pairing: Pairing,
    transform: Callable[..., Any],
    data: Data,
    state: list[Any],
) -> tuple[Any, list[Any]]:
    """The same by one `fn(batch, distiller)`."""
    plain, weights = backends.supplied(data)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(plain)
    inner, record = pairing.split(x)
    before = hooks.Batch(*map(hooks.tensors, (inner, y, sample_weight)))
    if state:
        lent = list(zip(pairing.teacher_variables(), weights or ()))
        scope = _Scope(distiller, state[0], lent)
        with scope:
            after = transform(before, distiller)
        state = [scope.after(state[0])]
    else:
        with _models_kept(pairing):
            after = transform(before, distiller)
    after = _checked(before, after)
    if record is not None:
        _require_same_rows(pairing.teacher, before, after)
    x = x._replace(x=after.x) if record is not None else after.x
    data = (x, after.y, after.sample_weight)
    return (data if weights is None else backends.Supplied(data, weights)), state


class _Scope(keras.StatelessScope):
    """The step's state on JAX, in which the models stay as they are.

    Args:
        distiller: The distiller.
        state: The values of its trainable and other variables, of the optimizer's and the metrics'.
        lent: The teacher's variables with their values.
    """

    def __init__(
        self, distiller: hooks.Trained, state: Sequence[Any], lent: Sequence[tuple[Any, Any]]
    ) -> None:
        self._others = distiller.non_trainable_variables
        groups = (
            distiller.trainable_variables,
            self._others,
            distiller.optimizer.variables,
            distiller.metrics_variables,
        )
        mapping = [pair for group, values in zip(groups, state) for pair in zip(group, values)]
        super().__init__(state_mapping=[*lent, *mapping])
        # Random states of the models go on, as their dropout draws.
        self._may_change = {id(v) for v in self._others}
        self._stays = {id(v) for v in distiller.student.weights} | {id(v) for v, _ in lent}

    def add_update(self, update: tuple[Any, Any]) -> None:
        """Take note of a change, unless it is one of a model."""
        variable, _ = update
        if id(variable) in self._stays:
            return
        if id(variable) not in self._may_change:
            raise ValueError(
                f"`batch_transform` assigns the variable `{variable.path}`, which the distiller "
                "does not know, so that the compiled step would forget it. Let the function "
                "enclose the `keras.Variable` or `keras.random.SeedGenerator`, or hold it as an "
                "attribute, when `compile` is called."
            )
        super().add_update(update)

    def after(self, state: list[Tensor]) -> Any:
        """The state with what has changed in the scope."""
        others = [self.get_current_value(v) for v in self._others]
        return (state[0], others, *state[2:])


@contextlib.contextmanager
def _models_kept(pairing: Pairing) -> Iterator[None]:
    """Give the models their statistics back that inner passes moved."""
    teacher = pairing.teacher
    models = [pairing.student.model, *(teacher.models if teacher is not None else ())]
    # Those that were made not trainable, which is not what `trainable = False` makes of them.
    found = {
        id(v): v
        for model in models
        for layer in model._flatten_layers()
        for v in layer._non_trainable_variables
    }
    before = [(v, ops.copy(ops.convert_to_tensor(v))) for v in found.values()]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def _checked(before: hooks.Batch, after: object) -> hooks.Batch:
    """What the transform returned, in tensors without a history."""
    if not isinstance(after, hooks.Batch):
        raise TypeError(
            "`batch_transform` returns a `keras_kd.Batch`, as `batch._replace(x=...)`. Received: "
            f"{type(after).__name__}."
        )

    def tensor(leaf: Tensor) -> Any:
        if leaf is None:
            return None
        if not ops.is_tensor(leaf):
            leaf = ops.convert_to_tensor(leaf)
        # On PyTorch the inner passes hang on it; elsewhere nothing is recorded here.
        return ops.stop_gradient(leaf) if keras.config.backend() == "torch" else leaf

    after = hooks.Batch(
        *(keras.tree.map_structure(tensor, part, none_is_leaf=False) for part in after)
    )
    if not any(leaf is not None for leaf in keras.tree.flatten(after.x)):
        raise ValueError("`batch_transform` returned a batch without inputs, `x`.")
    if after.y is None and before.y is not None:
        raise ValueError(
            "`batch_transform` returned a batch without its labels. Keep them: "
            "`batch._replace(x=...)`."
        )
    rows = {
        name: {
            leaf.shape[0] if len(leaf.shape) else 0
            for leaf in keras.tree.flatten(part)
            if leaf is not None
        }
        for name, part in zip(after._fields, after)
    }
    known = {name: found - {None} for name, found in rows.items()}
    if len(set().union(*known.values())) > 1 or {0} & set().union(*known.values()):
        shown = ", ".join(f"{name} {sorted(found)}" for name, found in known.items())
        raise ValueError(
            "`batch_transform` returns as many labels and weights as inputs, and at least one row. "
            f"Received rows: {shown}. A batch that grows grows in all of its parts."
        )
    return after


def _require_same_rows(teacher: Teacher | None, before: hooks.Batch, after: hooks.Batch) -> None:
    """Raise `ValueError` where what was joined to the rows belongs to others than these.

    Args:
        teacher: The teacher, or `None`.
        before: The batch as it was.
        after: The batch behind the transform.
    """
    old, new = keras.tree.flatten(before.x), keras.tree.flatten(after.x)
    if teacher is not None and teacher.needs_join:
        if len(old) != len(new) or any(a is not b for a, b in zip(old, new)):
            raise ValueError(
                "`batch_transform` changes the inputs, and the answers of the `CachedTeacher` "
                f"`{teacher.name}` are those to the inputs as they were. Change labels and weights "
                "alone, `batch._replace(y=...)`, or distil from the model itself."
            )
        return
    lengths = {tensor.shape[0] for tensor in (old[0], new[0])}
    if None not in lengths and len(lengths) > 1:
        raise ValueError(
            "`batch_transform` changes the number of rows, and a row number was joined to each of "
            f"these. Received: {sorted(lengths)} rows. Keep rows and their order where a loss "
            "remembers them."
        )
