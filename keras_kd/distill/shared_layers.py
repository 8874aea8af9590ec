"""A model that trains and leaves alone what belongs to its teacher.

`SharedLayersModel` answers Keras's questions for trainable variables, and for masks, shapes and
parts that are the student's and the teacher's own; what is left alone is noted in a `Shared`, which
its owner fills and Keras does not track.
"""

from collections.abc import Iterable
from typing import Any

import keras

from keras_kd.distill import training_metrics
from keras_kd.utils.types import Tensors


class Shared:
    """What a trained model holds and does not train.

    Attributes:
        layers: Layers that the teacher owns as well.
        variables: Identities of the variables that the teacher owns as well.
        of_hooks: Identities of the variables of penalties and of the batch transform.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.variables: set[int] = set()
        self.of_hooks: set[int] = set()

    def add(self, layers: Iterable[Any]) -> None:
        """Leave these layers of the student as the teacher has them."""
        for layer in layers:
            self.layers.append(layer)
            self.variables |= {id(v) for v in layer.variables}

    @property
    def frozen(self) -> set[int]:
        """Identities of all variables that are not trained."""
        return self.variables | self.of_hooks if self.of_hooks else self.variables


class SharedLayersModel(keras.Model):
    """A model that keeps the teacher's layers as they are.

    Where student and teacher share a layer, its variables count as not
    trainable, whatever is set on the model.

    Attributes:
        shared: What is left alone.
    """

    # Read by properties while Keras is still constructing the model.
    shared = Shared()

    @property
    def trainable_variables(self) -> list[Any]:
        """Variables of student and projectors that no teacher owns."""
        frozen = self.shared.frozen
        return [v for v in super().trainable_variables if id(v) not in frozen]

    @property
    def non_trainable_variables(self) -> list[Any]:
        """All other variables."""
        found = super().non_trainable_variables
        frozen = self.shared.frozen
        if frozen:
            known = {id(v) for v in found}
            found = found + [v for v in self.variables if id(v) in frozen and id(v) not in known]
        return found

    @property
    def trainable_weights(self) -> list[Any]:
        """Weights of student and projectors that no teacher owns."""
        frozen = self.shared.frozen
        return [v for v in super().trainable_weights if id(v) not in frozen]

    @property
    def trainable(self) -> bool:
        """Whether the student trains; layers shared with the teacher never follow it."""
        return keras.Model.trainable.fget(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        kept = [(layer, layer.trainable) for layer in self.shared.layers]
        keras.Model.trainable.fset(self, value)
        for layer, before in kept:
            layer.trainable = before

    def compute_mask(self, inputs: Tensors | None, previous_mask: Tensors | None) -> None:
        """Return nothing: the student's outputs carry their masks."""
        return

    def make_metrics(self, labels: Tensors | None, outputs: Tensors | None) -> None:
        """Make the metrics given to `compile` before the first step, see `training_metrics.make`.

        Args:
            labels: Labels, or their specifications.
            outputs: The student's outputs, symbolic; `None` where they are not known.
        """
        training_metrics.make(self._compile_loss, self._compile_metrics, labels, outputs)

    def get_build_config(self) -> None:
        """Return nothing: student and transfers carry their own shapes."""
        return

    def __dir__(self) -> list[str]:
        """List the attributes; Keras saves every model and layer that it finds among them."""
        return sorted(set(super().__dir__()) - {"teacher"})
