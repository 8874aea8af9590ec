"""The methods that may be chosen by trying them: a name, and what `compile` is given for it.

A candidate sees the `Situation` (what the outputs mean, how many classes, student and teacher) and
answers with arguments of `Distiller.compile`, or says in a sentence why it does not apply. A new
one is a function like these and a line in `CANDIDATES`. `docs/methods.md` explains the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_kd.losses import DIST, ICKD, PKT, HiddenState, LogitHuber, LogitMSE, SoftTargets
from keras_kd.models import meaning
from keras_kd.transfers.layer_matching import LayerPairs, match_layers
from keras_kd.transfers.output_pairing import soft_targets
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import checks
from keras_kd.utils.types import Losses

PLAIN, DEFAULT = "plain", "default"

_FEW = 10
"""Classes up to which the weights are those that the papers use."""


@dataclass(frozen=True)
class Situation:
    """What a candidate may look at.

    Args:
        hard: The hard loss, as given to `compile`; for several outputs nested as they are.
        told: What the output means (`keras_kd.models.meaning`); `None` where there are several.
        classes: Units of the output, `None` where there are several outputs.
        student: The model that is trained.
        teacher: The teacher's model where it is a single one, whose layers can be read.
        x: A few rows that both read, for models without a graph.
    """

    hard: Any
    told: str | None
    classes: int | None
    student: Any
    teacher: Any = None
    x: Any = None

    @property
    def shrinking(self) -> float:
        """What weights of terms over many classes are multiplied by: `min(1, 10 / classes)`."""
        return min(1.0, _FEW / self.classes) if self.classes else 1.0

    def usual(self) -> Any:
        """The default loss of the output: `compile` has none for a regression."""
        return LogitMSE() if self.told == meaning.VALUES else soft_targets(self.told, self.hard)

    def reduction(self) -> dict[str, Any]:
        """The reduction of the hard loss, where a loss beside it needs the same."""
        found = meaning.option(self.hard, "reduction")
        return {"reduction": found} if found in ("sum", "mean_with_sample_weight") else {}


@dataclass(frozen=True)
class Made:
    """A method for one situation.

    Args:
        arguments: Keywords of `Distiller.compile`.
        taps: Layers of the teacher that it reads.
        features: Numbers that these layers give for a row, as far as is known.
    """

    arguments: dict[str, Any]
    taps: tuple[str, ...] = ()
    features: int = 0


Candidate = Callable[[Situation], Made | str]
"""From the situation to a method, or to the reason why there is none."""


def _plain(situation: Situation) -> Made | str:
    return Made({"alpha": 1.0})


def _default(situation: Situation) -> Made | str:
    if situation.told == meaning.VALUES:
        return Made({"distillation_loss": situation.usual()})
    return Made({})


def _answers(situation: Situation) -> Made | str:
    if situation.told is None:
        return _SEVERAL
    return Made({"distillation_loss": situation.usual(), "alpha": 0.0})


def _standardized(situation: Situation) -> Made | str:
    if situation.told != meaning.CLASSES:
        return _NEEDS_CLASSES
    if (situation.classes or 0) < 3:
        return _NEEDS_THREE
    return Made(
        {
            "distillation_loss": SoftTargets(2.0, standardize=True, **situation.reduction()),
            "student_loss_weight": 0.1,
            "distillation_loss_weight": 9.0 * situation.shrinking,
        }
    )


def _dist(situation: Situation) -> Made | str:
    if situation.told != meaning.CLASSES:
        return _NEEDS_CLASSES
    if (situation.classes or 0) < 3:
        return _NEEDS_THREE
    # At 1 / T**2 the term pulls as hard as the cross-entropy does: less is never needed.
    weight = 2.0 * max(1 / 16, situation.shrinking)
    return Made(
        {
            "distillation_loss": DIST(temperature=4.0, **situation.reduction()),
            "student_loss_weight": 1.0,
            "distillation_loss_weight": weight,
        }
    )


def _soft(situation: Situation) -> Made | str:
    if situation.told != meaning.INDEPENDENT:
        return "it is for independent classes"
    return Made(
        {"distillation_loss": soft_targets(situation.told, situation.hard), "temperature": 2.0}
    )


def _huber(situation: Situation) -> Made | str:
    if situation.told != meaning.VALUES:
        return "it is for regressions"
    return Made({"distillation_loss": LogitHuber(**situation.reduction())})


def _features(situation: Situation) -> Made | str:
    if situation.told is None:
        return _SEVERAL
    if situation.teacher is None:
        return "the teacher shows no layers"
    try:
        pairs = match_layers(situation.student, situation.teacher, situation.x)
    except (TypeError, ValueError):
        return "the layers of student and teacher do not match"
    if not pairs:
        return "the layers of student and teacher do not match"
    pair = LayerPairs(pairs[-1:])
    ranks = {len(pair[0].student_shape or ()), len(pair[0].teacher_shape or ())}
    if ranks == {4}:
        transfers = pair.transfers(ICKD(), weight=2.5)
    elif ranks == {3}:
        transfers = pair.transfers(HiddenState(), weight=1.0)
    elif ranks == {2}:
        transfers = pair.transfers(PKT(), projector=None, weight=30000.0)
    else:
        return "the layers of student and teacher do not match"
    return Made(
        {
            "distillation_loss": [situation.usual(), *transfers],
            "student_loss_weight": 1.0,
            "distillation_loss_weight": 1.0,
        },
        taps=(pair[0].teacher,),
        features=math.prod(size or 1 for size in pair[0].teacher_shape[1:]),
    )


_SEVERAL = "there are several outputs"
_NEEDS_CLASSES = "it is for one output of exclusive classes"
_NEEDS_THREE = "two classes leave it nothing to compare"

CANDIDATES: dict[str, Candidate] = {
    PLAIN: _plain,
    DEFAULT: _default,
    "answers": _answers,
    "standardized": _standardized,
    "dist": _dist,
    "soft": _soft,
    "huber": _huber,
    "features": _features,
}
"""By name: no teacher; the defaults of `compile`; their loss without the labels; standardized
`SoftTargets` at T = 2; `DIST` at T = 4; `BinarySoftTargets` at T = 2; `LogitHuber`; the defaults
beside a loss of the last matched layers: `ICKD` of maps, `HiddenState` of sequences, `PKT` of
vectors."""


def chosen(methods: object) -> dict[str, Candidate]:
    """The candidates that are asked for, plain training first.

    Args:
        methods: `"default"` for all; a list of names; or a dict from names to arguments of
            `Distiller.compile`, to functions of the student that return these, or to `None` for
            the candidate of that name.

    Raises:
        ValueError: If a name is unknown, or nothing is left beside plain training.
        TypeError: If `methods` is of another type.
    """
    if isinstance(methods, str) and methods == "default":
        return dict(CANDIDATES)
    if isinstance(methods, str):
        methods = [methods]
    if isinstance(methods, Mapping):
        given = dict(methods)
    elif isinstance(methods, Sequence):
        given = dict.fromkeys(methods)
    else:
        raise TypeError(
            '`methods` is "default", a list of names, or a dict from names to arguments of '
            f"`compile`. Received: methods={methods!r}."
        )
    made: dict[str, Candidate] = {PLAIN: _plain}
    for name, own in given.items():
        if own is None:
            checks.known_keys([name], list(CANDIDATES), "methods")
            made[name] = CANDIDATES[name]
        elif name == PLAIN:
            raise ValueError(f"`{PLAIN}` is training without a teacher. Choose another name.")
        else:
            made[str(name)] = _own(name, own)
    if len(made) < 2:
        raise ValueError(
            f"`methods` names nothing beside plain training. Received: methods={methods!r}. Known "
            f"are {', '.join(CANDIDATES)}."
        )
    return made


def _own(name: str, given: object) -> Candidate:
    """A candidate of the user's own."""
    if not isinstance(given, Mapping) and not callable(given):
        raise TypeError(
            f"The method {name!r} is given by a dict of arguments of `compile`, or by a function "
            f"of the student that returns one. Received: {given!r}."
        )

    def candidate(situation: Situation) -> Made | str:
        arguments = dict(given(situation.student) if callable(given) else given)
        checks.known_keys(arguments, _ARGUMENTS, f"methods[{name!r}]")
        return Made(arguments, tuple(_taps(arguments.get("distillation_loss"))))

    return candidate


_ARGUMENTS = (
    *("distillation_loss", "alpha", "temperature"),
    *("student_loss_weight", "distillation_loss_weight"),
)


def _taps(loss: Losses) -> list[str]:
    """The layers of the teacher that a loss of the user's own reads."""
    each = loss if isinstance(loss, list | tuple) else [loss]
    found: list[str] = []
    for one in each:
        if isinstance(one, Transfer) and one.teacher is not None:
            found += one.teacher if isinstance(one.teacher, list) else [one.teacher]
    return found
