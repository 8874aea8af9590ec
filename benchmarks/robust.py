"""Robust students by every road: plain, adversarial training, and from a robust teacher.

    python benchmarks/robust.py --dataset digits
    python benchmarks/robust.py --dataset fashion_mnist --seeds 2
    python benchmarks/robust.py --rows           # RSLAD against PGD training, by the rows there are
    python benchmarks/robust.py --teachers       # RSLAD from other teachers of the digits
    python benchmarks/robust.py --noise          # label noise from 0 to 60 %: distillation or not
    python benchmarks/robust.py --table          # the tables in docs/robust.md, from the results

One robust teacher a data set, trained on all of its rows; one student of about a tenth of its
size, trained from the same initial weights by every method on the same few of those rows. Each is
measured on held-out test rows by `keras_kd.robust.evaluate`: clean, PGD with 20 steps, AutoPGD of
the Adversarial Robustness Toolbox, the square attack on what PGD left, corruptions and calibration;
and its int8 TFLite file by what PGD finds on the model and by the square attack on the file.

How the settings were chosen, on validation rows alone: every method has the same epochs, optimizer,
schedule, batches and attack. The learning rate of each is the best of the same RATES, by what PGD
leaves right of the validation rows (for plain training: by what is right), with a seed that is not
measured. Weights and temperatures are those of the papers. How many rows the students have was
settled on validation rows too: with all of the teacher's rows a student this small hardly
overfits, and soft labels have nothing to mend; `--rows` measures that on test rows. So was what
trains the teacher: one that is sure of its training rows says no more of them than their labels do.
Each run is added to `benchmarks/results/robust_DATASET.json` as soon as it is done, so that an
interrupted benchmark goes on where it stopped.
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
BATCH = 64
STEPS = 5
RATES = (5e-3, 2e-2)
TUNING_SEED = 100
SETTINGS = {
    "digits": {
        "epsilon": 0.15,
        "rows": 150,
        "teacher_rows": 1222,
        "test": 359,
        "teacher": (64, 128),
        "beta": 4.0,
        "student": (20, 40),
        "teacher_epochs": 30,
        "epochs": 100,
        "restarts": 2,
    },
    "fashion_mnist": {
        "epsilon": 0.1,
        "rows": 300,
        "teacher_rows": 12000,
        "test": 300,
        "teacher": (16, 32, 64),
        "beta": None,
        "student": (4, 8, 16),
        "teacher_epochs": 10,
        "epochs": 80,
        "restarts": 1,
    },
}
# Rows of the student, with as many steps of training for each.
ROWS = {"digits": (150, 300, 600, 1222), "fashion_mnist": (300, 600, 3000)}
# Beta, with None for PGD training, and epochs of other teachers.
TEACHERS = {"digits": ((None, 40), (None, 12), (2.0, 40), (4.0, 30), (6.0, 40))}
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
NOISE = {
    "epochs": 40,
    "rates": (0.0, 0.2, 0.4, 0.6),
    "alpha": 0.5,
    "batch": 128,
    "teacher": (24, 48),
    "student": (7, 14),
}


def hard_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def convnet(shape, widths, name):
    """Convolutions and a dense layer: pooled for the digits, in strides for larger images."""
    small = shape[0] < 16
    x = inputs = keras.Input(shape)
    for width in widths:
        kernel, stride = (3, 1) if small else (4, 2)
        x = keras.layers.Conv2D(width, kernel, stride, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
        x = keras.layers.MaxPooling2D()(x) if small else x
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x), name=name)


def adam(epochs, rows, rate=5e-3, batch=BATCH):
    return keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(rate, epochs * -(-rows // batch))
    )


def right(model, x, y):
    """The share of rows that a model gets right, in percent."""
    return 100 * float((model.predict(x, batch_size=512, verbose=0).argmax(-1) == y).mean())


class Benchmark:
    """One data set: its teacher, the learning rates, and the rows of the table."""

    def __init__(self, dataset, folder, work):
        self.dataset, self.settings = dataset, SETTINGS[dataset]
        s = self.settings
        self.work = pathlib.Path(work) / dataset
        self.work.mkdir(parents=True, exist_ok=True)
        if dataset == "digits":
            d = kd.datasets.load("digits")
            x, y, u, v = d.x_train, d.y_train, d.x_test, d.y_test
            self.held = d.x_validation, d.y_validation
        else:
            x, y, u, v = load(dataset, folder, s["teacher_rows"] + 1000)
            self.held = x[s["teacher_rows"] :], y[s["teacher_rows"] :]
        self.rows = x[: s["teacher_rows"]], y[: s["teacher_rows"]]
        self.test = u[: s["test"]], v[: s["test"]]
        self.training = R.Linf(s["epsilon"], steps=STEPS)
        self.attack = R.Linf(s["epsilon"], steps=20, restarts=s["restarts"])
        name = f"robust_{dataset}"
        known = {**s, "teacher": list(s["teacher"]), "student": list(s["student"])}
        known |= {"batch": BATCH, "steps": STEPS, "rates": list(RATES)}
        self.kept = read(name) or {"dataset": dataset, "settings": known, "tried": {}, "runs": {}}
        if self.kept["settings"] != known:
            raise SystemExit(
                f"The results of {dataset} have other settings: remove the file first."
            )
        self.teacher = self.trained_teacher()
        self.save()

    def save(self):
        """Write what is known so far."""
        save(f"robust_{self.dataset}", self.kept)

    def teacher_of(self, beta, epochs):
        """A teacher trained by TRADES, or by PGD with no beta, from a file if there is one."""
        by = R.PGDTraining(self.training)
        by = by if beta is None else R.TRADES(self.training, beta=beta)
        path = self.work / f"{'pgd' if beta is None else f'trades-{beta:g}'}-{epochs}.keras"
        if not path.exists():
            keras.utils.set_random_seed(0)
            model = convnet(self.rows[0].shape[1:], self.settings["teacher"], "teacher")
            self.fit(model, None, by, *self.rows, epochs, 5e-3, batch=128)
            model.save(self.work / "partial.keras")
            os.replace(self.work / "partial.keras", path)
        return keras.models.load_model(path)

    def trained_teacher(self):
        """The robust teacher, trained if no run before this one has done it."""
        s = self.settings
        teacher = self.teacher_of(s["beta"], s["teacher_epochs"])
        if "teacher" not in self.kept:
            started = time.process_time()
            report = self.evaluate(teacher)
            self.kept["teacher"] = {
                "params": teacher.count_params(),
                **self.figures(report),
                "kept_decisions": R.kept_decisions(teacher, self.rows[0][:256], self.training),
                "cpu_seconds_to_measure": time.process_time() - started,
            }
            self.kept["student_params"] = self.student(0).count_params()
        return teacher

    def student(self, seed):
        """A new student with the initial weights of this seed."""
        keras.utils.set_random_seed(seed)
        return convnet(self.rows[0].shape[1:], self.settings["student"], "student")

    def fit(self, student, teacher, adversary, x, y, epochs, rate, batch=BATCH):
        """Train a model, with a teacher and an adversary or without."""
        distiller = kd.Distiller(student, teacher)
        distiller.compile(adam(epochs, len(x), rate, batch), hard_loss(), adversary=adversary)
        distiller.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)

    def trained(self, method, seed, rate, rows=None, teacher=None):
        """A student of the first rows, trained by one method."""
        keras.backend.clear_session()
        student, adversary = self.student(seed), METHODS[method][1]
        least = self.settings["rows"]
        x, y = (part[: rows or least] for part in self.rows)
        steps = self.settings["epochs"] * -(-least // BATCH)
        self.fit(
            student,
            None if method in ALONE else teacher or self.teacher,
            None if adversary is None else adversary(self.training),
            *(x, y, max(1, round(steps / -(-len(x) // BATCH))), rate),
        )
        return student

    def stands(self, model, x, y):
        """The share of rows that stay right under PGD alone, in percent."""
        return right(model, R.attack(model, x, y, self.attack), y)

    def rate(self, method):
        """The learning rate of a method: the best of RATES on the validation rows."""
        tried = self.kept["tried"].setdefault(method, {})
        for rate in RATES:
            if str(rate) not in tried:
                student = self.trained(method, TUNING_SEED, rate)
                tried[str(rate)] = {
                    "clean": right(student, *self.held),
                    "pgd": self.stands(student, *self.held),
                }
                self.save()
                print(f"{self.dataset} {method} rate {rate}", tried[str(rate)], flush=True)
        key = "clean" if method == "plain" else "pgd"
        return float(max(tried, key=lambda rate: tried[rate][key]))

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
        rate, started = self.rate(method), time.process_time()
        student = self.trained(method, seed, rate)
        seconds = time.process_time() - started
        seen = (part[: self.settings["rows"]] for part in self.rows)
        found = {"rate": rate, "pgd_training_rows": self.stands(student, *seen)}
        found["float"] = self.figures(self.evaluate(student, calibrate_on=self.held))
        with tempfile.TemporaryDirectory() as folder:
            kd.export(
                student,
                f"{folder}/files",
                formats=("tflite",),
                precisions=("int8",),
                calibration=self.rows[0][:200],
                evaluation=self.held,
                max_drop=0.5,
            )
            report = self.evaluate(
                f"{folder}/files", twin=student, second_opinion=None, corruptions=None
            )
        found["int8"] = self.figures(report)
        return {**found, "cpu_seconds": seconds}

    def measured(self, method, seed, same):
        """What `run` found of a student, if it is the same one and there is such a run."""
        run = self.kept["runs"].get(method, {}).get(str(seed)) if same else None
        if run is None:
            return None
        found = {key: run["float"][key] for key in ("clean", "pgd")}
        return {**found, "pgd_training_rows": run["pgd_training_rows"]}

    def by_rows(self, seed):
        """PGD training and RSLAD with other numbers of rows, by PGD on the test rows."""
        for rows in ROWS[self.dataset]:
            for method in ("pgd", "rslad"):
                runs = self.kept.setdefault("rows", {}).setdefault(str(rows), {})
                runs = runs.setdefault(method, {})
                if str(seed) in runs:
                    continue
                if measured := self.measured(method, seed, rows == self.settings["rows"]):
                    runs[str(seed)] = measured
                    continue
                student = self.trained(method, seed, self.rate(method), rows)
                seen = (part[: min(rows, 500)] for part in self.rows)
                runs[str(seed)] = {
                    "clean": right(student, *self.test),
                    "pgd": self.stands(student, *self.test),
                    "pgd_training_rows": self.stands(student, *seen),
                }
                self.save()
                print(f"{self.dataset} {rows} rows {method}", runs[str(seed)], flush=True)

    def by_teacher(self, seed):
        """RSLAD from other teachers of the same rows."""
        for beta, epochs in TEACHERS[self.dataset]:
            known = self.kept.setdefault("teachers", {})
            name = "PGD training" if beta is None else f"TRADES, beta {beta:g}"
            known = known.setdefault(f"{name}, {epochs} epochs", {"runs": {}})
            if str(seed) in known["runs"]:
                continue
            teacher = self.teacher_of(beta, epochs)
            if "clean" not in known:
                answers = keras.ops.softmax(teacher.predict(self.rows[0], verbose=0))
                known |= {
                    "clean": right(teacher, *self.test),
                    "pgd": self.stands(teacher, *self.test),
                    "confidence": 100 * float(keras.ops.mean(keras.ops.max(answers, axis=-1))),
                }
            own = (beta, epochs) == (self.settings["beta"], self.settings["teacher_epochs"])
            measured = self.measured("rslad", seed, own)
            if measured is None:
                student = self.trained("rslad", seed, self.rate("rslad"), teacher=teacher)
                measured = {
                    "clean": right(student, *self.test),
                    "pgd": self.stands(student, *self.test),
                }
            known["runs"][str(seed)] = measured
            self.kept["teachers"][f"{name}, {epochs} epochs"] = known
            self.save()
            print(f"{self.dataset} {name} {epochs}", known, flush=True)


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
                widths = NOISE["teacher" if name == "teacher" else "student"]
                model = convnet(shape, widths, name)
                distiller = kd.Distiller(model, teacher if name == "distilled" else None)
                epochs, batch = NOISE["epochs"], NOISE["batch"]
                distiller.compile(adam(epochs, len(y), batch=batch), hard_loss())
                distiller.fit(d.x_train, y, batch_size=batch, epochs=epochs, verbose=0)
                teacher = model if name == "teacher" else teacher
                said = model.predict(d.x_test, verbose=0).argmax(-1)
                found[name] = 100 * float((said == d.y_test).mean())
            runs[str(seed)] = found
            save("robust_noise", kept)
            print(f"noise {rate} seed {seed}", found, flush=True)


def table(kept):
    """The table of one data set."""
    s, teacher, runs = kept["settings"], kept["teacher"], kept["runs"]
    by = "PGD training" if s["beta"] is None else f"TRADES, beta {s['beta']:g}"
    lines = [
        f"### {kept['dataset']}",
        "",
        f"L∞, ε = {s['epsilon']}, attacks of {s['steps']} steps in training. Robust teacher: "
        f"{teacher['params']:,} parameters, {by} on {s['teacher_rows']:,} rows for "
        f"{s['teacher_epochs']} epochs; clean {teacher['clean']:.1f} %, PGD-20 "
        f"{teacher['pgd']:.1f} %, AutoPGD {teacher['art']:.1f} %. Students: "
        f"{kept['student_params']:,} parameters, {s['rows']:,} of these rows, {s['epochs']} epochs "
        f"of batches of {s['batch']}. Measured on {s['test']:,} test rows.",
        "",
        "| Method | rate | clean | PGD-20 | PGD-20, training rows | AutoPGD | all attacks | "
        "corruption error | ECE | ECE, calibrated | int8 clean | int8, all attacks | seeds | "
        "fit, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (label, _) in METHODS.items():
        found = list(runs.get(name, {}).values())
        if not found:
            continue
        cells = [f"{found[0]['rate']:g}"]
        cells += [spread([run["float"][key] for run in found]) for key in ("clean", "pgd")]
        cells.append(spread([run["pgd_training_rows"] for run in found]))
        keys = ("art", "adversarial", "corruption_error", "ece", "calibrated_ece")
        cells += [spread([run["float"][key] for run in found]) for key in keys]
        cells += [spread([run["int8"][key] for run in found]) for key in ("clean", "adversarial")]
        seconds = np.mean([run["cpu_seconds"] for run in found])
        lines.append(f"| {label} | {' | '.join(cells)} | {len(found)} | {seconds:.0f} |")
    for name in ("pgd", "trades", "ard"):
        pairs = [
            (runs["rslad"][seed], runs[name][seed])
            for seed in runs.get("rslad", {})
            if seed in runs.get(name, {})
        ]
        gains = [
            spread([a[kind][key] - b[kind][key] for a, b in pairs])
            for kind, key in (("float", "adversarial"), ("float", "clean"), ("int8", "adversarial"))
        ]
        if pairs:
            lines += [
                "",
                f"RSLAD over {METHODS[name][0]} at equal seeds: {gains[0]} points under all "
                f"attacks, {gains[1]} points clean; the int8 files {gains[2]} under all attacks.",
            ]
    return "\n".join(lines)


def rows_table(results):
    """PGD training and RSLAD by the number of rows, of all data sets."""
    lines = [
        "| data | rows | PGD training: clean, PGD-20 | PGD-20, training rows | RSLAD: clean, "
        "PGD-20 | PGD-20, training rows | RSLAD gains: clean, PGD-20 | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kept in results:
        for rows, runs in kept.get("rows", {}).items():
            cells = []
            seeds = sorted(set(runs["pgd"]) & set(runs.get("rslad", {})))
            for name in ("pgd", "rslad"):
                found = [runs[name][seed] for seed in seeds]
                cells.append(", ".join(spread([r[key] for r in found]) for key in ("clean", "pgd")))
                cells.append(spread([r["pgd_training_rows"] for r in found]))
            gains = [
                spread([runs["rslad"][seed][key] - runs["pgd"][seed][key] for seed in seeds])
                for key in ("clean", "pgd")
            ]
            if seeds:
                lines.append(
                    f"| {kept['dataset']} | {int(rows):,} | {' | '.join(cells)} | "
                    f"{', '.join(gains)} | {len(seeds)} |"
                )
    return "\n".join(lines)


def teachers_table(kept):
    """RSLAD by its teacher, beside PGD training."""
    lines = [
        "| teacher trained by | its clean, PGD-20 | sure of its training rows | student: clean | "
        "PGD-20 | gain over PGD training: clean, PGD-20 | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, known in kept["teachers"].items():
        seeds = sorted(set(known["runs"]) & set(kept["runs"]["pgd"]))
        cells = {key: [known["runs"][seed][key] for seed in seeds] for key in ("clean", "pgd")}
        gains = [
            spread(
                [
                    known["runs"][seed][key] - kept["runs"]["pgd"][seed]["float"][key]
                    for seed in seeds
                ]
            )
            for key in cells
        ]
        lines.append(
            f"| {name} | {known['clean']:.1f}, {known['pgd']:.1f} | {known['confidence']:.1f} | "
            f"{' | '.join(map(spread, cells.values()))} | {', '.join(gains)} | {len(seeds)} |"
        )
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
    parser.add_argument("--rows", action="store_true", help="measure fewer and more rows")
    parser.add_argument("--teachers", action="store_true", help="measure other teachers")
    parser.add_argument("--noise", action="store_true", help="measure label noise")
    parser.add_argument("--table", action="store_true", help="write docs/robust.md and stop")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(METHODS)
    if unknown := set(names) - set(METHODS):
        parser.error(f"unknown methods: {sorted(unknown)}. There are {list(METHODS)}")
    if arguments.noise:
        noise(arguments.seeds)
    sets = [arguments.dataset] if arguments.dataset else []
    sets = sets or (list(ROWS) if arguments.rows else list(TEACHERS) if arguments.teachers else [])
    for dataset in sets:
        benchmark = Benchmark(dataset, arguments.data, arguments.work)
        for seed in range(arguments.seeds):
            if arguments.rows:
                benchmark.by_rows(seed)
            if arguments.teachers:
                benchmark.by_teacher(seed)
            if arguments.rows or arguments.teachers:
                continue
            for name in names:
                runs = benchmark.kept["runs"].setdefault(name, {})
                if str(seed) not in runs:
                    runs[str(seed)] = benchmark.run(name, seed)
                    benchmark.save()
                    shown = {k: v for k, v in runs[str(seed)]["float"].items() if v is not None}
                    print(f"{dataset} seed {seed} {name:8s} {shown}", flush=True)
    if arguments.table:
        found = [kept for name in SETTINGS if (kept := read(f"robust_{name}"))]
        put("robust.md", "robust", "\n\n".join(table(kept) for kept in found))
        put("robust.md", "rows", rows_table(found))
        for kept in found:
            if "teachers" in kept:
                put("robust.md", "teachers", teachers_table(kept))
        if kept := read("robust_noise"):
            put("robust.md", "noise", noise_table(kept))


if __name__ == "__main__":
    main()
