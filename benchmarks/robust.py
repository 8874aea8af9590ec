"""Robust students by every road: plain, adversarial training, and from a robust teacher.

    python benchmarks/robust.py --dataset digits
    python benchmarks/robust.py --dataset fashion_mnist --seeds 2
    python benchmarks/robust.py --noise          # label noise from 0 to 60 %: distillation or not
    python benchmarks/robust.py --table          # the tables in docs/robust.md, from the results

One robust teacher a data set, trained by PGD on the training rows that are used; one student of an
eighth (digits) or a quarter of its size, trained from the same initial weights on the same rows by
every method. Each is measured on held-out test rows by `keras_kd.robust.evaluate`: clean, PGD with
20 steps, AutoPGD of the Adversarial Robustness Toolbox, the square attack on what PGD left,
corruptions and calibration; and its int8 TFLite file by what PGD finds on the model and by the
square attack on the file. Weights are those of the papers, none was tuned on these data. Each run
is added to `benchmarks/results/robust_DATASET.json` as soon as it is done, so an interrupted
benchmark goes on where it stopped.
"""

import argparse
import os
import pathlib
import tempfile
import time

import keras
import numpy as np
from records import put, read, save, spread
from shared_data import load

import keras_kd as kd

R = kd.robust
BATCH = 128
SETTINGS = {
    "digits": {
        "epsilon": 0.15,
        "rows": 1222,
        "test": 359,
        "teacher": (24, 48),
        "student": (7, 14),
        "teacher_epochs": 60,
        "epochs": 60,
        "restarts": 2,
    },
    "fashion_mnist": {
        "epsilon": 0.1,
        "rows": 3000,
        "test": 300,
        "teacher": (16, 32),
        "student": (5, 9),
        "teacher_epochs": 8,
        "epochs": 8,
        "restarts": 1,
    },
}
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "gaussian_blur", "motion_blur"),
    *("brightness", "contrast", "fog", "pixelate", "jpeg_compression", "rotate", "translate"),
)
SEVERITIES = (1, 3, 5)
# Name in the table, and the adversary of a threat.
METHODS = {
    "plain": ("plain training", None),
    "pgd": ("PGD training", R.PGDTraining),
    "trades": ("TRADES, beta 6", R.TRADES),
    "ard": ("ARD, T = 30, alpha 1", R.ARD),
    "rslad": ("RSLAD, 5/6 + 1/6", R.RSLAD),
}
ALONE = ("plain", "pgd", "trades")
NOISE = {"epochs": 40, "rates": (0.0, 0.2, 0.4, 0.6), "alpha": 0.5}


def hard_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def convnet(shape, widths, name):
    """Two convolutions, each with its pooling, and a dense layer."""
    x = inputs = keras.Input(shape)
    for width in widths:
        x = keras.layers.Conv2D(width, 3, 1, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x), name=name)


def adam(epochs, rows):
    return keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(5e-3, epochs * -(-rows // BATCH))
    )


class Benchmark:
    """One data set: its teacher, and the rows of the table."""

    def __init__(self, dataset, folder, work):
        self.dataset, self.settings = dataset, SETTINGS[dataset]
        s = self.settings
        self.work = pathlib.Path(work) / dataset
        self.work.mkdir(parents=True, exist_ok=True)
        if dataset == "digits":
            d = kd.datasets.load("digits")
            self.x, self.y, self.held = d.x_train, d.y_train, (d.x_validation, d.y_validation)
            self.test = d.x_test[: s["test"]], d.y_test[: s["test"]]
        else:
            x, y, u, v = load(dataset, folder, s["rows"] + 1000)
            self.x, self.y = x[: s["rows"]], y[: s["rows"]]
            self.held = x[s["rows"] :], y[s["rows"] :]
            self.test = u[: s["test"]], v[: s["test"]]
        self.training = R.Linf(s["epsilon"], steps=7)
        self.attack = R.Linf(s["epsilon"], steps=20, restarts=s["restarts"])
        name = f"robust_{dataset}"
        known = {**s, "teacher": list(s["teacher"]), "student": list(s["student"])}
        self.kept = read(name) or {"dataset": dataset, "settings": known, "runs": {}}
        if self.kept["settings"] != known:
            raise SystemExit(
                f"The results of {dataset} have other settings: remove the file first."
            )
        self.teacher = self.trained_teacher()
        save(name, self.kept)

    def trained_teacher(self):
        """The robust teacher, trained if no run before this one has done it."""
        path, s = self.work / "teacher.keras", self.settings
        if not path.exists():
            keras.utils.set_random_seed(0)
            model = convnet(self.x.shape[1:], s["teacher"], "teacher")
            self.fit(model, None, R.PGDTraining(self.training), s["teacher_epochs"])
            model.save(self.work / "partial.keras")
            os.replace(self.work / "partial.keras", path)
        teacher = keras.models.load_model(path)
        if "teacher" not in self.kept:
            started = time.process_time()
            report = self.evaluate(teacher)
            self.kept["teacher"] = {
                "params": teacher.count_params(),
                **self.figures(report),
                "kept_decisions": R.kept_decisions(teacher, self.x[:256], self.training),
                "cpu_seconds_to_measure": time.process_time() - started,
            }
            self.kept["student_params"] = self.student(0).count_params()
        return teacher

    def student(self, seed):
        """A new student with the initial weights of this seed."""
        keras.utils.set_random_seed(seed)
        return convnet(self.x.shape[1:], self.settings["student"], "student")

    def fit(self, student, teacher, adversary, epochs):
        """Train a model, with a teacher and an adversary or without."""
        distiller = kd.Distiller(student, teacher)
        distiller.compile(adam(epochs, len(self.x)), hard_loss(), adversary=adversary)
        distiller.fit(self.x, self.y, batch_size=BATCH, epochs=epochs, verbose=0)

    def evaluate(self, model, **options):
        """Measure a model or a file on the test rows."""
        options = {"corruptions": CORRUPTIONS, "second_opinion": "art", **options}
        return R.evaluate(
            model, *self.test, self.attack, severities=SEVERITIES, queries=200, **options
        )

    @staticmethod
    def figures(report):
        """What the tables show, in percent."""
        found = {
            "clean": report.clean,
            "adversarial": report.adversarial,
            **report.attacks,
            "art": report.second_opinion,
            "corruption_error": report.mean_corruption_error,
            "ece": report.ece,
            "calibrated_ece": report.calibrated_ece,
        }
        found = {name: None if v is None else 100 * v for name, v in found.items()}
        return {**found, "flags": list(report.flags)}

    def run(self, method, seed):
        """Train one student by one method, and measure it and its int8 file."""
        keras.backend.clear_session()
        student, adversary = self.student(seed), METHODS[method][1]
        teacher = None if method in ALONE else self.teacher
        started = time.process_time()
        self.fit(
            student,
            teacher,
            None if adversary is None else adversary(self.training),
            self.settings["epochs"],
        )
        seconds = time.process_time() - started
        found = {"float": self.figures(self.evaluate(student, calibrate_on=self.held))}
        with tempfile.TemporaryDirectory() as folder:
            kd.export(
                student,
                f"{folder}/files",
                formats=("tflite",),
                precisions=("int8",),
                calibration=self.x[:200],
                evaluation=self.held,
                max_drop=0.5,
            )
            report = self.evaluate(
                f"{folder}/files", twin=student, second_opinion=None, corruptions=None
            )
        found["int8"] = self.figures(report)
        return {**found, "cpu_seconds": seconds}


def noise(seeds):
    """Digits with wrong labels: a teacher of the same labels, and students with it and without."""
    d = kd.datasets.load("digits")
    kept = read("robust_noise") or {
        "settings": {**NOISE, "rates": list(NOISE["rates"])},
        "runs": {},
    }
    shape = d.x_train.shape[1:]
    for seed in range(seeds):
        for rate in NOISE["rates"]:
            runs = kept["runs"].setdefault(str(rate), {})
            if str(seed) in runs:
                continue
            keras.backend.clear_session()
            y = R.noisy_labels(d.y_train, rate, seed=seed)
            found, teacher = {}, None
            for name in ("teacher", "plain", "distilled"):
                keras.utils.set_random_seed(seed)
                widths = SETTINGS["digits"]["teacher" if name == "teacher" else "student"]
                model = convnet(shape, widths, name)
                distiller = kd.Distiller(model, teacher if name == "distilled" else None)
                distiller.compile(adam(NOISE["epochs"], len(y)), hard_loss())
                distiller.fit(d.x_train, y, batch_size=BATCH, epochs=NOISE["epochs"], verbose=0)
                teacher = model if name == "teacher" else teacher
                said = model.predict(d.x_test, verbose=0).argmax(-1)
                found[name] = 100 * float((said == d.y_test).mean())
            runs[str(seed)] = found
            save("robust_noise", kept)
            print(f"noise {rate} seed {seed}", found, flush=True)


def table(kept):
    """The table of one data set."""
    s, teacher, runs = kept["settings"], kept["teacher"], kept["runs"]
    lines = [
        f"### {kept['dataset']}",
        "",
        f"L∞, ε = {s['epsilon']}; {s['rows']:,} training rows, {s['epochs']} epochs, attacks of 7 "
        f"steps in training; measured on {s['test']:,} test rows. Robust teacher: "
        f"{teacher['params']:,} parameters, clean {teacher['clean']:.1f} %, PGD-20 "
        f"{teacher['pgd']:.1f} %, AutoPGD {teacher['art']:.1f} %. Student: "
        f"{kept['student_params']:,} parameters.",
        "",
        "| Method | clean | PGD-20 | AutoPGD | all attacks | corruption error | ECE | ECE, "
        "calibrated | int8 clean | int8, all attacks | seeds | fit, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (label, _) in METHODS.items():
        found = list(runs.get(name, {}).values())
        if not found:
            continue
        keys = ("clean", "pgd", "art", "adversarial", "corruption_error", "ece", "calibrated_ece")
        cells = [spread([run["float"][key] for run in found]) for key in keys]
        cells += [spread([run["int8"][key] for run in found]) for key in ("clean", "adversarial")]
        seconds = np.mean([run["cpu_seconds"] for run in found])
        lines.append(f"| {label} | {' | '.join(cells)} | {len(found)} | {seconds:.0f} |")
    pairs = [
        (runs["rslad"][seed], runs["pgd"][seed])
        for seed in runs.get("rslad", {})
        if seed in runs.get("pgd", {})
    ]
    if pairs:
        gains = {
            key: spread([a["float"][key] - b["float"][key] for a, b in pairs])
            for key in ("clean", "adversarial")
        }
        lines += [
            "",
            f"RSLAD over PGD training at equal seeds: {gains['adversarial']} points under all "
            f"attacks, {gains['clean']} points clean.",
        ]
    return "\n".join(lines)


def noise_table(kept):
    lines = [
        "| wrong labels | teacher | plain student | distilled | gain, equal seeds | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for rate, runs in kept["runs"].items():
        columns = [
            [run[name] for run in runs.values()] for name in ("teacher", "plain", "distilled")
        ]
        gain = [b - a for a, b in zip(columns[1], columns[2], strict=True)]
        cells = [spread(values) for values in (*columns, gain)]
        lines.append(f"| {100 * float(rate):.0f} % | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=SETTINGS)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--work", default="build/robust", help="for the teachers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="names of methods, joined by commas")
    parser.add_argument("--noise", action="store_true", help="measure label noise")
    parser.add_argument("--table", action="store_true", help="write docs/robust.md and stop")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(METHODS)
    if unknown := set(names) - set(METHODS):
        parser.error(f"unknown methods: {sorted(unknown)}. There are {list(METHODS)}")
    if arguments.noise:
        noise(arguments.seeds)
    if arguments.dataset:
        benchmark = Benchmark(arguments.dataset, arguments.data, arguments.work)
        for seed in range(arguments.seeds):
            for name in names:
                runs = benchmark.kept["runs"].setdefault(name, {})
                if str(seed) not in runs:
                    runs[str(seed)] = benchmark.run(name, seed)
                    save(f"robust_{arguments.dataset}", benchmark.kept)
                    shown = {k: v for k, v in runs[str(seed)]["float"].items() if v is not None}
                    print(f"{arguments.dataset} seed {seed} {name:8s} {shown}", flush=True)
    if arguments.table:
        found = [kept for name in SETTINGS if (kept := read(f"robust_{name}"))]
        put("robust.md", "robust", "\n\n".join(table(kept) for kept in found))
        if kept := read("robust_noise"):
            put("robust.md", "noise", noise_table(kept))


if __name__ == "__main__":
    main()
