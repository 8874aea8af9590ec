"""Where an exported file runs: one entry for each runtime, answers as short sentences.

An answer begins with what counts: `yes`; `only ...`, under a condition; `slow: ...`, it runs and
does not use what the device is for; `no: ...`, it is refused or computed wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from keras_kd.export.formats.onnx import onnx_devices
from keras_kd.export.formats.onnx.onnx_devices import ONNXFile
from keras_kd.export.formats.tflite import tflite_devices
from keras_kd.export.formats.tflite.tflite_devices import ETHOS_U55, ETHOS_U85, TFLiteFile
from keras_kd.export.rows import ArtifactRow
from keras_kd.utils.errors import did_you_mean


@dataclass(frozen=True)
class Runtime:
    """One runtime, or compiler, and how it is told whether it takes a file.

    Args:
        name: What targets call it, such as `"tflite-2.14"`.
        title: What people call it.
        tried: How the rules were proven.
        tflite: Answers for a TFLite file; `None` if it reads none.
        onnx: Answers for an ONNX file; `None` if it reads none.
        advice: Settings under which its answers are those of the report.
    """

    name: str
    title: str
    tried: str
    tflite: Callable[[TFLiteFile], str] | None = None
    onnx: Callable[[ONNXFile], str] | None = None
    advice: str = ""

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that it reads."""
        reads = {"tflite": self.tflite, "onnx": self.onnx}
        return tuple(name for name, answer in reads.items() if answer is not None)


def _tensorflow_lite(version: tuple[int, int]) -> Runtime:
    text = "{}.{}".format(*version)
    return Runtime(
        f"tflite-{text}",
        f"TensorFlow Lite {text}",
        "run in tflite-runtime 2.14.0; other versions by the versions of operators",
        tflite=partial(tflite_devices.tensorflow_lite, version=version),
    )


def _onnxruntime(version: tuple[int, int]) -> Runtime:
    text = "{}.{}".format(*version)
    return Runtime(
        f"onnxruntime-{text}",
        f"ONNX Runtime {text}",
        "run in 1.17.3, 1.20.1 and the newest; others by operator set and format",
        onnx=partial(onnx_devices.onnxruntime, version=version),
    )


def _ethos(name: str, known: frozenset[str]) -> Runtime:
    return Runtime(
        f"ethos-{name}",
        f"Arm Ethos-{name.upper()}",
        "compiled by Vela 5.2.0",
        tflite=partial(tflite_devices.ethos, known=known),
    )


_ALL = (
    Runtime("litert", "LiteRT 2", "every file is run in it", tflite=tflite_devices.litert),
    _tensorflow_lite((2, 14)),
    Runtime(
        "tflite-micro",
        "TensorFlow Lite for Microcontrollers",
        "run in tflite-micro of October 2026",
        tflite=tflite_devices.micro,
    ),
    _ethos("u55", ETHOS_U55),
    _ethos("u65", ETHOS_U55),
    _ethos("u85", ETHOS_U85),
    Runtime(
        "mediapipe",
        "MediaPipe's image classifier",
        "run in 1.2.2 (`make mediapipe`)",
        tflite=tflite_devices.mediapipe,
    ),
    Runtime(
        "litert-js",
        "LiteRT.js",
        "by the data types of @litertjs/core 2.5.3, not run",
        tflite=tflite_devices.litert_js,
    ),
    _onnxruntime((1, 17)),
    Runtime("onnxruntime-node", "ONNX Runtime for Node", "run in 1.30.0", onnx=lambda file: "yes"),
    Runtime(
        "onnxruntime-web",
        "ONNX Runtime for the browser",
        "its WebAssembly run in Node, 1.30.0",
        onnx=onnx_devices.web,
    ),
    Runtime(
        "openvino",
        "OpenVINO",
        "run in 2026.4.1 on x86",
        tflite=tflite_devices.openvino,
        onnx=onnx_devices.openvino,
        advice="set INFERENCE_PRECISION_HINT=f32 and DYNAMIC_QUANTIZATION_GROUP_SIZE=0, or floats "
        "are rounded to bfloat16 or to 8 bits on some processors",
    ),
    Runtime("tract", "tract", "run in 0.23.9", onnx=onnx_devices.tract),
    Runtime(
        "ncnn",
        "ncnn, by way of pnnx",
        "run in 1.0.20261020",
        onnx=onnx_devices.ncnn,
        advice="give pnnx fp16=0, or it rounds weights to float16",
    ),
)

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in _ALL}
"""The runtimes of the table."""

NAMES = tuple(RUNTIMES)
"""Their names. Other versions of two are known as well: `tflite-2.17`, `onnxruntime-1.22`."""

_FAMILIES = {"tflite": _tensorflow_lite, "onnxruntime": _onnxruntime}


def find(name: str) -> Runtime | None:
    """Return the runtime of a name, such as `"ethos-u55"` or `"tflite-2.17"`; `None` if unknown."""
    if name in RUNTIMES:
        return RUNTIMES[name]
    match = re.fullmatch(r"(tflite|onnxruntime)-(\d{1,2})\.(\d{1,2})", name)
    if match is None:
        return None
    return _FAMILIES[match[1]]((int(match[2]), int(match[3])))


def check_targets(targets: Sequence[str] | str | None) -> list[str]:
    """Return the names of targets without repetition, each checked to be known.

    Raises:
        TypeError: If they are no names.
        ValueError: If one is unknown, with close matches.
    """
    if targets is not None and not isinstance(targets, Iterable):
        raise TypeError(f"Targets are names of runtimes, as 'tflite-2.14'. Received: {targets!r}.")
    given = [] if targets is None else [targets] if isinstance(targets, str) else list(targets)
    for name in given:
        if not isinstance(name, str) or find(name) is None:
            hint = did_you_mean(str(name).lower(), NAMES, most=3)
            raise ValueError(
                f"`{name}` is no known target. Expected one of {', '.join(NAMES)}, or another "
                f"version as in tflite-2.17 or onnxruntime-1.22.{hint}"
            )
    return list(dict.fromkeys(given))


def asked(targets: Sequence[str] = ()) -> list[Runtime]:
    """Return the runtimes of the table, and those of other names."""
    found = [find(name) for name in dict.fromkeys((*NAMES, *targets))]
    return [runtime for runtime in found if runtime is not None]


def runs(answers: Mapping[str, str], target: str) -> bool:
    """Whether a file runs in a target, by the answers for it."""
    return not answers.get(target, "no").startswith("no")


def together(found: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of runtimes by answer."""
    groups: dict[str, list[str]] = {}
    for name, answer in found.items():
        groups.setdefault(answer, []).append(name)
    return groups


def chosen(
    rows: Sequence[ArtifactRow], targets: Sequence[str], order: Callable[[ArtifactRow], Any]
) -> tuple[str | None, dict[str, Any]]:
    """Choose files for targets.

    Args:
        rows: Of the manifest; those that passed are looked at.
        targets: Names of runtimes.
        order: What the best file has least of.

    Returns:
        The name of the best file that runs in all of them, or `None`; and for each target `best`,
        the best file that runs there, and `gave_up`, the better files that do not.
    """
    passed = sorted((row for row in rows if row.status == "passed"), key=order)

    def answers(row: ArtifactRow) -> Mapping[str, str]:
        return {} if row.measured is None else row.measured.runtimes

    everywhere = next(
        (row.file for row in passed if all(runs(answers(row), name) for name in targets)), None
    )
    each = {}
    for name in targets:
        taken = next((row for row in passed if runs(answers(row), name)), None)
        before = passed[: passed.index(taken)] if taken is not None else passed
        each[name] = {
            "best": None if taken is None else taken.file,
            "gave_up": {
                row.file: answers(row).get(name, f"no: it reads no .{row.format} files")
                for row in before
            },
        }
    return everywhere, each
