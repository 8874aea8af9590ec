"""What may stand as a teacher: a model, several models, or outputs read from disk."""

import importlib
from typing import Any

from keras_kd.models.fingerprint import fingerprint
from keras_kd.teachers.base import Teacher
from keras_kd.teachers.ensemble import Ensemble
from keras_kd.teachers.model import ModelTeacher
from keras_kd.teachers.resolve import make as make
from keras_kd.teachers.row_numbers import Numbered

__all__ = ["CachedTeacher", "Ensemble", "ModelTeacher", "Numbered", "Teacher", "fingerprint"]

# The teacher that reads a cache belongs to the cache, which stands on the teachers.
_PUBLIC = {"CachedTeacher": "keras_kd.cache.teacher"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
