"""The side of a client: what it does with a packet, and what it keeps in its folder.

`Site.answer` is all that an engine calls, in whatever process the client lives. Between two packets
everything is in the client's folder, so that the process may be another one each time: the weights
and optimizers after the last round with the reply that was sent (`state.npz`), the same at the
start (`initial.npz`), trained alone (`alone.npz`), and what privacy has cost (`ledger.json`). A
round that comes twice gets the reply of the first time. Imports the modules beside it but the
server's.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import traceback
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.federated import border, methods, privacy, training
from keras_kd.federated.border import Array, Packet
from keras_kd.federated.client import Client, Public, made
from keras_kd.federated.ledger import Ledger
from keras_kd.models import variables
from keras_kd.utils import archives, files

_NO_NOISE = "The server asks for answers without noise, and this client has `privacy`."
STATE, INITIAL, ALONE = "state.npz", "initial.npz", "alone.npz"
MODEL, REPORT, ERROR = "model.keras", "report.json", "error.txt"


class Place(NamedTuple):
    """Where a client is, as engines hand it to the process in which it lives.

    Attributes:
        make: The function that makes the client.
        folder: Its folder.
        number: Its place among the clients, -1 where the server gives it one.
        public: `() -> Public`: the public rows, where the client brings none.
        student: The server's model, where it is in the same process.
    """

    make: Callable[[], Any]
    folder: str
    number: int
    public: Callable[[], Public] | None = None
    student: Student | None = None


class Student:
    """The server's model, which no client may bring; other processes get no copy of it.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": None}

    def holds(self, model: Any) -> bool:
        """Whether it is this very model."""
        return model is not None and model is self._model


class SavedPublic:
    """The public rows in a file, read once in each process; it travels without them.

    Args:
        path: The `.npz` file.
        public: The rows, where they are in memory already.
    """

    def __init__(self, path: str, public: Public | None = None) -> None:
        self.path, self._public = path, public

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_public": None}

    def __call__(self) -> Public:
        """The rows."""
        if self._public is None:
            found = archives.arrays(self.path)
            self._public = Public((found["x"], found["y"]) if "y" in found else found["x"])
        return self._public


class _Model(NamedTuple):
    """All that training changes in a client."""

    variables: list[Any]
    private: Any
    learner: training.Learner

    @property
    def own(self) -> list[Any]:
        """Its variables, and those of the optimizer that learns the private rows."""
        return [*self.variables, *self.private.optimizer.variables]


class Site:
    """One client where it lives.

    Args:
        place: Where that is.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.folder = pathlib.Path(place.folder)
        self._client: Client | None = None
        self._public: Public | None = None
        self._asked: training.Learner | None = None
        self._model: _Model | None = None
        self._about: dict[str, Any] = {}
        self._reply: dict[str, Array] = {}
        self._stored: list[Array] = []
        self._seen: Any = None

    @property
    def model(self) -> Any:
        """The client's model, `None` before it was greeted."""
        return None if self._client is None else self._client.model

    def answer(self, packet: Packet) -> Packet:
        """Do what a packet asks for.

        Args:
            packet: From the server.

        Returns:
            The reply; `failed` if anything went wrong, whose words are in `error.txt` in the
            client's folder.
        """
        said = packet.numbers.get("round", 0)
        round_number = said if type(said) is int and 0 <= said < 2**31 else 0
        try:
            border.check(packet, border.DOWN, {})
            reply = self._handle(packet)
            return border.check(reply, border.UP, {})
        # A function of the user's that ends its program ends no round.
        except (Exception, SystemExit) as error:
            self._note(error)
            # What it has half done is forgotten; the folder holds the state before.
            self._client, self._model, self._seen = None, None, None
            numbers = {"round": round_number, "error": border.word_of(error)}
            if self.place.number >= 0:
                numbers["number"] = self.place.number
            return Packet("failed", {}, numbers)

    def _note(self, error: BaseException) -> None:
        """Keep the words of an error where the client is, if anything can be written there."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.replacing(self.folder / ERROR) as file:
                words = "".join(traceback.format_exception(error))
                file.write(words.encode(errors="backslashreplace"))

    def _handle(self, packet: Packet) -> Packet:
        if packet.kind == "hello":
            return self._hello(packet.numbers)
        settings = dict(packet.numbers)
        self._take_up(settings["run"])
        if packet.kind == "finish":
            return self._finish(packet, settings)
        return self._round(packet, settings)

    # ------------------------------------------------------------------------ hello

    def _made(self) -> tuple[Client, Public]:
        if self._client is None or self._public is None:
            client = made(self.place.make)
            public = client.public
            if public is None:
                if self.place.public is None:
                    raise ValueError(
                        "This client has no public rows. Pass `Client(public=...)`, the same as "
                        "those of the server."
                    )
                public = self.place.public()
            self._client, self._public = client, public
        return self._client, self._public

    def _learner(self) -> training.Learner:
        """The client's model as logits, over the weights that it has now."""
        client, _ = self._made()
        if self._asked is None or self._asked.model is not client.model:
            self._asked = training.Learner(client.model, client.x[:8], "client's model")
        return self._asked

    def _hello(self, said: Mapping[str, Any]) -> Packet:
        client, public = self._made()
        if client.privacy is not None and not said["private"]:
            raise ValueError(_NO_NOISE)
        learner = self._learner()
        units = learner.classes
        has = client.has(units)
        if client.classes is not None and len(client.classes) != units:
            raise ValueError(
                f"`classes` names {len(client.classes)} classes, and the model has {units} outputs."
            )
        order = list(range(units))
        if client.classes is not None and "names" in said:
            names = list(said["names"])
            order = [names.index(name) if name in names else -1 for name in client.classes]
        arrays = {"order": np.array(order, "int32")}
        if not said["private"]:
            arrays["has"] = has
        number = self.place.number if self.place.number >= 0 else int(said["number"])
        same = int(public.identity == list(said["public"]))
        numbers = {"number": number, "inputs": learner.shape_of_rows, "public": same}
        if client.classes is not None:
            told = json.dumps(client.classes).encode()
            numbers["names"] = zlib.crc32(told) & 0x7FFFFFFF
        return Packet("hello", arrays, numbers)

    # ------------------------------------------------------------------------ rounds

    def _round(self, packet: Packet, settings: dict[str, Any]) -> Packet:
        ask, about = packet.arrays["ask"], self._about
        known = about["round"] == settings["round"] and about["kind"] == "answers"
        if known and np.array_equal(self._reply["rows"], ask):
            # Asked again, since the server was killed: no training and no noise a second time.
            return self._answers(settings, about.get("epsilon"))
        _, public = self._made()
        if ask.min() < 0 or ask.max() >= len(public.x):
            raise ValueError(f"The server asked about rows that are not among {len(public.x)}.")
        if about["round"] != settings["round"]:
            self._learn(packet, settings)
        method = methods.of_settings(settings)
        noise = self._noise(settings)
        answers = method.answer(self._trained().learner.logits(public.x[ask]))
        about.update(round=settings["round"], kind="answers")
        if noise is not None:
            ledger = self._ledger()
            allowed = ledger.spend(noise, len(ask), settings["run"], settings["round"])
            about["epsilon"] = ledger.epsilon(noise.delta)
            about["spent"] = [about["epsilon"], noise.delta]
            if not allowed:
                about["kind"], self._reply = "spent", {}
                self._save()
                return Packet(
                    "spent", {}, {"round": settings["round"], "epsilon": about["epsilon"]}
                )
            # From the system's entropy: whoever knew a seed could take the noise off again.
            answers = privacy.noised(answers, noise.noise_multiplier, np.random.default_rng())
        with np.errstate(over="ignore"):
            self._reply = {"rows": ask, "answers": answers.astype("float16")}
        self._save()
        return self._answers(settings, about.get("epsilon") if noise is not None else None)

    def _answers(self, settings: dict[str, Any], cost: float | None) -> Packet:
        numbers: dict[str, Any] = {"round": settings["round"]}
        if cost is not None:
            numbers["epsilon"] = float(cost)
        return Packet("answers", dict(self._reply), numbers)

    def _noise(self, settings: dict[str, Any]) -> privacy.Gaussian | None:
        """The noise that the server asks for, no weaker than this client wants it."""
        least = self._made()[0].privacy
        if "noise_multiplier" not in settings:
            if least is not None:
                raise ValueError(_NO_NOISE)
            return None
        names = ("noise_multiplier", "delta", "max_epsilon")
        noise = privacy.Gaussian(**{name: settings[name] for name in names})
        if least is not None and noise.weaker(least):
            raise ValueError(f"The server asks for {noise}, and this client gives {least} at most.")
        return noise

    def _ledger(self) -> Ledger:
        """What was spent, no less than is known from the state."""
        ledger = Ledger(self.folder)
        ledger.require(*self._about.get("spent", (0.0, 0.5)))
        return ledger

    def _learn(self, packet: Packet, settings: dict[str, Any]) -> None:
        """Learn what the server told, and then from the private rows."""
        client, public = self._made()
        model, method = self._trained(), methods.of_settings(settings)
        if not model.learner.compiled:
            model.learner.compile(keras.optimizers.Adam(method.learning_rate), method.loss())
            variables.assign(self._of_learner(model), self._pending(model))
        rng = np.random.default_rng([settings["seed"], settings["number"], settings["round"]])
        first = settings.get("pretrain", 0)
        if first and not self._about["passes"]:
            if public.y is None:
                raise ValueError("`pretrain` needs labeled public rows, and there are no labels.")
            training.passes(model.private, public.x, public.y, first, client.batch_size, rng)
        if "told" in packet.arrays:
            told = packet.arrays["told"].astype("float32")
            targets = method.targets(told, packet.arrays["known"].astype(bool))
            x = public.x[packet.arrays["told_rows"]]
            model.learner.study(x, targets, method.epochs, method.batch_size, rng)
        training.passes(model.private, client.x, client.y, client.epochs, client.batch_size, rng)
        self._about["passes"] += client.epochs

    # ------------------------------------------------------------------------ the end

    def _finish(self, packet: Packet, settings: dict[str, Any]) -> Packet:
        about = self._about
        if not (about["round"] == settings["round"] and about["kind"] == "report"):
            if about["round"] != settings["round"]:
                self._learn(packet, settings)
            client, _ = self._made()
            model = self._trained()
            alone = self._alone(settings)
            after = model.learner.accuracy(client.validation)
            kept = int(after is None or alone is None or after >= alone)
            report = {"before": about["before"], "alone": alone, "after": after, "kept": kept}
            about.update(round=settings["round"], kind="report", report=report)
            self._reply = {}
            self._keep(kept)
            self._save()
            with files.replacing(self.folder / REPORT) as file:
                file.write(json.dumps(report).encode())
        numbers: dict[str, Any] = {"round": settings["round"]}
        noise = self._noise(settings)
        if noise is None:
            numbers |= {k: v for k, v in about["report"].items() if v is not None}
        else:
            numbers["epsilon"] = self._ledger().epsilon(noise.delta)
        return Packet("report", {}, numbers)

    def _alone(self, settings: dict[str, Any]) -> float | None:
        """Accuracy after as many private passes from the same start, without the others."""
        client, public = self._made()
        model, about = self._trained(), self._about
        if client.validation is None:
            return None
        mine = model.own
        together = variables.values(mine)
        try:
            if (self.folder / ALONE).exists():
                begun = archives.arrays(self.folder / ALONE)
            else:
                begun = {**archives.arrays(self.folder / INITIAL), "passes": np.array(0)}
            variables.assign(mine, _numbered(begun, "own"))
            done = int(begun["passes"])
            rng = np.random.default_rng([settings["seed"], settings["number"], done, 1])
            if not done and settings.get("pretrain") and public.y is not None:
                first = settings["pretrain"]
                training.passes(model.private, public.x, public.y, first, client.batch_size, rng)
            left = about["passes"] - done
            training.passes(model.private, client.x, client.y, left, client.batch_size, rng)
            with files.replacing(self.folder / ALONE) as file:
                np.savez(file, **_named(mine, "own"), passes=np.array(about["passes"]))
            return model.learner.accuracy(client.validation)
        finally:
            variables.assign(mine, together)

    def _keep(self, together: int) -> None:
        """Write the better of the two models."""
        client, _ = self._made()
        model = self._trained()
        now = variables.values(model.variables)
        if not together:
            own = _numbered(archives.arrays(self.folder / ALONE), "own")
            variables.assign(model.variables, own[: len(model.variables)])
        try:
            with files.replacing_by_name(self.folder / MODEL) as path:
                client.model.save(path)
        finally:
            variables.assign(model.variables, now)

    # ------------------------------------------------------------------------ state

    def _trained(self) -> _Model:
        if self._model is None:
            raise ValueError("The server asked before it said hello.")
        return self._model

    def _begin(self) -> None:
        """Make the model, compiled, with optimizers that are built."""
        client, _ = self._made()
        learner, private = self._learner(), client.model
        if not client.model.compiled:
            private = learner_of_labels(client)
        private.optimizer.build(private.trainable_variables)
        self._model = _Model(learner.variables, private, learner)

    def _take_up(self, run: int) -> None:
        """Have in memory what is in the folder, unless it is there already."""
        if self._model is not None and self._seen == self._stamp() and self._about["run"] == run:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._model is not None:
            # Something else has happened since: all of it is made anew.
            self._client = self._model = None
        self._begin()
        model = self._trained()
        found = archives.arrays(self.folder / STATE) if (self.folder / STATE).exists() else None
        about = json.loads(str(found.pop("about"))) if found is not None else {}
        mine = model.own
        if found is not None and about["run"] == run:
            try:
                variables.assign(mine, _numbered(found, "own"))
            except ValueError as error:
                raise ValueError(
                    f"`{self.folder}` holds another client: {error}. Run the same program as "
                    "before, or choose another folder."
                ) from error
            self._about, self._stored = about, _numbered(found, "learner")
            self._reply = {k: found[k] for k in ("rows", "answers") if k in found}
        else:
            client, _ = self._made()
            files.remove(self.folder / ALONE)
            before = model.learner.accuracy(client.validation)
            with files.replacing(self.folder / INITIAL) as file:
                np.savez(file, **_named(mine, "own"))
            self._about = {"run": run, "round": 0, "kind": "", "passes": 0, "before": before}
            if "spent" in about:
                self._about["spent"] = about["spent"]
            self._reply, self._stored = {}, []
        self._seen = self._stamp()

    def _pending(self, model: _Model) -> list[Array]:
        """What the optimizer of the answers held when the state was written."""
        return self._stored or variables.values(self._of_learner(model))

    def _of_learner(self, model: _Model) -> list[Any]:
        return list(model.learner.logits_model.optimizer.variables)

    def _save(self) -> None:
        model = self._trained()
        mine = model.own
        arrays = {**_named(mine, "own"), **self._reply}
        if model.learner.compiled:
            arrays |= _named(self._of_learner(model), "learner")
        text = np.array(json.dumps(self._about))
        with files.replacing(self.folder / STATE) as file:
            np.savez(file, **arrays, about=text)
        self._seen = self._stamp()

    def _stamp(self) -> Any:
        """What tells a state that this process has written from one of another process."""
        try:
            found = os.stat(self.folder / STATE)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def learner_of_labels(client: Client) -> Any:
    """A compiled model over a client's weights that learns labels, for a client without one."""
    found = training.LogitsModel(client.model, client.x[:8], "client's model")
    found.compile(
        keras.optimizers.Adam(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=training.jit(),
    )
    return found


def _named(held: list[Any], prefix: str) -> dict[str, Array]:
    return {f"{prefix}:{i}": value for i, value in enumerate(variables.values(held))}


def _numbered(found: Mapping[str, Array], prefix: str) -> list[Array]:
    names = [name for name in found if name.startswith(f"{prefix}:")]
    return [found[f"{prefix}:{i}"] for i in range(len(names))]
