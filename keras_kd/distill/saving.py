"""What of a distiller goes to disk, all but its teacher, and what a file tells of that teacher.

Functions that make plain configurations of a distiller's parts and read them again; the hooks of
Keras that call them are methods of `Distiller`.
"""

import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_kd.distill import hooks
from keras_kd.distill.pairing import Pairing
from keras_kd.distill.shared_layers import Shared
from keras_kd.models import lora
from keras_kd.models.fingerprint import IDENTITY
from keras_kd.teachers import Teacher
from keras_kd.transfers.output_pairing import Placed
from keras_kd.utils.types import PathLike


class Origin(NamedTuple):
    """What a loaded distiller knows of the one that was saved.

    Attributes:
        teacher: Name, fingerprint and identity of its teacher, or `None`.
        maps_inputs: Whether it had `teacher_inputs` and `student_inputs`.
    """

    teacher: dict[str, Any] | None = None
    maps_inputs: Mapping[str, bool] = MappingProxyType({})

    @property
    def name(self) -> str | None:
        """The name of its teacher, or `None`."""
        return None if self.teacher is None else self.teacher.get("name")

    def checking(self, path: PathLike) -> Callable[[Teacher | None, Sequence[str]], None]:
        """What raises `ValueError` for another teacher, or missing functions, than a file tells."""
        return functools.partial(require_origin, self, path)


# ------------------------------------------------------------------ the distiller


def config(
    distiller: keras.Model, pairing: Pairing, shared: Shared, origin: Origin
) -> dict[str, Any]:
    """What rebuilds a distiller, without its teacher."""
    teacher, record = pairing.teacher, origin.teacher
    if teacher is not None:
        record = {
            "name": teacher.name,
            "fingerprint": teacher.fingerprint(),
            "identity": IDENTITY,
        }
    student = distiller.student
    ours = {id(layer) for layer in shared.layers}
    return {
        "name": distiller.name,
        "student": keras.saving.serialize_keras_object(student),
        "teacher": record,
        "shared": [i for i, layer in enumerate(student._flatten_layers()) if id(layer) in ours],
        "trained": lora.record(student),
        "from_logits": dict(pairing.from_logits),
        "maps_inputs": {
            "teacher_inputs": pairing.teacher_inputs is not None,
            "student_inputs": pairing.student_inputs is not None,
        },
    }


def restored(config: dict[str, Any]) -> tuple[Any, list[Any], Origin]:
    """The student of a configuration, its layers that the teacher owns as well, and the origin."""
    student = keras.saving.deserialize_keras_object(config["student"])
    if "trained" in config:
        lora.restore(student, config["trained"])
    layers = list(student._flatten_layers())
    origin = Origin(config["teacher"], config["maps_inputs"])
    return student, [layers[i] for i in config["shared"]], origin


def seeds(distiller: keras.Model) -> list[Any]:
    """States of the random generators, as of dropout, which Keras does not save."""
    others = {id(v) for v in [*distiller.weights, *distiller.metrics_variables]}
    return [v for v in distiller.variables if id(v) not in others]


def load_seeds(distiller: keras.Model, store: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """Give the random generators their states back; returns what else is in the store."""
    names = [name for name in store.keys() if not name.startswith("seed_")]  # noqa: SIM118
    ours = seeds(distiller)
    if len(store.keys()) - len(names) == len(ours):
        for i, seed in enumerate(ours):
            seed.assign(store[f"seed_{i}"])
    return {name: store[name] for name in names}


# ------------------------------------------------------------------------ compile


def compile_config(distiller: keras.Model, pairing: Pairing) -> dict[str, Any] | None:
    """The arguments of `compile`; hooks that no file can name by their class alone."""
    if not distiller.compiled:
        return None
    transfers = distiller.transfers
    found = {
        name: hooks.serialized(value)
        if name in hooks.HOOKS
        else keras.saving.serialize_keras_object(value)
        for name, value in pairing.compiled.arguments.items()
        # The transfers made of it, below, hold its weights.
        if name != "distillation_loss"
    }
    found["optimizer"] = keras.saving.serialize_keras_object(distiller.optimizer)
    found["optimizer_built"] = bool(distiller.optimizer.built)
    found["transfers"] = [
        {
            "config": keras.saving.serialize_keras_object(transfer),
            "shapes": transfer.get_build_config(),
        }
        for transfer in transfers
    ]
    found["placed"] = [[transfers.index(p.transfer), p.output] for p in pairing.placed]
    live = ("student_loss_weight", "distillation_loss_weight")
    # Only which form was chosen: the values come with the weights.
    return found | (dict.fromkeys(live, 1.0) if pairing.compiled.explicit else {})


class Saved(NamedTuple):
    """A configuration of `compile`, read.

    Attributes:
        arguments: Those of `compile`.
        placed: The transfers, with the output that each reads.
        had_slots: Whether the optimizer had its variables.
    """

    arguments: dict[str, Any]
    placed: list[Placed]
    had_slots: bool

    @property
    def has_slots(self) -> bool:
        """Whether the optimizer's state is among the weights, for variables that exist already."""
        return self.had_slots and all(place.transfer.built for place in self.placed)


def saved_compile(config: dict[str, Any]) -> Saved:
    """Read what `compile_config` made."""
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
    return Saved(arguments, [Placed(transfers[i], output) for i, output in places], had_slots)


def compile_again(distiller: keras.Model, pairing: Pairing, config: dict[str, Any]) -> None:
    """Compile a loaded distiller as it was; live values come with the weights."""
    saved = saved_compile(config)
    pairing.restored = saved.placed
    distiller.compile(**saved.arguments)
    pairing.restored = None
    if saved.has_slots and distiller.student.built:
        # The optimizer's state is loaded into slots that must exist by then.
        distiller.optimizer.build(distiller.trainable_variables)


# ------------------------------------------------------------------------ loading


def require_origin(
    origin: Origin, path: PathLike, teacher: Teacher | None, given: Sequence[str]
) -> None:
    """Raise `ValueError` unless this is what a distiller was trained with.

    Args:
        origin: What its file tells.
        path: The file.
        teacher: The teacher that it is given.
        given: Names of the input functions that it is given.
    """
    for argument in ("teacher_inputs", "student_inputs"):
        if origin.maps_inputs.get(argument) and argument not in given:
            raise ValueError(
                f"`{path}` was trained with `{argument}`, and functions are not saved. Pass the "
                f"same function as `{argument}=`."
            )
    if origin.teacher is None:
        return
    if teacher is None:
        raise ValueError(
            f"`{path}` was trained with the teacher `{origin.teacher['name']}`. Pass it as "
            "`teacher=`."
        )
    if origin.teacher.get("identity") != IDENTITY:
        raise ValueError(
            f"`{path}` was saved by an earlier version, which knew the teacher "
            f"`{origin.teacher['name']}` by less than its layers and wiring, so that it cannot "
            "be told whether this is the same. Load the file with `keras.saving.load_model` "
            "as `distiller`, and begin a new one with `distiller.student`."
        )
    if teacher.fingerprint() != origin.teacher["fingerprint"]:
        raise ValueError(
            f"`{path}` was trained with the teacher `{origin.teacher['name']}`, whose layers or "
            f"weights differ from those of the given `{teacher.name}`. Pass the same teacher, or "
            "begin a new distiller with `loaded.student`."
        )


def copied(name: str) -> TypeError:
    """What is raised for copies and pickles, which Keras makes of what is saved."""
    return TypeError(
        f"The distiller `{name}` cannot be copied or pickled: its teacher would be "
        "left behind. Write it with `distiller.save('d.keras')` and read it with "
        "`keras_kd.load_distiller('d.keras', teacher=teacher)`, or copy the student alone."
    )


def store_seeds(distiller: keras.Model, store: MutableMapping[str, np.ndarray]) -> None:
    """Put the states of the random generators into a store."""
    for i, seed in enumerate(seeds(distiller)):
        store[f"seed_{i}"] = ops.convert_to_numpy(seed)
