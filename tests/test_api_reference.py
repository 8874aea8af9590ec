"""Everything public is documented, and is in the API reference."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import keras_kd

PAGES = Path(__file__).parents[1] / "docs" / "api"
LISTED = {
    line
    for page in PAGES.glob("*.md")
    for line in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
}


def public_names():
    for name in keras_kd._PUBLIC:
        yield "keras_kd", name
    for module in keras_kd._MODULES:
        for name in importlib.import_module(f"keras_kd.{module}").__all__:
            yield f"keras_kd.{module}", name


@pytest.mark.parametrize(("module", "name"), list(public_names()))
def test_public_name_is_documented(module, name):
    thing = getattr(importlib.import_module(module), name)
    if inspect.ismodule(thing):
        return
    home = getattr(thing, "__module__", module)
    assert {f"{module}.{name}", f"{home}.{name}"} & LISTED, (
        f"add `::: {home}.{name}` to a page in docs/api"
    )
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing)


def test_the_reference_names_only_what_exists():
    for path in LISTED:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
