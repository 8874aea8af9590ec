"""The transfers of a distiller as a table."""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_kd.distill import batch
from keras_kd.distill.pairing import Pairing
from keras_kd.transfers import projectors
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import tables


def rows(
    transfers: list[Transfer], shapes: dict[Transfer, tuple[Any, Any]]
) -> list[dict[str, Any]]:
    """What is transferred: one row a transfer, as `Distiller.summary_of_transfers` returns."""
    return [
        {
            "name": transfer.name,
            "loss": type(transfer.loss).__name__,
            "teacher": transfer.teacher or "output",
            "student": transfer.student or "output",
            "projector": transfer.projector,
            "weight": float(ops.convert_to_numpy(transfer.weight)),
            "teacher_shape": shapes.get(transfer, (None, None))[0],
            "student_shape": shapes.get(transfer, (None, None))[1],
            "projection": _projection(transfer, shapes.get(transfer)),
            "parameters": (
                sum(math.prod(v.shape) for v in transfer.trainable_variables)
                if transfer.built
                else None
            ),
        }
        for transfer in transfers
    ]


def render(
    name: str,
    found: list[dict[str, Any]],
    line_length: int | None,
    print_fn: Callable[[str], Any] | None,
) -> None:
    """Print the rows as a table."""
    cells = [
        (
            f"{row['name']} (x {row['weight']:g})",
            _read(row["teacher"], row["teacher_shape"]),
            _read(row["student"], row["student_shape"]),
            row["projection"],
            "-" if row["parameters"] is None else row["parameters"],
        )
        for row in found
    ]
    columns = ("Transfer", "Teacher", "Student", "Projector", "Params")
    title = f'Transfers of "{name}"' + ("" if cells else ": none; compile it first")
    print_fn = print if print_fn is None else print_fn
    print_fn(tables.render(columns, cells, title, line_length or 80) if cells else title)


def seen_shapes(pairing: Pairing) -> dict[Transfer, tuple[Any, Any]]:
    """What each transfer reads on both sides, as far as that is known.

    Args:
        pairing: The readers and the placed transfers of a distiller.
    """
    shapes: dict[Transfer, tuple[Any, Any]] = {}
    for transfer, _ in pairing.placed:
        known = transfer.get_build_config()
        if known is not None:
            shapes[transfer] = (known["teacher_shape"], known["student_shape"])
    model = pairing.student.model
    inputs = getattr(model, "inputs", None)
    if (
        all(transfer in shapes for transfer, _ in pairing.placed)
        or not inputs
        or any(None in tensor.shape[1:] for tensor in inputs)
        or pairing.teacher is None
        or pairing.reads_records
        or not pairing.teacher.compiled
        or pairing.student_inputs is not None
        or pairing.teacher_inputs is not None
    ):
        return shapes
    # One row of zeros shows the shapes; nothing is built or booked.
    zeros = keras.tree.map_structure(
        lambda tensor: ops.zeros((1, *tensor.shape[1:]), dtype=tensor.dtype),
        inputs[0] if len(inputs) == 1 else model.input,
    )
    student = pairing.student.read(zeros, False, pairing.match.units)
    teacher = pairing.teacher.answer(zeros, None, pairing.match.teacher_units)
    for transfer, output in pairing.placed:
        index = pairing.match.counterpart(output)
        theirs = batch.pick(teacher, transfer.teacher, index, transfer.reads_logits)
        ours = batch.pick(student, transfer.student, output, transfer.reads_logits)
        shapes.setdefault(transfer, (batch.shapes(theirs), batch.shapes(ours)))
    return shapes


def _projection(transfer: Transfer, shapes: tuple[Any, Any] | None) -> str:
    """What stands between the student's features and the loss, in words."""
    if transfer.projector is None:
        return "none"
    if not isinstance(transfer.projector, str):
        return type(transfer.projector).__name__
    if shapes is None or None in shapes:
        return transfer.projector
    pairs = [shapes] if isinstance(shapes[0], tuple) else list(zip(*shapes))
    if not all(isinstance(shape, tuple) for pair in pairs for shape in pair):
        return transfer.projector
    return ", ".join(projectors.describe(transfer.projector, *pair) for pair in pairs)


def _read(taps: object, shapes: object) -> str:
    """Where a transfer reads, and the shapes there without the batch."""
    taps, shapes = (v if isinstance(v, list) else [v] for v in (taps, shapes))
    return ", ".join(
        tap if shape is None else f"{tap} {'x'.join(str(d or '?') for d in shape[1:])}"
        for tap, shape in zip(taps, shapes)
    )
