"""What goes into a model and comes out of it: names, shapes, dtypes, in flat order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.utils.types import Tensors

if TYPE_CHECKING:
    import keras


Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TensorInfo:
    """One input or output tensor.

    Args:
        name: Name in Keras, and in every exported file.
        shape: Batch first; `None` where the size is free.
        dtype: Name of the dtype, as in NumPy.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model.

    Args:
        structure: How the model takes its inputs: `"functional"` (whatever nesting its graph
            declares), `"single"`, `"list"` or `"dict"`.
        inputs: Flat inputs, in the order of `keras.tree.flatten`.
        outputs: Flat outputs, in the same order.
    """

    structure: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Signature:
        """Rebuild what `to_dict` returned."""

        def tensors(rows: list[dict[str, Any]]) -> tuple[TensorInfo, ...]:
            return tuple(TensorInfo(r["name"], tuple(r["shape"]), r["dtype"]) for r in rows)

        return cls(values["structure"], tensors(values["inputs"]), tensors(values["outputs"]))


def pack(model: keras.Model, signature: Signature, flat: Sequence[Any]) -> Any:
    """Nest flat input tensors the way the model's `call` takes them."""
    import keras

    if signature.structure == "functional":
        return keras.tree.pack_sequence_as(model.input, list(flat))
    if signature.structure == "single":
        return flat[0]
    if signature.structure == "dict":
        return {info.name: value for info, value in zip(signature.inputs, flat, strict=True)}
    return list(flat)


def describe(model: keras.Model, sample: Tensors, outputs: Tensors) -> Signature:
    """Read the signature of a Keras model.

    Args:
        model: Any built `keras.Model`.
        sample: One batch as the model takes it. It says how a subclassed model, which declares
            no inputs, is called.
        outputs: What the model returned for that batch, as NumPy arrays.

    Returns:
        The signature; the batch dimension is `None` in every shape.

    Raises:
        ValueError: If two tensors share a name, an input holds strings, or an output has not one
            row for each sample.
    """
    import keras

    if is_symbolic(model):
        if isinstance(model, keras.Sequential):
            # Its graph is private, it takes one tensor, and its last layer names the output.
            structure, nested_in, nested_out = "single", model.inputs[0], model.outputs
            fallback = [model.layers[-1].name] * len(model.outputs)
        else:
            structure, nested_in, nested_out = "functional", model.input, model.output
            fallback = list(model.output_names)
        flat_in = keras.tree.flatten(nested_in)
        specs = [
            TensorInfo(name, (None, *tensor.shape[1:]), str(tensor.dtype))
            for name, tensor in zip(
                _named(nested_in, [tensor.name for tensor in flat_in]), flat_in, strict=True
            )
        ]
        out_names = _named(nested_out, fallback)
        raw_shapes = [tuple(tensor.shape) for tensor in keras.tree.flatten(nested_out)]
        free = all(tensor.shape[0] is None for tensor in flat_in)
    else:
        structure = (
            "dict"
            if isinstance(sample, dict)
            else "list"
            if isinstance(sample, (list, tuple))
            else "single"
        )
        flat = keras.tree.flatten(sample)
        numbered = ["input"] if len(flat) == 1 else [f"input_{i}" for i in range(len(flat))]
        specs = [
            TensorInfo(name, (None, *array.shape[1:]), _float32(array.dtype))
            for name, array in zip(_named(sample, numbered), flat, strict=True)
        ]
        flat_out = keras.tree.flatten(outputs)
        numbered = (
            ["output"] if len(flat_out) == 1 else [f"output_{i}" for i in range(len(flat_out))]
        )
        out_names = _named(outputs, numbered)
        raw_shapes, free = [np.shape(array) for array in flat_out], False
    out_shapes = [(None, *shape[1:]) for shape in raw_shapes]
    results = [
        TensorInfo(name, tuple(shape), _float32(np.asarray(array).dtype))
        for name, shape, array in zip(
            out_names, out_shapes, keras.tree.flatten(outputs), strict=True
        )
    ]
    for name, shape in zip(out_names, raw_shapes, strict=True):
        if not shape or (free and shape[0] is not None):
            raise samples_elsewhere(name, model.name, shape)
    for kind, rows in (("inputs", specs), ("outputs", results)):
        names = [row.name for row in rows]
        if len(set(names)) < len(names):
            raise ValueError(
                f"The model `{model.name}` has {kind} of the same name: {names}. Give each of them "
                "a name of its own, since an exported file addresses its tensors by name."
            )
    for row in specs:
        if row.dtype == "string":
            raise ValueError(
                f"Input `{row.name}` of the model `{model.name}` takes strings, which neither "
                "TFLite without TensorFlow operators nor a quantized file can hold. Export the "
                "part of the model behind the lookup layer, which takes integers."
            )
    return Signature(structure, tuple(specs), tuple(results))


def samples_elsewhere(name: str, model: str, shape: Sequence[int | None]) -> ValueError:
    """The error for an output that has not one row for each sample.

    Args:
        name: Of the output.
        model: Name of the model.
        shape: Of the output.
    """
    return ValueError(
        f"Output `{name}` of the model `{model}` has shape {tuple(shape)}, not one row for each "
        "sample. Files are run and compared sample by sample: let each output have the samples on "
        "its first axis."
    )


def is_symbolic(model: keras.Model) -> bool:
    """Say whether a model has a graph of Keras tensors: Functional and built Sequential models."""
    import keras

    # A subclassed model whose constructor calls `super().__init__(inputs, outputs)` is Functional;
    # any other subclass has no public list of inputs, and reading one raises.
    try:
        inputs = model.inputs
    except (AttributeError, ValueError):
        return False
    return inputs is not None and all(
        isinstance(tensor, keras.KerasTensor) for tensor in keras.tree.flatten(inputs)
    )


def _named(structure: Tensors, fallback: list[str]) -> list[str]:
    # The keys of a dict are the names that a Keras user addresses; nested ones join with "/".
    import keras

    rows = keras.tree.flatten_with_path(structure)
    if isinstance(structure, dict):
        return ["/".join(str(part) for part in path) for path, _ in rows]
    if len(fallback) != len(rows):
        fallback = [f"output_{i}" for i in range(len(rows))]
    seen: dict[str, int] = {}
    names = []
    for name in fallback:
        # One layer with two outputs gives the same name twice.
        count = seen.get(name, 0)
        seen[name] = count + 1
        names.append(name if count == 0 else f"{name}_{count}")
    return names


def _float32(dtype: str) -> str:
    # Files are made from a float32 copy, whatever precision the model computes in.
    name = str(dtype)
    return "float32" if name.startswith(("float", "bfloat")) else name
