"""Federations of small clients in one process: what crosses, what is kept, what is refused."""

import ast
import importlib
import importlib.util
import json
import os
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from small_federations import (
    CLASSES,
    FEATURES,
    METHOD,
    client,
    maker,
    makers,
    model,
    public,
    rows,
    student,
)

from keras_kd import federated
from keras_kd.federated import border, privacy
from keras_kd.federated import engine as engine_module
from keras_kd.federated.border import Packet
from keras_kd.federated.client import made
from keras_kd.federated.engines import InProcess
from keras_kd.federated.site import ERROR, MODEL, REPORT, Place, Site
from keras_kd.utils import archives

TEST = rows(200, 200)


class Watched(InProcess):
    """Keeps every packet that crosses."""

    def __init__(self):
        super().__init__()
        self.crossed = []

    def run(self, serve, places):
        def watched(link):
            exchange = link.exchange

            def both(packets):
                self.crossed += [("down", packet) for packet in packets.values()]
                replies = exchange(packets)
                self.crossed += [("up", reply.packet) for reply in replies]
                return replies

            link.exchange = both
            return serve(link)

        return super().run(watched, places)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A federation of two rounds, and what crossed in it."""
    folder = tmp_path_factory.mktemp("fed")
    engine = Watched()
    method = federated.DSFL(**METHOD)
    federation = federated.Federation(makers(), public(), method, engine, folder, student=student())
    history = federation.fit(rounds=3, queries=40, validation_data=TEST, verbose=0)
    return federation, history, engine, folder


def test_the_student_learns_what_no_client_knows_alone(finished):
    federation, history, _, folder = finished
    # Each client knows three classes of four, a quarter of the rows is beyond it.
    assert history.rounds[-1]["student_accuracy"] > 0.85
    student = federation.student
    assert isinstance(student, keras.Model)
    assert {type(layer).__module__.split(".")[0] for layer in student.layers} == {"keras"}
    again = keras.saving.load_model(folder / "student.keras", safe_mode=True)
    np.testing.assert_allclose(again(TEST[0]), student(TEST[0]), atol=1e-6)


def test_every_packet_is_on_the_list_and_holds_nothing_else(finished):
    _, history, engine, _ = finished
    crossed = engine.crossed
    assert len(crossed) == history.messages == 2 * 3 * 5
    private = [client(i) for i in range(3)]
    weights = {tuple(w.shape) for c in private for w in c.model.weights}
    values = {float(v) for c in private for v in c.x.ravel()}
    for way, packet in crossed:
        border.check(packet, border.UP if way == "up" else border.DOWN, {"classes": CLASSES})
        for name, array in packet.arrays.items():
            assert array.shape[0] in (40, CLASSES), name
            assert array.dtype in ("int32", "uint8", "float16"), name
            assert tuple(array.shape) not in weights - {(CLASSES,)}, name
            assert not values & set(array.astype("float64").ravel().tolist()) - {0.0, 1.0}, name
    assert history.bytes_up == sum(p.nbytes for way, p in crossed if way == "up")
    assert history.bytes_down == sum(p.nbytes for way, p in crossed if way == "down")
    masks = [p.arrays["has"].tolist() for w, p in crossed if w == "up" and p.kind == "hello"]
    assert masks == [[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]


def test_each_client_is_told_how_it_fared(finished):
    _, history, _, folder = finished
    assert [row["client"] for row in history.per_client] == [0, 1, 2]
    for row in history.per_client:
        assert row["alone"] > row["before"]
        assert row["kept"] == ("federated" if row["after"] >= row["alone"] else "alone")
        assert row["answered"] == 3
        kept = keras.saving.load_model(folder / "clients" / str(row["client"]) / MODEL)
        held = client(row["client"]).validation
        accuracy = (np.argmax(kept(held[0]), -1) == held[1]).mean()
        assert accuracy == pytest.approx(max(row["alone"], row["after"]))
    assert "before %" in history.table()
    said = json.loads((folder / "history.json").read_text())
    assert said["per_client"] == history.per_client
    assert history.epsilon is None


def test_the_random_state_of_the_process_stays(tmp_path):
    np.random.seed(3)
    before = np.random.get_state(legacy=True)[1].copy()
    x, y = rows(0, 20)
    federated.Federation([lambda: (MODELS["one"], x, y)], public(), folder=tmp_path,
                         student=MODELS["other"]).fit(1, 10, verbose=0)  # fmt: skip
    np.testing.assert_array_equal(np.random.get_state(legacy=True)[1], before)


MODELS = {"one": model("logits", 1), "other": model("logits", 2)}


def test_a_second_fit_goes_on_and_the_same_program_passes_over(tmp_path):
    def made():
        return federated.Federation(
            makers()[:1], public(), folder=tmp_path, student=model("logits")
        )

    federation = made()
    assert len(federation.fit(1, 20, verbose=0).rounds) == 1
    assert len(federation.fit(1, 20, verbose=0).rounds) == 2
    spent = federation.history.bytes_up
    again = made()
    assert len(again.fit(1, 20, verbose=0).rounds) == 2
    assert len(again.fit(1, 20, verbose=0).rounds) == 2
    # It was greeted twice more, and asked about nothing.
    assert again.history.bytes_up < 1.5 * spent
    np.testing.assert_allclose(again.student(TEST[0]), federation.student(TEST[0]), atol=1e-6)


def test_whoever_is_worse_off_with_the_others_is_told_and_keeps_its_own(tmp_path):
    """The others' rows have their classes the wrong way round."""
    x, y = rows(1, 80)

    def wrong(seed):
        def make():
            u, v = rows(seed, 80)
            return federated.Client(model("compiled", seed), u, CLASSES - 1 - v, epochs=8,
                                    batch_size=10, validation_split=0)  # fmt: skip

        return make

    def victim():
        return federated.Client(model("compiled", 5), x, y, epochs=1, batch_size=20)

    federation = federated.Federation(
        [victim, wrong(3), wrong(4)], public(), federated.DSFL(epochs=40, learning_rate=0.05),
        folder=tmp_path, student=model("logits"),
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"worse than training alone for clients \[0\]"):
        history = federation.fit(2, 60, verbose=0)
    row = history.per_client[0]
    assert row["after"] < row["alone"]
    assert row["kept"] == "alone"
    assert history.worse == [0]
    assert [e["client"] for e in history.events if e["what"] == "worse"] == [0]
    kept = keras.saving.load_model(tmp_path / "clients" / "0" / MODEL)
    held = victim().validation
    assert (np.argmax(kept(held[0]), -1) == held[1]).mean() == pytest.approx(row["alone"])
    # Those without rows to measure themselves on say nothing.
    assert history.per_client[1]["after"] is None


def test_a_client_that_fails_leaves_its_words_at_home(tmp_path):
    def fails():
        raise OSError("the file of patient 17 is damaged")

    federation = federated.Federation([fails, maker(1)], public(), folder=tmp_path)
    history = federation.fit(1, 20, verbose=0)
    assert history.rounds[0]["answered"] == [1]
    assert {(e["client"], e["what"]) for e in history.events} == {(0, "failed")}
    assert not any("patient" in e["why"] for e in history.events)
    assert [(row["client"], row["answered"]) for row in history.per_client] == [(0, 0), (1, 1)]
    assert "patient 17" in (tmp_path / "clients" / "0" / ERROR).read_text()


# ------------------------------------------------------------------------ the side of a client

SETTINGS = {"run": 5, "number": 0, "seed": 0, **federated.DSFL(batch_size=20).settings()}


def question(number, rows_asked, **more):
    ask = np.asarray(rows_asked, "int32")
    return Packet("round", {"ask": ask}, {**SETTINGS, "round": number, **more})


def site(folder, number=0):
    return Site(Place(maker(number, public=public()), str(folder), number))


def test_a_question_that_comes_again_gets_the_same_reply(tmp_path):
    first = site(tmp_path).answer(question(1, range(10)))
    again = site(tmp_path).answer(question(1, range(10)))
    assert first.kind == again.kind == "answers"
    np.testing.assert_array_equal(first.arrays["answers"], again.arrays["answers"])
    # A process that goes on and one that was started anew train alike.
    here = site(tmp_path / "other")
    here.answer(question(1, range(10)))
    told = {
        "told_rows": np.arange(10, dtype="int32"),
        "told": first.arrays["answers"],
        "known": np.ones(CLASSES, "uint8"),
    }
    asked = question(2, range(5, 15))
    packet = Packet("round", {**asked.arrays, **told}, asked.numbers)
    found = [each.answer(packet).arrays["answers"] for each in (here, site(tmp_path))]
    np.testing.assert_allclose(*found, atol=2e-3)


def test_a_client_answers_no_unknown_packet(tmp_path):
    here = site(tmp_path)
    for packet in (
        Packet("weights", {}, {}),
        question(1, [0, 999]),
        question(1, [-1]),
        Packet("round", {"ask": np.arange(3)}, {**SETTINGS, "round": 1}),
        question(1, [0], method="fedavg"),
    ):
        reply = here.answer(packet)
        assert reply.kind == "failed"
        assert set(reply.numbers) == {"round", "error", "number"}
    assert here.answer(question(1, [0, 1])).kind == "answers"


def counted(multipliers, delta):
    return sum(1 / z for z in multipliers)


def test_noise_is_added_before_answers_leave_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", counted)
    noise = federated.Gaussian(0.5, 1e-5, 5.0).settings()
    exact = site(tmp_path / "exact").answer(question(1, range(60)))
    here = site(tmp_path / "noisy")
    noisy = here.answer(question(1, range(60), **noise))
    assert set(noisy.arrays) == {"rows", "answers"}
    assert noisy.numbers == {"round": 1, "epsilon": 2.0}
    difference = noisy.arrays["answers"].astype("float64") - exact.arrays["answers"]
    # 240 normal values: the standard deviation is known to 5 %.
    assert difference.std() == pytest.approx(0.5 * np.sqrt(2 * 60), rel=0.25)
    # Asked again, it sends the same noise, which costs nothing more.
    again = site(tmp_path / "noisy").answer(question(1, range(60), **noise))
    np.testing.assert_array_equal(again.arrays["answers"], noisy.arrays["answers"])
    assert again.numbers["epsilon"] == 2.0
    assert here.answer(question(2, range(60), **noise)).numbers["epsilon"] == 4.0
    # The next one would cost 6, and is not sent; nor are accuracies.
    assert here.answer(question(3, range(60), **noise)).kind == "spent"
    report = here.answer(Packet("finish", {}, {**SETTINGS, "round": 4, **noise}))
    assert report.numbers == {"round": 4, "epsilon": 4.0}
    assert "after" in json.loads((tmp_path / "noisy" / REPORT).read_text())


def test_a_client_answers_with_no_less_noise_than_it_wants(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", counted)
    least = federated.Gaussian(1.0, 1e-5, 5.0)
    own = {"public": public(), "privacy": least}
    here = Site(Place(maker(0, **own), str(tmp_path), 0))
    for number, noise in enumerate(
        ({}, {"noise_multiplier": 0.5}, {"delta": 1e-3}, {"max_epsilon": 6.0}), start=1
    ):
        settings = {**least.settings(), **noise} if noise else {}
        assert here.answer(question(number, range(10), **settings)).kind == "failed"
    greeting = {"run": 1, "number": 0, "outputs": 4, "inputs": [4], "public": [1, 1]}
    assert here.answer(Packet("hello", {}, {**greeting, "private": 0})).kind == "failed"
    assert here.answer(Packet("hello", {}, {**greeting, "private": 1})).kind == "hello"
    stronger = {**least.settings(), "noise_multiplier": 2.0}
    assert here.answer(question(5, range(10), **stronger)).kind == "answers"
    # Its ledger is gone, which the state knows.
    (tmp_path / "ledger.json").unlink()
    assert here.answer(question(6, range(10), **stronger)).kind == "failed"
    assert "was spent" in (tmp_path / ERROR).read_text()


def test_a_private_federation_sends_neither_classes_nor_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", counted)
    engine = Watched()
    noise = federated.Gaussian(0.05, 1e-5, 100.0)
    federation = federated.Federation(
        makers(), public(), engine=engine, folder=tmp_path, privacy=noise, student=model("logits")
    )
    history = federation.fit(2, 10, verbose=0)
    up = [packet for way, packet in engine.crossed if way == "up"]
    assert {name for p in up for name in p.arrays} == {"order", "rows", "answers"}
    assert not {name for p in up for name in p.numbers} & {"before", "alone", "after"}
    assert history.epsilon == pytest.approx(40.0)
    assert [row["epsilon"] for row in history.per_client] == pytest.approx([40.0] * 3)
    # They were read from the folders of the clients, which lie on this machine.
    assert all(row["after"] is not None for row in history.per_client)


def test_too_much_noise_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", counted)
    engine = Watched()

    def made(noise):
        return federated.Federation(
            makers(), public(), engine=engine, folder=tmp_path, privacy=noise,
            student=model("logits"),
        )  # fmt: skip

    with pytest.raises(ValueError, match="drown.*sqrt"):
        made(federated.Gaussian(10.0, 1e-5, 2.0)).fit(2, 40)
    with pytest.raises(ValueError, match="1 rounds are within it"):
        made(federated.Gaussian(0.05, 1e-5, 25.0)).fit(2, 10)
    assert not engine.crossed
    for method in (federated.FedMD(), federated.FedDF()):
        with pytest.raises(ValueError, match="sends logits, which have no bounds"):
            federated.Federation(
                makers(), public(), method, privacy=federated.Gaussian(10.0, 1e-5, 2.0)
            )


# ------------------------------------------------------------------------ bad input


def scheduled():
    found = model("logits")
    rate = keras.optimizers.schedules.CosineDecay(0.1, 10)
    found.compile(keras.optimizers.Adam(rate), "mse")
    return found


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"clients": []}, ValueError, "no clients"),
        ({"clients": 0}, ValueError, "clients"),
        ({"clients": None}, TypeError, "list of functions"),
        ({"clients": [model("logits")]}, TypeError, "no function"),
        ({"clients": [3]}, TypeError, "no function"),
        ({"clients": 3}, ValueError, "student="),
        ({"public": "x"}, TypeError, "public"),
        ({"public": np.zeros((0, 4))}, ValueError, "public"),
        ({"public": np.full((5, 4), np.nan)}, ValueError, "NaN"),
        ({"public": (public(), np.zeros(3, int))}, ValueError, "60 rows"),
        ({"method": federated.DSFL}, TypeError, "not the class"),
        ({"method": "dsfl"}, TypeError, "method"),
        ({"method": federated.FedMD(pretrain=2)}, ValueError, "public` has no labels"),
        ({"engine": "flower"}, TypeError, "engine"),
        ({"aggregate": "medain"}, ValueError, "Did you mean 'median'"),
        ({"privacy": 3.0}, TypeError, "privacy"),
        ({"student": "x"}, TypeError, "student"),
        ({"student": keras.Sequential([keras.layers.Dense(3)])}, ValueError, "not built"),
        ({"classes": ["a", "a", "b", "c"]}, ValueError, "twice"),
        ({"classes": "abcd"}, TypeError, "`classes` lists the names"),
        ({"method": 0}, TypeError, "`method` is one like"),
        ({"engine": ""}, TypeError, "`engine` is one like"),
        ({"public": np.ones((9, 4))}, ValueError, "one row 9 times"),
        ({"public": np.ma.masked_less(public(), 0)}, ValueError, "are masked"),
        ({"method": federated.FedDF(), "student": scheduled()}, ValueError, "a schedule of its"),
    ],
)
def test_bad_arguments_get_one_clear_error(arguments, error, match):
    given = {"clients": [maker(0)], "public": public(), **arguments}
    with pytest.raises(error, match=match):
        federated.Federation(**given)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rounds": 0}, ValueError, "rounds"),
        ({"rounds": 1.5}, TypeError, "rounds"),
        ({"queries": 0}, ValueError, "queries"),
        ({"queries": 61}, ValueError, "60"),
        ({"validation_data": TEST[0]}, TypeError, "pair"),
        ({"validation_data": (TEST[0][:, :2], TEST[1])}, ValueError, r"have shape \(2,\)"),
        ({"validation_data": (TEST[0], TEST[1] + 9)}, ValueError, "the student has 4, numbered"),
        ({"verbose": "loud"}, ValueError, "verbose"),
    ],
)
def test_bad_arguments_of_fit(arguments, error, match):
    federation = federated.Federation([maker(0)], public(), student=model("logits"))
    with pytest.raises(error, match=match):
        federation.fit(**{"rounds": 1, "queries": 10, **arguments})
    assert list(federation.folder.iterdir()) == []


def other_client(**changed):
    x, y = rows(0, 30)
    given = {"model": model("logits"), "x": x, "y": y, **changed}
    return lambda: federated.Client(**given)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"x": {"a": 1}}, TypeError, "array of rows"),
        ({"y": np.zeros((30, 4))}, ValueError, "argmax"),
        ({"y": np.zeros(29, int)}, ValueError, "29"),
        ({"y": np.full(30, -1)}, ValueError, "from zero"),
        ({"y": np.ma.masked_equal(np.arange(30) % 4, 2)}, ValueError, "7 values.*are masked"),
        ({"validation_split": 1.0}, ValueError, "validation_split"),
        ({"validation_data": 3}, TypeError, "pair"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"model": "m"}, TypeError, "model of a client"),
        ({"classes": "abcd"}, TypeError, "`classes` lists the names"),
        ({"privacy": 3.0}, TypeError, "`privacy` is one like"),
    ],
)
def test_bad_clients(changed, error, match):
    with pytest.raises(error, match=match):
        other_client(**changed)()


def wide(units=CLASSES, features=FEATURES, end=None):
    return keras.Sequential([keras.Input((features,)), keras.layers.Dense(units, activation=end)])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (other_client(model=wide(7)), "7 outputs, and the student has 4"),
        (other_client(classes=["b", "a", "c", "d"]), "other classes or another order.*'b'"),
        (other_client(classes=["a", "b", "c", "x"]), "does not know"),
        (other_client(model=wide(4, 3), x=np.zeros((30, 3), "float32")), "reads rows of shape"),
        (other_client(public=public(50)), "other public rows"),
    ],
)
def test_clients_that_do_not_fit_together(tmp_path, make, match):
    federation = federated.Federation(
        [maker(0), make], public(), folder=tmp_path, student=model("logits"), classes=list("abcd")
    )
    with pytest.raises(ValueError, match=f"client 1 .*{match}"):
        federation.fit(1, 10, verbose=0)
    assert not list(tmp_path.glob("*.npz")) or [p.name for p in tmp_path.glob("*.npz")] == [
        "public.npz"
    ]


def test_clients_that_name_their_classes_otherwise_are_told_apart(tmp_path):
    # The federation names none, so that nobody else would compare them.
    makes = [other_client(classes=list(names)) for names in ("abcd", "abcd", "bacd")]
    federation = federated.Federation(makes, public(), folder=tmp_path, student=model("logits"))
    with pytest.raises(ValueError, match="client 2 names other classes.*than client 0"):
        federation.fit(1, 10, verbose=0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (other_client(model=wide(end="sigmoid")), "independent questions"),
        (other_client(model=wide(1)), "independent questions"),
        (other_client(model=wide(3), y=np.full(30, 3)), "label 3.*3 outputs"),
        (other_client(model=wide(4, 3)), "reads rows of shape"),
        (other_client(classes=["a"]), "names 1 classes"),
        (lambda: 5, "`keras_kd.federated.Client`, or"),
    ],
)
def test_clients_that_are_wrong_in_themselves_say_so_at_home(tmp_path, make, match):
    Site(Place(make, str(tmp_path), 0, lambda: None)).answer(
        Packet(
            "hello", {},
            {"run": 1, "number": 0, "outputs": 4, "inputs": [4], "public": [1, 1], "private": 0},
        )
    )  # fmt: skip
    words = (tmp_path / ERROR).read_text()
    assert re.search(match, words), words


def test_two_clients_with_one_model_are_refused(tmp_path):
    one, (x, y) = model("logits"), rows(0, 20)
    federation = federated.Federation(
        [lambda: (one, x, y), lambda: (one, x, y)], public(), folder=tmp_path,
        student=model("logits"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="Clients 0 and 1 have one model"):
        federation.fit(1, 10, verbose=0)


def test_a_client_that_brings_the_student_is_refused(tmp_path):
    one, (x, y) = model("logits"), rows(0, 20)
    federation = federated.Federation(
        [maker(0), lambda: (one, x, y)], public(), folder=tmp_path, student=one
    )
    before = keras.ops.convert_to_numpy(one.weights[0])
    with pytest.raises(ValueError, match="Client 1 brings the student"):
        federation.fit(1, 10, verbose=0)
    np.testing.assert_array_equal(before, keras.ops.convert_to_numpy(one.weights[0]))


def leaves():
    raise SystemExit("patient 17")


def test_a_client_that_ends_the_program_or_cannot_write_is_told_of(tmp_path):
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "2").write_text("no folder")
    federation = federated.Federation(
        [maker(0), leaves, maker(2)], public(), folder=tmp_path, student=model("logits")
    )
    history = federation.fit(1, 10, verbose=0)
    assert history.rounds[0]["answered"] == [0]
    failed = {(e["client"], e["why"].split(";")[0]) for e in history.events if e["client"]}
    assert failed == {(1, "SystemExit"), (2, "FileExistsError")}
    with pytest.raises(RuntimeError, match="client 0 ends the program"):
        federated.Federation([leaves], public()).fit(1, 10)


def test_a_student_that_is_made_here_is_the_same_each_time():
    found = []
    for seed in (3, 3, 4):
        federation = federated.Federation([maker(0)], public(), seed=seed)
        with pytest.raises(ValueError, match="holds the class"):
            federation.fit(1, 10, validation_data=(TEST[0], TEST[1] + 9))
        found.append([keras.ops.convert_to_numpy(w) for w in federation.student.weights])
    one, again, other = found
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])


def test_labels_of_public_rows_that_no_output_stands_for(tmp_path):
    x, y = rows(100, 60)
    federation = federated.Federation(
        [maker(0)], (x, y + 1), federated.FedMD(pretrain=2), folder=tmp_path,
        student=model("logits"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="`public` holds the class 4, where the student has 4"):
        federation.fit(1, 10)
    assert not list(tmp_path.iterdir())


def test_what_a_function_may_return_in_place_of_a_client():
    m, (x, y) = model("logits"), rows(0, 20)
    for found in ((m, x, y), (m, (x, y)), [m, x, y], {"model": m, "x": x, "y": y}):
        made_of = made(lambda found=found: found)
        assert made_of.model is m
        assert len(made_of.y) == 16
    assert len(made(lambda: (m, (x, y), (x[:5], y[:5]))).validation[1]) == 5
    assert len(made(lambda: {"model": m, "x": x, "y": y, "validation_split": 0}).y) == 20
    for found in (None, (m,), (m, x), {"model": m}):
        with pytest.raises(TypeError, match=r"returns a `keras_kd.federated.Client`"):
            made(lambda found=found: found)


def test_two_processes_do_not_share_a_folder(tmp_path):
    from keras_kd.utils import files

    federation = federated.Federation(
        [maker(0)], public(), folder=tmp_path, student=model("logits")
    )
    with files.claimed(tmp_path / ".lock", str), pytest.raises(BlockingIOError, match="at work"):
        federation.fit(1, 10)


def test_importing_the_package_needs_no_flower_and_sets_nothing():
    """Flower is imported in one module, in functions of it."""
    before = dict(os.environ)
    importlib.reload(engine_module)
    assert dict(os.environ) == before
    for path in Path(engine_module.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        everywhere, at_the_top = (
            {name.split(".")[0] for node in nodes for name in _imported(node)}
            for nodes in (ast.walk(tree), tree.body)
        )
        assert not {"flwr", "ray", "dp_accounting"} & at_the_top, path.name
        assert path.name == "engine.py" or not {"flwr", "ray"} & everywhere, path.name


def _imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


def test_without_flower_the_engine_says_what_to_install(tmp_path):
    if importlib.util.find_spec("flwr"):
        pytest.skip("Flower is installed.")
    federation = federated.Federation(
        [maker(0)], public(), engine=federated.Flower(), folder=tmp_path, student=model("logits")
    )
    with pytest.raises(ImportError, match=r"keras_kd\[federated\]"):
        federation.fit(1, 10)


def test_killed_anywhere_and_run_again(tmp_path, monkeypatch):
    """Each attempt is killed at the second state that a client writes, before it does or after."""

    class KilledError(BaseException):
        pass

    def made():
        return federated.Federation(
            makers()[:2], public(), folder=tmp_path, student=model("logits")
        )

    save, calls, attempts = Site._save, [], 0

    def killed(self):
        calls.append(1)
        if len(calls) == 2 and attempts % 2:
            raise KilledError
        save(self)
        if len(calls) == 2:
            raise KilledError

    monkeypatch.setattr(Site, "_save", killed)
    for _ in range(9):
        calls.clear()
        attempts += 1
        try:
            history = made().fit(2, 20, verbose=0)
            break
        except KilledError:
            continue
    assert attempts > 2
    assert [row["answered"] for row in history.rounds] == [[0, 1], [0, 1]]
    assert [row["answered"] for row in history.per_client] == [2, 2]
    for i in range(2):
        found = archives.arrays(tmp_path / "clients" / str(i) / "state.npz")
        assert json.loads(str(found["about"]))["passes"] == 24
    leftovers = [p for p in tmp_path.rglob("*") if ".tmp" in p.name or p.name == ".lock"]
    assert not leftovers
