"""What a cached teacher costs: writing, reading, and an epoch of training from it.

    python benchmarks/cache.py
    python benchmarks/cache.py --repeats 7 --samples 4096

Each ratio is the median over repeats in which both sides are timed one after
the other, so that a busy machine slows both. Prints a table and writes it to
`benchmarks/results/cache.json`.
"""

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np

import keras_kd as kd
from keras_kd import cache
from keras_kd.cache import layout
from keras_kd.cache.reader import Records

CLASSES = 100
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def convnet(widths, name):
    x = inputs = keras.Input((32, 32, 3))
    for width in widths:
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x), name=name)


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(repeats, one, other):
    """Median ratio of two functions timed in turn, and the median seconds of each."""
    pairs = [(timed(one), timed(other)) for _ in range(repeats)]
    return (
        statistics.median(a / b for a, b in pairs),
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
    )


def epochs(folder, x, y, teacher, repeats, count=2):
    """An epoch from the cache over an epoch of the student alone, shuffled."""
    import tensorflow as tf

    cache.write(teacher, x, folder, top_k=10)
    cached = kd.teachers.CachedTeacher(folder)
    student = convnet((16, 32, 64), "student")
    alone = keras.models.clone_model(student)
    alone.compile("adam", loss=LOSS)
    distiller = kd.Distiller(student, cached)
    distiller.compile("adam", loss=LOSS)

    def stream(join):
        data = tf.data.Dataset.from_tensor_slices((x, y))
        data = cached.join(data.batch(128)).unbatch() if join else data
        return data.shuffle(1024).batch(128).prefetch(tf.data.AUTOTUNE)

    def pages(join):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(128)
        data = cached.join(data) if join else data
        return data.shuffle(64).prefetch(tf.data.AUTOTUNE)

    def arrays(model):
        return lambda: model.fit(x, y, batch_size=128, epochs=count, verbose=0)

    def dataset(model, data):
        return lambda: model.fit(data, epochs=count, verbose=0, shuffle=False)

    rows = {}
    pairs = {
        "arrays": (arrays(distiller), arrays(alone)),
        "tf.data": (dataset(distiller, pages(True)), dataset(alone, pages(False))),
        "tf.data by sample": (dataset(distiller, stream(True)), dataset(alone, stream(False))),
    }
    for name, (one, other) in pairs.items():
        one()
        other()
        rows[f"cached epoch / student-only epoch, {name}"] = ratio(repeats, one, other)
    return rows


def writing(folder, x, teacher, repeats):
    """Writing over `predict`, both with the trace of their function."""
    folders = iter(range(1000))

    def write():
        cache.write(teacher, x, folder / f"write_{next(folders)}", dtype="float32")

    def predict():
        teacher.predict_function = None
        teacher.predict(x, batch_size=128, verbose=0)

    write()
    predict()
    return {"cache write / predict, float32": ratio(repeats, write, predict)}


def synthetic(folder, count, top_k=100):
    """A cache of random answers, as `write` lays it out, without a teacher."""
    form = layout.Layout((layout.Output((1000,), top_k=top_k),), (), "float16", True)
    manifest = layout.Manifest(
        teacher={"name": "random", "fingerprint": "0" * 64},
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


def reading(folder, count, repeats):
    """Random reads of a large cache beside `numpy.memmap`, and the memory they take."""
    manifest = synthetic(folder, count)
    flat = folder / "flat.bin"
    with flat.open("wb") as stream:
        for shard in range(manifest.shard_count(count)):
            stream.write((folder / layout.records_file(0, shard)).read_bytes())
    records = Records(folder)
    plain = np.memmap(flat, "u1", "r", shape=(count, manifest.record_bytes))
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, count, 256) for _ in range(400)]
    found = records.read(batches[0]).view("u1").reshape(256, -1)
    if not np.array_equal(found, plain[batches[0]]):
        raise SystemExit("The cache reads other bytes than numpy.memmap.")

    def read(source):
        return lambda: [source(rows) for rows in batches]

    name = f"random reads of {count:,} records / numpy.memmap"
    rows = {name: ratio(repeats, read(records.read), read(lambda rows: plain[rows]))}
    rate = len(batches) * 256 / rows[name][1]
    script = (
        "import sys, psutil, numpy as np\n"
        "from keras_kd.cache.reader import Records\n"
        "me, rng = psutil.Process(), np.random.default_rng(2)\n"
        "before = me.memory_info().rss\n"
        "records, peak = Records(sys.argv[1]), 0\n"
        "for _ in range(4000):\n"
        "    records.read(rng.integers(0, records.count, 256))\n"
        "    peak = max(peak, me.memory_info().rss)\n"
        "print(before, peak)\n"
    )
    # A process of its own, without the memory of a backend.
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    command = [sys.executable, "-c", script, str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, peak = (int(n) / 1e6 for n in said.stdout.split())
    memory = {"before_mb": before, "peak_mb": peak, "reader_mb": peak - before}
    return rows, {"records_per_second": rate, "bytes": manifest.nbytes, **memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    started = time.time()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(arguments.samples, 32, 32, 3)).astype("float32")
    y = rng.integers(0, CLASSES, arguments.samples)
    teacher = convnet((32, 64, 128), "teacher")
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        (root / "large").mkdir()
        read, about = reading(root / "large", arguments.records, arguments.repeats)
        table = {
            **epochs(root / "epochs", x, y, teacher, arguments.repeats),
            **writing(root, x, teacher, arguments.repeats),
            **read,
        }
    print(f"{'':58}{'ratio':>8}{'one, s':>10}{'other, s':>10}")
    for name, (value, one, other) in table.items():
        print(f"{name:58}{value:8.3f}{one:10.3f}{other:10.3f}")
    print(
        f"{about['records_per_second']:,.0f} records/s read at random from {about['bytes']:,} "
        f"bytes; resident memory {about['before_mb']:.0f} MB before, at most "
        f"{about['peak_mb']:.0f} MB while reading (+{about['reader_mb']:.0f} MB)"
    )
    result = {
        "arguments": vars(arguments),
        "ratios": {name: value for name, (value, _, _) in table.items()},
        "seconds": {name: values[1:] for name, values in table.items()},
        "reading": about,
        "keras": keras.version(),
        "backend": keras.backend.backend(),
        "load": os.getloadavg(),
        "took_seconds": time.time() - started,
    }
    path = pathlib.Path(__file__).parent / "results" / "cache.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
