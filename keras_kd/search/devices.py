"""Students for devices: the best file that each takes, or what stands in its way."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from keras_kd.datasets import Dataset
from keras_kd.distill.trial_setting import answered, errors_of
from keras_kd.export import Artifact, Report
from keras_kd.export.formats.device_table import check_targets
from keras_kd.search import finals, record
from keras_kd.search.budget import Budget, require_limit
from keras_kd.search.space import PRECISIONS
from keras_kd.search.study import Study
from keras_kd.search.tuner import Progress, Search
from keras_kd.utils import checks
from keras_kd.utils.types import Data, Losses

if TYPE_CHECKING:
    import keras


class Options(TypedDict, total=False):
    """Keywords of `tune` that are not a device's."""

    seeds: int
    epochs: int | None
    final_epochs: int | None
    batch_size: int
    loss: Losses
    space: Mapping[str, Any] | None
    callbacks: Sequence[keras.callbacks.Callback] | None
    progress: Progress | None
    verbose: int | str
    seed: int
    sampler: str
    config: Mapping[str, Any] | None
    export: Mapping[str, Any] | None


_OPTIONS = tuple(Options.__annotations__)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a file has to keep to.

    Args:
        max_bytes: Most bytes of the file.
        max_latency_ms: Most milliseconds of one inference on this machine, one thread.
        min_accuracy: Least share of right answers on the validation rows, 0..1; of a regression not
            to be given.
        targets: Names of runtimes in which the file has to run, such as `"tflite-2.14"`,
            `"tflite-micro"` or `"ethos-u55"`.
        precisions: Precisions of TFLite files that it takes.

    Raises:
        ValueError: If a limit is out of range, or a name is unknown.
        TypeError: If a limit is no number.

    Examples:
        >>> phone = Device(max_bytes=200_000, max_latency_ms=5)
    """

    max_bytes: int | None = None
    max_latency_ms: float | None = None
    min_accuracy: float | None = None
    targets: str | Sequence[str] = ()
    precisions: str | Sequence[str] = ("int8",)

    def __post_init__(self) -> None:
        require_limit("max_bytes", self.max_bytes, "a device")
        require_limit("max_latency_ms", self.max_latency_ms, "a device")
        check_targets(self.targets)
        named = (self.precisions,) if isinstance(self.precisions, str) else tuple(self.precisions)
        checks.known_keys(named, PRECISIONS, "precisions")
        if not named:
            raise ValueError("`precisions` names none. Pass those of TFLite files that it takes.")
        object.__setattr__(self, "precisions", named)
        least = self.min_accuracy
        if least is not None and not 0 <= checks.number("min_accuracy", least) <= 1:
            raise ValueError(
                f"`min_accuracy` is a share from 0 to 1. Received: min_accuracy={least!r}."
            )


@dataclasses.dataclass(frozen=True)
class DeviceResult:
    """What was found for a device.

    Args:
        best: The verified file within all limits, or `None`.
        verdict: What it reaches; or `not reachable`, how near the nearest file came, and what would
            have to give.
        study: The search behind it.
        accuracy: Share of right answers of the best file, or of the nearest, on the validation
            rows; `None` of a regression, or where nothing was trained.
    """

    best: Artifact | None
    verdict: str
    study: Study = dataclasses.field(repr=False)
    accuracy: float | None

    def table(self, width: int = 80) -> str:
        """Return the trials and the verdict as text.

        Args:
            width: Most columns of text.
        """
        return f"{self.study.table(width)}\n\n{self.verdict}"


def for_device(
    teacher: keras.Model,
    data: Data,
    max_bytes: int | None = None,
    max_latency_ms: float | None = None,
    min_accuracy: float | None = None,
    folder: str | os.PathLike[str] = "runs/device",
    *,
    targets: str | Sequence[str] = (),
    precisions: str | Sequence[str] = ("int8",),
    minutes: float | None = 30,
    trials: int | None = None,
    **options: Unpack[Options],
) -> DeviceResult:
    """Search the best verified file of a smaller teacher that a device takes.

    It is `tune` of the teacher in several widths and depths, with the limits of the device.

    Args:
        teacher: A built `keras.Model`.
        data: `(train, validation)`, each `(x, y)` or `(x, y, sample_weight)`; or a
            `keras_kd.datasets.Dataset`, whose test samples are not looked at.
        max_bytes: Most bytes of the file.
        max_latency_ms: Most milliseconds of one inference on this machine, one thread.
        min_accuracy: Least share of right answers on the validation rows, 0..1.
        folder: Of the search, see `tune`.
        targets: Names of runtimes in which the file has to run.
        precisions: Precisions of TFLite files that the device takes.
        minutes: Of searching at most.
        trials: Most trials.
        **options: More keywords of `tune`: `seeds`, `epochs`, `final_epochs`, `batch_size`,
            `loss`, `space`, `callbacks`, `progress`, `verbose`, `seed`, `sampler`, `config`,
            `export`.

    Returns:
        The result.

    Raises:
        ValueError: If a limit is out of range, a name is unknown, or the data do not fit.
        TypeError: If an argument is of another type.
        FileExistsError: If the folder holds another search, or anything else.

    Examples:
        >>> found = kd.search.for_device(
        ...     teacher, ((x, y), (x_val, y_val)), max_bytes=20_000, min_accuracy=0.9,
        ...     targets="tflite-micro", folder="runs/micro",
        ... )
        >>> found.best.path if found.best else found.verdict
    """
    device = Device(max_bytes, max_latency_ms, min_accuracy, targets, precisions)
    return _searched(teacher, data, device, Path(folder), None, minutes, trials, {**options})


def family(
    teacher: keras.Model,
    data: Data,
    devices: Mapping[str, Device],
    folder: str | os.PathLike[str] = "runs/family",
    *,
    minutes: float | None = 30,
    trials: int | None = None,
    **options: Unpack[Options],
) -> dict[str, DeviceResult]:
    """Search a file for each of several devices, from one teacher that is asked once for all.

    Args:
        teacher: A built `keras.Model`.
        data: As for `for_device`.
        devices: By name, which is also that of a folder.
        folder: Of all searches and the teacher's answers.
        minutes: Of searching at most, for each device.
        trials: Most trials for each device.
        **options: As for `for_device`.

    Returns:
        The results by name.

    Raises:
        ValueError: If there are no devices, or as `for_device`.
        TypeError: If a device is no `Device`.

    Examples:
        >>> found = kd.search.family(
        ...     teacher, data, {
        ...         "server": kd.search.Device(precisions=("float32",)),
        ...         "phone": kd.search.Device(max_bytes=100_000, max_latency_ms=5),
        ...         "micro": kd.search.Device(max_bytes=20_000, targets="tflite-micro"),
        ...     },
        ... )
    """
    if not devices or not isinstance(devices, Mapping):
        raise ValueError(
            "`devices` names none. Pass a dict from names to `Device`. Received: "
            f"devices={devices!r}."
        )
    for name, device in devices.items():
        if not isinstance(device, Device):
            raise TypeError(
                f"`devices[{name!r}]` is a `keras_kd.search.Device`. Received: {device!r}."
            )
    place = Path(folder)
    answers = place / "answers"
    return {
        name: _searched(
            teacher, data, device, place / record.slug(name), answers, minutes, trials, {**options}
        )
        for name, device in devices.items()
    }


def _searched(
    teacher: keras.Model,
    data: Data,
    device: Device,
    folder: Path,
    answers: Path | None,
    minutes: float | None,
    trials: int | None,
    options: Mapping[str, Any],
) -> DeviceResult:
    checks.known_keys(options, _OPTIONS, "options")
    train, validation = _split(data)
    search = Search(
        build="shrink",
        teacher=teacher,
        train=train,
        validation=validation,
        minimize=("error",),
        device=device.targets,
        budget=Budget(minutes, device.max_bytes, device.max_latency_ms, trials),
        folder=folder,
        answers=answers,
        precisions=device.precisions,
        least=device.min_accuracy,
        **{"space": None, **options},
    )
    return _judged(search.run(), device, search)


def _split(data: Any) -> tuple[Any, Any]:
    """Training and validation rows of what was passed as `data`."""
    if isinstance(data, Dataset):
        return (data.x_train, data.y_train), (data.x_validation, data.y_validation)
    pairs = isinstance(data, tuple | list) and len(data) == 2
    if not pairs or any(hasattr(part, "__array__") for part in data):
        raise TypeError(
            "`data` is `(train, validation)`, each `(x, y)`, or a `keras_kd.datasets.Dataset`. "
            f"Received: data of type {type(data).__name__}."
        )
    return data[0], data[1]


def _judged(study: Study, device: Device, search: Search) -> DeviceResult:
    """The best file of a study, if it is right often enough."""
    best = study.best
    if best is None:
        return DeviceResult(None, _sentences(study.verdict, _gives(search)), study, None)
    report = Report.load(best["file"].parent)
    artifact = next(a for a in report.artifacts if a.path == best["file"])
    accuracy = None if study.regression else 1 - float(best["error"])
    figures = f"{best['bytes']:,} bytes, {best['latency_ms']:.3g} ms"
    shown = "" if accuracy is None else f", {100 * accuracy:.2f} % right on the validation rows"
    least = device.min_accuracy
    if accuracy is not None and least is not None and not finals.reaches(best["error"], least):
        short = (
            f"not reachable: trained again, the best file within the limits has {figures}{shown}, "
            f"{100 * (least - accuracy):.2f} points less than the {100 * least:g} % asked for"
        )
        return DeviceResult(None, _sentences(short, _needs(study, search)), study, accuracy)
    return DeviceResult(artifact, f"reached: {figures}{shown}; {study.verdict}", study, accuracy)


def _sentences(*parts: str) -> str:
    return ". ".join(part for part in parts if part)


def _gives(search: Search) -> str:
    """Say which limits no file of the space keeps to."""
    search.weigh_all()
    files = [weighed for _, weighed in search.sized if not weighed.reason]
    if not files:
        return ""
    needs = []
    budget = search.budget
    smallest = min(weighed.bytes or 0 for weighed in files)
    if budget.bytes is not None and smallest > budget.bytes:
        needs.append(f"at least {smallest:,} bytes, the smallest file of the space")
    fastest = min(weighed.latency_ms or 0.0 for weighed in files)
    if budget.latency_ms is not None and fastest > budget.latency_ms:
        needs.append(f"at least {fastest:.3g} ms, the fastest file of the space")
    for name in search.device:
        if all(name in weighed.refused for weighed in files):
            needs.append(f"a runtime other than {name}, or layers that it takes")
    if not needs:
        return "No size keeps to all limits at once: one of them has to give"
    return f"What would have to give: {'; '.join(needs)}"


def _needs(study: Study, search: Search) -> str:
    """Say what stands between a study and a higher accuracy."""
    trainer = search.trainer
    teacher = errors_of(
        trainer.model,
        answered(trainer.model, trainer.validation.x),
        trainer.validation,
        trainer.hard,
    )
    parts = [f"The teacher itself is right on {100 * (1 - teacher.mean):.2f} %"]
    best = study.best
    assert best is not None
    search.weigh_all()
    larger = [
        (weighed.bytes, shape, weighed)
        for shape, weighed in search.sized
        if weighed.bytes
        and weighed.bytes > best["bytes"]
        and any(beyond > 0 for beyond in search.excess(weighed).values())
    ]
    if larger:
        size, shape, weighed = min(larger, key=lambda each: each[0] or 0)
        # Precisions are there where the device takes several.
        told = ", ".join(
            f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"
            for name, value in shape.items()
        )
        parts.append(
            f"The next larger student ({told}) would take {size:,} bytes and "
            f"{weighed.latency_ms or 0:.3g} ms and was not trained"
        )
    else:
        parts.append("No larger student of the space is kept out by the limits")
    return ". ".join(parts)
