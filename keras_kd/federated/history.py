"""What a federation has done: bytes, accuracies, and who failed when. Imports `utils` alone."""

from __future__ import annotations

from typing import Any

from keras_kd.utils import tables


class History:
    """What `Federation.fit` returns.

    Args:
        said: What `as_dict` returned, or `None` for a new one.

    Attributes:
        rounds: A dict for each round: `round`, `answered` (the clients whose answers counted),
            `bytes_up`, `bytes_down`, and `student_accuracy` where there are validation data.
        events: A dict for each thing that went wrong: `round`, `client`, `what` (`"failed"`,
            `"rejected"`, `"late"`, `"lost"`, `"absent"`, `"spent"`, `"drowned"`, `"worse"`) and
            `why`.
        per_client: A dict for each client: `client`, `before` (its accuracy on its own validation
            rows as it was made), `alone` (after as much private training, without the others),
            `after` (with them), `kept` (`"federated"` or `"alone"`, whichever is better),
            `answered` (rounds in which its answers counted) and `epsilon`. Accuracies are `None`
            where it has no validation rows, has not reported, or keeps them for itself, as with
            `privacy` in a process of its own.
        bytes_up: Bytes that clients sent.
        bytes_down: Bytes that the server sent.
        messages: Packets that crossed, both ways.
        epsilon: What the client has spent that has spent most; `None` without `privacy`.
    """

    def __init__(self, said: dict[str, Any] | None = None) -> None:
        said = said or {}
        self.rounds: list[dict[str, Any]] = list(said.get("rounds", []))
        self.events: list[dict[str, Any]] = list(said.get("events", []))
        self.per_client: list[dict[str, Any]] = list(said.get("per_client", []))
        self.bytes_up: int = said.get("bytes_up", 0)
        self.bytes_down: int = said.get("bytes_down", 0)
        self.messages: int = said.get("messages", 0)

    @property
    def epsilon(self) -> float | None:
        """What the client has spent that has spent most."""
        spent = [row["epsilon"] for row in self.per_client if row["epsilon"] is not None]
        return max(spent) if spent else None

    @property
    def worse(self) -> list[int]:
        """Clients for which the federation was worse than training alone."""
        return [row["client"] for row in self.per_client if row["kept"] == "alone"]

    def add_event(self, round_number: int, client: int, what: str, why: str) -> None:
        """Note what went wrong.

        Args:
            round_number: Number of the round.
            client: Number of the client.
            what: As in `events`.
            why: In words.
        """
        self.events.append({"round": round_number, "client": client, "what": what, "why": why})

    def of_client(self, client: int) -> dict[str, Any]:
        """The row of a client in `per_client`, made if it is not there.

        Args:
            client: Its number.
        """
        for row in self.per_client:
            if row["client"] == client:
                return row
        row = {
            "client": client,
            "before": None,
            "alone": None,
            "after": None,
            "kept": None,
            "answered": 0,
            "epsilon": None,
        }
        self.per_client.append(row)
        self.per_client.sort(key=lambda each: each["client"])
        return row

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values."""
        return {**vars(self), "epsilon": self.epsilon}

    def table(self) -> str:
        """A line for each client, and what crossed."""

        def shown(value: Any) -> str:
            return "-" if value is None else f"{100 * value:.1f}"

        rows = [
            [
                str(row["client"]),
                *(shown(row[k]) for k in ("before", "alone", "after")),
                row["kept"] or "-",
                f"{row['answered']} of {len(self.rounds)}",
                "-" if row["epsilon"] is None else f"{row['epsilon']:.3g}",
            ]
            for row in self.per_client
        ]
        headings = ["client", "before %", "alone %", "after %", "kept", "answered", "epsilon"]
        lines = [
            tables.render(headings, rows),
            f"{self.bytes_up:,} bytes up, {self.bytes_down:,} down, {self.messages:,} messages",
        ]
        lines += [
            f"round {e['round']}, client {e['client']}: {e['what']}: {e['why']}"
            for e in self.events
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"<History of {len(self.rounds)} rounds, {len(self.per_client)} clients, "
            f"{self.bytes_up:,} bytes up, {self.bytes_down:,} down>"
        )
