"""What is refused before any work starts: arguments, folder, packages, model."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from keras_kd.export import manifest
from keras_kd.export.arguments import check_name
from keras_kd.export.formats import registry
from keras_kd.export.formats.device_table import check_targets
from keras_kd.export.target import check_folder, check_names_free, check_writable
from keras_kd.utils.errors import did_you_mean

if TYPE_CHECKING:
    import keras


PRECISIONS = ("float32", "float16", "dynamic", "int8")
"""What is made unless asked otherwise."""

CALIBRATED = ("int8", "uint8", "int16x8", "int8_qoperator")
"""Precisions whose activations are integers, which needs calibration data."""

LEARNED = ("int8", "uint8")
"""Those among them that take the ranges of a quantization-aware model instead."""

OPSETS = range(13, 19)
"""ONNX operator sets that tf2onnx writes and that per-channel quantization can live in."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What an export is asked to make, checked and without repetition.

    Args:
        formats: Names of formats.
        precisions: Names of precisions.
        targets: Names of runtimes that the best file must run in.
    """

    formats: list[str]
    precisions: list[str]
    targets: list[str]


def asked(
    folder: Path,
    formats: Sequence[str],
    precisions: Sequence[str],
    *,
    name: str,
    overwrite: bool,
    max_drop: float | None = 0.01,
    objective: str = "size",
    opset: int = 17,
    batch: int | None = None,
    targets: Sequence[str] | str | None = None,
    beside: Sequence[str] = (),
) -> Asked:
    """Check all of an export that is told without its model and its data.

    Args:
        folder: Where it goes.
        formats: See `export_model`, as for all that follows.
        precisions: The same.
        name: The same.
        overwrite: The same.
        max_drop: The same.
        objective: The same.
        opset: The same.
        batch: The same.
        targets: The same.
        beside: Names of files that are going to lie beside it.

    Returns:
        What is to be made.

    Raises:
        ImportError: If a package is missing.
        OSError: If the folder cannot be written, or may not be.
        TypeError: If an argument is of another type.
        ValueError: If an argument cannot be used.
    """
    known = names("formats", formats, registry.names())
    found = Asked(known, check_precisions(precisions, known), check_targets(targets))
    check_settings(max_drop, objective, opset, name)
    check_batch(batch)
    check_packages(known)
    check_folder(folder, overwrite)
    check_writable(folder)
    check_names_free(folder, (*beside, *written(name, known, found.precisions)))
    return found


def names(what: str, values: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the given names without repetition, each checked against the known ones.

    Raises:
        TypeError: If they are no list.
        ValueError: If one is unknown, with close matches, or none is given.
    """
    try:
        names = [values] if isinstance(values, str) else list(values)
    except TypeError:
        raise TypeError(
            f"`{what}` must be one of {', '.join(known)}, or a list of them. Received: {values!r}."
        ) from None
    if not names:
        raise ValueError(f"`{what}` is empty. Pass at least one of {', '.join(known)}.")
    for value in names:
        if value not in known:
            hint = did_you_mean(value, known)
            raise ValueError(
                f"`{value}` is not known for `{what}`. Expected one of {', '.join(known)}.{hint}"
            )
    return list(dict.fromkeys(names))


def check_precisions(precisions: Sequence[str], formats: Sequence[str]) -> list[str]:
    """Return the precisions without repetition, each checked to exist in one of the formats.

    Raises:
        ValueError: If one is unknown, with close matches, or exists in no format asked for.
    """
    known = {each.name: each.precisions for each in registry.every()}
    checked = names("precisions", precisions, known_precisions())
    for precision in checked:
        if not any(precision in known[fmt] for fmt in formats):
            raise ValueError(
                f"`{precision}` does not exist for {', '.join(formats)}. Precisions by format: "
                + "; ".join(f"{fmt}: {', '.join(found)}" for fmt, found in known.items())
                + "."
            )
    return checked


def written(name: str, formats: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """Return the names of all files that an export may write.

    Args:
        name: The first part of the names of models.
        formats: As they were checked.
        precisions: As they were checked.
    """
    models = [
        f"{name}_{part}{suffix}"
        for fmt in formats
        for part in (*precisions, "mixed")
        for suffix in registry.get(fmt).suffixes
    ]
    return [*models, "evaluation.npz", manifest.FILE]


def known_precisions() -> list[str]:
    """Return the precisions of all formats."""
    return list(dict.fromkeys(name for each in registry.every() for name in each.precisions))


def number(what: str, value: object, *, whole: bool = False) -> None:
    """Refuse what is no finite number.

    Args:
        what: Name of the argument.
        value: Its value.
        whole: Whether it must be an integer.

    Raises:
        TypeError: If it is no number, or no integer.
        ValueError: If it is NaN or infinite.
    """
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(
            f"`{what}` must be {'an integer' if whole else 'a number'}. Received: {value!r}."
        )
    if not math.isfinite(value):
        raise ValueError(f"`{what}` must be a finite number. Received: {value!r}.")


def check_settings(max_drop: float | None, objective: str, opset: int, name: str) -> None:
    """Check the plain settings of an export; see `export_model` for their meaning.

    Raises:
        TypeError: If one is of another type.
        ValueError: If one lies outside its range.
    """
    # Not a number lies in no range, which is said below.
    if max_drop is not None and max_drop == max_drop:
        number("max_drop", max_drop)
    number("opset", opset, whole=True)
    check_name(name)
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise ValueError(
            f"`max_drop` must lie in [0, 1], as a share of the samples, or be None. "
            f"Received: max_drop={max_drop!r}; one point of accuracy is 0.01."
        )
    names("objective", objective, ("size", "latency"))
    if opset not in OPSETS:
        raise ValueError(
            f"`opset` must lie in {OPSETS[0]}..{OPSETS[-1]}, the range that tf2onnx writes. "
            f"Received: opset={opset!r}."
        )


def check_batch(batch: int | None) -> None:
    """Refuse a batch size that no file is made for.

    Raises:
        ValueError: If it is neither `None` nor 1.
    """
    if batch is not None and (isinstance(batch, bool) or batch != 1):
        raise ValueError(
            "`batch` must be None, which leaves the batch size free, or 1, which fixes it. "
            f"Received: batch={batch!r}."
        )


def check_packages(formats: Sequence[str]) -> None:
    """Refuse formats whose packages are not installed.

    Raises:
        ImportError: Naming the packages and the extra that brings them.
    """
    own = [package for name in formats for package in registry.get(name).packages]
    missing = [name for name in ("tensorflow", "sklearn", *own) if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Export to {', '.join(formats)} needs {', '.join(missing)}, which is not installed. "
            'Install it with `pip install "keras_kd[export]"`.'
        )


def check_model(model: object) -> None:
    """Refuse what is no built Keras 3 model.

    Raises:
        TypeError: If it is something else, such as a `tf_keras` model.
        ValueError: If it is not built.
    """
    import keras

    if not isinstance(model, keras.Model):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        hint = (
            " It is a Keras 2 model: rebuild it with Keras 3 and copy the weights."
            if kind.startswith("tf_keras")
            else " From a Distiller, pass `distiller.student`."
        )
        raise TypeError(f"`model` must be a `keras.Model`. Received: {kind}.{hint}")
    if not model.built:
        raise ValueError(
            f"The model `{model.name}` is not built, so it has no weights to export. Call it on "
            "one batch first."
        )


def check_quantization_aware(model: keras.Model) -> bool:
    """Say whether a model carries the fake quantization of `keras_kd.compress`, ready for int8.

    Args:
        model: Any `keras.Model`.

    Returns:
        Whether it quantizes its activations, and so needs no calibration data.

    Raises:
        ValueError: If it does and has never seen data.
    """
    from keras_kd import compress

    if not compress.has_activation_quantization(model):
        return False
    if not compress.is_calibrated(model):
        raise ValueError(
            f"The quantization-aware model `{model.name}` has never seen data, so its activations "
            "have no ranges. Train it, or call `keras_kd.compress.calibrate(model, x)`."
        )
    return True


def check_data_given(
    calibration: object, evaluation: object, precisions: Sequence[str], quantization_aware: bool
) -> None:
    """Refuse an export without the data it needs.

    Raises:
        ValueError: If int8 lacks calibration data, or there is nothing to verify with.
    """
    # Ranges learned in training serve int8; the others are calibrated from the float model.
    needy = [
        precision
        for precision in precisions
        if precision in CALIBRATED and not (quantization_aware and precision in LEARNED)
    ]
    if calibration is None and needy:
        raise ValueError(
            f"`{needy[0]}` needs calibration data, and none was given. Pass `calibration=x` "
            "(`--calibration DATA` on the command line) with a few hundred typical inputs, or "
            f"leave {needy[0]} out of `precisions`."
        )
    if evaluation is None and calibration is None:
        raise ValueError(
            "No data was given to verify the files with. Pass `evaluation=(x, y)`, or "
            "`evaluation=x` without labels (`--evaluation DATA` on the command line)."
        )
