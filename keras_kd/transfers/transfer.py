"""What a loss reads on either side, through which projector, and with what weight."""

import math
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import keras
from keras import ops

from keras_kd.losses import counts
from keras_kd.losses.base import DistillationLoss, owns_layers
from keras_kd.losses.counts import Counted, joint_mask
from keras_kd.models.graph import copy_built, copy_layer
from keras_kd.transfers import compatibility, projectors
from keras_kd.utils.masks import keras_mask, remasked
from keras_kd.utils.types import Loss, Shape, Shapes, Tensor

Taps = str | list[str] | None

_ALL = Counted()


@keras.saving.register_keras_serializable(package="keras_kd")
class Transfer(keras.layers.Layer):
    """A loss between a tensor of the teacher and a tensor of the student.

    `weight * loss(teacher tensor, projector(student tensor))`, summed with the
    other transfers into the distillation loss.

    Args:
        loss: A loss of `keras_kd.losses`, any `keras.losses.Loss`, or a
            callable `fn(teacher, student)` that returns one value per sample.
        teacher: Path of the teacher's layer, `"block3"` or
            `"backbone/block3"`, optionally with `":input"`, `":preactivation"`,
            and on attention layers `":query"`, `":key"`, `":value"`,
            `":scores"`; a list of paths for losses that read several layers.
            `None` reads the final output.
        student: The same for the student.
        projector: `None`; `"auto"`, chosen from the shapes; `"linear"`, a
            learned `z = Wx + b` over the last axis; `"conv"`, `"pool"`,
            `"tokens"` or `"mlp"`, as in `keras_kd.transfers.projectors.make`; or a
            layer. Of several layers each gets a projector of its own, to the
            teacher's layer in the same place. It trains with the student and
            stays out of it.
        weight: Non-negative float, dimensionless; live as `transfer.weight`.
        name: Name in the logs. Defaults to the name of the loss, which `compile`
            numbers where several transfers have it: `hint`, `hint_1`.

    Raises:
        ValueError: If `weight` is negative or not finite.
        TypeError: If `loss`, a path or `projector` is of another type.

    Examples:
        >>> transfer = Transfer(
        ...     keras_kd.losses.Hint(), teacher="block3", student="block2",
        ...     projector="linear", weight=100.0,
        ... )
        >>> transfer.name
        'hint'

    Reference:
        - [Romero et al., 2015](https://arxiv.org/abs/1412.6550), section 2.2
    """

    def __init__(
        self,
        loss: Loss,
        teacher: Taps = None,
        student: Taps = None,
        projector: str | keras.layers.Layer | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        if isinstance(loss, type):
            loss = compatibility.keras_loss(loss)
        if not callable(loss):
            raise TypeError(
                f"`loss` of a transfer is a loss of `keras_kd.losses`, a `keras.losses.Loss` or a "
                f"function. Received: loss={loss!r}."
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"`weight` of a transfer is finite and not negative. Received: weight={weight!r}."
            )
        for side, taps in (("teacher", teacher), ("student", student)):
            listed = taps if isinstance(taps, list | tuple) else [taps]
            if not all(isinstance(tap, str) or (tap is None and taps is None) for tap in listed):
                raise TypeError(
                    f"`{side}` of a transfer is a layer's path, a list of paths or None. "
                    f"Received: {side}={taps!r}."
                )
        if projector is not None and not isinstance(projector, str | keras.layers.Layer):
            raise TypeError(
                "`projector` of a transfer is None, 'auto', another kind by name, or a layer. "
                f"Received: projector={projector!r}."
            )
        if isinstance(projector, str):
            projectors.require_kind(projector)
        super().__init__(name=name or _name_of(loss), autocast=False)
        self.named = bool(name)
        self.loss: Any = loss
        self.teacher = list(teacher) if isinstance(teacher, list | tuple) else teacher
        self.student = list(student) if isinstance(student, list | tuple) else student
        self.projector = projector
        self.weight = keras.Variable(
            weight, trainable=False, dtype="float32", autocast=False, name="weight"
        )
        self.projection: Any = None
        self.loss_layers: list[Any] = []

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Make the projector and what the loss learns.

        Args:
            teacher_shape: Shape of what is read from the teacher.
            student_shape: Shape of what is read from the student.

        Raises:
            ValueError: If no projector joins the shapes.
        """
        self._shapes = {"teacher_shape": teacher_shape, "student_shape": student_shape}
        if self.projector is not None:
            self.projection, student_shape = self._joined(teacher_shape, student_shape)
        if isinstance(self.loss, DistillationLoss):
            if not self.loss.built:
                self.loss.build(teacher_shape, student_shape)
            # Held here so that Keras trains and saves them with the distiller.
            self.loss_layers = list(self.loss.layers)
        self.built = True

    def _joined(self, teacher_shape: Any, student_shape: Any) -> tuple[Any, Any]:
        """The projector, one a layer for several layers, and the shapes behind it."""
        if isinstance(teacher_shape, tuple) and isinstance(student_shape, tuple):
            made: Any = (
                projectors.make(self.projector, teacher_shape, student_shape, self.name)
                if isinstance(self.projector, str)
                else self.projector
            )
            if not made.built:
                made.build(student_shape)
            return made, tuple(made.compute_output_shape(student_shape))
        several = isinstance(teacher_shape, list) and isinstance(student_shape, list)
        if not several or len(teacher_shape) != len(student_shape):
            raise ValueError(
                f"`projector` of transfer `{self.name}` joins one layer with one layer, or as many "
                f"with as many. Received: teacher={self.teacher!r}, student={self.student!r}."
            )
        if not isinstance(self.projector, str):
            kinds = ", ".join(map(repr, projectors.PROJECTORS))
            raise ValueError(
                f"`projector` of transfer `{self.name}` is one layer, and several layers are read. "
                f"Name a kind, so that each gets its own: {kinds}."
            )
        pairs = [self._joined(*pair) for pair in zip(teacher_shape, student_shape)]
        return [layer for layer, _ in pairs], [shape for _, shape in pairs]

    @property
    def reads_logits(self) -> bool:
        """Whether the loss compares class logits."""
        return isinstance(self.loss, DistillationLoss) and self.loss.reads_logits

    @property
    def compares(self) -> str | None:
        """What the loss takes outputs for (`keras_kd.models.meaning`); `None` for other tensors."""
        loss = self.loss
        return loss.compares if isinstance(loss, DistillationLoss) and loss.reads_logits else None

    def call(
        self,
        teacher: Tensor,
        student: Tensor,
        counted: Counted = _ALL,
        labels: Tensor = None,
        indices: Tensor = None,
        temperature: Tensor = None,
        training: bool = False,
    ) -> Tensor:
        """Compute the loss, not yet multiplied by `weight`.

        Args:
            teacher: What was read from the teacher.
            student: What was read from the student, before the projector.
            counted: What counts of the output, whose positions are those of inner layers where
                these have as many; elsewhere samples count whole, and weigh the mean of theirs.
            labels: Hard labels of the batch.
            indices: `(batch,)` row numbers in the data.
            temperature: The distiller's.
            training: Whether the student is being trained.

        Returns:
            A scalar.
        """
        # Taken before the projector, which may lose it.
        mask = joint_mask(teacher, student)
        if isinstance(self.projection, list):
            student = [layer(self._wide(s)) for layer, s in zip(self.projection, student)]
        elif self.projection is not None:
            student = self.projection(self._wide(student))
        mask, sample_weight = self._at(counted, mask, teacher, student)
        return compared(
            self.loss,
            teacher,
            student,
            mask,
            sample_weight,
            labels=labels,
            indices=indices,
            temperature=temperature,
            training=training,
        )

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        """What a projector reads: float32 in place of halves."""
        double = keras.backend.standardize_dtype(tensor.dtype) == "float64"
        return ops.cast(tensor, "float64" if double else "float32")

    def _at(
        self, counted: Counted, mask: Tensor, teacher: Tensor, student: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mask and the weights of what is compared, by the Keras mask that it has of its own.

        Args:
            counted: What counts of the output.
            mask: The Keras mask of what is compared, or `None`.
            teacher: What is compared.
            student: The same, behind the projector.
        """
        own, weight = counted
        tensors = [*keras.tree.flatten(teacher), *keras.tree.flatten(student)]
        at = [_positions(self.loss, tensor, mask) for tensor in tensors]

        def lies_here(given: Tensor) -> bool:
            return all(counts.fits(given, positions) for positions in at)

        if weight is not None and not lies_here(weight):
            weight = counts.per_value(weight, own, 1)
        if own is None:
            return mask, weight
        own = own if lies_here(own) else counts.rows_of(own)
        if len(own.shape) > 1 and self.teacher is None and self.student is None:
            # The Keras masks of the outputs are in it.
            return own, weight
        if len(own.shape) > 1 and isinstance(self.loss, DistillationLoss):
            return self.loss.joined(mask, own, keras.tree.flatten(student)[0]), weight
        return counts.both(mask, own), weight

    def fresh(self) -> "Transfer":
        """Make a transfer with the same arguments for another pair of models.

        Returns:
            A transfer that has learned nothing; a projector that was given
            with weights is copied with them.
        """
        projector: Any = self.projector
        if isinstance(projector, keras.layers.Layer):
            given = projector.built and not self.built
            projector = copy_built(projector) if given else copy_layer(projector)
        return type(self)(
            fresh_loss(self.loss),
            self.teacher,
            self.student,
            projector,
            float(ops.convert_to_numpy(self.weight)),
            self.name,
        )

    def _learners(self) -> list[Any]:
        """What learns for one pair of models: a loss with layers, and what has the projector."""
        found = [self.loss] if owns_layers(self.loss) else []
        if self.projector is not None:
            found.append(self if isinstance(self.projector, str) else self.projector)
        return found

    def require_free(self, owner: object) -> None:
        """Raise `ValueError` if another owner trains what this transfer would train."""
        if any(_OWNERS.get(learner, owner) is not owner for learner in self._learners()):
            raise ValueError(
                f"The transfer `{self.name}` has a projector or a loss that another distiller "
                "trains, which would be shared between the two. Make a transfer for each, "
                "`transfer.fresh()` or a new one with a loss of its own."
            )

    def claim(self, owner: object) -> None:
        """Leave what this transfer trains to one owner."""
        for learner in self._learners():
            _OWNERS[learner] = owner

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this transfer."""
        projector: Any = self.projector
        if isinstance(projector, keras.layers.Layer):
            projector = keras.saving.serialize_keras_object(projector)
        return {
            "name": self.name,
            "loss": keras.saving.serialize_keras_object(self.loss),
            "teacher": self.teacher,
            "student": self.student,
            "projector": projector,
            "weight": float(ops.convert_to_numpy(self.weight)),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Transfer":
        """Rebuild a transfer."""
        config = dict(config)
        config["loss"] = keras.saving.deserialize_keras_object(config["loss"])
        if isinstance(config["projector"], dict):
            config["projector"] = keras.saving.deserialize_keras_object(config["projector"])
        return cls(**config)

    def get_build_config(self) -> dict[str, Any] | None:
        """Return the shapes the transfer was built for."""
        return self._shapes if self.built else None

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Build the transfer for saved shapes."""
        self.build(*(_as_shapes(config[side]) for side in ("teacher_shape", "student_shape")))


def _positions(loss: Loss, tensor: Tensor, mask: Tensor) -> Shape:
    """The shape `(batch, ..., positions)` of what a loss compares.

    Args:
        loss: The loss.
        tensor: What it reads.
        mask: The Keras mask of that; one of entries tells no positions apart.
    """
    shape = tuple(tensor.shape)[:-1]
    own = loss.positions(tensor) if isinstance(loss, DistillationLoss) else shape
    of_entries = mask is not None and len(mask.shape) == len(tensor.shape)
    return shape[:1] if of_entries and own == shape else own


# By what is trained, since a loss or a projector may stand in several transfers.
_OWNERS: MutableMapping[Any, object] = weakref.WeakKeyDictionary()


def fresh_loss(loss: keras.losses.Loss) -> Any:
    """A loss that has learned nothing: the loss itself, or one like it where it owns layers."""
    return type(loss).from_config(loss.get_config()) if owns_layers(loss) else loss


class _FunctionLoss(keras.losses.Loss):
    """A function of one value per sample, weighted and averaged by Keras."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(name=_name_of(function))
        self.function = function

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        tensors = ops.is_tensor(y_true) and ops.is_tensor(y_pred)
        if tensors and len(y_true.shape) + 1 == len(y_pred.shape) and y_pred.shape[-1] == 1:
            # `(batch,)` beside `(batch, 1)` would be broadcast to all pairs.
            y_true = ops.expand_dims(y_true, -1)
        return self.function(y_true, y_pred)


def compared(
    loss: Loss,
    teacher: Tensor,
    student: Tensor,
    mask: Tensor,
    sample_weight: Tensor,
    **context: Any,
) -> Tensor:
    """A loss between what was read on both sides.

    Args:
        loss: A loss of this package, of Keras or of the user, or a function.
        teacher: What was read from the teacher.
        student: The same from the student.
        mask: Boolean: which positions count, or `None` for all.
        sample_weight: `(batch,)` or `(batch, ..., positions)`, or `None`.
        **context: What losses of this package may read besides: labels and the like.

    Returns:
        A scalar.
    """
    if isinstance(loss, DistillationLoss):
        return loss(teacher, student, sample_weight, mask=mask, **context)
    return _of_others(loss, teacher, student, mask, sample_weight)


def _of_others(
    loss: keras.losses.Loss, teacher: Tensor, student: Tensor, mask: Tensor, sample_weight: Tensor
) -> Tensor:
    """A loss of Keras or of the user, weighted and reduced as one of this package is.

    Values of positions are left out by the mask. A value of a whole sample mixes its positions:
    those that do not count are zeros for it, and samples of which none counts have no value.
    """
    loss = averaged(loss)
    if type(loss).__call__ is not keras.losses.Loss.__call__:
        # It weighs and reduces in a way of its own.
        if mask is not None:
            teacher, student = counts.zeroed(teacher, mask), counts.zeroed(student, mask)
        return loss(teacher, student, sample_weight)

    def converted(tensor: Tensor) -> Tensor:
        return ops.convert_to_tensor(tensor, dtype=loss.dtype)

    def bare(tensor: Tensor) -> Tensor:
        # Keras's losses may hand the mask of what they read to their values.
        tensor = converted(tensor)
        return tensor if keras_mask(tensor) is None else remasked(tensor, None)

    teacher, student = keras.tree.map_structure(bare, (teacher, student))
    values = loss.call(teacher, student)
    own = keras_mask(values)
    values = converted(values)
    rank = len(values.shape)
    if rank == 0:
        return _Given(loss)(values, values, sample_weight)
    heavy = None if sample_weight is None else ops.not_equal(sample_weight, 0)
    mixed = [part for part in (mask, heavy) if part is not None and len(part.shape) > rank]
    if mixed:
        for part in mixed:
            teacher, student = counts.zeroed(teacher, part), counts.zeroed(student, part)
        values = converted(loss.call(teacher, student))
    acting = counts.rows_of(mask) if mask is not None and len(mask.shape) > rank else mask
    weight = counts.per_value(sample_weight, mask, rank)
    return counts.reduced(
        values, weight, counts.both(acting, own), loss.reduction, loss.name, loss.dtype
    )


class _Given(keras.losses.Loss):
    """Keras's reduction of one number for the whole batch."""

    def __init__(self, loss: keras.losses.Loss) -> None:
        super().__init__(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return y_pred


def averaged(loss: keras.losses.Loss) -> Any:
    """A loss that weighs its samples and returns their mean, made of a function if it is one.

    Args:
        loss: A `keras.losses.Loss`, or `fn(y_true, y_pred)` that returns one
            value per sample.

    Returns:
        The loss itself, or one around the function.
    """
    return loss if isinstance(loss, keras.losses.Loss) else _FunctionLoss(loss)


def _name_of(loss: Loss) -> str:
    """The name of a loss or function, `lambda` for one without."""
    name = getattr(loss, "name", None) or getattr(loss, "__name__", None) or type(loss).__name__
    return str(name).strip("<>_")


def _as_shapes(saved: Any) -> Any:
    """Shapes as JSON keeps them, back as tuples."""
    if saved and isinstance(saved[0], list | tuple):
        return [tuple(shape) for shape in saved]
    return tuple(saved)
