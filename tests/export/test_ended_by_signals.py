"""Signals that end a block, wherever they arrive."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time

import keras
import numpy as np
import pytest

import keras_kd.export
from keras_kd.cli import exits
from keras_kd.export import scratch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals")


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(scratch, "_AGAIN", 0.05)


@pytest.fixture(autouse=True)
def handlers_of_a_fresh_process():
    # A shell that starts the tests in the background lets them ignore Ctrl-C.
    fresh = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    kept = {number: signal.signal(number, handler) for number, handler in fresh.items()}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


SENT = signal.SIGTERM


def send(number=None):
    os.kill(os.getpid(), SENT if number is None else number)


def wait_long():
    """Work in many steps and in one; ten minutes unless something ends it."""
    for _ in range(1000):
        time.sleep(0.001)
    time.sleep(600)


class Dying:
    def __del__(self):
        send()


def in_a_destructor():
    Dying()


def in_somebody_s_except():
    with contextlib.suppress(BaseException):
        send()


def in_except_twice():
    for _ in range(2):
        try:
            send()
            time.sleep(600)
        except (SystemExit, KeyboardInterrupt):
            pass


def as_another_error():
    try:
        send()
    except BaseException as error:
        raise RuntimeError("a library's own words") from error


def as_another_error_from_nothing():
    with contextlib.suppress(BaseException):
        send()
    raise ValueError("a consequence, without a context")


def plainly():
    send()


LOSING = [in_a_destructor, in_somebody_s_except, in_except_twice]
CHANGING = [as_another_error, as_another_error_from_nothing, plainly]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("arrive", LOSING + CHANGING, ids=lambda arrive: arrive.__name__)
def test_a_signal_ends_the_block_wherever_it_arrives(arrive):
    with pytest.raises(SystemExit) as caught, scratch.ended_by_signals():
        arrive()
        wait_long()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("arrive", LOSING + CHANGING, ids=lambda arrive: arrive.__name__)
def test_control_c_ends_the_block_where_it_is_asked_for(arrive, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SENT", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), scratch.ended_by_signals(interrupts=True):
        arrive()
        wait_long()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_control_c_is_python_s_own_where_it_is_not_asked_for():
    reached = []
    with scratch.ended_by_signals():
        with contextlib.suppress(KeyboardInterrupt):
            send(signal.SIGINT)
        time.sleep(0.2)
        reached.append("end")
    assert reached == ["end"]


def test_who_catches_control_c_goes_on():
    reached = []
    with scratch.ended_by_signals(interrupts=True):
        for _ in range(2):
            with contextlib.suppress(KeyboardInterrupt), scratch.interrupts_once():
                send(signal.SIGINT)
                wait_long()
        time.sleep(0.2)
        reached.append("end")
    assert reached == ["end"]


def test_a_handler_of_the_caller_s_own_stays():
    seen = []
    kept = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with scratch.ended_by_signals(interrupts=True):
            send(signal.SIGINT)
            with scratch.interrupts_once(), contextlib.suppress(KeyboardInterrupt):
                send(signal.SIGINT)
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, kept)
    assert seen == [1, 1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted."), (signal.SIGTERM, 143, "ended by a signal.")],
)
@pytest.mark.parametrize("arrive", LOSING + CHANGING, ids=lambda arrive: arrive.__name__)
def test_a_command_ends_with_its_code_and_one_line(arrive, number, code, said, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "SENT", number)

    def command():
        arrive()
        wait_long()

    assert exits.exit_code(command) == code
    rest = "No half-written file was left behind."
    assert capsys.readouterr().err == f"keras-kd: {said} {rest}\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("arrive", [in_a_destructor, in_somebody_s_except])
def test_a_signal_that_was_lost_counts_at_the_end_of_the_block(arrive, monkeypatch):
    monkeypatch.setattr(scratch, "_AGAIN", 600.0)
    with pytest.raises(SystemExit) as caught, scratch.ended_by_signals():
        arrive()
    assert caught.value.code == 143


def test_nothing_cuts_the_clearing_short():
    cleared = []
    with pytest.raises(SystemExit) as caught, scratch.ended_by_signals():
        try:
            send(signal.SIGHUP)
            wait_long()
        finally:
            for i in range(40):
                time.sleep(0.01)
                send(signal.SIGTERM if i % 2 else signal.SIGHUP)
                with contextlib.suppress(ValueError):
                    int("no number")
                try:
                    int("no number")
                except ValueError:
                    time.sleep(0.01)
            cleared.append("all")
    assert caught.value.code == 129
    assert cleared == ["all"]


def test_clearing_of_a_context_manager_is_not_cut_short():
    cleared = []

    @contextlib.contextmanager
    def clearing():
        try:
            yield
        finally:
            time.sleep(0.3)
            send()
            cleared.append("all")

    with pytest.raises(SystemExit), scratch.ended_by_signals(), clearing(), clearing():
        send()
    assert cleared == ["all", "all"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_folder_is_cleared_although_the_signal_comes_meanwhile(tmp_path, monkeypatch, lost):
    remove = shutil.rmtree

    def slowly(folder, **options):
        send()
        time.sleep(0.3)
        remove(folder, **options)

    monkeypatch.setattr(scratch.shutil, "rmtree", slowly)
    with pytest.raises(SystemExit) as caught, scratch.ended_by_signals():
        with scratch.held_folder(tmp_path, "a-") as folder:
            (folder / "file").write_text("content")
            if lost:
                with contextlib.suppress(BaseException):
                    send()
        wait_long()
    assert caught.value.code == 143
    assert list(tmp_path.iterdir()) == []


def test_no_lock_is_left_although_the_signal_comes_while_a_folder_is_made(tmp_path, monkeypatch):
    opening = os.open

    def opened(*words, **options):
        handle = opening(*words, **options)
        send()
        return handle

    monkeypatch.setattr(scratch.os, "open", opened)
    with (
        pytest.raises(SystemExit) as caught,
        scratch.ended_by_signals(),
        scratch.held_folder(tmp_path, "a-"),
    ):
        wait_long()
    assert caught.value.code == 143
    assert list(tmp_path.iterdir()) == []


def test_without_a_signal_errors_are_as_they_were():
    with pytest.raises(ValueError, match="mine"), scratch.ended_by_signals():
        raise ValueError("mine")
    with pytest.raises(SystemExit) as caught, scratch.ended_by_signals():
        raise SystemExit(3)
    assert caught.value.code == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_no_signal_comes_after_the_block():
    later = []
    for _ in range(20):
        with contextlib.suppress(SystemExit), scratch.ended_by_signals():
            send()
    kept = signal.signal(signal.SIGTERM, lambda *_: later.append(1))
    try:
        time.sleep(0.3)
    finally:
        signal.signal(signal.SIGTERM, kept)
    assert later == []


def test_a_block_in_a_block_leaves_it_to_the_outer_one():
    ended = []
    with pytest.raises(SystemExit) as caught, scratch.ended_by_signals():
        with scratch.ended_by_signals():
            with contextlib.suppress(BaseException):
                send()
            ended.append("inner")
        ended.append("between")
        wait_long()
    assert caught.value.code == 143
    assert ended == ["inner", "between"]


def test_in_other_threads_nothing_is_set():
    found = []

    def work():
        with scratch.ended_by_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("stage", ["convert", "verify", "write"])
def test_an_export_ends_although_its_callback_loses_the_signal(tmp_path, stage):
    x = np.random.default_rng(0).random((8, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    told = []

    def progress(name, done, total):
        told.append(name)
        if name == stage and told.count(name) == 1:
            with contextlib.suppress(BaseException):
                send()

    with pytest.raises(SystemExit) as caught:
        keras_kd.export(model, tmp_path / "out", "onnx", "float32", evaluation=x, progress=progress)
    assert caught.value.code == 143
    assert stage in told
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
