"""Training that can be killed at any step and ends as if it never was."""

import json
import os
import random
import re
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.models import training_identity
from keras_kd.utils import archives, files
from keras_kd.utils.types import Logs, Tensors

FILE = "state.npz"


class ResumableBackup(keras.callbacks.Callback):
    """Back up a `fit` so that a second run goes on at the very step.

    `keras.callbacks.BackupAndRestore` keeps weights and optimizer, and begins
    the epoch anew: after a kill in mid-epoch samples are seen twice, the random
    numbers of dropout start over, and the order of the samples is another one.
    This callback also keeps the metrics, the random states, the live values
    and the position in the epoch. The second run passes over the batches that
    the first one trained on, which reads them and computes nothing, and then
    goes on. The student ends up the same, bit for bit where the backend
    computes the same twice, as it does on a CPU.

    Run the same program again; a `fit` that finds a backup in `folder` goes on
    from it. At the end of the training the backup is deleted. The file is
    written under a temporary name and renamed, so a kill while it is written
    leaves the one before. In `fit` with several processes the first one writes.

    With the state it keeps the settings, the teacher's fingerprint and the form
    of the data with a checksum of some rows: a program that has another alpha,
    temperature, learning rate, loss, teacher, batch size or other data by now is
    refused. `epochs`, metrics and other callbacks may change.

    The program itself has to be repeatable: call `keras.utils.set_random_seed`
    before the models are made. The data must come in the same order again.
    Arrays do, shuffled or not, and so does any source that draws from NumPy's
    or Python's random numbers when an epoch begins. A `tf.data.Dataset` that
    shuffles anew in every pass has to be given as `data`, with a seed for its
    `shuffle`; a generator has to start where the epoch starts.

    Args:
        folder: Where the backup lies, a folder of its own. A path that every
            process of a distributed training can read.
        save_freq: `"epoch"`, or a number of batches; the end of an epoch is
            always backed up.
        data: The `tf.data.Dataset` that `fit` is given, where its order
            changes from pass to pass.

    Raises:
        ValueError: If `save_freq` is neither, or a backup does not fit the
            model, or is one of another training.
        OSError: If the folder cannot be written, before the first step.

    Examples:
        >>> backup = ResumableBackup("backup", save_freq=500)
        >>> history = distiller.fit(x, y, epochs=20, callbacks=[backup])
    """

    # It reads single batches of an epoch that was begun, so the step must not gather its own.
    skips_batches = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        data: object = None,
    ) -> None:
        super().__init__()
        number = isinstance(save_freq, int) and not isinstance(save_freq, bool)
        if save_freq != "epoch" and not (number and int(save_freq) > 0):
            raise ValueError(
                "`save_freq` of `ResumableBackup` is 'epoch' or a number of batches. "
                f"Received: save_freq={save_freq!r}."
            )
        self.folder = os.fspath(folder)
        self.save_freq = save_freq
        self.data = data
        self._epoch = 0
        self._since = 0
        self._found: dict[str, Any] | None = None
        self._place: dict[str, Any] = {}
        self._begun: dict[str, np.ndarray] = {}
        self._train: Any = None
        self._settings: dict[str, Any] = {}

    @property
    def _path(self) -> str:
        return os.path.join(self.folder, FILE)

    @property
    def _temporary(self) -> str:
        return f"{self._path}.tmp"

    # ------------------------------------------------------------------- going on

    def on_train_begin(self, logs: Logs = None) -> None:
        """Take up a backup if there is one."""
        self._since, self._train, self._found = 0, None, None
        self._settings = self._now()
        if writes():
            require_writable(self.folder, "ResumableBackup")
        if not os.path.lexists(self._path):
            return
        self._found = self._read()
        _assign(self.model, self._found, self._path, complete=_builds_before_fit())
        # Where all epochs are over no other begins, and what comes after `fit` draws from here.
        set_random_state("begun", self._found)
        # Keras reads the first epoch from here, after this callback; its own
        # `BackupAndRestore` has no other door either.
        self.model._initial_epoch = self._place["epoch"]
        if self.data is not None:
            self._wind(self.data, self._place["epoch"])

    def _now(self) -> dict[str, Any]:
        """The settings of this training as it begins, and of its data."""
        now = training_identity.of_training(self.model)
        optimizer, begun = _INTERRUPTED.get(self.model, (None, {}))
        if optimizer is self.model.optimizer:
            # The same model goes on in the same process, with live values of mid-training.
            now.update(begun)
        live = {name: value for name, value in now.items() if training_identity.is_live(name)}
        _INTERRUPTED[self.model] = (self.model.optimizer, live)
        if writes():
            # Of processes that train together each may have rows of its own.
            now["steps an epoch"] = (self.params or {}).get("steps")
            now.update(getattr(self.model, "trains_on", dict)())
        plain: dict[str, Any] = json.loads(json.dumps(now))
        return plain

    def _read(self) -> dict[str, Any]:
        """The backup, which has to be one of this training."""
        advice = "Run the same program as before, or delete the folder to begin anew."
        try:
            found = archives.arrays(self._path)
            self._place = json.loads(str(found.pop("place")))
            before = json.loads(str(found.pop("settings", "null")))
            if not isinstance(self._place["epoch"], int) or not isinstance(
                self._place["batch"], int
            ):
                raise ValueError("it holds no position")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`{self._path}` is no readable backup: {error} {advice}") from error
        if not isinstance(before, dict):
            raise ValueError(
                f"`{self._path}` was written by an earlier version, which did not note with what "
                f"settings and data. {advice}"
            )
        if not writes():
            before = {name: value for name, value in before.items() if name in self._settings}
        other = training_identity.difference(before, self._settings)
        if other is not None:
            raise ValueError(f"`{self._path}` is a backup of another training: {other}. {advice}")
        return found

    def _wind(self, dataset: Any, epochs: int) -> None:
        """Draw the seeds of the passes that are over, by beginning each."""
        passes = epochs
        if keras.config.backend() == "tensorflow" and int(dataset.cardinality()) >= 0:
            # Keras begins the next pass at the end of an epoch, and once more
            # at the start of the next one.
            passes = 2 * epochs
        for _ in range(passes):
            iter(dataset)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Note the random state, from which the order of the epoch follows."""
        self._epoch = epoch
        if self._found is None:
            self._begun = random_state("begun")
            return
        self.model._initial_epoch = None
        if epoch != self._place["epoch"]:
            raise ValueError(
                f"`{self._path}` is a backup of epoch {self._place['epoch'] + 1}, and training "
                f"began with epoch {epoch + 1}. Do not pass `initial_epoch`: the backup knows it."
            )
        self._begun = {key: value for key, value in self._found.items() if key.startswith("begun")}
        set_random_state("begun", self._begun)
        if self._place["batch"]:
            # Keras has set them to zero for this epoch.
            _assign_all(_named(self.model.metrics_variables, "metric"), self._found)
        self._pass_over()

    def _pass_over(self) -> None:
        """Have the step read the batches that were trained on, and no more."""
        found, batches = self._found, self._place["batch"]
        at_once = self.model.steps_per_execution
        left = -(-batches // at_once)
        train = self._train = self.model.train_function
        building = not _builds_before_fit()
        # Read now: on JAX the values leave the variables when the epoch starts.
        logs = {} if building else self.model.get_metrics_result()

        def step(*args: Any) -> Any:
            nonlocal left, logs, building
            *state, batch = args
            if building:
                building = False
                first = next(batch)
                self._build(train, first)
                logs = self.model.get_metrics_result()
                batch = chain([first], batch)
                if not left:
                    self._finish(found)
                    return train(batch)
            if keras.config.backend() != "torch":
                # PyTorch is handed the batches themselves.
                _drop(batch, at_once)
            left -= 1
            if not left:
                self._finish(found)
            return (logs, *state) if state else logs

        if left or building:
            self.model.train_function = step
        else:
            self._finish(found)

    def _build(self, train: Callable[[Iterator[Any]], object], batch: Tensors) -> None:
        """Make what TensorFlow makes in its first step, and undo that step."""
        before = [(v, ops.convert_to_numpy(v)) for v in _variables(self.model).values()]
        train(iter([batch]))
        if not self._place["batch"]:
            self.model.reset_metrics()
        for variable, value in before:
            variable.assign(value)
        known = {id(variable) for variable, _ in before}
        made = {n: v for n, v in _variables(self.model).items() if id(v) not in known}
        if not self._place["batch"]:
            made = {n: v for n, v in made.items() if not n.startswith("metric")}
        _assign_all(made, self._found or {})

    def _finish(self, found: Any) -> None:
        """Go on with the step itself."""
        self.model.train_function = self._train
        if self._place["batch"]:
            set_random_state("now", found)
        self._found = None

    # ------------------------------------------------------------------ backing up

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Back up in mid-epoch."""
        if self._found is not None or self.save_freq == "epoch":
            return
        self._since += self.model.steps_per_execution
        if self._since >= int(self.save_freq):
            self._save(self._epoch, batch + 1)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Back up between two epochs."""
        self._begun = random_state("begun")
        self._save(epoch + 1, 0)

    def on_train_end(self, logs: Logs = None) -> None:
        """Delete the backup, which has served."""
        _INTERRUPTED.pop(self.model, None)
        if os.path.exists(self._path) and writes():
            for path in (self._path, self._temporary):
                files.remove(path)
            if not os.listdir(self.folder):
                os.rmdir(self.folder)

    def _save(self, epoch: int, batch: int) -> None:
        self._since = 0
        if keras.config.backend() == "jax":
            # In mid-epoch the values are in the step's state.
            self.model.jax_state_sync()
        # Where every process holds a part of a variable, all must give theirs.
        arrays = {name: _plain(v) for name, v in _variables(self.model).items()}
        if not writes():
            return
        arrays.update(self._begun, **random_state("now"))
        arrays["place"] = np.array(json.dumps({"epoch": epoch, "batch": batch}))
        arrays["settings"] = np.array(json.dumps(self._settings))
        try:
            os.makedirs(self.folder, exist_ok=True)
            with files.replacing(self._path, self._temporary) as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The backup `{self._path}` could not be written: {error.strerror or error}. The "
                "one before is untouched: mend the disk and run the same program again",
            ) from error


_INTERRUPTED: weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)
"""Of models whose training has begun and not ended: the optimizer, and live values at the start."""


def require_writable(folder: str, callback: str) -> None:
    """Raise `OSError` where a callback could not write, before the first step.

    Args:
        folder: The folder, which may not exist yet.
        callback: Whose it is, for the message.
    """
    try:
        files.require_writable(folder)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"`{callback}` cannot write to `{folder}`: {error.strerror or error}. Choose a folder "
            "in which you may create files",
        ) from error


def _drop(iterator: Iterator[Any], count: int) -> None:
    """Read some batches; the last call of an epoch may find fewer."""
    for _ in range(count):
        if next(iterator, None) is None:
            return


def _builds_before_fit() -> bool:
    """Whether Keras makes every variable before the first step; TensorFlow does in it."""
    return keras.config.backend() != "tensorflow"


def writes() -> bool:
    """Whether this process is the one, of those that train together, that writes files."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.config.backend() != "jax":
        return True
    from keras_kd.backends import jax as backend_jax

    return backend_jax.process_index() == 0


def _variables(model: keras.Model) -> dict[str, Any]:
    """All that training changes, by names that are the same in the next run."""
    optimizer = getattr(model, "optimizer", None)
    metrics = list(model.metrics_variables)
    counted = {id(v) for v in metrics}
    named = _named((v for v in model.variables if id(v) not in counted), "model")
    if optimizer is not None:
        named |= _named(optimizer.variables, "optimizer")
    return named | _named(metrics, "metric")


def _named(variables: Any, kind: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for variable in variables:
        # Keras counts generators through a whole process, which may have made others before.
        path = re.sub(r"\bseed_generator_\d+\b", "seed_generator", variable.path)
        name, number = f"{kind}:{path}", 1
        while name in named:
            number += 1
            name = f"{kind}:{path}#{number}"
        named[name] = variable
    return named


def _plain(variable: keras.Variable) -> np.ndarray:
    """The value in a type that NumPy writes; float32 holds the halves exactly."""
    if keras.config.backend() == "jax":
        from keras_kd.backends import jax as backend_jax

        value = backend_jax.whole(variable.value)
    else:
        value = ops.convert_to_numpy(variable)
    return value.astype("float32") if value.dtype.name == "bfloat16" else value


def _assign(model: keras.Model, found: dict[str, Any], path: str, complete: bool) -> None:
    named = _variables(model)
    saved = {name for name in found if name.startswith(("model:", "optimizer:", "metric:"))}
    unknown, missing = saved - set(named), set(named) - saved
    unequal = {n for n in saved & set(named) if tuple(named[n].shape) != found[n].shape}
    wrong = unequal or missing or (unknown if complete else set())
    if wrong:
        raise ValueError(
            f"`{path}` is a backup of another training: `{min(wrong)}` differs or is missing. Run "
            "the same program as before, or delete the folder to begin anew."
        )
    _assign_all({n: v for n, v in named.items() if not n.startswith("metric:")}, found)


def _assign_all(named: dict[str, Any], found: dict[str, Any]) -> None:
    for name, variable in named.items():
        if name in found:
            variable.assign(found[name])


def random_state(when: str) -> dict[str, np.ndarray]:
    """The random states that data are shuffled with.

    Args:
        when: What they are named after.
    """
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, inner, gauss = random.getstate()
    state = {
        f"{when}:numpy": np.asarray(keys),
        f"{when}:numpy_rest": np.array(json.dumps([name, position, has_gauss, cached])),
        f"{when}:python": np.array(json.dumps([version, inner, gauss])),
    }
    if keras.config.backend() == "torch":
        from keras_kd.backends import torch as backend_torch

        state[f"{when}:torch"] = backend_torch.random_state()
    return state


def set_random_state(when: str, state: dict[str, Any]) -> None:
    """Go on drawing from a state that `random_state` returned.

    Args:
        when: What it was named after.
        state: The state.
    """
    name, position, has_gauss, cached = json.loads(str(state[f"{when}:numpy_rest"]))
    np.random.set_state((name, state[f"{when}:numpy"], position, has_gauss, cached))
    version, inner, gauss = json.loads(str(state[f"{when}:python"]))
    random.setstate((version, tuple(inner), gauss))
    if keras.config.backend() == "torch":
        from keras_kd.backends import torch as backend_torch

        backend_torch.set_random_state(state[f"{when}:torch"])
