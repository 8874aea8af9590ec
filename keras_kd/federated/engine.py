"""Flower as what carries the packets: in its simulation, and between processes of a deployment.

The two apps are the same in both: `_client_app` hands each message to a `Site` and returns what it
replies, `_server_app` runs the server's program with a `_GridLink`. A packet becomes a `RecordDict`
with two records, `arrays` and `numbers`, and comes back as a packet. Flower is imported here alone,
inside functions, after its telemetry and Ray's usage statistics have been turned off.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from keras_kd.federated.border import BorderError, Link, Packet, Reply, shown, word_of
from keras_kd.federated.engines import Engine
from keras_kd.federated.site import Place, Site
from keras_kd.utils import checks, files

T = TypeVar("T")

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}
"""What Flower and Ray read when they are imported; what the user has set is left as it is."""

_KINDS = {"hello": "query.hello", "round": "train.round", "finish": "evaluate.finish"}
_PARTS = ("dtype", "shape", "stype", "data")
"""What an array of Flower's is made of."""
_TIMEOUT, _WAIT = 3600.0, 60.0
_PAUSE = 0.1
"""Seconds between two looks for replies."""


def _flower() -> Any:
    """Flower, without telemetry."""
    was_there = "flwr" in sys.modules
    for name, value in _QUIET.items():
        if was_there and name not in os.environ and name == "FLWR_TELEMETRY_ENABLED":
            warnings.warn(
                "Flower was imported before this federation began, with its telemetry on. Set "
                "FLWR_TELEMETRY_ENABLED=0 before the program starts.",
                stacklevel=3,
            )
        os.environ.setdefault(name, value)
    try:
        import flwr.app
        import flwr.clientapp
        import flwr.serverapp
    except ImportError as error:
        raise ImportError(
            "This engine needs Flower, which is not installed. Install it in an environment of its "
            'own with `pip install "keras_kd[federated]"`, or use `engine=InProcess()`.'
        ) from error
    return flwr


# ------------------------------------------------------------------------ messages


def to_record(packet: Packet) -> Any:
    """A packet as a `RecordDict`.

    Args:
        packet: The packet.
    """
    app = _flower().app
    arrays = {name: app.Array(np.ascontiguousarray(a)) for name, a in packet.arrays.items()}
    numbers = {"kind": packet.kind, **packet.numbers}
    return app.RecordDict({"arrays": app.ArrayRecord(arrays), "numbers": app.ConfigRecord(numbers)})


def to_packet(record: Any) -> Packet:
    """The packet of a `RecordDict`.

    Args:
        record: What came.

    Raises:
        BorderError: If it holds other records than the two, or an array that is none.
    """
    app = _flower().app
    types = {name: type(value) for name, value in record.items()}
    if types != {"arrays": app.ArrayRecord, "numbers": app.ConfigRecord}:
        told = ", ".join(f"{shown(name)} ({kind.__name__})" for name, kind in types.items())
        raise BorderError(f"A message holds the records `arrays` and `numbers`. Received: {told}.")
    numbers = dict(record["numbers"])
    try:
        arrays = {name: array.numpy() for name, array in record["arrays"].items()}
        again = {name: app.Array(array) for name, array in arrays.items()}
    except Exception as error:
        # Bytes of unknown origin: whatever reading them raises, they are no array.
        raise BorderError("An array of the message cannot be read.") from error
    for name, array in record["arrays"].items():
        # What is not read of an array crosses too: bytes behind its values, and what it says of
        # itself beside them.
        if any(getattr(array, part) != getattr(again[name], part) for part in _PARTS):
            raise BorderError(f"The array {shown(name)} of the message holds more than its values.")
    return Packet(str(numbers.pop("kind", "")), arrays, numbers)


# ------------------------------------------------------------------------ the two apps

_SITES: dict[tuple[str, int], Site] = {}
"""The clients that have lived in this process, so that a worker compiles each of them once."""


def _client_app(place_of: Callable[[Any], Place]) -> Any:
    """A `ClientApp` that answers.

    Args:
        place_of: From Flower's context of the node to the client that is there.
    """
    flwr = _flower()
    app = flwr.clientapp.ClientApp()

    def handle(message: Any, context: Any) -> Any:
        try:
            place = place_of(context)
            site = _SITES.setdefault((place.folder, place.number), Site(place))
            packet = site.answer(to_packet(message.content))
        except Exception as error:
            # Flower would send its words, which may hold anything, and so stay here.
            traceback.print_exc()
            packet = Packet("failed", {}, {"round": 0, "error": word_of(error)})
        return flwr.app.Message(to_record(packet), reply_to=message)

    for kind in _KINDS.values():
        category, action = kind.split(".")
        getattr(app, category)(action)(handle)
    return app


def _server_app(program: Callable[[Any, Any], None]) -> Any:
    """A `ServerApp` that runs a program.

    Args:
        program: `fn(grid, context)`.
    """
    app = _flower().serverapp.ServerApp()
    app.main()(program)
    return app


class _GridLink:
    """A link over Flower's grid.

    Args:
        grid: The grid.
        expected: How many clients there are.
        timeout: Seconds in which a reply has to come.
        wait: Seconds to wait for clients that have not connected yet.
    """

    def __init__(self, grid: Any, expected: int, timeout: float, wait: float) -> None:
        self._grid, self._expected = grid, expected
        self._timeout, self._wait = timeout, wait
        self._waited = False
        # Messages of earlier exchanges that have no reply yet, with their nodes and types.
        self._open: dict[str, tuple[int, str]] = {}

    def nodes(self) -> list[int]:
        """The nodes that are connected; the first time, all that are expected are waited for."""
        end = time.monotonic() + (0.0 if self._waited else self._wait)
        found = sorted(self._grid.get_node_ids())
        while len(found) < self._expected and time.monotonic() < end:
            time.sleep(_PAUSE)
            found = sorted(self._grid.get_node_ids())
        self._waited = True
        return found

    def exchange(self, packets: Mapping[int, Packet]) -> list[Reply]:
        """As in `border.Link`."""
        app = _flower().app
        late, self._open = self._open, {}
        replies: list[Reply] = []
        missing: dict[str, tuple[int, str]] = {}
        for node, packet in packets.items():
            message = app.Message(to_record(packet), node, _KINDS[packet.kind])
            # One at a time: of several, grids tell differently which could not be sent.
            name = next(iter(self._grid.push_messages([message])), None)
            if name is None:
                replies.append(Reply(node, None, "the message could not be sent"))
            else:
                missing[str(name)] = node, message.metadata.message_type
        end = time.monotonic() + self._timeout
        while missing:
            for message in self._grid.pull_messages([*missing, *late]):
                to = message.metadata.reply_to_message_id
                for waiting in (missing, late):
                    if to in waiting:
                        replies.append(_reply(*waiting.pop(to), message))
            if missing and time.monotonic() > end:
                break
            if missing:
                time.sleep(_PAUSE)
        self._open = {**late, **missing}
        return [*replies, *(Reply(node, None, "late") for node, _ in missing.values())]


def _reply(node: int, kind: str, message: Any) -> Reply:
    if message.has_error():
        # Its words come from the client's process and may hold anything; the code is a number.
        return Reply(node, None, f"Flower reports error {int(message.error.code)}")
    said = message.metadata
    if said.group_id or said.message_type != kind:
        # Words of the client's own choice, which nothing here reads.
        return Reply(node, None, "its message holds words beside its records", refused=True)
    try:
        return Reply(node, to_packet(message.content))
    except BorderError as error:
        return Reply(node, None, str(error), refused=True)


# ------------------------------------------------------------------------ simulation


class Flower(Engine):
    """Flower carries the packets, here in its simulation: clients in processes of Ray.

    The same apps run in a deployment, where `write_app` makes Flower's folder of them. Each client
    is a node; its folder in the federation's folder is what it keeps between two messages. Flower's
    telemetry, Ray's usage statistics and Flower's search for updates are turned off, by the
    environment variables FLWR_TELEMETRY_ENABLED, RAY_USAGE_STATS_ENABLED and
    FLWR_DISABLE_UPDATE_CHECK, when `fit` imports Flower; ones that are set already stay.

    Args:
        cpus: Processors of each client; as many clients run at once as there is room for.
        gpus: The same of GPUs; a fraction shares one.
        timeout: Seconds in which a reply has to come. What comes later is told as late and left
            out.
        wait: Seconds to wait at the start for clients that have not connected.
        verbose: Whether Flower's own messages are shown.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> federation = Federation([make_a, make_b], x_public, engine=Flower(cpus=1))
    """

    timeout: float
    wait: float

    def __init__(
        self,
        cpus: float = 1,
        gpus: float = 0,
        *,
        timeout: float = _TIMEOUT,
        wait: float = _WAIT,
        verbose: bool = False,
    ) -> None:
        self.cpus = checks.positive("cpus", cpus)
        self.gpus = checks.positive("gpus", gpus) if gpus else 0.0
        self.timeout, self.wait = checks.positive("timeout", timeout), checks.positive("wait", wait)
        self.verbose = verbose

    def run(self, serve: Callable[[Link], T], places: Sequence[Place]) -> T:
        """As in `Engine`."""
        if not places:
            raise ValueError(
                "A simulation needs the clients themselves: pass `clients=[make_client, ...]`. In "
                "a deployment `fit` is called by the app that `server_app` makes."
            )
        _flower()
        try:
            from flwr.simulation import run_simulation
        except ImportError as error:
            raise ImportError(
                "Flower's simulation needs Ray, which is not installed. Install it with "
                '`pip install "keras_kd[federated]"`.'
            ) from error
        found: list[T] = []

        def program(grid: Any, context: Any) -> None:
            link = _GridLink(grid, len(places), self.timeout, self.wait)
            found.append(serve(link))

        here = _Places(list(places))
        with _quiet(self.verbose):
            run_simulation(
                server_app=_server_app(program),
                client_app=_client_app(here),
                num_supernodes=len(places),
                backend_config={
                    "client_resources": {
                        "num_cpus": self.cpus,
                        "num_gpus": self.gpus,
                        # Flower hands these on to Ray as they are. A process that died would be
                        # given the messages of all other clients, too, and is started anew; what
                        # it was at work on is tried once more, since a site replies alike.
                        "max_restarts": -1,
                        "max_task_retries": 1,
                    },
                    "init_args": {"log_to_driver": self.verbose},
                },
            )
        if not found:
            raise RuntimeError(
                "Flower's simulation ended without a result. Run it with `Flower(verbose=True)`."
            )
        return found[0]


class _Places:
    """The client of a node in a simulation, by the number that Flower gives it."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places

    def __call__(self, context: Any) -> Place:
        return self._places[int(context.node_config["partition-id"])]


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    logger = logging.getLogger("flwr")
    before = logger.level
    if not verbose:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


# ------------------------------------------------------------------------ deployment


class _Deployed(Engine):
    """Clients that live elsewhere, over the grid of a run that has begun."""

    def __init__(self, grid: Any, expected: int, engine: Engine) -> None:
        timeout, wait = engine.timeout or _TIMEOUT, engine.wait or _WAIT
        self._link = _GridLink(grid, expected, timeout, wait)

    def run(self, serve: Callable[[Link], T], places: Sequence[Place]) -> T:
        """As in `Engine`."""
        return serve(self._link)


def client_app() -> Any:
    """The `ClientApp` of a deployment: the client that the node's own configuration names.

    A node is started with `--node-config 'client="FILE.py:FUNCTION" folder="FOLDER"'`: the function
    that makes the client, and where it keeps what it learns. `partition-id=N` gives it a number,
    which it should have where clients come and go. Its public rows it brings itself,
    `Client(public=...)`.

    Returns:
        A `flwr.clientapp.ClientApp`.

    Raises:
        ImportError: If Flower is missing.

    Examples:
        >>> client = client_app()
    """
    return _client_app(_place_of)


def _place_of(context: Any) -> Place:
    said = context.node_config
    missing = [name for name in ("client", "folder") if not said.get(name)]
    if missing:
        raise ValueError(
            f"The node's configuration lacks {', '.join(missing)}. Start it with `--node-config "
            '\'client="FILE.py:FUNCTION" folder="FOLDER"\'`.'
        )
    number = int(said.get("partition-id", -1))
    return Place(lambda: _function(said["client"])(), str(said["folder"]), number)


def server_app(make_federation: Callable[[], Any] | None = None) -> Any:
    """The `ServerApp` of a deployment: a federation whose clients come by themselves.

    The run's configuration names `federation="FILE.py:FUNCTION"`, unless the function is given
    here, and `rounds` and `queries` as for `Federation.fit`. What comes of it is in the
    federation's folder: `student.keras`, `history.json`.

    Args:
        make_federation: Makes the `Federation(clients=NUMBER, ...)`.

    Returns:
        A `flwr.serverapp.ServerApp`.

    Raises:
        ImportError: If Flower is missing.

    Examples:
        >>> server = server_app()
    """

    def program(grid: Any, context: Any) -> None:
        said = context.run_config
        make = make_federation or _function(str(said.get("federation", "")))
        federation = make()
        federation.engine = _Deployed(grid, federation.expected, federation.engine)
        federation.fit(rounds=int(said["rounds"]), queries=int(said["queries"]))

    return _server_app(program)


def _function(named: str) -> Callable[[], Any]:
    """The function that `FILE.py:FUNCTION` names."""
    path, _, name = named.rpartition(":")
    if not path or not os.path.isfile(path):
        raise ValueError(f"A function is named as `FILE.py:FUNCTION`. Received: {named!r}.")
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"`{path}` is no Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = vars(module).get(name)
    if not callable(found):
        raise ValueError(f"`{path}` has no function `{name}`.")
    return found


_PROJECT = """[project]
name = "keras-kd-federation"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "keras-kd"

[tool.flwr.app.components]
serverapp = "federation_app:server"
clientapp = "federation_app:client"

[tool.flwr.app.config]
federation = {federation}
rounds = {rounds}
queries = {queries}
"""
_APP = '''"""The two apps of a federation, as Flower runs them."""

from keras_kd import federated

server = federated.server_app()
client = federated.client_app()
'''


def write_app(
    folder: str | os.PathLike[str], federation: str, rounds: int = 10, queries: int = 1000
) -> str:
    """Write the folder that `flwr run` takes, for a federation of processes that Flower starts.

    It holds no rows and no models: each node names its client, and the run its federation.

    Args:
        folder: Where to write; made if it is not there.
        federation: `"FILE.py:FUNCTION"`: what makes the `Federation(clients=NUMBER, ...)`, on the
            machine of the server.
        rounds: As for `Federation.fit`.
        queries: As for `Federation.fit`.

    Returns:
        The folder.

    Raises:
        TypeError: If a number is no whole one.
        ValueError: If the function is not named as it should be, or a number is not above 0.

    Examples:
        >>> write_app("app", "/srv/federation/server.py:make_federation", rounds=5, queries=500)
    """
    path, _, name = federation.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"`federation` is named as `FILE.py:FUNCTION`. Received: {federation!r}.")
    rounds, queries = checks.whole("rounds", rounds), checks.whole("queries", queries)
    where = pathlib.Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    named = json.dumps(f"{os.path.abspath(path)}:{name}", ensure_ascii=False)
    project = _PROJECT.format(federation=named, rounds=rounds, queries=queries)
    for file, text in (("pyproject.toml", project), ("federation_app.py", _APP)):
        with files.replacing(where / file) as stream:
            stream.write(text.encode())
    return str(where)
