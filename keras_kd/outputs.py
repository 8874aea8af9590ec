"""Which loss compares which outputs of student and teacher."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras

from keras_kd import checks
from keras_kd.losses.divergences import BinarySoftTargets, SoftTargets
from keras_kd.transfer import Transfer


class Placed(NamedTuple):
    """A transfer and the flat output that it reads where it names no layer."""

    transfer: Transfer
    output: int


class Match(NamedTuple):
    """How the flat outputs of the student meet those of the teacher.

    Attributes:
        order: For each output of the student the teacher's that answers it.
        binary: For each output of the student whether its units are
            independent.
    """

    order: list[int]
    binary: list[bool]


def place(distillation_loss: Any, template: Any) -> list[Placed]:
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
    elif isinstance(distillation_loss, dict):
        checks.known_keys(distillation_loss, names, "distillation_loss")
    else:
        several = isinstance(distillation_loss, list | tuple)
        for entry in distillation_loss if several else [distillation_loss]:
            on_layers = isinstance(entry, Transfer) and None not in (entry.teacher, entry.student)
            for i in range(1 if on_layers else len(names)):
                placed.append(Placed(_as_transfer(entry, names, i), i))
    if not placed:
        raise ValueError(
            "`distillation_loss` is empty, so the teacher would teach nothing. Received: "
            f"distillation_loss={distillation_loss!r}. Leave it out for the default, or name one."
        )
    return placed


def default_loss(student: Any, hard: Any) -> Any:
    """`SoftTargets` for each output, or `BinarySoftTargets` where its units are independent.

    Args:
        student: The `Reader` of the student.
        hard: The hard loss as given to `compile`, or `None`.

    Returns:
        A loss, or losses shaped like the outputs.

    Raises:
        ValueError: If one linear unit may be a regression.
    """
    template, kinds, shapes = student.template, student.kinds(), student.shapes
    chosen = []
    for i in range(len(_names(template))):
        one_unit = shapes is not None and shapes[i][-1] == 1
        sigmoid = kinds[i] == "sigmoid"
        if one_unit and not sigmoid:
            checks.one_unit_is_binary(hard, student.model.name)
        chosen.append(BinarySoftTargets() if one_unit or sigmoid else SoftTargets())
    if len(chosen) == 1:
        return chosen[0]
    return keras.tree.pack_sequence_as(template, chosen)


def match(placed: Sequence[Placed], student: Any, teacher: Any) -> Match:
    """Match the outputs, and refuse those that cannot be compared.

    Args:
        placed: What is compared.
        student: The `Reader` of the student.
        teacher: The `Teacher`.

    Returns:
        How the outputs meet.

    Raises:
        ValueError: If outputs do not fit together or a loss does not fit them.
    """
    ours, theirs = student.template, teacher.output_template()
    count = max([len(_names(ours)), *(output + 1 for _, output in placed)])
    order = list(range(count))
    reads_output = any(None in (t.teacher, t.student) for t, _ in placed)
    if ours is not None and theirs is not None and reads_output:
        order = checks.output_order(ours, theirs)
    binary = [False] * count
    kinds, shapes = (student.kinds(), teacher.kinds), (student.shapes, teacher.output_shapes())
    for transfer, output in placed:
        if not transfer.reads_logits:
            continue
        is_binary = isinstance(transfer.loss, BinarySoftTargets)
        binary[output] = binary[output] or is_binary
        known = []
        for side, tap, index in (
            (0, transfer.student, output),
            (1, transfer.teacher, order[output]),
        ):
            of_side = shapes[side]
            if tap is None and of_side is not None:
                kind, shape = kinds[side][index], of_side[index]
                name = ("student", "teacher")[side]
                checks.logit_loss_fits(transfer, is_binary, kind, shape, name)
                known.append(shape)
        if len(known) == 2:
            checks.same_classes(known[1], known[0])
    return Match(order, binary)


def comparable(match: Match, student: Any, teacher: Any) -> bool:
    """Whether some output has the same classes on both sides, as far as the shapes are known."""
    if student is None or teacher is None:
        return True
    pairs = zip(student, (teacher[i] for i in match.order if i < len(teacher)))
    return any(s[-1] == t[-1] and len(s) == len(t) for s, t in pairs)


def transfers(placed: Sequence[Placed]) -> list[Transfer]:
    """Each transfer once, though it may read several outputs."""
    return list(dict.fromkeys(each.transfer for each in placed))


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


def _names(template: Any) -> list[str]:
    return list(keras.tree.flatten(template)) if template is not None else ["output"]


def _shaped_like(losses: Any, template: Any) -> bool:
    """Whether losses are given output by output."""
    if not isinstance(template, list | tuple | dict):
        return False
    names = _names(template)
    if isinstance(losses, dict):
        return set(losses) <= set(names)
    if not isinstance(losses, list | tuple) or len(losses) != len(names):
        return False
    return not any(isinstance(loss, Transfer) for loss in losses)


def _aligned(losses: Any, template: Any) -> list[Any]:
    """One entry a flat output, in the order of the flat outputs."""
    return [losses.get(n) for n in _names(template)] if isinstance(losses, dict) else list(losses)


def _as_transfer(loss: Any, names: Sequence[str], output: int) -> Transfer:
    if isinstance(loss, Transfer):
        return loss
    transfer = Transfer(loss)
    if len(names) == 1:
        return transfer
    transfer.name = f"{names[output]}_{transfer.name}"
    return transfer
