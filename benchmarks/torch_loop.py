"""The same job as a plain PyTorch loop, step by step, and where a Keras step spends its time.

    python benchmarks/torch_loop.py [--repeats 9] [--quick]
    python benchmarks/torch_loop.py --settings      # what settings of TensorFlow's process win back

The loop runs in a process of its own (channels last, teacher under `no_grad`, the same widths, SGD
with momentum 0) and takes turns with Keras: it is told to take a few steps, and says how long they
took. The comparison is that of Keras on TensorFlow; it runs on whatever backend Keras is set to.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings

STEPS = 12


# ----------------------------------------------------------------- the child process


def torch_cnn(widths, classes):
    import torch

    layers, before = [], 3
    for width in widths:
        for _ in range(2):
            layers += [
                torch.nn.Conv2d(before, width, 3, padding=1, bias=False),
                torch.nn.BatchNorm2d(width),
                torch.nn.ReLU(),
            ]
            before = width
        layers.append(torch.nn.MaxPool2d(2))
    layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(before, classes)]
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


def child(student_widths, teacher_widths, batch):
    """The loop of these networks, on the processor, as `serve` takes it."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(batch * STEPS, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (len(x),))
    half = torch_cnn(teacher_widths, 10).eval().to(torch.bfloat16)
    serve(
        lambda: torch_cnn(student_widths, 10),
        {
            "live": torch_cnn(teacher_widths, 10).eval(),
            "bfloat16": lambda x: half(x.to(torch.bfloat16)).float(),
        },
        [(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)],
    )


def serve(student, teachers, batches, autocast=False):
    """Go through the batches for each line read, and print the seconds.

    A line says how: `alone` trains a student on the labels, `teacher` runs the first teacher, and
    the name of a teacher distils it. With `autocast` everything computes in bfloat16 where PyTorch
    deems it safe.
    """
    import torch
    from torch.nn import functional

    device = batches[0][0].device
    made = {}
    for kind in ("alone", *teachers):
        network = student().to(device).train()
        made[kind] = network, torch.optim.SGD(network.parameters(), 0.01)

    def step(kind, x, y):
        network, optimizer = made[kind]
        logits = network(x)
        loss = functional.cross_entropy(logits, y)
        if kind != "alone":
            with torch.no_grad():
                z = teachers[kind](x)
            soft = functional.kl_div(
                logits.div(2).log_softmax(-1),
                z.div(2).softmax(-1),
                reduction="batchmean",
            )
            loss = 0.5 * loss + 0.5 * 4 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(torch.get_num_threads(), flush=True)
    first = next(iter(teachers.values()))
    for line in sys.stdin:
        kind = line.strip()
        began, processor = time.perf_counter(), time.process_time()
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                if kind == "teacher":
                    with torch.no_grad():
                        first(x)
                else:
                    step(kind, x, y)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - began, time.process_time() - processor, flush=True)


class Loop:
    """The PyTorch loop in its process, which runs the `--child` of a script."""

    def __init__(self, *sizes, script=__file__):
        self.process = subprocess.Popen(
            [sys.executable, script, "--child", json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.threads = int(self.process.stdout.readline())

    def __call__(self, kind):
        """A contender: goes once through the batches in this way and returns the seconds."""

        def run():
            self.process.stdin.write(kind + "\n")
            self.process.stdin.flush()
            from side_by_side import Seconds

            return Seconds(*map(float, self.process.stdout.readline().split()))

        return run

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------- the comparison


def compared(repeats, widths, base, x, y):
    """Seconds a step of both, what `auto` chose, and the teacher's widths."""
    import keras
    from side_by_side import (
        cnn,
        fitting,
        medians,
        ours,
        plain,
        predicting,
        sized_teacher,
        taught,
        theirs,
    )

    import keras_kd as kd

    batch = len(x) // STEPS
    alone = plain(cnn(widths, name="student"))
    teacher, wide, _ = sized_teacher(fitting(alone, x, y, batch), x, 1.5, base, batch=batch)
    teacher = taught(teacher, x, y)
    distillers = {
        "distillation, live teacher": ours(cnn(widths, name="student"), teacher),
        'distillation, teacher_precision="bfloat16"': ours(
            cnn(widths, name="student"), teacher, precision="bfloat16"
        ),
        'distillation, teacher_precision="auto"': ours(
            cnn(widths, name="student"), teacher, precision="auto"
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        kd.cache.write(teacher, x, folder)
        distillers["distillation, cached"] = ours(
            cnn(widths, name="student"), kd.teachers.CachedTeacher(folder)
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for distiller in distillers.values():
                distiller.fit(x, y, batch_size=batch, verbose=0)
        said = [str(w.message) for w in caught if "runs " in str(w.message)]
        loop = Loop(widths, wide, batch)
        contenders = {
            "PyTorch, student alone": loop("alone"),
            "Keras, student alone": fitting(alone, x, y, batch),
            "PyTorch, teacher forward": loop("teacher"),
            "Keras, teacher forward": predicting(teacher, x, batch),
            "PyTorch, distillation": loop("live"),
            "PyTorch, distillation, teacher in bfloat16": loop("bfloat16"),
            "keras.distillation": fitting(
                theirs(cnn(widths, name="student"), teacher), x, y, batch
            ),
        }
        contenders |= {
            f"Keras, {name}": fitting(each, x, y, batch) for name, each in distillers.items()
        }
        seconds = medians(contenders, repeats)
        loop.close()
    keras.backend.clear_session()
    return seconds, said, wide, loop.threads


# ------------------------------------------------------- where a step of TensorFlow goes


def parts(repeats, widths, x, y):
    """Seconds of the parts of one training step, and what settings of `fit` win back."""
    import keras
    import tensorflow as tf
    from side_by_side import cnn, discard, fitting, medians, plain

    batch = len(x) // STEPS
    model = plain(cnn(widths, name="student"))
    fit = fitting(model, x, y, batch)
    fit()
    slices = [slice(i * batch, (i + 1) * batch) for i in range(STEPS)]
    pages = [(tf.constant(x[s]), tf.constant(y[s])) for s in slices]
    loss_of = model.loss

    @tf.function
    def forward(x):
        return model(x, training=True)

    @tf.function
    def inference(x):
        return model(x, training=False)

    @tf.function
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    def each(run):
        def pages_through():
            for x, y in pages:
                result = run(x, y)
            return discard(keras.tree.map_structure(lambda t: t.numpy(), result))

        return pages_through

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch).cache()
    data = data.prefetch(tf.data.AUTOTUNE)
    fused = plain(cnn(widths, name="student"), steps_per_execution=STEPS)
    compiled = plain(cnn(widths, name="student"), jit_compile=True)
    function = model.make_train_function()
    iterator = iter(data.repeat())

    def trained():
        for _ in range(STEPS):
            logs = function(iterator)
        return discard(float(logs["loss"]))

    return medians(
        {
            "forward pass, inference": each(lambda x, y: inference(x)),
            "forward pass, training": each(lambda x, y: forward(x)),
            "forward and backward pass": each(gradients),
            "train function (optimizer and metrics as well)": trained,
            "fit, arrays": lambda: discard(
                model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
            ),
            "fit, tf.data, autotune off": fit,
            "fit, tf.data with prefetch": lambda: discard(model.fit(data, verbose=0)),
            f"fit, tf.data, steps_per_execution={STEPS}": lambda: discard(
                fused.fit(data, verbose=0)
            ),
            "fit, tf.data, jit_compile=True": lambda: discard(compiled.fit(data, verbose=0)),
        },
        repeats,
    )


_OPERATIONS = """
import sys; sys.path.insert(0, {folder!r})
import torch_loop; torch_loop.operations({widths!r}, {batch})
"""


def operations(widths, batch):
    """Print the share of the costliest kinds of operations in training steps, by the profiler."""
    import glob

    import numpy as np
    import tensorflow as tf
    from side_by_side import cnn, fitting, plain
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * STEPS, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, len(x))
    fit = fitting(plain(cnn(widths, name="student")), x, y, batch)
    fit()
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        fit()
        tf.profiler.experimental.stop()
        [file] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        space = xplane_pb2.XSpace()
        space.ParseFromString(pathlib.Path(file).read_bytes())
    spent = {}
    for plane in space.planes:
        names = {key: event.name for key, event in plane.event_metadata.items()}
        for event in itertools.chain.from_iterable(line.events for line in plane.lines):
            # An operation is named "path/of/its/layer:Kind"; calls of functions hold others.
            path, _, kind = names[event.metadata_id].rpartition(":")
            if "/" in path and not path.endswith(":") and "PartitionedCall" not in kind:
                spent[kind] = spent.get(kind, 0) + event.duration_ps
    print(json.dumps(spent))


def shares(widths, batch):
    """The costliest kinds of operations and their share, in percent."""
    code = _OPERATIONS.format(folder=str(pathlib.Path(__file__).parent), widths=widths, batch=batch)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent = json.loads(done.stdout.splitlines()[-1])
    total = sum(spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1])[:6]
    return [[kind, 100 * value / total] for kind, value in top]


_SETTINGS = """
import os, sys; sys.path.insert(0, {folder!r})
os.environ.update({environment!r})
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads({intra})
tf.config.threading.set_inter_op_parallelism_threads({inter})
import numpy as np
from side_by_side import cnn, fitting, medians, plain
rng = np.random.default_rng(0)
x = rng.normal(size=({rows}, 32, 32, 3)).astype("float32")
fit = fitting(plain(cnn({widths!r}, name="student")), x, rng.integers(0, 10, len(x)), {batch})
print(medians({{"fit": fit}}, {repeats})["fit"])
"""


def settings(repeats, widths, batch):
    """Milliseconds of a `fit` step by settings of the process, each in a process of its own."""
    cores = os.cpu_count() or 1
    rows = []
    for intra, inter, one_dnn in (
        *((0, 0, None), (0, 0, "0"), (0, 0, "1")),
        *((cores, 1, None), (1, cores, None), (1, 1, None)),
    ):
        code = _SETTINGS.format(
            folder=str(pathlib.Path(__file__).parent),
            environment={} if one_dnn is None else {"TF_ENABLE_ONEDNN_OPTS": one_dnn},
            intra=intra,
            inter=inter,
            rows=batch * STEPS,
            widths=widths,
            batch=batch,
            repeats=repeats,
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        name = f"threads: intra {intra}, inter {inter}"
        if intra == inter == 0:
            name = "fit in a process of its own, as TensorFlow chooses"
        if one_dnn is not None:
            name = f"TF_ENABLE_ONEDNN_OPTS={one_dnn}"
        rows.append([name, 1000 * float(done.stdout.split()[-1]) / STEPS])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--settings", action="store_true", help="that table alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*json.loads(arguments.child))
        return
    import keras
    from side_by_side import begin, images, over, save

    started = begin()
    repeats = 2 if arguments.quick else arguments.repeats
    widths, base = ((4, 8), (8, 16)) if arguments.quick else ((16, 32, 64), (32, 64, 128))
    batch = 16 if arguments.quick else 128
    keras.utils.set_random_seed(0)
    if arguments.settings:
        rows = settings(repeats, widths, batch)
        columns = ["student alone, on TensorFlow", "ms a step"]
        save(
            "settings",
            started,
            tables=[{"columns": columns, "rows": rows}],
            notes=[f"Batches of {batch}; each row is the median of a process of its own."],
            quick=arguments.quick,
            backend=keras.config.backend(),
        )
        return
    x, y = images(batch * STEPS)
    seconds, said, wide, loop_threads = compared(repeats, widths, base, x, y)
    loop = seconds["PyTorch, distillation"]
    fast = "goal for a processor with AMX or AVX-512 BF16"

    def beside(name, goal=None, note=""):
        return over(seconds[f"Keras, distillation, {name}"], loop, goal=goal, note=note)

    ratios = {
        "distillation, live teacher / PyTorch loop": beside("live teacher"),
        'distillation, teacher_precision="bfloat16" / PyTorch loop': beside(
            'teacher_precision="bfloat16"', 0.6, fast
        ),
        'distillation, teacher_precision="auto" / PyTorch loop': beside(
            'teacher_precision="auto"', 0.6, fast
        ),
        "distillation, cached / PyTorch loop": beside("cached", 0.5),
        "plain student training / PyTorch": over(
            seconds["Keras, student alone"], seconds["PyTorch, student alone"]
        ),
        "teacher forward pass / PyTorch": over(
            seconds["Keras, teacher forward"], seconds["PyTorch, teacher forward"]
        ),
    }
    tables = [
        {
            "columns": [f"batches of {batch}", "ms a step", "ms of processor time"],
            "rows": [[k, 1000 * v / STEPS, 1000 * v.processor / STEPS] for k, v in seconds.items()],
        }
    ]
    notes = [
        f"Teacher {'-'.join(map(str, wide))}, student {'-'.join(map(str, widths))}; "
        f"PyTorch runs {loop_threads} threads.",
        *(f'`teacher_precision="auto"` said: {each}' for each in said),
    ]
    if keras.config.backend() == "tensorflow":
        found = parts(repeats, widths, x, y)
        tables.append(
            {
                "columns": ["student alone, on TensorFlow", "ms a step"],
                "rows": [[k, 1000 * v / STEPS] for k, v in found.items()],
            }
        )
        top = shares(widths, batch)
        tables.append(
            {"columns": ["operation, by tf.profiler", "% of all operations"], "rows": top}
        )
    save(
        "torch",
        started,
        ratios=ratios,
        tables=tables,
        notes=notes,
        quick=arguments.quick,
        backend=keras.config.backend(),
    )


if __name__ == "__main__":
    main()
