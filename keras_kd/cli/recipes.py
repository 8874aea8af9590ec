"""What each task trains with and is judged by, and what the names of methods mean.

A task of its own is one `Recipe` in `RECIPES`. Keras is imported inside functions, since the names
are checked before it is.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.cli import inputs
from keras_kd.datasets import TaskData
from keras_kd.datasets.task_data import UNLABELED
from keras_kd.utils.types import Array, Tensors

if TYPE_CHECKING:
    import keras


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a task is trained and judged.

    Args:
        judges: Figures of `keras_kd.export.verification.scores` in the order in which they judge
            files: the first that the data can be measured by.
        shown: Figures of the table.
        by_class: Whether each class has figures of its own.
    """

    judges: tuple[str, ...]
    shown: tuple[str, ...]
    by_class: bool = True


RECIPES = {
    "classification": Recipe(("accuracy",), ("accuracy", "macro_f1", "auc")),
    "multilabel": Recipe(("macro_f1", "auc", "accuracy"), ("macro_f1", "auc", "accuracy")),
    "regression": Recipe(("mae",), ("mae", "rmse", "r2"), by_class=False),
    "tokens": Recipe(("macro_f1", "accuracy"), ("macro_f1", "accuracy", "entity_f1")),
    "ranking": Recipe(("ndcg@10",), ("ndcg@10",), by_class=False),
}

PLAIN, DEFAULT, AUTO, STANDARDIZED = "plain", "default", "auto", "standardized"

_NAMED = (AUTO, DEFAULT, STANDARDIZED, PLAIN)

_LOSSES = (
    *("SoftTargets", "ReverseKL", "JensenShannon", "TotalVariation", "LogitMSE"),
    *("BinarySoftTargets", "LogitHuber", "DecoupledKD", "DIST"),
)
"""Losses that compare outputs alone. The others read layers, which are named in Python."""

METHODS = (*_NAMED, *_LOSSES)


def check_method(name: str) -> str:
    """Return the name of a method as it is written.

    Args:
        name: In any case.

    Raises:
        ValueError: If it is unknown, with the close one; or a loss that reads layers.
    """
    known = {method.lower(): method for method in METHODS}
    if name.lower() in known:
        return known[name.lower()]
    from keras_kd import losses

    if name.lower() in {loss.lower() for loss in losses.__all__}:
        raise ValueError(
            f"`--method {name}` compares inner layers, which are named in Python: "
            f"`keras_kd.Transfer(keras_kd.losses.{name}(), teacher=..., student=...)`. Here there "
            f"are {', '.join(METHODS)}."
        )
    close = difflib.get_close_matches(name.lower(), list(known), 1)
    hint = f" Did you mean `{known[close[0]]}`?" if close else ""
    raise ValueError(f"`{name}` is no method. Expected one of {', '.join(METHODS)}.{hint}")


def targets(task: str, y: Array) -> Array:
    """Return labels in the form that the hard loss of the task reads.

    Args:
        task: One of `keras_kd.datasets.task_data.TASKS`.
        y: As in `Rows.y`. The gains of a ranking become shares of their row's sum.
    """
    if task != "ranking":
        return y
    total = y.sum(axis=1, keepdims=True)
    return np.divide(y, total, out=np.zeros_like(y), where=total > 0)


def hard_loss(task: str, student: keras.Model, x: Tensors, unlabeled: bool) -> Any:
    """Return the loss between the labels and the student's output.

    For `ranking` it is the cross-entropy between the shares of the gains and the softmax of the
    scores over the items of a row.

    Args:
        task: One of `keras_kd.datasets.task_data.TASKS`.
        student: Its end tells whether it answers logits; where that cannot be read off its layers,
            its answers do.
        x: Some inputs.
        unlabeled: Whether labels may be -1.

    Returns:
        A `keras.losses.Loss`.

    Raises:
        ValueError: If rows without a label meet a student of one unit.

    Reference:
        - [Cao et al., 2007](https://dl.acm.org/doi/10.1145/1273496.1273513), ListNet
    """
    import keras

    losses = keras.losses
    if task == "regression":
        return losses.MeanSquaredError()
    logits = _answers_logits(student, x)
    if task == "multilabel":
        return losses.BinaryCrossentropy(from_logits=logits)
    if task == "ranking":
        return losses.CategoricalCrossentropy(from_logits=logits)
    if task == "classification" and is_single(student):
        if unlabeled:
            raise ValueError(
                "Some training rows have no label, and the student has a single unit, whose loss "
                "cannot leave them out. Give it one unit for each class."
            )
        return losses.BinaryCrossentropy(from_logits=logits)
    ignored = UNLABELED if unlabeled or task == "tokens" else None
    return losses.SparseCategoricalCrossentropy(from_logits=logits, ignore_class=ignored)


def _answers_logits(model: keras.Model, x: Tensors) -> bool:
    import keras

    from keras_kd.export.verification.output_meaning import is_probability
    from keras_kd.models.output_kinds import outputs_of

    kind = outputs_of(model)[0].kind
    if kind in ("softmax", "sigmoid"):
        return False
    if kind == "logits":
        return True
    return not is_probability(keras.ops.convert_to_numpy(model(x, training=False)))


def distillation(
    method: str,
    task: str,
    *,
    alpha: float | None = None,
    temperature: float | None = None,
    label_weight: float | None = None,
    teacher_weight: float | None = None,
) -> dict[str, Any]:
    """Return what `Distiller.compile` is given for a method.

    Args:
        method: One of `METHODS` but for `plain`, which has no teacher.
        task: One of `keras_kd.datasets.task_data.TASKS`.
        alpha: Weight of the hard loss, in [0, 1].
        temperature: Of the losses that soften.
        label_weight: With `teacher_weight` in place of `alpha`: `student_loss_weight`.
        teacher_weight: `distillation_loss_weight`.

    Raises:
        ValueError: If the method does not fit the task.
    """
    from keras_kd import losses

    weights = {
        "alpha": alpha,
        "temperature": temperature,
        "student_loss_weight": label_weight,
        "distillation_loss_weight": teacher_weight,
    }
    given = {name: value for name, value in weights.items() if value is not None}
    if method == AUTO:
        return {"distillation_loss": "auto"}
    independent = task == "multilabel"
    if method == DEFAULT:
        # What the outputs mean tells the rest, but for plain numbers.
        return {"distillation_loss": losses.LogitMSE() if task == "regression" else None, **given}
    if task == "regression" and method not in ("LogitMSE", "LogitHuber"):
        raise ValueError(
            f"`--method {method}` compares classes, and a regression has none. Choose `default`, "
            "LogitMSE or LogitHuber."
        )
    if independent != (method == "BinarySoftTargets") and method not in ("LogitMSE", "LogitHuber"):
        raise ValueError(
            f"`--method {method}` does not fit the task `{task}`. Choose `default`, "
            f"{'BinarySoftTargets' if independent else 'SoftTargets'}, LogitMSE or LogitHuber."
        )
    if method == STANDARDIZED:
        own = given.pop("temperature", 2.0)
        return {"distillation_loss": losses.SoftTargets(own, standardize=True), **given}
    return {"distillation_loss": getattr(losses, method)(), **given}


def check_weights(method: str, given: dict[str, float | None]) -> None:
    """Refuse weights that the method does not read, before any work.

    Args:
        method: One of `METHODS`.
        given: Values by option name.

    Raises:
        ValueError: Naming the option.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if method in (PLAIN, AUTO) and named:
        raise ValueError(
            f"`--method {method}` reads no {_listed(named)}. Leave it out, or name a method."
        )
    for name, value in named.items():
        if not 0 <= value < float("inf") or (name == "alpha" and value > 1):
            limits = "in [0, 1]" if name == "alpha" else "finite and not negative"
            raise ValueError(f"`--{name.replace('_', '-')}` is {limits}. Received: {value!r}.")
    if named.get("temperature") == 0:
        raise ValueError("`--temperature` is above 0. Received: 0.")
    if "alpha" in named and len({*named} - {"temperature"}) > 1:
        raise ValueError(
            "`--alpha` is the weight of the hard loss, and the distillation loss has the rest. "
            "Leave it out beside the two weights, or those."
        )


def _listed(names: Iterable[str]) -> str:
    return " or ".join(f"`--{name.replace('_', '-')}`" for name in names)


def is_single(model: keras.Model) -> bool:
    """Say whether a model has a single output of one unit."""
    import keras

    outputs = keras.tree.flatten(model.outputs or [])
    return len(outputs) == 1 and outputs[0].shape[-1] == 1


def check_model(model: keras.Model, what: str, data: TaskData) -> None:
    """Refuse a model that does not fit the data.

    Args:
        model: A built `keras.Model`.
        what: What the errors call it, `"student"` or `"teacher"`.
        data: The data.

    Raises:
        ValueError: If it takes other rows or answers something else than the labels are.
    """
    _check_shape(model, what, data)
    check_output(model, what, data)
    inputs.check_inputs(inputs.first_rows(data.train.x), f"{what}'s", model)
    _check_words(model, what, data)


def _check_shape(model: keras.Model, what: str, data: TaskData) -> None:
    """Refuse rows of another shape, and say which option changes it."""
    taken = [tuple(tensor.shape[1:]) for tensor in model.inputs or []]
    if len(taken) != 1 or isinstance(data.train.x, dict):
        return
    want, have = taken[0], tuple(data.train.x.shape[1:])
    fits = len(want) == len(have) and all(a in (None, b) for a, b in zip(want, have, strict=True))
    if fits:
        return
    kind, first = data.inputs.get("kind"), want[0] if want else None
    if "length" in data.inputs and len(want) == 1:
        cure = f"`--length {first}` reads as many of each."
    elif kind == "table":
        wide = [column for column in data.inputs["columns"] if len(column.get("values", ())) > 1]
        cure = "Each column is one number, or one for each of its categories" + (
            ": " + ", ".join(f"`{one['name']}` has {len(one['values'])}" for one in wide[:6]) + "."
            if wide
            else "."
        )
    elif kind == "images" and len(want) == 3 and want[2:] == have[2:] and want[0] == want[1]:
        cure = f"`--image-size {first}` resizes those of folders and TFDS."
    elif kind == "images" and len(want) == 3 and len(have) == 3:
        cure = "The last number is that of the channels, 1 for gray and 3 for colors."
    else:
        cure = "Store rows of that shape."
    raise ValueError(
        f"The {what} `{model.name}` takes rows of shape {want}, and those of `{data.name}` have "
        f"{have}. {cure} Or pass a {what} that takes them."
    )


def _check_words(model: keras.Model, what: str, data: TaskData) -> None:
    import keras

    if "vocabulary" not in data.inputs:
        return
    words = len(data.inputs["vocabulary"])
    tables = [layer for layer in model.layers if isinstance(layer, keras.layers.Embedding)]
    for layer in tables:
        if len(tables) == 1 and layer.input_dim < words:
            raise ValueError(
                f"The embedding `{layer.name}` of the {what} `{model.name}` has "
                f"{layer.input_dim:,} rows, and the vocabulary of `{data.name}` {words:,} words. "
                "Pass the vocabulary that the model was made for (`--vocabulary FILE`), or a "
                "larger model."
            )


def check_output(model: keras.Model, what: str, data: TaskData) -> None:
    """Refuse a model whose output does not fit the labels.

    Args:
        model: A built `keras.Model`.
        what: What the errors call it.
        data: The data.

    Raises:
        ValueError: If it has several outputs, or another number of units.
    """
    import keras

    outputs = keras.tree.flatten(model.outputs or [])
    if len(outputs) != 1:
        raise ValueError(
            f"The {what} `{model.name}` has {len(outputs)} outputs, and one is distilled here. "
            "Distill models of several outputs in Python with `keras_kd.Distiller`."
        )
    shape = tuple(outputs[0].shape)
    units, rank = data.units, 3 if data.task == "tokens" else 2
    binary = data.task == "classification" and units == 2 and shape[1:] == (1,)
    if len(shape) == rank and shape[-1] in (units, None):
        length = data.train.y.shape[1] if rank == 3 else None
        if length is not None and shape[1] not in (length, None):
            raise ValueError(
                f"The {what} `{model.name}` answers {shape[1]} tokens of a row, and the labels of "
                f"`{data.name}` are {length} long. Pad both to one length; -1 is no label."
            )
        return
    if binary:
        return
    wanted = f"(batch, length, {units})" if rank == 3 else f"(batch, {units})"
    names = f": {', '.join(data.class_names[:8])}" if data.class_names else ""
    raise ValueError(
        f"The {what} `{model.name}` has outputs of shape {shape}, but `{data.name}` with the task "
        f"`{data.task}` needs {wanted}{names[:200]}. Choose a {what} of this task, or say what the "
        "units are (`--classes`)."
    )


def judged_by(task: str, found: dict[str, Any]) -> str:
    """Return the first figure of the task that was measured.

    Args:
        task: One of `keras_kd.datasets.task_data.TASKS`.
        found: Figures by name, on the rows that judge.

    Raises:
        ValueError: If there is none.
    """
    for name in RECIPES[task].judges:
        if found.get(name) is not None:
            return name
    raise ValueError(
        f"None of {', '.join(RECIPES[task].judges)} can be measured on the validation rows. Add "
        "rows, so that each class has some."
    )
