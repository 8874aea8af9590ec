"""Rounds against clients that are written out here: lies, silence, lateness, and one consensus."""

import json

import keras
import numpy as np
import pytest
import scipy.special

from keras_kd import federated
from keras_kd.federated import privacy
from keras_kd.federated.border import Packet, Reply
from keras_kd.federated.client import Public
from keras_kd.federated.server import HISTORY, STATE, STUDENT, Plan, Server

rng = np.random.default_rng(5)
X = rng.normal(size=(30, 3)).astype("float32")
ANSWERS = rng.dirichlet(np.ones(4), (5, 30))


class Scripted:
    """Clients that do what a function says: `fn(packet, usual reply) -> reply`."""

    def __init__(self, *clients, has=None):
        self.clients = dict(enumerate(clients))
        self.has = has or {}
        self.sent, self.late = [], []

    def nodes(self):
        return list(self.clients)

    def exchange(self, packets):
        replies, self.late = self.late, []
        for node, packet in packets.items():
            self.sent.append((node, packet))
            usual = self.usual(node, packet)
            found = self.clients[node](packet, usual) if packet.kind == "round" else usual
            if found == "late":
                self.late.append(Reply(node, usual))
                found = None
            replies.append(Reply(node, found, "late" if found is None else ""))
        return replies

    def usual(self, node, packet):
        if packet.kind == "hello":
            has = np.array(self.has.get(node, [1] * 4), "uint8")
            arrays = {"order": np.arange(4, dtype="int32"), "has": has}
            return Packet("hello", arrays, {"number": node, "inputs": [3], "public": 1})
        now = {"round": packet.numbers["round"]}
        if packet.kind == "finish":
            return Packet(
                "report", {}, {**now, "before": 0.1, "alone": 0.5, "after": 0.6, "kept": 1}
            )
        rows = packet.arrays["ask"]
        answers = ANSWERS[node][rows].astype("float16")
        return Packet("answers", {"rows": rows, "answers": answers}, now)


def honest(packet, usual):
    return usual


def replaced(**arrays):
    return lambda packet, usual: Packet(
        usual.kind,
        {**usual.arrays, **{k: v(usual.arrays[k]) for k, v in arrays.items()}},
        usual.numbers,
    )


def student():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])


def server(folder, method=None, expected=3, **options):
    settings = {"aggregate": "mean", "noise": None, "names": None, "seed": 0, **options}
    method = method or federated.DSFL(student_epochs=1)
    return Server(
        Plan(
            public=Public(X), method=method, folder=folder, expected=expected, student=student,
            **settings,
        )
    )  # fmt: skip


def told(link, step):
    """What the clients were told in a step, by the row."""
    packet = next(p for _, p in link.sent if p.numbers.get("round") == step)
    return packet.arrays["told_rows"], packet.arrays["told"], packet.arrays["known"]


def test_what_is_told_is_the_joined_answers_by_row(tmp_path):
    shuffled = replaced(rows=lambda r: r[::-1].copy(), answers=lambda a: a[::-1].copy())
    link = Scripted(honest, shuffled, honest, has={2: [1, 0, 0, 1]})
    history = server(tmp_path).run(link, 2, 10)
    rows, consensus, known = told(link, 2)
    p = ANSWERS[:3, rows].astype("float16").astype("float64")
    mean = p.mean(0)
    mean[:, 1:3] = p[:2, :, 1:3].mean(0)
    wanted = scipy.special.softmax(mean / mean.sum(-1, keepdims=True) / 0.1, -1)
    np.testing.assert_allclose(consensus, wanted, atol=1e-3)
    assert known.all()
    assert history.rounds[0]["answered"] == [0, 1, 2]
    assert not history.events
    # Rows that were not asked about yet come first.
    asked = [set(p.arrays["ask"]) for n, p in link.sent if p.kind == "round" and n == 0]
    assert not asked[0] & asked[1]


def test_bytes_are_those_of_the_packets(tmp_path):
    link = Scripted(honest, honest, honest)
    history = server(tmp_path).run(link, 2, 10)
    up = sum(link.usual(node, packet).nbytes for node, packet in link.sent)
    assert history.bytes_down == sum(packet.nbytes for _, packet in link.sent)
    assert history.bytes_up == up
    assert history.messages == 2 * len(link.sent) == 2 * 3 * 4
    assert json.loads((tmp_path / HISTORY).read_text())["bytes_up"] == up


ROW, GREETED = np.arange(4, dtype="int32"), {"number": 1, "inputs": [3], "public": 1}


def nan(answers):
    answers[0, 0] = np.nan
    return answers


def other(kind=None, arrays=None, **numbers):
    """A reply of another kind, or with more in it."""
    return lambda packet, usual: Packet(
        kind or usual.kind,
        {**({} if kind else usual.arrays), **(arrays or {})},
        {**usual.numbers, **numbers},
    )


LIES = {
    "nan": (replaced(answers=nan), "rejected", "not finite"),
    "constant": (replaced(answers=lambda a: np.full_like(a, 0.25)), "rejected", "constant"),
    "shape": (replaced(answers=lambda a: a[:, :3]), "rejected", "shape"),
    "fewer": (replaced(answers=lambda a: a[:5], rows=lambda r: r[:5]), "rejected", "shape"),
    "dtype": (replaced(answers=lambda a: a.astype("float64")), "rejected", "float16"),
    "other rows": (replaced(rows=lambda r: r + 1), "rejected", "other rows"),
    "twice": (replaced(rows=lambda r: np.full_like(r, r[0])), "rejected", "other rows"),
    "sum": (replaced(answers=lambda a: a * 3), "rejected", "no probabilities"),
    "weights": (other(arrays={"kernel": X}), "rejected", "kernel"),
    "kind": (other("rows", {"x": X}), "rejected", "'rows'"),
    "fails": (other("failed", error="OSError"), "failed", "OSError"),
    "bytes": (other(secret=b"x"), "rejected", "`secret`"),
    "list": (replaced(answers=lambda a: a.tolist()), "rejected", "Received: list"),
    "epsilon": (other(epsilon=np.inf), "rejected", "`epsilon`"),
    "early": (other("failed", error="OSError", round=0), "failed", "OSError"),
    "greets": (lambda p, u: Packet("hello", {"order": ROW}, GREETED), "rejected", "`hello`"),
    "late": (lambda p, u: "late", "late", "in time"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_client_that_lies_or_fails_is_told_of_and_stops_nothing(tmp_path, lie):
    act, what, why = LIES[lie]
    link = Scripted(honest, act, honest)
    history = server(tmp_path).run(link, 2, 10)
    assert [row["answered"] for row in history.rounds] == [[0, 2], [0, 2]]
    first = [e for e in history.events if e["round"] == 1]
    assert [(e["client"], e["what"]) for e in first] == [(1, what)]
    assert why in first[0]["why"]
    rows, consensus, _ = told(link, 2)
    p = ANSWERS[[0, 2]][:, rows].astype("float16").astype("float64").mean(0)
    wanted = scipy.special.softmax(p / p.sum(-1, keepdims=True) / 0.1, -1)
    np.testing.assert_allclose(consensus, wanted, atol=1e-3)


def test_answers_that_come_in_the_next_round_are_left_out_of_it(tmp_path):
    calls = []

    def once(packet, usual):
        calls.append(packet)
        return "late" if len(calls) == 1 else usual

    link = Scripted(honest, once, honest)
    history = server(tmp_path).run(link, 2, 10)
    assert [row["answered"] for row in history.rounds] == [[0, 2], [0, 1, 2]]
    assert [(e["round"], e["what"]) for e in history.events] == [(1, "late"), (2, "late")]
    assert "left out" in history.events[1]["why"]


class Slow(Scripted):
    """The reply of client 1 to its first greetings comes in the next exchange."""

    def __init__(self, *clients, times):
        super().__init__(*clients)
        self.times, self.held = times, []

    def exchange(self, packets):
        found, replies, self.held = super().exchange(packets), self.held, []
        for reply in found:
            if reply.node == 1 and packets[1].kind == "hello" and self.times:
                self.times -= 1
                self.held.append(reply)
                reply = Reply(1, None, "late")
            replies.append(reply)
        return replies


@pytest.mark.parametrize("times", [1, 2])
def test_a_greeting_that_is_answered_late_is_answered(tmp_path, times):
    history = server(tmp_path).run(Slow(honest, honest, honest, times=times), 2, 10)
    assert [row["answered"] for row in history.rounds] == [[0, 1, 2]] * 2
    assert [(e["client"], e["what"]) for e in history.events] == [(1, "late")] * times


def test_the_second_answer_of_a_client_does_not_count(tmp_path):
    link = Scripted(honest, honest)
    exchange = link.exchange

    def twice(packets):
        replies = exchange(packets)
        return [*replies, replies[0], Reply(77, replies[0].packet)]

    link.exchange = twice
    leader = server(tmp_path, expected=2)
    history = leader.run(link, 1, 10)
    assert history.rounds[0]["answered"] == [0, 1]
    assert history.per_client[0]["answered"] == 1
    assert [(e["client"], e["what"]) for e in history.events] == [(0, "rejected")]
    assert "answered twice" in history.events[0]["why"]


def test_a_client_that_comes_back_as_another_node_takes_its_place(tmp_path):
    link = Scripted(honest, honest, honest)
    usual = link.usual
    link.usual = lambda node, packet: usual(node % 10, packet)
    link.clients[11] = honest
    nodes = [[0, 1, 2], [0, 1, 11, 2], [0, 2, 11], [0, 2, 11]]
    link.nodes = lambda: nodes[0]

    def moves(packet, reply):
        nodes.pop(0)
        return reply

    link.clients[0] = moves
    history = server(tmp_path).run(link, 3, 8)
    # In the second round the old node has not been missed yet.
    assert [row["answered"] for row in history.rounds] == [[0, 1, 2]] * 3
    assert [(e["round"], e["client"]) for e in history.events] == [(2, 1)]
    assert "number of another one" in history.events[0]["why"]
    assert [row["answered"] for row in history.per_client] == [3, 3, 3]


def test_clients_without_numbers_get_those_that_are_free(tmp_path):
    link = Scripted(honest, honest, honest)
    usual, failed = link.usual, []

    def unnumbered(node, packet):
        reply = usual(node, packet)
        if packet.kind != "hello":
            return reply
        if not node and not failed:
            failed.append(packet)
            return Packet("failed", {}, {"round": 0, "error": "OSError"})
        return Packet("hello", reply.arrays, {**reply.numbers, "number": packet.numbers["number"]})

    link.usual = unnumbered
    history = server(tmp_path).run(link, 1, 10)
    assert history.rounds[0]["answered"] == [0, 1, 2]


@pytest.mark.parametrize(
    "said", [{"kept": 0}, {"kept": 1, "after": 0.1, "alone": 0.9}, {"kept": 0, "after": 0.5}]
)
def test_a_report_that_contradicts_itself_is_told_of(tmp_path, said):
    link = Scripted(honest, honest)
    usual = link.usual

    def report(node, packet):
        if packet.kind == "finish" and node == 1:
            return Packet("report", {}, {"round": packet.numbers["round"], **said})
        return usual(node, packet)

    link.usual = report
    history = server(tmp_path, expected=2).run(link, 1, 10)
    assert [(e["client"], e["what"]) for e in history.events] == [(1, "rejected")]
    assert [row["kept"] for row in history.per_client] == ["federated", None]
    assert (tmp_path / STUDENT).exists()


def test_answers_that_drown_since_so_few_came_are_left_out(tmp_path):
    noise = federated.Gaussian(0.25, 1e-5, 100.0)
    limit = privacy.tolerable(4)
    assert privacy.left(noise, 3, 10) < limit < privacy.left(noise, 1, 10)
    fails = other("failed", error="OSError")

    def later(packet, usual):
        act = fails if packet.numbers["round"] == 1 else noisy
        return act(packet, usual)

    noisy = other(epsilon=1.0)
    link = Scripted(noisy, later, later)
    history = server(tmp_path, noise=noise).run(link, 2, 10)
    assert [row["answered"] for row in history.rounds] == [[], [0, 1, 2]]
    told = [(e["client"], e["what"]) for e in history.events]
    assert told == [(1, "failed"), (2, "failed"), (0, "drowned")]
    packets = [p for n, p in link.sent if p.kind == "round" and n == 0]
    assert not any("told" in packet.arrays for packet in packets)
    assert [row["epsilon"] for row in history.per_client] == [1.0] * 3
    # One that does not tell what it spent is left out; so few clients are not even asked.
    silent = server(tmp_path / "silent", noise=noise).run(Scripted(honest, noisy, noisy), 1, 10)
    assert silent.rounds[0]["answered"] == [1, 2]
    alone = Scripted(noisy)
    with pytest.raises(ValueError, match="mean of 1 clients"):
        server(tmp_path / "alone", noise=noise).run(alone, 1, 10)
    assert {packet.kind for _, packet in alone.sent} == {"hello"}


def test_a_client_that_goes_is_told_of_and_one_that_comes_is_greeted(tmp_path):
    link = Scripted(honest, honest)

    def goes(packet, usual):
        if packet.numbers["round"] == 1:
            link.clients[2] = honest
            link.nodes = lambda: [0, 2]
        return usual

    link.clients[1] = goes
    history = server(tmp_path).run(link, 2, 10)
    assert [row["answered"] for row in history.rounds] == [[0, 1], [0, 2]]
    assert ("absent", 1) in [(e["what"], e["client"]) for e in history.events]


def test_nobody_answers(tmp_path):
    link = Scripted(*[lambda p, u: Packet("failed", {}, {**u.numbers, "error": "MemoryError"})] * 2)
    leader = server(tmp_path)
    with pytest.raises(RuntimeError, match="No client has answered in 2 rounds.*MemoryError"):
        leader.run(link, 2, 10)
    with pytest.raises(RuntimeError, match="None is connected"):
        server(tmp_path / "empty").run(Scripted(), 2, 10)
    # The next attempt does not take the empty rounds for finished ones.
    history = server(tmp_path).run(Scripted(honest, honest, honest), 2, 10)
    assert [row["answered"] for row in history.rounds] == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"order": np.array([1, 0, 2, 3], "int32")}, "client 1 has other classes.*'b'.*'a'"),
        ({"order": np.array([0, 1, 2, -1], "int32")}, "does not know"),
        ({"order": np.arange(5, dtype="int32"), "has": np.ones(5, "uint8")}, "5 outputs"),
        ({"inputs": [4]}, "reads rows of shape"),
        ({"inputs": [3, 1]}, "reads rows of shape"),
        ({"public": 0}, "other public rows"),
        ({"number": 0}, "partition-id"),
        # Nothing would be left to join, and 0 / 0 is NaN.
        ({"has": np.zeros(4, "uint8")}, "rows of none of the classes"),
    ],
)
def test_clients_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path, change, match):
    link = Scripted(honest, honest, honest)
    usual = link.usual

    def greeting(node, packet):
        reply = usual(node, packet)
        if packet.kind != "hello" or node != 1:
            return reply
        arrays = {k: change.get(k, v) for k, v in reply.arrays.items()}
        return Packet("hello", arrays, {k: change.get(k, v) for k, v in reply.numbers.items()})

    link.usual = greeting
    leader = server(tmp_path, names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=match):
        leader.run(link, 2, 10)
    assert {p.kind for _, p in link.sent} == {"hello"}
    assert not list(tmp_path.iterdir())
    # Once it is mended, the same server goes on.
    link.usual = usual
    assert len(leader.run(link, 1, 10).rounds) == 1


def test_killed_between_any_two_packets_and_run_again(tmp_path):
    """Each attempt gets one packet further; the question of a round is the same each time."""

    class KilledError(Exception):
        pass

    whole = Scripted(honest, honest, honest)
    wanted = server(tmp_path / "whole").run(whole, 2, 10)
    questions = {}
    for limit in (1, 2, 3, 4):
        link = Scripted(honest, honest, honest)
        exchange, calls = link.exchange, []

        def killed(packets, exchange=exchange, calls=calls, limit=limit):
            calls.append(1)
            if len(calls) == limit:
                raise KilledError
            return exchange(packets)

        link.exchange = killed
        with pytest.raises(KilledError):
            server(tmp_path / "killed").run(link, 2, 10)
        for _, packet in link.sent:
            if packet.kind == "round":
                again = questions.setdefault(packet.numbers["round"], packet.arrays["ask"])
                np.testing.assert_array_equal(again, packet.arrays["ask"])
        if limit == 3:
            # Two packets got through: the greeting and one round, which is not run again.
            break
    link = Scripted(honest, honest, honest)
    found = server(tmp_path / "killed").run(link, 2, 10)
    assert len(found.rounds) == 2
    assert [r["answered"] for r in found.rounds] == [r["answered"] for r in wanted.rounds]
    steps = {p.numbers["round"] for _, p in link.sent if p.kind == "round"}
    assert steps == {2}
    # A finished one is not run again at all.
    link = Scripted(honest, honest, honest)
    assert server(tmp_path / "killed").run(link, 2, 10).as_dict()["rounds"] == found.rounds
    assert {p.kind for _, p in link.sent} == {"hello"}


def test_a_folder_of_another_federation_is_refused(tmp_path):
    server(tmp_path).run(Scripted(honest, honest, honest), 1, 10)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(ValueError, match="`aggregate` was 'mean' and is 'median'"):
        server(tmp_path, aggregate="median").prepare()
    with pytest.raises(ValueError, match="`method`"):
        server(tmp_path, federated.FedMD()).prepare()
    with pytest.raises(ValueError, match="`clients`"):
        server(tmp_path, expected=4).prepare()
    assert (tmp_path / STATE).read_bytes() == before
    (tmp_path / STATE).write_bytes(before[:100])
    with pytest.raises(ValueError, match="npz"):
        server(tmp_path).prepare()


def test_logits_of_classes_that_nobody_has_are_no_targets(tmp_path):
    link = Scripted(honest, honest, has={0: [1, 1, 0, 0], 1: [1, 0, 0, 0]})
    leader = server(tmp_path, federated.FedMD(student_epochs=1), expected=2)
    leader.run(link, 2, 10)
    rows, consensus, known = told(link, 2)
    np.testing.assert_array_equal(known, [1, 1, 0, 0])
    assert not consensus[:, 2:].any()
    p = ANSWERS[:2, rows].astype("float16").astype("float64")
    np.testing.assert_allclose(consensus[:, 0], p[:, :, 0].mean(0), atol=1e-3)
    np.testing.assert_allclose(consensus[:, 1], p[0, :, 1], atol=1e-3)


def test_clients_of_feddf_are_told_what_the_student_answers(tmp_path):
    link = Scripted(honest, honest)
    leader = server(tmp_path, federated.FedDF(student_epochs=2, batch_size=4), expected=2)
    leader.run(link, 1, 20)
    packet = next(p for _, p in link.sent if p.kind == "finish")
    wanted = leader.learner.model(X[packet.arrays["told_rows"]])
    np.testing.assert_allclose(packet.arrays["told"], wanted, atol=2e-3)
