"""Distillation in stages: through assistants, and from generation to generation."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_kd import teachers
from keras_kd.distill.compiled import fresh_optimizer
from keras_kd.distill.distiller import Distiller
from keras_kd.transfers.transfer import Transfer, fresh_loss
from keras_kd.utils import checks
from keras_kd.utils.types import Losses


def distill_chain(
    models: Sequence[Any],
    *fit_args: Any,
    compile: dict[str, Any] | Callable[[int], dict[str, Any]],
    **fit_kwargs: Any,
) -> list[Any]:
    """Distil through assistants: each model teaches the next (TAKD).

    Plain distillation from `models[0]` to `models[1]`, from there to
    `models[2]`, and so on; the last one is the student. An assistant of middle
    size helps where the teacher is far larger than the student.

    Args:
        models: The trained teacher, as any for `Distiller`: a `keras.Model`, a
            list of them, an `Ensemble` or a `CachedTeacher`; then the
            assistants from large to small, and the student, `keras.Model`s.
        *fit_args: Positional arguments of `Distiller.fit`: the data.
        compile: Arguments of `Distiller.compile`, or `fn(stage)` that returns
            them, `stage` counting from 0; it is called for all stages before
            the first trains. Each stage gets an optimizer of its own, made anew
            from the configuration of the one given, and so transfers, and
            losses with layers.
        **fit_kwargs: Keyword arguments of `Distiller.fit`.

    Returns:
        One Keras `History` a stage. The models are trained in place.

    Raises:
        ValueError: If there are fewer than two models, one stands twice, or a
            stage cannot be compiled. Nothing has been trained then, unless a
            student is built only by its training: what it teaches is checked
            after it.
        TypeError: If one is no Keras 3 model.

    Examples:
        >>> histories = distill_chain(
        ...     [teacher, assistant, student], x, y,
        ...     compile={"optimizer": "adam", "loss": "sparse_categorical_crossentropy"},
        ...     epochs=20,
        ... )

    Reference:
        - [Mirzadeh et al., 2020](https://arxiv.org/abs/1902.03393), section 3
    """
    if len(models) < 2:
        raise ValueError(
            "A chain needs a teacher and a student, with any assistants between them. Received: "
            f"{len(models)} models."
        )
    first = teachers.make(models[0], None)
    if first is None:
        raise ValueError("A chain begins with a trained teacher. Received: models[0]=None.")
    for model in models[1:]:
        checks.require_model(model, "student")
    known = [*first.models, *models[1:]]
    if len({id(model) for model in known}) != len(known):
        raise ValueError("A model stands twice in the chain. Each learns from the one before it.")

    def made(stage: int) -> Distiller:
        arguments = dict(compile(stage) if callable(compile) else compile)
        arguments["optimizer"] = fresh_optimizer(arguments.get("optimizer", "adam"))
        arguments["distillation_loss"] = _fresh_losses(arguments.get("distillation_loss"))
        distiller = Distiller(models[stage + 1], models[stage] if stage else first)
        distiller.compile(**arguments)
        return distiller

    # All are checked before the first trains for hours; a model that is built by its own training
    # cannot be read as a teacher before.
    stages = [made(i) if i == 0 or models[i].built else None for i in range(len(models) - 1)]
    return [
        (distiller or made(i)).fit(*fit_args, **fit_kwargs) for i, distiller in enumerate(stages)
    ]


def born_again(
    model: keras.Model,
    *fit_args: Any,
    generations: int,
    compile: dict[str, Any] | Callable[[int], dict[str, Any]],
    **fit_kwargs: Any,
) -> list[Any]:
    """Distil a model into fresh copies of its own kind, one generation after the other.

    Args:
        model: The trained first teacher, a `keras.Model` that can be cloned.
        *fit_args: Positional arguments of `Distiller.fit`: the data.
        generations: How many copies are trained, at least 1.
        compile: As in `distill_chain`.
        **fit_kwargs: Keyword arguments of `Distiller.fit`.

    Returns:
        The generations in order. `keras_kd.teachers.Ensemble([model, *these])`
        is the ensemble of the paper.

    Raises:
        ValueError: If `generations` is less than 1.

    Examples:
        >>> children = born_again(
        ...     model, x, y, generations=2, compile={"loss": loss}, epochs=20
        ... )

    Reference:
        - [Furlanello et al., 2018](https://arxiv.org/abs/1805.04770), section 3
    """
    if generations < 1:
        raise ValueError(f"`generations` is at least 1. Received: generations={generations}.")
    children = [keras.models.clone_model(model) for _ in range(generations)]
    distill_chain([model, *children], *fit_args, compile=compile, **fit_kwargs)
    return children


def _fresh_losses(losses: Losses) -> Any:
    """Transfers and losses that have learned nothing, structured as those given."""
    if isinstance(losses, dict):
        return {name: _fresh_losses(loss) for name, loss in losses.items()}
    if isinstance(losses, list | tuple):
        return [_fresh_losses(loss) for loss in losses]
    return losses.fresh() if isinstance(losses, Transfer) else fresh_loss(losses)
