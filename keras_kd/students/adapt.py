"""Training few of a student's parameters: frozen layers and low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_kd.models import lora
from keras_kd.models.taps import find, sublayers


def freeze(student: keras.Model, train: Sequence[str] = ()) -> int:
    """Freeze a student but for a few layers.

    Frozen BatchNormalization runs in inference mode: its statistics stay, too.

    Args:
        student: Built model, changed in place, before it is compiled.
        train: Paths of the layers, blocks or nested models that go on training.

    Returns:
        How many parameters of the student train.

    Raises:
        ValueError: If the student is not built or a path names no layer.

    Examples:
        >>> freeze(student, train=["head"])
        170
    """
    _require_built(student)
    kept = _inside(student, train)
    student.trainable = True
    for layer in _leaves(student):
        layer.trainable = id(layer) in kept
    return _count(student)


def enable_lora(
    student: keras.Model,
    rank: int = 4,
    layers: Sequence[str] | None = None,
    train: Sequence[str] = (),
    alpha: float | None = None,
) -> int:
    """Freeze a student but for updates of low rank, `kernel + alpha / rank * A B`.

    A kernel of `a` inputs and `b` outputs trains `rank * (a + b)` numbers. The update begins at
    zero, so the student answers as before. All other weights are frozen, biases included.

    `Distiller.save` keeps the updates, and `keras_kd.load_distiller` goes on with them. In a file
    of the student alone Keras merges them into the kernels, and loads `A` and `B` as zero, where
    nothing trains them any more: call `enable_lora` again, which begins a new update on the merged
    kernels and freezes the rest again, since Keras does not save what is frozen of a layer.

    Args:
        student: Built model, changed in place, before it is compiled.
        rank: Positive whole number.
        layers: Paths of the layers, blocks or nested models whose Dense, EinsumDense, Embedding
            and Conv layers are updated, those inside attention included. Defaults to all whose
            update has fewer parameters than their kernel.
        train: Paths of layers that train in full, the head for instance.
        alpha: Positive float, dimensionless; scales the update. Defaults to `rank`.

    Returns:
        How many parameters of the student train.

    Raises:
        ValueError: If the student is not built, a path names no layer, a value is out of range, no
            layer can be updated, or a layer has an update of another rank or scale.

    Examples:
        >>> enable_lora(student, rank=4, train=["head"])
        1450

    Reference:
        - [Hu et al., 2021](https://arxiv.org/abs/2106.09685), section 4.1
    """
    _require_built(student)
    if rank < 1 or rank != int(rank):
        raise ValueError(f"`rank` is a positive whole number. Received: rank={rank!r}.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` is positive and finite. Received: alpha={alpha!r}.")
    kept = _inside(student, train)
    chosen = None if layers is None else _inside(student, layers)
    open_to_choice = [layer for layer in _leaves(student) if id(layer) not in kept]
    for layer in open_to_choice:
        if getattr(layer, "lora_enabled", False) and (chosen is None or id(layer) in chosen):
            _require_same(layer, rank, alpha)
    updated = [layer for layer in open_to_choice if _takes_lora(layer, rank, chosen)]
    if not updated:
        raise ValueError(
            f"No layer of `{student.name}` takes an update of rank {rank}: they are of Dense, "
            "EinsumDense, Embedding and Conv layers without constraint, whose kernel has more "
            "parameters than the update. Pass a lower `rank`, or the paths of `layers`."
        )
    freeze(student, train)
    for layer in updated:
        layer.trainable = True
        if not layer.lora_enabled:
            layer.enable_lora(rank, lora_alpha=alpha)
        elif lora.is_zero(layer):
            lora.draw(layer)
            # Keras does not save it with every layer.
            layer.lora_alpha = rank if alpha is None else alpha
        for variable in layer.variables:
            variable.trainable = "lora" in variable.name
    # What Keras compiled before, as by `student.predict`, would go on without the updates.
    student.train_function = student.test_function = student.predict_function = None
    return _count(student)


def _require_same(layer: keras.Layer, rank: int, alpha: float | None) -> None:
    """Raise `ValueError` if a layer has an update of another rank or scale, which Keras keeps."""
    if layer.lora_rank != rank:
        raise ValueError(
            f"Layer `{layer.name}` has an update of rank {layer.lora_rank}, and Keras gives a "
            f"layer one alone. Received: rank={rank!r}. Pass `rank={layer.lora_rank}`, or copy the "
            "merged kernels into a new student with `initialize_from`."
        )
    if alpha is not None and alpha != layer.lora_alpha and not lora.is_zero(layer):
        raise ValueError(
            f"Layer `{layer.name}` has an update of alpha {layer.lora_alpha}, and another would "
            f"change what the student answers. Received: alpha={alpha!r}. Leave `alpha` out."
        )


_UPDATED = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


def _takes_lora(layer: keras.Layer, rank: int, chosen: set[int] | None) -> bool:
    """Whether a layer is chosen, or left to choose and made smaller by the update."""
    if not isinstance(layer, _UPDATED):
        return False
    embedding = isinstance(layer, keras.layers.Embedding)
    constraint = layer.embeddings_constraint if embedding else layer.kernel_constraint
    if constraint is not None:
        return False
    if chosen is not None:
        return id(layer) in chosen
    shape = tuple((layer.embeddings if embedding else layer.kernel).shape)
    # Keras's A has the kernel's axes but the last, and B maps rank to the last.
    return rank * (math.prod(shape[:-1]) + shape[-1]) < math.prod(shape)


def _leaves(layer: keras.Layer) -> Iterator[Any]:
    """The layers that hold weights of their own, however deep."""
    inner = sublayers(layer)
    for sublayer in inner:
        yield from _leaves(sublayer)
    own = {id(v) for v in layer.variables} - {id(v) for s in inner for v in s.variables}
    if own and not isinstance(layer, keras.Model):
        yield layer


def _inside(student: keras.Model, paths: Sequence[str]) -> set[int]:
    """Identities of the layers at these paths and of all within them."""
    if isinstance(paths, str):
        paths = [paths]
    found = set()
    for path in paths:
        layer = find(student, path, "student").layer
        found |= {id(layer), *(id(inner) for inner in layer._flatten_layers())}
    return found


def _count(student: keras.Model) -> int:
    return sum(math.prod(v.shape) for v in student.trainable_variables)


def _require_built(student: keras.Model) -> None:
    if not isinstance(student, keras.Model):
        raise TypeError(f"The student is a `keras.Model`. Received: {type(student).__name__}.")
    if not student.built or not student.weights:
        raise ValueError(
            f"The student `{student.name}` has no weights yet. Call it on a batch first."
        )
