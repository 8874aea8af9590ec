"""Teacher to small file: each stage of compression, measured on the file that ships.

    python benchmarks/compress.py                        # all three data sets, three seeds
    python benchmarks/compress.py --dataset fsdd --seeds 1
    python benchmarks/compress.py --table                # docs/compress.md from the results
    python benchmarks/compress.py --sizes                # what pruned files take; minutes

One float teacher a data set. For every seed: a student trained alone on the same
rows and quantized after training; the same student distilled (CE + 2 DIST at
temperature 4, from a cache of the teacher), quantized after training by four
tools, and by quantization-aware training, ours under the teacher and TFMOT's
without one; distilled, pruned and quantization-aware; distilled and pruned as
`kd.export` writes it, without zeros. Each row is a TFLite file
(ONNX for ONNX Runtime): its bytes, plain and gzipped, its accuracy on the test
set, and its p50 latency on one thread. Latencies are measured at the end, file
after file in turns, so that a busy machine slows all. Every row is written as
soon as it is known and models and files are kept under `build/compress`, so a
run that was interrupted goes on where it stopped.
"""

import argparse
import contextlib
import gzip
import io
import itertools
import json
import os
import pathlib
import tempfile
import time

import keras
import numpy as np
from records import RESULTS, put, read, save
from shared_data import load
from side_by_side import machine

import keras_kd as kd
from keras_kd import compress

BATCH = 64
SETTINGS = {
    "fashion_mnist": {
        "rows": 24000,
        "teacher": (32, 64, 128, 128),
        "teacher_epochs": 6,
        "student": (16, 32, 64, 128),
        "epochs": 12,
        "qat_epochs": 3,
    },
    "cifar10": {
        "rows": 12000,
        "teacher": (32, 64, 128, 128),
        "teacher_epochs": 8,
        "student": (24, 48, 96, 128),
        "epochs": 8,
        "qat_epochs": 3,
    },
    "fsdd": {
        "rows": None,
        "teacher": (32, 64, 128, 128),
        "teacher_epochs": 15,
        "student": (16, 32, 64, 128),
        "epochs": 25,
        "qat_epochs": 6,
    },
}
STAGES = (
    "teacher, float32",
    "student alone, float32",
    "student alone, int8 PTQ",
    "distilled, float32",
    "distilled, int8 PTQ (TF converter)",
    "distilled, int8 PTQ (ai-edge-quantizer)",
    "distilled, int8 PTQ (ONNX Runtime)",
    "distilled, int8 QAT (TFMOT)",
    "distilled, int8 QAT",
    "distilled, 50 % pruned, int8 QAT",
    "distilled, int8 PTQ (keras_kd.export, ONNX)",
    "distilled, 50 % pruned, float32 (keras_kd.export, sparse)",
    "distilled, 80 % pruned, float32 (keras_kd.export, sparse)",
    "distilled, 80 % pruned, int8 QAT (keras_kd.export, sparse)",
)
REFERENCES = (
    "MLPerf Tiny's closed-division references are ResNet-8 on CIFAR-10, 85 % in 96 KB, and DS-CNN "
    "on keywords, 90 % in 52.5 KB."
)


def convnet(shape, classes, widths, separable, name):
    x = inputs = keras.Input(shape)
    for index, width in enumerate(widths):
        convolution = keras.layers.Conv2D
        if separable and index:
            x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
            x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
            convolution = lambda width, size, **rest: keras.layers.Conv2D(width, 1, **rest)  # noqa: E731
        x = convolution(width, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
        if min(x.shape[1], x.shape[2]) > 4:
            x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes)(x), name=name)


class Bench:
    """One data set: its teacher, and the models, files and rows of each seed."""

    def __init__(self, dataset, data, work):
        self.dataset, self.settings = dataset, SETTINGS[dataset]
        settings = json.loads(json.dumps(self.settings))
        self.results = read(f"compress_{dataset}") or {"settings": settings, "seeds": {}}
        if self.results["settings"] != settings:
            raise SystemExit(
                f"{RESULTS}/compress_{dataset}.json holds rows made with "
                f"{self.results['settings']}. Delete it and {work}/{dataset} to start again."
            )
        self.data = load(dataset, data, self.settings["rows"])
        self.results["training_rows"] = len(self.data[0])
        self.work = pathlib.Path(work) / dataset
        self.work.mkdir(parents=True, exist_ok=True)

    def model(self, name, seed, make):
        """The model called `name`, trained if no run before this one has done it."""
        path = self.work / f"{name}.keras"
        if not path.exists():
            keras.utils.set_random_seed(seed)
            partial = path.with_name("partial.keras")
            make().save(partial)
            os.replace(partial, path)
        return keras.models.load_model(path)

    def train(self, model, epochs, rate, distilled=True, callbacks=()):
        """Train a model, alone or from the teacher's cached answers, and return it."""
        x, y = self.data[:2]
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * -(-len(x) // BATCH))
        trained, extra = model, {}
        if distilled:
            trained = kd.Distiller(model, kd.teachers.CachedTeacher(self.work / "answers"))
            extra = {
                "distillation_loss": kd.losses.DIST(temperature=4.0),
                "student_loss_weight": 1.0,
                "distillation_loss_weight": 2.0,
            }
        trained.compile(keras.optimizers.Adam(schedule), loss, **extra)
        trained.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=list(callbacks))
        return model

    def teacher(self):
        """The teacher, with its answers in a cache."""
        s = self.settings
        teacher = self.model(
            "teacher",
            0,
            lambda: self.train(
                convnet(self.data[0].shape[1:], 10, s["teacher"], False, "teacher"),
                s["teacher_epochs"],
                2e-3,
                distilled=False,
            ),
        )
        kd.cache.write(teacher, self.data[0], self.work / "answers")
        return teacher

    def run(self, seed):
        """All rows of one seed that are still missing."""
        s, x = self.settings, self.data[0]
        teacher = self.teacher()

        def student():
            return convnet(x.shape[1:], 10, s["student"], True, "student")

        def trained(distilled):
            return self.train(student(), s["epochs"], 4e-3, distilled)

        alone = self.model(f"alone_{seed}", seed, lambda: trained(False))
        distilled = self.model(f"distilled_{seed}", seed, lambda: trained(True))
        calibration = x[:256]
        files = {
            STAGES[0]: lambda: tflite(teacher),
            STAGES[1]: lambda: tflite(alone),
            STAGES[2]: lambda: tflite(alone, calibration),
            STAGES[3]: lambda: tflite(distilled),
            STAGES[4]: lambda: tflite(distilled, calibration),
            STAGES[5]: lambda: edge(distilled, calibration),
            STAGES[6]: lambda: onnx(distilled, calibration),
            STAGES[7]: lambda: self.tfmot(distilled, seed),
            STAGES[8]: lambda: tflite(
                self.model(f"qat_{seed}", seed, lambda: self.aware(distilled)), aware=True
            ),
            STAGES[9]: lambda: tflite(self.pruned_aware(distilled, seed), aware=True),
            STAGES[10]: lambda: exported(distilled, calibration),
            STAGES[11]: lambda: sparse(self.pruned(distilled, seed), x[:64], "float32"),
            STAGES[12]: lambda: sparse(self.pruned(distilled, seed, 0.8), x[:64], "float32"),
            STAGES[13]: lambda: sparse(self.pruned_aware(distilled, seed, 0.8), x[:64], "int8"),
        }
        for stage, make in files.items():
            self.row(seed, stage, make)
        self.latencies(seed)

    def aware(self, model):
        """Quantization-aware fine-tuning under the teacher; the last half with frozen ranges."""
        epochs = self.settings["qat_epochs"]
        quantized = compress.quantize_aware(model, calibration=self.data[0][:512])
        freeze = compress.FreezeObservers(epoch=max(epochs // 2, 1))
        return self.train(quantized, epochs, 1e-3, callbacks=[freeze])

    def prune(self, model, share):
        """The distilled student, pruned while it goes on learning from the teacher."""
        epochs = self.settings["qat_epochs"]
        steps = epochs * -(-len(self.data[0]) // BATCH)
        pruned = compress.prune(
            model, share, schedule="polynomial", end_step=steps // 2, frequency=max(steps // 20, 1)
        )
        return self.train(pruned, epochs, 2e-3)

    def pruned(self, distilled, seed, share=0.5):
        """The pruned student of a seed."""
        name = "pruned" if share == 0.5 else f"pruned{100 * share:.0f}"
        return self.model(f"{name}_{seed}", seed, lambda: self.prune(distilled, share))

    def pruned_aware(self, distilled, seed, share=0.5):
        """Pruned, then quantization-aware with its zeros kept."""
        model = self.pruned(distilled, seed, share)
        name = "pruned_qat" if share == 0.5 else f"pruned{100 * share:.0f}_qat"
        return self.model(f"{name}_{seed}", seed, lambda: self.aware(model))

    def tfmot(self, model, seed):
        """The file that TFMOT makes of the same weights, without a teacher."""
        x, y = self.data[:2]
        return compress.tfmot.quantize(
            model, x, y, self.settings["qat_epochs"], BATCH, learning_rate=3e-4, seed=seed
        ).tflite

    def file(self, seed, stage):
        """Where the file of a row is kept."""
        kind = "onnx" if "ONNX" in stage else "tflite"
        return self.work / str(seed) / f"{STAGES.index(stage)}.{kind}"

    def row(self, seed, stage, make):
        """Make a file and measure what it answers, unless the row is there."""
        rows = self.results["seeds"].setdefault(str(seed), {})
        path = self.file(seed, stage)
        if stage in rows and path.exists():
            return
        made = make()
        blob, more = made if isinstance(made, tuple) else (made, {})
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".partial").write_bytes(blob)
        os.replace(path.with_suffix(".partial"), path)
        x, y = self.data[2:]
        rows[stage] = {
            "bytes": len(blob),
            "gzip": len(gzip.compress(blob, mtime=0)),
            "accuracy": float(np.mean(runner(path).predict(x) == y)),
            **more,
        }
        save(f"compress_{self.dataset}", self.results)
        print(self.dataset, seed, stage, rows[stage], flush=True)

    def latencies(self, seed, rounds=15):
        """The median run of each file, the files in turns."""
        rows = self.results["seeds"][str(seed)]
        if all("p50_us" in row for row in rows.values()):
            return
        x = self.data[2][:1]
        runners = {stage: runner(self.file(seed, stage)) for stage in rows}
        times = {stage: [] for stage in rows}
        for _ in range(rounds):
            for stage, each in runners.items():
                times[stage].append(each.latency(x))
        for stage, row in rows.items():
            row["p50_us"] = round(float(np.median(times[stage])), 1)
        about = machine()
        self.results["machine"] = {key: about[key] for key in ("processor", "flags")}
        save(f"compress_{self.dataset}", self.results)


def runner(path):
    """A file in its runtime, on one thread."""
    return (OnnxRunner if path.suffix == ".onnx" else TFLiteRunner)(path.read_bytes())


def tflite(model, calibration=None, aware=False):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if calibration is not None or aware:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    if calibration is not None:
        converter.representative_dataset = lambda: ([row[None]] for row in calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    # Keras prints the signature of what it exports.
    with contextlib.redirect_stdout(io.StringIO()):
        return converter.convert()


def edge(model, calibration):
    from ai_edge_quantizer import quantizer, recipe

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "float.tflite"
        path.write_bytes(tflite(model))
        from ai_edge_litert.interpreter import Interpreter

        runtime = Interpreter(model_path=str(path))
        key, signature = next(iter(runtime.get_signature_list().items()))
        name = signature["inputs"][0]
        tool = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        ranges = tool.calibrate({key: [{name: row[None]} for row in calibration]})
        return bytes(tool.quantize(ranges).quantized_model)


def onnx(model, calibration):
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        """The calibration rows, one at a time."""

        def __init__(self, name):
            self.rows = iter([{name: row[None]} for row in calibration])

        def get_next(self):
            """The next row, as ONNX Runtime asks for it."""
            return next(self.rows, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, done = (str(pathlib.Path(folder) / f"{n}.onnx") for n in "abc")
        model.export(plain, format="onnx", verbose=False)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        name = OnnxRunner(pathlib.Path(ready).read_bytes()).name
        quantization.quantize_static(ready, done, Reader(name), per_channel=True)
        return pathlib.Path(done).read_bytes()


def exported(model, calibration):
    """The ONNX file of this package, whose weights do not saturate where there is no VNNI."""
    with tempfile.TemporaryDirectory() as folder:
        report = kd.export(
            model,
            pathlib.Path(folder) / "out",
            formats="onnx",
            precisions="int8",
            calibration=calibration,
            evaluation=calibration,
            max_drop=None,
        )
        return report.artifacts[0].path.read_bytes()


def sparse(model, samples, precision):
    """The TFLite file of this package, and what it would take with its zeros."""
    with tempfile.TemporaryDirectory() as folder:
        report = kd.export(
            model,
            pathlib.Path(folder) / "out",
            formats="tflite",
            precisions=precision,
            evaluation=samples,
            max_drop=None,
            sparse=True,
        )
        (artifact,) = report.artifacts
        dense = artifact.details["dense"]
        more = {"dense_bytes": dense["bytes"], "dense_gzip": dense["gzip_bytes"]}
        return artifact.path.read_bytes(), more


def sizes():
    """Markdown: bytes of pruned files with and without zeros. Untrained: only places count."""
    samples = np.random.default_rng(0).random((64, 28, 28, 1)).astype("float32")
    dense = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    student = convnet((28, 28, 1), 10, SETTINGS["fashion_mnist"]["student"], True, "student")
    lines = [
        "| | pruned | with zeros | without | gzipped, with | gzipped, without |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    models = {"dense, 784-256-10": dense, "separable, 16-32-64-128": student}
    for (name, model), share in itertools.product(models.items(), (0.5, 0.8)):
        pruned = compress.prune(model, share)
        aware = compress.quantize_aware(pruned, calibration=samples)
        files = []
        for given, precisions in (
            (pruned, ("float32", "float16", "weight_int8")),
            (aware, ("int8",)),
        ):
            with tempfile.TemporaryDirectory() as folder:
                report = kd.export(
                    given,
                    pathlib.Path(folder) / "out",
                    formats="tflite",
                    precisions=precisions,
                    evaluation=samples,
                    max_drop=None,
                    sparse=True,
                )
            files += report.artifacts
        for file in files:
            whole = file.details.get("dense", file.details)
            kept = file.sparsity is None
            precision = "int8 QAT" if file.precision == "int8" else file.precision
            lines.append(
                f"| {name}, {precision} | {100 * share:.0f} % | {whole['bytes']:,} | "
                f"{'-' if kept else format(file.bytes, ',')} | {whole['gzip_bytes']:,} | "
                f"{'-' if kept else format(file.gzip_bytes, ',')} |"
            )
    return "\n".join(lines)


class TFLiteRunner:
    """A TFLite file on one thread."""

    def __init__(self, blob):
        from ai_edge_litert.interpreter import Interpreter

        self.runtime = Interpreter(model_content=blob, num_threads=1)
        self.runtime.allocate_tensors()
        self.given = self.runtime.get_input_details()[0]
        self.made = self.runtime.get_output_details()[0]

    def step(self, x):
        """The raw output for one sample."""
        if self.given["dtype"] == np.int8:
            scale, zero = self.given["quantization"]
            x = np.clip(np.round(x / scale) + zero, -128, 127)
        self.runtime.set_tensor(self.given["index"], x.astype(self.given["dtype"]))
        self.runtime.invoke()
        return self.runtime.get_tensor(self.made["index"])

    def predict(self, x):
        """Classes of all samples."""
        return np.array([self.step(row[None])[0].argmax() for row in x])

    def latency(self, x, runs=50):
        """Median microseconds of one run."""
        self.step(x)
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            self.runtime.invoke()
            times.append(time.perf_counter() - started)
        return float(np.median(times)) * 1e6


class OnnxRunner:
    """An ONNX file on one thread."""

    def __init__(self, blob):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            blob, options, providers=["CPUExecutionProvider"]
        )
        self.name = self.session.get_inputs()[0].name

    def predict(self, x):
        """Classes of all samples."""
        return np.array([self.session.run(None, {self.name: r[None]})[0].argmax() for r in x])

    def latency(self, x, runs=50):
        """Median microseconds of one run."""
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            self.session.run(None, {self.name: x})
            times.append(time.perf_counter() - started)
        return float(np.median(times)) * 1e6


def tables():
    """Markdown: mean over seeds, and the ratio to the dataset's teacher."""
    lines = []
    for dataset in SETTINGS:
        results = read(f"compress_{dataset}")
        if results is None:
            continue
        s, seeds = results["settings"], results["seeds"].values()
        lines += [
            f"**{dataset}**, {len(seeds)} seeds, {results['training_rows']:,} training rows. "
            f"Teacher: convolutions of {'-'.join(map(str, s['teacher']))} channels, "
            f"{s['teacher_epochs']} epochs. Student: separable ones of "
            f"{'-'.join(map(str, s['student']))}, {s['epochs']} epochs, and {s['qat_epochs']} more "
            f"for each of pruning and quantization-aware training. {_where(results)}",
            "",
        ]
        lines += ["| | accuracy % | bytes | gzipped | smaller | p50 µs | faster |"]
        lines += ["| --- | --: | --: | --: | --: | --: | --: |"]
        for stage in STAGES:
            found = [(rows[stage], rows[STAGES[0]]) for rows in seeds if stage in rows]
            if not found:
                continue
            mean = {k: np.mean([row[k] for row, _ in found]) for k in found[0][0]}
            accuracy = f"{100 * mean['accuracy']:.2f}"
            if len(found) > 1 and stage != STAGES[0]:
                spread = np.std([row["accuracy"] for row, _ in found], ddof=1)
                accuracy += f" ± {100 * spread:.2f}"
            smaller = np.mean([top["bytes"] / row["bytes"] for row, top in found])
            faster = np.mean([top["p50_us"] / row["p50_us"] for row, top in found])
            whole = {k: f"{mean[k]:,.0f}" for k in ("bytes", "gzip")}
            if "dense_bytes" in mean:
                whole = {k: f"{v} ({mean[f'dense_{k}']:,.0f} with zeros)" for k, v in whole.items()}
            lines.append(
                f"| {stage} | {accuracy} | {whole['bytes']} | {whole['gzip']} | "
                f"{smaller:.1f}x | {mean['p50_us']:.0f} | {faster:.1f}x |"
            )
        lines.append("")
    return "\n".join([*lines, REFERENCES])


def _where(results):
    """The processor that the files were timed on."""
    about = results.get("machine")
    if about is None:
        return "Timed on a processor with AVX2, without VNNI."
    return f"Timed on {about['processor']}, flags: {', '.join(about['flags'])}."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=tuple(SETTINGS), help="one data set; all by default")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--work", default="build/compress")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="write docs/compress.md and stop")
    parser.add_argument("--sizes", action="store_true", help="pruned files alone, and stop")
    arguments = parser.parse_args()
    if arguments.sizes:
        text = sizes()
        print(text)
        put("compress.md", "sizes", text)
        return
    names = [arguments.dataset] if arguments.dataset else list(SETTINGS)
    for name in [] if arguments.table else names:
        bench = Bench(name, arguments.data, arguments.work)
        for seed in range(arguments.seeds):
            bench.run(seed)
    text = tables()
    print(text)
    put("compress.md", "table", text)


if __name__ == "__main__":
    main()
