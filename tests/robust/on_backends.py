"""Figures of attacks and adversaries on one backend, as JSON; `test_on_backends.py` compares them.

Run as a program in a process of its own, since a process has one backend.
"""

import json
import os
import sys
import warnings

if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = sys.argv[1]

import keras
import numpy as np
from keras import layers

import keras_kd as kd

WIDTHS = {"student": 5, "teacher": 9}
THREAT = {"steps": 2, "bounds": (-4, 4)}
FAR = {"epsilon": 0.3, **THREAT}
NEAR = {"epsilon": 1e-6, "steps": 1, "step": 1e-6, "bounds": (-4, 4)}


def model(name, rng):
    inputs = keras.Input((6,))
    x = layers.Dense(WIDTHS[name], activation="tanh")(inputs)
    x = layers.BatchNormalization(momentum=0.5)(x)
    found = keras.Model(inputs, layers.Dense(4)(layers.Dropout(0.3)(x)), name=name)
    shapes = [w.shape for w in found.weights]
    # Dense, BatchNorm (scale, offset, mean, variance), Dense, and the state of the dropout.
    values = [
        rng.uniform(0.5, 1.5, s) if i in (2, 5) else rng.normal(size=s)
        for i, s in enumerate(shapes)
    ]
    found.set_weights([v.astype("float32") for v in values])
    return found


def figures():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, 4, 20)
    teacher = model("teacher", rng)
    found = {}
    for threat in (kd.robust.Linf(0.3, **THREAT), kd.robust.L2(0.5, **THREAT)):
        for kind in ("pgd", "square") if threat.norm == "L2" else ("fgsm", "pgd"):
            attacked = kd.robust.attack(teacher, x, y, threat, kind=kind, queries=20, batch_size=8)
            found[f"{kind} {threat.norm}"] = attacked.astype(float).round(5).ravel().tolist()
    methods = (
        kd.robust.PGDTraining,
        kd.robust.TRADES,
        kd.robust.RSLAD,
        kd.robust.IAD,
        kd.robust.AdaAD,
    )
    for method in methods:
        student = model("student", np.random.default_rng(1))
        # No draw of the dropout, which differs between backends, decides anything here.
        for layer in student.layers:
            if isinstance(layer, layers.Dropout):
                layer.rate = 0.0
        alone = method in (kd.robust.PGDTraining, kd.robust.TRADES)
        # Two attacks depend little on where they start, and starts are the backend's own.
        sure = method in (kd.robust.RSLAD, kd.robust.AdaAD)
        distiller = kd.Distiller(student, None if alone else teacher)
        distiller.compile(
            keras.optimizers.SGD(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            adversary=method(kd.robust.Linf(**(FAR if sure else NEAR))),
        )
        before = [np.array(w) for w in teacher.get_weights()]
        history = distiller.fit(x, y, batch_size=10, shuffle=False, verbose=0)
        for a, b in zip(teacher.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
        statistics = student.get_weights()[4].astype(float).tolist()
        found[method.__name__] = [history.history["loss"][0], *statistics]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(figures()))
