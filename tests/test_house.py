"""Who may import whom: read from the syntax trees, deferred and type-checking imports included."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keras_kd"

# A folder may import what stands beneath it, and only that.
MAY_IMPORT = {
    "utils": "",
    "backends": "utils",
    "models": "utils",
    "datasets": "utils",
    "losses": "utils backends models",
    "compress": "utils backends models",
    "students": "utils backends models",
    "transfers": "utils backends models losses",
    "teachers": "utils backends models losses",
    "export": "utils backends models compress",
    "cache": "utils backends models losses teachers",
    "distill": "utils backends models losses transfers teachers cache",
    "callbacks": "utils backends models losses transfers teachers cache distill",
}
_BELOW = "utils backends models datasets losses compress students transfers teachers export cache"
for _ours in ("lifelong", "robust", "federated"):
    MAY_IMPORT[_ours] = f"{_BELOW} distill callbacks"
MAY_IMPORT["search"] = MAY_IMPORT["lifelong"]
MAY_IMPORT["cli"] = " ".join(MAY_IMPORT)
MAY_IMPORT["__init__"] = "utils"
MAY_IMPORT["__main__"] = "cli"


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of this package that a file names in its imports, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name of the module"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else str(node.module)), node.lineno


IMPORTS = {
    name: [(other, line) for other, line in _imports(path) if other.split(".")[0] == "keras_kd"]
    for name, path in MODULES.items()
}


def _folder(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_the_root_holds_the_face_and_folders_alone():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("folder", sorted({_folder(path) for path in MODULES.values()}))
def test_a_folder_imports_only_what_stands_beneath_it(folder):
    allowed = {folder, *MAY_IMPORT[folder].split()}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {other}"
        for name, path in MODULES.items()
        if _folder(path) == folder
        for other, line in IMPORTS[name]
        # The version is the package's own.
        if other != "keras_kd" and other.split(".")[1] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_comes_back_to_itself():
    graph = {
        name: {other for other, _ in found if other != name} for name, found in IMPORTS.items()
    }
    graph.pop("keras_kd")
    for found in graph.values():
        found.discard("keras_kd")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_there_are_at_most_eight_floors():
    floors: dict[str, int] = {}
    while len(floors) < len(MAY_IMPORT):
        for folder, below in MAY_IMPORT.items():
            if all(other in floors for other in below.split()):
                used = {
                    other.split(".")[1]
                    for name, path in MODULES.items()
                    if _folder(path) == folder
                    for other, _ in IMPORTS[name]
                    if other != "keras_kd"
                } - {folder}
                floors[folder] = 1 + max((floors[other] for other in used), default=0)
    assert max(floors.values()) <= 8, floors
