"""Step times of the distiller beside plain training and `keras.distillation`.

    python benchmarks/step.py [--repeats 15] [--quick]
    python benchmarks/step.py --against ../before [--repeats 15]

It runs on whatever backend Keras is set to, and keeps a result for each. `--against` compares the
distillation step with that of another checkout: both are loaded, and take turns.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings

import keras
import numpy as np
from side_by_side import (
    Seconds,
    begin,
    cnn,
    discard,
    evaluating,
    fitting,
    images,
    medians,
    ours,
    over,
    plain,
    predicting,
    ratio,
    save,
    sized_teacher,
    taught,
    theirs,
)

import keras_kd as kd

BATCH, STEPS = 64, 8


def logits(repeats, sizes, x, y):
    """The logits step beside its floor and its peer, with the teacher at each precision."""
    small = sizes[0]
    alone = plain(cnn(small, name="student"))
    teacher, widths, cost = sized_teacher(fitting(alone, x, y), x, 1.5, sizes[1])
    teacher = taught(teacher, x, y)
    said = []
    contenders = {
        "student step": fitting(alone, x, y),
        "teacher forward": predicting(teacher, x, BATCH),
        "distillation step, keras.distillation": fitting(
            theirs(cnn(small, name="student"), teacher), x, y
        ),
        "distillation step": fitting(ours(cnn(small, name="student"), teacher), x, y),
    }
    for precision in ("bfloat16", "auto"):
        distiller = ours(cnn(small, name="student"), teacher, precision=precision)
        # The choice is made in the first step, and said there.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distiller.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        said += [str(w.message) for w in caught if "runs " in str(w.message)]
        contenders[f"distillation step, teacher in {precision}"] = fitting(distiller, x, y)
    seconds = medians(contenders, repeats)
    step, peer = seconds["distillation step"], seconds["distillation step, keras.distillation"]
    cost = seconds["teacher forward"].processor / seconds["student step"].processor
    ratios = {
        "logits step / (student step + teacher forward)": over(
            step, seconds["student step"], seconds["teacher forward"], goal=1.05
        ),
        "logits step / keras.distillation": over(step, peer, goal=1.0),
    }
    for precision in ("bfloat16", "auto"):
        ratios[f'logits step, teacher_precision="{precision}" / keras.distillation'] = over(
            seconds[f"distillation step, teacher in {precision}"],
            peer,
            goal=0.65,
            note="the goal is for AMX or AVX-512 BF16",
        )
    notes = [
        f"The teacher, of widths {'-'.join(map(str, widths))} beside a student of "
        f"{'-'.join(map(str, small))}, costs {cost:.2f} student steps a forward pass "
        f"(1.5 was asked for); batches of {BATCH} images of 32 by 32.",
        *(f'`teacher_precision="auto"` said: {each}' for each in said),
    ]
    return seconds, ratios, notes


def short_floats(repeats, size=2048):
    """What the processor itself takes for a product of matrices in bfloat16 over float32."""

    def product(dtype):
        matrix = keras.ops.cast(np.random.default_rng(0).normal(size=(size, size)), dtype)

        def run():
            first = keras.ops.cast(keras.ops.matmul(matrix, matrix)[0, 0], "float32")
            return discard(float(keras.ops.convert_to_numpy(first)))

        return run

    seconds = medians({dtype: product(dtype) for dtype in ("bfloat16", "float32")}, repeats)
    return over(seconds["bfloat16"], seconds["float32"])


def features_and_evaluation(repeats, sizes, x, y):
    """Two feature transfers, and `evaluate`, beside `keras.distillation`."""
    from keras.distillation import FeatureDistillation

    small, large = sizes
    # Of equal widths: the peer has no projectors.
    wide = cnn(large, name="wide_teacher")
    names = [f"relu{i}1" for i in range(2)]
    mse = [
        FeatureDistillation(loss="mse", teacher_layer_name=name, student_layer_name=name)
        for name in names
    ]
    hints = [kd.Transfer(kd.losses.Hint(), name, name, name=f"hint_{name}") for name in names]
    teacher = cnn(large, name="teacher")
    evaluated = ours(cnn(small, name="student"), teacher)
    peer = theirs(cnn(small, name="student"), teacher)
    seconds = medians(
        {
            "two features": fitting(ours(cnn(large, name="student"), wide, hints), x, y),
            "two features, keras.distillation": fitting(
                theirs(cnn(large, name="student"), wide, mse), x, y
            ),
            "evaluate": evaluating(evaluated, x, y),
            "evaluate, keras.distillation": evaluating(peer, x, y),
        },
        repeats,
    )
    ratios = {
        "two feature transfers / keras.distillation": over(
            seconds["two features"], seconds["two features, keras.distillation"], goal=0.75
        ),
        "evaluate / keras.distillation": over(
            seconds["evaluate"],
            seconds["evaluate, keras.distillation"],
            goal=0.6,
            note="teacher twice as wide as the student",
        ),
    }
    return seconds, ratios


def imports(repeats):
    """Seconds that `import keras_kd` adds to `import keras`, and the backend modules it adds."""
    code = (
        "import time, sys, keras; b = set(sys.modules); t = time.perf_counter(); import keras_kd;"
        " print(time.perf_counter() - t, len([m for m in set(sys.modules) - b if m.split('.')[0]"
        " in ('tensorflow', 'jax', 'torch', 'onnx')]))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(repeats)
    ]
    return statistics.median(float(s) for s, _ in found), max(int(n) for _, n in found)


def serve():
    """Take turns with another checkout: one epoch for each line, answered by its seconds."""
    x, y = images(BATCH * STEPS)
    keras.utils.set_random_seed(0)
    distiller = ours(cnn((8, 16, 32), name="student"), cnn((16, 32, 64), name="teacher"))
    run = fitting(distiller, x, y)
    for _ in sys.stdin:
        began, processor = time.perf_counter(), time.process_time()
        run()
        print(time.perf_counter() - began, time.process_time() - processor, flush=True)


def against(checkout, repeats):
    """The distillation step of this checkout over that of another, by turns."""
    here = pathlib.Path(__file__).resolve()
    builds = {"this": here.parents[1], "before": pathlib.Path(checkout).resolve()}
    running = {
        name: subprocess.Popen(
            [sys.executable, str(here), "--serve"],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, folder in builds.items()
    }
    spent = {name: [] for name in builds}
    for turn in range(repeats + 2):
        for name, process in running.items():
            process.stdin.write("\n")
            process.stdin.flush()
            clock, processor = map(float, process.stdout.readline().split())
            if turn >= 2:
                spent[name].append(Seconds(clock, processor))
    for process in running.values():
        process.stdin.close()
        process.wait()
    return spent


def compare(started, checkout, repeats):
    """Write how the step compares with that of another checkout."""
    spent = against(checkout, repeats)
    pairs = list(zip(spent["this"], spent["before"]))
    clock = statistics.median(now / before for now, before in pairs)
    processor = statistics.median(now.processor / before.processor for now, before in pairs)
    backend = keras.config.backend()
    save(
        f"step_against_{backend}",
        started,
        ratios={
            "distillation step / that of the build before": ratio(
                clock, goal=1.02, processor=processor
            )
        },
        notes=["The machine was shared: processor time tells more than the clock."],
        backend=backend,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small models, nothing is written")
    parser.add_argument("--against", help="a checkout of the build to compare with")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    started = begin()
    if arguments.against:
        compare(started, arguments.against, arguments.repeats)
        return
    repeats = 3 if arguments.quick else arguments.repeats
    sizes = ((4, 8), (8, 16)) if arguments.quick else ((16, 32, 64), (32, 64, 128))
    keras.utils.set_random_seed(0)
    x, y = images(BATCH * STEPS)
    seconds, ratios, notes = logits(repeats, sizes, x, y)
    more, wider = features_and_evaluation(repeats, sizes, x, y)
    products = short_floats(repeats, 256 if arguments.quick else 2048)
    floor = (
        seconds["student step"].processor
        + products["processor"] * seconds["teacher forward"].processor
    ) / seconds["distillation step, keras.distillation"].processor
    notes.append(
        f"This processor takes {products['processor']:.2f} of the time for a product of two "
        f"matrices in bfloat16. With a teacher faster by that, and nothing else, the step would be "
        f"{floor:.2f} of that of `keras.distillation`, by processor time."
    )
    added, modules = imports(1 if arguments.quick else 5)
    notes.append(
        f"`import keras_kd` adds {added:.3f} s to `import keras` (goal 0.1 s) and "
        f"{modules} modules of TensorFlow, JAX, PyTorch or ONNX (goal 0)."
    )
    backend = keras.config.backend()
    save(
        "step" if backend == "tensorflow" else f"step_{backend}",
        started,
        ratios=ratios | wider,
        tables=[
            {
                "columns": ["", "ms a step", "ms of processor time"],
                "rows": [
                    [k, 1000 * v / STEPS, 1000 * v.processor / STEPS]
                    for k, v in (seconds | more).items()
                ],
            }
        ],
        notes=notes,
        quick=arguments.quick,
        backend=backend,
    )


if __name__ == "__main__":
    main()
