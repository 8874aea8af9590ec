"""Many private teachers and one student: the face of the folder.

`Federation` checks what it is given, makes the plan that `server.Server` carries out, and hands the
clients to an engine. Imports the modules beside it but `engine`, which needs Flower.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd.federated.aggregation import RULES
from keras_kd.federated.client import Public, made, names_of, pair_of
from keras_kd.federated.engines import Engine, InProcess
from keras_kd.federated.history import History
from keras_kd.federated.methods import DSFL, Method
from keras_kd.federated.privacy import Gaussian, require_affordable, require_audible
from keras_kd.federated.server import HISTORY, Plan, Server
from keras_kd.federated.site import REPORT, Place, SavedPublic, Student
from keras_kd.utils import archives, checks, files

PUBLIC, CLIENTS = "public.npz", "clients"


class Federation:
    """Distils one student from clients that keep their rows, labels and weights to themselves.

    In each round all clients are asked about the same public rows. What crosses is their answers
    and the numbers of the rows; the joined answers go back, and everybody learns from them, each
    client with a model of its own kind. The server's student learns from all of them.

    Args:
        clients: Functions without arguments, each of which returns a `Client` or `(model, x, y)`.
            They are called where the client lives, which may be another process: let them load
            their rows themselves. Or a number of clients that come by themselves, as in a
            deployment.
        public: The rows that everybody has, an array `(rows, ...)`; or `(x, y)` for a method that
            begins with labels of theirs.
        method: `DSFL()`, `FedMD()` or `FedDF()`. Defaults to `DSFL()`.
        engine: What carries the packets: `InProcess()`, which is the default, or `Flower()`.
        folder: Where the server's state, the student, the history and the folders of the clients
            are. A program that was killed is run again and goes on after the last finished round.
            Defaults to a temporary folder.
        aggregate: How answers are joined: `"mean"`, `"median"`, or `"trimmed"`, the mean without a
            fifth at each end; the last two withstand a few clients that lie.
        privacy: Noise on the answers, a `Gaussian`; with `DSFL` alone, since logits have no
            bounds. With it neither accuracies nor the classes that a client has cross.
        student: The server's model, a built `keras.Model`; trained where it is, with its optimizer
            if it is compiled, else with Adam. Defaults to a new model of the kind of the first
            client's.
        classes: Names of the classes, in the order of the outputs. Clients that name theirs are
            compared.
        seed: Of the questions, of the orders of rows, and of the weights of a student that is
            not given.

    Attributes:
        history: What has happened so far, a `History`.
        folder: The folder.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there are no clients, a value is out of range, labels of public rows are
            missing, or noise is given beside a method whose answers have no bounds.

    Examples:
        >>> federation = Federation(
        ...     clients=[make_a, make_b, make_c], public=x_public, method=DSFL(), folder="runs/fed"
        ... )
        >>> history = federation.fit(rounds=10, queries=2000)
        >>> print(history.table())
        >>> keras_kd.export(federation.student, "runs/fed/exported", calibration=x_public)

    Reference:
        - [Itahara et al., 2020](https://arxiv.org/abs/2008.06180)
        - [Li and Wang, 2019](https://arxiv.org/abs/1910.03581)
        - [Lin et al., 2020](https://arxiv.org/abs/2006.07242)
    """

    def __init__(
        self,
        clients: Sequence[Callable[[], Any]] | int,
        public: Any,
        method: Method | None = None,
        engine: Engine | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        aggregate: str = "mean",
        privacy: Gaussian | None = None,
        student: Any = None,
        classes: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.clients, self.expected = _clients(clients)
        self.public = Public(public)
        given = DSFL() if method is None else method
        self.method = _instance("method", given, Method, "DSFL()")
        carries = InProcess() if engine is None else engine
        self.engine = _instance("engine", carries, Engine, "Flower()")
        checks.one_of("aggregate", aggregate, list(RULES))
        self.aggregate, self.seed = aggregate, checks.whole("seed", seed, 0)
        if privacy is not None:
            _instance("privacy", privacy, Gaussian, "Gaussian(10.0, 1e-5, 2.0)")
            if not self.method.probabilities:
                raise ValueError(
                    f"`{type(self.method).__name__}` sends logits, which have no bounds, so that "
                    "no noise is enough for them. Pass `method=DSFL()`, whose answers are "
                    "probabilities."
                )
        self.privacy = privacy
        first = self.method.settings().get("pretrain")
        if first and self.public.y is None:
            raise ValueError(
                f"`pretrain={first}` trains on labeled public rows, "
                "and `public` has no labels. Pass `public=(x, y)`, or `pretrain=0`."
            )
        if student is not None:
            checks.require_model(student, "student")
            if not student.built:
                raise ValueError(
                    f"The student `{student.name}` is not built. Call it on rows once."
                )
        elif not self.clients:
            raise ValueError(
                "Clients that come by themselves do not tell what the student is to be. Pass "
                "`student=`, a built `keras.Model`."
            )
        scheduled = student is not None and _is_scheduled(student)
        if scheduled and self.method.patience is not None:
            raise ValueError(
                f"`{type(self.method).__name__}` lets the learning rate of the student fall anew "
                "in each round, and the optimizer of the student has a schedule of its own. "
                "Compile the student with a number as `learning_rate`."
            )
        self._student = student
        self._names = names_of(classes)
        if self._names is not None and len(set(self._names)) < len(self._names):
            raise ValueError(f"`classes` names a class twice. Received: {self._names}.")
        self._temporary: Any = None
        if folder is None:
            # Removed with this object.
            self._temporary = tempfile.TemporaryDirectory()
            folder = self._temporary.name
        self.folder = pathlib.Path(folder)
        files.require_writable(self.folder)
        self._server: Server | None = None
        self._wanted = 0

    @property
    def student(self) -> Any:
        """The server's model, a plain `keras.Model`; `None` before `fit` if none was given."""
        return self._student

    @property
    def history(self) -> History:
        """What has happened so far."""
        return History() if self._server is None else self._server.history

    def fit(
        self,
        rounds: int = 10,
        queries: int = 1000,
        *,
        validation_data: Any = None,
        verbose: Any = "auto",
    ) -> History:
        """Run so many more rounds, and have the clients say how they fared.

        Rounds that an earlier run of the same program has finished in this folder are passed over.

        Args:
            rounds: Rounds to run.
            queries: Public rows that the clients are asked about in each.
            validation_data: `(x, y)` on which the student is measured after each round.
            verbose: 0 prints nothing, 1 or `"auto"` a line for each round.

        Returns:
            The history, also written to `history.json` in the folder, beside `student.keras`.

        Raises:
            ValueError: If a number is out of range, clients do not fit together, noise would drown
                the answers or cost more than was agreed, or the folder holds another federation.
                Nothing was trained then.
            ImportError: If the engine, or counting privacy, needs a package that is missing.
            RuntimeError: If no client can be reached or none ever answers.
            BlockingIOError: If another process is at work in the folder.
        """
        checks.whole("rounds", rounds)
        if checks.whole("queries", queries) > len(self.public.x):
            raise ValueError(
                f"`queries={queries}` is more than there are public rows, {len(self.public.x)}. "
                "Ask about fewer, or add public rows."
            )
        validation = None
        if validation_data is not None:
            validation = pair_of(validation_data, "validation_data")
            if validation[0].shape[1:] != self.public.x.shape[1:]:
                raise ValueError(
                    f"Rows of `validation_data` have shape {validation[0].shape[1:]}, and the "
                    f"public rows {self.public.x.shape[1:]}."
                )
        if verbose not in ("auto", 0, 1, 2):
            raise ValueError(f"`verbose` is 'auto', 0, 1 or 2. Received: verbose={verbose!r}.")
        server = self._prepared()
        classes = 0 if server.learner is None else server.learner.classes
        if validation is not None and (most := int(validation[1].max())) >= classes:
            raise ValueError(
                f"`validation_data` holds the class {most}, and the student has {classes}, "
                f"numbered 0 to {classes - 1}."
            )
        self._require_labels(classes)
        self._require_private(server, rounds, queries)
        wanted = self._wanted + rounds
        say = print if verbose else None
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.claimed(self.folder / ".lock", self._busy):
            history = self.engine.run(
                lambda link: server.run(link, wanted, queries, validation, say), self._places()
            )
        self._wanted = wanted
        if self.privacy is not None:
            self._read_reports(server)
        if history.worse:
            warnings.warn(
                f"The federation was worse than training alone for clients {history.worse}, which "
                "keep the models that they trained alone: see `history.per_client`.",
                stacklevel=2,
            )
        return history

    def _busy(self, owner: str) -> str:
        return (
            f"Process {owner} is at work in `{self.folder}`. Wait for it, or choose another folder."
        )

    def _prepared(self) -> Server:
        """The server with what an earlier program has finished."""
        if self._server is None:
            plan = Plan(
                public=self.public,
                method=self.method,
                aggregate=self.aggregate,
                noise=self.privacy,
                names=self._names,
                folder=self.folder,
                seed=self.seed,
                expected=self.expected,
                student=self._made_student,
            )
            server = Server(plan)
            server.prepare()
            self._server = server
        return self._server

    def _made_student(self) -> Any:
        if self._student is None:
            # Of the model alone: its weights, which may have seen private rows, are drawn anew.
            model = self._first_model()
            # Keras seeds initializers by Python's random numbers, which stay as they were.
            before = random.getstate()
            random.seed(self.seed)
            try:
                self._student = keras.models.clone_model(model)
            except ValueError as error:
                raise ValueError(
                    f"The model `{model.name}` of the first client cannot be made anew without its "
                    "weights, as it is neither Functional nor Sequential. Pass `student=`."
                ) from error
            finally:
                random.setstate(before)
        return self._student

    def _first_model(self) -> Any:
        """The model of the first client that can be made; one that fails does not end it all."""
        errors: list[BaseException] = []
        for make in self.clients:
            try:
                return made(make).model
            except (Exception, SystemExit) as error:
                errors.append(error)
        if isinstance(errors[0], SystemExit):
            raise RuntimeError("The function that makes client 0 ends the program.") from errors[0]
        raise errors[0]

    def _require_labels(self, classes: int) -> None:
        """Raise `ValueError` where clients would begin with labels that no output stands for."""
        first, labels = self.method.settings().get("pretrain"), self.public.y
        if first and labels is not None and (most := int(labels.max())) >= classes:
            raise ValueError(
                f"`pretrain={first}` trains on labeled public rows, and `public` holds the class "
                f"{most}, where the student has {classes}, numbered 0 to {classes - 1}."
            )

    def _require_private(self, server: Server, rounds: int, queries: int) -> None:
        if self.privacy is None or server.learner is None:
            return
        classes = server.learner.classes
        require_audible(self.privacy, self.expected, queries, classes, self.aggregate)
        left = max(0, self._wanted + rounds - server.done)
        spent = [self.privacy.noise_multiplier] * server.done
        require_affordable(self.privacy, left, spent)

    def _places(self) -> list[Place]:
        """Where the clients of a simulation are; their public rows lie in a file."""
        if not self.clients:
            return []
        path = self.folder / PUBLIC
        if not path.exists():
            labels = {} if self.public.y is None else {"y": self.public.y}
            with files.replacing(path) as file:
                np.savez(file, x=self.public.x, **labels)
        public = SavedPublic(str(path.resolve()), self.public)
        root, student = (self.folder / CLIENTS).resolve(), Student(self._student)
        return [
            Place(make, str(root / str(i)), i, public, student)
            for i, make in enumerate(self.clients)
        ]

    def _read_reports(self, server: Server) -> None:
        """Show what crossed nothing, where the clients' folders lie on this machine."""
        for i in range(len(self.clients)):
            path = self.folder / CLIENTS / str(i) / REPORT
            if not path.exists():
                continue
            said = json.loads(archives.read_bytes(path))
            row = server.history.of_client(i)
            row.update({k: said[k] for k in ("before", "alone", "after")})
            row["kept"] = "federated" if said["kept"] else "alone"
        server.tell_worse()
        with files.replacing(self.folder / HISTORY) as file:
            file.write((json.dumps(server.history.as_dict(), indent=1) + "\n").encode())


def _clients(clients: Any) -> tuple[list[Callable[[], Any]], int]:
    advice = "Pass a list of functions that each make one: `clients=[make_a, make_b]`."
    if checks.is_whole(clients):
        return [], checks.whole("clients", clients)
    if not isinstance(clients, Sequence) or isinstance(clients, str):
        raise TypeError(f"`clients` is a list of functions. Received: {clients!r}. {advice}")
    if not clients:
        raise ValueError(f"There are no clients: `clients=[]`. {advice}")
    for i, make in enumerate(clients):
        if not callable(make) or isinstance(make, keras.Model | type):
            raise TypeError(
                f"`clients[{i}]` is no function without arguments. Received: "
                f"{type(make).__name__}. {advice}"
            )
    return list(clients), len(clients)


def _is_scheduled(student: keras.Model) -> bool:
    """Whether the learning rate of a compiled student follows a schedule."""
    if not getattr(student, "compiled", False) or student.optimizer is None:
        return False
    # A schedule is a dict there, a number is one.
    return isinstance(student.optimizer.get_config().get("learning_rate"), dict)


def _instance(name: str, given: Any, kind: type, example: str) -> Any:
    if isinstance(given, kind):
        return given
    hint = " Pass an instance, not the class." if isinstance(given, type) else ""
    raise TypeError(f"`{name}` is one like `{example}`. Received: {given!r}.{hint}")
