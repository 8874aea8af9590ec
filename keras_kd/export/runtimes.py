"""Where an exported file runs: one entry for each runtime, answers as short sentences.

An answer begins with what counts: `yes`; `only ...`, under a condition; `slow: ...`, it runs and
does not use what the device is for; `no: ...`, it is refused or computed wrongly.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import onnx_runtimes, tflite_runtimes
from .onnx_runtimes import ONNXFile
from .tflite_runtimes import ETHOS_U55, ETHOS_U85, TFLiteFile


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
        tflite=partial(tflite_runtimes.tensorflow_lite, version=version),
    )


def _onnxruntime(version: tuple[int, int]) -> Runtime:
    text = "{}.{}".format(*version)
    return Runtime(
        f"onnxruntime-{text}",
        f"ONNX Runtime {text}",
        "run in 1.17.3, 1.20.1 and the newest; others by operator set and format",
        onnx=partial(onnx_runtimes.onnxruntime, version=version),
    )


def _ethos(name: str, known: frozenset[str]) -> Runtime:
    return Runtime(
        f"ethos-{name}",
        f"Arm Ethos-{name.upper()}",
        "compiled by Vela 5.2.0",
        tflite=partial(tflite_runtimes.ethos, known=known),
    )


_ALL = (
    Runtime("litert", "LiteRT 2", "every file is run in it", tflite=tflite_runtimes.litert),
    _tensorflow_lite((2, 14)),
    Runtime(
        "tflite-micro",
        "TensorFlow Lite for Microcontrollers",
        "run in tflite-micro of October 2026",
        tflite=tflite_runtimes.micro,
    ),
    _ethos("u55", ETHOS_U55),
    _ethos("u65", ETHOS_U55),
    _ethos("u85", ETHOS_U85),
    Runtime(
        "mediapipe",
        "MediaPipe's image classifier",
        "run in 1.2.2 (`make mediapipe`)",
        tflite=tflite_runtimes.mediapipe,
    ),
    Runtime(
        "litert-js",
        "LiteRT.js",
        "by the data types of @litertjs/core 2.5.3, not run",
        tflite=tflite_runtimes.litert_js,
    ),
    _onnxruntime((1, 17)),
    Runtime("onnxruntime-node", "ONNX Runtime for Node", "run in 1.30.0", onnx=lambda file: "yes"),
    Runtime(
        "onnxruntime-web",
        "ONNX Runtime for the browser",
        "its WebAssembly run in Node, 1.30.0",
        onnx=onnx_runtimes.web,
    ),
    Runtime(
        "openvino",
        "OpenVINO",
        "run in 2026.4.1 on x86",
        tflite=tflite_runtimes.openvino,
        onnx=onnx_runtimes.openvino,
        advice="set INFERENCE_PRECISION_HINT=f32 and DYNAMIC_QUANTIZATION_GROUP_SIZE=0, or floats "
        "are rounded to bfloat16 or to 8 bits on some processors",
    ),
    Runtime("tract", "tract", "run in 0.23.9", onnx=onnx_runtimes.tract),
    Runtime(
        "ncnn",
        "ncnn, by way of pnnx",
        "run in 1.0.20261020",
        onnx=onnx_runtimes.ncnn,
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
        ValueError: If one is unknown, with close matches.
    """
    given = [] if targets is None else [targets] if isinstance(targets, str) else list(targets)
    for name in given:
        if not isinstance(name, str) or find(name) is None:
            close = difflib.get_close_matches(str(name).lower(), NAMES, 3, 0.5)
            hint = f" Did you mean {' or '.join(f'`{word}`' for word in close)}?" if close else ""
            raise ValueError(
                f"`{name}` is no known target. Expected one of {', '.join(NAMES)}, or another "
                f"version as in tflite-2.17 or onnxruntime-1.22.{hint}"
            )
    return list(dict.fromkeys(given))


def answers(
    path: Path,
    targets: Sequence[str] = (),
    *,
    steps: float | None = None,
    images: Sequence[str] = (),
) -> dict[str, str]:
    """Say for each runtime that reads the format of a file whether it takes the file.

    Args:
        path: A `.tflite` or `.onnx` file.
        targets: Names to answer for besides `NAMES`.
        steps: How far its integer answers lie apart from kernel to kernel, in steps of the output.
        images: Names of the inputs whose normalization is known.

    Returns:
        Answers by name.
    """
    asked = [find(name) for name in dict.fromkeys((*NAMES, *targets))]
    runtimes = [runtime for runtime in asked if runtime is not None]
    if path.suffix == ".tflite":
        tflite = TFLiteFile(path, steps, frozenset(images))
        return {r.name: r.tflite(tflite) for r in runtimes if r.tflite is not None}
    onnx = ONNXFile(path, steps)
    return {r.name: r.onnx(onnx) for r in runtimes if r.onnx is not None}


def minimum(path: Path) -> str:
    """Return the first TensorFlow Lite or ONNX Runtime that knows all of a file, as `2.17`."""
    if path.suffix == ".tflite":
        found = TFLiteFile(path, None, frozenset()).minimum
    else:
        found = onnx_runtimes.minimum(ONNXFile(path, None))
    return "{}.{}".format(*found)


def runs(row: Mapping[str, Any], target: str) -> bool:
    """Whether the file of an entry of the manifest runs in a target."""
    return not row.get("runtimes", {}).get(target, "no").startswith("no")


def together(found: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of runtimes by answer."""
    groups: dict[str, list[str]] = {}
    for name, answer in found.items():
        groups.setdefault(answer, []).append(name)
    return groups


def chosen(
    rows: Sequence[dict[str, Any]], targets: Sequence[str], order: Sequence[str]
) -> tuple[str | None, dict[str, Any]]:
    """Choose files for targets.

    Args:
        rows: Entries of the manifest; those that passed are looked at.
        targets: Names of runtimes.
        order: Keys by which the best file has the least.

    Returns:
        The name of the best file that runs in all of them, or `None`; and for each target `best`,
        the best file that runs there, and `gave_up`, the better files that do not.
    """
    passed = sorted(
        (row for row in rows if row["status"] == "passed"),
        key=lambda row: [row[key] for key in order],
    )
    everywhere = next(
        (row["file"] for row in passed if all(runs(row, name) for name in targets)), None
    )
    each = {}
    for name in targets:
        taken = next((row for row in passed if runs(row, name)), None)
        before = passed[: passed.index(taken)] if taken is not None else passed
        each[name] = {
            "best": None if taken is None else taken["file"],
            "gave_up": {
                row["file"]: row.get("runtimes", {}).get(
                    name, f"no: it reads no .{row['format']} files"
                )
                for row in before
            },
        }
    return everywhere, each


class RuntimeReport(Mapping[str, Mapping[str, str]]):
    """Where the files of an export run: answers by file name and runtime.

    Args:
        manifest: Of the export.

    Examples:
        >>> where = report.runtimes()  # doctest: +SKIP
        >>> where["digits_int8.tflite"]["tflite-2.14"]  # doctest: +SKIP
        'yes'
    """

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._rows = [row for row in manifest["artifacts"] if row.get("file")]
        self._targets = manifest["settings"].get("targets") or []

    def __getitem__(self, file: str) -> Mapping[str, str]:
        for row in self._rows:
            if row["file"] == file:
                return dict(row.get("runtimes", {}))
        raise KeyError(file)

    def __iter__(self) -> Iterator[str]:
        return (row["file"] for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict for each file and runtime: `file`, `runtime`, `runs`, `answer`."""
        return [
            {"file": row["file"], "runtime": name, "runs": runs(row, name), "answer": answer}
            for row in self._rows
            for name, answer in row.get("runtimes", {}).items()
        ]

    def since(self, file: str) -> str:
        """Return which versions of its own runtime know all of a file, as a person reads it.

        Args:
            file: Its name.

        Returns:
            Such as `"TensorFlow Lite 2.17 and newer"`; empty if the manifest does not say.
        """
        row = next(row for row in self._rows if row["file"] == file)
        return f"{_SINCE[row['format']]} {row['since']} and newer" if "since" in row else ""

    def advice(self) -> dict[str, str]:
        """Return by runtime the settings under which its answers are those of the report."""
        used = {name for row in self._rows for name in row.get("runtimes", {})}
        known = {name: find(name) for name in sorted(used)}
        return {name: each.advice for name, each in known.items() if each and each.advice}

    def table(self, width: int = 80) -> str:
        """Return the answers as text: a block for each file, runtimes with one answer together.

        Args:
            width: Most columns of text.
        """
        lines = []
        for row in self._rows:
            since = self.since(row["file"])
            text = row["file"] + (f" ({since})" if since else "")
            lines += textwrap.wrap(text, width, subsequent_indent="    ")
            for answer, names in together(row.get("runtimes", {})).items():
                text = f"{', '.join(names)}: {answer}"
                lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ")
        for name, advice in self.advice().items():
            lines += textwrap.wrap(f"{name}: {advice}", width, subsequent_indent="  ")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


_SINCE = {"tflite": "TensorFlow Lite", "onnx": "ONNX Runtime"}
