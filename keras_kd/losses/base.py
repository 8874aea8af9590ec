"""What every distillation loss shares: temperature, labels, masks and Keras's own reduction."""

import copy
import math
from typing import Any, ClassVar, Self

import keras
from keras import ops

from keras_kd.losses.temperatures import AdaptiveTemperature
from keras_kd.masks import keras_mask
from keras_kd.typing import Shape, Tensor


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
    temperature around one, never `None`; `self.labels`, `self.indices`,
    `self.mask` and `self.training` are what the caller gave.

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

    reads_indices: bool = False
    """Whether `call` needs `self.indices`, the row numbers of the batch in the data."""

    single_layer: bool = False
    """Whether `call` compares one tensor with one, so that lists of layers are refused."""

    per_position: ClassVar[bool] = False
    """Whether `call` returns one value per token or pixel, on which a mask acts.

    Elsewhere the masked positions of both tensors are set to zero instead.
    """

    labels: Tensor = None
    indices: Tensor = None
    mask: Tensor = None
    training: bool = False

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if temperature is not None and not isinstance(temperature, AdaptiveTemperature):
            require_positive("temperature", temperature)
        self.temperature = temperature
        self.built = False

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Create what the loss learns or remembers; called once, before the first batch.

        Args:
            teacher_shape: Shape of the teacher's tensor, or a list of them.
            student_shape: Shape of the student's tensor, or a list of them.
        """
        self.built = True

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
            sample_weight: `(batch,)` or the shape of the values.
            labels: Hard labels, for the losses that read them.
            indices: `(batch,)` row numbers in the data, for the losses with a memory.
            mask: Boolean `(batch, ..., positions)`, `False` where padded; or with
                as many axes as the tensors, for their entries. Defaults to the
                Keras masks that the tensors carry.
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
            bound = copy.copy(self)
            bound.labels, bound.indices, bound.training = labels, indices, training
            bound.temperature = _in_force(self.temperature, temperature)
            bound.mask = mask
            acting = None
            if mask is not None:
                acting = self.mask_of_values(mask, keras.tree.flatten(student)[0])
                if acting is None:
                    teacher, student = zeroed(teacher, mask), zeroed(student, mask)
            values = bound.call(teacher, student)
        weight = _weight(values, sample_weight, acting, self.reduction, self.name)
        # A loss in half may compute its values in float32; their sum is one too, then.
        dtype = keras.backend.result_type(values.dtype, self.dtype)
        reduced = _Reduction(self.name, self.reduction, dtype)(values, values, weight)
        return _narrowed(reduced, self.dtype)

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

    def bound(self, **context: Any) -> Self:
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
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction=reduction, name=name, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        config = super().get_config()
        del config["temperature"]
        return config


def owns_layers(loss: Any) -> bool:
    """Whether a loss brings layers: it learns or remembers for one pair of models alone."""
    return isinstance(loss, DistillationLoss) and type(loss).layers is not DistillationLoss.layers


def _in_force(own: Any, given: Tensor) -> Any:
    """The temperature of one evaluation: the loss's own, else the one given, else 1."""
    given = 1.0 if given is None else given
    if isinstance(own, AdaptiveTemperature):
        return own.around(given)
    return given if own is None else own


class _Reduction(keras.losses.Loss):
    """Keras's own weighting and reduction of values that are already computed."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return y_pred


def _narrowed(value: Tensor, dtype: str) -> Tensor:
    """`value` in this dtype; what is too large for float16 becomes its largest number."""
    if keras.backend.standardize_dtype(value.dtype) == dtype:
        return value
    if dtype == "float16":
        # The bound leaves the gradient as it is.
        value = value + ops.stop_gradient(ops.clip(value, -65504.0, 65504.0) - value)
    return ops.cast(value, dtype)


def _tensors(value: Tensor, dtype: str) -> Tensor:
    """`value` as one tensor, or as the structure of tensors that it is."""

    def convert(tensor: Tensor) -> Tensor:
        return ops.convert_to_tensor(tensor, dtype=dtype)

    numbers = all(isinstance(leaf, (int, float)) for leaf in keras.tree.flatten(value))
    # Nested lists of plain numbers are one tensor; a list of arrays is several.
    return convert(value) if numbers else keras.tree.map_structure(convert, value)


def joint_mask(teacher: Tensor, student: Tensor) -> Tensor:
    """Positions that are valid on both sides; the student's where the shapes differ."""
    masks = [
        next((m for m in map(keras_mask, keras.tree.flatten(side)) if m is not None), None)
        for side in (student, teacher)
    ]
    found = [mask for mask in masks if mask is not None]
    if len(found) == 2 and len(found[0].shape) == len(found[1].shape):
        same = all(a in (b, None) or b is None for a, b in zip(*(m.shape for m in found)))
        if same:
            return ops.logical_and(*found)
    return found[0] if found else None


def _weight(
    values: Tensor, sample_weight: Tensor, mask: Tensor, reduction: str | None, name: str
) -> Tensor:
    """Sample weights in the shape of the values; padded positions count for nothing."""
    weight = None
    if mask is not None:
        # Counts past 65504 overflow in float16.
        dtype = keras.backend.standardize_dtype(values.dtype)
        precise = "float64" if dtype == "float64" else "float32"
        weight = ops.cast(_aligned("mask", mask, values, name), precise)
        if reduction in ("mean", "sum_over_batch_size"):
            # The mean divides by all positions; the valid ones make up for it.
            total = ops.cast(ops.size(weight), precise)
            weight = weight * (total / ops.maximum(ops.sum(weight), 1.0))
        weight = ops.cast(weight, values.dtype)
    if sample_weight is not None:
        given = ops.convert_to_tensor(sample_weight, dtype=values.dtype)
        given = _aligned("sample_weight", given, values, name)
        weight = given if weight is None else given * weight
    # Broadcast, so that "mean_with_sample_weight" divides by the weight of every value.
    return None if weight is None else weight * ops.ones_like(values)


def _aligned(argument: str, tensor: Tensor, values: Tensor, name: str) -> Tensor:
    """`tensor` with as many axes as the values: trailing axes of one added or taken away."""
    tensor = ops.convert_to_tensor(tensor)
    rank = len(values.shape)
    while len(tensor.shape) > rank and tensor.shape[-1] == 1:
        tensor = ops.squeeze(tensor, -1)
    if len(tensor.shape) > rank or any(
        a not in (None, 1) and b not in (None, 1) and a != b
        for a, b in zip(tensor.shape, values.shape)
    ):
        raise ValueError(
            f"`{name}` gives values of shape {tuple(values.shape)}. Received: {argument} of shape "
            f"{tuple(tensor.shape)}. Pass one number a sample, or one a value."
        )
    while len(tensor.shape) < rank:
        tensor = ops.expand_dims(tensor, -1)
    return tensor


def zeroed(tensors: Tensor, mask: Tensor) -> Tensor:
    """Set the masked positions to zero in every tensor that has the mask's axes."""

    def zero(tensor: Tensor) -> Tensor:
        rank = len(mask.shape)
        # A mask of entries has one of an axis for all, as of the heads of attention.
        alike = (None, 1) if len(tensor.shape) == rank else (None,)
        if len(tensor.shape) < rank or any(
            a is not None and b not in alike and a != b
            for a, b in zip(tensor.shape[:rank], mask.shape)
        ):
            return tensor
        keep = mask
        while len(keep.shape) < len(tensor.shape):
            keep = ops.expand_dims(keep, -1)
        return ops.where(keep, tensor, ops.zeros_like(tensor))

    return keras.tree.map_structure(zero, tensors)


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
