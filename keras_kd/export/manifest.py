"""`manifest.json`: what was exported, measured and hashed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from keras_kd.export.claims import contradiction
from keras_kd.export.formats import registry
from keras_kd.export.json_schema import fault
from keras_kd.export.rows import FileRow, from_json
from keras_kd.export.writing import write_file
from keras_kd.utils import archives, installed

FILE = "manifest.json"
VERSION = 2
"""Of what is written. Version 1 is read as well: it has one file an artifact, of two formats."""

_PACKAGES = (
    "keras-kd",
    "keras",
    "tensorflow",
    "numpy",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "onnx",
    "onnxruntime",
    "tf2onnx",
)


class ManifestError(ValueError):
    """A manifest is missing, damaged or edited, or a file is not the one it describes."""


def versions() -> dict[str, str]:
    """Return the versions of the packages that take part in an export."""
    return installed.versions(_PACKAGES)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with archives.opened(path) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with the hash of its own content, in plain JSON values."""
    content = plain({key: value for key, value in content.items() if key != "seal"})
    return {**content, "seal": _hash(content)}


def write(content: dict[str, Any], path: Path) -> None:
    """Write a sealed manifest in one step.

    Args:
        content: The manifest, without its seal.
        path: The file; a reader sees the old one or the new one, never half of it.
    """
    write_file(path, json.dumps(seal(content), indent=2, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Args:
        folder: Holds `manifest.json`.

    Returns:
        Its content.

    Raises:
        ManifestError: If it is missing, is no manifest of this version, was edited, does not follow
            its schema, or names a file outside its folder.
    """
    path = folder / FILE
    try:
        content = json.loads(archives.read_bytes(path).decode(), parse_constant=_refuse)
    except FileNotFoundError:
        raise ManifestError(
            f"`{folder}` has no {FILE}. Pass a folder that `keras_kd.export` wrote."
        ) from None
    except NotADirectoryError:
        raise ManifestError(
            f"`{folder}` is a file. Pass the folder that `keras_kd.export` wrote."
        ) from None
    except RecursionError:
        raise ManifestError(
            f"`{path}` cannot be read: it is nested too deeply. Export again."
        ) from None
    except OSError as error:
        raise ManifestError(
            f"`{path}` cannot be read: {error.strerror}. Check the file and its rights."
        ) from None
    except MemoryError:
        raise ManifestError(f"`{path}` holds more than the memory of this process.") from None
    except ValueError as error:
        raise ManifestError(
            f"`{path}` is damaged: {error}. Restore the file or export again."
        ) from None
    if not isinstance(content, dict) or content.get("schema") not in range(1, VERSION + 1):
        raise ManifestError(
            f"`{path}` is no export manifest of version {VERSION} or before. Export again with "
            "this version."
        )
    unsealed = {key: value for key, value in content.items() if key != "seal"}
    try:
        sealed = content.get("seal") == _hash(unsealed)
    except (RecursionError, ValueError, MemoryError):
        sealed = False
    if not sealed:
        raise ManifestError(
            f"`{path}` was changed after the export: its content does not match its seal. "
            "Restore the file or export again."
        )
    rows, evaluation = content.get("artifacts"), content.get("evaluation")
    described = [*rows, evaluation] if isinstance(rows, list) else [evaluation]
    for row in described:
        if isinstance(row, dict):
            more = row.get("more_files")
            listed = more if isinstance(more, list) else []
            for each in (row, *(one for one in listed if isinstance(one, dict))):
                if each.get("file"):
                    inside(folder, each["file"])
    _check_form(content, path)
    return content


def check(content: dict[str, Any], folder: Path) -> None:
    """Refuse content that `read` would refuse once it is written.

    Args:
        content: A manifest without its seal.
        folder: Where it is going to be.

    Raises:
        ManifestError: Saying what is wrong with it.
    """
    _check_form(seal(content), folder / FILE)


def files_of(row: Mapping[str, Any]) -> list[FileRow]:
    """Return the files that an entry of a manifest describes, the one that is opened first.

    Args:
        row: Of `artifacts`.
    """
    if row.get("file") is None:
        return []
    more = [from_json(FileRow, each) for each in row.get("more_files", ())]
    size = (row["bytes"] or 0) - sum(each.bytes for each in more)
    return [FileRow(row["file"], row["sha256"], size), *more]


def hashes_of(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of all files that a manifest describes, by name."""
    rows = [each for row in content["artifacts"] for each in files_of(row)]
    found = {each.file: each.sha256 for each in rows}
    return {**found, content["evaluation"]["file"]: content["evaluation"]["sha256"]}


def _check_form(content: dict[str, Any], path: Path) -> None:
    wanted = schema()
    reason = fault(content, wanted, wanted) or contradiction(content)
    if reason:
        raise ManifestError(
            f"`{path}` does not have the form of a manifest: {reason}. Restore the file or export "
            "again."
        )


def check_files(folder: Path, content: dict[str, Any], *, whole: bool = True) -> None:
    """Refuse an export whose files are not the ones that its manifest describes.

    Args:
        folder: Holds the files.
        content: Its manifest.
        whole: Whether to look for weights in other files, which takes the packages of the formats.
            Without it whoever reads the files must, see `refuse`.

    Raises:
        ManifestError: Naming every file that is missing or differs, is no regular file, or keeps
            weights in other files, which the hashes do not cover.
    """
    opened = {row["file"]: row["format"] for row in content["artifacts"] if row["file"] is not None}
    faults = []
    for name, sha256 in hashes_of(content).items():
        path, reason = inside(folder, name), ""
        try:
            same = digest(path) == sha256
            if whole and same and name in opened:
                reason = registry.get(opened[name]).outside(path)
        except FileNotFoundError:
            faults.append(f"`{path.name}` is missing")
        except (OSError, ValueError):
            problem = archives.file_problem(path) or "cannot be read"
            faults.append(f"`{path.name}` {problem}")
        else:
            if not same:
                reason = "is not the file that was exported (its SHA-256 differs)"
            if reason:
                faults.append(f"`{path.name}` {reason}")
    refuse(folder, faults)


def refuse(folder: Path, faults: list[str]) -> None:
    """Refuse an export for the faults of its files, if there are any.

    Args:
        folder: Holds the files.
        faults: As in "`model.onnx` is missing".

    Raises:
        ManifestError: Naming all of them.
    """
    if faults:
        raise ManifestError(
            f"The export in `{folder}` does not match its manifest: {'; '.join(faults)}. Restore "
            "the files or export again."
        )


def schema() -> dict[str, Any]:
    """Return the JSON schema of the manifest."""
    text = Path(__file__).with_name("manifest.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def inside(folder: Path, name: object) -> Path:
    """Return the path of a file in the folder.

    Raises:
        ManifestError: If the name leads out of the folder.
    """
    path = folder / str(name)
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or name in ("", ".", "..")
        or path.resolve().parent != folder.resolve()
    ):
        raise ManifestError(
            f"The manifest in `{folder}` names the file `{name}`, which lies outside the folder. "
            "A manifest only describes files beside it."
        )
    return path


def plain(value: object) -> Any:
    """Return JSON values; a number that is not finite becomes `None`."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which is no JSON")


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
