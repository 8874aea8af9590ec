"""Stand-ins under which Keras finds this package's classes before their module is loaded.

A file names the module that a class was in when it was written; its registered name is what stays.
"""

import importlib
import types
from typing import Any

CLASSES = {
    "keras_kd.compress": (
        "ClusteredLayer",
        "FakeQuantize",
        "FloatBorder",
        "PrunedLayer",
        "QuantizedAffine",
        "QuantizedAttention",
        "QuantizedLayer",
        "QuantizedLayerNormalization",
        "QuantizedMean",
        "QuantizedModel",
        "QuantizedRecurrent",
        "QuantizedRepeat",
        "QuantizedSwish",
    ),
    "keras_kd.robust": (
        "ARD",
        "AdaAD",
        "IAD",
        "L2",
        "Linf",
        "PGDTraining",
        "RSLAD",
        "TRADES",
    ),
    "keras_kd.losses": (
        "AttentionScores",
        "AttentionTransfer",
        "BinarySoftTargets",
        "CRD",
        "CWSM",
        "CorrelationCongruence",
        "DIST",
        "DecoupledKD",
        "FLSW",
        "FSP",
        "FactorTransfer",
        "HiddenState",
        "Hint",
        "ICKD",
        "JensenShannon",
        "LogitHuber",
        "LogitMSE",
        "MiniLM",
        "NST",
        "PKD",
        "PKT",
        "RKD",
        "ReverseKL",
        "ReviewKD",
        "SimKD",
        "SimilarityPreserving",
        "SoftTargets",
        "TotalVariation",
        "VID",
    ),
    "keras_kd": (
        "Distiller",
        "MutualLearning",
        "SelfDistillation",
        "Transfer",
    ),
}
"""Registered classes that a `.keras` file may hold, by the module that has them."""


def register(keras: types.ModuleType) -> None:
    """Register a stand-in for each class of `CLASSES` that Keras does not know yet.

    Keras looks a class of another package up by its registered name, or imports the module that it
    was in, which may be gone. A stand-in is asked for `from_config` only, for which it loads the
    class; the class then takes its place in the registry.

    Args:
        keras: The module `keras`, loaded already.
    """
    known = keras.saving.get_custom_objects()
    for module, names in CLASSES.items():
        for name in names:
            known.setdefault(f"keras_kd>{name}", _stand_in(name, module))


def _stand_in(name: str, module: str) -> type:
    def from_config(config: dict[str, Any]) -> Any:
        return getattr(importlib.import_module(module), name).from_config(config)

    return type(name, (), {"from_config": staticmethod(from_config)})
