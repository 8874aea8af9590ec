"""Code for apps, filled in with the names, shapes and scales of one exported file."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import numpy as np

from keras_kd.export.formats import registry
from keras_kd.export.report.artifact import Artifact
from keras_kd.utils.escaping import comment, quoted

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
        ValueError: If a tensor is of a type that the languages have none for.
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
    environment.filters["comment"] = comment
    template = registry.get(artifact.format).template
    if not template:
        raise ValueError(
            f"`{artifact.file}` is of the format {artifact.format}, for which there is no code."
        )
    source = files(__package__).joinpath("templates", template).read_text("utf-8")
    signature = artifact.details["signature"]
    for info in (*signature["inputs"], *signature["outputs"]):
        if info["dtype"] not in _TYPES["kotlin"]:
            raise ValueError(
                f"`{artifact.file}` has the tensor {info['name']!r} of {info['dtype']}, for which "
                f"there is no code. Tensors of {', '.join(_TYPES['kotlin'])} have some."
            )
    values = {
        "file": artifact.file,
        "inputs": [_tensor(info) for info in signature["inputs"]],
        "outputs": [_tensor(info) for info in signature["outputs"]],
        "labels": labels,
        "labeled": labeled or signature["outputs"][0]["name"],
    }
    code = {}
    for language in LANGUAGES:
        environment.filters["quote"] = functools.partial(quoted, language=language)
        code[language] = environment.from_string(source).render(language=language, **values).strip()
    return {language: f"{text}\n" for language, text in code.items()}


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
