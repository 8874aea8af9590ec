"""TensorFlow graphs in the words that the converters know."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf


_XLA = "_XlaMustCompile"


def needs_plain(graph_def: tf.compat.v1.GraphDef) -> bool:
    """Say whether `make_plain` would change a graph."""
    for nodes in _bodies(graph_def):
        if any(_XLA in node.attr and node.attr[_XLA].b for node in nodes) or _signed_zeros(nodes):
            return True
    return False


def make_plain(graph_def: tf.compat.v1.GraphDef) -> None:
    """Replace what no converter has an operator for by what says the same.

    Functions that ask for XLA, which Keras makes of grouped convolutions, become functions that can
    be inlined. The bits that `keras.ops.argmax` and `argmin` look at to put -0.0 below 0.0 are
    left alone: of the two, the file takes the first.

    Args:
        graph_def: A `GraphDef`, changed in place.
    """
    nodes = (node for body in _bodies(graph_def) for node in body)
    for part in (*nodes, *graph_def.library.function):
        if part.attr.pop(_XLA, None) is not None:
            part.attr.pop("_noinline", None)
    plain_argmax(graph_def)


def plain_argmax(graph_def: tf.compat.v1.GraphDef) -> bool:
    """Do the part of `make_plain` that is about signs; say whether there was any.

    Args:
        graph_def: A `GraphDef`, changed in place.
    """
    found = False
    for nodes in _bodies(graph_def):
        values = _signed_zeros(nodes)
        for node in nodes if values else ():
            found = True
            node.input[:] = [values.get(_name(name), name) for name in node.input]
    return found


def plain_argmax_in(folder: Path) -> None:
    """Do `plain_argmax` in a SavedModel on disk."""
    from tensorflow.core.protobuf import saved_model_pb2

    path = folder / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    found = [plain_argmax(meta.graph_def) for meta in model.meta_graphs]
    if any(found):
        path.write_bytes(model.SerializeToString())


def _bodies(graph_def: tf.compat.v1.GraphDef) -> list[Any]:
    return [graph_def.node, *(function.node_def for function in graph_def.library.function)]


def _signed_zeros(nodes: Iterable[Any]) -> dict[str, str]:
    """Choices between a value and one below zero where it is -0.0, with the value."""
    known = {node.name: node for node in nodes}

    def behind(node: tf.compat.v1.NodeDef, *kinds: str) -> bool:
        # Whether there is a chain of such operators behind a node's inputs.
        sources = [known[_name(name)] for name in node.input if _name(name) in known]
        return not kinds or any(s.op == kinds[0] and behind(s, *kinds[1:]) for s in sources)

    return {
        node.name: node.input[2]
        for node in known.values()
        if node.op in ("Select", "SelectV2")
        and behind(node, "LogicalAnd", "Less", "BitwiseAnd", "Bitcast")
    }


def _name(reference: str) -> str:
    return reference.lstrip("^").split(":")[0]
