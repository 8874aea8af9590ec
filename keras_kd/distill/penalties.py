"""Terms of the objective that users write: what they are, what they are worth, and their weights.

`compile(penalties=[...])` makes a `PenaltyTerm` of each, which keeps its Variables, and an
`OfPenalty`, which is a term of the `Objective` as the hard loss is.
"""

import math
import re
import weakref
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_kd.distill import hooks
from keras_kd.distill.objective import Seen, Value
from keras_kd.losses import counts
from keras_kd.losses.counts import Counted
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor


class Penalty:
    """A term of the objective beside the hard loss and the distillation loss.

    `compile(penalties=[...])` adds `weight * penalty(distiller, batch)` to what is
    minimized, and logs the value without its weight under `name`. A subclass
    defines `__call__`, which runs in the compiled step, after the student's
    forward pass: `keras.ops` on `distiller.student.trainable_variables`, say.
    `evaluate` leaves penalties out, unless `compile` was given
    `evaluate_distillation=True`.

    What a penalty remembers lies in `keras.Variable` attributes, which are made in
    `__init__` or in `build`. They are no parameters: no gradient step changes
    them, whatever their `trainable`. They are saved with the distiller. NumPy
    arrays and numbers are constants of the compiled step.

    Anything else with a `name`, a `weight` and a `__call__(distiller, batch)`
    serves as well. A weight that is a number is read once, by `compile`, and is
    live as `distiller.penalties[i].weight` from then on.

    Args:
        weight: Non-negative float, dimensionless. Live: `penalty.weight = 0.1`
            counts from the next step on, without retracing.
        name: Name in the logs. Defaults to that of the class, in snake case.

    Raises:
        TypeError: If `weight` is no number.
        ValueError: If it is negative or not finite.

    Examples:
        >>> @keras.saving.register_keras_serializable(package="mine")
        ... class L2ToStart(keras_kd.Penalty):
        ...     def build(self, distiller):
        ...         weights = distiller.student.trainable_variables
        ...         self.start = [keras.Variable(keras.ops.copy(w)) for w in weights]
        ...
        ...     def __call__(self, distiller, batch):
        ...         pairs = zip(distiller.student.trainable_variables, self.start)
        ...         return sum(keras.ops.sum((w - start) ** 2) for w, start in pairs)
        >>> distiller.compile("adam", loss, penalties=[L2ToStart(weight=0.01)])

    Reference:
        - [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796), equation 3
        - [Li et al., 2020](https://arxiv.org/abs/1812.06127), equation 2
    """

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        self.name = name or _snake_case(type(self).__name__)
        self._weight = _variable(weight, self.name)
        self._owner: Any = None

    @property
    def weight(self) -> Any:
        """What the value is multiplied by, a `keras.Variable`."""
        return self._weight

    @weight.setter
    def weight(self, value: float | keras.Variable) -> None:
        _require_weight(value, self.name)
        self._weight.assign(value)

    # `Any`, so that a subclass may say `keras_kd.Distiller` without a type checker's complaint.
    def build(self, distiller: Any) -> None:
        """Make the Variables that the penalty keeps; `compile` calls it once.

        Args:
            distiller: With the student's weights as they are now.
        """

    def __call__(self, distiller: Any, batch: Any) -> Tensor:
        """Compute the penalty of one batch, not yet multiplied by `weight`.

        Args:
            distiller: With its `student`, its `teacher` and the rest. A pass of a model in here is
                one like any other: with `training=True` it moves BatchNorm statistics.
            batch: What the student read, labels and weights; `batch.student.logits` and
                `batch.teacher.logits` are what the models said of it in this step.

        Returns:
            A scalar, or one value per sample, `(batch,)`, which sample weights and masks act on as
            on the other terms; weights of several outputs by their mean.
        """
        raise NotImplementedError(f"`{type(self).__name__}` defines no `__call__`.")

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the penalty."""
        return {"weight": float(ops.convert_to_numpy(self._weight)), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Penalty":
        """Rebuild a penalty; the values of its Variables come with the weights."""
        return cls(**config)


class PenaltyTerm(hooks.Held):
    """A penalty in a distiller.

    Args:
        penalty: What was given to `compile`.
        others: Identities of the Variables that belong to somebody else.

    Attributes:
        name: Its name in the logs.
        weight: Its live weight, a `keras.Variable`.
    """

    def __init__(self, penalty: Penalty, others: set[int]) -> None:
        weight = penalty.weight
        if not isinstance(weight, keras.Variable):
            weight = _variable(weight, penalty.name)
        variables = [v for v in hooks.variables_of(penalty, others) if v is not weight]
        super().__init__(penalty, variables, penalty.name)
        self.weight = weight

    def value(
        self, distiller: hooks.Trained, batch: hooks.Batch, counted: Sequence[Counted]
    ) -> Tensor:
        """What the penalty is worth, a scalar, without its weight.

        Args:
            distiller: What it is a term of.
            batch: What the student read, labels and weights.
            counted: What counts of each flat output of the student.

        Raises:
            TypeError: If the penalty returns nothing that is a number.
            ValueError: If it returns another shape than `()` or `(batch,)`.
        """
        values = self._returned(self.it(distiller, batch))
        rows = keras.tree.flatten(batch.x)[0].shape[0]
        shape = tuple(values.shape)
        if len(shape) > 1 or (shape and None not in (shape[0], rows) and shape[0] != rows):
            raise ValueError(
                f"The penalty `{self.name}` returns a scalar or one value per sample, "
                f"`({'batch' if rows is None else rows},)`. Received: shape {shape}. Sum or "
                "average it over the other axes."
            )
        mask, weight = (None, None) if not shape else self._of_rows(batch, counted)
        return counts.reduced(
            # Of one row, so that it is divided by the number of replicas as the others are.
            values if shape else ops.reshape(values, (1,)),
            weight,
            mask,
            "sum_over_batch_size",
            self.name,
            keras.backend.standardize_dtype(values.dtype),
        )

    def _returned(self, value: object) -> Tensor:
        try:
            values = ops.convert_to_tensor(value)
            dtype = keras.backend.standardize_dtype(values.dtype)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"The penalty `{self.name}` returns a tensor: a scalar, or one value per sample. "
                f"Received: {value!r}."
            ) from error
        if keras.backend.is_float_dtype(dtype):
            return ops.cast(values, keras.backend.result_type(dtype, "float32"))
        if keras.backend.is_int_dtype(dtype):
            return ops.cast(values, "float32")
        raise TypeError(f"The penalty `{self.name}` returns real numbers. Received: dtype {dtype}.")

    def _of_rows(self, batch: hooks.Batch, counted: Sequence[Counted]) -> tuple[Tensor, Tensor]:
        """Which samples count, and with which weight."""
        weights = [counts.per_value(c.weight, c.mask, 1) for c in counted]
        weight: Tensor = None
        if any(each is not None for each in weights):
            # Keras gives one weight for all outputs to each of them, so that this is that one.
            weight = sum(1.0 if each is None else each for each in weights) / len(weights)
        masks = [counts.rows_of(c.mask) for c in counted if c.mask is not None]
        if len(masks) < len(counted):
            # All samples of one of the outputs count.
            return None, weight
        return ops.any(ops.stack(masks), axis=0), weight


def require(penalties: object, metrics: object) -> list[Any]:
    """The penalties as a list, or one error that says what does not fit.

    Args:
        penalties: What `compile` was given.
        metrics: The metrics that it was given, whose names are taken.

    Raises:
        TypeError: If one of them is no penalty.
        ValueError: If a weight is out of range, or two logs would have one name.
    """
    if penalties is None:
        return []
    if not isinstance(penalties, list | tuple):
        raise TypeError(
            f"`penalties` is a list of penalties. Received: penalties={penalties!r}."
            + (" Pass `penalties=[penalty]`." if callable(penalties) else "")
        )
    taken = {getattr(m, "name", m) for m in keras.tree.flatten(metrics) if m is not None}
    taken |= {"learning_rate", "student_loss_weight", "distillation_loss_weight"}
    for i, penalty in enumerate(penalties):
        what = f"`penalties[{i}]`"
        hooks.require_called_with(penalty, what, ("distiller", "batch"))
        missing = [name for name in ("name", "weight") if not hasattr(penalty, name)]
        if missing:
            raise TypeError(
                f"{what} has no `{missing[0]}`. A penalty has a `name`, a `weight` and a "
                "`__call__(distiller, batch)`; derive it from `keras_kd.Penalty`. Received: "
                f"{penalty!r}."
            )
        if not isinstance(penalty.name, str) or not penalty.name or "/" in penalty.name:
            raise TypeError(
                f"The `name` of {what} is a string without '/'. Received: {penalty.name!r}."
            )
        if isinstance(penalty, Penalty) and type(penalty).__call__ is Penalty.__call__:
            raise TypeError(
                f"{what}, a `{type(penalty).__name__}`, defines no `__call__(self, distiller, "
                "batch)`."
            )
        _require_weight(penalty.weight, penalty.name)
        if penalty.name in taken or penalty.name.startswith("val_"):
            raise ValueError(
                f"The penalty name `{penalty.name}` is, or looks like, another log. Give it a "
                "`name=` of its own."
            )
    checks.unique([penalty.name for penalty in penalties], "penalty")
    return list(penalties)


def terms(
    distiller: hooks.Trained, penalties: Sequence[Any], others: set[int]
) -> list[PenaltyTerm]:
    """Build penalties for a distiller.

    Args:
        distiller: What they become terms of.
        penalties: What `require` returned.
        others: Identities of the Variables that belong to somebody else.

    Raises:
        ValueError: If a penalty was built for another distiller, or the student has no weights.
    """
    for penalty in penalties:
        if not isinstance(penalty, Penalty) or type(penalty).build is Penalty.build:
            continue
        owner = penalty._owner() if penalty._owner is not None else None
        if owner is distiller.student:
            continue
        if penalty._owner is not None:
            raise ValueError(
                f"The penalty `{penalty.name}` was built for another student. Make a new one for "
                "each distiller."
            )
        if not distiller.student.built:
            raise ValueError(
                f"The penalty `{penalty.name}` reads the weights of the student "
                f"`{distiller.student.name}`, which has none yet. Call the student on a batch "
                "before `compile`."
            )
        penalty.build(distiller)
        penalty._owner = weakref.ref(distiller.student)
    made = [PenaltyTerm(penalty, others) for penalty in penalties]
    for term in made:
        hooks.require_own_memory(
            f"The penalty `{term.name}`", term.it, term.kept, distiller.student
        )
    return made


class OfPenalty:
    """A penalty as a term of the objective.

    Args:
        term: The penalty with its weight.
        distiller: What it is a term of.
    """

    def __init__(self, term: PenaltyTerm, distiller: hooks.Trained) -> None:
        self.name = term.name
        self._term = term
        self._distiller = distiller

    @property
    def weight(self) -> Any:
        """What multiplies it, a `keras.Variable`."""
        return self._term.weight

    def value(self, seen: Seen) -> Value:
        """What the penalty is worth."""
        for variable, value in seen.lent:
            # Where the compiled step of JAX would take the teacher's weights for constants.
            variable.assign(value)
        return Value(self._term.value(self._distiller, seen.for_hooks(), seen.counted))


def _variable(weight: float | keras.Variable, name: str) -> Any:
    _require_weight(weight, name)
    if isinstance(weight, keras.Variable):
        return weight
    return keras.Variable(
        float(weight), trainable=False, dtype="float32", autocast=False, name="weight"
    )


def _require_weight(weight: Any, name: str) -> None:
    variable = isinstance(weight, keras.Variable)
    number = checks.is_number(weight)
    if not number and not (variable and tuple(weight.shape) == ()):
        raise TypeError(
            f"The `weight` of the penalty `{name}` is a number or a scalar `keras.Variable`. "
            f"Received: weight={weight!r}."
        )
    if number and not 0 <= weight < math.inf:
        raise ValueError(
            f"The `weight` of the penalty `{name}` is finite and not negative. Received: "
            f"weight={weight!r}."
        )


def _snake_case(name: str) -> str:
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().strip("_")
