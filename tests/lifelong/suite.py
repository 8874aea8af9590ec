"""What must be the same on every backend; `test_backends.py` runs it in a process of its own."""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_streams import learned, model, rows

from keras_kd import lifelong
from keras_kd.lifelong import Memory, Stream

METHODS = {
    "dark": lambda: (lifelong.DarkReplay(0.5, 0.5), Memory(12)),
    "lucir": lambda: (lifelong.LessForgetting(), Memory(12, policy="herding")),
}


def numbers():
    """Weights, memories and matrices by name."""
    x, y = rows(32, classes=4)
    found = {}
    for name, make in METHODS.items():
        stream = Stream.by_class(x, y, tasks=2, seed=None, test=(x, y))
        learner = learned(*make(), of=stream, student=model(units=4))
        for i, weight in enumerate(learner.model.get_weights()):
            found[f"{name} weight {i}"] = weight
        found[f"{name} memory"] = learner.memory.x
        if learner.memory.logits is not None:
            found[f"{name} logits"] = learner.memory.logits
        found[f"{name} matrix"] = learner.report().matrix
    return found


if __name__ == "__main__":
    np.savez(os.environ["KERAS_KD_NUMBERS"], **numbers())
