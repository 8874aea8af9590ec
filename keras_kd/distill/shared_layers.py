"""A model that trains and leaves alone what belongs to its teacher."""

from typing import Any

import keras


class Guarded(keras.Model):
    """The part of the distiller that keeps the teacher's layers as they are.

    Where student and teacher share a layer, its variables count as not
    trainable, whatever is set on the distiller.
    """

    # Read by properties while Keras is still constructing the model.
    _setup: Any = None

    @property
    def _frozen(self) -> set[int]:
        """Identities of the variables that the teacher owns as well, and of those of hooks."""
        setup = self._setup
        if setup is None:
            return set()
        return setup.frozen | setup.held if setup.held else setup.frozen

    @property
    def _shared(self) -> list[Any]:
        """Layers that the teacher owns as well."""
        return self._setup.shared if self._setup is not None else []

    @property
    def trainable_variables(self) -> list[Any]:
        """Variables of student and projectors that no teacher owns."""
        return [v for v in super().trainable_variables if id(v) not in self._frozen]

    @property
    def non_trainable_variables(self) -> list[Any]:
        """All other variables."""
        found = super().non_trainable_variables
        if self._frozen:
            known = {id(v) for v in found}
            found = found + [
                v for v in self.variables if id(v) in self._frozen and id(v) not in known
            ]
        return found

    @property
    def trainable_weights(self) -> list[Any]:
        """Weights of student and projectors that no teacher owns."""
        return [v for v in super().trainable_weights if id(v) not in self._frozen]

    @property
    def trainable(self) -> bool:
        """Whether the student trains; layers shared with the teacher never follow it."""
        return keras.Model.trainable.fget(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        kept = [(layer, layer.trainable) for layer in self._shared]
        keras.Model.trainable.fset(self, value)
        for layer, before in kept:
            layer.trainable = before
