"""What every distillation loss shares: temperature, labels, masks and Keras's own reduction."""

import copy
import math
from typing import Any, ClassVar, Self

import keras
from keras import ops

from keras_kd.losses import counts
from keras_kd.losses.counts import joint_mask
from keras_kd.losses.temperatures import AdaptiveTemperature
from keras_kd.models import meaning
from keras_kd.utils.types import DType, Shape, Shapes, Tensor


def require_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a positive, finite number."""
    if not 0 < value < math.inf:
        raise ValueError(
            f"`{name}` must be positive and finite. Received: {name}={value!r}. "
            "Pass a number above 0."
        )


def require_weights(**weights: float) -> None:
    """Raise `ValueError` unless every weight is finite and not negative."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"`{name}` is a weight: finite and not negative. Received: {name}={weight!r}."
            )


class DistillationLoss(keras.losses.Loss):
    """Compares teacher tensors with student tensors: one value per sample.

    A subclass implements `call(y_true, y_pred)` and returns values of shape
    `(batch,)`, or `(batch, ..., positions)` where it compares tokens or
    pixels one by one. Keras then applies sample weights, masks and the
    reduction.

    While `call` runs, `self` is a copy that holds the context of this one
    evaluation: `self.temperature` is a number, a live variable or an adaptive
    temperature around one, never `None`; `self.labels`, `self.indices` and
    `self.training` are what the caller gave. `self.mask` tells which positions
    count and `self.rows` which samples, `None` where all do: where no mask
    leaves them out and their weight is not 0. A loss that compares positions or
    samples with one another looks at no others.

    Args:
        temperature: Positive float, dimensionless. `None` follows the
            distiller's live temperature; outside a distiller it is 1. `FLSW`
            or `CWSM` gives every sample one of its own.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: As in `keras.losses.Loss`: the precision of what is returned, and of the
            computation, which is in float32 where this is float16 or bfloat16.

    Raises:
        ValueError: If `temperature` is not positive and finite.
    """

    reads_labels: ClassVar[bool] = False
    """Whether `call` needs `self.labels`, the hard labels of the batch."""

    softens: ClassVar[bool] = True
    """Whether `call` reads `self.temperature`, which the logs then show."""

    reads_logits: ClassVar[bool] = False
    """Whether the tensors compared are class logits, so that probabilities are turned back."""

    compares: ClassVar[str] = meaning.VALUES
    """What the loss takes outputs for: `meaning.CLASSES` or `INDEPENDENT` units, of which it reads
    distributions, or `VALUES` as they are, which a regression has too."""

    reads_indices: bool = False
    """Whether `call` needs `self.indices`, the row numbers of the batch in the data."""

    samples: int | None = None
    """How many rows of the data the loss remembers, where it remembers them."""

    single_layer: bool = False
    """Whether `call` compares one tensor with one, so that lists of layers are refused."""

    per_position: ClassVar[bool] = False
    """Whether `call` returns one value per token or pixel, on which a mask acts.

    Elsewhere the positions of both tensors that do not count are set to zero, and samples
    of which none counts have no value.
    """

    labels: Tensor = None
    indices: Tensor = None
    mask: Tensor = None
    rows: Tensor = None
    training: bool = False

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if temperature is not None and not isinstance(temperature, AdaptiveTemperature):
            require_positive("temperature", temperature)
        self.temperature = temperature
        self.built = False

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Create what the loss learns or remembers; called once, before the first batch.

        Args:
            teacher_shape: Shape of the teacher's tensor, or a list of them.
            student_shape: Shape of the student's tensor, or a list of them.
        """
        self.built = True

    def require_alike(self, teacher: Tensor, student: Tensor) -> None:
        """Raise `ValueError` for tensors that would be spread over one another.

        Every row of one side is compared with the same row of the other. What a compiled step does
        not know of a shape is not looked at.

        Args:
            teacher: A tensor, or a list of them, in every call as `call` reads it.
            student: The same.
        """
        shapes = [tuple(each.shape) for each in keras.tree.flatten([teacher, student])]
        rows = {shape[0] for shape in shapes if shape} - {None}
        if len(rows) > 1:
            raise ValueError(
                f"`{self.name}` compares the same rows on both sides. Received: teacher "
                f"{_shapes(teacher)}, student {_shapes(student)}. Pass both sides of one batch."
            )

    def converted(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides as `call` reads them: tensors of the loss's own precision.

        In float32 where that is a half: squares past 65504 overflow in float16, and so do
        their gradients, although those of the features themselves need not.

        Args:
            teacher: What the loss was called with: a tensor, an array, or a list of them.
            student: The same.

        Returns:
            Tensors, in the structures given.
        """
        return _tensors(teacher, self.computed_in), _tensors(student, self.computed_in)

    @property
    def computed_in(self) -> str:
        """The dtype of the computation: that of the loss, or float32 where that is a half."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """Layers that the loss owns; the transfer trains and saves them. None by default."""
        return []

    def __call__(
        self,
        y_true: Tensor,
        y_pred: Tensor,
        sample_weight: Tensor = None,
        *,
        labels: Tensor = None,
        indices: Tensor = None,
        mask: Tensor = None,
        temperature: Tensor = None,
        training: bool = False,
    ) -> Tensor:
        """Compute the loss.

        Args:
            y_true: The teacher's tensor, or a list of them.
            y_pred: The student's tensor, or a list of them.
            sample_weight: `(batch,)`, or `(batch, ..., positions)`, which a loss
                of one value a sample reads as their mean. What weighs 0 is in no
                relation to anything else.
            labels: Hard labels, for the losses that read them.
            indices: `(batch,)` row numbers in the data, for the losses with a memory.
            mask: Boolean `(batch, ..., positions)` or `(batch,)`, `False` where
                padded; or with as many axes as the tensors, for their entries.
                Defaults to the Keras masks that the tensors carry.
            temperature: Used where the loss has none of its own.
            training: Whether losses with a memory may update it.

        Returns:
            A scalar, or the values where `reduction` is `None`.

        Raises:
            ValueError: If the loss reads labels and none are given, or weights or a mask do not
                fit the values.
        """
        if self.reads_labels and labels is None:
            raise ValueError(
                f"`{self.name}` reads the hard labels and got none. Pass `labels=`, "
                "or give the distiller labelled data."
            )
        if mask is None:
            mask = joint_mask(y_true, y_pred)
        with keras.name_scope(self.name):
            teacher, student = self.converted(y_true, y_pred)
            teacher = keras.tree.map_structure(ops.stop_gradient, teacher)
            if not self.built:
                self.build(_shapes(teacher), _shapes(student))
            self.require_alike(teacher, student)
            bound = copy.copy(self)
            bound.labels, bound.indices, bound.training = labels, indices, training
            bound.temperature = _in_force(self.temperature, temperature)
            first = keras.tree.flatten(student)[0]
            if mask is not None and len(mask.shape) == len(first.shape):
                mask = ops.squeeze(mask, -1) if mask.shape[-1] == 1 else mask
            if sample_weight is not None:
                sample_weight = counts.without_ones(ops.convert_to_tensor(sample_weight))
            bound.mask, bound.rows = self._looked_at(mask, sample_weight, first)
            if bound.mask is not None and self.mask_of_values(bound.mask, first) is None:
                teacher = counts.zeroed(teacher, bound.mask)
                student = counts.zeroed(student, bound.mask)
            values = bound.call(teacher, student)
            acting = mask
            if mask is not None and len(mask.shape) > 1:
                acting = self.mask_of_values(mask, first)
                acting = counts.rows_of(mask) if acting is None else acting
            if sample_weight is not None and counts.fits(sample_weight, self.positions(first)):
                sample_weight = self.weight_of_values(sample_weight, mask, len(values.shape))
        # A loss in half may compute its values in float32; their sum is one too, then.
        return counts.reduced(values, sample_weight, acting, self.reduction, self.name, self.dtype)

    def _looked_at(self, mask: Tensor, weight: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """`self.mask` and `self.rows` of one evaluation."""
        heavy = None if weight is None else ops.not_equal(weight, 0)
        if heavy is not None and not counts.fits(heavy, self.positions(student)):
            # It is refused when it meets the values.
            heavy = None
        # What speaks of whole samples, and what of their positions.
        (mask_rows, mask), (heavy_rows, heavy) = _by_rank(mask), _by_rank(heavy)
        joined = self.joined(mask, heavy, student)
        of_joined = None if joined is None else counts.rows_of(joined)
        return joined, counts.both(counts.both(mask_rows, heavy_rows), of_joined)

    def positions(self, tensor: Tensor) -> Shape:
        """The shape `(batch, ..., positions)` of what a mask or weights may speak of.

        Args:
            tensor: The student's tensor, or the first of several.
        """
        return tuple(tensor.shape)[:-1]

    def joined(self, mask: Tensor, heavy: Tensor, student: Tensor) -> Tensor:
        """What is left of the positions by a mask and by weights.

        Args:
            mask: Boolean, of the positions or of the entries of the tensors, or `None`.
            heavy: Boolean, of the positions: whose weight is not 0; or `None`.
            student: The student's tensor, or the first of several.

        Returns:
            Boolean, of the positions or entries, or `None`.
        """
        if mask is not None and len(mask.shape) == len(student.shape):
            return mask
        return counts.both(mask, heavy)

    def mask_of_values(self, mask: Tensor, student: Tensor) -> Tensor:
        """What a mask says of the values of this loss.

        Args:
            mask: Boolean, of the positions or of the entries of the tensors.
            student: The student's tensor, or the first of several.

        Returns:
            Boolean, in the shape of the values; `None` where they mix what the
            mask tells apart, and masked entries are set to zero instead.
        """
        of_entries = len(mask.shape) == len(student.shape) and mask.shape[-1] != 1
        return mask if self.per_position and not of_entries else None

    def weight_of_values(self, weight: Tensor, mask: Tensor, rank: int) -> Tensor:
        """What weights of positions say of the values of this loss.

        Args:
            weight: `(batch, ..., positions)`.
            mask: Boolean, of the positions or entries, or `None`.
            rank: How many axes the values have.

        Returns:
            Weights of the values.
        """
        return counts.per_value(weight, mask, rank)

    def counting(self, logits: Tensor) -> Tensor:
        """Which positions count, spread over all of them, while `call` runs.

        Args:
            logits: `(batch, ..., positions, classes)`.

        Returns:
            Boolean `(batch, ..., positions)`, or `None` where all count.
        """
        rank = len(logits.shape) - 1
        positional = self.mask is not None and len(self.mask.shape) <= rank
        found = counts.both(self.mask if positional else None, self.rows)
        if found is None:
            return None
        return ops.logical_and(
            counts.expanded(found, rank), ops.ones_like(logits[..., 0], dtype="bool")
        )

    def bound(self, **context: object) -> Self:
        """Return a copy in which the given context (`temperature=`, `labels=`, ...) is in force.

        For computing `call` alone, values before weights and reduction.
        """
        bound = copy.copy(self)
        for name, value in context.items():
            setattr(bound, name, value)
        bound.temperature = _in_force(bound.temperature, None)
        return bound

    def __copy__(self) -> Self:
        # Keras copies a loss by saving and loading it, which is slow and loses
        # the layers that it owns: a copy here shares them.
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        temperature: Any = self.temperature
        if isinstance(temperature, AdaptiveTemperature):
            temperature = keras.saving.serialize_keras_object(temperature)
        config = {**super().get_config(), "temperature": temperature}
        if self.dtype != keras.config.floatx():
            config["dtype"] = self.dtype
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild a loss."""
        if isinstance(config.get("temperature"), dict):
            temperature = keras.saving.deserialize_keras_object(config["temperature"])
            config = {**config, "temperature": temperature}
        return cls(**config)


class FeatureLoss(DistillationLoss):
    """Base of the losses between features, which have no temperature.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.
    """

    softens: ClassVar[bool] = False

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction=reduction, name=name, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        config = super().get_config()
        del config["temperature"]
        return config


def owns_layers(loss: object) -> bool:
    """Whether a loss brings layers: it learns or remembers for one pair of models alone."""
    return isinstance(loss, DistillationLoss) and type(loss).layers is not DistillationLoss.layers


def _in_force(own: float | Tensor | None, given: Tensor) -> Any:
    """The temperature of one evaluation: the loss's own, else the one given, else 1."""
    given = 1.0 if given is None else given
    if isinstance(own, AdaptiveTemperature):
        return own.around(given)
    return given if own is None else own


def _by_rank(part: Tensor) -> tuple[Tensor, Tensor]:
    """A mask as one of samples and as one of positions, the other being `None`."""
    of_samples = part is not None and len(part.shape) == 1
    return (part, None) if of_samples else (None, part)


def _tensors(value: Tensor, dtype: str) -> Tensor:
    """`value` as one tensor, or as the structure of tensors that it is."""

    def convert(tensor: Tensor) -> Tensor:
        return ops.convert_to_tensor(tensor, dtype=dtype)

    numbers = all(isinstance(leaf, (int, float)) for leaf in keras.tree.flatten(value))
    # Nested lists of plain numbers are one tensor; a list of arrays is several.
    return convert(value) if numbers else keras.tree.map_structure(convert, value)


def _shapes(tensors: Tensor) -> Any:
    return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), tensors)


def last_axis_equal(teacher: Shape, student: Shape, loss: str, what: str = "units") -> None:
    """Raise `ValueError` unless the last axes agree."""
    if teacher[-1] != student[-1]:
        raise ValueError(
            f"`{loss}` compares the same number of {what} on both sides. Received: teacher "
            f"{tuple(teacher)}, student {tuple(student)}. Give the transfer a "
            '`projector="linear"`, or match layers of equal width.'
        )
