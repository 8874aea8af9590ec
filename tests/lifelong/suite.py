"""What must be the same on every backend; `test_backends.py` runs it in a process of its own."""

import os
import sys
from pathlib import Path

import numpy as np
from keras import ops

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_streams import learned, model, rows

from keras_kd import backends, lifelong
from keras_kd.lifelong import Memory, Stream
from keras_kd.lifelong.heads import CosineHead

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
    head = CosineHead(3)
    at = np.array([[0, 0, 0, 0], [1, 2, 3, 4]], "float32")
    head.build(at.shape)
    head.kernel.assign(np.arange(12, dtype="float32").reshape(4, 3))
    # Of a row without a direction too, where `keras.ops.normalize` has none on JAX and PyTorch.
    slope = backends.gradient(lambda x: ops.sum(head(x), axis=-1), ops.convert_to_tensor(at))
    found["cosine gradient"] = ops.convert_to_numpy(slope)
    return found


if __name__ == "__main__":
    np.savez(os.environ["KERAS_KD_NUMBERS"], **numbers())
