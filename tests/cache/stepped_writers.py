"""Writers of one small cache that are stopped at any step: `test_steps.py` starts them.

Keras is loaded once, on the backend that starts fastest. Each line of standard input is a writer,
in a fork of its own if it is killed: a JSON list of the folder, the step at which something happens
(0 is never), what happens, and whose cache it writes. The answer is a line: the exit code, the
number of steps, and how each writer ended. A step is a call that makes, opens, syncs, renames,
locks or removes a file.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys

import keras
import numpy as np

from keras_kd import cache
from keras_kd.cache import shards, writer

keras.utils.set_random_seed(0)


def model(name):
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(6)(inputs), name=name)


TEACHERS = {"ours": model("ours"), "theirs": model("theirs")}
X = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
# No power is cut here, and what waits for a disk waits long.
os.fsync = lambda descriptor: None
# Nobody else is there who could give a lock back.
writer.LOCK_SECONDS = 0.0


def write(path, whose):
    """How one writer ends, as text."""
    try:
        x = X if whose == "ours" else X[::-1]
        manifest = cache.write(TEACHERS[whose], x, path, batch_size=8, shard_size=20)
        return "complete" if manifest.complete else "half written"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


class Steps:
    """Counts the steps, and lets something happen at one of them."""

    def __init__(self, path, when, what):
        self.path, self.when, self.what = path, when, what
        self.count, self.theirs = 0, None
        self.inside = False

    def counted(self, function):
        def run(*arguments, **options):
            if not self.inside:
                self.count += 1
                if self.count == self.when:
                    self.happen()
            return function(*arguments, **options)

        return run

    def happen(self):
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.inside = True
        if self.what == "replaced":
            shutil.rmtree(self.path, ignore_errors=True)
        if self.what == "unlocked":
            for name in os.listdir(self.path):
                if name.endswith(".lock"):
                    os.unlink(os.path.join(self.path, name))
        self.theirs = write(self.path, "ours" if self.what == "twin" else "theirs")
        self.inside = False


STEPS = [
    *((os, name) for name in ("open", "fsync", "replace", "unlink", "mkdir")),
    (fcntl, "flock"),
    (shards.Shard, "append"),
]


def run(path, when, what, whose):
    steps = Steps(path, when, what)
    originals = [getattr(module, name) for module, name in STEPS]
    for (module, name), function in zip(STEPS, originals):
        setattr(module, name, steps.counted(function))
    try:
        ours = write(path, whose)
    finally:
        for (module, name), function in zip(STEPS, originals):
            setattr(module, name, function)
    return steps.count, ours, steps.theirs


for line in sys.stdin:
    arguments = json.loads(line)
    if arguments[2] != "kill":
        print(json.dumps([0, *run(*arguments)]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        run(*arguments)
        os._exit(0)
    print(
        json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0, None, None]), flush=True
    )
