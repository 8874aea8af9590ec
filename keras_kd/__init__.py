"""Distil a Keras model, compress it, export it, and prove that the file works."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each public name lives; its module is loaded on first use, so that
# `import keras_kd` costs no more than `import keras` and loads no backend.
_PUBLIC = {
    "Distiller": "keras_kd.distiller",
    "LayerPairs": "keras_kd.match",
    "MutualLearning": "keras_kd.mutual",
    "SelfDistillation": "keras_kd.mutual",
    "Transfer": "keras_kd.transfer",
    "born_again": "keras_kd.chain",
    "distill_chain": "keras_kd.chain",
    "load_distiller": "keras_kd.distiller",
    "match_layers": "keras_kd.match",
}
_MODULES = (
    "cache",
    "callbacks",
    "compress",
    "datasets",
    "export",
    "losses",
    "students",
    "teachers",
)

__all__ = ["__version__", *_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
