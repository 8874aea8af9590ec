"""Code for apps, filled in with the names, shapes and scales of one exported file."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np

from .report import Artifact

LANGUAGES = ("kotlin", "swift", "cpp", "javascript", "python")


def snippets(
    artifact: Artifact, labels: list[str] | None, labeled: str | None = None
) -> dict[str, str]:
    """Return code that runs a file once, in each of `LANGUAGES`.

    Args:
        artifact: The file.
        labels: Names of the classes, if known.
        labeled: The output that they name; a file may have its outputs in another order than the
            model.

    Returns:
        Code by language. Free dimensions are set to 1.

    Raises:
        ImportError: If Jinja is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            'Code snippets need Jinja. Install it with `pip install "keras_kd[report]"`.'
        ) from error
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = files(__package__).joinpath("snippets", f"{artifact.format}.j2").read_text("utf-8")
    signature = artifact.details["signature"]
    values = {
        "file": artifact.file,
        "inputs": [_tensor(info) for info in signature["inputs"]],
        "outputs": [_tensor(info) for info in signature["outputs"]],
        "labels": labels,
        "labeled": labeled or signature["outputs"][0]["name"],
    }
    code = {}
    for language in LANGUAGES:
        # Kotlin reads `$name` inside a string as a variable.
        environment.filters["quote"] = _quote_kotlin if language == "kotlin" else _quote
        code[language] = environment.from_string(source).render(language=language, **values).strip()
    return {language: f"{text}\n" for language, text in code.items()}


def _quote(text: str) -> str:
    # Letters beyond ASCII as they are: Swift has no `\u00e9`, Python no pairs of surrogates.
    return json.dumps(text, ensure_ascii=False)


def _quote_kotlin(text: str) -> str:
    return _quote(text).replace("$", "\\$")


def _tensor(info: dict[str, Any]) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else 1 for size in info["shape"]]
    count = 1
    for size in shape:
        count *= size
    limits = np.iinfo(info["dtype"]) if "scale" in info else None
    return {
        "name": info["name"],
        "shape": shape,
        "count": count,
        "dtype": info["dtype"],
        "scale": info.get("scale"),
        "low": limits.min if limits else None,
        "high": limits.max if limits else None,
        "zero_point": info.get("zero_point"),
        **{language: types[info["dtype"]] for language, types in _TYPES.items()},
    }


_TYPES: dict[str, dict[str, Any]] = {
    "kotlin": {
        "float32": "FloatArray",
        "int8": "ByteArray",
        "int16": "ShortArray",
        "int32": "IntArray",
        "int64": "LongArray",
        "uint8": "ByteArray",
        "bool": "BooleanArray",
    },
    "swift": {
        "float32": "Float",
        "int8": "Int8",
        "int16": "Int16",
        "int32": "Int32",
        "int64": "Int64",
        "uint8": "UInt8",
        "bool": "Bool",
    },
    "cpp": {
        "float32": "float",
        "int8": "int8_t",
        "int16": "int16_t",
        "int32": "int32_t",
        "int64": "int64_t",
        "uint8": "uint8_t",
        "bool": "bool",
    },
    "javascript": {
        "float32": "Float32Array",
        "int8": "Int8Array",
        "int16": "Int16Array",
        "int32": "Int32Array",
        "int64": "BigInt64Array",
        "uint8": "Uint8Array",
        "bool": "Uint8Array",
    },
    # litert::ElementType
    "litert": {
        "float32": 1,
        "int32": 2,
        "uint8": 3,
        "int64": 4,
        "bool": 6,
        "int16": 7,
        "int8": 9,
    },
}
