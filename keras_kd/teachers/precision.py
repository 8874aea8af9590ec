"""Copies of a model at inference speed: folded, in lower precision, timed and compared."""

import math
import statistics
import time
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.losses.divergences import softened_kl
from keras_kd.models.graph import give_weights
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Tensors

PRECISIONS = ("float32", "bfloat16", "float16", "auto")
AS_GIVEN = "as given"
LEAST_AGREEMENT = 0.999
MOST_DIVERGENCE = 1e-3
# What "auto" times, the most likely first, and the share of the time that ends the search.
TRIALS = (("bfloat16",), ("float32", "float16"))
ENOUGH = 0.7


def require(precision: str) -> None:
    """Raise `ValueError` unless a teacher can be asked to run in this precision."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"`teacher_precision` is one of {', '.join(map(repr, PRECISIONS))}. Received: "
            f"{precision!r}." + did_you_mean(precision, PRECISIONS, quote="'")
        )


def inference_copy(model: keras.Model, dtype: str) -> Any:
    """Copy a model for inference: BatchNormalization folded, weights and computation in `dtype`.

    Args:
        model: A built Functional or Sequential model; it stays as it is.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Returns:
        A new model.

    Raises:
        ValueError: If the model has no graph of layers that can be copied, or
            is quantized.
    """
    from keras_kd.models.graph import is_graph

    if not is_graph(model):
        raise ValueError(
            f"`teacher_precision` copies the teacher layer by layer, and `{model.name}` is a "
            "subclassed model whose layers are not known. Leave it out, or rebuild the teacher "
            "as a Functional model."
        )
    for layer in model._flatten_layers():
        mode = getattr(layer, "quantization_mode", None)
        if mode is not None:
            raise ValueError(
                f"`teacher_precision` copies the teacher's float weights, and `{model.name}` is "
                f"quantized: its layer `{layer.name}` holds {mode}. Leave it out, or pass the "
                "model as it was before `quantize`."
            )
    try:
        return _copied(model, dtype)
    except Exception as error:
        # What a user's layer raises when it is made anew may be anything.
        raise ValueError(
            f"`teacher_precision` copies the teacher layer by layer, and `{model.name}` cannot be "
            f"copied in {dtype}: {error!r}. Leave it out."
        ) from error


def _copied(model: keras.Model, dtype: str) -> Any:
    from keras_kd.models.folding import fold_batch_normalization

    folded = fold_batch_normalization(model)
    if dtype == "float32":
        return folded

    def lower(layer: keras.Layer) -> Any:
        config = layer.get_config()
        if not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = dtype
        return type(layer).from_config(config)

    copy = keras.models.clone_model(folded, clone_function=lower, recursive=True)
    give_weights(copy, folded.get_weights())
    return copy


def checksum(model: keras.Model) -> int:
    """A CRC-32 of a model's weights, to see whether they changed."""
    found = 0
    for weight in model.weights:
        value = np.ascontiguousarray(ops.convert_to_numpy(weight))
        found = zlib.crc32(value.reshape(-1).view("u1"), found)
    return found


def milliseconds(models: Sequence[Any], x: Tensors, repeats: int = 3) -> list[float]:
    """Median time of one `predict_on_batch` of each model, taken in turn.

    Args:
        models: The models.
        x: A batch.
        repeats: How often each is timed, after one call that compiles it; one that took
            more than twice the time of another in the first turn is not timed again.

    Returns:
        One time a model, in milliseconds.
    """
    for model in models:
        model.predict_on_batch(x)
    spent: list[list[float]] = [[] for _ in models]
    for _ in range(repeats):
        slow = 2.0 * min((own[0] for own in spent if own), default=math.inf)
        for model, own in zip(models, spent):
            if own and own[0] > slow:
                # float16 without hardware for it takes ten times as long.
                continue
            began = time.perf_counter()
            model.predict_on_batch(x)
            own.append(1000 * (time.perf_counter() - began))
    return [statistics.median(own) for own in spent]


def agrees(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether two readings of one batch say the same, within the bounds above.

    Args:
        before: Logits of the model, one tensor an output, `(rows, ..., classes)`.
        after: Logits of its copy.

    Returns:
        True if every output agrees; one that is not finite does not.
    """
    for exact, fast in zip(before, after):
        # PyTorch warns of numbers taken from tensors that still want a gradient.
        exact = ops.cast(ops.stop_gradient(ops.convert_to_tensor(exact)), "float32")
        fast = ops.cast(ops.stop_gradient(ops.convert_to_tensor(fast)), "float32")
        if exact.shape[-1] == 1:
            same = ops.equal(ops.greater(exact, 0), ops.greater(fast, 0))
            zeros = ops.zeros_like(exact)
            exact, fast = (ops.concatenate([zeros, z], axis=-1) for z in (exact, fast))
        else:
            same = ops.equal(ops.argmax(exact, axis=-1), ops.argmax(fast, axis=-1))
        divergence = float(ops.mean(softened_kl(exact, fast, 1.0)))
        # Written so that NaN fails too.
        if not divergence < MOST_DIVERGENCE:
            return False
        if float(ops.mean(ops.cast(same, "float32"))) < LEAST_AGREEMENT:
            return False
    return True


def len_of(x: Tensors) -> int:
    """Number of rows in a batch."""
    return int(keras.tree.flatten(x)[0].shape[0])
