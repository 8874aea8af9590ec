"""The masks that Keras attaches to tensors, read and attached through public doors."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_kd.utils.types import Tensor


def keras_mask(tensor: Tensor) -> Tensor:
    """The boolean mask that Keras attached to `tensor`, or `None`."""
    if _takes_no_attributes():
        return _layers()[0](tensor)
    return getattr(tensor, "_keras_mask", None)


def with_keras_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor`, carrying `mask` where there is one."""
    if mask is None:
        return tensor
    if _takes_no_attributes():
        return _layers()[1](tensor, mask=mask)
    tensor._keras_mask = mask
    return tensor


def with_joint_mask(tensor: Tensor, sources: Iterable[Tensor]) -> Tensor:
    """`tensor`, carrying what the masks of all sources leave over, where they have some."""
    joint = None
    for mask in map(keras_mask, sources):
        if mask is not None:
            joint = mask if joint is None else ops.logical_and(joint, mask)
    return with_keras_mask(tensor, joint)


def remasked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Another tensor of the same numbers that carries `mask`, or none; the one given stays."""
    if keras.config.backend() == "torch":
        # A view, where a copy would take the memory of it.
        return with_keras_mask(tensor.view_as(tensor), mask)
    return with_keras_mask(ops.copy(tensor), mask)


def _takes_no_attributes() -> bool:
    """Whether tensors of this backend are arrays of JAX, to which nothing can be attached.

    Keras keeps a private table for those. What it shows of it are the masks
    that it hands to a layer, and those that a layer passes on.
    """
    return keras.config.backend() == "jax"


_LAYERS: list[Any] = []


def _layers() -> list[Any]:
    """One layer that returns the mask it is given, one that passes its input on with it."""
    if not _LAYERS:

        class Read(keras.layers.Layer):
            def call(self, inputs: Tensor, mask: Tensor = None) -> Tensor:
                return mask

        class Attach(keras.layers.Layer):
            def call(self, inputs: Tensor, mask: Tensor = None) -> Tensor:
                return inputs

        _LAYERS.extend((Read(autocast=False), Attach(autocast=False)))
        for layer in _LAYERS:
            # Without it Keras warns that the mask ends here.
            layer.supports_masking = True
    return _LAYERS
