"""What may stand as a teacher: models, files, estimators, functions, or answers on disk."""

from typing import Any

from keras_kd.models.fingerprint import fingerprint
from keras_kd.teachers.base import Teacher
from keras_kd.teachers.black_box import BlackBox
from keras_kd.teachers.ensemble import Ensemble
from keras_kd.teachers.model import ModelTeacher
from keras_kd.teachers.onnx_files import from_onnx
from keras_kd.teachers.resolve import make as make
from keras_kd.teachers.row_numbers import Numbered
from keras_kd.teachers.sklearn import from_sklearn
from keras_kd.teachers.tflite_files import from_tflite
from keras_kd.utils import lazy

__all__ = [
    "BlackBox",
    "CachedTeacher",
    "Ensemble",
    "ModelTeacher",
    "Numbered",
    "Teacher",
    "fingerprint",
    "from_onnx",
    "from_sklearn",
    "from_tflite",
]

# The teacher that reads a cache belongs to the cache, which stands on the teachers.
_PUBLIC = {"CachedTeacher": "keras_kd.cache.teacher"}


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return sorted(__all__)
