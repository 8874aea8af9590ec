"""Every image method beside plain training and `keras.distillation`, at equal steps.

    python benchmarks/methods.py --dataset fashion_mnist
    python benchmarks/methods.py --dataset cifar10
    python benchmarks/methods.py --dataset cifar10 --only plain,dist --seeds 5
    python benchmarks/methods.py --table          # the tables in docs/methods.md, from the results

One teacher a data set, trained once on all training rows but the held-out ones; one student of
about a twentieth of its cost, trained on the first `rows` rows from the same initial weights on the
same batches by every method. The teacher's outputs are read from a cache, except by
`keras.distillation`, which has none. Weights and temperatures are those of the papers: none was
tuned on these data. Each run is added to `benchmarks/results/methods.json` as soon as it is done,
so an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import os
import pathlib
import time

import keras
import numpy as np
from records import put, read, save
from shared_data import load

import keras_kd as kd

BATCH = 128
DATASETS = ("fashion_mnist", "cifar10")
SETTINGS = {
    "teacher": (32, 64, 128),
    "student": (8, 16, 32),
    "teacher_epochs": 5,
    "held_out": 5000,
    "rows": 10000,
    "epochs": 10,
}
# Layers of the teacher and of the student with maps of one size, and with many channels.
LOW, HIGH, EMBEDDING = ("block2", "block1"), ("block3", "block3"), ("embedding", "embedding")
BOTH = (["block2", "block3"], ["block1", "block3"])


def hard_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def convnet(shape, widths, name, small=False, flip=False):
    """`block1` ... are read before the pooling; a small net strides where a large one pools."""
    x = inputs = keras.Input(shape)
    if flip:
        x = keras.layers.RandomFlip("horizontal")(x)
    for index, width in enumerate(widths, 1):
        strides = 2 if small and index < len(widths) else 1
        x = keras.layers.Conv2D(width, 3, strides, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU(name=f"block{index}")(x)
        if not small and index < len(widths):
            x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.GlobalAveragePooling2D(name="embedding")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x), name=name)


def logits(loss, **weights):
    """A loss of logits, with `alpha` or explicit weights."""
    return lambda run: {"distillation_loss": loss(), **weights}


def features(loss, layer, weight, projector=None, warm_up=False):
    """CE + `weight` times a loss of features of one layer or several."""

    def options(run):
        transfer = kd.Transfer(loss(run), *(layer or (None, None)), projector, weight)
        if warm_up:
            run.callbacks.append(
                kd.callbacks.TransferWeightAnnealing(
                    transfer.name, start=0.0, end=weight, epochs=SETTINGS["epochs"] // 4
                )
            )
        return {
            "distillation_loss": transfer,
            "student_loss_weight": 1.0,
            "distillation_loss_weight": 1.0,
        }

    return options


def decoupled(run):
    kwargs = features(lambda run: kd.losses.DecoupledKD(temperature=4.0), None, 1.0, warm_up=True)
    return kwargs(run)


def simkd(run):
    transfer = kd.Transfer(kd.losses.SimKD(), *HIGH)
    return {
        "loss": None,
        "distillation_loss": transfer,
        "student_loss_weight": 0.0,
        "distillation_loss_weight": 1.0,
    }


def combined(*parts):
    """CE + the sum of several losses, each with its weight."""

    def options(run):
        return {
            "distillation_loss": [
                kd.Transfer(loss(), *(layer or (None, None)), projector, weight)
                for loss, layer, projector, weight in parts
            ],
            "student_loss_weight": 1.0,
            "distillation_loss_weight": 1.0,
        }

    return options


def ce_and(loss, weight):
    return logits(loss, student_loss_weight=1.0, distillation_loss_weight=weight)


L = kd.losses
# Name in the table, and the arguments of `compile`. Temperature 1 where none is given.
OF_LOGITS = {
    "defaults": ("the defaults of `compile`", lambda run: {}),
    "kd_t4": ("SoftTargets, T = 4, 0.1 CE + 0.9 KD", logits(lambda: L.SoftTargets(4.0), alpha=0.1)),
    "kd_t2": ("SoftTargets, T = 2, 0.5 CE + 0.5 KD", logits(lambda: L.SoftTargets(2.0), alpha=0.5)),
    "kd_only": ("SoftTargets, T = 1, no labels", logits(L.SoftTargets, alpha=0.0)),
    "standardized": (
        "SoftTargets standardized, T = 2, 0.1 CE + 9 KD",
        logits(
            lambda: L.SoftTargets(2.0, standardize=True),
            student_loss_weight=0.1,
            distillation_loss_weight=9.0,
        ),
    ),
    "flsw": (
        "SoftTargets with FLSW temperatures, 0.1 CE + 0.9 KD",
        logits(lambda: L.SoftTargets(L.FLSW(4.0)), alpha=0.1),
    ),
    "cwsm": (
        "SoftTargets with CWSM temperatures, 0.1 CE + 0.9 KD",
        logits(lambda: L.SoftTargets(L.CWSM(4.0)), alpha=0.1),
    ),
    "reverse_kl": ("ReverseKL, 0.5 + 0.5", logits(L.ReverseKL, alpha=0.5)),
    "jensen_shannon": (
        "JensenShannon, T = 0.9, 0.5 + 0.5",
        logits(lambda: L.JensenShannon(temperature=0.9), alpha=0.5),
    ),
    "total_variation": ("TotalVariation, 0.5 + 0.5", logits(L.TotalVariation, alpha=0.5)),
    "logit_mse": ("LogitMSE, 0.5 + 0.5", logits(L.LogitMSE, alpha=0.5)),
    "logit_huber": ("LogitHuber, 0.5 + 0.5", logits(L.LogitHuber, alpha=0.5)),
    "decoupled": ("DecoupledKD, T = 4, 1 TCKD + 8 NCKD, warm-up, CE + DKD", decoupled),
    "dist": ("DIST, CE + 2 DIST", ce_and(L.DIST, 2.0)),
    "dist_t4": ("DIST, T = 4, CE + 2 DIST", ce_and(lambda: L.DIST(temperature=4.0), 2.0)),
}
OF_FEATURES = {
    "hint": ("Hint, last map, CE + 100", features(lambda r: L.Hint(), HIGH, 100.0, "auto")),
    "attention": (
        "AttentionTransfer, two maps, CE + 1000",
        features(lambda r: L.AttentionTransfer(), BOTH, 1000.0),
    ),
    "factor": (
        "FactorTransfer, last map, CE + 500",
        features(lambda r: L.FactorTransfer(), HIGH, 500.0, "auto"),
    ),
    "fsp": (
        "FSP, two maps, CE + 50",
        features(lambda r: L.FSP(), BOTH, 50.0, "conv"),
    ),
    "nst": ("NST, last map, CE + 50", features(lambda r: L.NST(), HIGH, 50.0)),
    "vid": ("VID, last map, CE + 1", features(lambda r: L.VID(), HIGH, 1.0)),
    "ickd": ("ICKD, last map, CE + 2.5", features(lambda r: L.ICKD(), HIGH, 2.5, "auto")),
    "reviewkd": (
        "ReviewKD, width 64, two maps, CE + 1, warm-up",
        features(lambda r: L.ReviewKD(width=64), BOTH, 1.0, warm_up=True),
    ),
    "simkd": ("SimKD, last map, no labels, the teacher's head", simkd),
    "similarity": (
        "SimilarityPreserving, last map, CE + 3000",
        features(lambda r: L.SimilarityPreserving(), HIGH, 3000.0),
    ),
    "rkd": ("RKD, embedding, CE + 1", features(lambda r: L.RKD(), EMBEDDING, 1.0)),
    "correlation": (
        "CorrelationCongruence, embedding, CE + 0.02",
        features(lambda r: L.CorrelationCongruence(), EMBEDDING, 0.02, "auto"),
    ),
    "pkt": ("PKT, embedding, CE + 30000", features(lambda r: L.PKT(), EMBEDDING, 30000.0)),
    "crd": (
        "CRD, memory banks, embedding, CE + 0.8",
        features(lambda r: L.CRD(samples=r.rows, negatives=4096), EMBEDDING, 0.8),
    ),
    "crd_batch": (
        "CRD, within the batch, embedding, CE + 0.8",
        features(lambda r: L.CRD(), EMBEDDING, 0.8),
    ),
    "dist_hint": (
        "DIST and Hint, CE + 2 DIST + 100 Hint",
        combined((L.DIST, None, None, 2.0), (L.Hint, HIGH, "auto", 100.0)),
    ),
    "kd_similarity": (
        "SoftTargets T = 4 and SimilarityPreserving, CE + 0.9 KD + 3000",
        combined(
            (lambda: L.SoftTargets(4.0), None, None, 0.9),
            (L.SimilarityPreserving, HIGH, None, 3000.0),
        ),
    ),
}
METHODS = {**OF_LOGITS, **OF_FEATURES}
PEERS = {
    "plain": "plain training, no teacher",
    "keras_default": "`keras.distillation`, its default",
    "keras_kl": "`keras.distillation`, `KLDivergence()` instance",
}


class Benchmark:
    """One data set: its teacher, caches and rows of the table."""

    def __init__(self, dataset, folder, work, results):
        self.dataset = dataset
        self.settings = SETTINGS
        self.work = pathlib.Path(work) / dataset
        self.work.mkdir(parents=True, exist_ok=True)
        x, y, self.x_test, self.y_test = load(dataset, folder, None)
        held_out = self.settings["held_out"]
        self.x_held, self.y_held = x[-held_out:], y[-held_out:]
        self.x_full, self.y_full = x[:-held_out], y[:-held_out]
        self.rows = self.settings["rows"]
        self.x, self.y = self.x_full[: self.rows], self.y_full[: self.rows]
        self.callbacks = []
        self.kept = results or {"dataset": dataset, "settings": SETTINGS, "runs": {}}
        if json.loads(json.dumps(SETTINGS)) != json.loads(json.dumps(self.kept["settings"])):
            raise SystemExit(
                f"The results of {dataset} have other settings: remove the file first."
            )
        self.teacher = self.trained_teacher()

    def trained_teacher(self):
        """The teacher, trained if no run before this one has done it."""
        path = self.work / "teacher.keras"
        s = self.settings
        if not path.exists():
            keras.utils.set_random_seed(0)
            flip = self.dataset == "cifar10"
            model = convnet(self.x.shape[1:], s["teacher"], "teacher", flip=flip)
            steps = s["teacher_epochs"] * -(-len(self.x_full) // BATCH)
            rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
            model.compile(keras.optimizers.AdamW(rate), hard_loss(), metrics=["accuracy"])
            model.fit(
                self.x_full, self.y_full, batch_size=BATCH, epochs=s["teacher_epochs"], verbose=2
            )
            plain = convnet(self.x.shape[1:], s["teacher"], "teacher")
            plain.set_weights(
                [v.numpy() for v in model.variables if "seed_generator" not in v.path]
            )
            plain.save(self.work / "partial.keras")
            os.replace(self.work / "partial.keras", path)
        teacher = keras.models.load_model(path)
        teacher.trainable = False
        if "accuracy" not in self.kept.setdefault("teacher", {}):
            self.kept["teacher"]["accuracy"] = self.accuracy(teacher, self.x_test, self.y_test)
            self.kept["teacher"]["params"] = teacher.count_params()
            self.kept["full_rows"] = len(self.x_full)
            self.kept["student_params"] = self.student(0).count_params()
        return teacher

    def student(self, seed):
        """A new student with the initial weights of this seed."""
        keras.utils.set_random_seed(seed)
        return convnet(self.x.shape[1:], self.settings["student"], "student", small=True)

    def cache(self, name):
        """The teacher's logits, or its logits and features, on disk once."""
        with_features = name in OF_FEATURES
        path = self.work / ("features" if with_features else "logits")
        kd.cache.write(
            self.teacher,
            self.x,
            str(path),
            taps=("block2", "block3", "embedding") if with_features else (),
        )
        return kd.teachers.CachedTeacher(str(path))

    @staticmethod
    def accuracy(model, x, y):
        """Top-1 accuracy in percent."""
        return 100 * float(np.mean(model.predict(x, batch_size=1000, verbose=0).argmax(-1) == y))

    def run(self, name, seed):
        """Train one student by one method; its accuracies in percent, and the time."""
        keras.backend.clear_session()
        self.callbacks = []
        student = self.student(seed)
        epochs = self.settings["epochs"]
        rate = keras.optimizers.schedules.CosineDecay(5e-3, epochs * -(-self.rows // BATCH))
        optimizer = keras.optimizers.Adam(rate)
        model = student
        if name == "plain":
            student.compile(optimizer, hard_loss(), steps_per_execution=10)
        elif name in PEERS:
            from keras.distillation import Distiller, LogitsDistillation

            loss = {} if name == "keras_default" else {"loss": keras.losses.KLDivergence()}
            model = Distiller(
                self.teacher, student, distillation_losses=[LogitsDistillation(**loss)]
            )
            model.compile(optimizer, hard_loss(), steps_per_execution=10)
        else:
            model = kd.Distiller(student, self.cache(name))
            options = {"loss": hard_loss(), "steps_per_execution": 10, **METHODS[name][1](self)}
            model.compile(optimizer, **options)
        keras.utils.set_random_seed(seed)
        begin = time.time(), time.process_time()
        labels = () if name == "simkd" else (self.y,)
        model.fit(
            self.x, *labels, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=self.callbacks
        )
        seconds = time.time() - begin[0], time.process_time() - begin[1]
        if name == "simkd":
            student = self.with_head_of_teacher(model)
        return {
            "validation": self.accuracy(student, self.x_held, self.y_held),
            "test": self.accuracy(student, self.x_test, self.y_test),
            "seconds": round(seconds[0], 1),
            "cpu_seconds": round(seconds[1], 1),
        }

    def with_head_of_teacher(self, distiller):
        """SimKD's student: its maps, the projector, the teacher's head."""
        student, (transfer,) = distiller.student, distiller.transfers
        maps = transfer.loss.projector(student.get_layer("block3").output)
        pooled = keras.layers.GlobalAveragePooling2D()(maps)
        return keras.Model(student.inputs, self.teacher.get_layer("logits")(pooled))


def table(kept):
    """One data set as Markdown."""
    runs, s, teacher = kept["runs"], kept["settings"], kept["teacher"]
    rows = []
    for name, by_seed in runs.items():
        test = [run["test"] for run in by_seed.values()]
        held = np.mean([run["validation"] for run in by_seed.values()])
        label = PEERS.get(name) or METHODS[name][0]
        spread = f" ± {np.std(test, ddof=1):.2f}" if len(test) > 1 else ""
        seconds = np.median([run["cpu_seconds"] for run in by_seed.values()])
        mean = np.mean(test)
        # Of equal seeds, since a row may have fewer than plain training.
        gain = np.mean([run["test"] - runs["plain"][seed]["test"] for seed, run in by_seed.items()])
        rows.append(
            (
                mean,
                f"| {label} | {mean:.2f}{spread} | {gain:+.2f} | {held:.2f} "
                f"| {len(test)} | {seconds:.0f} |",
            )
        )
    hours, wall = (
        sum(run[key] for each in runs.values() for run in each.values()) / 3600
        for key in ("cpu_seconds", "seconds")
    )
    return "\n".join(
        [
            f"### {kept['dataset']}",
            "",
            f"Teacher: {teacher['params']:,} parameters, {teacher['accuracy']:.2f} % after "
            f"{s['teacher_epochs']} epochs of all {kept['full_rows']:,} rows. Student: "
            f"{kept['student_params']:,} parameters, {s['epochs']} epochs of {s['rows']:,} rows in "
            f"{s['epochs'] * -(-s['rows'] // BATCH)} steps. The runs together: "
            f"{hours:.2f} hours of CPU and {wall:.2f} by the clock, beside other work.",
            "",
            "| Method | test % | over plain, equal seeds | held-out % | seeds | fit, CPU s |",
            "|---|---|---|---|---|---|",
            *(line for _, line in sorted(rows, reverse=True)),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=DATASETS, default=DATASETS[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--work", default="build/methods", help="for the teacher and the caches")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="names of methods, joined by commas")
    parser.add_argument("--table", action="store_true", help="write docs/methods.md and stop")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [*PEERS, *METHODS]
    if unknown := set(names) - {*PEERS, *METHODS}:
        parser.error(f"unknown methods: {sorted(unknown)}. There are {[*PEERS, *METHODS]}")
    if not arguments.table:
        dataset = arguments.dataset
        benchmark = Benchmark(dataset, arguments.data, arguments.work, read(f"methods_{dataset}"))
        save(f"methods_{dataset}", benchmark.kept)
        for seed in range(arguments.seeds):
            for name in names:
                runs = benchmark.kept["runs"].setdefault(name, {})
                if str(seed) not in runs:
                    runs[str(seed)] = benchmark.run(name, seed)
                    save(f"methods_{dataset}", benchmark.kept)
                    print(f"{dataset} seed {seed} {name:16s} {runs[str(seed)]}", flush=True)
    tables = "\n\n".join(table(kept) for name in DATASETS if (kept := read(f"methods_{name}")))
    print(tables)
    put("methods.md", "table", tables)


if __name__ == "__main__":
    main()
