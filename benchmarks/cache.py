"""What a cached teacher costs: writing, reading, and an epoch of training from it.

    python benchmarks/cache.py [--repeats 5] [--samples 6144] [--records 1000000] [--quick]

Each ratio is the median over turns in which all contenders are timed one after the other, so that a
busy machine slows all. An epoch is timed from its beginning to its end within `fit`, the first of
each `fit`, in which the inputs are compared with the cache, apart from the others.
"""

import argparse
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings

import keras
import numpy as np
from side_by_side import (
    Seconds,
    begin,
    cnn,
    discard,
    images,
    medians,
    ours,
    plain,
    predicting,
    ratio,
    save,
    spread,
    taught,
)

import keras_kd as kd
from keras_kd import cache
from keras_kd.cache import layout
from keras_kd.cache.reader import Records

CLASSES = 100


class Epochs(keras.callbacks.Callback):
    """Seconds of each epoch."""

    def on_train_begin(self, logs=None):  # noqa: D102
        self.seconds, self.processor = [], []

    def on_epoch_begin(self, epoch, logs=None):  # noqa: D102
        self.began, self.spent = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch, logs=None):  # noqa: D102
        self.seconds.append(time.perf_counter() - self.began)
        self.processor.append(time.process_time() - self.spent)


def epochs(folder, x, y, teacher, repeats, widths):
    """An epoch from the cache over an epoch of the student alone, shuffled."""
    import tensorflow as tf

    cache.write(teacher, x, folder, top_k=10)
    cached = kd.teachers.CachedTeacher(folder)
    alone = plain(cnn(widths, CLASSES, name="student"))
    distiller = ours(cnn(widths, CLASSES, name="student"), cached)
    # Its autotuner holds short epochs back, as `side_by_side.untuned` says.
    options = tf.data.Options()
    options.autotune.enabled = False

    def samples(join):
        data = tf.data.Dataset.from_tensor_slices((x, y))
        data = cached.join(data) if join else data
        return data.shuffle(1024).batch(128)

    def unbatched(join):
        data = tf.data.Dataset.from_tensor_slices((x, y))
        data = cached.join(data.batch(128)).unbatch() if join else data
        return data.shuffle(1024).batch(128)

    def pages(join):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(128)
        data = cached.join(data) if join else data
        return data.shuffle(64)

    times = Epochs()

    def epoch_of(model, *data, **options):
        def run():
            model.fit(*data, epochs=3, verbose=0, callbacks=[times], **options)
            return Seconds(sum(times.seconds[1:]) / 2, sum(times.processor[1:]) / 2)

        return run

    def stream(model, make):
        data = make(model is distiller).prefetch(2).with_options(options)
        return epoch_of(model, data, shuffle=False)

    kinds = {
        "arrays": lambda model: epoch_of(model, x, y, batch_size=128),
        "tf.data, joined by batch": lambda model: stream(model, pages),
        "tf.data, joined by batch, shuffled by sample": lambda model: stream(model, unbatched),
        "tf.data, joined by sample": lambda model: stream(model, samples),
    }
    ratios, rows = {}, []
    for kind, make in kinds.items():
        pair = {"alone": make(alone), "cached": make(distiller)}
        found = spread(pair, repeats)
        ratios[f"cached epoch / student-only epoch, {kind}"] = ratio(
            goal=1.08, **found["cached"][1]
        )
        rows.append([f"epoch, {kind}", found["cached"][0], found["alone"][0]])
    return ratios, rows


def costly_teacher(x, y, quick):
    """The teacher whose answers are written, and its widths."""
    widths = (8, 16) if quick else (48, 96, 192)
    return taught(cnn(widths, CLASSES, name="teacher"), x, y, steps=96), widths


def writing(folder, x, teacher, repeats):
    """Writing over `predict`, each call with the trace of its function."""
    count = iter(range(10_000))

    def write(precision):
        def run():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cache.write(
                    teacher,
                    x,
                    folder / f"write_{next(count)}",
                    dtype="float32",
                    batch_size=128,
                    teacher_precision=precision,
                )
            said.update(str(w.message).split(":")[0] for w in caught if "runs" in str(w.message))

        return run

    def predict():
        # As `write` traces its function anew in each call.
        teacher.predict_function = None
        run_predict()

    run_predict = predicting(teacher, x, 128)

    said = set()
    contenders = {"predict": predict}
    goals = {"float32": 1.05, "bfloat16": 0.4, "auto": 0.4}
    contenders |= {precision: write(precision) for precision in goals}
    found = spread(contenders, repeats)
    note = "the goal is for AMX or AVX-512 BF16"
    ratios = {
        f"cache write / teacher.predict, {precision}": ratio(
            goal=goal, note="" if precision == "float32" else note, **found[precision][1]
        )
        for precision, goal in goals.items()
    }
    rows = [[f"write, {p}", found[p][0], found["predict"][0]] for p in goals]
    return ratios, rows, [f'`teacher_precision="auto"` said of writing: {each}.' for each in said]


def synthetic(folder, count, top_k=100):
    """A cache of random answers, as `write` lays it out, without a teacher."""
    form = layout.Layout((layout.Output((1000,), top_k=top_k),), (), "float16", True)
    manifest = layout.Manifest(
        teacher={"name": "random", "fingerprint": "0" * 64, "precision": "float32"},
        layout=form,
        template=None,
        inputs=[{"shape": [1], "dtype": "float32"}],
        augment={"name": "none", "seed": 0, "first_view": 0},
        epochs=1,
        shard_size=65_536,
        count=count,
        complete=True,
    )
    rng, order = np.random.default_rng(0), hashlib.sha256()
    for shard in range(manifest.shard_count(count)):
        samples = min(65_536, count - shard * 65_536)
        records = rng.bytes(samples * form.record.itemsize)
        inputs = rng.bytes(samples * 4)
        (folder / layout.records_file(0, shard)).write_bytes(records)
        (folder / layout.inputs_file(shard)).write_bytes(inputs)
        order.update(inputs)
        digest = hashlib.sha256(records).hexdigest()
        manifest.shards.append({"epoch": 0, "shard": shard, "samples": samples, "sha256": digest})
    manifest.order = order.hexdigest()
    (folder / layout.MANIFEST).write_text(manifest.dumps())
    return manifest


_READER = """
import sys, psutil, numpy as np
me = psutil.Process()
from keras_kd.cache.reader import Records
imported = me.memory_info().rss
records, peak, rng = Records(sys.argv[1]), 0, np.random.default_rng(2)
opened = me.memory_info().rss
for _ in range(int(sys.argv[2])):
    records.read(rng.integers(0, records.count, 256))
    peak = max(peak, me.memory_info().rss)
print(imported, opened, peak, int("keras" in sys.modules))
"""
_MAPPED = """
import sys, psutil, numpy as np
me = psutil.Process()
imported = me.memory_info().rss
plain = np.memmap(sys.argv[1], "u1", "r").reshape(-1, int(sys.argv[3]))
rng = np.random.default_rng(2)
peak = 0
for _ in range(int(sys.argv[2])):
    plain[rng.integers(0, len(plain), 256)]
    peak = max(peak, me.memory_info().rss)
print(imported, imported, peak, 0)
"""


def memory(code, *arguments):
    """Resident megabytes after importing, after opening, and at most while reading."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [int(n) / 1e6 for n in said[:3]], bool(int(said[3]))


def reading(folder, count, repeats):
    """Random reads of a large cache beside `numpy.memmap`, and the memory they take."""
    manifest = synthetic(folder, count)
    flat = folder / "flat.bin"
    with flat.open("wb") as stream:
        for shard in range(manifest.shard_count(count)):
            stream.write((folder / layout.records_file(0, shard)).read_bytes())
    records = Records(folder)
    plain_map = np.memmap(flat, "u1", "r", shape=(count, manifest.record_bytes))
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, count, 256) for _ in range(400)]
    found = records.read(batches[0]).view("u1").reshape(256, -1)
    if not np.array_equal(found, plain_map[batches[0]]):
        raise SystemExit("The cache reads other bytes than numpy.memmap.")
    in_order = [np.arange(i, i + 256) for i in range(0, min(count, 102_400) - 255, 256)]

    def read(source, batches):
        return lambda: discard([source(rows) for rows in batches])

    seconds = medians(
        {
            "memmap": read(lambda rows: plain_map[rows], batches),
            "cache": read(records.read, batches),
            "cache in order": read(records.read, in_order),
        },
        repeats,
        warm_up=1,
    )
    rate = {
        "memmap": 256 * len(batches) / seconds["memmap"],
        "cache": 256 * len(batches) / seconds["cache"],
        "cache in order": 256 * len(in_order) / seconds["cache in order"],
    }
    turns = 4000 if count >= 1_000_000 else 200
    (base, opened, peak), keras_loaded = memory(_READER, folder, turns)
    (map_base, _, map_peak), _ = memory(_MAPPED, flat, turns, manifest.record_bytes)
    size = manifest.record_bytes
    table = {
        "columns": [
            f"{count:,} records of {size} bytes",
            "records/s",
            "MB/s",
            "resident MB, imported",
            "resident MB, at most",
        ],
        "rows": [
            ["cache, at random", rate["cache"], rate["cache"] * size / 1e6, base, peak],
            [
                "cache, in the written order",
                rate["cache in order"],
                rate["cache in order"] * size / 1e6,
                base,
                peak,
            ],
            [
                "numpy.memmap, at random",
                rate["memmap"],
                rate["memmap"] * size / 1e6,
                map_base,
                map_peak,
            ],
        ],
    }
    notes = [
        f"Reading {count:,} records takes {peak:.0f} MB of resident memory in a process that has "
        f"imported the reader alone (goal 300 MB; Keras {'is' if keras_loaded else 'is not'} "
        f"imported there): {opened - base:.1f} MB more than before opening, and "
        f"{peak - opened:.1f} MB more while reading. In a training process the same few megabytes "
        "come on top of what Keras and its backend take.",
    ]
    return table, notes, {"records_per_second": rate}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=6144)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    arguments = parser.parse_args()
    started = begin()
    if arguments.quick:
        arguments.samples, arguments.records, arguments.repeats = 512, 20_000, 1
    keras.utils.set_random_seed(0)
    x, y = images(arguments.samples, CLASSES)
    widths = (4, 8) if arguments.quick else (8, 16, 32)
    teacher = cnn(tuple(2 * width for width in widths), CLASSES, name="teacher")
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        (root / "large").mkdir()
        table, notes, about = reading(root / "large", arguments.records, arguments.repeats)
        ratios, rows = epochs(root / "epochs", x, y, teacher, arguments.repeats, widths)
        costly, wide = costly_teacher(x, y, arguments.quick)
        written, written_rows, said = writing(root, x, costly, arguments.repeats)
    save(
        "cache",
        started,
        ratios=ratios | written,
        tables=[
            {"columns": ["", "s", "s of its yardstick"], "rows": rows + written_rows},
            table,
        ],
        notes=[
            f"An epoch is {arguments.samples:,} images of 32 by 32 in batches of 128, a student of "
            f"{'-'.join(map(str, widths))}, top 10 of {CLASSES} classes; written are all logits "
            f"of a teacher of {'-'.join(map(str, wide))}.",
            *said,
            *notes,
        ],
        quick=arguments.quick,
        reading=about,
        backend=keras.config.backend(),
    )


if __name__ == "__main__":
    main()
