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
    # The face and `python -m` stand before the house.
    inside = {folder: floor for folder, floor in floors.items() if not folder.startswith("__")}
    assert max(inside.values()) <= 8, inside


# ------------------------------------------------------------------ private state

# What Keras keeps private and has no public door to, and what it is read for.
_OF_KERAS = {
    "_aggregate_additional_loss": "a regularizer divided by the replicas, as Keras adds it up",
    "_compile_loss": "the hard loss as Keras calls it; its public total holds the regularizers",
    "_compile_metrics": "whether there are metrics that read labels",
    "_embeddings": "the embeddings beside which LoRA keeps its update",
    "_flat_losses": "the losses that Keras made of those given to `compile`",
    "_flatten_layers": "all layers, nested ones too; `layers` are the outer ones alone",
    "_get_variable_index": "where an optimizer keeps what belongs to a variable",
    "_inbound_nodes": "the graph of a Functional model",
    "_initial_epoch": "the epoch that `fit` begins with, as `BackupAndRestore` sets it",
    "_kernel": "the kernel beside which LoRA keeps its update",
    "_keras_history": "where in the graph a tensor comes from",
    "_keras_mask": "the mask that travels with a tensor",
    "_layers": "the layers of a subclassed model, to which LoRA adds none",
    "_nodes_by_depth": "the graph of a Functional model in the order in which it runs",
    "_non_trainable_variables": "variables made not trainable, frozen ones not among them",
    "_direction": "which way a metric of Keras improves",
    "_y_pred_build_structure": "which loss belongs to which output",
}
_OF_PYTHON = {"_asdict", "_exit", "_fields", "_getframe", "_make", "_replace"}
# Of another module of ours, each to be mended.
_OURS = {
    "keras_kd.teachers.precision": {"_reader"},
    "keras_kd.teachers.resolve": {"_reader"},
}


def _defined(tree: ast.AST) -> set[str]:
    """Names that a module gives to functions, classes and attributes of its own objects."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            found.add(str(getattr(node.args[1], "value", "")))
    return found


def _reached(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Private attributes that are read or written, by `getattr` too, with their lines."""
    for node in ast.walk(tree):
        name: object = None
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            known = node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            if known and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                name = node.args[1].value
        if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
            yield name, node.lineno


def test_nobody_reaches_into_what_another_module_keeps_for_itself():
    wrong = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known = _defined(tree) | set(_OF_KERAS) | _OF_PYTHON | _OURS.get(name, set())
        wrong += [
            f"{path.relative_to(ROOT)}:{line}: `{attribute}`"
            for attribute, line in _reached(tree)
            if attribute not in known
        ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_still_needed():
    reached = {
        attribute
        for path in MODULES.values()
        for attribute, _ in _reached(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert set(_OF_KERAS) <= reached, sorted(set(_OF_KERAS) - reached)


# ------------------------------------------------------------------ the distiller

_HOOKS_OF_KERAS = 15


def _class(module: str, name: str) -> ast.ClassDef:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


def test_the_distiller_has_one_base_beside_those_of_keras():
    bases = [ast.unparse(b) for b in _class("keras_kd.distill.distiller", "Distiller").bases]
    assert bases == ["SharedLayersModel"]
    model = _class("keras_kd.distill.shared_layers", "SharedLayersModel")
    assert [ast.unparse(b) for b in model.bases] == ["keras.Model"]


def test_the_hooks_of_keras_delegate():
    long = {}
    for method in _class("keras_kd.distill.distiller", "Distiller").body:
        if not isinstance(method, ast.FunctionDef) or method.name == "__init__":
            continue
        body = method.body[1:] if ast.get_docstring(method) else method.body
        source = MODULES["keras_kd.distill.distiller"].read_text(encoding="utf-8").splitlines()
        lines = source[body[0].lineno - 1 : body[-1].end_lineno] if body else []
        code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
        if len(code) > _HOOKS_OF_KERAS:
            long[method.name] = len(code)
    assert not long, long
