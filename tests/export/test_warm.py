"""Processes that wait for jobs: one for a program, and each job as if it had one of its own."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import keras_kd.export
from keras_kd.export import warm, worker_pool

DIGITS = Path(keras_kd.__file__).parents[1] / "exported" / "digits"
FILES = ("digits_int8.onnx", "digits_int8.tflite")
linux = pytest.mark.skipif(sys.platform != "linux", reason="jobs are forks on Linux")


def job(**changes):
    content = json.loads((DIGITS / "manifest.json").read_text())
    model = content["model"]
    return {
        "kind": "measure",
        "signature": {key: model[key] for key in ("structure", "inputs", "outputs")},
        "evaluation": str(DIGITS / "evaluation.npz"),
        "kinds": content["evaluation"]["kinds"],
        "stored": content["evaluation"]["stored"],
        "threads": 1,
        "time": 0,
        "targets": [],
        "images": [],
        **changes,
    }


def tasks():
    return [
        {"id": name, "kind": "measure", "format": name[12:], "path": str(DIGITS / name)}
        for name in FILES
    ]


ENDLESS = {"time": 600}
"""A job that times its first file for ten minutes."""


SHARED = warm._POOL
"""Those of the other tests."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Processes of each test alone, without TensorFlow, which end with the test."""
    pool = {}
    monkeypatch.setattr(warm, "_POOL", pool)
    yield
    for server in pool.values():
        server.close()


def pid():
    return warm._POOL["measure"].process.pid


def begun(box, seconds=60):
    end = time.monotonic() + seconds
    while not (box / "began").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return int((box / "began").read_text())


def alive(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(number, seconds=30):
    end = time.monotonic() + seconds
    while alive(number):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def good(results):
    return [results[name].get("error") for name in FILES] == [None, None]


@linux
def test_jobs_share_a_process_and_none_is_that_process(tmp_path, monkeypatch):
    # ONNX Runtime reports to its makers but where it is built and tested, and by a file in here.
    for name in ("CI", "TF_BUILD", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "a"))
    first = pid()
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "b"))
    assert pid() == first
    numbers = [begun(tmp_path / name / "measure-1") for name in "ab"]
    assert len({first, *numbers}) == 3
    assert os.listdir(tmp_path / "tmp") == []
    assert warm.environment()["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert warm.environment()["ORT_DISABLE_TELEMETRY"] == "0"


def network(name, units):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(units),
        ],
        name=name,
    )


def test_files_are_those_of_a_process_of_their_own(tmp_path, monkeypatch):
    # The one with TensorFlow is that of all tests.
    monkeypatch.setattr(warm, "_POOL", SHARED)
    x = np.random.default_rng(1).random((32, 6, 6, 1)).astype("float32")

    def files(model, folder):
        report = keras_kd.export(
            model,
            tmp_path / folder,
            precisions=("float32", "int8"),
            calibration=x,
            max_drop=None,
        )
        assert all(artifact.file for artifact in report.artifacts)
        return {row.file: (tmp_path / folder / row.file).read_bytes() for row in report.artifacts}

    model = network("one", 3)
    first = files(model, "first")
    files(network("two", 5), "between")
    server = warm._POOL["convert"].process.pid
    again = files(model, "again")
    if warm.FORKS:
        assert warm._POOL["convert"].process.pid == server
    monkeypatch.setattr(warm, "KINDS", ())
    fresh = files(model, "fresh")
    assert first == fresh
    assert again == fresh


@linux
def test_a_job_that_crashes_takes_no_other_with_it(tmp_path):
    run = worker_pool.Run(job(**ENDLESS), tasks(), tmp_path / "a")
    run.advance()
    os.kill(begun(tmp_path / "a" / "measure-1"), signal.SIGSEGV)
    server = pid()
    run._job = job()
    while not run.advance():
        time.sleep(0.02)
    crashed = [row for row in run.results.values() if "error" in row]
    assert crashed
    for row in crashed:
        assert row["error"] == "the process crashed (signal 11, SIGSEGV)"
        assert row["crashed"]
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "b"))
    assert pid() == server


@linux
def test_a_job_that_hangs_is_ended_and_the_process_waits_on(tmp_path):
    # The process is there before the seconds count: starting it takes as long as the machine takes.
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "first"))
    server = pid()
    results = worker_pool.run_tasks(job(**ENDLESS), tasks()[:1], tmp_path / "a", timeout=5)
    assert results[FILES[0]]["error"] == "stopped after 5 s without a result"
    assert pid() == server
    assert gone(begun(tmp_path / "a" / "measure-1"))
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "b"))
    assert pid() == server


@linux
@pytest.mark.parametrize("at_work", [False, True])
def test_a_process_that_is_killed_is_replaced(tmp_path, at_work):
    run = worker_pool.Run(job(**(ENDLESS if at_work else {})), tasks()[:1], tmp_path / "a")
    run.advance()
    child = begun(tmp_path / "a" / "measure-1")
    server = pid()
    if at_work:
        os.kill(server, signal.SIGKILL)
    while not run.advance():
        time.sleep(0.02)
    assert ("error" in run.results[FILES[0]]) == at_work
    if not at_work:
        os.kill(server, signal.SIGKILL)
    assert gone(child)
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "b"))
    assert pid() != server


@linux
def test_a_process_ends_when_nothing_is_asked_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "IDLE", 0.5)
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "a"))
    server = pid()
    assert gone(server)
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "b"))
    assert pid() != server


def test_two_threads_at_once(tmp_path):
    found = {}

    def work(name):
        found[name] = worker_pool.run_tasks(job(), tasks(), tmp_path / name)

    threads = [threading.Thread(target=work, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good(found["a"])
    assert good(found["b"])
    # The thread that started it has ended.
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "c"))


@linux
def test_a_job_is_done_as_the_caller_is_now(tmp_path, monkeypatch):
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "a"))
    server = pid()
    # The folder and the rights of new files: of each job.
    monkeypatch.chdir(DIGITS)
    relative = [{**tasks()[0], "path": FILES[0], "outputs": str(tmp_path / "y.npz")}]
    before = os.umask(0o077)
    try:
        results = worker_pool.run_tasks(job(), relative, tmp_path / "b")
    finally:
        os.umask(before)
    assert "error" not in results[FILES[0]]
    assert stat.S_IMODE((tmp_path / "y.npz").stat().st_mode) == 0o600
    assert pid() == server
    # Variables that imports may depend on: another process.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "c"))
    assert pid() != server
    assert gone(server)


def test_without_forks_a_process_does_one_job(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "FORKS", False)
    warm.prepare("measure")
    prepared = pid()
    assert good(worker_pool.run_tasks(job(), tasks(), tmp_path / "a"))
    assert begun(tmp_path / "a" / "measure-1") == prepared
    assert gone(prepared)
    results = worker_pool.run_tasks(job(**ENDLESS), tasks()[:1], tmp_path / "b", timeout=3)
    assert results[FILES[0]]["error"] == "stopped after 3 s without a result"
    assert gone(begun(tmp_path / "b" / "measure-1"))


SCRIPT = """
import json, os, sys, time
from pathlib import Path
from keras_kd.export import warm, worker_pool

given, scratch = json.loads(sys.argv[1]), Path(sys.argv[2])

def run(name, **changes):
    run = worker_pool.Run({**given["job"], **changes}, given["tasks"], scratch / name)
    while not run.advance():
        if (scratch / name / "measure-1" / "began").exists() and changes:
            return
        time.sleep(0.02)
    assert not any("error" in row for row in run.results.values()), run.results
"""


def program(tmp_path, body):
    given = json.dumps({"job": job(), "tasks": tasks()})
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(body), given, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )


@linux
def test_processes_end_with_a_program_that_is_killed(tmp_path):
    killed = program(
        tmp_path,
        """
        run("a", time=600)
        print(warm._POOL["measure"].process.pid, flush=True)
        time.sleep(600)
        """,
    )
    server = int(killed.stdout.readline())
    child = begun(tmp_path / "a" / "measure-1")
    assert alive(server)
    assert alive(child)
    killed.kill()
    killed.communicate()
    assert gone(server)
    assert gone(child)


@linux
def test_processes_end_with_a_program_that_ends(tmp_path):
    ended = program(
        tmp_path,
        """
        run("a")
        warm.prepare("convert")
        print(*(server.process.pid for server in warm._POOL.values()), flush=True)
        """,
    )
    out, _ = ended.communicate(timeout=60)
    assert ended.returncode == 0
    servers = [int(word) for word in out.split()]
    assert len(servers) == 2
    # The second one is importing TensorFlow.
    assert all(gone(server, 5) for server in servers)


@linux
def test_a_fork_of_a_program_has_processes_of_its_own(tmp_path):
    forking = program(
        tmp_path,
        """
        run("a")
        parents = warm._POOL["measure"].process.pid
        if os.fork() == 0:
            assert not warm._POOL
            run("b")
            print(parents, warm._POOL["measure"].process.pid, os.getpid(), flush=True)
            time.sleep(600)
        time.sleep(600)
        """,
    )
    parents, own, fork = map(int, forking.stdout.readline().split())
    assert parents != own
    assert alive(parents)
    forking.kill()
    forking.wait()
    try:
        # The fork lives, and has nothing open of its parent's.
        assert gone(parents)
        assert alive(fork)
        assert alive(own)
    finally:
        os.kill(fork, signal.SIGKILL)
        forking.stdout.close()
    assert gone(own)


@linux
@pytest.mark.parametrize("ended", [False, True])
def test_a_fork_of_a_command_does_one_job(tmp_path, ended):
    command = program(
        tmp_path,
        """
        with warm.forking("measure"):
            warm.prepare("measure")
            assert not warm._POOL
            warm.fork_prepared("measure")
        print(warm._POOL["measure"].process._pid, flush=True)
        """
        + (
            """
        run("a")
        run("b")
        """
            if ended
            else """
        run("a", time=600)
        time.sleep(600)
        """
        ),
    )
    fork = int(command.stdout.readline())
    assert begun(tmp_path / "a" / "measure-1") == fork
    if ended:
        command.communicate(timeout=60)
        assert command.returncode == 0
        assert begun(tmp_path / "b" / "measure-1") != fork
    else:
        command.kill()
        command.communicate()
    assert gone(fork)


@linux
def test_a_fork_of_a_command_that_crashes_takes_one_file_with_it(tmp_path):
    command = program(
        tmp_path,
        """
        import signal
        with warm.forking("measure"):
            warm.prepare("measure")
            assert not warm._POOL
            warm.fork_prepared("measure")
        work = worker_pool.Run({**given["job"], "time": 600}, given["tasks"], scratch / "a")
        work.advance()
        while not (scratch / "a" / "measure-1" / "current").exists():
            time.sleep(0.02)
        os.kill(warm._POOL.get("measure", work._process._server).process._pid, signal.SIGSEGV)
        work._job = given["job"]
        while not work.advance():
            time.sleep(0.02)
        print(json.dumps(work.results))
        """,
    )
    results = json.loads(command.communicate(timeout=60)[0])
    assert results[FILES[0]]["error"] == "the process crashed (signal 11, SIGSEGV)"
    assert "error" not in results[FILES[1]]


def test_verifying_imports_neither_tensorflow_nor_scikit_learn():
    code = """
    import sys
    from pathlib import Path
    from keras_kd.cli.app import run
    from keras_kd.export import server, worker, worker_pool
    server.preload("measure")
    class Here:
        def __init__(self, kind, box, memory):
            worker.main(box)
        def poll(self):
            return 0
        def wait(self):
            pass
    worker_pool.start = Here
    assert run(["verify", sys.argv[1], "--quiet"]) == 0
    heavy = ["tensorflow", "keras", "jax", "torch", "scipy", "sklearn", "matplotlib", "pandas"]
    heavy.append("rich")
    print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(DIGITS)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
