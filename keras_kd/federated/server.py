"""The side of the server: rounds of questions, one consensus from the answers, one student.

`Server.run` greets the clients, asks them in each round about rows that were asked about least,
joins what is left of the answers once lies are out, lets the student learn and tells everybody in
the next round. What is true between two rounds is one file, renamed into place; a server that was
killed asks the same question again. Imports the modules beside it but `site` and the engines.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_kd.federated import aggregation, border, privacy, training
from keras_kd.federated.border import Array, Link, Packet, Reply
from keras_kd.federated.client import Public
from keras_kd.federated.greeting import Known, Register
from keras_kd.federated.history import History
from keras_kd.federated.methods import Method
from keras_kd.models import variables
from keras_kd.utils import archives, files

STATE, STUDENT, HISTORY = "federation.npz", "student.keras", "history.json"
_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What a federation was made with.

    Attributes:
        public: The public rows.
        method: How it distils.
        aggregate: The rule by which answers are joined.
        noise: The noise on answers, or `None`.
        names: Names of the classes, or `None`.
        folder: The server's folder.
        seed: Of the questions and the orders of rows.
        expected: How many clients there are.
        student: `() -> model`: the student.
    """

    public: Public
    method: Method
    aggregate: str
    noise: privacy.Gaussian | None
    names: list[str] | None
    folder: pathlib.Path
    seed: int
    expected: int
    student: Callable[[], Any]


class Server:
    """Leads the rounds.

    Args:
        plan: What the federation was made with.

    Attributes:
        history: What has happened.
        done: How many rounds are finished.

    Raises:
        ValueError: If the folder holds another federation.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.history = History()
        self.learner: training.Learner | None = None
        self.done = 0
        self._step = 0
        self._finished = True
        # Of ten digits always, so that packets of all runs have the same size.
        self._run = int(np.random.default_rng().integers(10**9, 2**31))
        rows = len(plan.public.x)
        self._asked = np.zeros(rows, "int32")
        # The last consensus about each row that was ever asked about, and for which classes.
        self._table: Array = None
        self._knows: Array = None
        self._told: Array = np.zeros(0, "int32")
        self._register: Register | None = None
        self._optimizer: list[Array] = []

    # ------------------------------------------------------------------------ greeting

    def prepare(self) -> None:
        """Make the student, and take up what an earlier program has finished.

        Raises:
            ValueError: If the folder holds another federation.
        """
        if self.learner is not None:
            return
        student = self.plan.student()
        learner = training.Learner(student, self.plan.public.x[:8], "student")
        if self.plan.names is not None and len(self.plan.names) != learner.classes:
            raise ValueError(
                f"`classes` names {len(self.plan.names)} classes, and the student `{student.name}` "
                f"has {learner.classes} outputs."
            )
        rows = len(self.plan.public.x)
        self._table = np.zeros((rows, learner.classes), "float32")
        self._knows = np.zeros((rows, learner.classes), bool)
        given = student.optimizer if getattr(student, "compiled", False) else None
        optimizer = given or keras.optimizers.Adam(1e-3)
        learner.compile(optimizer, self.plan.method.loss())
        self._optimizer = variables.values(optimizer.variables)
        self._load(learner)
        self.learner = learner

    def _learner(self) -> training.Learner:
        if self.learner is None:
            raise RuntimeError("`prepare` comes first.")
        return self.learner

    def _registered(self) -> Register:
        if self._register is None:
            raise RuntimeError("`run` comes first.")
        return self._register

    @property
    def _clients(self) -> dict[int, Known]:
        return self._registered().known

    def greet(self, link: Link, nodes: Sequence[int], there: Sequence[int]) -> None:
        """Say hello to clients, and compare what they are with what is needed.

        Args:
            link: The way to them.
            nodes: The clients, as the link calls them.
            there: All that can be reached now.

        Raises:
            ValueError: If a client does not fit, before anything was trained. One that comes later
                is left out, and told of.
        """
        learner, public, register = self._learner(), self.plan.public, self._registered()
        free = register.free()
        packets = {
            node: Packet(
                "hello",
                {},
                {
                    "run": self._run,
                    "number": next(free),
                    "outputs": learner.classes,
                    "inputs": [int(size) for size in public.x.shape[1:]],
                    "public": [int(n) for n in public.identity],
                    "private": int(self.plan.noise is not None),
                    **({} if self.plan.names is None else {"names": self.plan.names}),
                },
            )
            for node in nodes
        }
        misfits = []
        for node, packet, why in self._exchange(link, packets):
            if packet is None or packet.kind != "hello":
                self._blame(node, packet, why)
                if packet is None and why == "late":
                    register.late(node)
                continue
            number = int(packet.numbers["number"])
            misfit = register.admit(node, packet, there)
            if misfit is None:
                self.history.of_client(number)
            else:
                misfits.append((number, misfit))
        if misfits and not self.history.rounds:
            told = "; ".join(f"client {number} {misfit}" for number, misfit in misfits)
            raise ValueError(f"Not all clients fit together: {told}.")
        for number, misfit in misfits:
            self.history.add_event(self.done + 1, number, "rejected", misfit)

    # ------------------------------------------------------------------------ rounds

    def run(
        self,
        link: Link,
        rounds: int,
        queries: int,
        validation: tuple[Array, Array] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> History:
        """Run rounds until so many are finished, and have the clients report.

        Args:
            link: The way to the clients.
            rounds: How many are to be finished, those of earlier calls included.
            queries: Rows in a round.
            validation: `(x, y)` on which the student is measured after each round.
            say: Called with a line after each round.

        Returns:
            The history.

        Raises:
            ValueError: If clients do not fit together.
            RuntimeError: If no client can be reached, or none ever answered.
        """
        self.prepare()
        # Links number their clients anew.
        shape = tuple(self.plan.public.x.shape[1:])
        self._register = Register(shape, self._learner().classes, self.plan.names)
        self._greet_new(link)
        if not self._clients:
            raise RuntimeError(f"No client could be greeted. {self._reasons()}")
        if self.plan.noise is not None and self.done < rounds:
            # Of those that are expected, so many have come.
            privacy.require_audible(
                self.plan.noise,
                len(self._clients),
                queries,
                self._learner().classes,
                self.plan.aggregate,
            )
        self._forget_unheard()
        if not (self.plan.folder / STATE).exists():
            # By the number of the run clients know the question again, should this one be killed.
            self._save()
        while self.done < rounds:
            self._round(link, queries, validation)
            if say is not None:
                say(self._line(rounds))
        if not self._asked.any():
            raise RuntimeError(f"No client has answered in {self.done} rounds. {self._reasons()}")
        if not self._finished:
            self._finish(link)
        self._write_results()
        return self.history

    def _forget_unheard(self) -> None:
        """Start anew what an earlier program ran without any answer."""
        if self.done and not self._asked.any():
            self.done, self._finished = 0, True
            self.history.rounds.clear()

    def _reasons(self) -> str:
        last = {event["client"]: event for event in self.history.events}
        told = [f"client {c}: {e['what']}: {e['why']}" for c, e in sorted(last.items())]
        return "; ".join(told) + ("." if told else "None is connected.")

    def _greet_new(self, link: Link) -> list[int]:
        """Greet those who have come; all that are there now and were greeted."""
        nodes = link.nodes()
        if new := self._registered().new(nodes):
            self.greet(link, new, nodes)
        return [n for n in nodes if n in self._clients]

    def _settings(self, node: int) -> dict[str, Any]:
        noise = self.plan.noise
        return {
            "run": self._run,
            "round": self._step + 1,
            "number": self._clients[node].number,
            "seed": self.plan.seed,
            **self.plan.method.settings(),
            **({} if noise is None else noise.settings()),
        }

    def _told_arrays(self) -> dict[str, Array]:
        if not len(self._told):
            return {}
        return {
            "told_rows": self._told,
            "told": self._answers_to_tell().astype("float16"),
            # One round is one set of clients, so that all of its rows know the same classes.
            "known": self._knows[self._told[0]].astype("uint8"),
        }

    def _answers_to_tell(self) -> Array:
        if self.plan.method.tells_student:
            return self._learner().logits(self.plan.public.x[self._told])
        return self._table[self._told]

    def _question(self, queries: int) -> Array:
        """Rows that were asked about least, by chance among equals."""
        rng = np.random.default_rng([self.plan.seed, self._step])
        order = np.lexsort((rng.random(len(self._asked)), self._asked))
        return np.sort(order[:queries]).astype("int32")

    def _round(self, link: Link, queries: int, validation: Any) -> None:
        # Counted up first, so that what goes wrong from here on is told of this round.
        number = self.done + 1
        there = self._greet_new(link)
        for node, client in self._clients.items():
            if node not in there:
                self.history.add_event(number, client.number, "absent", "it cannot be reached")
        ask, told = self._question(queries), self._told_arrays()
        before = self.history.bytes_up, self.history.bytes_down
        packets = {
            node: Packet("round", {"ask": ask, **told}, self._settings(node)) for node in there
        }
        heard: dict[int, Array] = {}
        for node, packet, why in self._exchange(link, packets):
            answers = self._answers(node, packet, why, ask)
            if answers is None:
                continue
            if node in heard:
                why = "it answered twice: the first answer counts"
                self.history.add_event(number, self._clients[node].number, "rejected", why)
                continue
            heard[node] = answers
        self._leave_out_the_drowned(heard, queries)
        answered = [self._clients[node].number for node in heard]
        for one in answered:
            self.history.of_client(one)["answered"] += 1
        if heard:
            masks = np.stack([self._clients[node].has for node in heard])
            self._learn(ask, np.stack(list(heard.values())), masks)
        row: dict[str, Any] = {
            "round": number,
            "answered": sorted(answered),
            "bytes_up": self.history.bytes_up - before[0],
            "bytes_down": self.history.bytes_down - before[1],
        }
        if validation is not None:
            row["student_accuracy"] = self._learner().accuracy(validation)
        self.history.rounds.append(row)
        self.done, self._step, self._finished = number, self._step + 1, False
        self._save()

    def _leave_out_the_drowned(self, heard: dict[int, Array], queries: int) -> None:
        """Leave all answers out where so few have come that their noise would drown them."""
        noise, rule = self.plan.noise, self.plan.aggregate
        if noise is None or not heard:
            return
        left = privacy.left(noise, len(heard), queries, rule)
        limit = privacy.tolerable(self._learner().classes)
        if left <= limit:
            return
        for node in heard:
            why = (
                f"{len(heard)} answers were left, whose {rule} has noise of {left:.4g} on each "
                f"probability, more than {limit:.3g}"
            )
            self.history.add_event(self.done + 1, self._clients[node].number, "drowned", why)
        heard.clear()

    def _learn(self, ask: Array, answers: Array, masks: Array) -> None:
        """Join the answers, and let the student learn all that is known so far."""
        method, learner = self.plan.method, self._learner()
        joined, known = aggregation.aggregate(answers, masks, self.plan.aggregate)
        self._table[ask] = method.consensus(joined, known)
        self._knows[ask] = known
        self._asked[ask] += 1
        self._told = ask
        rows = np.flatnonzero(self._asked)
        rng = np.random.default_rng([self.plan.seed, self._step, 1])
        targets = method.targets(self._table[rows], self._knows[rows])
        self._begin_schedule()
        learner.study(
            self.plan.public.x[rows],
            targets,
            method.student_epochs,
            method.batch_size,
            rng,
            method.patience,
        )

    def _begin_schedule(self) -> None:
        """Let the learning rate of a method that anneals it fall anew."""
        if self.plan.method.patience is not None:
            optimizer = self._learner().logits_model.optimizer
            variables.assign(optimizer.variables, self._optimizer)

    def _answers(self, node: int, packet: Packet | None, why: str, ask: Array) -> Array | None:
        """What counts of a reply, in the order of the question; or `None`, and why is told."""
        number, client = self.done + 1, self._clients.get(node)
        if client is None:
            return None
        if self._is_late(node, client, packet):
            return None
        if packet is None or packet.kind not in ("answers", "spent"):
            self._blame(node, packet, why)
            return None
        spent = packet.numbers.get("epsilon")
        if self.plan.noise is not None and spent is not None:
            self.history.of_client(client.number)["epsilon"] = spent
        if packet.kind == "spent":
            why = f"another round would cost more than max_epsilon; it has spent {spent:.4g}"
            self.history.add_event(number, client.number, "spent", why)
            return None
        problem = self._problem(packet, ask)
        if problem is not None:
            self.history.add_event(number, client.number, "rejected", problem)
            return None
        # Answers are those of the row that they name, in whatever order they came.
        return packet.arrays["answers"][np.argsort(packet.arrays["rows"])].astype("float64")

    def _is_late(self, node: int, client: Known, packet: Packet | None) -> bool:
        """Whether a reply is one to an earlier packet, which is told and left out."""
        if packet is None:
            return False
        if self._registered().overdue(node, packet):
            return True
        # One that failed before it knew the round says 0, and one that says none answers this one.
        if packet.numbers.get("round", 0) in (0, self._step + 1):
            return False
        why = f"its reply to packet {packet.numbers['round']} came now, and is left out"
        self.history.add_event(self.done + 1, client.number, "late", why)
        return True

    def _problem(self, packet: Packet, ask: Array) -> str | None:
        sizes = {"queries": len(ask), "classes": self._learner().classes}
        try:
            border.check(packet, border.UP, sizes)
        except border.BorderError as error:
            return str(error)
        if not np.array_equal(np.sort(packet.arrays["rows"]), ask):
            return "it answered about other rows than those that it was asked about"
        method = self.plan.method
        noisy = self.plan.noise is not None
        if noisy and "epsilon" not in packet.numbers:
            return "it does not tell what it has spent"
        return border.problem(packet.arrays["answers"], method.probabilities, noisy)

    def _blame(self, node: int, packet: Packet | None, why: str) -> None:
        """Tell what came of a client in place of an answer."""
        client = self._clients.get(node)
        number = node if client is None else client.number
        if client is None and packet is not None:
            # It failed before it could say which one it is in the usual way.
            number = int(packet.numbers.get("number", node))
        if 0 <= number < self.plan.expected:
            self.history.of_client(number)
        if packet is None:
            what = "late" if why == "late" else "lost"
            words = "it did not answer in time" if why == "late" else why
            self.history.add_event(self.done + 1, number, what, words)
        elif packet.kind == "failed":
            error = packet.numbers["error"]
            words = f"{error}; its words are in `error.txt` in the client's folder"
            self.history.add_event(self.done + 1, number, "failed", words)
        else:
            words = f"it sent `{packet.kind}`, which nobody asked for"
            self.history.add_event(self.done + 1, number, "rejected", words)

    def _exchange(
        self, link: Link, packets: Mapping[int, Packet]
    ) -> list[tuple[int, Packet | None, str]]:
        """Replies that hold nothing that may not cross; what does is told as not come."""
        for packet in packets.values():
            border.check(packet, border.DOWN, {"classes": self._learner().classes})
            self.history.bytes_down += packet.nbytes
            self.history.messages += 1
        found = []
        for node, reply, why, refused in itertools.starmap(Reply, link.exchange(packets)):
            if reply is not None:
                self.history.bytes_up += reply.nbytes
                self.history.messages += 1
                try:
                    border.check(reply, border.UP, {})
                except border.BorderError as error:
                    refused, why = True, str(error)
            client = self._clients.get(node)
            if refused:
                number = node if client is None else client.number
                self.history.add_event(self.done + 1, number, "rejected", why)
            elif client is not None or node in packets:
                found.append((node, reply, why))
        return found

    def _line(self, rounds: int) -> str:
        row = self.history.rounds[-1]
        found = (
            f"Round {row['round']}/{rounds}: {len(row['answered'])} of {self.plan.expected} "
            f"answered, {row['bytes_up']:,} bytes up, {row['bytes_down']:,} down"
        )
        if "student_accuracy" in row:
            found += f", student accuracy {row['student_accuracy']:.4f}"
        events = [e for e in self.history.events if e["round"] == row["round"]]
        told = "".join(f"\n  client {e['client']}: {e['what']}: {e['why']}" for e in events)
        return found + told

    # ------------------------------------------------------------------------ the end

    def _finish(self, link: Link) -> None:
        """Have everybody learn the last consensus, and say how it fared."""
        there = self._greet_new(link)
        told = self._told_arrays()
        packets = {node: Packet("finish", told, self._settings(node)) for node in there}
        for node, packet, why in self._exchange(link, packets):
            client = self._clients.get(node)
            if client is None or self._is_late(node, client, packet):
                continue
            if packet is None or packet.kind != "report":
                self._blame(node, packet, why)
                continue
            said = packet.numbers
            if problem := _contradiction(said):
                self.history.add_event(self.done + 1, client.number, "rejected", problem)
                continue
            row = self.history.of_client(client.number)
            row.update({k: said.get(k) for k in ("before", "alone", "after")})
            if "kept" in said:
                row["kept"] = "federated" if said["kept"] else "alone"
            if "epsilon" in said and self.plan.noise is not None:
                row["epsilon"] = said["epsilon"]
        self._step, self._finished = self._step + 1, True
        self._save()

    def tell_worse(self) -> None:
        """Add to the events which clients were better off alone."""
        told = {e["client"] for e in self.history.events if e["what"] == "worse"}
        for row in self.history.per_client:
            if row["kept"] == "alone" and row["client"] not in told:
                why = (
                    f"accuracy {row['after']:.4f} with the others, {row['alone']:.4f} alone: it "
                    "keeps the model that it trained alone"
                )
                self.history.add_event(self.done, row["client"], "worse", why)

    def _write_results(self) -> None:
        self.tell_worse()
        folder = self.plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing_by_name(folder / STUDENT) as path:
            self._learner().model.save(path)
        with files.replacing(folder / HISTORY) as file:
            file.write((json.dumps(self.history.as_dict(), indent=1) + "\n").encode())

    # ------------------------------------------------------------------------ state

    def identity(self) -> dict[str, Any]:
        """What tells this federation from another one."""
        plan = self.plan
        return {
            "method": repr(plan.method),
            "aggregate": plan.aggregate,
            "public rows": [int(n) for n in plan.public.identity],
            "privacy": None if plan.noise is None else plan.noise.settings(),
            "classes": plan.names,
            "clients": plan.expected,
            "seed": plan.seed,
        }

    def _variables(self, learner: training.Learner) -> list[Any]:
        return [*learner.variables, *learner.logits_model.optimizer.variables]

    def _save(self) -> None:
        values = variables.values(self._variables(self._learner()))
        about = {
            "version": _VERSION,
            "identity": self.identity(),
            "run": self._run,
            "done": self.done,
            "step": self._step,
            "finished": self._finished,
            "history": self.history.as_dict(),
        }
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.plan.folder / STATE) as file:
            np.savez(
                file,
                about=np.array(json.dumps(about)),
                asked=self._asked,
                table=self._table,
                knows=self._knows,
                told=self._told,
                **{f"student:{i}": value for i, value in enumerate(values)},
            )

    def _load(self, learner: training.Learner) -> None:
        path = self.plan.folder / STATE
        if not path.exists():
            return
        found = archives.arrays(path)
        try:
            about = json.loads(str(found["about"]))
            before, now = about["identity"], json.loads(json.dumps(self.identity()))
            other = [name for name in now if before.get(name) != now[name]]
            if about["version"] != _VERSION:
                raise ValueError("it is of another version")
            if other:
                name = other[0]
                raise ValueError(f"`{name}` was {before.get(name)!r} and is {now[name]!r}")
            values = [found[f"student:{i}"] for i in range(len(found) - 5)]
            variables.assign(self._variables(learner), values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{path}` holds another federation: {error}. Run the same program as before, or "
                "choose another folder."
            ) from error
        self._run, self.done, self._step = about["run"], about["done"], about["step"]
        self._finished, self.history = about["finished"], History(about["history"])
        self._asked, self._table = found["asked"], found["table"]
        self._knows, self._told = found["knows"], found["told"]


def _contradiction(said: Mapping[str, Any]) -> str | None:
    """What is wrong with a report whose numbers may cross, or `None`."""
    alone, after = said.get("alone"), said.get("after")
    if "kept" not in said:
        return None
    better = alone is None or after is None or after >= alone
    if bool(said["kept"]) == better:
        return None
    return "its report contradicts itself: it does not keep the better of the two models"
