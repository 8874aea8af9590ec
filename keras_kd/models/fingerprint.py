"""What identifies a model: how its layers are configured and wired, and their weights."""

import hashlib
import json
import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

IDENTITY = 2
"""Changes whenever one and the same model gets another fingerprint than before."""

# What does not change an answer, or follows from what is kept: Keras names layers anew in each
# process, and weights are compared by their bytes, whatever drew, bounded or froze them.
_IDLE = {
    "name",
    "trainable",
    "build_config",
    "build_input_shape",
    "compile_config",
    "shared_object_id",
}
_IDLE_ENDINGS = ("initializer", "regularizer", "constraint")
_SHAPES = ("batch_shape", "batch_input_shape")


def fingerprint(model: keras.Model) -> str:
    """Identify a model by the configuration and wiring of its layers and the bytes of its weights.

    Names do not count, since Keras numbers them anew in each process; nor do
    initializers, regularizers, constraints and `trainable`, which change no
    answer. A layer that does not describe itself in `get_config`, as many
    subclassed models, counts with its class, its activation and the layers
    in it.

    Args:
        model: A built Keras model.

    Returns:
        A SHA-256 in hexadecimal digits, the same on every backend, and for a
        clone and a reloaded file of the model.
    """
    digest = hashlib.sha256()
    for layer in model._flatten_layers():
        text = json.dumps(_described(layer), sort_keys=True, default=_without_config)
        digest.update(f"{text};".encode())
    for weight in model.weights:
        value = np.ascontiguousarray(ops.convert_to_numpy(weight))
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _described(layer: keras.Layer) -> Any:
    """A layer's class and configuration, in what JSON holds."""
    activation = getattr(layer, "activation", None)
    bare = [type(layer).__name__, getattr(activation, "__name__", "")]
    if type(layer) is keras.layers.Lambda:
        # Its configuration holds marshaled code, with the lines and the file it came from.
        return [*bare, code_of(layer.function), _plain(layer.arguments, {}, True)]
    try:
        config = keras.saving.serialize_keras_object(layer)
    except Exception:
        # Whatever a user's `get_config` raises: there is nothing more to be had.
        return bare
    return [*bare, _plain(config, {}, type(layer).__module__.startswith("keras"))]


def code_of(function: Callable[..., Any]) -> Any:
    """What a function does, without where it was written, in what JSON holds."""
    code = getattr(function, "__code__", None)
    if code is None:
        return _without_config(function)
    closure = [_constant(cell.cell_contents) for cell in function.__closure__ or ()]
    return [_constant(code), _constant(function.__defaults__), closure]


def _constant(value: object) -> Any:
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), _constant(value.co_consts)]
    if isinstance(value, tuple | list):
        return [_constant(each) for each in value]
    if isinstance(value, types.FunctionType):
        return code_of(value)
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return repr(value)
    return _without_config(value)


def _without_config(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    # No `repr`, which may hold an address.
    return type(value).__name__


def places_in(config: dict[str, Any]) -> dict[str, int]:
    """The positions of the layers of a serialized graph, by the names that Keras numbers."""
    named = [each.get("name") if isinstance(each, dict) else None for each in config["layers"]]
    return {name: i for i, name in enumerate(named) if name is not None}


def by_place(config: list[Any] | tuple[Any, ...], places: dict[str, int]) -> Any:
    """A list, where a tensor comes from if it says that: the place of a layer, call, output."""
    if len(config) == 3 and isinstance(config[0], str) and config[0] in places:
        return [places[config[0]], *config[1:]]
    return config


def _plain(config: object, places: dict[str, int], ours: bool) -> Any:
    """A serialized configuration without what differs between two copies of one model.

    Args:
        config: What Keras serialized, or a part of it.
        places: The positions of the layers of the graph around it, by name.
        ours: Whether the layer is one of Keras, which reads its seed in
            training alone.
    """
    if isinstance(config, list | tuple):
        return [_plain(each, places, ours) for each in by_place(config, places)]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "__tuple__":
        return _plain(config["items"], places, ours)
    if config.get("class_name") == "__keras_tensor__":
        return _plain(config["config"]["keras_history"], places, ours)
    if "class_name" in config and "config" in config:
        return _object(config, places, ours)
    return {
        str(key): _plain(value, places, ours)
        for key, value in config.items()
        # A later Keras adds arguments that are off unless they are asked for.
        if value is not None and value is not False and value != []
    }


def _object(saved: dict[str, Any], places: dict[str, int], ours: bool) -> Any:
    """A serialized layer, model, activation or dtype policy."""
    kind, config = saved["class_name"], saved["config"]
    if "Policy" in kind:
        return _policy(kind, config)
    if kind in ("function", "__lambda__") or not isinstance(config, dict):
        return [kind, config if isinstance(config, str) else ""]
    ours = str(saved.get("module") or "").startswith("keras")
    is_model = isinstance(config.get("layers"), list)
    inner = places_in(config) if is_model else places
    kept = {}
    for key, value in config.items():
        if key in _IDLE or key.endswith(_IDLE_ENDINGS) or (ours and key == "seed"):
            continue
        if is_model and key == "dtype":
            # A clone takes the policy of its time, and its layers have their own.
            continue
        kept[key] = value
    plain = _plain(kept, inner, ours)
    for key in _SHAPES:
        if isinstance(plain.get(key), list):
            # How many samples come at a time is no part of the answer.
            plain[key] = plain[key][1:]
    return [kind, plain, _plain(saved.get("inbound_nodes", []), places, ours)]


def _policy(kind: str, config: object) -> Any:
    """A dtype policy by what it says, without the paths of the layers it says it of."""
    if isinstance(config, dict) and isinstance(config.get("policy_map"), dict):
        each = [_plain(policy, {}, True) for policy in config["policy_map"].values()]
        default = _plain(config.get("default_policy"), {}, True)
        return [kind, default, sorted(json.dumps(policy, sort_keys=True) for policy in each)]
    if not isinstance(config, dict):
        return [kind, config]
    # The name of a policy is what it says.
    return [kind, {key: value for key, value in config.items() if value is not None}]
