"""Distil a Keras model, compress it, export it, and prove that the file works."""

import importlib
import sys
from typing import Any

from keras_kd.utils import lazy

__version__ = "0.1.0"

# Where each public name lives; its module is loaded on first use, so that
# `import keras_kd` costs no more than `import keras` and loads no backend.
_PUBLIC = {
    "Batch": "keras_kd.distill.hooks",
    "Distiller": "keras_kd.distill.distiller",
    "LayerPairs": "keras_kd.transfers.layer_matching",
    "MutualLearning": "keras_kd.distill.mutual",
    "Penalty": "keras_kd.distill.penalties",
    "SelfDistillation": "keras_kd.distill.mutual",
    "Transfer": "keras_kd.transfers.transfer",
    "born_again": "keras_kd.distill.chain",
    "distill_chain": "keras_kd.distill.chain",
    "load_distiller": "keras_kd.distill.loading",
    "match_layers": "keras_kd.transfers.layer_matching",
}
_MODULES = (
    "cache",
    "callbacks",
    "compress",
    "datasets",
    "export",
    "federated",
    "lifelong",
    "losses",
    "robust",
    "search",
    "students",
    "teachers",
)

__all__ = ["__version__", *_PUBLIC, *_MODULES]


def _announce() -> None:
    # A `.keras` file with layers of this package then loads without their module being imported by
    # hand. Keras itself is not loaded for it: reading a cache needs none.
    if "keras" in sys.modules:
        from keras_kd.utils.lazy_registration import register

        register(sys.modules["keras"])


def __getattr__(name: str) -> Any:
    _announce()
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    return lazy.attribute(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return sorted(__all__)


_announce()
