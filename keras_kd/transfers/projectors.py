"""Student features to the teacher's shape: `z = Wx + b` and its convolutional kin.

Features are channels last: `(batch, units)`, `(batch, tokens, units)`, `(batch, height, width,
channels)` or `(batch, depth, height, width, channels)`. A dimension that is `None` is not known
before a batch arrives; it counts as equal to the other side's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Shape, Tensor

PROJECTORS = ("auto", "linear", "conv", "pool", "tokens", "mlp")

# Beyond this stride a convolution has more weights than it is worth: pool first.
_LONGEST_STRIDE = 2


class _CannotJoinError(ValueError):
    """Why one kind of projector cannot join two shapes."""


def require_kind(kind: str) -> None:
    """Raise `ValueError` unless `kind` names a projector."""
    if kind not in PROJECTORS:
        raise ValueError(
            f"`projector={kind!r}` is unknown. Expected None, "
            f"{', '.join(repr(k) for k in PROJECTORS)} or a layer."
            + did_you_mean(kind, PROJECTORS, quote="'")
        )


def make(kind: str, teacher_shape: Shape, student_shape: Shape, name: str) -> "Projector":
    """Make the projector that joins two feature shapes.

    Args:
        kind: One of

            - `"linear"`: `z = Wx + b` over the last axis, at every position.
            - `"mlp"`: `z = W2 relu(W1 x + b1) + b2` over the last axis, as
              wide inside as the wider side.
            - `"conv"`: a 1x1 convolution where the sizes agree; where the
              student's are `s` times larger, a convolution of kernel `s + 1`
              and stride `s`; where they are `s` times smaller, a transposed
              one of kernel `2s` and stride `s`.
            - `"pool"`: averages over the areas that the teacher's positions
              cover, then a linear map where the widths differ.
            - `"tokens"`: between tokens and a map, tokens and tokens of an
              image, or features and a vector. Tokens fill a square grid row
              by row; one token more is a class token, in front. A map becomes
              tokens row by row, its mean the class token. Positions are
              averaged away where the teacher has none. Then a linear map.
            - `"auto"`: nothing where the shapes agree; else `"linear"` for
              vectors and tokens and `"conv"` for maps where the positions
              agree; else `"conv"` up to stride 2 and `"pool"` beyond;
              `"tokens"` where the ranks differ, or both sides are square
              grids with a class token.
        teacher_shape: `(batch, ..., units)`, the shape to be reached.
        student_shape: `(batch, ..., units)`, the shape that is given.
        name: Name of the transfer, for messages and weights.

    Returns:
        A layer, not yet built, that computes in float32. Its `description`
        says in a few words what it does.

    Raises:
        ValueError: If the kind is unknown or cannot join the shapes.
    """
    require_kind(kind)
    teacher, student = tuple(teacher_shape), tuple(student_shape)
    try:
        for side, shape in (("teacher", teacher), ("student", student)):
            if not 2 <= len(shape) <= 5:
                raise _CannotJoinError(f"a feature has 2 to 5 axes, the {side}'s has {len(shape)}")
            if shape[-1] is None:
                raise _CannotJoinError(
                    f"the last axis of the {side}'s features must be known. Read a layer with a "
                    "fixed number of units"
                )
        return _MAKERS[_choose(teacher, student) if kind == "auto" else kind](
            teacher, student, f"{name}_projector"
        )
    except _CannotJoinError as error:
        raise ValueError(
            f"`projector={kind!r}` of transfer `{name}` cannot join the teacher's {teacher} with "
            f"the student's {student}: {error}. `projector` may also be "
            + ("" if kind == "auto" else "'auto', or ")
            + "a layer that maps one shape to the other."
        ) from None


def describe(kind: str, teacher_shape: Shape, student_shape: Shape) -> str:
    """What projector of this kind joins two shapes, in a few words.

    Args:
        kind: As for `make`.
        teacher_shape: As for `make`.
        student_shape: As for `make`.

    Returns:
        For example `"conv 3x3 /2"`, `"none"` where the shapes agree, or
        `"cannot join"`.

    Raises:
        ValueError: If the kind is unknown.
    """
    require_kind(kind)
    try:
        return make(kind, teacher_shape, student_shape, "pair").description
    except ValueError:
        return "cannot join"


class Projector(keras.layers.Layer):
    """Layers that run one after another in float32, with a few words on what they do.

    Not a `keras.Sequential`: a model would cast its inputs to the student's
    policy, and the loss is computed in float32 whatever that is.

    Args:
        steps: The layers.
        description: What they do together.
        name: Name of the layer.
    """

    def __init__(self, steps: Sequence[Any], description: str, name: str) -> None:
        super().__init__(name=name, dtype="float32")
        self.steps = list(steps)
        self.description = description
        # The loss takes the mask before the projector; Keras need not warn that it ends.
        self.supports_masking = True

    def build(self, input_shape: Shape) -> None:
        """Build every step.

        Args:
            input_shape: Shape of the student's features.
        """
        shape = tuple(input_shape)
        for step in self.steps:
            step.build(shape)
            shape = tuple(step.compute_output_shape(shape))
        self.built = True

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """Return the shape after the last step."""
        shape = tuple(input_shape)
        for step in self.steps:
            shape = tuple(step.compute_output_shape(shape))
        return shape

    def call(self, inputs: Tensor) -> Tensor:
        """Project the student's features.

        Args:
            inputs: Features of the shape that the projector was built for.

        Returns:
            Features of the teacher's shape.
        """
        for step in self.steps:
            inputs = step(inputs)
        return inputs


class _AreaPooling(keras.layers.Layer):
    """Averages over equal areas: every output position covers `1 / size` of its axis.

    Output `i` of `m` is the mean of the inputs in `[i / m, (i + 1) / m]` of the axis, each input
    weighed by how much of it lies within; it is plain average pooling where the ratio is whole.
    """

    def __init__(self, sizes: Sequence[int], name: str) -> None:
        super().__init__(name=name, dtype="float32")
        self.sizes = tuple(sizes)

    def compute_output_shape(self, input_shape: Shape) -> Any:
        return (input_shape[0], *self.sizes, input_shape[-1])

    def call(self, inputs: Tensor) -> Tensor:
        for axis, size in enumerate(self.sizes, start=1):
            if inputs.shape[axis] == size:
                continue
            count = ops.shape(inputs)[axis]
            # (size, count): overlap of output cell i with input cell j, in units of an output cell.
            after = ops.cast(ops.arange(1, count + 1), "float32") / ops.cast(count, "float32")
            before = after - 1.0 / ops.cast(count, "float32")
            edges = ops.arange(size + 1, dtype="float32")[:, None] / size
            overlap = ops.minimum(edges[1:], after) - ops.maximum(edges[:-1], before)
            share = ops.maximum(overlap, 0.0) * size
            inputs = ops.moveaxis(ops.tensordot(share, inputs, axes=[[1], [axis]]), 0, axis)
        return ops.reshape(inputs, (-1, *self.sizes, inputs.shape[-1]))


class _ToGrid(keras.layers.Layer):
    """Tokens of an image to its map, row by row; a class token in front is left out."""

    def __init__(self, height: int, width: int, name: str) -> None:
        super().__init__(name=name, dtype="float32")
        self.height, self.width = height, width

    def compute_output_shape(self, input_shape: Shape) -> Any:
        return (input_shape[0], self.height, self.width, input_shape[-1])

    def call(self, inputs: Tensor) -> Tensor:
        patches = inputs[:, -self.height * self.width :]
        return ops.reshape(patches, (-1, self.height, self.width, inputs.shape[-1]))


class _ToTokens(keras.layers.Layer):
    """A map to tokens, row by row, with its mean in front where there is a class token."""

    def __init__(self, tokens: int, class_token: bool, name: str) -> None:
        super().__init__(name=name, dtype="float32")
        self.tokens, self.class_token = tokens, class_token

    def compute_output_shape(self, input_shape: Shape) -> Any:
        return (input_shape[0], self.tokens + self.class_token, input_shape[-1])

    def call(self, inputs: Tensor) -> Tensor:
        tokens = ops.reshape(inputs, (-1, self.tokens, inputs.shape[-1]))
        if not self.class_token:
            return tokens
        return ops.concatenate([ops.mean(tokens, axis=1, keepdims=True), tokens], axis=1)


class _ClassTokenApart(keras.layers.Layer):
    """Tokens of a square grid resampled to another one; the class token in front stays itself."""

    def __init__(self, side: int, target: int, name: str) -> None:
        super().__init__(name=name, dtype="float32")
        self.target = target
        self.steps: list[Any] = [
            _ToGrid(side, side, "grid"),
            _AreaPooling((target, target), "pool"),
            _ToTokens(target * target, False, "tokens"),
        ]

    def build(self, input_shape: Shape) -> None:
        for step in self.steps:
            step.built = True

    def compute_output_shape(self, input_shape: Shape) -> Any:
        return (input_shape[0], self.target * self.target + 1, input_shape[-1])

    def call(self, inputs: Tensor) -> Tensor:
        patches = inputs
        for step in self.steps:
            patches = step(patches)
        return ops.concatenate([inputs[:, :1], patches], axis=1)


def _choose(teacher: Shape, student: Shape) -> str:
    """The kind that `"auto"` stands for."""
    if len(teacher) != len(student):
        return "tokens"
    if _positions_agree(teacher, student):
        if teacher[-1] == student[-1]:
            return "none"
        return "conv" if len(teacher) > 3 else "linear"
    if len(teacher) == 3 and _has_class_token(teacher[1]) and _has_class_token(student[1]):
        return "tokens"
    strides = _strides(teacher, student)
    if strides is not None and max(max(s, 1 / s) for s in strides) <= _LONGEST_STRIDE:
        return "conv"
    return "pool"


def _none(teacher: Shape, student: Shape, name: str) -> Projector:
    return Projector([], "none", name)


def _linear(teacher: Shape, student: Shape, name: str) -> Projector:
    _require_positions(teacher, student)
    return Projector([_dense(teacher, "linear")], "linear", name)


def _mlp(teacher: Shape, student: Shape, name: str) -> Projector:
    _require_positions(teacher, student)
    hidden = max(_units(teacher), _units(student))
    inner = keras.layers.Dense(hidden, activation="relu", dtype="float32", name="hidden")
    return Projector([inner, _dense(teacher, "linear")], f"mlp of {hidden}", name)


def _conv(teacher: Shape, student: Shape, name: str) -> Projector:
    if len(teacher) != len(student) or len(teacher) < 3:
        raise _CannotJoinError("a convolution joins maps, or tokens, of the same number of axes")
    strides = _strides(teacher, student)
    if strides is None:
        raise _CannotJoinError(
            "the sizes are no whole multiples of one another in one direction; `'pool'` averages "
            "to any size"
        )
    rank = len(teacher) - 2
    settings: dict[str, Any] = {
        "padding": "same",
        "data_format": "channels_last",
        "dtype": "float32",
        "name": "conv",
    }
    make_conv: Any
    if all(stride >= 1 for stride in strides):
        kernel = tuple(int(s) + 1 if s > 1 else 1 for s in strides)
        down = tuple(int(s) for s in strides)
        make_conv = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)[rank - 1]
        layer = make_conv(_units(teacher), kernel, strides=down, **settings)
        return Projector([layer], f"conv {_times(kernel)}{_by('/', down)}", name)
    up = tuple(round(1 / s) for s in strides)
    kernel = tuple(2 * s if s > 1 else 1 for s in up)
    make_conv = (
        keras.layers.Conv1DTranspose,
        keras.layers.Conv2DTranspose,
        keras.layers.Conv3DTranspose,
    )[rank - 1]
    layer = make_conv(_units(teacher), kernel, strides=up, **settings)
    return Projector([layer], f"conv {_times(kernel)}{_by('x', up)} up", name)


def _pool(teacher: Shape, student: Shape, name: str) -> Projector:
    if len(teacher) != len(student) or len(teacher) < 3:
        raise _CannotJoinError("pooling joins maps, or tokens, of the same number of axes")
    if _positions_agree(teacher, student):
        return Projector(*_widened(teacher, student, [], []), name)
    sizes = [t if t is not None else s for t, s in zip(teacher[1:-1], student[1:-1])]
    return Projector(*_resampled(sizes, teacher, student), name)


def _resampled(sizes: Sequence[Any], teacher: Shape, student: Shape) -> tuple[list[Any], str]:
    if None in sizes:
        raise _CannotJoinError(
            "some sizes are known and some unknown on both sides. Give the models inputs of a "
            "fixed size"
        )
    pooling = _AreaPooling(sizes, "pool")
    return _widened(teacher, student, [pooling], [f"pool to {_times(sizes)}"])


def _tokens(teacher: Shape, student: Shape, name: str) -> Projector:
    if len(teacher) == 2 and len(student) > 2:
        positions = tuple(range(1, len(student) - 1))
        mean = _Mean(positions, "mean")
        return Projector(*_widened(teacher, student, [mean], ["mean of positions"]), name)
    if len(student) == 2 and len(teacher) > 2:
        raise _CannotJoinError(
            "a vector does not say what happens where. Read a layer of the student before its "
            "global pooling, or a pooled layer of the teacher"
        )
    if len(student) == 3 and len(teacher) == 4:
        return Projector(*_tokens_to_map(teacher, student), name)
    if len(student) == 4 and len(teacher) == 3:
        return Projector(*_map_to_tokens(teacher, student), name)
    if len(student) == 3 and len(teacher) == 3:
        return Projector(*_tokens_to_tokens(teacher, student), name)
    raise _CannotJoinError(
        "tokens are joined with tokens or maps of two dimensions, and features with vectors"
    )


def _tokens_to_map(teacher: Shape, student: Shape) -> tuple[list[Any], str]:
    height, width = teacher[1:3]
    if height is not None and width is not None and student[1] in (height * width, None):
        side: tuple[int, int] = (height, width)
    elif height is not None and width is not None and student[1] == height * width + 1:
        side = (height, width)
    else:
        side = (_side(student[1], "student"),) * 2
    steps: list[Any] = [_ToGrid(*side, name="grid")]
    words = [f"tokens to {_times(side)}"]
    if None not in (height, width) and side != (height, width):
        steps.append(_AreaPooling((height, width), "pool"))  # type: ignore[arg-type]
        words.append(f"pool to {_times((height, width))}")
    return _widened(teacher, student, steps, words)


def _map_to_tokens(teacher: Shape, student: Shape) -> tuple[list[Any], str]:
    count = teacher[1]
    height, width = student[1:3]
    if count is None:
        if height is None or width is None:
            raise _CannotJoinError(
                "the number of tokens and the size of the map are both unknown. Give the models "
                "inputs of a fixed size"
            )
        return _widened(
            teacher, student, [_ToTokens(height * width, False, "tokens")], ["map to tokens"]
        )
    if height is not None and width is not None and height * width in (count, count - 1):
        apart = height * width == count - 1
        steps: list[Any] = [_ToTokens(height * width, apart, "tokens")]
        return _widened(teacher, student, steps, [f"map to {count} tokens"])
    side = _side(count, "teacher")
    steps = [_AreaPooling((side, side), "pool"), _ToTokens(side * side, side**2 < count, "tokens")]
    words = [f"pool to {_times((side, side))}", f"{count} tokens"]
    return _widened(teacher, student, steps, words)


def _tokens_to_tokens(teacher: Shape, student: Shape) -> tuple[list[Any], str]:
    if _positions_agree(teacher, student):
        return _widened(teacher, student, [], [])
    theirs, ours = _side(teacher[1], "teacher"), _side(student[1], "student")
    class_tokens = theirs**2 < (teacher[1] or 0), ours**2 < (student[1] or 0)
    if all(class_tokens):
        steps: list[Any] = [_ClassTokenApart(ours, theirs, "grid")]
    else:
        steps = [_ToGrid(ours, ours, "grid")]
        if theirs != ours:
            steps.append(_AreaPooling((theirs, theirs), "pool"))
        steps.append(_ToTokens(theirs * theirs, class_tokens[0], "tokens"))
    return _widened(teacher, student, steps, [f"tokens {_times((ours,) * 2)} to {theirs}x{theirs}"])


class _Mean(keras.layers.Layer):
    """The mean over all positions."""

    def __init__(self, axes: tuple[int, ...], name: str) -> None:
        super().__init__(name=name, dtype="float32")
        self.axes = axes

    def compute_output_shape(self, input_shape: Shape) -> Any:
        return (input_shape[0], input_shape[-1])

    def call(self, inputs: Tensor) -> Tensor:
        return ops.mean(inputs, axis=self.axes)


_MAKERS: dict[str, Callable[[Shape, Shape, str], Projector]] = {
    "none": _none,
    "linear": _linear,
    "conv": _conv,
    "pool": _pool,
    "tokens": _tokens,
    "mlp": _mlp,
}


def _dense(teacher: Shape, name: str) -> Any:
    # float32 whatever the student's policy: the loss is computed in it too.
    return keras.layers.Dense(teacher[-1], name=name, dtype="float32")


def _widened(
    teacher: Shape, student: Shape, steps: list[Any], words: list[str]
) -> tuple[list[Any], str]:
    """The steps and, where the widths differ, a linear map behind them."""
    if teacher[-1] != student[-1]:
        steps, words = [*steps, _dense(teacher, "linear")], [*words, "linear"]
    return steps, ", ".join(words) or "none"


def _positions_agree(teacher: Shape, student: Shape) -> bool:
    return len(teacher) == len(student) and all(
        t is None or s is None or t == s for t, s in zip(teacher[1:-1], student[1:-1])
    )


def _require_positions(teacher: Shape, student: Shape) -> None:
    if not _positions_agree(teacher, student):
        raise _CannotJoinError("it changes the last axis alone. Tap layers of the same resolution")


def _strides(teacher: Shape, student: Shape) -> list[float] | None:
    """Strides from the student's sizes to the teacher's; below 1 they enlarge; else `None`."""
    strides: list[float] = []
    for t, s in zip(teacher[1:-1], student[1:-1]):
        if t is None or s is None or t == s:
            strides.append(1)
        elif s > t and -(-s // round(s / t)) == t:
            strides.append(round(s / t))
        elif t > s and t % s == 0:
            strides.append(s / t)
        else:
            return None
    down, up = any(s > 1 for s in strides), any(s < 1 for s in strides)
    return None if down and up else strides


def _side(tokens: int | None, whose: str) -> int:
    """The side of the square grid that so many tokens fill, a class token left out."""
    if tokens is not None:
        for count in (tokens, tokens - 1):
            if count > 0 and math.isqrt(count) ** 2 == count:
                return math.isqrt(count)
    raise _CannotJoinError(
        f"the {whose}'s {tokens} tokens fill no square grid, with or without a class token"
    )


def _has_class_token(tokens: int | None) -> bool:
    return tokens is not None and tokens > 1 and math.isqrt(tokens - 1) ** 2 == tokens - 1


def _units(shape: Shape) -> int:
    units = shape[-1]
    if units is None:
        raise _CannotJoinError("the last axis must be known")
    return units


def _times(sizes: Sequence[Any]) -> str:
    return "x".join(str(size) for size in sizes)


def _by(sign: str, strides: Sequence[int]) -> str:
    """The strides in a few characters, none where all are 1."""
    if max(strides) == 1:
        return ""
    return f" {sign}{strides[0] if len(set(strides)) == 1 else _times(strides)}"
