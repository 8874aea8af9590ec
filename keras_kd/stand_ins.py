"""Stand-ins under which Keras finds this package's layers before their module is loaded."""

import importlib
from typing import Any

LAYERS = {
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
    )
}
"""Registered classes that a plain `.keras` file may hold, by the module that has them."""

HOOKS = {
    "keras_kd.robust": (
        "ARD",
        "AdaAD",
        "IAD",
        "L2",
        "Linf",
        "PGDTraining",
        "RSLAD",
        "TRADES",
    )
}
"""Those that the file of a distiller may hold."""


def register(keras: Any) -> None:
    """Register a stand-in for each class of `LAYERS` and `HOOKS` that Keras does not know yet.

    Keras looks a class of another package up by its registered name alone and imports nothing. A
    stand-in is asked for `from_config` only, for which it loads the class; the class then takes its
    place in the registry.

    Args:
        keras: The module `keras`, loaded already.
    """
    known = keras.saving.get_custom_objects()
    for module, names in (LAYERS | HOOKS).items():
        for name in names:
            known.setdefault(f"keras_kd>{name}", _stand_in(name, module))


def _stand_in(name: str, module: str) -> type:
    def from_config(config: dict[str, Any]) -> Any:
        return getattr(importlib.import_module(module), name).from_config(config)

    return type(name, (), {"from_config": staticmethod(from_config)})
