"""TensorFlow Model Optimization, without its side effects.

Importing TFMOT sets `TF_USE_LEGACY_KERAS`, after which `tf.keras` is tf_keras for the whole
process. Its pruning schedules and masks are plain functions of tensors and are loaded here from
their files alone; all that needs tf_keras runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from types import ModuleType
from typing import Any

import keras
import numpy as np

from keras_kd.compress import tfmot_worker
from keras_kd.compress.selection import require_graph
from keras_kd.models.folding import require_built
from keras_kd.models.graph import Graph, is_graph
from keras_kd.utils.types import Tensors

TIMEOUT = 1800
"""Seconds after which a process that hangs is given up."""


@dataclasses.dataclass(frozen=True)
class Opinion:
    """What TFMOT makes of a model.

    Args:
        outputs: Outputs of its quantization-aware tf_keras model, one array for each output.
        tflite: Its int8 TFLite file.
    """

    outputs: list[np.ndarray]
    tflite: bytes


def pruning_schedule() -> ModuleType:
    """TFMOT's own module of pruning schedules, loaded without TFMOT.

    Returns:
        Module with `PolynomialDecay` and `ConstantSparsity`, whose objects `prune` takes as
        `schedule`.

    Raises:
        ImportError: If TFMOT is not installed.

    Examples:
        >>> schedule = pruning_schedule().PolynomialDecay(0.0, 0.8, begin_step=0, end_step=1000)
        >>> schedule.final_sparsity
        0.8
    """
    return _load("pruning_schedule")


def pruning_utils() -> ModuleType:
    """TFMOT's own module of pruning masks, loaded without TFMOT.

    Returns:
        Module with `generate_m_by_n_mask` and `weights_rearrange`.

    Raises:
        ImportError: If TFMOT is not installed.
    """
    return _load("pruning_utils")


def _load(name: str) -> ModuleType:
    alias = f"keras_kd_tfmot_{name}"
    if alias in sys.modules:
        return sys.modules[alias]
    # Finding the package does not run it; running its `__init__` is what sets the variable.
    package = importlib.util.find_spec("tensorflow_model_optimization")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "TFMOT's pruning needs the package tensorflow-model-optimization: "
            'pip install "keras_kd[export]".'
        )
    root = pathlib.Path(package.submodule_search_locations[0])
    path = root / "python" / "core" / "sparsity" / "keras" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(alias, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"The installed TFMOT has no `{name}`. Expected version 0.8 or later.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise
    return module


def to_tf_keras(model: keras.Model, path: str | os.PathLike[str]) -> float:
    """Rebuild a Keras 3 model in tf_keras, layer by layer, and save it there.

    Args:
        model: Built Functional or Sequential model of layers that both have. It is not changed.
        path: File to write, in tf_keras's `.keras` or `.h5` form. It appears when complete.

    Returns:
        Largest difference of the two models' outputs on random inputs.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If the model's graph is not known, a layer has no counterpart, or the outputs
            differ by more than 1e-5 of the largest, naming the layer if possible.
        ImportError: If tf_keras is not installed.

    Examples:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> to_tf_keras(model, "model.h5") < 1e-6  # doctest: +SKIP
        True
    """
    require_built(model)
    require_graph(model, "carry over to tf_keras")
    target = pathlib.Path(path).resolve()
    if target.suffix not in (".keras", ".h5"):
        raise ValueError(f"`path` must end in .keras or .h5. Received: {path!s}.")
    if not target.parent.is_dir():
        raise ValueError(f"The folder of `path` does not exist: {target.parent}.")
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = pathlib.Path(name)
        partial = folder / f"model{target.suffix}"
        _write(model, folder, [], {"path": str(partial)})
        _run("to", folder)
        difference = float(json.loads((folder / "difference.json").read_text()))
        os.replace(partial, target)
    return difference


def from_tf_keras(path: str | os.PathLike[str]) -> keras.Model:
    """Rebuild a model saved by tf_keras in Keras 3, layer by layer.

    Args:
        path: File written by tf_keras, `.keras` or `.h5`.

    Returns:
        New Functional Keras 3 model with the same weights, not compiled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a layer has no counterpart, or the outputs differ by more than 1e-5 of the
            largest, naming the layer if possible.
        ImportError: If tf_keras is not installed.
    """
    source = pathlib.Path(path).resolve()
    if not source.exists():
        raise FileNotFoundError(f"There is no file {source}.")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "task.json").write_text(json.dumps({"path": str(source)}))
        _run("from", folder)
        spec = json.loads((folder / "spec.json").read_text())
        with np.load(folder / "weights.npz") as stored:
            weights = {key: stored[key] for key in stored}
        model, layers = tfmot_worker.build(spec, keras)
        tfmot_worker.load_weights(layers, weights)
        tfmot_worker.check_probe(model, folder, keras)
    return model


def quantize(
    model: keras.Model,
    inputs: Tensors,
    labels: np.ndarray | None = None,
    epochs: int = 1,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    from_logits: bool = True,
    seed: int = 0,
) -> Opinion:
    """TFMOT's own quantization-aware training of a model, as a second opinion.

    The model is rebuilt in tf_keras, wrapped by `tfmot.quantization.keras.quantize_model`, trained
    on cross-entropy and converted to an int8 TFLite file, in a process of its own.

    Args:
        model: Built Functional or Sequential classifier, of the layers that TFMOT supports.
        inputs: Array of inputs `(samples, ...)`, which are trained on and predicted.
        labels: Integer array `(samples,)`; None with `epochs=0`.
        epochs: Epochs to train.
        batch_size: Samples in a batch.
        learning_rate: Of Adam.
        from_logits: Whether the model gives logits.
        seed: Seed of the training.

    Returns:
        The quantized model's outputs on `inputs`, and the TFLite file.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If `labels` are missing, or TFMOT refuses the model, with its reason.
        ImportError: If TFMOT is not installed.
    """
    require_built(model)
    require_graph(model, "carry over to tf_keras")
    if epochs and labels is None:
        raise ValueError("`labels` are needed to train. Give them, or set `epochs=0`.")
    task = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "from_logits": from_logits,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _write(model, folder, inputs, task, labels)
        _run("quantize", folder)
        return Opinion(_outputs(folder), (folder / "model.tflite").read_bytes())


def _write(
    model: keras.Model,
    folder: pathlib.Path,
    inputs: Tensors,
    task: dict[str, Any],
    labels: np.ndarray | None = None,
) -> None:
    spec = _describe(model)
    tfmot_worker.save_probe(Graph(model).model, folder, keras)
    arrays: dict[str, np.ndarray] = {}
    _collect(model, "", arrays)
    leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(inputs)]
    data = {f"input_{i}": leaf for i, leaf in enumerate(leaves)}
    if labels is not None:
        data["labels"] = np.asarray(labels)
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "task.json").write_text(json.dumps({**task, "inputs": len(leaves)}))
    np.savez(folder / "weights.npz", **arrays)
    np.savez(folder / "data.npz", **data)


def _describe(model: keras.Model) -> dict[str, Any]:
    graph = Graph(model)
    config = graph.model.get_config()
    layers = []
    for entry in config["layers"]:
        layer = graph.layers[entry["name"]]
        kind = entry["class_name"]
        described: dict[str, Any] = {
            "name": entry["name"],
            "class": kind,
            "config": tfmot_worker.plain_config(entry["config"]),
            "calls": [
                {
                    "args": _tensors(node["args"]),
                    "kwargs": {
                        key: _tensors(value)
                        for key, value in node["kwargs"].items()
                        if value is not None and key != "training"
                    },
                }
                for node in entry["inbound_nodes"]
            ],
        }
        if is_graph(layer):
            described["spec"] = _describe(layer)
        elif not isinstance(layer, keras.layers.Layer) and kind not in tfmot_worker.OPERATIONS:
            raise ValueError(
                f"`{entry['name']}` is the operation `{kind}`, which has no layer in tf_keras. "
                "Use a layer in its place, such as Rescaling for a product with a constant."
            )
        layers.append(described)
    return {
        "name": config["name"],
        "layers": layers,
        "inputs": _ends(config["input_layers"]),
        "outputs": _ends(config["output_layers"]),
    }


def _tensors(value: object) -> Any:
    """A serialized call with its tensors as `{"tensor": [layer, call, index]}`."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            return {"tensor": list(value["config"]["keras_history"])}
        return {key: _tensors(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tensors(item) for item in value]
    return value


def _ends(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ends(item) for key, item in value.items()}
    if len(value) == 3 and isinstance(value[0], str) and isinstance(value[1], int):
        return {"tensor": list(value)}
    return [_ends(item) for item in value]


def _collect(model: keras.Model, prefix: str, arrays: dict[str, np.ndarray]) -> None:
    for layer in model.layers:
        path = prefix + layer.name
        if isinstance(layer, keras.Model):
            _collect(layer, path + "/", arrays)
        else:
            arrays.update({f"{path}|{i}": value for i, value in enumerate(layer.get_weights())})


def _outputs(folder: pathlib.Path) -> list[np.ndarray]:
    with np.load(folder / "outputs.npz") as stored:
        return [stored[f"output_{i}"] for i in range(len(stored.files))]


def _run(command: str, folder: pathlib.Path) -> None:
    if importlib.util.find_spec("tf_keras") is None:
        raise ImportError('This needs the package tf-keras: pip install "keras_kd[export]".')
    environment = {
        **os.environ,
        "TF_USE_LEGACY_KERAS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONIOENCODING": "utf-8",
    }
    worker = str(pathlib.Path(tfmot_worker.__file__))
    # -P: the worker's folder holds modules of this package, which it must not find.
    done = subprocess.run(
        [sys.executable, "-P", worker, command, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ValueError(f"The tf_keras process failed: {reason}")
