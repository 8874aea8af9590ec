"""Step time as classes, batch, taps and teachers grow, and what dominates it.

    python benchmarks/growth.py [--repeats 5] [--quick]

Beside each step stand the step of the student alone and the forward pass of the teachers, timed in
turn with it. What is left is the distillation itself: its losses, its metrics, and reading inner
layers.
"""

import argparse

import keras
import numpy as np
from keras import layers
from side_by_side import begin, discard, fitting, medians, ours, plain, save

import keras_kd as kd

STEPS = 16


def mlp(classes, depth=8, width=256, name=None):
    inputs = keras.Input((256,))
    x = inputs
    for i in range(depth):
        x = layers.Dense(width, activation="relu", name=f"dense{i}")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=name)


def measure(repeats, *, classes=10, batch=128, taps=0, teachers=1):
    """Milliseconds of a step, of the student alone, of the teachers, of the rest; and shares."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * STEPS, 256)).astype("float32")
    y = rng.integers(0, classes, len(x))
    models = [mlp(classes, name=f"teacher{i}") for i in range(teachers)]
    hints = [
        kd.Transfer(kd.losses.Hint(), f"dense{i}", f"dense{i}", name=f"hint{i}")
        for i in range(taps)
    ]
    distiller = ours(
        mlp(classes),
        models if teachers > 1 else models[0],
        [kd.losses.SoftTargets(), *hints] if taps else None,
    )
    alone = plain(mlp(classes))
    seconds = medians(
        {
            "step": fitting(distiller, x, y, batch),
            "student": fitting(alone, x, y, batch),
            "teacher": lambda: discard([forward(model, x, batch) for model in models]),
        },
        repeats,
    )
    step, student, teacher = (1000 * seconds[k] / STEPS for k in ("step", "student", "teacher"))
    # `predict_on_batch` copies the answers out, which the step does not, so that little is left.
    rest = max(0.0, step - student - teacher)
    shares = {
        "student's own step": student / step,
        "teacher's forward pass": teacher / step,
        "distillation losses and metrics": rest / step,
    }
    first = max(shares, key=shares.get)
    said = f"{first}: {100 * min(1.0, shares[first]):.0f} %"
    return [step, student, teacher, rest, said]


def forward(model, x, batch):
    """The teacher's answers, left where they are computed."""
    for start in range(0, len(x), batch):
        result = model.predict_on_batch(x[start : start + batch])
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few sizes, nothing is written")
    arguments = parser.parse_args()
    started = begin()
    repeats = 2 if arguments.quick else arguments.repeats
    keras.utils.set_random_seed(0)
    grows = {
        "classes": (10, 1000) if arguments.quick else (10, 1000, 50_000),
        "batch": (16, 128) if arguments.quick else (16, 32, 64, 128, 256, 512),
        "taps": (0, 2) if arguments.quick else (0, 1, 2, 4, 8),
        "teachers": (1, 2) if arguments.quick else (1, 2, 3, 4),
    }
    rows = []
    for what, values in grows.items():
        for value in values:
            rows.append([f"{what}: {value:,}", *measure(repeats, **{what: value})])
            keras.backend.clear_session()
    save(
        "growth",
        started,
        tables=[
            {
                "columns": ["", "step, ms", "student", "teacher", "rest", "what dominates"],
                "rows": rows,
            }
        ],
        notes=[
            "Student and teacher are eight dense layers of 256; unless it grows: 10 classes, batch "
            "128, no taps, one teacher."
        ],
        quick=arguments.quick,
        backend=keras.config.backend(),
    )


if __name__ == "__main__":
    main()
