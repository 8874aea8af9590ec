"""Step times of the distiller beside plain training and `keras.distillation`.

    python benchmarks/step.py [--repeats 15] [--json benchmarks/results/step.json] [--quick]

Every ratio comes from one run: the contenders take turns, a few steps each, and the medians are
compared, so that a machine that slows down slows all of them. The table goes to the terminal, the
numbers to the JSON file. It runs on whatever backend Keras is set to.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import keras
import numpy as np
from keras import layers

import keras_kd as kd

RESULTS = pathlib.Path(__file__).parent / "results"
BATCH, STEPS = 64, 4


def cnn(widths, classes=10, name=None, size=32):
    """Convolutions with BatchNorm, two a width, halved between widths."""
    inputs = keras.Input((size, size, 3))
    x = inputs
    for i, width in enumerate(widths):
        for j in range(2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}{j}")(x)
            x = layers.BatchNormalization(name=f"norm{i}{j}")(x)
            x = layers.ReLU(name=f"relu{i}{j}")(x)
        x = layers.MaxPooling2D(name=f"pool{i}")(x)
    x = layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=name)


def mlp(classes, depth=8, width=256, name=None):
    inputs = keras.Input((64,))
    x = inputs
    for i in range(depth):
        x = layers.Dense(width, activation="relu", name=f"dense{i}")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=name)


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fitting(model, x, y, batch=BATCH):
    """A function that takes `STEPS` steps of `fit`."""
    return lambda: model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)


def ours(student, teacher, losses=None, **options):
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.01), loss=crossentropy(), distillation_loss=losses, **options
    )
    return distiller


def theirs(student, teacher, losses):
    from keras.distillation import Distiller

    distiller = Distiller(teacher, student, distillation_losses=losses)
    distiller.compile(keras.optimizers.SGD(0.01), loss=crossentropy())
    return distiller


def plain(student):
    student.compile(keras.optimizers.SGD(0.01), loss=crossentropy())
    return student


def medians(contenders, repeats):
    """Median seconds of each contender; they take turns, after two turns that count for nothing."""
    times = {name: [] for name in contenders}
    for turn in range(repeats + 2):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            if turn > 1:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def ratios(repeats, sizes):
    """The step beside its floor and its peer: logits, two feature transfers, evaluation."""
    from keras.distillation import FeatureDistillation, LogitsDistillation

    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * STEPS, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, len(x))
    small, large = sizes
    teacher = cnn(large, name="teacher")

    def student():
        return cnn(small, name="student")

    mse = [
        FeatureDistillation(
            loss="mse", teacher_layer_name=f"relu{i}1", student_layer_name=f"relu{i}1"
        )
        for i in range(2)
    ]
    # Of equal widths: the peer has no projectors.
    wide = cnn(large, name="wide_teacher")
    hints = [
        kd.Transfer(kd.losses.Hint(), f"relu{i}1", f"relu{i}1", name=f"hint{i}") for i in range(2)
    ]
    kl = LogitsDistillation(loss=keras.losses.KLDivergence(), temperature=2.0)
    evaluated, peer_evaluated = ours(student(), teacher), theirs(student(), teacher, [kl])
    options = {"batch_size": BATCH, "verbose": 0}
    contenders = {
        "student step": fitting(plain(student()), x, y),
        "teacher forward": lambda: teacher.predict(x, **options),
        "logits step": fitting(ours(student(), teacher), x, y),
        "logits step, keras.distillation": fitting(theirs(student(), teacher, [kl]), x, y),
        "two features": fitting(ours(cnn(large, name="student"), wide, hints), x, y),
        "two features, keras.distillation": fitting(
            theirs(cnn(large, name="student"), wide, mse), x, y
        ),
        "evaluate": lambda: evaluated.evaluate(x, y, **options),
        "evaluate, keras.distillation": lambda: peer_evaluated.evaluate(x, y, **options),
    }
    seconds = medians(contenders, repeats)
    floor = seconds["student step"] + seconds["teacher forward"]
    found = {
        "logits step / (student step + teacher forward)": (seconds["logits step"] / floor, 1.05),
        "logits step / keras.distillation": (
            seconds["logits step"] / seconds["logits step, keras.distillation"],
            1.0,
        ),
        "two feature transfers / keras.distillation": (
            seconds["two features"] / seconds["two features, keras.distillation"],
            0.75,
        ),
        "evaluate / keras.distillation": (
            seconds["evaluate"] / seconds["evaluate, keras.distillation"],
            0.6,
        ),
    }
    return seconds, found


def growth(repeats):
    """The step beside plain training as classes, batch, taps and teachers grow."""
    rng = np.random.default_rng(0)
    rows = []

    def measure(what, value, distiller, batch=BATCH, classes=10):
        x = rng.normal(size=(batch * STEPS, 64)).astype("float32")
        y = rng.integers(0, classes, len(x))
        seconds = medians(
            {
                "step": fitting(distiller, x, y, batch),
                "student": fitting(plain(mlp(classes)), x, y, batch),
            },
            repeats,
        )
        rows.append(
            {
                "what": what,
                "value": value,
                "step_ms": 1000 * seconds["step"] / STEPS,
                "student_ms": 1000 * seconds["student"] / STEPS,
            }
        )

    for classes in (10, 1000, 50000):
        measure("classes", classes, ours(mlp(classes), mlp(classes)), classes=classes)
    for batch in (16, 64, 256, 1024):
        measure("batch", batch, ours(mlp(10), mlp(10)), batch=batch)
    for taps in (0, 1, 2, 4, 8):
        hints = [
            kd.Transfer(kd.losses.Hint(), f"dense{i}", f"dense{i}", name=f"hint{i}")
            for i in range(taps)
        ]
        measure("taps", taps, ours(mlp(10), mlp(10), [kd.losses.SoftTargets(), *hints]))
    for count in (1, 2, 4):
        models = [mlp(10, name=f"teacher{i}") for i in range(count)]
        measure("teachers", count, ours(mlp(10), models if count > 1 else models[0]))
    return rows


def imports(repeats):
    """Seconds that `import keras_kd` adds to `import keras`, and the modules it adds."""
    code = (
        "import time, sys, keras; b = set(sys.modules); t = time.perf_counter(); import keras_kd;"
        " print(time.perf_counter() - t, len([m for m in set(sys.modules) - b if m.split('.')[0]"
        " in ('tensorflow', 'jax', 'torch', 'onnx')]))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(max(3, repeats // 5))
    ]
    return statistics.median(float(s) for s, _ in found), max(int(n) for _, n in found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "step.json")
    parser.add_argument("--quick", action="store_true", help="the ratios alone, on small models")
    arguments = parser.parse_args()
    sizes = ((8, 16), (16, 32)) if arguments.quick else ((16, 32, 64), (32, 64, 128))
    seconds, found = ratios(arguments.repeats, sizes)
    result = {
        "backend": keras.config.backend(),
        "keras": keras.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
        "batch": BATCH,
        "milliseconds": {name: 1000 * value / STEPS for name, value in seconds.items()},
        "ratios": {name: {"value": value, "goal": goal} for name, (value, goal) in found.items()},
    }
    print(f"{'':48} {'ms a step':>9}")
    for name, value in result["milliseconds"].items():
        print(f"{name:48} {value:9.2f}")
    print(f"\n{'ratio':48} {'found':>9} {'goal':>6}")
    for name, (value, goal) in found.items():
        print(f"{name:48} {value:9.3f} {goal:6.2f}")
    if not arguments.quick:
        result["growth"] = growth(max(3, arguments.repeats // 3))
        print(f"\n{'grows':10} {'to':>6} {'step ms':>9} {'student alone ms':>17}")
        for row in result["growth"]:
            print(
                f"{row['what']:10} {row['value']:6} {row['step_ms']:9.2f} {row['student_ms']:17.2f}"
            )
    added, modules = imports(arguments.repeats)
    result["import"] = {"seconds": added, "backend_modules": modules}
    print(f"\nimport keras_kd adds {added:.3f} s to import keras, and {modules} backend modules")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
