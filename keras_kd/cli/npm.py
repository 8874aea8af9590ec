"""The runtimes that the page of `keras-kd try` loads, as npm has them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from keras_kd.utils import archives

PAGE = files("keras_kd.cli") / "page"

PACKAGES = {
    "@litertjs/core": (
        "dist/index.js",
        "wasm/litert_wasm_internal.js",
        "wasm/litert_wasm_internal.wasm",
        # For browsers without relaxed SIMD.
        "wasm/litert_wasm_compat_internal.js",
        "wasm/litert_wasm_compat_internal.wasm",
    ),
    "@litertjs/wasm-utils": ("dist/index.js",),
    "onnxruntime-web": (
        "dist/ort.wasm.min.mjs",
        "dist/ort-wasm-simd-threaded.mjs",
        "dist/ort-wasm-simd-threaded.wasm",
    ),
}
"""What the page loads of each npm package: 34 of the 185 MB that npm installs."""

_SECONDS = 900.0


def npm_packages(given: Path | None, note: Callable[[str], None]) -> Path:
    """Find the runtimes of the page, or let npm fetch the pinned versions once.

    Args:
        given: A folder that holds them, as `node_modules` or a copy of the cache; `None` takes the
            cache and fills it first where needed.
        note: Told before anything is fetched.

    Returns:
        The folder with the packages.

    Raises:
        ValueError: If the given folder lacks a file or holds other versions.
        OSError: If npm is missing or fails.
    """
    lock = (PAGE / "package-lock.json").read_bytes()
    pinned = {
        name: json.loads(lock)["packages"][f"node_modules/{name}"]["version"] for name in PACKAGES
    }
    if given is not None:
        inner = given / "node_modules"
        found = inner if inner.is_dir() else given
        fault = _fault(found, pinned)
        if fault:
            raise ValueError(
                f"`{given}` cannot serve as assets: {fault}. Run `npm ci` on the package-lock.json "
                f"of `{PAGE}` and pass its node_modules."
            )
        return found
    cache = cache_folder() / "keras_kd" / "try" / hashlib.sha256(lock).hexdigest()[:16]
    if _fault(cache, pinned):
        names = ", ".join(f"{name} {version}" for name, version in pinned.items())
        note(f"Getting the runtimes of the page from npm, once, into {cache}: {names}")
        _install(cache)
        fault = _fault(cache, pinned)
        if fault:
            raise OSError(f"npm installed other packages than the pinned ones: {fault}.")
    return cache


def _install(cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(
            "The page needs LiteRT.js and ONNX Runtime Web from npm, and `npm` is not installed. "
            "Install Node.js, or pass the packages of another computer with `--assets DIR`."
        )
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".npm-") as name:
        scratch = Path(name)
        for file in ("package.json", "package-lock.json"):
            (scratch / file).write_bytes((PAGE / file).read_bytes())
        # Checks every package against the hash in the lock, and runs nothing of theirs.
        try:
            ran = subprocess.run(
                [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"],
                cwd=scratch,
                capture_output=True,
                text=True,
                check=False,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise OSError(
                f"`npm ci` did not end within {_SECONDS:.0f} s and was stopped. Mend the "
                "network, or pass the packages of another computer with `--assets DIR`."
            ) from None
        if ran.returncode:
            said = " ".join(ran.stderr.split())[:300]
            raise OSError(
                f"`npm ci` failed, so the page has no runtimes: {said} Mend this, or pass the "
                "packages of another computer with `--assets DIR`."
            )
        chosen = scratch / "chosen"
        for package, names in PACKAGES.items():
            for part in ("package.json", *names):
                (chosen / package / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(scratch / "node_modules" / package / part, chosen / package / part)
        # Whatever is there is incomplete, or another process has just written the same.
        shutil.rmtree(cache, ignore_errors=True)
        os.replace(chosen, cache)


def _fault(folder: Path, pinned: dict[str, str]) -> str | None:
    for package, names in PACKAGES.items():
        for name in ("package.json", *names):
            if not (folder / package / name).is_file():
                return f"it lacks {package}/{name}"
        try:
            version = json.loads(archives.read_bytes(folder / package / "package.json"))["version"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return f"its {package}/package.json is damaged"
        if version != pinned[package]:
            return f"it holds {package} {version}, not {pinned[package]}"
    return None


def cache_folder() -> Path:
    """Where a program of this user keeps what can be had again."""
    from platformdirs import user_cache_path

    return user_cache_path()
