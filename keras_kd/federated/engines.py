"""What carries packets between the server and the clients: the engine; here the one without a net.

An `Engine` runs the server's program with a `Link`. `InProcess` calls the clients one after the
other in this process; `engine.Flower` has Flower carry the packets. Imports `border` and `site`.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from keras_kd.federated.border import Link, Packet, Reply
from keras_kd.federated.site import Place, Site
from keras_kd.utils import checks

T = TypeVar("T")


class Engine(abc.ABC):
    """Carries packets; base of `InProcess` and `Flower`.

    Attributes:
        timeout: Seconds in which a reply has to come; `None` says nothing of it.
        wait: Seconds to wait at the start for clients that have not connected; the same.
    """

    timeout: float | None = None
    wait: float | None = None

    @abc.abstractmethod
    def run(self, serve: Callable[[Link], T], places: Sequence[Place]) -> T:
        """Run the server's program.

        Args:
            serve: The program.
            places: The clients; none where they live elsewhere and come by themselves.

        Returns:
            What the program returned.
        """


class InProcess(Engine):
    """All clients in this process, one after the other: nothing to install, nothing to wait for.

    Args:
        timeout: Seconds in which a client has to answer. What comes later is told as late and left
            out. `None` waits.

    Raises:
        ValueError: If `timeout` is not above 0.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = None if timeout is None else checks.positive("timeout", timeout)
        self._sites: dict[str, Site] = {}

    def run(self, serve: Callable[[Link], T], places: Sequence[Place]) -> T:
        """As in `Engine`."""
        if not places:
            raise ValueError(
                "`InProcess` needs the clients themselves: pass `clients=[make_client, ...]`."
            )
        # A client that goes on in the same folder keeps what it has compiled.
        self._sites = {place.folder: self._site(place) for place in places}
        return serve(_Calls([self._sites[place.folder] for place in places], self.timeout))

    def _site(self, place: Place) -> Site:
        found = self._sites.get(place.folder)
        return found if found is not None and found.place.make is place.make else Site(place)


class _Calls:
    """A link that calls."""

    def __init__(self, sites: Sequence[Site], timeout: float | None) -> None:
        self._sites, self._timeout = sites, timeout
        self._late: list[Reply] = []

    def nodes(self) -> list[int]:
        return list(range(len(self._sites)))

    def exchange(self, packets: Mapping[int, Packet]) -> list[Reply]:
        replies, self._late = self._late, []
        for node, packet in packets.items():
            begin = time.monotonic()
            reply = Reply(node, self._sites[node].answer(packet))
            if self._timeout is not None and time.monotonic() - begin > self._timeout:
                self._late.append(reply)
                reply = Reply(node, None, "late")
            replies.append(reply)
        self._require_apart()
        return replies

    def _require_apart(self) -> None:
        """Raise `ValueError` where two functions have made one model, which both would train."""
        owners: dict[int, int] = {}
        for node, site in enumerate(self._sites):
            if site.place.student is not None and site.place.student.holds(site.model):
                raise ValueError(
                    f"Client {node} brings the student, `{site.model.name}`, as its model, so that "
                    "its weights would be the server's. Let its function make a model of its own."
                )
            other = owners.setdefault(id(site.model), node)
            if site.model is not None and other != node:
                raise ValueError(
                    f"Clients {other} and {node} have one model, `{site.model.name}`, between "
                    "them. Let each function of `clients` make a model of its own."
                )
