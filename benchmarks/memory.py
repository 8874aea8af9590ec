"""Peak memory of a distillation step beside what it is made of.

    python benchmarks/memory.py [--quick]

Each figure is the peak resident memory (`ru_maxrss`) of a process of its own, less that of a
process which builds the same models and runs neither: the student's training, the teacher's
inference, the distiller's step. The outputs that a step holds are computed from their shapes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys


def child(kind, batch, widths, wide):
    """Run one kind of steps and print the peak in bytes."""
    import keras
    import numpy as np
    from side_by_side import cnn, fitting, ours, plain

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * 2, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, len(x))
    student, teacher = cnn(widths, name="student"), cnn(wide, name="teacher")
    if kind == "student":
        run = fitting(plain(student), x, y, batch)
    elif kind == "teacher":

        def run():
            teacher.predict(x, batch_size=batch, verbose=0)

    elif kind == "distiller":
        run = fitting(ours(student, teacher), x, y, batch)
    else:

        def run():
            keras.ops.convert_to_numpy(keras.ops.sum(keras.ops.convert_to_tensor(x)))

    for _ in range(3):
        run()
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*json.loads(arguments.child))
        return
    import keras
    from side_by_side import begin, ratio, save

    started = begin()
    widths, wide, batch = (16, 32, 64), (32, 64, 128), arguments.batch
    if arguments.quick:
        widths, wide, batch, arguments.repeats = (8, 16), (16, 32), 64, 1
    kinds = ("nothing", "student", "teacher", "distiller")
    peaks = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):
        for kind in kinds:
            command = [
                sys.executable, __file__, "--child", json.dumps([kind, batch, widths, wide])
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[kind].append(int(done.stdout.split()[-1]))
    peak = {kind: statistics.median(values) / 1e6 for kind, values in peaks.items()}
    over = {kind: peak[kind] - peak["nothing"] for kind in kinds}
    outputs = 2 * batch * 10 * 4 / 1e6
    parts = over["student"] + over["teacher"] + outputs
    save(
        "memory",
        started,
        ratios={
            "peak memory: step / (student training + teacher inference + outputs)": ratio(
                over["distiller"] / parts, 1.0
            ),
            "the same with what the process holds before": ratio(
                peak["distiller"] / (peak["nothing"] + parts), 1.0
            ),
        },
        tables=[
            {
                "columns": [f"batch {batch}", "peak MB", "MB over a process that runs nothing"],
                "rows": [
                    ["models built, nothing run", peak["nothing"], 0.0],
                    ["student training", peak["student"], over["student"]],
                    ["teacher inference", peak["teacher"], over["teacher"]],
                    ["outputs of both", "", outputs],
                    ["distiller's step", peak["distiller"], over["distiller"]],
                ],
            }
        ],
        notes=[
            f"Teacher {'-'.join(map(str, wide))}, student {'-'.join(map(str, widths))}, images of "
            "32 by 32; median of processes. Peaks are those of the whole process, so that memory "
            "which the allocator keeps between steps counts on both sides."
        ],
        quick=arguments.quick,
        backend=keras.config.backend(),
    )


if __name__ == "__main__":
    main()
