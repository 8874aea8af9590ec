"""Student features to the teacher's shape: `z = Wx + b` and its convolutional kin."""

from typing import Any

import keras

from keras_kd.typing import Shape

PROJECTORS = ("linear",)


def make(kind: str, teacher_shape: Shape, student_shape: Shape, name: str) -> keras.layers.Layer:
    """Make the projector that joins two feature shapes.

    Args:
        kind: `"linear"`: `z = Wx + b` over the last axis, at every position;
            on images that is a 1x1 convolution.
        teacher_shape: `(batch, ..., units)`, the shape to be reached.
        student_shape: `(batch, ..., units)`, the shape that is given.
        name: Name of the transfer, for messages and weights.

    Returns:
        A layer, not yet built, that computes in float32.

    Raises:
        ValueError: If the kind is unknown or cannot join the shapes.
    """
    if kind not in PROJECTORS:
        raise ValueError(
            f"`projector={kind!r}` of transfer `{name}` is unknown. Expected None, "
            f"{', '.join(repr(k) for k in PROJECTORS)} or a layer."
        )
    positions = zip(teacher_shape[1:-1], student_shape[1:-1])
    if len(teacher_shape) != len(student_shape) or any(
        t is not None and s is not None and t != s for t, s in positions
    ):
        raise ValueError(
            f"`projector='linear'` of transfer `{name}` changes the last axis alone. Received: "
            f"teacher {tuple(teacher_shape)}, student {tuple(student_shape)}. Tap layers of the "
            "same resolution, or pass a layer that maps one shape to the other."
        )
    return _linear(teacher_shape, name)


def _linear(teacher_shape: Shape, name: str) -> Any:
    # float32 whatever the student's policy: the loss is computed in it too.
    return keras.layers.Dense(teacher_shape[-1], name=f"{name}_projector", dtype="float32")
