"""Methods against the number of classes: where each stops helping.

    python benchmarks/classes.py
    python benchmarks/classes.py --only text_150 --methods plain,dist_t4 --seeds 5
    python benchmarks/classes.py --table          # the table in docs/methods.md, from the results

Seven sets. `text_10` and `text_77` are the queries of the ten largest intents of Banking77 and of
all 77; `text_150` cuts each of the 75 largest intents in two by k-means of its queries. Their
student averages the embeddings of the words. `image_10`, `image_100` and `image_1000` are the same
Fashion-MNIST images with as many k-means clusters of their pixels as classes, so that nothing but
the number of classes changes; both models are dense nets over 64 principal components. `cifar_10`
has the convolutional models of `methods.py` on CIFAR-10 (the JPEG copy), and its students read the
teacher's logits from a cache. The teacher learns from
all training rows but the held-out ones, the students from a part of them, from the same initial
weights on the same batches by every method. Weights and temperatures are those of the papers, or
what the name of the row says. Each run is added to `benchmarks/results/classes.json` as soon as it
is done, so an interrupted benchmark goes on where it stopped.
"""

import argparse
import collections
import csv
import gzip
import math
import pathlib
import tempfile
import time

import keras
import numpy as np
from methods import convnet
from records import put, read, save
from shared_data import load
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

import keras_kd as kd

BATCH = 64
# Rows of the student, its epochs, its width, that of the teacher, the teacher's epochs.
SETS = {
    "text_10": (800, 60, 28, 256, 30),
    "text_77": (5000, 30, 28, 512, 20),
    "text_150": (5000, 30, 28, 512, 20),
    "image_10": (8000, 10, 16, 512, 8),
    "image_100": (8000, 10, 32, 512, 8),
    "image_1000": (16000, 10, 64, 1024, 8),
    "cifar_10": (10000, 10, (8, 16, 32), (32, 64, 128), 5),
}
WORDS = 3000
BALANCED = ("dist_t4_balanced",)


def fitted(classes):
    """A temperature that keeps the mass of the top class where T = 4 has it at ten classes."""
    return 4.0 * math.log(10) / math.log(classes)


def soft(temperature, alpha, **options):
    return lambda classes: {
        "distillation_loss": kd.losses.SoftTargets(temperature, **options),
        "alpha": alpha,
    }


def beside(loss, hard, weight):
    """`hard` CE + `weight` times a loss, both of which may depend on the number of classes."""
    return lambda classes: {
        "distillation_loss": loss(classes),
        "student_loss_weight": hard,
        "distillation_loss_weight": weight,
    }


def dist(temperature, **options):
    return lambda classes: kd.losses.DIST(
        temperature=temperature(classes) if callable(temperature) else temperature, **options
    )


def standardized(temperature):
    return lambda classes: kd.losses.SoftTargets(temperature, standardize=True)


METHODS = {
    "plain": ("plain training, no teacher", None),
    "defaults": ("the defaults of `compile`", lambda classes: {}),
    "kd_t2": ("SoftTargets, T = 2, 0.5 CE + 0.5 KD", soft(2.0, 0.5)),
    "kd_t4": ("SoftTargets, T = 4, 0.1 CE + 0.9 KD", soft(4.0, 0.1)),
    "standardized": (
        "SoftTargets standardized, T = 2, 0.1 CE + 9 KD",
        beside(standardized(2.0), 0.1, 9.0),
    ),
    "standardized_half": (
        "SoftTargets standardized, T = 2, 0.5 CE + 0.5 KD",
        soft(2.0, 0.5, standardize=True),
    ),
    "dist": ("DIST, T = 1, CE + 2 DIST", beside(dist(1.0), 1.0, 2.0)),
    "dist_t4": ("DIST, T = 4, CE + 2 DIST", beside(dist(4.0), 1.0, 2.0)),
    "dist_t4_rows": (
        "DIST, T = 4, rows alone (gamma = 0), CE + 2 DIST",
        beside(dist(4.0, gamma=0.0), 1.0, 2.0),
    ),
    "dist_t4_small": ("DIST, T = 4, CE + 2/16 DIST", beside(dist(4.0), 1.0, 0.125)),
    "dist_t4_balanced": (
        'DIST, T = 4, `LossBalancing("gradient_norm")`',
        lambda classes: {"distillation_loss": kd.losses.DIST(temperature=4.0)},
    ),
    "dist_fitted": (
        "DIST, T = 4 ln 10 / ln classes, CE + 2 DIST",
        beside(dist(fitted), 1.0, 2.0),
    ),
}


def banking(folder, split):
    with gzip.open(
        folder / f"banking77_{split}.csv.gz", "rt", encoding="utf-8", newline=""
    ) as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], np.array([row["category"] for row in rows])


def texts(folder, classes):
    """Sets of words and labels: x, y, x_test, y_test."""
    (train, intents), (test, expected) = (banking(folder, split) for split in ("train", "test"))
    order = np.random.default_rng(0).permutation(len(train))
    train, intents = [train[i] for i in order], intents[order]
    words = CountVectorizer(max_features=WORDS, binary=True).fit(train)
    x, u = (words.transform(rows).toarray().astype("float32") for rows in (train, test))
    kept = [name for name, _ in collections.Counter(intents).most_common(min(classes, 77))]
    if classes == 150:
        kept = kept[:75]
    number = {name: index for index, name in enumerate(kept)}
    here, there = (np.isin(names, kept) for names in (intents, expected))
    y, v = (np.array([number[n] for n in names]) for names in (intents[here], expected[there]))
    x, u = x[here], u[there]
    if classes == 150:
        weights = TfidfTransformer().fit(x)
        lower = TruncatedSVD(50, random_state=0).fit(weights.transform(x))
        z, w = (lower.transform(weights.transform(rows)) for rows in (x, u))
        halves = [KMeans(2, n_init=10, random_state=0).fit(z[y == c]) for c in range(75)]
        for rows, labels in ((z, y), (w, v)):
            old = labels.copy()
            for c, half in enumerate(halves):
                labels[old == c] = 2 * c + half.predict(rows[old == c])
    return x, y.astype("int32"), u, v.astype("int32")


def images(folder, classes):
    """Principal components and clusters of Fashion-MNIST: x, y, x_test, y_test."""
    x, _, u, _ = load("fashion_mnist", folder, None)
    x, u = (z.reshape(len(z), -1) for z in (x, u))
    lower = PCA(64, random_state=0).fit(x)
    x, u = (lower.transform(z).astype("float32") for z in (x, u))
    clusters = MiniBatchKMeans(classes, n_init=1, batch_size=4096, random_state=0).fit(x)
    return x / x.std(), clusters.predict(x), u / x.std(), clusters.predict(u)


def averaged(words, classes, width):
    """A student of texts: the mean of its words' embeddings, and a layer of logits.

    Its input is the share of each word, so that a dense layer is the mean of embeddings.
    """
    inputs = keras.Input((words,))
    share = keras.layers.UnitNormalization(axis=-1)(keras.ops.sqrt(inputs))
    embeddings = keras.layers.Dense(width, use_bias=False, kernel_initializer="random_uniform")
    return keras.Model(inputs, keras.layers.Dense(classes)(embeddings(share * share)))


def net(width, hidden, classes, dropout=0.0):
    x = inputs = keras.Input((width,))
    x = keras.layers.Dropout(dropout)(x) if dropout else x
    x = keras.layers.Dense(hidden, activation="relu")(x)
    x = keras.layers.Dropout(2 * dropout)(x) if dropout else x
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


def compiled(model, rate, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, steps_per_execution=20, **options)
    return model


def decayed(rate, rows, epochs):
    return keras.optimizers.schedules.CosineDecay(rate, epochs * -(-rows // BATCH))


def accuracy(model, x, y):
    """Top-1 accuracy in percent."""
    return 100 * float(np.mean(model.predict(x, batch_size=1000, verbose=0).argmax(-1) == y))


class Benchmark:
    """One set: its teacher, its rows, the runs of every method."""

    def __init__(self, name, folder, kept):
        self.name, self.kept = name, kept
        self.rows, self.epochs, self.width, wide, teacher_epochs = SETS[name]
        self.kind, _, classes = name.partition("_")
        self.classes = int(classes)
        if self.kind == "cifar":
            x, y, self.x_test, self.y_test = load("cifar10", folder, None)
        else:
            make = texts if self.kind == "text" else images
            x, y, self.x_test, self.y_test = make(folder, self.classes)
        held_out = len(x) // 10
        self.held = x[-held_out:], y[-held_out:]
        x, y = x[:-held_out], y[:-held_out]
        self.x, self.y = x[: self.rows], y[: self.rows]
        keras.utils.set_random_seed(0)
        if self.kind == "cifar":
            self.teacher = convnet(x.shape[1:], wide, "teacher")
        else:
            dropout = 0.25 if self.kind == "text" else 0.05
            self.teacher = net(x.shape[1], wide, self.classes, dropout)
        compiled(self.teacher, decayed(2e-3, len(x), teacher_epochs))
        self.teacher.fit(x, y, batch_size=BATCH, epochs=teacher_epochs, verbose=0)
        # What the students learn from: a large teacher answers once, not once a run.
        self.answers = self.teacher
        if self.kind == "cifar":
            self.stored = tempfile.TemporaryDirectory()
            kd.cache.write(self.teacher, self.x, f"{self.stored.name}/logits")
            self.answers = kd.teachers.CachedTeacher(f"{self.stored.name}/logits")
        kept["teacher"] = {
            "accuracy": accuracy(self.teacher, self.x_test, self.y_test),
            "params": self.teacher.count_params(),
            "rows": len(x),
        }
        kept["student"] = {"params": self.student(0).count_params(), "rows": len(self.x)}

    def student(self, seed):
        """A new student with the initial weights of this seed."""
        keras.utils.set_random_seed(seed)
        if self.kind == "cifar":
            return convnet(self.x.shape[1:], self.width, "student", small=True)
        if self.kind == "text":
            return averaged(self.x.shape[1], self.classes, self.width)
        return net(self.x.shape[1], self.width, self.classes)

    def compiled(self, method, student, teacher):
        """The student itself or a distiller around it, ready to train."""
        model, options = student, {}
        if METHODS[method][1] is not None:
            model = kd.Distiller(student, teacher)
            options = METHODS[method][1](self.classes)
        # Texts as most users train: one rate for all steps.
        rate = 5e-3 if self.kind == "text" else decayed(5e-3, len(self.x), self.epochs)
        return compiled(model, rate, **options)

    def pull(self, method):
        """How much stronger the second term pulls than the hard loss, after one plain epoch.

        The ratio of the norms of their gradients, weights included, on 1,024 rows.
        """
        student = self.student(0)
        plain = self.compiled("plain", student, None)
        plain.fit(self.x, self.y, batch_size=BATCH, verbose=0)
        model = self.compiled(method, student, self.teacher)
        norms = model.gradient_norms((self.x[:1024], self.y[:1024]))
        hard = norms.pop("student_loss") * float(model.student_loss_weight)
        (soft,) = norms.values()
        soft *= float(model.distillation_loss_weight)
        if model.weighs_by_alpha:
            alpha = float(model.alpha)
            hard, soft = alpha * hard, (1 - alpha) * soft
        return soft / hard

    def run(self, method, seed):
        """Train one student by one method; its accuracies in percent, and the time."""
        student = self.student(seed)
        model = self.compiled(method, student, self.answers)
        keras.utils.set_random_seed(seed)
        begin = time.process_time()
        balancing = kd.callbacks.LossBalancing("gradient_norm")
        callbacks = [balancing] if method in BALANCED else []
        model.fit(
            self.x, self.y, batch_size=BATCH, epochs=self.epochs, verbose=0, callbacks=callbacks
        )
        return {
            "validation": accuracy(student, *self.held),
            "test": accuracy(student, self.x_test, self.y_test),
            "cpu_seconds": round(time.process_time() - begin, 1),
        }


def table(sets):
    """All sets as Markdown: points over plain training, their mean and spread over the seeds."""
    names = [name for name in SETS if name in sets]

    def cell(name, method):
        runs = sets[name]["runs"]
        by_seed = runs.get(method, {})
        if not by_seed:
            return "-"
        if method == "plain":
            values, sign = [run["test"] for run in by_seed.values()], ""
        else:
            values = [run["test"] - runs["plain"][seed]["test"] for seed, run in by_seed.items()]
            sign = "+"
        # One run has no spread.
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):{sign}.1f}{spread}"

    def facts(title, fact):
        return f"| {title} | " + " | ".join(fact(sets[name]) for name in names) + " |"

    return "\n".join(
        [
            "| | " + " | ".join(name.replace("_", ", ") for name in names) + " |",
            "|---|" + "---|" * len(names),
            facts("teacher, test %", lambda kept: f"{kept['teacher']['accuracy']:.1f}"),
            facts("student, parameters", lambda kept: f"{kept['student']['params']:,}"),
            *(
                f"| {label} | " + " | ".join(cell(name, method) for name in names) + " |"
                for method, (label, _) in METHODS.items()
            ),
        ]
    )


def pulls_table(sets):
    """Pull of the second term over that of the hard loss, as Markdown."""
    names = [name for name in SETS if "pulls" in sets.get(name, {})]
    return "\n".join(
        [
            "| pull of the second term, times that of the hard loss | "
            + " | ".join(name.replace("_", ", ") for name in names)
            + " |",
            "|---|" + "---|" * len(names),
            *(
                f"| {METHODS[method][0]} | "
                + " | ".join(f"{sets[name]['pulls'][method]:.1f}" for name in names)
                + " |"
                for method in METHODS
                if METHODS[method][1] is not None and method not in BALANCED
            ),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--only", help="names of sets, joined by commas")
    parser.add_argument("--methods", help="names of methods, joined by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="write docs/methods.md and stop")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [*SETS]
    methods = arguments.methods.split(",") if arguments.methods else [*METHODS]
    if unknown := (set(names) - set(SETS)) | (set(methods) - set(METHODS)):
        parser.error(f"unknown: {sorted(unknown)}. There are {[*SETS]} and {[*METHODS]}.")
    results = read("classes") or {"sets": {}}
    for name in () if arguments.table else names:
        kept = results["sets"].setdefault(name, {"runs": {}})
        benchmark = None
        for seed in range(arguments.seeds):
            for method in methods:
                runs = kept["runs"].setdefault(method, {})
                if str(seed) not in runs:
                    benchmark = benchmark or Benchmark(name, arguments.data, kept)
                    runs[str(seed)] = benchmark.run(method, seed)
                    save("classes", results)
                    print(f"{name} seed {seed} {method:14s} {runs[str(seed)]}", flush=True)
        pulls = kept.setdefault("pulls", {})
        for method in methods:
            if METHODS[method][1] is not None and method not in (*pulls, *BALANCED):
                benchmark = benchmark or Benchmark(name, arguments.data, kept)
                pulls[method] = benchmark.pull(method)
                save("classes", results)
                print(f"{name} pull {method:14s} {pulls[method]:.2f}", flush=True)
    text = f"{table(results['sets'])}\n\n{pulls_table(results['sets'])}"
    print(text)
    if arguments.table:
        put("methods.md", "classes", text)


if __name__ == "__main__":
    main()
