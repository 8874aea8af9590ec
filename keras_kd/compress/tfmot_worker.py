"""A process of its own for tf_keras and TFMOT; it reads and writes files in one folder.

`python tfmot_worker.py to|from|quantize FOLDER`. Started by `keras_kd.compress.tfmot` with
`TF_USE_LEGACY_KERAS` set for this process alone; it imports nothing of this package, whose process
reads from here only what builds models.
"""

from __future__ import annotations

import inspect
import json
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras


OPERATIONS = {
    "Add": "Add",
    "Subtract": "Subtract",
    "Multiply": "Multiply",
    "Maximum": "Maximum",
    "Minimum": "Minimum",
}
"""Operations on two tensors, and the layers that do the same."""

# The same setting under another name, either way; without it a layer would take its default.
_RENAMED = {"LeakyReLU": {"negative_slope": "alpha", "alpha": "negative_slope"}}

# Keras 2: clip(0.2 x + 0.5, 0, 1); Keras 3: clip(x / 6 + 0.5, 0, 1).
_DIFFERENT = ("hard_sigmoid", "hard_silu", "hard_swish")

# What only one of the two knows, and how it stands where it does nothing.
_ONE_SIDED = {
    "time_major": False,
    "virtual_batch_size": None,
    "adjustment": None,
    "sliding_window": None,
    "use_gate": False,
    "antialias": False,
    "pad_to_aspect_ratio": False,
}

_TOLERANCE = 1e-5
_HALF_TOLERANCE = 1e-2


def build(spec: dict[str, Any], api: types.ModuleType) -> tuple[Any, dict[str, Any]]:
    """Build a Functional model from its description.

    Args:
        spec: Name, layers in order of their calls, and the structure of inputs and outputs.
        api: `keras` or `tf_keras`.

    Returns:
        The model, and its layers by path (`"backbone/block3"`).

    Raises:
        ValueError: If a layer's class is not in `api`.
    """
    layers: dict[str, Any] = {}
    made: dict[str, Any] = {}
    tensors: dict[tuple[str, int], Any] = {}
    for entry in spec["layers"]:
        name = entry["name"]
        if entry["class"] == "InputLayer":
            config = entry["config"]
            tensors[name, 0] = api.Input(
                batch_shape=config["batch_shape"], dtype=config["dtype"], name=name
            )
            continue
        if "spec" in entry:
            made[name], inner = build(entry["spec"], api)
            layers.update({f"{name}/{path}": layer for path, layer in inner.items()})
        else:
            made[name] = layers[name] = make_layer(entry, api)
    pending = [(e, i) for e in spec["layers"] for i in range(len(e["calls"]))]
    while pending:
        left = []
        for entry, index in pending:
            call = entry["calls"][index]
            if any(key not in tensors for key in references([call["args"], call["kwargs"]])):
                left.append((entry, index))
                continue
            args = restore(call["args"], tensors)
            kwargs = restore(call["kwargs"], tensors)
            if entry["class"] in OPERATIONS and len(args) > 1:
                args = [args]
            tensors[entry["name"], index] = made[entry["name"]](*args, **kwargs)
        if len(left) == len(pending):
            raise ValueError(f"The graph of `{spec['name']}` has calls whose inputs never come.")
        pending = left
    inputs = restore(spec["inputs"], tensors)
    outputs = restore(spec["outputs"], tensors)
    return api.Model(inputs, outputs, name=spec["name"]), layers


def make_layer(entry: dict[str, Any], api: types.ModuleType) -> Any:
    """A layer from a class name and a configuration of either framework."""
    kind = OPERATIONS.get(entry["class"], entry["class"])
    cls = getattr(api.layers, kind, None)
    if cls is None:
        raise ValueError(
            f"Layer `{entry['name']}` of class `{entry['class']}` is not in {api.__name__}; "
            "it cannot be carried over."
        )
    accepted: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            accepted |= set(inspect.signature(base.__init__).parameters)
    renamed = _RENAMED.get(kind, {})
    config = {}
    for key, value in entry["config"].items():
        if key not in accepted:
            key = renamed.get(key, key)
        function = value.get("config") if isinstance(value, dict) else value
        if key.endswith("activation") and function in _DIFFERENT:
            raise ValueError(
                f"Layer `{entry['name']}` has the {key} `{function}`, which Keras 2 and Keras 3 "
                "compute by different formulas; it cannot be carried over. Use `sigmoid` or "
                "another activation."
            )
        if key in accepted:
            config[key] = value
        elif key in _ONE_SIDED and value != _ONE_SIDED[key]:
            raise ValueError(
                f"Layer `{entry['name']}` is set to {key}={value!r}, which {api.__name__} does not "
                "know; it cannot be carried over."
            )
    config["name"] = entry["name"]
    if "layer" in config:
        config["layer"] = make_layer(config["layer"], api)
        config.pop("backward_layer", None)
    return cls(**config)


def save_probe(model: keras.Model, folder: pathlib.Path, api: types.ModuleType) -> None:
    """Write four random samples (zeros for integers), and what the original answers to them."""
    import numpy as np

    rng = np.random.default_rng(0)
    inputs = []
    for tensor in model.inputs:
        shape = (4, *(size or 8 for size in tensor.shape[1:]))
        name = str(getattr(tensor.dtype, "name", tensor.dtype))
        inputs.append(
            rng.normal(size=shape).astype(name) if "float" in name else np.zeros(shape, name)
        )
    np.savez(folder / "probe.npz", *inputs)
    # A layer may have any name, such as that of an argument of `savez`.
    found = {f"={name}": array for name, array in answers(model, inputs, api).items()}
    np.savez(folder / "answers.npz", **found)


def check_probe(model: keras.Model, folder: pathlib.Path, api: types.ModuleType) -> float:
    """Compare the converted model's answers with those that `save_probe` wrote.

    Returns:
        Largest difference of the outputs.

    Raises:
        ValueError: See `require_equal`.
    """
    import numpy as np

    with np.load(folder / "probe.npz") as stored:
        inputs = [stored[f"arr_{i}"] for i in range(len(stored.files))]
    with np.load(folder / "answers.npz") as stored:
        expected = {key[1:]: stored[key] for key in stored.files}
    return require_equal(expected, answers(model, inputs, api))


def answers(model: keras.Model, inputs: list[Any], api: types.ModuleType) -> dict[str, Any]:
    """What a Functional model's layers and outputs give, in order, by name.

    Args:
        model: Model of `api`.
        inputs: One array for each of `model.inputs`.
        api: `keras` or `tf_keras`.

    Returns:
        Array of each layer that is called once and gives one tensor, then `output 0` and so on.
    """
    import numpy as np

    tensors = {}
    for layer in model.layers:
        # A nested model's `output` is that of its own graph, not of its call in this one.
        if isinstance(layer, (api.Model, api.layers.InputLayer)):
            continue
        try:
            output = layer.output
        except (AttributeError, ValueError, RuntimeError):
            continue
        if not isinstance(output, (list, tuple, dict)):
            tensors[layer.name] = output
    for i, output in enumerate(model.outputs):
        tensors[f"output {i}"] = output
    whole = api.Model(model.inputs, list(tensors.values()))
    # Keras 3 takes the only input bare, and gives the only output bare.
    found = whole.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0)
    found = found if isinstance(found, (list, tuple)) else [found]
    return {name: np.asarray(array) for name, array in zip(tensors, found)}


def require_equal(expected: dict[str, Any], got: dict[str, Any]) -> float:
    """Refuse a converted model that answers otherwise than the original.

    Args:
        expected: See `answers`, of the original.
        got: The same of the converted model.

    Returns:
        Largest difference of the outputs.

    Raises:
        ValueError: If the outputs differ by more than rounding, naming the first layer that does.
    """
    import numpy as np

    def difference(name: str) -> float:
        first, second = (np.asarray(arrays[name], np.float64) for arrays in (expected, got))
        if first.shape != second.shape:
            return float("inf")
        same = (first == second) | (np.isnan(first) & np.isnan(second))
        return float(np.max(np.where(same, 0.0, np.abs(first - second)), initial=0.0))

    half = any(array.dtype.itemsize == 2 for array in expected.values())
    limit = _HALF_TOLERANCE if half else _TOLERANCE

    def differs(name: str) -> bool:
        scale = float(np.max(np.abs(np.asarray(expected[name], np.float64)), initial=0.0))
        # Not a number is no small difference either.
        return not difference(name) <= limit * max(scale, 1e-6)

    outputs = [name for name in expected if name.startswith("output ")]
    if any(differs(name) for name in outputs):
        shared = [name for name in expected if name in got and name not in outputs]
        layer = next((name for name in shared if differs(name)), None)
        where = f"first at layer `{layer}`" if layer else "at no layer that can be told"
        worst = max(difference(name) for name in outputs)
        raise ValueError(
            f"The converted model answers otherwise than the original, by up to {worst:.3g}, "
            f"{where}. Replace that layer by one that Keras 2 and Keras 3 compute alike."
        )
    return max(difference(name) for name in outputs)


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A layer's configuration without what the other framework does not read."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_initializer") or key in ("build_config", "sparse", "ragged", "optional"):
            continue
        if key == "batch_input_shape":
            key = "batch_shape"
        if key == "dtype" and isinstance(value, dict):
            value = value["config"].get("name", "float32")
        if key == "axis" and isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if key == "layer":
            value = {
                "name": value["config"].get("name", "inner"),
                "class": value["class_name"],
                "config": plain_config(value["config"]),
            }
        elif key.endswith(("_regularizer", "_constraint")) or key in ("quantization_config",):
            continue
        kept[key] = value
    return kept


def references(value: object) -> list[tuple[str, int]]:
    """Layer and call of every tensor named in a structure."""
    if isinstance(value, dict):
        if "tensor" in value:
            return [(value["tensor"][0], value["tensor"][1])]
        value = list(value.values())
    if isinstance(value, list):
        return [key for item in value for key in references(item)]
    return []


def restore(value: Any, tensors: dict[tuple[str, int], Any]) -> Any:
    """A structure with its tensors in place."""
    if isinstance(value, dict):
        if "tensor" in value:
            name, call, index = value["tensor"]
            found = tensors[name, call]
            return found[index] if isinstance(found, (list, tuple)) else found
        return {key: restore(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [restore(item, tensors) for item in value]
    return value


def describe(model: keras.Model) -> dict[str, Any]:
    """The description of a tf_keras model, as `build` reads it."""
    import tf_keras

    if isinstance(model, tf_keras.Sequential):
        model = tf_keras.Model(model.inputs, model.outputs, name=model.name)
    config = model.get_config()
    layers = []
    for entry in config["layers"]:
        if entry["class_name"] in ("TFOpLambda", "SlicingOpLambda"):
            raise ValueError(
                f"`{entry['name']}` is a TensorFlow function in the graph, which has no layer. "
                "Use layers (Add, Rescaling, ...) in its place."
            )
        calls = [_call(node) for node in entry["inbound_nodes"]]
        described = {
            "name": entry["name"],
            "class": entry["class_name"],
            "config": plain_config(entry["config"]),
            "calls": calls,
        }
        layer = model.get_layer(entry["name"])
        if isinstance(layer, tf_keras.Model):
            described["spec"] = describe(layer)
        layers.append(described)
    described = {
        "name": config["name"],
        "layers": layers,
        "inputs": _ends(config["input_layers"]),
        "outputs": _ends(config["output_layers"]),
    }
    _renumber(described)
    return described


def _renumber(spec: dict[str, Any]) -> None:
    """Count each layer's calls from 0: tf_keras counts a nested model's own making as well."""
    found = _tensors_of(spec["outputs"])
    for entry in spec["layers"]:
        for call in entry["calls"]:
            found += _tensors_of([call["args"], call["kwargs"]])
    counts = {entry["name"]: len(entry["calls"]) for entry in spec["layers"]}
    for tensor in found:
        used = sorted({t[1] for t in found if t[0] == tensor[0]})
        if used and max(used) >= max(counts[tensor[0]], 1):
            tensor.append(used.index(tensor[1]))
    for tensor in found:
        if len(tensor) == 4:
            tensor[1] = tensor.pop()


def _tensors_of(value: Any) -> list[list[Any]]:
    """The `[layer, call, index]` lists of a structure, to be changed in place."""
    if isinstance(value, dict):
        if "tensor" in value:
            return [value["tensor"]]
        value = list(value.values())
    if isinstance(value, list):
        return [tensor for item in value for tensor in _tensors_of(item)]
    return []


def _call(node: keras.Operation) -> dict[str, Any]:
    if isinstance(node, list) and node and isinstance(node[0], str):
        node = [node]
    kwargs = {k: v for k, v in (node[0][3] or {}).items() if k not in ("training", "mask")}
    positional = [{"tensor": list(item[:3])} for item in node]
    # A second tensor given by keyword is written as [name, call, index].
    for key, value in kwargs.items():
        if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
            kwargs[key] = {"tensor": value}
    return {"args": [positional if len(positional) > 1 else positional[0]], "kwargs": kwargs}


def _ends(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ends(item) for key, item in value.items()}
    if len(value) == 3 and isinstance(value[0], str):
        return {"tensor": list(value)}
    found = [_ends(item) for item in value]
    return found[0] if len(found) == 1 else found


def load_weights(layers: dict[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    """Give every layer the arrays stored as `path|index`."""
    for path, layer in layers.items():
        count = sum(key.rpartition("|")[0] == path for key in weights)
        if count != len(layer.weights):
            raise ValueError(
                f"Layer `{path}` has {len(layer.weights)} weights after the conversion, {count} "
                "before it."
            )
        if count:
            layer.set_weights([weights[f"{path}|{i}"] for i in range(count)])


def _main(command: str, folder: pathlib.Path) -> None:
    import numpy as np
    import tf_keras

    task = json.loads((folder / "task.json").read_text())
    if command == "from":
        model = tf_keras.models.load_model(task["path"], compile=False)
        (folder / "spec.json").write_text(json.dumps(describe(model)))
        arrays: dict[str, Any] = {}
        _collect(model, "", arrays)
        np.savez(folder / "weights.npz", **arrays)
        save_probe(model, folder, tf_keras)
        return
    spec = json.loads((folder / "spec.json").read_text())
    with np.load(folder / "weights.npz") as weights:
        model, layers = build(spec, tf_keras)
        load_weights(layers, dict(weights))
    with np.load(folder / "data.npz") as stored:
        data = {key: stored[key] for key in stored}
    (folder / "difference.json").write_text(json.dumps(check_probe(model, folder, tf_keras)))
    if command == "to":
        model.save(task["path"])
        return
    inputs = [data[f"input_{i}"] for i in range(task["inputs"])]
    x = inputs[0] if len(inputs) == 1 else inputs
    model = _quantize(model, x, data, task, folder)
    outputs = model.predict(x, verbose=0, batch_size=256)
    flat = [np.asarray(v) for v in _flat(outputs)]
    np.savez(folder / "outputs.npz", **{f"output_{i}": v for i, v in enumerate(flat)})


def _quantize(
    model: keras.Model,
    x: list[np.ndarray],
    data: dict[str, Any],
    task: dict[str, Any],
    folder: pathlib.Path,
) -> Any:
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras

    quantized = tfmot.quantization.keras.quantize_model(model)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=task["from_logits"])
    quantized.compile(tf_keras.optimizers.Adam(task["learning_rate"]), loss)
    if task["epochs"]:
        tf_keras.utils.set_random_seed(task["seed"])
        quantized.fit(
            x, data["labels"], epochs=task["epochs"], batch_size=task["batch_size"], verbose=0
        )
    converter = tf.lite.TFLiteConverter.from_keras_model(quantized)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    (folder / "model.tflite").write_bytes(converter.convert())
    return quantized


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in _flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _collect(model: keras.Model, prefix: str, arrays: dict[str, Any]) -> None:
    import tf_keras

    for layer in model.layers:
        path = prefix + layer.name
        if isinstance(layer, tf_keras.Model):
            _collect(layer, path + "/", arrays)
        else:
            arrays.update({f"{path}|{i}": value for i, value in enumerate(layer.get_weights())})


if __name__ == "__main__":
    _main(sys.argv[1], pathlib.Path(sys.argv[2]))
