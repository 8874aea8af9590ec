"""What an output means: exclusive classes, independent units or plain values.

The hard loss on its labels says so first, then the layers that it ends in.
"""

import functools
import inspect
from functools import cache
from typing import Any

import keras

from keras_kd.utils.types import Losses

CLASSES = "classes"
"""The units are exclusive classes: their softmax is one distribution."""

INDEPENDENT = "independent"
"""Each unit is a yes or no of its own: its sigmoid is a probability."""

VALUES = "values"
"""The units are numbers as they are: a regression."""

_BY_KIND = {"softmax": CLASSES, "sigmoid": INDEPENDENT}


@cache
def _by_function() -> dict[Any, str]:
    """What the losses of Keras are between.

    Others serve several kinds, as `dice`, or margins that are no logits, as `hinge`.
    """
    losses = keras.losses
    return {
        losses.sparse_categorical_crossentropy: CLASSES,
        losses.categorical_crossentropy: CLASSES,
        losses.categorical_focal_crossentropy: CLASSES,
        losses.categorical_generalized_cross_entropy: CLASSES,
        losses.kl_divergence: CLASSES,
        losses.ctc: CLASSES,
        losses.binary_crossentropy: INDEPENDENT,
        losses.binary_focal_crossentropy: INDEPENDENT,
        losses.mean_squared_error: VALUES,
        losses.mean_absolute_error: VALUES,
        losses.mean_absolute_percentage_error: VALUES,
        losses.mean_squared_logarithmic_error: VALUES,
        losses.huber: VALUES,
        losses.log_cosh: VALUES,
        losses.poisson: VALUES,
        losses.cosine_similarity: VALUES,
    }


def function_of(loss: Losses) -> Any:
    """The function that a loss computes, however it was given; the loss itself where it hides it.

    Args:
        loss: A name, a `keras.losses.Loss`, its class, a function, or a
            `functools.partial` of one.
    """
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError:
            return loss
    if inspect.isclass(loss) and issubclass(loss, keras.losses.Loss):
        try:
            loss = loss()
        except TypeError:
            return loss
    if isinstance(loss, functools.partial):
        return function_of(loss.func)
    if isinstance(loss, keras.losses.Loss):
        return getattr(loss, "fn", loss)
    return loss


def of_loss(loss: Losses) -> str | None:
    """What the outputs are that a hard loss compares with labels.

    Args:
        loss: The loss of one output, as Keras takes it, or `None`.

    Returns:
        `CLASSES`, `INDEPENDENT`, `VALUES`, or `None` where the loss does not tell.
    """
    function = function_of(loss)
    return next((kind for known, kind in _by_function().items() if known is function), None)


def of_output(hard: Any, kinds: tuple[str, ...], own: Any = None) -> str | None:
    """What an output means.

    Args:
        hard: Its hard loss, or `None`.
        kinds: How the student's output ends and how the teacher's does, as
            `keras_kd.models.output_kinds` finds it.
        own: The loss that the teacher was compiled with for this output.

    Returns:
        `CLASSES`, `INDEPENDENT`, `VALUES`, or `None` where nothing tells.
    """
    found = of_loss(hard)
    if found is not None:
        return found
    of_layers = next((_BY_KIND[kind] for kind in kinds if kind in _BY_KIND), None)
    return of_layers or of_loss(own)


def option(loss: Losses, name: str, default: object = None) -> Any:
    """What a loss was given by name, as `from_logits`, however it was given itself.

    Args:
        loss: As in `function_of`.
        name: Of the argument.
        default: Where the loss says nothing of it.
    """
    if isinstance(loss, functools.partial):
        return loss.keywords.get(name, option(loss.func, name, default))
    return default if inspect.isclass(loss) else getattr(loss, name, default)


def name_of(loss: Losses) -> str:
    """The name of a loss for messages, however it was given."""
    if isinstance(loss, str):
        return loss
    if isinstance(loss, functools.partial):
        return name_of(loss.func)
    own = None if inspect.isclass(loss) else getattr(loss, "name", None)
    return str(own or getattr(loss, "__name__", None) or loss)


def axis_of(loss: Losses) -> Any:
    """The axis of the classes in a hard loss, -1 where it names none."""
    return option(loss, "axis", -1) if of_loss(loss) is not None else -1
