"""What is installed, which backend is in force, and how to get what is missing.

It reads the metadata of installed packages and Keras's own settings file, and imports none of them:
it answers in a second where a backend would take ten, and where one is broken.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BACKENDS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}
"""Keras's backends, and the package of each."""

_CORE = ("keras_kd", "keras", "numpy")
_PACKAGE = "keras_kd"


def collect() -> dict[str, Any]:
    """Return what is installed, as JSON values.

    Returns:
        `python`, `platform`, `packages` (versions of the core), `backend` (`name`, where it is set,
        and whether its package is installed), `backends` (versions, `None` where missing), `extras`
        (by name: whether it is `complete`, `missing` packages, those that are too `old`, and the
        `install` command), and `problems`, sentences on what keeps keras_kd from working.
    """
    backends = {name: version(package) for name, package in BACKENDS.items()}
    name, source = _backend()
    extras = _extras()
    problems = []
    for package in _CORE[1:]:
        if version(package) is None:
            problems.append(f"`{package}` is not installed: pip install keras_kd")
    if name not in BACKENDS:
        problems.append(
            f"The backend `{name}`, set by {source}, is none of {', '.join(BACKENDS)}: set "
            "KERAS_BACKEND to one of them."
        )
    elif backends[name] is None:
        others = [one for one, found in backends.items() if found is not None]
        problems.append(
            f"The backend `{name}`, set by {source}, is not installed: "
            f'pip install "keras_kd[{name}]"'
            + (f", or set KERAS_BACKEND={others[0]}, which is." if others else ".")
        )
    core = _requirements().get("", [])
    for requirement in core:
        found = version(requirement.name)
        if found is not None and not requirement.specifier.contains(found, prereleases=True):
            problems.append(
                f"`{requirement.name}` {found} is too old or too new: keras_kd needs "
                f'{requirement.specifier}. pip install "{requirement.name}{requirement.specifier}"'
            )
    if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
        problems.append(
            "TF_USE_LEGACY_KERAS is set, so that `tf.keras` is Keras 2, whose models Keras 3 does "
            "not read. Unset it."
        )
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {package: version(package) for package in _CORE},
        "backend": {"name": name, "set_by": source, "installed": bool(backends.get(name))},
        "backends": backends,
        "extras": extras,
        "problems": problems,
    }


def version(package: str) -> str | None:
    """Return the installed version of a package, or `None`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend() -> tuple[str, str]:
    name = os.environ.get("KERAS_BACKEND")
    if name:
        return name, "KERAS_BACKEND"
    # As Keras looks for it.
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        settings = json.loads((home / "keras.json").read_text(encoding="utf-8"))
        return str(settings["backend"]), str(home / "keras.json")
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow", "Keras's default"


def _requirements() -> dict[str, list[Any]]:
    """Requirements of this package by extra, those of every installation under the empty name."""
    from packaging.requirements import InvalidRequirement, Requirement

    found: dict[str, list[Any]] = {"": []}
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return found
    for extra in distribution.metadata.get_all("Provides-Extra") or []:
        found[extra] = []
    for line in distribution.requires or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        for extra, needed in found.items():
            if requirement.marker is None:
                applies = extra == ""
            else:
                applies = requirement.marker.evaluate({"extra": extra})
                # What holds without any extra is no part of this one.
                applies &= extra == "" or not requirement.marker.evaluate({"extra": ""})
            if applies:
                needed.append(requirement)
    return found


def _extras() -> dict[str, Any]:
    known = _requirements()

    def needed(extra: str, seen: frozenset[str]) -> list[Any]:
        found = []
        for requirement in known.get(extra, []):
            if requirement.name.replace("-", "_").lower() == _PACKAGE:
                for other in sorted(requirement.extras - seen):
                    found += needed(other, seen | {other})
            else:
                found.append(requirement)
        return found

    extras = {}
    for extra in known:
        if not extra:
            continue
        packages = {one.name: one for one in needed(extra, frozenset({extra}))}
        missing = sorted(name for name in packages if version(name) is None)
        old = {
            name: f"{version(name)}, needs {one.specifier}"
            for name, one in sorted(packages.items())
            if version(name) is not None
            and not one.specifier.contains(str(version(name)), prereleases=True)
        }
        extras[extra] = {
            "complete": not missing and not old,
            "missing": missing,
            "old": old,
            "install": f'pip install "keras_kd[{extra}]"',
        }
    return extras


def text(found: dict[str, Any]) -> str:
    """Lay out what `collect` found, in lines for a terminal of any width."""
    lines = [
        f"Python {found['python']} ({found['platform']}, {found['processors']} processors)",
        ", ".join(f"{name} {ver or 'missing'}" for name, ver in found["packages"].items()),
        f"Backend in force: {found['backend']['name']} (set by {found['backend']['set_by']})",
        "",
        "Backends",
        *(f"  {name}: {ver or 'not installed'}" for name, ver in found["backends"].items()),
        "",
        "Extras",
    ]
    for name, extra in found["extras"].items():
        if extra["complete"]:
            lines.append(f"  {name}: complete")
            continue
        lacks = [
            *extra["missing"],
            *(f"{package} ({why})" for package, why in extra["old"].items()),
        ]
        lines.append(f"  {name}: lacks {', '.join(lacks)}")
        lines.append(f"    {extra['install']}")
    if not found["extras"]:
        lines.append(
            "  unknown: keras_kd itself is not installed, and runs from its folder. "
            'pip install -e ".[all]"'
        )
    lines.append("")
    lines += problems(found) or ["Nothing is missing that keras_kd needs to run."]
    return "\n".join(lines)


def problems(found: dict[str, Any]) -> list[str]:
    """Return a line for each thing that keeps keras_kd from working."""
    return [f"x {problem}" for problem in found["problems"]]


def main(arguments: Sequence[str]) -> int:
    """Print what was found where the packages of the command line themselves are missing.

    Args:
        arguments: What follows `doctor`; `--json` is known.

    Returns:
        The exit code: 0, or 1 where something keeps keras_kd from working.
    """
    found = collect()
    print(json.dumps(found, indent=2) if "--json" in arguments else text(found))
    return 1 if found["problems"] else 0
