"""What type checkers read in place of two `__init__.py` has the very names that these find."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import keras_kd
from keras_kd import export, teachers


def stub(module):
    tree = ast.parse(Path(module.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    exported, classes = {}, {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.asname == alias.name:
                    exported[alias.name] = node.module
        elif isinstance(node, ast.AnnAssign):
            exported[node.target.id] = module.__name__
        elif isinstance(node, ast.ClassDef):
            classes[node.name] = {each.targets[0].id for each in node.body}
    return exported, classes


@pytest.mark.parametrize(("module", "more"), [(keras_kd, set()), (teachers, {"make"})])
def test_the_stub_has_the_names_of_the_module(module, more):
    exported, _ = stub(module)
    assert set(exported) == set(module.__all__) | more
    for name, home in module._PUBLIC.items():
        assert exported[name] == home


def test_the_called_package_has_its_names():
    _, classes = stub(keras_kd)
    assert classes["_Export"] == {*export.__all__, "__call__"}


def test_the_package_says_that_it_is_typed():
    assert Path(keras_kd.__file__).with_name("py.typed").is_file()


def test_the_version_is_the_same_wherever_it_stands():
    root = Path(keras_kd.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(), re.M)
    assert project["version"] == cited[1] == keras_kd.__version__
