"""Names for what passes through the package and has no name of Keras's own.

Parameters say by them what they take: one tensor or a structure of tensors, one shape or several.
Type checkers see the classes of the backends that are installed; nothing is imported for it.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np

if TYPE_CHECKING:
    import jax
    import keras
    import tensorflow as tf
    import torch

    Tensor: TypeAlias = tf.Tensor | jax.Array | torch.Tensor | keras.KerasTensor | np.ndarray
    """A tensor of the active backend, a `KerasTensor`, or an array that `ops` converts."""

    Loss: TypeAlias = keras.losses.Loss | Callable[[Tensor, Tensor], Tensor]
    """A loss of Keras's, or a function of labels and outputs."""

    DType: TypeAlias = str | keras.DTypePolicy | None
    """The name of a type, a policy, or `None` for the one in force."""
else:
    Tensor = Loss = DType = Any

Array: TypeAlias = np.ndarray
"""An array of NumPy's."""

Tensors: TypeAlias = Tensor | Mapping[str, "Tensors"] | Sequence["Tensors"]
"""A tensor, or a dict, list or tuple of them: what a model takes and what it gives."""

Data: TypeAlias = Tensors | Iterable[Tensors]
"""What `fit` takes as `x`: arrays, or a dataset, a loader or a generator of batches."""

Losses: TypeAlias = str | Loss | Mapping[str, "Losses"] | Sequence["Losses"] | None
"""What `compile` takes as `loss`: a name, a loss, or a structure of them for several outputs."""

Shape: TypeAlias = tuple[int | None, ...]
"""The axes of a tensor; `None` where the size is open."""

Shapes: TypeAlias = Shape | Mapping[str, "Shapes"] | Sequence["Shapes"]
"""The shape of a tensor, or a dict, list or tuple of them."""

Logs: TypeAlias = dict[str, float] | None
"""What Keras hands to callbacks: figures by their names."""

PathLike: TypeAlias = str | os.PathLike[str]
"""A path as text or as an object."""


class StepOptions(TypedDict, total=False):
    """How `keras.Model.compile` is told to run a step."""

    run_eagerly: bool
    steps_per_execution: int | Literal["auto"]
    jit_compile: bool | Literal["auto"]
    auto_scale_loss: bool


class CompileOptions(StepOptions, total=False):
    """What `Distiller.compile` hands on to `keras.Model.compile`."""

    loss_weights: Sequence[float] | Mapping[str, float] | None
    weighted_metrics: Sequence[object] | Mapping[str, object] | None
