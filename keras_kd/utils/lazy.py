"""Public names of a package whose modules are loaded on first use."""

import importlib
from collections.abc import Mapping
from typing import Any


def attribute(package: str, homes: Mapping[str, str], name: str) -> Any:
    """A public name from the module in which it lives.

    Args:
        package: Name of the package that was asked for it.
        homes: Modules by public name.
        name: What was asked for.

    Raises:
        AttributeError: If there is no such name.
    """
    if name in homes:
        return getattr(importlib.import_module(homes[name]), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
