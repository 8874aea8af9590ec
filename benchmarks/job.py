"""A whole job, cache write included, beside `keras.distillation` at a costly teacher.

    python benchmarks/job.py [--epochs 20] [--samples 1024] [--quick]

The teacher is sized so that its forward pass costs five training steps of the student. Each side
begins with models that have never run, so that tracing counts on both; they take turns.
"""

import argparse
import pathlib
import tempfile
import time

import keras
import numpy as np
from side_by_side import (
    begin,
    cnn,
    fitting,
    medians,
    ours,
    over,
    plain,
    predicting,
    save,
    sized_teacher,
    theirs,
)

import keras_kd as kd

BATCH = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cost", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    arguments = parser.parse_args()
    started = begin()
    widths, base = (8, 16, 32), (32, 64, 128)
    if arguments.quick:
        arguments.samples, arguments.repeats, arguments.epochs = 256, 1, 4
        widths, base = (4, 8), (16, 32)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(arguments.samples, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, len(x))
    alone = plain(cnn(widths, name="student"))
    step = fitting(alone, x[:256], y[:256])
    teacher, wide, _ = sized_teacher(step, x[:256], arguments.cost, base)
    cost = medians(
        {
            "step": step,
            "forward": predicting(teacher, x[:256], BATCH),
        },
        5,
    )
    cost = cost["forward"].processor / cost["step"].processor
    parts = []

    def fit(model):
        fitting(model, x, y, BATCH, epochs=arguments.epochs)()

    with tempfile.TemporaryDirectory() as temporary:
        folders = iter(pathlib.Path(temporary) / str(i) for i in range(100))

        def cached():
            folder, began = next(folders), time.perf_counter()
            kd.cache.write(teacher, x, folder)
            parts.append(time.perf_counter() - began)
            # The package reads arrays and a cache without the autotuner of tf.data, so this needs
            # no dataset to be compared with the others.
            distiller = ours(cnn(widths, name="student"), kd.teachers.CachedTeacher(folder))
            distiller.fit(x, y, batch_size=BATCH, epochs=arguments.epochs, verbose=0)

        def live():
            fit(ours(cnn(widths, name="student"), teacher))

        def peer():
            fit(theirs(cnn(widths, name="student"), teacher))

        def student():
            fit(plain(cnn(widths, name="student")))

        seconds = medians(
            {"student alone": student, "cached": cached, "live": live, "keras.distillation": peer},
            arguments.repeats,
            warm_up=0,
        )
    theirs_took = seconds["keras.distillation"]
    save(
        "job",
        started,
        ratios={
            f"job of {arguments.epochs} epochs, cache write included / keras.distillation": over(
                seconds["cached"],
                theirs_took,
                goal=0.35,
                note=f"teacher costs {cost:.1f} student steps",
            ),
            f"job of {arguments.epochs} epochs, live teacher / keras.distillation": over(
                seconds["live"], theirs_took
            ),
        },
        tables=[
            {
                "columns": [f"{arguments.epochs} epochs of {arguments.samples:,} images", "s"],
                "rows": [
                    *seconds.items(),
                    ["of which cache write", sorted(parts)[len(parts) // 2]],
                ],
            }
        ],
        notes=[
            f"Teacher {'-'.join(map(str, wide))}, student {'-'.join(map(str, widths))}; tracing "
            "and compilation are included on both sides."
        ],
        quick=arguments.quick,
        backend=keras.config.backend(),
    )


if __name__ == "__main__":
    main()
