"""Losses and outputs that do not fit together: one clear error each, before any work starts."""

import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_kd.models import meaning, output_kinds
from keras_kd.utils.checks import may_be_one, per_output
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Losses, Shape, Tensors

_CROSSENTROPIES = (
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
)


def _is_one_of(loss: Losses, functions: Sequence[Any]) -> bool:
    found = meaning.function_of(loss)
    return any(found is function for function in functions)


def loss_of_probabilities(transfer: Any, side: str, model: str) -> None:
    """Raise `ValueError` where a loss of Keras between probabilities would be given logits.

    Args:
        transfer: The transfer, which reads outputs that are logits.
        side: `"teacher"` or `"student"`.
        model: Name of the model on that side.
    """
    loss = transfer.loss
    # `from_logits` speaks of the second argument alone, the student.
    reads_logits = side == "student" and meaning.option(loss, "from_logits", False)
    if reads_logits or not _is_one_of(loss, (keras.losses.kl_divergence, *_CROSSENTROPIES)):
        return
    raise ValueError(
        f"`{transfer.name}` compares probabilities, and the {side} `{model}` ends in logits, which "
        "it would clip to numbers between 0 and 1. Use `keras_kd.losses.SoftTargets()`, which "
        "reads logits, or `BinarySoftTargets()` for independent classes. If the outputs are "
        "probabilities, say so: `Distiller(..., from_logits=False)`."
    )


def student_loss(loss: Losses, student: Any) -> None:
    """Warn where the hard loss takes logits for probabilities, or the reverse.

    Args:
        loss: The hard loss as given to `compile`.
        student: The `Reader` of the student.
    """
    for one, kind in zip(per_output(loss, student.template), student.kinds()):
        takes_logits = meaning.option(one, "from_logits", False)
        if not _is_one_of(one, (keras.losses.kl_divergence, *_CROSSENTROPIES)):
            continue
        if kind in ("softmax", "sigmoid") and takes_logits:
            warnings.warn(
                f"The student ends in probabilities ({kind}), and the loss "
                f"`{meaning.name_of(one)}` expects logits. Use the loss with `from_logits=False`.",
                stacklevel=4,
            )
        elif kind == "logits" and _is_one_of(one, (keras.losses.kl_divergence,)):
            warnings.warn(
                f"The student ends in logits, and the loss `{meaning.name_of(one)}` expects "
                "probabilities. End the student in a softmax.",
                stacklevel=4,
            )
        elif kind == "logits" and not takes_logits:
            warnings.warn(
                f"The student ends in logits, and the loss `{meaning.name_of(one)}` expects "
                "probabilities. Use the loss with `from_logits=True`.",
                stacklevel=4,
            )


def same_form(transfer: Any, theirs: str, ours: str) -> None:
    """Raise `ValueError` where a loss of Keras would compare probabilities with logits.

    Args:
        transfer: The transfer, which compares what the models return.
        theirs: `"probabilities"`, or how the teacher's output ends.
        ours: The same for the student.
    """
    loss = transfer.loss
    own = meaning.of_loss(loss) is not None
    # Crossentropies turn the student's logits into probabilities themselves.
    if not own or meaning.option(loss, "from_logits", False) or "unknown" in (theirs, ours):
        return
    if (theirs == "logits") != (ours == "logits"):
        raise ValueError(
            f"`{transfer.name}` compares what the models return, and the teacher returns "
            f"{_form(theirs)}, the student {_form(ours)}. Use a loss of `keras_kd.losses`, which "
            "reads logits on both sides, as `LogitMSE()`; or end both models alike."
        )


def _form(kind: str) -> str:
    return "logits" if kind == "logits" else "probabilities"


_OF_LABELS = (
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.ctc,
    keras.losses.circle,
)


def not_of_labels(loss: Losses) -> None:
    """Raise `ValueError` for a loss whose first argument are class numbers, which no teacher gives.

    Args:
        loss: A distillation loss.
    """
    if _is_one_of(loss, _OF_LABELS):
        raise ValueError(
            f"`{meaning.name_of(loss)}` reads class numbers, and a teacher answers with one number "
            "for each class. Use `keras_kd.losses.SoftTargets()`."
        )


def name_the_loss(
    student: str,
    output: str | None,
    units: int | None,
    kind: str,
    loss: Losses,
    regression: bool,
    own: Losses = None,
) -> None:
    """Raise `ValueError` where nothing tells which distillation loss an output needs.

    Args:
        student: Name of the student.
        output: Name of the output, `None` of a single one.
        units: How many units it has.
        kind: How it ends.
        loss: Its hard loss.
        regression: Whether the loss that tells is that of a regression.
        own: The loss that the teacher was compiled with.
    """
    whose = f"The student `{student}`" + (f", output `{output}`," if output is not None else "")
    end = f"{kind} " if kind in ("softmax", "sigmoid") else "linear " if kind == "logits" else ""
    many = "one " if units == 1 else f"{units} " if units else ""
    what = f"has {many}{end}output unit{'s' if units != 1 else ''}"
    if loss is None and regression:
        why = f"the teacher was compiled with `loss={meaning.name_of(own)!r}`, that of a regression"
    elif loss is None:
        why = "no hard loss says what that means"
    elif regression:
        why = f"`loss={meaning.name_of(loss)!r}` is that of a regression"
    else:
        why = f"`loss={meaning.name_of(loss)!r}` does not say whether it classifies"
    others = "`keras_kd.losses.BinarySoftTargets()` for two classes"
    if units != 1:
        others = (
            "`keras_kd.losses.SoftTargets()` for exclusive classes, "
            "`keras_kd.losses.BinarySoftTargets()` for independent ones"
        )
    how = "the distillation loss" if output is None else f"`distillation_loss={{{output!r}: ...}}`"
    raise ValueError(
        f"{whose} {what}, and {why}. Name {how}: `keras_kd.losses.LogitMSE()` for a "
        f"regression, {others}."
    )


def not_for_all(loss: Losses, compares: str, output: str, hard: Losses, told: str) -> None:
    """Raise `ValueError` for a loss for all outputs that does not fit one of them."""
    takes = {"classes": "exclusive classes", "independent": "independent classes"}
    raise ValueError(
        f"`{getattr(loss, 'name', loss)}` is given for all outputs and compares {takes[compares]}, "
        f"and the output `{output}` with `loss={meaning.name_of(hard)!r}` has "
        f"{takes.get(told, 'the values of a regression')}. Give each output its own: "
        f"`distillation_loss={{{output!r}: ..., ...}}`."
    )


def classes_are_last(transfer: Any, hard: Losses, shape: Shape) -> None:
    """Raise `ValueError` where the hard loss has the classes on another axis than the last."""
    axis = meaning.axis_of(hard)
    if not output_kinds.is_last(axis, len(shape)):
        raise ValueError(
            f"`{transfer.name}` compares along the last axis of outputs {tuple(shape)}, and "
            f"`loss={meaning.name_of(hard)!r}` has the classes on axis {axis}. Move them to the "
            "last axis with `keras.layers.Permute`, in teacher and student alike."
        )


def one_side_ends_in(transfer: Any, hard: Losses, ours: str, theirs: str) -> None:
    """Raise `ValueError` where a regression's values would be compared with logits."""
    raise ValueError(
        f"`{transfer.name}` would compare logits with values: the student ends in {ours}, the "
        f"teacher in {theirs}, and `loss={meaning.name_of(hard)!r}` is that of a regression. Pass "
        '`distillation_loss="mse"`, which compares what the models return, or end both alike.'
    )


def keras_loss(loss: Losses) -> Any:
    """A loss from what Keras takes for one: a name, a configuration, a class; others stay.

    Raises:
        TypeError: If it is a string and no name of a loss of Keras.
        ValueError: If the class needs arguments.
    """
    if isinstance(loss, str):
        try:
            return keras.losses.get(loss)
        except ValueError:
            names = [name for name in dir(keras.losses) if not name.startswith("_")]
            raise TypeError(
                "`loss` of a transfer is a loss of `keras_kd.losses`, a `keras.losses.Loss`, the "
                f"name of one of Keras, or a function. Received: loss={loss!r}, which Keras does "
                "not know." + did_you_mean(loss, names, quote="'")
            ) from None
    if isinstance(loss, dict):
        return keras.losses.get(loss)
    if isinstance(loss, type) and issubclass(loss, keras.losses.Loss):
        try:
            return loss()
        except TypeError as error:
            raise ValueError(
                f"`{loss.__name__}` is a class that needs arguments. Pass a loss: "
                f"`{loss.__name__}(...)`."
            ) from error
    return loss


def output_order(
    ours: Tensors | str | None, theirs: Tensors | str | None, read: Sequence[int]
) -> list[int | None]:
    """For each flat output of the student the teacher's flat output that answers it.

    Args:
        ours: The student's output names, as its outputs are structured.
        theirs: The teacher's.
        read: The student's outputs that are compared.

    Returns:
        Indices into the teacher's flat outputs, `None` where it has none.

    Raises:
        ValueError: If outputs that are compared cannot be matched.
    """
    mine, other = keras.tree.flatten(ours), keras.tree.flatten(theirs)
    if len(mine) == 1 == len(other):
        return [0]
    by_name = isinstance(ours, dict) or isinstance(theirs, dict)
    if not by_name and len(mine) == len(other):
        if mine != other and set(mine) == set(other) and read:
            raise ValueError(
                "Student and teacher have outputs of the same names in another order: "
                f"{mine} and {other}. Return dicts to match them by name, or list them alike."
            )
        return list(range(len(mine)))
    # Names that Keras numbered may coincide, so that lists of unequal length are matched by name
    # only where the user chose among the outputs.
    named = by_name or len(read) < len(mine)
    order = [other.index(name) if named and name in other else None for name in mine]
    if len(read) == 1 == len(other) and order[read[0]] is None:
        return [0 if i == read[0] else None for i in range(len(mine))]
    missing = [mine[i] for i in read if order[i] is None]
    if not missing:
        return order
    both = next((name for name in mine if name in other), "name")
    advice = (
        "Name them alike, or give losses to the outputs that both have: "
        f"`distillation_loss={{{both!r}: ...}}`."
    )
    if by_name:
        raise ValueError(
            f"The outputs of student and teacher do not match by name: the teacher has no "
            f"{', '.join(map(repr, missing))}. Received: student {mine}, teacher {other}. {advice}"
        )
    raise ValueError(
        f"The student has {len(mine)} outputs and the teacher {len(other)}: {mine} and "
        f"{other}. Give both the same outputs, or return dicts to match them by name. {advice}"
    )


def logit_loss_fits(transfer: Any, kind: str, shape: Shape, side: str) -> None:
    """Raise `ValueError` where a loss on class logits meets independent outputs, or the reverse."""
    independent = kind == "sigmoid" or shape[-1] == 1
    if independent and transfer.compares == meaning.CLASSES:
        what = "one unit" if shape[-1] == 1 else "independent sigmoid units"
        regression = ", or `LogitMSE()` for a regression" if shape[-1] == 1 else ""
        raise ValueError(
            f"`{transfer.name}` compares distributions over classes, and the {side} ends in "
            f"{what}. Use `keras_kd.losses.BinarySoftTargets()`{regression}."
        )
    if transfer.compares == meaning.INDEPENDENT and kind == "softmax":
        raise ValueError(
            f"`{transfer.name}` compares independent sigmoid outputs, and the {side} ends in a "
            "softmax. Use `keras_kd.losses.SoftTargets()`."
        )


def same_classes(teacher: Shape, student: Shape) -> None:
    """Raise `ValueError` unless both sides have the same classes at the same positions."""
    if None not in (teacher[-1], student[-1]) and teacher[-1] != student[-1]:
        raise ValueError(
            f"The teacher has {teacher[-1]} classes and the student {student[-1]}. Give the "
            "student's last layer as many units as the teacher's, or distil from inner layers "
            "alone with transfers."
        )
    if not may_be_one(teacher[1:], student[1:]):
        raise ValueError(
            f"The teacher's outputs have the shape {tuple(teacher)} and the student's "
            f"{tuple(student)}. Each position of one is compared with the same of the other: bring "
            "both to one shape, with `keras.layers.Reshape`, `Resizing` or a pooling layer."
        )
