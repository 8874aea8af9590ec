"""Which labels the hard loss reads: what it tells Keras's reduction, seen while it is computed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_kd.utils.masks import keras_mask
from keras_kd.utils.types import Tensor


@contextlib.contextmanager
def read_by(losses: Sequence[tuple[Any, int]], count: int) -> Iterator[list[Tensor]]:
    """Note which values losses of Keras leave out for their labels, as with `ignore_class`.

    A loss says so by a mask on its values, be it one of Keras, a function around one, or the
    user's own.

    Args:
        losses: `keras.losses.Loss` objects in the order in which they will be called, each with
            the number of its output.
        count: How many outputs there are.

    Yields:
        One entry an output: boolean `(batch, ...)`, where a label is read; `None` where all are.
    """
    found: list[Tensor] = [None] * count
    with contextlib.ExitStack() as stack:
        _watch(losses, found, stack)
        yield found


@contextlib.contextmanager
def read_by_compiled(container: Any, output: Any) -> Iterator[list[Tensor]]:
    """The same for what Keras made of the losses given to `compile`.

    Args:
        container: Keras's container of the compiled losses.
        output: What the model returned.

    Yields:
        As `read_by` does, one entry for each flat output.
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

            def build_and_watch(*args: Any) -> None:
                build(*args)
                watch()

            _shadow(container, "build", build_and_watch, stack)
        yield found


def _at(tree: Any, path: Sequence[Any]) -> int | None:
    """The number of the output at a path, `None` for several."""
    for key in path if keras.tree.is_nested(tree) else ():
        tree = tree[key]
    return tree if isinstance(tree, int) else None


def _watch(losses: Sequence[tuple[Any, int]], found: list[Tensor], stack: Any) -> None:
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

    def call(*args: Any, **kwargs: Any) -> Any:
        values = original(*args, **kwargs)
        place = next(coming, None)
        if place is not None:
            found[place] = keras_mask(values)
        return values

    return call


def _shadow(holder: Any, name: str, value: Any, stack: Any) -> None:
    """Set an attribute on an object until the stack is closed."""
    own = vars(holder)
    if name in own:
        stack.callback(setattr, holder, name, own[name])
    else:
        stack.callback(delattr, holder, name)
    setattr(holder, name, value)
