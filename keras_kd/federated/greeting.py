"""Who takes part: the clients that said hello, and what keeps others out.

A `Register` belongs to one run of a server over one link; it reads the replies to greetings and
sends nothing itself. Imports `border`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from keras_kd.federated.border import Array, Packet


class Known(NamedTuple):
    """A client that said hello.

    Attributes:
        number: Its place among the clients.
        has: Booleans `(classes,)`: classes of which it has rows.
    """

    number: int
    has: Array


class Register:
    """The clients of a run, by the numbers that the link gives them.

    Args:
        shape: Shape of the public rows, without their number.
        classes: How many classes there are.
        names: Names of the classes, or `None`.

    Attributes:
        known: Those that take part.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, names: list[str] | None) -> None:
        self._shape, self._classes, self._names = shape, classes, names
        self.known: dict[int, Known] = {}
        self._refused: set[int] = set()
        # Those whose reply to a greeting came too late, and is still on its way.
        self._slow: set[int] = set()
        # Of the first client that names its classes: its number, and the checksum of the names.
        self._named: tuple[int, int] | None = None

    def new(self, nodes: Sequence[int]) -> list[int]:
        """Those of the nodes that are still to be greeted."""
        return [n for n in nodes if n not in self.known and n not in self._refused]

    def free(self) -> Iterator[int]:
        """Places that no client has."""
        taken = {client.number for client in self.known.values()}
        return (number for number in itertools.count() if number not in taken)

    def late(self, node: int) -> None:
        """Note that a reply to a greeting did not come in time."""
        self._slow.add(node)

    def overdue(self, node: int, packet: Packet) -> bool:
        """Whether a packet is such a reply that comes now, when nobody waits for it any more."""
        if packet.kind != "hello" or node not in self._slow:
            return False
        self._slow.discard(node)
        return True

    def admit(self, node: int, packet: Packet, there: Sequence[int]) -> str | None:
        """Note a client that said hello.

        Args:
            node: The client, as the link calls it.
            packet: What it replied.
            there: All that can be reached now.

        Returns:
            What keeps it out, or `None`.
        """
        if not self.new([node]):
            # Of two replies to greetings the first, which came too late, did as well.
            self._slow.discard(node)
            return None
        number, misfit = int(packet.numbers["number"]), self._misfit(packet)
        if misfit is None and "names" in packet.numbers and self._names is None:
            misfit = self._named_otherwise(number, packet.numbers["names"])
        if misfit is not None:
            self._refused.add(node)
            return misfit
        if not self._give_way(number, there):
            # It may be one that came back before it was missed, so that it is greeted again.
            return "has the number of another one: give each its own `partition-id`"
        has = packet.arrays.get("has", np.ones(self._classes, "uint8")).astype(bool)
        self.known[node] = Known(number, has)
        return None

    def _give_way(self, number: int, there: Sequence[int]) -> bool:
        """Whether a number is free, or was that of a client that is gone, and so has come back."""
        holders = [node for node, client in self.known.items() if client.number == number]
        if any(node in there for node in holders):
            return False
        for node in holders:
            del self.known[node]
        return True

    def _misfit(self, packet: Packet) -> str | None:
        """What keeps a client out, or `None`."""
        classes, shape = self._classes, self._shape
        inputs, order = packet.numbers["inputs"], packet.arrays["order"]
        if len(inputs) != len(shape) or any(a not in (0, b) for a, b in zip(inputs, shape)):
            return f"reads rows of shape {tuple(inputs)}, and the public rows have shape {shape}"
        if len(order) != classes:
            return f"has {len(order)} outputs, and the student has {classes}"
        if not np.array_equal(order, np.arange(classes)):
            first = int(np.flatnonzero(order != np.arange(classes))[0])
            names = self._names or []
            there = "a class that the server does not know"
            if 0 <= order[first] < len(names):
                there = repr(names[order[first]])
            return (
                f"has other classes or another order: output {first} is {there} there, and "
                f"{names[first] if names else first!r} here. Order its outputs and labels as in "
                "`classes`"
            )
        if not packet.numbers["public"]:
            return "has other public rows than the server: answers would be those to other rows"
        has = packet.arrays.get("has")
        if has is not None and has.shape != (classes,):
            return f"tells of {len(has)} classes, and there are {classes}"
        if has is not None and not has.any():
            return "has rows of none of the classes, so that its answers say nothing"
        return None

    def _named_otherwise(self, number: int, names: int) -> str | None:
        """Whether a client names its classes as others do, where the server names none."""
        if self._named is None:
            self._named = number, names
        first, wanted = self._named
        if names == wanted:
            return None
        return (
            f"names other classes, or in another order, than client {first}. Order its outputs and "
            "labels as there, and pass `classes=` to the federation, which then says what differs"
        )
