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
    return _evaluated(function, structure)[1]


def _evaluated(function: Callable[..., Any], structure: Any, run: Any = None) -> tuple[Any, Any]:
    """The values of a function of tensors, and the gradients of their sum."""
    leaves = keras.tree.flatten(structure)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tensors = [tf.convert_to_tensor(leaf) for leaf in leaves]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            values = function(keras.tree.pack_sequence_as(structure, tensors))
        found = tape.gradient(values, tensors)
    elif backend == "jax":
        import jax.numpy as jnp

        run = run or _differentiated(function, structure)
        found, values = run([jnp.asarray(leaf) for leaf in leaves])
    else:
        import torch

        tensors = [
            keras.ops.convert_to_tensor(leaf).detach().clone().requires_grad_() for leaf in leaves
        ]
        values = function(keras.tree.pack_sequence_as(structure, tensors))
        found = [None] * len(leaves)
        if values.requires_grad:
            found = torch.autograd.grad(values.sum(), tensors, allow_unused=True)
    arrays = [
        np.zeros(leaf.shape) if gradient is None else _numpy(gradient)
        for gradient, leaf in zip(found, leaves)
    ]
    return _numpy(values), keras.tree.pack_sequence_as(structure, arrays)


def _differentiated(function: Callable[..., Any], structure: Any) -> Callable[..., Any]:
    """On JAX: from the flat tensors to the gradients of the sum of the values, and the values."""
    import jax

    def summed(flat: Any) -> tuple[Any, Any]:
        values = function(keras.tree.pack_sequence_as(structure, flat))
        return values.sum(), values

    return jax.grad(summed, has_aux=True)


def _numpy(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float64"))


@pytest.fixture
def gradient() -> Callable[..., Any]:
    """`gradient(function, tensors)`: NumPy gradients of a scalar function."""
    return _gradient


@pytest.fixture
def compiled() -> Callable[..., Any]:
    """`compiled(function, like)(tensors)`: NumPy values, and the gradients of their sum.

    JAX compiles operation by operation unless it is given them together, and that is most of the
    time that a small loss takes.
    """

    def compile(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
        run = None
        if keras.backend.backend() == "jax":
            import jax

            run = jax.jit(_differentiated(function, like))
        return lambda structure: _evaluated(function, structure, run)

    return compile
