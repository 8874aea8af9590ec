"""What the timing benchmarks share: contenders that take turns, the machine, the models, the file.

Every ratio comes from one run: the contenders take turns, a few steps each, and the medians are
compared, so that a machine that slows down slows all of them.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import time

import records

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")
_PACKAGES = ("keras_kd", "keras", "tensorflow", "jax", "torch", "numpy")


def machine():
    """The processor, what it knows of short floats, the versions and the load."""
    about = {"system": platform.system(), "processor": platform.processor() or platform.machine()}
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = []
    if cpuinfo.exists():
        lines = dict(
            (part.strip() for part in line.split(":", 1))
            for line in cpuinfo.read_text().splitlines()
            if ":" in line
        )
        about["processor"] = lines.get("model name", about["processor"])
        flags = lines.get("flags", "").split()
    # Those that this process may use, where the system tells.
    allowed = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
    about["cores"] = len(allowed(0))
    about["flags"] = [flag for flag in _FLAGS if flag in flags]
    about["short floats in hardware"] = bool({"avx512_bf16", "amx_bf16"} & set(flags))
    about["load at the start"] = round(os.getloadavg()[0], 1)
    about["python"] = platform.python_version()
    for package in _PACKAGES:
        # TensorFlow for processors alone has a package name of its own.
        for name in (package, f"{package}_cpu"):
            try:
                about[package] = importlib.metadata.version(name)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return about


class Seconds(float):
    """Seconds by the clock, which know the seconds of processor time spent in them.

    Where a machine shares its processor the clock also counts what its neighbors do.
    """

    def __new__(cls, clock, processor):
        """Both kinds of seconds as one number."""
        made = super().__new__(cls, clock)
        made.processor = processor
        return made


def turns(contenders, repeats, warm_up):
    """Seconds of each contender in each turn, without the turns that count for nothing.

    A contender returns its own seconds, or None to be timed from outside.
    """
    times = {name: [] for name in contenders}
    for turn in range(repeats + warm_up):
        for name, run in contenders.items():
            began, processor = time.perf_counter(), time.process_time()
            own = run()
            spent = Seconds(time.perf_counter() - began, time.process_time() - processor)
            if turn >= warm_up:
                times[name].append(spent if own is None else own)
    return times


def middle(values):
    """The median by the clock, and that of the processor time where all values know it."""
    clock = statistics.median(values)
    if not all(isinstance(value, Seconds) for value in values):
        return clock
    return Seconds(clock, statistics.median(value.processor for value in values))


def medians(contenders, repeats, warm_up=2):
    """Median seconds of each contender; they take turns."""
    return {name: middle(all_) for name, all_ in turns(contenders, repeats, warm_up).items()}


def spread(contenders, repeats, warm_up=1):
    """As `medians`, with the median over turns of each ratio to the first contender.

    The ratio is an argument list of `ratio`: by the clock, and by processor time.
    """
    times = turns(contenders, repeats, warm_up)
    first = next(iter(times.values()))

    def against(values):
        pairs = list(zip(values, first))
        processor = statistics.median(a.processor / b.processor for a, b in pairs)
        return {"value": statistics.median(a / b for a, b in pairs), "processor": processor}

    return {name: (middle(values), against(values)) for name, values in times.items()}


def ratio(value, goal=None, note="", processor=None, of_processor=False):
    """One line of the table of ratios, by the clock and by processor time where it is known.

    `of_processor` says that the goal is one of processor time.
    """
    known = {} if processor is None else {"processor": processor}
    known |= {"goal_of": "processor"} if of_processor else {}
    return {"value": value, "goal": goal, "note": note, **known}


def over(part, *whole, goal=None, note=""):
    """The ratio of some median seconds to the sum of others."""
    return ratio(
        part / sum(whole), goal, note, part.processor / sum(each.processor for each in whole)
    )


def save(part, started, *, ratios=None, tables=(), notes=(), quick=False, **more):
    """Print a result and write it to `benchmarks/results/performance_PART.json`.

    Quick sizes show that a script works; their numbers go to the terminal alone.
    """
    result = {
        "part": part,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": started["machine"],
        "took_seconds": round(time.perf_counter() - started["at"], 1),
        "ratios": ratios or {},
        "tables": list(tables),
        "notes": list(notes),
        **more,
    }
    print(render(result))
    if quick:
        print("quick sizes: nothing is written")
        return
    records.save(f"performance_{part}", result)


def begin():
    """When a script began, and on what."""
    return {"at": time.perf_counter(), "machine": machine()}


def render(result):
    """The tables of a result as Markdown."""
    lines = []
    if result["ratios"]:
        # By the clock, and where it is known by the processor time of the same turns.
        both = any("processor" in each for each in result["ratios"].values())
        lines += [
            f"| Ratio | Measured |{' by processor time |' if both else ''} Goal | |",
            f"|---|---:|{'---:|' if both else ''}---:|---|",
        ]
        for name, each in result["ratios"].items():
            goal = "" if each["goal"] is None else f"{each['goal']:.2f}"
            judged = each[each.get("goal_of", "value")]
            met = "" if each["goal"] is None else "met" if judged <= each["goal"] else "missed"
            met += " by processor time" if "goal_of" in each else ""
            said = "; ".join(part for part in (met, each["note"]) if part)
            spent = f" {each['processor']:.2f} |" if "processor" in each else " |" * both
            lines.append(f"| {name} | {each['value']:.2f} |{spent} {goal} | {said} |")
        lines.append("")
    for table in result["tables"]:
        lines.append("| " + " | ".join(table["columns"]) + " |")
        lines.append("|---|" + "---:|" * (len(table["columns"]) - 1))
        for row in table["rows"]:
            lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
        lines.append("")
    lines += [f"- {note}" for note in result["notes"]]
    return "\n".join(lines).rstrip()


def _cell(value):
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value and abs(value) < 0.1:
        return f"{value:.3f}"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


# ------------------------------------------------------------------------ models


def cnn(widths, classes=10, name=None, size=32):
    """Convolutions with BatchNorm, two a width, halved between widths."""
    import keras
    from keras import layers

    inputs = keras.Input((size, size, 3))
    x = inputs
    for i, width in enumerate(widths):
        for j in range(2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}{j}")(x)
            # Statistics that `taught` makes in a few dozen steps.
            x = layers.BatchNormalization(momentum=0.9, name=f"norm{i}{j}")(x)
            x = layers.ReLU(name=f"relu{i}{j}")(x)
        x = layers.MaxPooling2D(name=f"pool{i}")(x)
    x = layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=name)


def images(count, classes=10, size=32):
    """Pictures that a network can tell apart, `(count, size, size, 3)`, and their classes."""
    import numpy as np

    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, count)
    of_class = rng.normal(size=(classes, size, size, 3)).astype("float32")
    return of_class[y] + rng.normal(0, 0.5, (count, size, size, 3)).astype("float32"), y


def taught(teacher, x, y, steps=48):
    """The teacher, sure of its classes: `"auto"` takes no copy that answers otherwise."""
    import keras

    teacher.compile(keras.optimizers.Adam(), crossentropy())
    rows = min(64 * steps, len(x))
    teacher.fit(x[:rows], y[:rows], batch_size=64, epochs=-(-64 * steps // rows), verbose=0)
    return teacher


def crossentropy():
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def plain(student, **options):
    """The student, compiled to train on the labels alone."""
    import keras

    student.compile(keras.optimizers.SGD(0.01), loss=crossentropy(), **options)
    return student


def ours(student, teacher, losses=None, precision="float32", **options):
    """The distiller of this package."""
    import keras

    import keras_kd as kd

    distiller = kd.Distiller(student, teacher, teacher_precision=precision)
    distiller.compile(
        keras.optimizers.SGD(0.01), loss=crossentropy(), distillation_loss=losses, **options
    )
    return distiller


def theirs(student, teacher, losses=None):
    """`keras.distillation` with the loss that computes KL (its default does not)."""
    import keras
    from keras.distillation import Distiller, LogitsDistillation

    kl = LogitsDistillation(loss=keras.losses.KLDivergence(), temperature=2.0)
    distiller = Distiller(teacher, student, distillation_losses=losses or [kl])
    distiller.compile(keras.optimizers.SGD(0.01), loss=crossentropy())
    return distiller


def sized_teacher(student_step, x, cost, base=(32, 64, 128), rounds=5, batch=64, **options):
    """A teacher whose forward pass takes `cost` times the work of a training step of the student.

    Args:
        student_step: Trains the student on `x` for one epoch in place.
        x: Inputs.
        cost: Teacher forward over student step.
        base: Widths to begin with.
        rounds: How many widths are tried at most.
        batch: Rows of a batch, as in `student_step`.
        options: Further arguments of `cnn`.

    Returns:
        The teacher that came closest, its widths, and its cost.
    """
    scale, tried = 1.0, []
    for _ in range(rounds):
        widths = tuple(max(4, 4 * round(width * scale / 4)) for width in base)
        teacher = cnn(widths, name="teacher", **options)
        seconds = medians({"step": student_step, "forward": predicting(teacher, x, batch)}, 7)
        # In processor time, which what else the machine does hardly changes.
        found = seconds["forward"].processor / seconds["step"].processor
        tried.append((abs(found / cost - 1), teacher, widths, found))
        if tried[-1][0] < 0.05:
            break
        # The cost grows with about the square of the width, less where it is narrow.
        scale *= (cost / found) ** 0.6
    return min(tried, key=lambda each: each[0])[1:]


def discard(_):
    """Nothing, whatever was computed: the time is taken from outside."""


def fitting(model, x, y, batch=64, **options):
    """A function that takes one epoch of `fit` in the given order."""
    import keras

    if keras.config.backend() != "tensorflow":
        options |= {"batch_size": batch, "shuffle": False}
        return lambda: discard(model.fit(x, y, verbose=0, **options))
    data = untuned((x, y), batch)
    joined = getattr(getattr(model, "teacher", None), "join", None)
    data = data if joined is None else joined(data)
    return lambda: discard(model.fit(data, verbose=0, **options))


def predicting(model, x, batch=64):
    """A function that runs `predict` once."""
    import keras

    if keras.config.backend() != "tensorflow":
        return lambda: discard(model.predict(x, batch_size=batch, verbose=0))
    data = untuned(x, batch)
    return lambda: discard(model.predict(data, verbose=0))


def evaluating(model, x, y, batch=64):
    """A function that runs `evaluate` once."""
    import keras

    if keras.config.backend() != "tensorflow":
        return lambda: discard(model.evaluate(x, y, batch_size=batch, verbose=0))
    data = untuned((x, y), batch)
    return lambda: discard(model.evaluate(data, verbose=0))


def untuned(arrays, batch):
    """Batches in order, without the autotuner of `tf.data`.

    An epoch of `fit`, over arrays as well, ends when the autotuner next looks up: after 10 ms,
    30, 70 and so on, twice as long each time. Epochs of a second would be timed as 0.63 or 1.27.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    data = tf.data.Dataset.from_tensor_slices(arrays).batch(batch).prefetch(2)
    return data.with_options(options)
