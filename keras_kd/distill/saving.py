"""What of a distiller goes to disk: all but its teacher."""

from typing import Any, Self

import keras
from keras import ops

from keras_kd.distill import hooks
from keras_kd.models import lora
from keras_kd.models.fingerprint import IDENTITY
from keras_kd.transfers.output_pairing import Placed
from keras_kd.transfers.transfer import Transfer


class Saved(keras.Model):
    """The part of the distiller that writes it to disk and rebuilds it.

    Attributes:
        student: The model that is trained.
        transfers: What is transferred to it, with the weights of projectors.
    """

    student: Any
    transfers: list[Transfer]
    teacher_inputs: Any
    student_inputs: Any
    _setup: Any

    def __dir__(self) -> list[str]:
        """List the attributes; Keras saves every model and layer that it finds among them."""
        return sorted(set(super().__dir__()) - {"teacher", "_shared"})

    def __reduce__(self) -> Any:
        """Refuse copies and pickles, which Keras makes of what is saved: without the teacher."""
        if self._setup.teacher is not None:
            raise TypeError(
                f"The distiller `{self.name}` cannot be copied or pickled: its teacher would be "
                "left behind. Write it with `distiller.save('d.keras')` and read it with "
                "`keras_kd.load_distiller('d.keras', teacher=teacher)`, or copy the student alone."
            )
        return super().__reduce__()

    def _seeds(self) -> list[Any]:
        """States of the random generators, as of dropout, which Keras does not save."""
        others = {id(v) for v in [*self.weights, *self.metrics_variables]}
        return [v for v in self.variables if id(v) not in others]

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Write the distiller without its teacher, as `keras.Model.save` does.

        Args:
            filepath: A `.keras` file.
            *args: As in `keras.Model.save`.
            **kwargs: As in `keras.Model.save`.

        Raises:
            ValueError: If no file can name a penalty or the batch transform; a file of before is
                left as it was.
        """
        hooks.require_registered(self.name, self._setup.compiled_with)
        super().save(filepath, *args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        """Save the live values and the states of the random generators."""
        super().save_own_variables(store)
        for i, seed in enumerate(self._seeds()):
            store[f"seed_{i}"] = ops.convert_to_numpy(seed)

    def load_own_variables(self, store: Any) -> None:
        """Load the live values and the states of the random generators."""
        names = [name for name in store.keys() if not name.startswith("seed_")]  # noqa: SIM118
        super().load_own_variables({name: store[name] for name in names})
        seeds = self._seeds()
        if len(store.keys()) - len(names) == len(seeds):
            for i, seed in enumerate(seeds):
                seed.assign(store[f"seed_{i}"])

    def get_config(self) -> dict[str, Any]:
        """Return what rebuilds the distiller, without its teacher."""
        setup = self._setup
        teacher = setup.teacher
        record = setup.loaded
        if teacher is not None:
            record = {
                "name": teacher.name,
                "fingerprint": teacher.fingerprint(),
                "identity": IDENTITY,
            }
        layers, shared = self.student._flatten_layers(), {id(layer) for layer in setup.shared}
        return {
            "name": self.name,
            "student": keras.saving.serialize_keras_object(self.student),
            "teacher": record,
            "shared": [i for i, layer in enumerate(layers) if id(layer) in shared],
            "trained": lora.record(self.student),
            "from_logits": dict(setup.from_logits),
            "maps_inputs": {
                "teacher_inputs": self.teacher_inputs is not None,
                "student_inputs": self.student_inputs is not None,
            },
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild a distiller that still lacks its teacher."""
        student = keras.saving.deserialize_keras_object(config["student"])
        if "trained" in config:
            lora.restore(student, config["trained"])
        distiller = cls(
            student,
            from_logits=config["from_logits"],
            name=config["name"],
        )
        distiller._setup.loaded = config["teacher"]
        layers = list(distiller.student._flatten_layers())
        distiller._setup.share([layers[i] for i in config["shared"]])
        distiller._setup.maps_inputs = config["maps_inputs"]
        return distiller

    def get_compile_config(self) -> dict[str, Any] | None:
        """Return what `compile_from_config` needs, transfers with their shapes included.

        Raises:
            ValueError: If no file can name a penalty or the batch transform.
        """
        hooks.require_registered(self.name, self._setup.compiled_with)
        return self.compile_settings()

    def compile_settings(self) -> dict[str, Any] | None:
        """Return the arguments of `compile`; hooks that no file can name by their class alone."""
        if not self.compiled:
            return None
        setup = self._setup
        config = {
            name: hooks.serialized(value)
            if name in hooks.HOOKS
            else keras.saving.serialize_keras_object(value)
            for name, value in setup.compiled_with.items()
            # The transfers made of it, below, hold its weights.
            if name != "distillation_loss"
        }
        config["optimizer"] = keras.saving.serialize_keras_object(self.optimizer)
        config["optimizer_built"] = bool(self.optimizer.built)
        config["transfers"] = [
            {
                "config": keras.saving.serialize_keras_object(transfer),
                "shapes": transfer.get_build_config(),
            }
            for transfer in self.transfers
        ]
        config["placed"] = [[self.transfers.index(p.transfer), p.output] for p in setup.placed]
        live = ("student_loss_weight", "distillation_loss_weight")
        # Only which form was chosen: the values come with the weights.
        config |= dict.fromkeys(live, 1.0) if setup.explicit else {}
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile with a saved configuration; live values come with the weights."""
        config = dict(config)
        saved, places = config.pop("transfers"), config.pop("placed")
        had_slots = config.pop("optimizer_built", True)
        arguments = {
            name: keras.saving.deserialize_keras_object(value) for name, value in config.items()
        }
        transfers = []
        for entry in saved:
            transfer = keras.saving.deserialize_keras_object(entry["config"])
            if entry["shapes"] is not None and not transfer.built:
                transfer.build_from_config(entry["shapes"])
            transfers.append(transfer)
        self._setup.restored = [Placed(transfers[i], output) for i, output in places]
        self.compile(**arguments)
        self._setup.restored = None
        if had_slots and self.student.built and all(transfer.built for transfer in transfers):
            # The optimizer's state is loaded into slots that must exist by then.
            self.optimizer.build(self.trainable_variables)

    def get_build_config(self) -> None:
        """Return nothing: student and transfers carry their own shapes."""
        return
