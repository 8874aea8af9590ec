"""What every quantized layer has: the layers it stands for, and how each of them is treated.

A layer that `quantize_aware` is to put in the place of another one is a class and nothing else: it
derives from `Quantized`, names its `kind` and the layers that it `stands_for`, and computes in
`call` what the device will. Whether a certain layer has that form says the class method `treat`.
One of this package is also a line in `utils/lazy_registration.py`, so that files with it load.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from keras_kd.models.graph import Graph
from keras_kd.models.weight_wrapper import WeightWrapper
from keras_kd.utils.types import Tensor

if TYPE_CHECKING:
    import keras


@dataclasses.dataclass(frozen=True)
class Treatment:
    """How a layer is quantized.

    Args:
        kind: `"weights"`, `"separable"`, `"embedding"`, `"activation"`, `"observed"`, `"moves"`,
            `"keeps"`, `"average"`, `"joins"`, `"model"`, `"float"`, or the kind of a `Quantized`.
        reason: Why a layer stays float; empty otherwise.
        range: Range of the output that TFLite prescribes.
        fuses: Whether TFLite computes a ReLU after it in the same operator.
        fusable: Whether it is such a ReLU.
    """

    kind: str
    reason: str = ""
    range: tuple[float, float] | None = None
    fuses: bool = False
    fusable: bool = False


class Quantized(WeightWrapper):
    """A layer that computes another one as its int8 file does.

    Args:
        layer: The layer, or a pruned or clustered one.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    kind: ClassVar[str] = ""
    """Its treatment; empty where `quantize_aware` makes the layer in another way."""

    stands_for: ClassVar[tuple[type, ...]] = ()
    """Classes of layers, and no subclasses of theirs, in whose place it comes."""

    takes_widths: ClassVar[bool] = False
    """Whether it is made with the integer widths of weights and activations."""

    weight_bits: int | None = None
    """Integer width of its weights, if it rounds them."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            BY_KIND[cls.kind] = cls
        BY_LAYER.update(dict.fromkeys(cls.__dict__.get("stands_for", ()), cls))

    @classmethod
    def treat(
        cls, layer: keras.Layer, config: dict[str, Any], name: str, graph: Graph, masked: bool
    ) -> Treatment:
        """Say how one of the layers is treated that the class stands for.

        Args:
            layer: The innermost layer.
            config: Its configuration.
            name: Of the layer in the graph.
            graph: The graph it stands in.
            masked: Whether it reads a mask.

        Returns:
            The class's own kind, or `"float"` with the reason.
        """
        return Treatment(cls.kind)

    def final_pairs(self) -> list[tuple[Any, Tensor]]:
        """The variables whose value a plain layer gets from this one, with the rounded values."""
        return self.effective(False)


BY_KIND: dict[str, type[Quantized]] = {}
"""The classes by their kind."""

BY_LAYER: dict[type, type[Quantized]] = {}
"""The classes by the layers they stand for."""
