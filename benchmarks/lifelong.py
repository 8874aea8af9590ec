"""Methods of lifelong learning on streams of tasks: what is kept, and what a kilobyte buys.

    python benchmarks/lifelong.py --dataset fashion_mnist
    python benchmarks/lifelong.py --dataset fashion_mnist --only joint,dark_200 --orders 3 --seeds 2
    python benchmarks/lifelong.py --quick         # one order, one seed, few rows: does it run?
    python benchmarks/lifelong.py --table         # the tables in docs/lifelong.md, from the results

Split Fashion-MNIST and Split CIFAR-10 (the JPEG copy): five tasks of two classes each. Banking77:
seven tasks of eleven intents, words and pairs of words hashed into 1,024 numbers. FSDD: six tasks,
one a speaker, the classes the same. Each class order is one stream; weights and settings are those
of the papers where they give any, and none was tuned on these test parts. Each run is added
to `benchmarks/results/lifelong_DATASET.json` as soon as it is done, so an interrupted benchmark
goes on where it stopped; `--minutes` ends it after so much processor time.
"""

import argparse
import itertools
import json
import pathlib
import time

import keras
import numpy as np
from classes import banking
from records import put, read, save, spread
from shared_data import load, log_spectrogram
from sklearn.feature_extraction.text import HashingVectorizer

import keras_kd as kd

L = kd.lifelong
SETTINGS = {
    "fashion_mnist": {"rows": 20000, "epochs": 1, "batch_size": 10, "rate": 0.03, "replay": 128},
    "cifar10": {"rows": 10000, "epochs": 5, "batch_size": 32, "rate": 0.03, "replay": 32},
    # Momentum and decay as where BiC and WA come from: without decay old columns only grow.
    "banking77": {
        "rows": None,
        "epochs": 20,
        "batch_size": 32,
        "rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "replay": 32,
    },
    "fsdd": {"rows": None, "epochs": 5, "batch_size": 16, "rate": 0.03, "replay": 32},
}


def samples(count, policy="reservoir"):
    return lambda: L.Memory(count, policy=policy)


def none():
    return None


def dark(alpha, beta):
    return lambda replay: L.DarkReplay(alpha, beta, batch_size=replay)


# Name, label, method, memory.
METHODS = {
    "fine_tune": ("fine-tuning", lambda r: L.FineTune(), none),
    "lwf": ("LwF, weight 1, T = 2", lambda r: L.LearningWithoutForgetting(), none),
    "ewc": ("EWC, weight 100", lambda r: L.ElasticWeights(), none),
    "replay_200": ("ER, 200 rows", lambda r: L.Replay(r), samples(200)),
    "der_200": ("DER, 0.2 logits, 200 rows", dark(0.2, 0.0), samples(200)),
    "dark_200": ("DER++, 0.2 logits + 1 labels, 200 rows", dark(0.2, 1.0), samples(200)),
    "icarl_200": ("iCaRL, 200 rows", lambda r: L.ICaRL(), samples(200, "herding")),
    "wa_200": ("WA, 200 rows", lambda r: L.WeightAligning(), samples(200, "herding")),
    "bic_200": ("BiC, 200 rows", lambda r: L.BiasCorrection(), samples(200, "herding")),
    "lucir_200": ("LUCIR, 200 rows", lambda r: L.LessForgetting(), samples(200, "herding")),
    "podnet_200": ("PODNet, 200 rows", lambda r: L.PodNet(), samples(200, "herding")),
    "joint": ("joint, all rows", lambda r: L.Joint(), none),
}
# What a byte buys: labels alone, logits alone, both, at three sizes.
SIZES = {
    f"{name}_{count}": (f"{label}, {count} rows", make, samples(count))
    for count in (50, 500)
    for name, label, make in (
        ("replay", "ER", lambda r: L.Replay(r)),
        ("der", "DER, 0.2 logits", dark(0.2, 0.0)),
        ("dark", "DER++, 0.2 logits + 1 labels", dark(0.2, 1.0)),
    )
}
# As many classes as rows would otherwise leave two or three of each.
MANY = {
    "wa_500": ("WA, 500 rows", lambda r: L.WeightAligning(), samples(500, "herding")),
    "bic_500": ("BiC, 500 rows", lambda r: L.BiasCorrection(), samples(500, "herding")),
    "icarl_500": ("iCaRL, 500 rows", lambda r: L.ICaRL(), samples(500, "herding")),
}
ALL = {**METHODS, **SIZES, **MANY}
OF_MANY = ("fine_tune", "lwf", "replay_500", "dark_500", "wa_500", "bic_500", "icarl_500", "joint")
BY_DOMAIN = ("fine_tune", "lwf", "ewc", "replay_200", "der_200", "dark_200", "joint")


def student(dataset, shape, seed):
    """The same first weights for every method of a seed."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input(shape)
    if dataset == "cifar10":
        for width in (16, 32, 64):
            x = keras.layers.Conv2D(width, 3, padding="same", activation="relu")(x)
            x = keras.layers.MaxPooling2D()(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
    else:
        x = keras.layers.Flatten()(x)
        for _ in range(2):
            x = keras.layers.Dense(100, activation="relu")(x)
    classes = 77 if dataset == "banking77" else 10
    return keras.Model(inputs, keras.layers.Dense(classes, name="logits")(x))


def speakers(folder):
    with np.load(folder / "fsdd.npz") as d:
        audio, offsets, speaker = d["audio"], d["offsets"], d["speaker"]
        x = np.stack([log_spectrogram(audio[a:b]) for a, b in itertools.pairwise(offsets)])
        test = d["is_test"].astype(bool)
        y = d["label"]
    return (x[~test], y[~test], speaker[~test]), (x[test], y[test], speaker[test])


def intents(folder):
    """Texts of Banking77 as hashed words and pairs of words, of length 1."""
    (train, of_train), (test, of_test) = (banking(folder, split) for split in ("train", "test"))
    names = {name: index for index, name in enumerate(sorted(set(of_train)))}
    hashed = HashingVectorizer(n_features=1024, ngram_range=(1, 2), alternate_sign=False)
    x, u = (hashed.transform(texts).toarray().astype("float32") for texts in (train, test))
    y, v = (np.array([names[name] for name in each], "int32") for each in (of_train, of_test))
    return (x, y), (u, v)


class Benchmark:
    """One data set, its streams and its runs."""

    def __init__(self, dataset, folder, quick):
        self.dataset, self.quick = dataset, quick
        self.settings = dict(SETTINGS[dataset])
        if quick:
            self.settings.update(rows=1000)
        if dataset == "fsdd":
            self.train, self.test = speakers(folder)
        elif dataset == "banking77":
            self.train, self.test = intents(folder)
        else:
            x, y, u, v = load(dataset, folder, self.settings["rows"])
            self.train, self.test = (x, y), (u, v)

    def stream(self, order):
        """The tasks in one order."""
        if self.dataset == "fsdd":
            return L.Stream.by_domain(*self.train, test=self.test, seed=order)
        tasks = 7 if self.dataset == "banking77" else 5
        return L.Stream.by_class(*self.train, tasks=tasks, seed=order, test=self.test)

    def run(self, name, order, seed):
        """One learner on one stream; its figures in percent."""
        keras.backend.clear_session()
        s, begin = self.settings, time.process_time()
        model = student(self.dataset, self.train[0].shape[1:], seed)
        learner = L.Learner(model, ALL[name][1](s["replay"]), ALL[name][2](), seed=seed)
        kept = {key: s[key] for key in ("momentum", "weight_decay") if key in s}
        learner.compile(keras.optimizers.SGD(s["rate"], **kept), jit_compile=False)
        for task in self.stream(order):
            learner.fit(task, epochs=s["epochs"], batch_size=s["batch_size"], verbose=0)
        report = learner.report()
        return {
            "class_incremental": 100 * report.class_incremental_accuracy,
            "known_task": 100 * report.known_task_accuracy,
            "forgetting": 100 * report.forgetting,
            "bytes": report.memory_bytes,
            "cpu_seconds": round(time.process_time() - begin, 1),
        }


def table(kept):
    s, runs = kept["settings"], kept["runs"]
    joint = {key: run["class_incremental"] for key, run in runs.get("joint", {}).items()}
    rows = []
    for name, by_key in runs.items():
        values = {k: [run[k] for run in by_key.values()] for k in next(iter(by_key.values()))}
        shares = [
            100 * run["class_incremental"] / joint[key]
            for key, run in by_key.items()
            if key in joint
        ]
        share = f"{np.mean(shares):.0f}" if shares else "-"
        rows.append(
            (
                np.mean(values["class_incremental"]),
                f"| {ALL[name][0]} | {spread(values['class_incremental'])} | {share} "
                f"| {spread(values['known_task'])} | {spread(values['forgetting'])} "
                f"| {np.mean(values['bytes']) / 1000:,.0f} | {len(by_key)} "
                f"| {np.median(values['cpu_seconds']):.0f} |",
            )
        )
    told = kept["dataset"] != "fsdd"
    more = "".join(
        f", {k.replace('_', ' ')} {s[k]:g}" for k in ("momentum", "weight_decay") if k in s
    )
    keys = sorted({key for by_key in runs.values() for key in by_key})
    return "\n".join(
        [
            f"### {kept['dataset']}",
            "",
            f"{s['rows'] or 'All'} training rows, {s['epochs']} epoch(s) a task, batches of "
            f"{s['batch_size']}, SGD {s['rate']}{more}, draws of {s['replay']}. Runs are "
            f"named by the order of the {'classes' if told else 'speakers'} and the seed: "
            f"{', '.join(keys)}.",
            "",
            "| Method | accuracy %, all classes | % of joint | accuracy %, task known "
            "| forgetting, points | kept, KB | runs | CPU s |",
            "|---|---|---|---|---|---|---|---|",
            *(line for _, line in sorted(rows, reverse=True)),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=list(SETTINGS), default="fashion_mnist")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=90.0, help="of processor time, then stop")
    parser.add_argument("--only", help="names of settings, joined by commas")
    parser.add_argument("--quick", action="store_true", help="few rows; nothing is kept")
    parser.add_argument("--table", action="store_true", help="write docs/lifelong.md and stop")
    arguments = parser.parse_args()
    dataset = arguments.dataset
    known = {"fsdd": BY_DOMAIN, "banking77": OF_MANY}.get(dataset, [*METHODS, *SIZES])
    names = arguments.only.split(",") if arguments.only else known
    if unknown := set(names) - set(ALL):
        parser.error(f"unknown settings: {sorted(unknown)}. There are {list(ALL)}")
    if not arguments.table:
        benchmark = Benchmark(dataset, arguments.data, arguments.quick)
        kept = None if arguments.quick else read(f"lifelong_{dataset}")
        kept = kept or {"dataset": dataset, "settings": benchmark.settings, "runs": {}}
        if json.loads(json.dumps(benchmark.settings)) != kept["settings"]:
            raise SystemExit(f"The results of {dataset} have other settings: remove the file.")
        orders, seeds = (1, 1) if arguments.quick else (arguments.orders, arguments.seeds)
        for seed in range(seeds):
            for order in range(orders):
                for name in names:
                    key, runs = f"{order}-{seed}", kept["runs"].setdefault(name, {})
                    if key in runs or time.process_time() > 60 * arguments.minutes:
                        continue
                    runs[key] = benchmark.run(name, order, seed)
                    print(f"{dataset} {key} {name:12s} {runs[key]}", flush=True)
                    if not arguments.quick:
                        kept["runs"] = {k: v for k, v in kept["runs"].items() if v}
                        save(f"lifelong_{dataset}", kept)
        if arguments.quick:
            print(table(kept))
            return
    kept = [read(f"lifelong_{name}") for name in SETTINGS]
    tables = "\n\n".join(table(each) for each in kept if each)
    print(tables)
    put("lifelong.md", "table", tables)


if __name__ == "__main__":
    main()
