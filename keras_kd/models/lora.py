"""What Keras does with low-rank updates of a layer, and what it loses when it saves them.

Keras writes `kernel + alpha / rank * A B` in place of the kernel and loads `A` and `B` as zero,
where neither has a gradient any more. It writes no flags of single variables, and nothing of the
updates inside of composite layers such as attention.
"""

from typing import Any

import keras
from keras import ops


def updated_layers(model: keras.Model) -> list[Any]:
    """The layers of a model that have updates of low rank, in the order of its layers."""
    return [layer for layer in model._flatten_layers() if getattr(layer, "lora_enabled", False)]


def parts(layer: keras.Layer) -> tuple[Any, Any, Any]:
    """The kernel without its update, `A`, and `B`, as variables.

    Args:
        layer: A layer with an update: Dense, EinsumDense, Embedding or Conv.
    """
    # Keras's public `kernel` is the sum, and the variable behind it has no public name.
    if isinstance(layer, keras.layers.Embedding):
        return layer._embeddings, layer.lora_embeddings_a, layer.lora_embeddings_b
    return layer._kernel, layer.lora_kernel_a, layer.lora_kernel_b


def merged(layer: keras.Layer) -> Any:
    """The kernel with its update, an array in the kernel's own precision."""
    # Keras's sum is rounded to the precision of the computation.
    kernel, a, b = (ops.convert_to_numpy(ops.cast(v, "float32")) for v in parts(layer))
    return kernel + (layer.lora_alpha / layer.lora_rank) * (a @ b)


def is_zero(layer: keras.Layer) -> bool:
    """Whether `A` and `B` are zero, as Keras loads them: a saddle that no gradient leaves."""
    return not any(ops.convert_to_numpy(v).any() for v in parts(layer)[1:])


def draw(layer: keras.Layer) -> None:
    """Draw `A` as Keras does for a new update; `B` stays, so that the layer answers as before."""
    a = parts(layer)[1]
    a.assign(keras.initializers.HeUniform()(a.shape, dtype=a.dtype))


def record(model: keras.Model) -> dict[str, Any]:
    """What of updates and trainable flags Keras does not save.

    Args:
        model: A student.

    Returns:
        Plain numbers: positions of the frozen layers and variables, and rank and alpha of the
        updated layers by position.
    """
    layers, variables = model._flatten_layers(), model.variables
    return {
        "layers": len(layers),
        "frozen_layers": [i for i, layer in enumerate(layers) if not layer.trainable],
        "lora": [
            [i, int(layer.lora_rank), float(layer.lora_alpha)]
            for i, layer in enumerate(layers)
            if getattr(layer, "lora_enabled", False)
        ],
        "variables": len(variables),
        "frozen_variables": [i for i, v in enumerate(variables) if not v.trainable],
    }


def restore(model: keras.Model, saved: dict[str, Any]) -> None:
    """Give a model that was made from its configuration the updates and flags of `record`.

    Args:
        model: The student, before its weights are loaded.
        saved: What `record` returned.

    Raises:
        ValueError: If the model has updates to restore and is not built as it was.
    """
    layers = model._flatten_layers()
    same = len(layers) == saved["layers"]
    if same:
        for i, rank, alpha in saved["lora"]:
            layer = layers[i]
            if layer.built and not layer.lora_enabled:
                layer.enable_lora(rank)
            # Dense forgets it when it is built.
            layer.lora_alpha = alpha
        frozen = set(saved["frozen_layers"])
        flags = [(layer, i not in frozen) for i, layer in enumerate(layers)]
        # Setting a flag sets those of all layers inside, so that these come after.
        for layer, trainable in sorted(flags, key=lambda flag: not sublayers(flag[0])):
            if layer.trainable != trainable:
                layer.trainable = trainable
    variables = model.variables
    if not same or len(variables) != saved["variables"]:
        if saved["lora"]:
            raise ValueError(
                f"The student `{model.name}` was saved with low-rank updates and is made from its "
                f"configuration with {len(layers)} layers and {len(variables)} variables in place "
                f"of {saved['layers']} and {saved['variables']}, so that they have no place. Build "
                "all layers of the class in its `build` method."
            )
        return
    still = set(saved["frozen_variables"])
    for i, variable in enumerate(variables):
        if variable.trainable == (i in still):
            variable.trainable = i not in still


def sublayers(layer: keras.Layer) -> list[Any]:
    """The layers directly inside."""
    return list(layer._layers)


class Updates(keras.layers.Layer):
    """Saves the updates of a student apart from the kernels that Keras merges them into.

    It has no variables of its own and computes nothing. Keras saves and loads what it finds in the
    attributes of a model by name, in order: this is to be found after the student.

    Args:
        student: The model whose updates are saved.
    """

    def __init__(self, student: keras.Model) -> None:
        super().__init__(name="updates")
        # Not tracked: its variables are the student's.
        object.__setattr__(self, "_student", student)
        self.built = True

    def __dir__(self) -> list[str]:
        """List the attributes; Keras saves what it finds among them, and has saved the student."""
        return sorted(set(super().__dir__()) - {"_student"})

    def save_own_variables(self, store: Any) -> None:
        """Save kernels, `A` and `B` as they are."""
        for i, layer in enumerate(updated_layers(self._student)):
            for name, variable in zip("kab", parts(layer)):
                store[f"{name}{i}"] = variable

    def load_own_variables(self, store: Any) -> None:
        """Take back the updates; a file without them, as of a plain student, has them merged."""
        layers = updated_layers(self._student)
        keys = list(store.keys())
        if not keys or not layers:
            return
        if len(keys) != 3 * len(layers):
            raise ValueError(
                f"The file holds updates of {len(keys) // 3} layers, and `{self._student.name}` "
                f"has {len(layers)} with updates. Enable LoRA as it was for the file."
            )
        for i, layer in enumerate(layers):
            for name, variable in zip("kab", parts(layer)):
                variable.assign(store[f"{name}{i}"])
