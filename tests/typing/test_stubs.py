"""What type checkers read in place of two `__init__.py` has the very names that these find."""

import ast
import inspect
import re
import tomllib
from pathlib import Path

import keras
import pytest

import keras_kd
from keras_kd import export, teachers
from keras_kd.search import devices
from keras_kd.utils import types


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


def test_options_that_are_handed_on_are_known_where_they_go():
    tune = inspect.signature(keras_kd.search.tune).parameters
    assert set(devices.Options.__annotations__) < set(tune)
    theirs = inspect.signature(keras.Model.compile).parameters
    assert set(types.CompileOptions.__annotations__) < set(theirs)
    assert set(theirs) <= {
        *("self", "optimizer", "loss", "metrics"),
        *types.CompileOptions.__annotations__,
    }
