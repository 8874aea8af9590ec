"""The teacher's answers on disk: run once, read in every epoch."""

from typing import TYPE_CHECKING, Any

from keras_kd.utils import lazy

if TYPE_CHECKING:
    from keras_kd.cache.from_answers import write_answers as write_answers
    from keras_kd.cache.from_teacher import write as write
    from keras_kd.cache.layout import Manifest as Manifest
    from keras_kd.cache.layout import record_bytes as record_bytes
    from keras_kd.cache.verification import verify as verify

# Loaded on first use, so that a process that only reads or checks a cache needs no Keras.
_PUBLIC = {
    "Manifest": "keras_kd.cache.layout",
    "record_bytes": "keras_kd.cache.layout",
    "verify": "keras_kd.cache.verification",
    "write": "keras_kd.cache.from_teacher",
    "write_answers": "keras_kd.cache.from_answers",
}

__all__ = ["Manifest", "record_bytes", "verify", "write", "write_answers"]


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return sorted(__all__)
