"""What the tests of the losses share: the folder on the path, and gradients on every backend."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

# The NumPy formulas lie beside the tests and are no installed package.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    """JAX computes in float64 only where it is asked to."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def _gradient(function: Callable[..., Any], structure: Any) -> Any:
    """Gradients of a scalar function of tensors; zeros where it does not depend on them."""
    leaves = keras.tree.flatten(structure)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tensors = [tf.convert_to_tensor(leaf) for leaf in leaves]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(keras.tree.pack_sequence_as(structure, tensors))
        found = tape.gradient(value, tensors)
    elif backend == "jax":
        import jax
        import jax.numpy as jnp

        tensors = [jnp.asarray(leaf) for leaf in leaves]
        found = jax.grad(
            lambda flat: function(keras.tree.pack_sequence_as(structure, flat)),
        )(tensors)
    else:
        import torch

        tensors = [
            keras.ops.convert_to_tensor(leaf).detach().clone().requires_grad_() for leaf in leaves
        ]
        value = function(keras.tree.pack_sequence_as(structure, tensors))
        if not value.requires_grad:
            return keras.tree.map_structure(np.zeros_like, structure)
        found = torch.autograd.grad(value, tensors, allow_unused=True)
    arrays = [
        np.zeros(leaf.shape)
        if gradient is None
        else keras.ops.convert_to_numpy(keras.ops.cast(gradient, "float64"))
        for gradient, leaf in zip(found, leaves)
    ]
    return keras.tree.pack_sequence_as(structure, arrays)


@pytest.fixture
def gradient() -> Callable[..., Any]:
    """`gradient(function, tensors)`: NumPy gradients of a scalar function."""
    return _gradient
