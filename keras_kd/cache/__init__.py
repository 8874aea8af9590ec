"""The teacher's answers on disk: run once, read in every epoch."""

# First, since the teachers end with importing `CachedTeacher` from this package.
from keras_kd import teachers as teachers  # isort: skip
from keras_kd.cache.layout import Manifest, record_bytes
from keras_kd.cache.reader import verify
from keras_kd.cache.writer import write

__all__ = ["Manifest", "record_bytes", "verify", "write"]
