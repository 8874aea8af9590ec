"""Federations over Flower: its simulation, and a server and clients as processes of their own.

Run by `make federated`; left out where Flower is missing.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest
from small_federations import maker, makers, model, public, rows

from keras_kd import federated
from keras_kd.federated import border, engine, privacy
from keras_kd.federated.border import BorderError, Packet

pytest.importorskip("flwr")

TESTS = Path(__file__).parents[1]
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def packet():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 6).astype("float16")
    return Packet("answers", {"rows": np.arange(6, dtype="int32"), "answers": p}, {"round": 2})


def test_a_packet_comes_back_as_it_was_sent():
    sent = packet()
    record = engine.to_record(sent)
    found = engine.to_packet(record)
    assert found.kind == sent.kind
    assert found.numbers == sent.numbers
    for name, array in sent.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    # The bytes that are told are those of Flower's arrays.
    arrays = sum(len(array.data) for array in record["arrays"].values())
    assert sent.nbytes == arrays + len('{"kind":"answers","round":2}')
    border.check(found, border.UP, {"queries": 6, "classes": 4})


def test_words_beside_the_records_do_not_cross(monkeypatch):
    engine._flower()
    from flwr.app import Array, Message
    from flwr.supercore.task_identity import TaskIdentity

    # What Flower's own processes set, and messages are made with.
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def replaced(**changed):
        record = engine.to_record(packet())
        old = record["arrays"]["answers"]
        parts = {name: getattr(old, name) for name in ("dtype", "shape", "stype", "data")}
        record["arrays"]["answers"] = Array(**{**parts, **changed})
        return record

    data = replaced()["arrays"]["answers"].data
    engine.to_packet(replaced())
    for changed in ({"data": data + b"patient 17"}, {"dtype": "patient 17"}, {"shape": (1, 7)}):
        with pytest.raises(BorderError, match="more than its values"):
            engine.to_packet(replaced(**changed))

    class Grid:
        """One node that replies at once; `change` is what it does to its message."""

        def __init__(self, change):
            self.change = change

        def get_node_ids(self):
            return [5]

        def push_messages(self, messages):
            [self.message] = messages
            vars(self.message.metadata)["_message_id"] = "one"
            return ["one"]

        def pull_messages(self, names):
            reply = Message(engine.to_record(packet()), reply_to=self.message)
            self.change(reply.metadata)
            return [reply]

    for change, wanted in (
        (lambda said: None, ("answers", False)),
        (lambda said: setattr(said, "group_id", "patient 17"), (None, True)),
        (lambda said: setattr(said, "message_type", "train.patient17"), (None, True)),
    ):
        link = engine._GridLink(Grid(change), 1, 5.0, 1.0)
        [reply] = link.exchange({5: Packet("round", {}, {})})
        assert (reply.packet and reply.packet.kind, reply.refused) == wanted


def test_other_records_do_not_cross():
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    def record():
        return engine.to_record(packet())

    more = record()
    more["weights"] = ArrayRecord({"w": Array(np.zeros(3))})
    missing = RecordDict({"arrays": record()["arrays"]})
    other = record()
    other["arrays"] = MetricRecord({"a": 1.0})
    for found in (more, missing, other, RecordDict({})):
        with pytest.raises(BorderError, match="holds the records `arrays` and `numbers`"):
            engine.to_packet(found)
    broken = record()
    broken["arrays"] = ArrayRecord({"rows": Array("int32", (6,), "numpy.ndarray", b"no array")})
    with pytest.raises(BorderError, match="cannot be read"):
        engine.to_packet(broken)
    named = record()
    named["numbers"] = ConfigRecord({"kind": "weights"})
    with pytest.raises(BorderError, match="may not cross"):
        border.check(engine.to_packet(named), border.UP, {})


_SIMULATION = """
import os, sys
assert "FLWR_TELEMETRY_ENABLED" not in os.environ
sys.path.insert(0, {tests!r})
import importlib.util
import json
from small_federations import METHOD, makers, public, rows, student
from keras_kd import federated

def fails():
    raise OSError("patient 17")

def dies_once():
    marker = os.path.join({folder!r}, "died")
    if not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(1)
    return makers()[1]()

if __name__ == "__main__":
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        os.environ.pop(name, None)
    found = []
    for i, which in enumerate((federated.Flower(cpus=1), federated.InProcess())):
        made = federated.Federation(
            [makers()[0], dies_once, makers()[2], fails], public(), federated.DSFL(**METHOD), which,
            os.path.join({folder!r}, str(i)), student=student(),
        )
        history = made.fit(2, 40, validation_data=rows(200, 200), verbose=0)
        found.append(history.as_dict())
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    import flwr.supercore.telemetry as telemetry
    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    print(json.dumps(found))
"""


def test_the_simulation_does_what_happens_in_one_process(tmp_path):
    program = _SIMULATION.format(tests=str(TESTS), folder=str(tmp_path))
    (tmp_path / "program.py").write_text(program)
    outside = {k: v for k, v in os.environ.items() if k not in (*QUIET, "RAY_USAGE_STATS_ENABLED")}
    environment = {**outside, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        capture_output=True, text=True, env=environment, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ray, here_alone = json.loads(done.stdout.strip().splitlines()[-1])
    assert [r["answered"] for r in ray["rounds"]] == [[0, 1, 2], [0, 1, 2]]
    assert ray["bytes_up"] == here_alone["bytes_up"]
    assert ray["bytes_down"] == here_alone["bytes_down"]
    for one, other in zip(ray["per_client"][:3], here_alone["per_client"][:3], strict=True):
        assert one["client"] == other["client"]
        assert one["alone"] == pytest.approx(other["alone"], abs=0.1)
    assert {e["what"] for e in ray["events"]} <= {"failed", "worse"}
    assert {e["client"] for e in ray["events"] if e["what"] == "failed"} == {3}
    assert "patient" not in json.dumps(ray)


# ------------------------------------------------------------------------ deployment

_CLIENT = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
import small_federations
from keras_kd import federated

def make_client():
    with np.load({data!r}) as own:
        x, y = own["x"], own["y"]
    model = small_federations.model({kind!r}, {number})
    return federated.Client(
        model, x, y, epochs=8, batch_size=10, public=small_federations.public()
    )
"""
_SERVER = """
import sys
sys.path.insert(0, {tests!r})
import small_federations
from small_federations import METHOD, student
from keras_kd import federated

def make_federation():
    return federated.Federation(
        3, small_federations.public(), federated.DSFL(**METHOD),
        federated.Flower(timeout=400.0, wait=120.0), {folder!r}, student=student(),
    )
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Processes:
    """Processes that are ended together with all that they started."""

    def __init__(self):
        self.running = []

    def start(self, folder, *command, **variables):
        folder.mkdir(exist_ok=True, parents=True)
        environment = {
            **os.environ, **QUIET, **variables, "FLWR_HOME": str(folder / "flwr"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # Flower finds its own commands by it.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }  # fmt: skip
        log = open(folder / "log.txt", "wb")  # noqa: SIM115
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.running.append(process)
        return process

    def end(self):
        for process in self.running:
            for how in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, how)
                    process.wait(10)
                    break
                except subprocess.TimeoutExpired:
                    continue
                except ProcessLookupError:
                    break


@pytest.fixture
def processes():
    found = Processes()
    yield found
    found.end()


def answers_at(port):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        return True
    except (urllib.error.URLError, OSError):
        return False


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.5)


@pytest.mark.timeout(1500)
def test_a_server_and_three_clients_in_processes_and_folders_of_their_own(tmp_path, processes):
    port, server = free_port(), tmp_path / "server"
    processes.start(
        server, "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    # Of three backends where they are installed.
    backends = ["tensorflow", "jax", "torch" if importlib.util.find_spec("torch") else "tensorflow"]
    for i, kind in enumerate(("logits", "softmax", "compiled")):
        home = tmp_path / f"client_{i}"
        home.mkdir()
        own = maker(i)()
        np.savez(home / "own.npz", x=own.x, y=own.y)
        text = _CLIENT.format(tests=str(TESTS), data=str(home / "own.npz"), kind=kind, number=i)
        (home / "client.py").write_text(text)
        config = f'client="{home}/client.py:make_client" folder="{home}/state" partition-id={i}'
        processes.start(
            home, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
            "--port", str(free_port()), "--node-config", config, KERAS_BACKEND=backends[i],
        )  # fmt: skip
    result = server / "result"
    (server / "server.py").write_text(_SERVER.format(tests=str(TESTS), folder=str(result)))
    app = federated.write_app(server / "app", f"{server}/server.py:make_federation", 2, 40)
    wait_for(lambda: answers_at(port), 240, "The SuperLink did not start.")
    (server / "flwr").mkdir(exist_ok=True)
    (server / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    processes.start(server, "flwr", "run", app, "here")
    logs = lambda: "\n".join(p.read_text()[-2000:] for p in tmp_path.glob("*/log.txt"))  # noqa: E731
    wait_for(lambda: (result / "history.json").exists(), 1200, logs)
    history = json.loads((result / "history.json").read_text())
    assert [row["answered"] for row in history["rounds"]] == [[0, 1, 2], [0, 1, 2]]
    assert [row["client"] for row in history["per_client"]] == [0, 1, 2]
    assert all(row["alone"] is not None for row in history["per_client"])
    assert not [e for e in history["events"] if e["what"] != "worse"]
    found = keras.saving.load_model(result / "student.keras")
    x, y = rows(200, 200)
    assert (np.argmax(found(x), -1) == y).mean() > 0.5
    # What is a client's own lies in its folder, and nowhere else.
    for i in range(3):
        assert (tmp_path / f"client_{i}" / "state" / "model.keras").exists()
    assert not list(server.rglob("own.npz")) + list(server.rglob("state.npz"))


# ------------------------------------------------------------------------ privacy


def test_privacy_is_counted_by_dp_accounting(tmp_path):
    noise = federated.Gaussian(0.05, 1e-5, 1e6)
    federation = federated.Federation(
        makers()[:2], public(), folder=tmp_path, privacy=noise, student=model("logits")
    )
    history = federation.fit(2, 10, verbose=0)
    assert history.epsilon == pytest.approx(privacy.epsilon([0.05, 0.05], 1e-5))
    with pytest.raises(ValueError, match="0 rounds are within it"):
        federated.Federation(
            makers()[:2], public(), privacy=federated.Gaussian(0.05, 1e-5, 1.0),
            student=model("logits"),
        ).fit(2, 10)  # fmt: skip


def test_a_wrong_app_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FILE.py:FUNCTION"):
        federated.write_app(tmp_path, "server.make")
    with pytest.raises(ValueError, match="rounds"):
        federated.write_app(tmp_path, "server.py:make", rounds=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="clients themselves"):
        federated.Federation(2, public(), engine=federated.Flower(), student=model("logits")).fit(
            1, 10
        )
