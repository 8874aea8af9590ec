"""Which loss compares which outputs of student and teacher."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import keras

from keras_kd.losses.divergences import BinarySoftTargets, SoftTargets
from keras_kd.models import meaning, output_kinds
from keras_kd.models.model_reader import Reader
from keras_kd.transfers import compatibility
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import checks
from keras_kd.utils.types import Losses


class Placed(NamedTuple):
    """A transfer and the flat output that it reads where it names no layer."""

    transfer: Transfer
    output: int


class Match(NamedTuple):
    """How the flat outputs of the student meet those of the teacher.

    Attributes:
        order: For each output of the student the teacher's that answers it,
            `None` where there is none.
        units: For each output of the student what it means, as in
            `keras_kd.models.meaning`: as which kind both sides are read.
        decides: For each output of the student whether it decides between
            classes, so that it can agree with the teacher.
    """

    order: list[int | None]
    units: list[str]
    decides: list[bool]

    @property
    def teacher_units(self) -> list[str]:
        """The same as `units` for each output of the teacher; classes where nobody reads it."""
        places = [i for i in self.order if i is not None]
        found = [meaning.CLASSES] * (max(places, default=-1) + 1)
        for i, unit in zip(self.order, self.units):
            if i is not None:
                found[i] = unit
        return found

    def counterpart(self, output: int) -> int:
        """The teacher's flat output that answers an output that is distilled."""
        index = self.order[output] if output < len(self.order) else output
        return output if index is None else index


class Answering(Protocol):
    """What is read here of a `keras_kd.teachers.base.Teacher`, which says what each of it is."""

    @property
    def kinds(self) -> list[str]:
        """How its flat outputs end."""

    def output_template(self) -> Any:
        """The structure of its outputs with their names, or `None`."""

    def output_shapes(self) -> list[Any] | None:
        """Shapes of its flat outputs, where they are known."""

    def own_loss(self, output: int) -> Any:
        """The loss that it was compiled with for an output."""

    def is_last(self, output: int) -> bool:
        """Whether an output has its classes on the last axis."""

    def is_doubtful(self, output: int) -> bool:
        """Whether nothing tells if an output is logits."""

    def require_logits(self, output: int) -> None:
        """Refuse an output that gives no logits."""


def place(distillation_loss: Any, template: object) -> list[Placed]:
    """Every transfer with the flat output it reads.

    Args:
        distillation_loss: A loss, a `Transfer`, a list of them that are
            summed, or losses output by output, shaped like the outputs.
        template: The student's outputs with names at the leaves, or `None`
            where they are not known yet, which stands for a single output.

    Returns:
        One entry for each transfer and output.

    Raises:
        ValueError: If there is no loss, or a key names no output.
    """
    names = _names(template)
    placed: list[Placed] = []
    if _shaped_like(distillation_loss, template):
        for i, entry in enumerate(_aligned(distillation_loss, template)):
            for loss in entry if isinstance(entry, list | tuple) else [entry]:
                if loss is not None:
                    placed.append(Placed(_as_transfer(loss, names, i), i))
    elif isinstance(distillation_loss, dict) and not _is_config(distillation_loss):
        known = [*template, *names] if isinstance(template, dict) else names
        checks.known_keys(distillation_loss, list(dict.fromkeys(known)), "distillation_loss")
        raise ValueError(
            f"`distillation_loss` is not nested as the outputs are: {template}. Received: "
            f"{distillation_loss}."
        )
    else:
        several = isinstance(distillation_loss, list | tuple)
        for entry in distillation_loss if several else [distillation_loss]:
            for i in range(1 if isinstance(entry, Transfer) and _on_layers(entry) else len(names)):
                placed.append(Placed(_as_transfer(entry, names, i), i))
    if not placed:
        raise ValueError(
            "`distillation_loss` is empty, so the teacher would teach nothing. Received: "
            f"distillation_loss={distillation_loss!r}. Leave it out for the default, or name one."
        )
    return placed


def default_loss(student: Reader, teacher: Answering, hard: Losses) -> Any:
    """`SoftTargets` for each output, or `BinarySoftTargets` where its units are independent.

    Args:
        student: The `Reader` of the student.
        teacher: The `Teacher`.
        hard: The hard loss as given to `compile`, or `None`.

    Returns:
        A loss, or losses shaped like the outputs.

    Raises:
        ValueError: If nothing tells what an output means, or it is a regression.
    """
    template, shapes = student.template, student.shapes
    names = _names(template)
    order = _order(student, teacher, range(len(names)))
    each = checks.per_output(hard, template)
    unlabeled = all(one is None for one in keras.tree.flatten(hard))
    chosen = []
    for i, name in enumerate(names):
        told = _meaning(i, each[i], student, teacher, order[i])
        count = None if shapes is None else shapes[i][-1]
        # Without any labels the teacher's distribution is all there is; what has no shape yet is
        # asked about with the first batch.
        assumed = count != 1 and (unlabeled or shapes is None)
        if told == meaning.VALUES or (told is None and not assumed):
            compatibility.name_the_loss(
                student.model.name,
                name if len(names) > 1 else None,
                count,
                _kind(student.kinds(), i),
                each[i],
                told == meaning.VALUES,
                None if (at := order[i]) is None else teacher.own_loss(at),
            )
        chosen.append(soft_targets(told, each[i]))
    if len(chosen) == 1:
        return chosen[0]
    return keras.tree.pack_sequence_as(template, chosen)


def soft_targets(told: str | None, hard: Losses, **options: Any) -> Any:
    """The loss between logits that mean this, reduced as the hard loss is.

    Args:
        told: As in `keras_kd.models.meaning`.
        hard: The hard loss of the output, or `None`.
        **options: Arguments of the loss.
    """
    reduction = meaning.option(hard, "reduction")
    if reduction in ("sum", "mean_with_sample_weight"):
        # One sum beside one mean would weigh the two losses by the size of the batch.
        options["reduction"] = reduction
    return (BinarySoftTargets if told == meaning.INDEPENDENT else SoftTargets)(**options)


def refuse_spread(distillation_loss: Any, template: object, hard: Losses) -> None:
    """Raise `ValueError` where one loss for all outputs takes one for what it is not.

    Args:
        distillation_loss: As given to `compile`.
        template: The student's outputs with names at the leaves.
        hard: The hard loss as given to `compile`.
    """
    names = _names(template)
    if len(names) == 1 or _shaped_like(distillation_loss, template):
        return
    several = isinstance(distillation_loss, list | tuple)
    for entry in distillation_loss if several else [distillation_loss]:
        loss = entry.loss if isinstance(entry, Transfer) else entry
        compares = getattr(loss, "compares", meaning.VALUES)
        if compares == meaning.VALUES or (isinstance(entry, Transfer) and _on_layers(entry)):
            continue
        for name, one in zip(names, checks.per_output(hard, template)):
            told = meaning.of_loss(one)
            if told not in (None, compares):
                compatibility.not_for_all(loss, compares, name, one, told)


def match(placed: Sequence[Placed], student: Reader, teacher: Answering, hard: Losses) -> Match:
    """Match the outputs, and refuse those that cannot be compared.

    Args:
        placed: What is compared.
        student: The `Reader` of the student.
        teacher: The `Teacher`.
        hard: The hard loss as given to `compile`, or `None`.

    Returns:
        How the outputs meet.

    Raises:
        ValueError: If outputs do not fit together or a loss does not fit them.
    """
    count = max([len(_names(student.template)), *(output + 1 for _, output in placed)])
    read = {output for transfer, output in placed if not _on_layers(transfer)}
    order = _order(student, teacher, sorted(read))
    order += list(range(len(order), count))
    each = checks.per_output(hard, student.template)
    each += [None] * (count - len(each))
    units, decides = [], []
    for i in range(count):
        told = _meaning(i, each[i], student, teacher, order[i])
        compared = {t.compares for t, output in placed if output == i and not _on_layers(t)}
        units.append(_units(told, compared, i, order[i], student, teacher))
        says = compared & {meaning.CLASSES, meaning.INDEPENDENT}
        decides.append(
            (bool(says) or told in (meaning.CLASSES, meaning.INDEPENDENT))
            and _can_agree(units[i], i, order[i], each[i], student, teacher)
        )
    found = Match(order, units, decides)
    for transfer, output in placed:
        if transfer.reads_logits:
            _require_fit(transfer, output, each[output], found, student, teacher)
    return found


def _order(student: Reader, teacher: Answering, read: Iterable[int]) -> list[int | None]:
    """For each output of the student the teacher's that answers it, as far as both are known."""
    ours, theirs = student.template, teacher.output_template()
    if ours is None or theirs is None:
        return list(range(len(_names(ours))))
    return compatibility.output_order(ours, theirs, list(read))


def _meaning(
    output: int, hard: Losses, student: Reader, teacher: Answering, index: int | None
) -> str | None:
    """What an output means, by its hard loss, then by how it ends."""
    kinds = [_kind(student.kinds(), output)]
    own = None
    if index is not None:
        kinds.append(_kind(teacher.kinds, index))
        own = teacher.own_loss(index)
    return meaning.of_output(hard, tuple(kinds), own)


def _units(
    told: str | None,
    compared: set[str | None],
    output: int,
    index: int | None,
    student: Reader,
    teacher: Answering,
) -> str:
    """As what an output is read: what its losses take it for, else what it means."""
    for unit in (meaning.INDEPENDENT, meaning.CLASSES):
        if unit in compared:
            return unit
    ends = [_kind(student.kinds(), output)]
    ends += [_kind(teacher.kinds, index)] if index is not None else []
    if told == meaning.VALUES and not _PROBABILITIES & set(ends):
        return meaning.VALUES
    return meaning.INDEPENDENT if told == meaning.INDEPENDENT else meaning.CLASSES


_PROBABILITIES = {"softmax", "sigmoid"}


def _can_agree(
    unit: str, output: int, index: int | None, hard: Losses, student: Reader, teacher: Answering
) -> bool:
    """Whether decisions of both sides can be read from their logits, and compared."""
    if index is None or not (student.is_last(output) and teacher.is_last(index)):
        return False
    ours, theirs = student.shapes, teacher.output_shapes()
    if ours is not None and output < len(ours):
        shape = ours[output]
        if not output_kinds.is_last(meaning.axis_of(hard), len(shape)):
            return False
        if unit == meaning.CLASSES and shape[-1] == 1:
            return False
        if theirs is not None and index < len(theirs):
            other = theirs[index]
            if len(shape) != len(other) or shape[-1] != other[-1]:
                return False
    # The greatest probability is that of the greatest logit, but 0 is no threshold for it.
    doubtful = student.is_doubtful(output) or teacher.is_doubtful(index)
    return not (doubtful and unit == meaning.INDEPENDENT)


def _require_fit(
    transfer: Transfer, output: int, hard: Losses, found: Match, student: Reader, teacher: Answering
) -> None:
    """Raise `ValueError` where a loss between logits does not fit what it reads."""
    index = found.counterpart(output)
    known, ends = [], []
    for side, tap, place in (
        (student, transfer.student, output),
        (teacher, transfer.teacher, index),
    ):
        if tap is not None:
            continue
        ours = side is student
        kind = _kind(student.kinds() if ours else teacher.kinds, place)
        shapes = student.shapes if ours else teacher.output_shapes()
        ends.append(kind)
        if found.units[output] != meaning.VALUES:
            side.require_logits(place)
        if shapes is not None and place < len(shapes):
            name = "student" if ours else "teacher"
            compatibility.logit_loss_fits(transfer, kind, shapes[place], name)
            known.append(shapes[place])
            if ours:
                compatibility.classes_are_last(transfer, hard, shapes[place])
    if len(known) == 2:
        compatibility.same_classes(known[1], known[0])
    as_values = transfer.compares == meaning.VALUES and meaning.of_loss(hard) == meaning.VALUES
    if as_values and len({kind in _PROBABILITIES for kind in ends}) == 2:
        compatibility.one_side_ends_in(transfer, hard, *ends)


def _kind(kinds: Sequence[str], output: int) -> str:
    return kinds[output] if output < len(kinds) else "unknown"


def _on_layers(transfer: Transfer) -> bool:
    """Whether a transfer names layers on both sides, and reads no output."""
    return None not in (transfer.teacher, transfer.student)


def transfers(placed: Sequence[Placed]) -> list[Transfer]:
    """Each transfer once, though it may read several outputs."""
    return list(dict.fromkeys(each.transfer for each in placed))


def require_names(placed: Iterable[Placed], penalties: Iterable[Any]) -> None:
    """Raise `ValueError` if a penalty has the name of another log of the distiller."""
    names = [transfer.name for transfer in transfers(list(placed))]
    checks.unique([*names, *(penalty.name for penalty in penalties)], "penalty")


def number(transfers: Sequence[Transfer]) -> None:
    """Number the names that several transfers took from their losses: `hint`, `hint_1`.

    Names that were given stay, and so do those that are free: a transfer may be
    in the logs of another distiller.

    Args:
        transfers: Each once.
    """
    taken = {transfer.name for transfer in transfers if transfer.named}
    for transfer in transfers:
        if transfer.named:
            continue
        count, name = 0, transfer.name
        while name in taken:
            count += 1
            name = f"{transfer.name}_{count}"
        transfer.name = name
        taken.add(name)


def paths(taps: Iterable[Any]) -> list[str]:
    """The paths of layers among taps, each once."""
    each = (path for tap in taps for path in (tap if isinstance(tap, list) else [tap]))
    return list(dict.fromkeys(path for path in each if path is not None))


def _names(template: object) -> list[str]:
    return list(keras.tree.flatten(template)) if template is not None else ["output"]


def _is_config(loss: object) -> bool:
    """Whether a dict is the configuration of one loss, as Keras takes it."""
    return isinstance(loss, dict) and {"class_name", "config"} <= set(loss)


def _shaped_like(losses: object, template: object) -> bool:
    """Whether losses are given output by output."""
    names = _names(template)
    if isinstance(losses, dict):
        return template is not None and _fits(losses, template, names)
    if not isinstance(template, list | tuple | dict):
        return False
    if not isinstance(losses, list | tuple) or len(losses) != len(names):
        return False
    return not any(isinstance(loss, Transfer) for loss in losses)


def _aligned(losses: Any, template: object) -> list[Any]:
    """One entry a flat output, in the order of the flat outputs."""
    return checks.per_output(losses, template) if isinstance(losses, dict) else list(losses)


def _fits(losses: dict[Any, Any], template: Any, names: Sequence[str]) -> bool:
    """Whether all keys name an output, or a part of the structure of nested ones."""
    for key, loss in losses.items():
        inner = template.get(key) if isinstance(template, dict) else None
        if isinstance(inner, dict) and isinstance(loss, dict) and not _is_config(loss):
            if not _fits(loss, inner, ()):
                return False
        elif isinstance(inner, list | tuple) and isinstance(loss, list | tuple):
            if len(inner) != len(loss):
                return False
        elif keras.tree.is_nested(inner) or (inner is None and key not in names):
            return False
    return True


def _as_transfer(loss: object, names: Sequence[str], output: int) -> Transfer:
    if isinstance(loss, Transfer):
        return loss
    transfer = Transfer(compatibility.keras_loss(loss))
    compatibility.not_of_labels(transfer.loss)
    if len(names) == 1:
        return transfer
    transfer.name = f"{names[output]}_{transfer.name}"
    return transfer
