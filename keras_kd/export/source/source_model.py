"""The model as the converting process sees it: loaded, in float32, as TensorFlow functions."""

from __future__ import annotations

import importlib
import json
import types
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.signature import Arrays, Signature, pack
from keras_kd.export.source.model_files import plain_rounding, save_tensorflow, specs
from keras_kd.utils.types import Tensor

if TYPE_CHECKING:
    import keras

_HALF = ("mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64")
_RECURRENT = ("LSTM", "GRU", "SimpleRNN")


class LoadError(ValueError):
    """The model did not survive the way into this process."""


class Source:
    """A model ready for the converters.

    `quantized` says that it holds ranges for its activations, learned by `keras_kd.compress`;
    `recurrent` that a layer loops over time.

    Args:
        job: `model` (path), `handover` ("keras" or "savedmodel"), `signature`, `needs` (modules and
            classes), `shapes` (of one sample), `sample` (path of a small `.npz`: inputs and the
            outputs that the caller's own model gave for them), `layers` (their names), `batch` (1
            for files of one sample, or `None`).
        scratch: Folder for intermediate files.
    """

    def __init__(self, job: dict[str, Any], scratch: Path) -> None:
        self.signature = Signature.from_dict(job["signature"])
        self.shapes: list[list[int]] = job["shapes"]
        self.layers: frozenset[str] = frozenset(job["layers"])
        self.quantized = bool(job["quantized"])
        self.batch: int | None = job["batch"]
        self.recurrent = False
        self._path = Path(job["model"])
        self._scratch = scratch
        self._needs = job["needs"]
        self._folders: dict[str, str] = {}
        self._keras = job["handover"] == "keras"
        if self._keras:
            config = _config(self._path)
            self.recurrent = any(_any(config, "class_name", name) for name in _RECURRENT)
            self._model = self._load(unroll=False)
            self._float = self._model
            from keras_kd import compress

            if _compressed(self._model, compress):
                self.quantized = compress.has_activation_quantization(self._model)
                self._float = compress.finalize(self._model)
            self._check(job["sample"])

    def keras_model(self) -> keras.Model:
        """Return the model in float32, with its rounding and masks worked into the weights.

        Raises:
            LoadError: If only its traced functions came into this process.
        """
        if not self._keras:
            raise LoadError(
                "the model's classes cannot be imported here, so only its traced functions are "
                "known"
            )
        return self._float

    def saved_model(self, form: str, endpoint: str) -> str:
        """Return the folder of a SavedModel.

        Args:
            form: `"float"`, `"quantized"` (with its fake quantization) or `"unrolled"` (recurrent
                layers without loops).
            endpoint: The signature that it must have: `"dynamic"` (any batch) or `"static"`.
        """
        if not self._keras:
            return str(self._path)
        key = f"saved-{form}-{endpoint}"
        if key not in self._folders:
            model = self._load(unroll=True) if form == "unrolled" else self._form(form)
            # Tracing takes longer than anything else here, and few models need both.
            save_tensorflow(model, self.signature, self.shapes, self._scratch / key, [endpoint])
            self._folders[key] = str(self._scratch / key)
        return self._folders[key]

    def _form(self, form: str) -> Any:
        return self._model if form == "quantized" else self._float

    def function(self, form: str = "float") -> tuple[Any, list[Any]]:
        """Return a `tf.function` of the flat inputs with any batch, and its input signature.

        Args:
            form: As for `saved_model`.
        """
        import keras
        import tensorflow as tf

        signature = specs(self.signature, None)
        names = [info.name for info in self.signature.outputs]
        if not self._keras:
            loaded = tf.saved_model.load(str(self._path))
            # Kept alive here: the function holds its variables weakly.
            self._loaded = loaded

            def call(*flat: Tensor) -> list[Any]:
                result = loaded.dynamic(*flat)
                return [tf.identity(result[name]) for name in names]
        else:
            model = self._form(form)

            def call(*flat: Tensor) -> list[Any]:
                with plain_rounding(onnx=True):
                    result = model(pack(model, self.signature, flat), training=False)
                return [tf.identity(tensor) for tensor in keras.tree.flatten(result)]

        return tf.function(call, input_signature=signature), signature

    def _load(self, *, unroll: bool) -> Any:
        import keras

        custom = {}
        for module in self._needs["modules"]:
            importlib.import_module(module)
        for entry in self._needs["classes"]:
            module, name = entry.split(":")
            custom[name] = getattr(importlib.import_module(module), name)
        copy = self._scratch / f"float32{'-unrolled' if unroll else ''}.keras"
        _rewrite(self._path, copy, unroll)
        model = keras.saving.load_model(copy, custom_objects=custom, compile=False, safe_mode=True)
        # A freshly loaded model has no recorded call; some layers only set themselves up in one.
        zeros = [
            np.zeros(shape, info.dtype)
            for shape, info in zip(self.shapes, self.signature.inputs, strict=True)
        ]
        model(pack(model, self.signature, zeros), training=False)
        return model

    def _check(self, sample: str) -> None:
        import keras

        with np.load(sample) as arrays:
            values: Arrays = dict(arrays)
        flat = [values[f"x{i}"] for i in range(len(self.signature.inputs))]
        result = self._model(pack(self._model, self.signature, flat), training=False)
        for i, tensor in enumerate(keras.tree.flatten(result)):
            got = np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)
            want = np.asarray(values[f"y{i}"], np.float64)
            # Half-precision models differ by rounding; a model rebuilt wrongly differs by far.
            if got.shape != want.shape or not np.allclose(
                got, want, rtol=0.1, atol=0.1 * max(1e-3, float(np.abs(want).max(initial=0.0)))
            ):
                raise LoadError(
                    "saved as a .keras file and loaded again, the model answers differently; check "
                    "its get_config, build and save_own_variables"
                )


def _compressed(model: keras.Model, compress: types.ModuleType) -> bool:
    from keras_kd.models.weight_wrapper import every_layer

    return bool(compress.is_quantize_aware(model)) or any(
        isinstance(layer, (compress.PrunedLayer, compress.ClusteredLayer))
        for _, layer in every_layer(model)
    )


def _config(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def _any(config: object, key: str, prefix: str) -> bool:
    if isinstance(config, dict):
        return str(config.get(key) or "").startswith(prefix) or any(
            _any(value, key, prefix) for value in config.values()
        )
    return isinstance(config, list) and any(_any(value, key, prefix) for value in config)


def _rewrite(source: Path, target: Path, unroll: bool) -> None:
    # Precision and unrolling are settings of the layers, not of the weights: change the config in
    # the archive and every kind of model, subclassed ones too, comes back in float32.
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            blob = old.read(name)
            if name == "config.json":
                blob = json.dumps(_float32(json.loads(blob), unroll)).encode()
            new.writestr(name, blob)


def _float32(config: Any, unroll: bool) -> Any:
    if isinstance(config, list):
        return [_float32(value, unroll) for value in config]
    if not isinstance(config, dict):
        return config
    config = {key: _float32(value, unroll) for key, value in config.items()}
    inner = config.get("config")
    if isinstance(inner, dict):
        if config.get("class_name") == "DTypePolicy" and inner.get("name") in _HALF:
            inner["name"] = "float32"
        if unroll and config.get("class_name") in _RECURRENT:
            inner["unroll"] = True
    if config.get("dtype") in _HALF:
        config["dtype"] = "float32"
    return config
