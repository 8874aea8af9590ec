"""The student's loss on the labels, and which labels it reads.

`computed` is that loss, for a `Distiller` and for models that teach each other alike. What a loss
tells Keras's reduction of the labels that it reads is seen while it is computed.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_kd.distill import batch
from keras_kd.losses.counts import joint_mask
from keras_kd.losses.vocabulary import fills, is_large, label_or_rest
from keras_kd.utils.masks import keras_mask, remasked, with_keras_mask
from keras_kd.utils.types import Losses, Tensor, Tensors


def computed(
    loss: keras.losses.Loss,
    read_labels: Callable[[Any, Any], contextlib.AbstractContextManager[list[Tensor]]],
    y: Tensors | None,
    output: Tensors,
    sample_weight: Tensors | None,
    given: Tensors | None = None,
    theirs: Sequence[Any] = (),
) -> tuple[Tensor, Any, list[Any]]:
    """The student's loss on the labels, by what Keras made of the compiled loss.

    Args:
        loss: What is called: a loss, or Keras's container of those given to `compile`.
        read_labels: `read_by_loss` or `read_by_compiled`, whichever belongs to that.
        y: Labels, structured like the outputs.
        output: What the student returned.
        sample_weight: Weights, for all outputs or for each, or `None`; one of
            `(batch,)` weighs every token or pixel of its sample.
        given: What was given to `compile`.
        theirs: For each flat output the teacher's, whose Keras mask counts as the student's
            does; `None` for some, or nothing where no teacher was asked.

    Returns:
        A scalar; the output, for whatever else reads its logits, so that the
        gradient of this loss is added to that of the other in place; and for each flat output
        where labels are read, as in `keras_kd.losses.counts.counted`.
    """
    weight = batch.apart(batch.for_positions(sample_weight, output))
    if _is_crossentropy(given) and ops.is_tensor(output) and is_large(output) and fills():
        # The same loss of two classes, the label and the rest, spares the copies of all logits
        # that Keras's crossentropy keeps for its gradient.
        own = keras_mask(output)
        mask = joint_mask(theirs[0], output) if theirs else own
        halves, output = label_or_rest(y, output)
        value = loss(ops.zeros_like(y), with_keras_mask(halves, mask), weight)
        return value, with_keras_mask(output, own), [None]
    read = output
    if any(keras_mask(tensor) is not None for tensor in theirs if tensor is not None):
        flat = keras.tree.flatten(output)
        for i, tensor in enumerate(theirs):
            if tensor is not None and keras_mask(tensor) is not None:
                flat[i] = remasked(flat[i], joint_mask(tensor, flat[i]))
        read = keras.tree.pack_sequence_as(output, flat)
    with read_labels(loss, output) as labeled:
        value = loss(y, read, weight)
    return value, output, labeled


def _is_crossentropy(loss: keras.losses.Loss) -> bool:
    """Whether this is Keras's crossentropy of integer labels and logits, with no option."""
    if type(loss) is not keras.losses.SparseCategoricalCrossentropy or loss.dtype != "float32":
        return False
    config = loss.get_config()
    options = (config["from_logits"], config["ignore_class"], config.get("axis", -1))
    return options == (True, None, -1)


@contextlib.contextmanager
def read_by_loss(loss: Losses, output: Tensors) -> Iterator[list[Tensor]]:
    """Note which values a loss of Keras leaves out for their labels, as with `ignore_class`.

    A loss says so by a mask on its values, be it one of Keras, a function around one, or the
    user's own.

    Args:
        loss: A `keras.losses.Loss`.
        output: The tensor that it reads.

    Yields:
        One entry: boolean `(batch, ...)`, where a label is read; `None` where all are.
    """
    found: list[Tensor] = [None]
    with contextlib.ExitStack() as stack:
        _watch([(loss, 0)], found, stack)
        yield found


@contextlib.contextmanager
def read_by_compiled(container: Any, output: Tensors) -> Iterator[list[Tensor]]:
    """The same for what Keras made of the losses given to `compile`.

    Args:
        container: Keras's container of the compiled losses.
        output: What the model returned.

    Yields:
        As `read_by_loss` does, one entry for each flat output.
    """
    count = len(keras.tree.flatten(output))
    found: list[Tensor] = [None] * count
    with contextlib.ExitStack() as stack:

        def watch() -> None:
            places = list(range(count))
            tree = 0
            if count > 1:
                tree = keras.tree.pack_sequence_as(container._y_pred_build_structure, places)
            # What `compile` was given may be functions, which Keras wraps with the first batch.
            each = [(one.loss, _at(tree, one.path)) for one in container._flat_losses]
            _watch([(loss, place) for loss, place in each if place is not None], found, stack)

        if container.built:
            watch()
        else:
            build = container.build

            def build_and_watch(*args: object) -> None:
                build(*args)
                watch()

            _shadow(container, "build", build_and_watch, stack)
        yield found


def _at(tree: Any, path: Sequence[Any]) -> int | None:
    """The number of the output at a path, `None` for several."""
    for key in path if keras.tree.is_nested(tree) else ():
        tree = tree[key]
    return tree if isinstance(tree, int) else None


def _watch(
    losses: Sequence[tuple[Any, int]], found: list[Tensor], stack: contextlib.ExitStack
) -> None:
    """Note the masks of the values of these losses in `found` until the stack is closed."""
    # One object may serve several outputs, which then come in their order.
    by_loss: dict[int, tuple[Any, list[int]]] = {}
    for loss, place in losses:
        by_loss.setdefault(id(loss), (loss, []))[1].append(place)
    for loss, places in by_loss.values():
        _shadow(loss, "call", _noting(loss.call, iter(places), found), stack)


def _noting(
    original: Callable[..., Any], coming: Iterator[int], found: list[Tensor]
) -> Callable[..., Any]:
    """The `call` of a loss that notes the mask of its values."""

    def call(*args: object, **kwargs: object) -> Any:
        values = original(*args, **kwargs)
        place = next(coming, None)
        if place is not None:
            found[place] = keras_mask(values)
        return values

    return call


def _shadow(holder: object, name: str, value: object, stack: contextlib.ExitStack) -> None:
    """Set an attribute on an object until the stack is closed."""
    own = vars(holder)
    if name in own:
        stack.callback(setattr, holder, name, own[name])
    else:
        stack.callback(delattr, holder, name)
    setattr(holder, name, value)
