"""A learner that is killed anywhere and run again ends as one that never was: bit for bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Keras is loaded once; each line of its input is then a program in a fork of its own, which has run
# nothing before. It answers with the exit code and a digest of all that the program ended with.
_PROGRAMS = """
import hashlib, json, os, signal, sys, traceback
os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import keras
try:
    # Keras reads batches by it on other backends too; once is enough.
    import tensorflow
except ImportError:
    pass
from keras_kd import lifelong
from keras_kd.callbacks import resume
from keras_kd.lifelong import learner as learners, memory as memories, state

rng = np.random.default_rng(0)
x = rng.normal(size=(48, 4)).astype("float32")
y = np.arange(48) % 6

METHODS = {
    "dark": lambda: (lifelong.DarkReplay(0.5, 0.5), lifelong.Memory(8)),
    "herding": lambda: (lifelong.Replay(), lifelong.Memory(8, policy="herding")),
    "without": lambda: (lifelong.LearningWithoutForgetting(), None),
    "elastic": lambda: (lifelong.ElasticWeights(samples=8), None),
    "cosine": lambda: (lifelong.LessForgetting(), lifelong.Memory(8, policy="herding")),
}

def counted(function, when, calls):
    def run(*arguments, **options):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return run

def run(path, method, where, when, report):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dropout(0.3)(keras.layers.Dense(5, activation="tanh")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    calls = []
    if where == "step":
        class Killed(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                calls.append(1)
                if len(calls) == when:
                    os.kill(os.getpid(), signal.SIGKILL)
        callbacks = [Killed()]
    else:
        callbacks = []
    if where == "write":
        # Within the archive that holds the memory.
        np.lib.format.write_array = counted(np.lib.format.write_array, when, calls)
    elif where == "rename":
        os.replace = counted(os.replace, when, calls)
    elif where == "between":
        state.State.write = counted(state.State.write, when, calls)
    made, memory = METHODS[method]()
    learner = lifelong.Learner(model, made, memory, path, save_freq=1)
    learner.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"], jit_compile=False)
    stream = lifelong.Stream.by_class(x, y, tasks=3, seed=0, test=(x, y))
    for task in stream:
        learner.fit(task, epochs=2, batch_size=6, verbose=0, callbacks=callbacks)
    digest = hashlib.sha256()
    for array in learner.model.get_weights():
        digest.update(array.tobytes())
    for array in learner._optimizer:
        digest.update(np.asarray(array).tobytes())
    for part in learner.memory.state().values() if memory else ():
        digest.update(np.asarray(part).tobytes() if part.dtype.kind != "U" else str(part).encode())
    digest.update(json.dumps(learner.report().to_dict()["matrix"]).encode())
    os.write(report, json.dumps([digest.hexdigest(), len(calls)]).encode())

for line in sys.stdin:
    arguments = json.loads(line)
    heard, report = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(*arguments, report)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(report)
    said = b"".join(iter(lambda: os.read(heard, 4096), b"")).decode()
    os.close(heard)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, said]), flush=True)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork")

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """`run(path, method, where, when)`: the exit code, and what the program ended with."""
    pytest.importorskip("torch")
    driver = subprocess.Popen(
        [sys.executable, "-c", _PROGRAMS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"},
    )

    def ask(path: Path, method: str, where: str = "nowhere", when: int = 0) -> Any:
        driver.stdin.write(json.dumps([str(path), method, where, when]) + "\n")
        driver.stdin.flush()
        code, said = json.loads(driver.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code, said

    yield ask
    driver.stdin.close()
    driver.wait(60)


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each method ends with where nothing happens."""
    found = {}
    for method in ("dark", "herding", "without", "elastic", "cosine"):
        code, said = run(tmp_path_factory.mktemp("whole") / "state", method)
        assert code == 0
        found[method] = json.loads(said)[0]
    return found


# Three tasks of three steps twice; each step is backed up, and each task ends with two states.
@pytest.mark.parametrize(
    ("method", "where", "when"),
    [
        ("dark", "step", 2),
        ("dark", "step", 11),
        ("dark", "between", 1),
        ("dark", "between", 2),
        ("dark", "between", 5),
        ("dark", "write", 160),
        ("dark", "rename", 8),
        ("dark", "rename", 9),
        ("herding", "step", 9),
        ("herding", "between", 4),
        ("without", "step", 16),
        ("elastic", "write", 90),
        ("cosine", "step", 9),
    ],
)
def test_killed_and_run_again(tmp_path, run, whole, method, where, when):
    code, said = run(tmp_path / "state", method, where, when)
    assert code == -signal.SIGKILL, said
    code, said = run(tmp_path / "state", method)
    assert code == 0
    assert json.loads(said)[0] == whole[method]


def test_killed_again_and_again(tmp_path, run, whole):
    for when in (3, 4, 2, 5):
        code, _ = run(tmp_path / "state", "dark", "step", when)
        assert code == -signal.SIGKILL
    assert json.loads(run(tmp_path / "state", "dark")[1])[0] == whole["dark"]


def test_a_run_that_is_over_trains_nothing(tmp_path, run, whole):
    run(tmp_path / "state", "dark")
    code, said = run(tmp_path / "state", "dark", "step", 1)
    assert code == 0
    assert json.loads(said) == [whole["dark"], 0]
