"""Attention layers from outside: their projections, their scores, and what is padding there."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kd.utils.masks import keras_mask
from keras_kd.utils.types import Tensor

PARTS = ("query", "key", "value")


def is_attention(layer: keras.Layer) -> bool:
    """Whether a layer projects queries, keys and values by layers of its own."""
    return isinstance(layer, keras.layers.MultiHeadAttention | keras.layers.GroupQueryAttention)


def projection(layer: keras.Layer, part: str) -> Any:
    """The layer that makes the `"query"`, `"key"` or `"value"` of an attention layer."""
    # `GroupQueryAttention` has no public names for them, `MultiHeadAttention` has both.
    return getattr(layer, f"_{part}_dense")


def scaled_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scores before softmax and mask.

    Args:
        query: `(batch, queries, heads, width)`.
        key: `(batch, keys, heads, width)`, or of fewer heads, each of which
            answers as many heads of the queries.

    Returns:
        Tensor `(batch, heads, queries, keys)`.
    """
    heads, key_heads = int(query.shape[2]), int(key.shape[2])
    if heads != key_heads:
        key = ops.repeat(key, heads // key_heads, axis=2)
    scale = float(query.shape[-1]) ** -0.5
    return ops.einsum("bqhd,bkhd->bhqk", query * ops.cast(scale, query.dtype), key)


class Padding(NamedTuple):
    """What counts in one call of an attention layer, `None` where nothing is known.

    Attributes:
        queries: Boolean `(batch, queries)`.
        keys: Boolean `(batch, keys)`.
        pairs: Boolean `(batch, 1, queries, keys)`.
    """

    queries: Tensor = None
    keys: Tensor = None
    pairs: Tensor = None

    def of(self, kind: str) -> Tensor:
        """The mask of what a tap of this kind reads."""
        if kind == "scores":
            return self.pairs
        return self.keys if kind in ("key", "value") else self.queries


def padding(layer: keras.Layer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Padding:
    """Find out what an attention layer is told of padding.

    Keras masks of queries, keys and values count, and of an explicit
    `attention_mask` the keys that no query may see and the queries that see no
    key. Who may see whom among the others, as in causal attention, does not.

    Args:
        layer: The attention layer.
        args: What its `call` is given.
        kwargs: The same by name.

    Returns:
        The masks.
    """
    given = inspect.signature(type(layer).call).bind(layer, *args, **kwargs).arguments
    query, value = given.get("query"), given.get("value")
    if query is None or value is None:
        return Padding()

    def mask_of(part: str) -> Tensor:
        mask = given.get(f"{part}_mask")
        if mask is None and given.get(part) is not None:
            mask = keras_mask(given[part])
        return None if mask is None else ops.cast(mask, "bool")

    queries, keys = mask_of("query"), _both(mask_of("value"), mask_of("key"))
    allowed = given.get("attention_mask")
    if allowed is not None and _is_per_sample(allowed, query):
        allowed = ops.cast(allowed, "bool")
        if len(allowed.shape) == 4:
            allowed = ops.any(allowed, axis=1)
        seen = ops.any(allowed, axis=1)
        keys = _both(keys, seen)
        if allowed.shape[1] != 1:
            queries = _both(queries, ops.any(allowed, axis=2))
        if query is value:
            queries = _both(queries, seen)
    if queries is None and keys is None:
        return Padding()
    rows = ops.ones_like(query[..., 0], dtype="bool") if queries is None else queries
    columns = ops.ones_like(value[..., 0], dtype="bool") if keys is None else keys
    return Padding(queries, keys, ops.logical_and(rows[:, None, :, None], columns[:, None, None]))


def _is_per_sample(allowed: Tensor, query: Tensor) -> bool:
    """Whether an attention mask has a batch of its own: one for all samples tells no padding."""
    return len(allowed.shape) in (3, 4) and (allowed.shape[0] != 1 or query.shape[0] == 1)


def _both(first: Tensor, second: Tensor) -> Tensor:
    if first is None or second is None:
        return second if first is None else first
    return ops.logical_and(first, second)
