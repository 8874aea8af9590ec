"""A teacher asked once, and short steps taken many at once, beside plain training and its loops.

    python benchmarks/answers.py [--repeats 3] [--epochs 20] [--only whole,short] [--quick]

Each ratio is the median over turns in which all contenders are timed one after the other. A part
takes less than a minute of processor time; those that are left out keep what they measured before.
"""

import argparse
import pathlib
import tempfile
import time
import warnings

import keras
import numpy as np
from records import read
from side_by_side import (
    Seconds,
    begin,
    cnn,
    crossentropy,
    discard,
    fitting,
    images,
    ours,
    plain,
    ratio,
    save,
    sized_teacher,
    theirs,
    turns,
)

import keras_kd as kd
from keras_kd.datasets import digits

BATCH = 64


def timed(run):
    """Seconds of one call, by the clock and by processor time."""
    began, processor = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - began, time.process_time() - processor)


def median_over(times, part, *whole):
    """The median over turns of one contender over the sum of others, as arguments of `ratio`."""
    pairs = list(zip(times[part], *(times[name] for name in whole)))
    clock = np.median([first / sum(rest) for first, *rest in pairs])
    spent = np.median([f.processor / sum(r.processor for r in rest) for f, *rest in pairs])
    return {"value": float(clock), "processor": float(spent)}


def many_epochs(repeats, epochs, quick):
    """Training from arrays with default settings, beside the peer and beside the least there is."""
    x, y = images(BATCH * 8)
    widths = (4, 8)
    alone = plain(cnn(widths, name="student"))
    few = x[: 8 * BATCH], y[: 8 * BATCH]
    # Five steps of the student are one forward pass of the teacher.
    teacher, teacher_widths, cost = sized_teacher(
        fitting(alone, *few), few[0], 5.0, (56, 108), rounds=1
    )
    options = {"batch_size": BATCH, "epochs": epochs, "verbose": 0}
    # The peer's time grows with its epochs; a few of them are enough to know it.
    some = max(2, epochs // 10)

    def peer():
        model = theirs(cnn(widths, name="student"), teacher)
        model.fit(*few, batch_size=BATCH, verbose=0)
        spent = timed(lambda: model.fit(x, y, **(options | {"epochs": some})))
        return Seconds(spent * epochs / some, spent.processor * epochs / some)

    def remembering():
        # A fresh one each turn, so that each asks its teacher; traced on few rows before.
        model = ours(cnn(widths, name="student"), teacher)
        model.fit(*few, **(options | {"epochs": 2}))
        return timed(lambda: model.fit(x, y, **options))

    contenders = {
        "keras.distillation": peer,
        "distiller": remembering,
        "plain epochs": lambda: timed(lambda: alone.fit(x, y, **options)),
        "teacher pass": lambda: timed(
            lambda: discard(teacher.predict(x, batch_size=BATCH, verbose=0))
        ),
    }
    # Each has been traced by now.
    times = turns(contenders, repeats, 0)
    ratios = {
        f"{epochs} epochs, teacher asked once / keras.distillation": ratio(
            goal=0.30, **median_over(times, "distiller", "keras.distillation")
        ),
        f"{epochs} epochs, teacher asked once / (plain epochs + one teacher pass)": ratio(
            goal=1.05, **median_over(times, "distiller", "plain epochs", "teacher pass")
        ),
    }
    note = (
        f"{len(x):,} images of 32 by 32 in batches of {BATCH}; the teacher, of widths "
        f"{'-'.join(map(str, teacher_widths))} beside {'-'.join(map(str, widths))}, costs "
        f"{cost:.1f} student steps a forward pass. `keras.distillation` was timed over {some} of "
        f"{epochs} epochs."
    )
    return ratios, [[name, *of(all_)] for name, all_ in times.items()], note


def of(all_):
    """Medians of seconds, by the clock and by processor time."""
    return [float(np.median(all_)), float(np.median([each.processor for each in all_]))]


def fixed_costs(repeats, folder):
    """What a call of `fit` and an epoch cost beside plain Keras where the work is nothing."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2048, 16)).astype("float32"), rng.integers(0, 10, 2048)

    def mlp(width, name):
        inputs = keras.Input((16,))
        hidden = keras.layers.Dense(width, "relu")(inputs)
        return keras.Model(inputs, keras.layers.Dense(10)(hidden), name=name)

    teacher = mlp(256, "teacher")
    kd.cache.write(teacher, x, folder)
    models = {
        "plain": plain(mlp(16, "plain")),
        "memory": ours(mlp(16, "memory"), teacher),
        "cache": ours(mlp(16, "cache"), kd.teachers.CachedTeacher(folder)),
    }

    def run(model, epochs):
        return timed(lambda: model.fit(x, y, batch_size=1024, epochs=epochs, verbose=0))

    for model in models.values():
        run(model, 2)
    contenders = {
        (name, epochs): (lambda model=model, epochs=epochs: run(model, epochs))
        for name, model in models.items()
        for epochs in (1, 11)
    }
    times = turns(contenders, 3 * repeats, 1)
    spent = {name: np.array(of(all_)) for name, all_ in times.items()}
    rows = []
    for name in ("memory", "cache"):
        call = spent[name, 1] - spent["plain", 1]
        epoch = (spent[name, 11] - spent[name, 1] - spent["plain", 11] + spent["plain", 1]) / 10
        rows.append([f"a call of fit beside a {name}", *map(float, 1000 * call)])
        rows.append([f"an epoch beside a {name}", *map(float, 1000 * epoch)])
    return {}, rows, ""


def cached_epochs(repeats, quick, folder):
    """Epochs of 32 short steps: from a cache and from memory, beside the student alone."""
    steps, epochs = 32, 2 if quick else 10
    data = digits.load()
    rows = np.arange(steps * BATCH) % len(data.x_train)
    x, y = data.x_train[rows], data.y_train[rows]
    teacher = digits_student("teacher")
    kd.cache.write(teacher, x, folder)
    models = {
        "student alone": plain(digits_student("alone")),
        "cached": ours(digits_student("cached"), kd.teachers.CachedTeacher(folder)),
        "memory": ours(digits_student("memory"), teacher),
    }

    def fit(model):
        return lambda: discard(model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0))

    times = turns({name: fit(model) for name, model in models.items()}, repeats + 2, 1)
    ratios = {
        f"epoch of {steps} short steps, {name} / student alone": ratio(
            goal=1.05, **median_over(times, name, "student alone")
        )
        for name in ("cached", "memory")
    }
    table = [
        [f"{name}, of {steps} steps an epoch", *(1000 * t / steps / epochs for t in of(all_))]
        for name, all_ in times.items()
    ]
    return ratios, table, ""


def digits_student(name):
    """The demo's student."""
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1))
    for i, filters in enumerate((8, 16)):
        if i:
            x = layers.MaxPooling2D(2, padding="same")(x)
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x), name=name)


def bare_loop(model, x, y, batch, answers=None):
    """An epoch in one compiled function that does nothing but the arithmetic of its steps."""
    import tensorflow as tf

    optimizer, loss = keras.optimizers.Adam(), crossentropy()
    optimizer.build(model.trainable_variables)
    rows, labels, told = map(tf.constant, (x, y, x if answers is None else answers))

    @tf.function
    def epoch():
        order = tf.random.shuffle(tf.range(len(x)))
        for start in tf.range(0, len(x), batch):
            chosen = order[start : start + batch]
            with tf.GradientTape() as tape:
                logits = model(tf.gather(rows, chosen), training=True)
                value = loss(tf.gather(labels, chosen), logits)
                if answers is not None:
                    log_p = tf.nn.log_softmax(tf.gather(told, chosen))
                    log_q = tf.nn.log_softmax(logits)
                    value += tf.reduce_mean(tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), -1))
            variables = model.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(value, variables), variables))

    return lambda: discard(epoch())


def short_steps(repeats, quick):
    """A student of 1,490 parameters in `fit`, beside a bare compiled loop."""
    data = digits.load()
    x, y, batch, epochs = data.x_train, data.y_train, 32, 2 if quick else 10
    steps = epochs * -(-len(x) // batch)
    teacher = digits_student("teacher")

    def distiller(answers, at_once):
        model = kd.Distiller(digits_student("student"), teacher, teacher_answers=answers)
        model.compile("adam", crossentropy(), metrics=["accuracy"], steps_per_execution=at_once)
        return model

    def student(at_once):
        # No teacher: the student's training alone, in the same class.
        model = kd.Distiller(digits_student("student"))
        model.compile("adam", crossentropy(), metrics=["accuracy"], steps_per_execution=at_once)
        return model

    def keras_fit(at_once):
        model = digits_student("student")
        model.compile("adam", crossentropy(), metrics=["accuracy"], steps_per_execution=at_once)
        return model

    def fit(model):
        return lambda: discard(model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0))

    def repeated(run):
        return lambda: [run() for _ in range(epochs)] and None

    told = teacher.predict(x, verbose=0)
    contenders = {
        "bare loop": repeated(bare_loop(digits_student("bare"), x, y, batch)),
        "bare loop, distilled": repeated(bare_loop(digits_student("bare"), x, y, batch, told)),
        "fit": fit(keras_fit(1)),
        "fit, steps_per_execution=8": fit(keras_fit(8)),
        "student, auto": fit(student("auto")),
        "distilled live, steps_per_execution=8": fit(distiller("live", 8)),
        "distilled from memory, auto": fit(distiller("memory", "auto")),
    }
    times = turns(contenders, repeats, 1)
    ratios = {
        'student, steps_per_execution="auto" / bare loop': ratio(
            goal=1.3, of_processor=True, **median_over(times, "student, auto", "bare loop")
        ),
        'distilled from memory, steps_per_execution="auto" / bare loop of that': ratio(
            goal=1.3,
            of_processor=True,
            **median_over(times, "distilled from memory, auto", "bare loop, distilled"),
        ),
    }
    table = [[name, *(1000 * each / steps for each in of(all_))] for name, all_ in times.items()]
    return ratios, table, ""


PARTS = {
    "whole": ["", "s", "s of processor time"],
    "fixed": ["over plain Keras", "ms", "ms of processor time"],
    "cached": ["epochs of short steps", "ms a step", "ms of processor time"],
    "short": ["", "ms a step", "ms of processor time"],
}
"""The parts and the columns of their tables."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    started = begin()
    repeats = 2 if arguments.quick else arguments.repeats
    epochs = 4 if arguments.quick else arguments.epochs
    keras.utils.set_random_seed(0)
    quick = arguments.quick
    found = (read("performance_answers") or {}).get("measured", {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        run = {
            "whole": lambda: many_epochs(repeats, epochs, quick),
            "fixed": lambda: fixed_costs(repeats, folder / "cache"),
            "cached": lambda: cached_epochs(repeats, quick, folder / "digits"),
            "short": lambda: short_steps(repeats, quick),
        }
        for part in arguments.only.split(","):
            ratios, rows, note = run[part]()
            found[part] = {"ratios": ratios, "rows": rows, "note": note}
    ordered = {part: found[part] for part in PARTS if part in found}
    save(
        "answers",
        started,
        ratios={name: each for one in ordered.values() for name, each in one["ratios"].items()},
        tables=[{"columns": PARTS[part], "rows": one["rows"]} for part, one in ordered.items()],
        notes=[
            *(one["note"] for one in ordered.values() if one["note"]),
            "The machine was shared: processor time tells more than the clock.",
        ],
        quick=quick,
        backend=keras.config.backend(),
        measured=found,
    )


if __name__ == "__main__":
    main()
