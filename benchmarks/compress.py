"""Teacher to small file: each stage of compression, measured on the file that ships.

    python benchmarks/compress.py                                  # Fashion-MNIST
    python benchmarks/compress.py --dataset cifar10 --rows 20000 --epochs 8
    python benchmarks/compress.py --dataset fsdd

For every seed: a float teacher; a student trained alone and quantized after
training; the same student distilled, quantized after training by four tools,
and by quantization-aware training, ours and TFMOT's; distilled, pruned and
quantization-aware. Each row is a TFLite file (ONNX for ONNX Runtime): its bytes,
plain and gzipped, its accuracy on the test set, and its p50 latency on one
thread. Every row is written as soon as it is known and models are kept under
`build/compress`, so a run that was interrupted goes on where it stopped.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import pathlib
import tempfile
import time

import keras
import numpy as np
from shared_data import load

import keras_kd as kd
from keras_kd import compress

RESULTS = pathlib.Path(__file__).parent / "results" / "compress.json"
TABLE = pathlib.Path(__file__).parent.parent / "docs" / "compress.md"
MARKS = ("<!-- table -->", "<!-- /table -->")
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
    """One dataset and one seed: the models, made once, and the rows."""

    def __init__(self, arguments, seed, data, results):
        self.arguments, self.seed, self.data, self.results = arguments, seed, data, results
        self.work = pathlib.Path(arguments.work) / arguments.dataset / str(seed)
        self.work.mkdir(parents=True, exist_ok=True)
        self.key = f"{arguments.dataset}/{seed}"

    def model(self, name, make):
        """The model called `name`, trained if no run before this one has done it."""
        path = self.work / f"{name}.keras"
        if not path.exists():
            keras.utils.set_random_seed(self.seed)
            partial = path.with_name("partial.keras")
            make().save(partial)
            os.replace(partial, path)
        return keras.models.load_model(path)

    def train(self, model, epochs, rate, teacher=None, callbacks=()):
        """Train a model, alone or under a teacher, and return it."""
        x, y = self.data[:2]
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        steps = epochs * -(-len(x) // 64)
        schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
        trained = model if teacher is None else kd.Distiller(model, teacher)
        extra = {} if teacher is None else {"alpha": 0.1, "temperature": 4.0}
        trained.compile(keras.optimizers.Adam(schedule), loss, **extra)
        trained.fit(x, y, batch_size=64, epochs=epochs, verbose=0, callbacks=list(callbacks))
        return model

    def float_models(self):
        """The teacher, the student trained alone and the distilled one."""
        shape, classes = self.data[0].shape[1:], 10
        teacher_epochs, epochs = self.arguments.teacher_epochs, self.arguments.epochs
        widths = self.arguments.teacher_widths
        teacher = self.model(
            "teacher",
            lambda: self.train(
                convnet(shape, classes, widths, False, "teacher"), teacher_epochs, 2e-3
            ),
        )

        def student():
            return convnet(shape, classes, self.arguments.student_widths, True, "student")

        alone = self.model("alone", lambda: self.train(student(), epochs, 4e-3))
        distilled = self.model("distilled", lambda: self.train(student(), epochs, 4e-3, teacher))
        return teacher, alone, distilled

    def aware(self, model, teacher):
        """Quantization-aware fine-tuning under the teacher; the last half with frozen ranges."""
        epochs = self.arguments.qat_epochs
        quantized = compress.quantize_aware(model, calibration=self.data[0][:512])
        freeze = compress.FreezeObservers(epoch=max(epochs // 2, 1))
        return self.train(quantized, epochs, 1e-3, teacher, [freeze])

    def pruned(self, model, teacher):
        """The distilled student, pruned while it goes on learning from the teacher."""
        steps = -(-len(self.data[0]) // 64) * self.arguments.qat_epochs
        sparse = compress.prune(
            model, 0.5, schedule="polynomial", end_step=steps // 2, frequency=max(steps // 20, 1)
        )
        return self.train(sparse, self.arguments.qat_epochs, 2e-3, teacher)

    def run(self):
        """All rows that are still missing."""
        teacher, alone, distilled = self.float_models()
        self.row(STAGES[0], lambda: tflite(teacher))
        self.row(STAGES[1], lambda: tflite(alone))
        self.row(STAGES[2], lambda: tflite(alone, self.data[0][:256]))
        self.row(STAGES[3], lambda: tflite(distilled))
        self.row(STAGES[4], lambda: tflite(distilled, self.data[0][:256]))
        self.row(STAGES[5], lambda: edge(distilled, self.data[0][:256]))
        self.row(STAGES[6], lambda: onnx(distilled, self.data[0][:256]))
        self.row(STAGES[7], lambda: self.tfmot(distilled))
        self.row(
            STAGES[8],
            lambda: tflite(self.model("qat", lambda: self.aware(distilled, teacher)), aware=True),
        )

        def sparse():
            model = self.model("pruned", lambda: self.pruned(distilled, teacher))
            return self.model("pruned_qat", lambda: self.aware(model, teacher))

        self.row(STAGES[9], lambda: tflite(sparse(), aware=True))

    def tfmot(self, model):
        """The file that TFMOT makes of the same weights, without a teacher."""
        x, y = self.data[:2]
        return compress.tfmot.quantize(
            model, x, y, self.arguments.qat_epochs, 64, learning_rate=3e-4, seed=self.seed
        ).tflite

    def row(self, stage, make):
        """Make a file and measure it, unless the row is there."""
        rows = self.results["rows"].setdefault(self.key, {})
        if stage in rows:
            return
        started = time.process_time()
        blob = make()
        runner = OnnxRunner(blob) if "ONNX" in stage else TFLiteRunner(blob)
        x, y = self.data[2:]
        rows[stage] = {
            "bytes": len(blob),
            "gzip": len(gzip.compress(blob, mtime=0)),
            "accuracy": float(np.mean(runner.predict(x) == y)),
            "p50_us": runner.latency(x[:1]),
            "cpu_seconds": round(time.process_time() - started, 1),
        }
        save(self.results)
        print(self.key, stage, rows[stage], flush=True)


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

    def latency(self, x, runs=400):
        """Median microseconds of one run."""
        self.step(x)
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            self.runtime.invoke()
            times.append(time.perf_counter() - started)
        return round(float(np.median(times)) * 1e6, 1)


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

    def latency(self, x, runs=400):
        """Median microseconds of one run."""
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            self.session.run(None, {self.name: x})
            times.append(time.perf_counter() - started)
        return round(float(np.median(times)) * 1e6, 1)


def save(results):
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, RESULTS)


def table(results):
    """Markdown: mean over seeds, and the ratio to the dataset's teacher."""
    lines = []
    for dataset in dict.fromkeys(key.split("/")[0] for key in results["rows"]):
        seeds = [rows for key, rows in results["rows"].items() if key.split("/")[0] == dataset]
        lines += [f"**{dataset}**, {len(seeds)} seed(s)", ""]
        lines += ["| | accuracy % | bytes | gzipped | smaller | p50 µs | faster |"]
        lines += ["| --- | --: | --: | --: | --: | --: | --: |"]
        for stage in STAGES:
            found = [(rows[stage], rows[STAGES[0]]) for rows in seeds if stage in rows]
            if not found:
                continue
            mean = {k: np.mean([row[k] for row, _ in found]) for k in found[0][0]}
            spread = np.std([row["accuracy"] for row, _ in found])
            smaller = np.mean([top["bytes"] / row["bytes"] for row, top in found])
            faster = np.mean([top["p50_us"] / row["p50_us"] for row, top in found])
            lines.append(
                f"| {stage} | {100 * mean['accuracy']:.2f} ± {100 * spread:.2f} | "
                f"{mean['bytes']:,.0f} | {mean['gzip']:,.0f} | {smaller:.1f}x | "
                f"{mean['p50_us']:.0f} | {faster:.1f}x |"
            )
        lines.append("")
    return "\n".join([*lines, REFERENCES])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dataset", default="fashion_mnist", choices=("fashion_mnist", "cifar10", "fsdd")
    )
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--work", default="build/compress")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=12000, help="training rows to use")
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--qat-epochs", type=int, default=3)
    parser.add_argument("--teacher-widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--student-widths", type=int, nargs="+", default=[12, 24, 48])
    arguments = parser.parse_args()
    results = {"setup": {}, "rows": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    skipped = ("seeds", "data", "work", "dataset")
    setup = {k: v for k, v in vars(arguments).items() if k not in skipped}
    known = results["setup"].setdefault(arguments.dataset, setup)
    if known != setup:
        parser.error(
            f"{RESULTS} holds rows of {arguments.dataset} made with {known}. Use the same "
            "arguments to go on, or delete the file and the work folder to start again."
        )
    data = load(arguments.dataset, arguments.data, arguments.rows)
    for seed in range(arguments.seeds):
        Bench(arguments, seed, data, results).run()
    text = table(results)
    print(text)
    page = TABLE.read_text()
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    TABLE.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
