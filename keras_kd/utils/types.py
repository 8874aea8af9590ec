"""Names for what the backends leave untyped."""

from typing import Any, TypeAlias

Tensor: TypeAlias = Any
"""A tensor of the active Keras backend, a `KerasTensor`, or anything that `ops` converts."""

Shape: TypeAlias = tuple[int | None, ...]
