"""Choose for me: the method, the size and the precision of a student, by trying them.

`best_method` compares methods for one student, `tune` searches methods, temperatures, sizes and
precisions for the best exported file within a budget, `for_device` does so for one device and
`family` for several from one set of the teacher's answers. Optuna searches; what is compared are
files that were exported, run and timed. A new parameter of `tune` is an entry of
`space.PARAMETERS`; a new method a line of `keras_kd.distill.candidates.CANDIDATES`.
"""

from typing import TYPE_CHECKING, Any

from keras_kd.utils import lazy

if TYPE_CHECKING:
    from keras_kd.distill.method_choice import MethodChoice as MethodChoice
    from keras_kd.search.budget import Budget as Budget
    from keras_kd.search.devices import Device as Device
    from keras_kd.search.devices import DeviceResult as DeviceResult
    from keras_kd.search.devices import family as family
    from keras_kd.search.devices import for_device as for_device
    from keras_kd.search.methods import best_method as best_method
    from keras_kd.search.space import Choice as Choice
    from keras_kd.search.space import Float as Float
    from keras_kd.search.space import Log as Log
    from keras_kd.search.study import Study as Study
    from keras_kd.search.tuner import tune as tune

# Loaded on first use: Optuna is needed by `tune` alone.
_PUBLIC = {
    "Budget": "keras_kd.search.budget",
    "Choice": "keras_kd.search.space",
    "Device": "keras_kd.search.devices",
    "DeviceResult": "keras_kd.search.devices",
    "Float": "keras_kd.search.space",
    "Log": "keras_kd.search.space",
    "MethodChoice": "keras_kd.distill.method_choice",
    "Study": "keras_kd.search.study",
    "best_method": "keras_kd.search.methods",
    "family": "keras_kd.search.devices",
    "for_device": "keras_kd.search.devices",
    "tune": "keras_kd.search.tuner",
}

__all__ = [
    "Budget",
    "Choice",
    "Device",
    "DeviceResult",
    "Float",
    "Log",
    "MethodChoice",
    "Study",
    "best_method",
    "family",
    "for_device",
    "tune",
]


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return sorted(__all__)
