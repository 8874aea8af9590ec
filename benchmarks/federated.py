"""Ten clients with other shares of the classes each: alone, FedMD, DS-FL, FedDF, and pooled rows.

    python benchmarks/federated.py
    python benchmarks/federated.py --alphas 0.1 --seeds 3 --minutes 60
    python benchmarks/federated.py --only dsfl_median --alphas 0.1 --lies none,constant,shifted
    python benchmarks/federated.py --quick        # few rows and rounds; nothing is kept
    python benchmarks/federated.py --table        # the tables in docs/federated.md, from results

Fashion-MNIST: private rows are dealt to the clients class by class in shares that a Dirichlet
distribution draws; the public rows are others, without labels. Clients and student are the same
small CNN, so that FedAvg's bytes can be told by calculation: its weights, both ways, in as many
rounds. All figures are accuracies on the same balanced test rows. `alone` is a client after as many
passes over its own rows as in the federation. With `--lies` there is one client more, which has
rows of all classes and lies: it answers the same to every row (`constant`), almost the same
(`nearly`), or what it knows, one class further (`shifted`); of the clients nothing is measured
then. Each run is kept as soon as it is done, so an interrupted benchmark goes on where it stopped.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import time
import warnings

import keras
import numpy as np
from records import put, read, save, spread
from shared_data import load

from keras_kd import federated

SETTINGS = {
    "clients": 10,
    "private": 6000,
    "public": 3000,
    "test": 2000,
    "rounds": 10,
    "queries": 500,
    "epochs": 2,
    "batch_size": 32,
}
METHODS = {
    "fedmd": ("FedMD", federated.FedMD),
    "dsfl": ("DS-FL", federated.DSFL),
    "feddf": ("FedDF, from outputs", federated.FedDF),
}
RULES = ("mean", "median", "trimmed")


def constant(answers, rng):
    """Of every row that it is of the first class."""
    return np.tile(np.eye(answers.shape[1])[:1], (len(answers), 1))


def nearly(answers, rng):
    """The same, with a probability that differs a little from row to row."""
    sure = rng.uniform(0.9, 1.0, (len(answers), 1))
    rest = np.full((len(answers), answers.shape[1] - 1), 1.0) / (answers.shape[1] - 1)
    return np.concatenate([sure, (1.0 - sure) * rest], axis=1)


def shifted(answers, rng):
    """What it knows, of the class after."""
    return np.roll(answers, 1, axis=1)


LIES = {
    "none": ("nobody lies", None),
    "constant": ("one answer to every row", constant),
    "nearly": ("almost one answer to every row", nearly),
    "shifted": ("the class after the right one", shifted),
}


class Lying(federated.InProcess):
    """An engine in which the answers of the last client are lies."""

    def __init__(self, lie):
        super().__init__()
        self.lie, self.rng = lie, np.random.default_rng(0)

    def run(self, serve, places):
        """As in `InProcess`, with a link that lies."""

        def served(link):
            honest = link.exchange

            def exchange(packets):
                return [self.replaced(reply, len(places) - 1) for reply in honest(packets)]

            link.exchange = exchange
            return serve(link)

        return super().run(served, places)

    def replaced(self, reply, liar):
        """A reply, with other answers if it is the liar's."""
        packet = reply.packet
        if reply.node != liar or packet is None or packet.kind != "answers":
            return reply
        told = self.lie(packet.arrays["answers"].astype("float64"), self.rng)
        arrays = {**packet.arrays, "answers": told.astype("float16")}
        return reply._replace(packet=dataclasses.replace(packet, arrays=arrays))


def network(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def shares(y, clients, alpha, seed, least=10):
    """Row numbers of each client: every class is dealt in shares that a Dirichlet draws."""
    rng = np.random.default_rng(seed)
    while True:
        parts = [[] for _ in range(clients)]
        for c in np.unique(y):
            rows = rng.permutation(np.flatnonzero(y == c))
            cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1]
            for part, each in zip(parts, np.split(rows, (cuts * len(rows)).astype(int))):
                part.extend(each)
        if min(map(len, parts)) >= least:
            return [np.array(sorted(part)) for part in parts]


class Benchmark:
    """The rows, and one run of each kind."""

    def __init__(self, folder, settings):
        self.settings = settings
        n = settings["private"]
        x, y, u, v = load("fashion_mnist", folder, n + settings["public"])
        self.private, self.public = (x[:n], y[:n]), x[n:]
        order = np.random.default_rng(0).permutation(len(u))[: settings["test"]]
        self.test = u[order], v[order]
        # As many as a client has on average, of all classes.
        mean = n // settings["clients"]
        order = np.random.default_rng(0).permutation(len(u))[settings["test"] :][:mean]
        self.liars = u[order], v[order]

    def pooled(self, seed):
        """All private rows in one place, as many passes as a client has."""
        s, begin = self.settings, time.process_time()
        model = network(seed)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"], jit_compile=False)
        passes = (s["rounds"] + 1) * s["epochs"]
        model.fit(*self.private, epochs=passes, batch_size=s["batch_size"], verbose=0)
        accuracy = model.evaluate(*self.test, verbose=0)[1]
        return {"student": accuracy, "cpu_seconds": round(time.process_time() - begin, 1)}

    def federation(self, name, alpha, seed):
        """Accuracies and bytes of one federation."""
        s, begin = self.settings, time.process_time()
        x, y = self.private
        parts = shares(y, s["clients"], alpha, seed)
        method, _, rule = name.partition("_")

        def maker(i):
            def make():
                return federated.Client(
                    network(100 * seed + i),
                    x[parts[i]],
                    y[parts[i]],
                    validation_data=self.test,
                    epochs=s["epochs"],
                    batch_size=s["batch_size"],
                )

            return make

        federation = federated.Federation(
            [maker(i) for i in range(s["clients"])],
            self.public,
            METHODS[method][1](),
            aggregate=rule or "mean",
            student=network(seed),
            seed=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            history = federation.fit(
                s["rounds"], s["queries"], validation_data=self.test, verbose=0
            )
        weights = sum(int(np.prod(w.shape)) for w in federation.student.weights)
        return {
            "student": history.rounds[-1]["student_accuracy"],
            "by_round": [round(row["student_accuracy"], 4) for row in history.rounds],
            "alone": float(np.mean([row["alone"] for row in history.per_client])),
            "after": float(np.mean([row["after"] for row in history.per_client])),
            "best_alone": max(row["alone"] for row in history.per_client),
            "worse": history.worse,
            "bytes_up": history.bytes_up,
            "bytes_down": history.bytes_down,
            "fedavg_bytes": 2 * 4 * weights * s["clients"] * s["rounds"],
            "rows": [len(part) for part in parts],
            "events": len([e for e in history.events if e["what"] != "worse"]),
            "cpu_seconds": round(time.process_time() - begin, 1),
        }

    def with_liar(self, name, alpha, lie, seed):
        """Accuracy of the student where one client more lies, or nobody does."""
        s, begin = self.settings, time.process_time()
        x, y = self.private
        rows = [(x[part], y[part]) for part in shares(y, s["clients"], alpha, seed)]
        tell = LIES[lie][1]
        if tell is not None:
            rows.append(self.liars)
        method, _, rule = name.partition("_")

        def maker(i):
            def make():
                return federated.Client(
                    network(100 * seed + i),
                    *rows[i],
                    validation_split=0,
                    epochs=s["epochs"],
                    batch_size=s["batch_size"],
                )

            return make

        federation = federated.Federation(
            [maker(i) for i in range(len(rows))],
            self.public,
            METHODS[method][1](),
            None if tell is None else Lying(tell),
            aggregate=rule or "mean",
            student=network(seed),
            seed=seed,
        )
        history = federation.fit(s["rounds"], s["queries"], verbose=0)
        learner = federation.student
        right = (learner.predict(self.test[0], verbose=0).argmax(-1) == self.test[1]).mean()
        return {
            "student": float(right),
            "rejected": sum(e["what"] == "rejected" for e in history.events),
            "cpu_seconds": round(time.process_time() - begin, 1),
        }


def lies_table(kept):
    """A line for each lie, a column for each rule, and how many of the liar's answers counted."""
    runs, found = kept.get("lies", {}), kept["runs"]
    cases = sorted({tuple(key.split("/")[:2]) for key in runs})
    cases = sorted({(alpha, name.partition("_")[0]) for alpha, name in cases})
    lines = [
        "| Dirichlet | Method | One client more answers | " + " | ".join(f"{r} %" for r in RULES)
        + " | answers refused | seeds |",
        "|---|---|---|" + "---|" * (len(RULES) + 2),
    ]  # fmt: skip
    for alpha, method in cases:
        for lie, (words, _) in LIES.items():
            names = [method if rule == "mean" else f"{method}_{rule}" for rule in RULES]
            of = {
                name: {
                    key.split("/")[3]: run
                    for key, run in runs.items()
                    if key.startswith(f"{alpha}/{name}/{lie}/")
                }
                for name in names
            }
            if not any(of.values()):
                continue
            seeds = sorted({seed for each in of.values() for seed in each})
            if lie == "none":
                # The mean without a liar is that of the other table.
                keys = {k: f"{alpha}/{method}/{k}" for k in seeds}
                of[method] |= {k: found[key] for k, key in keys.items() if key in found}
            cells = [spread(100 * np.array([r["student"] for r in of[n].values()])) for n in names]
            lied = [
                run["rejected"] for each in of.values() for run in each.values() if lie != "none"
            ]
            refused = f"{np.mean(lied) / kept['settings']['rounds']:.0%}" if lied else "-"
            lines.append(
                f"| {alpha} | {METHODS[method][0]} | {words} | {' | '.join(cells)} | {refused} "
                f"| {len(seeds)} |"
            )
    return "\n".join(lines)


def table(kept):
    s, runs = kept["settings"], kept["runs"]
    lines = [
        f"{s['clients']} clients with {s['private']:,} private rows of Fashion-MNIST together, "
        f"{s['public']:,} public rows, {s['test']:,} test rows; {s['rounds']} rounds of "
        f"{s['queries']} questions, {s['epochs']} passes over the private rows in each. In the "
        "columns of accuracies: the mean over seeds ± the standard deviation.",
        "",
        "| Dirichlet | Method | student % | clients alone % | clients after % | pooled % "
        "| gap closed % | MB up | MB down | % of FedAvg's bytes | seeds | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for alpha in sorted({key.split("/")[0] for key in runs if key[0].isdigit()}, key=float):
        for name in [f"{m}{r}" for m in METHODS for r in ("", "_median", "_trimmed")]:
            found = {
                key.split("/")[2]: run
                for key, run in runs.items()
                if key.startswith(f"{alpha}/{name}/") and f"pooled/{key.split('/')[2]}" in runs
            }
            if not found:
                continue
            of = {k: [run[k] for run in found.values()] for k in next(iter(found.values()))}
            pooled = [runs[f"pooled/{seed}"]["student"] for seed in found]
            closed = [
                100 * (a - b) / (c - b) for a, b, c in zip(of["student"], of["alone"], pooled)
            ]
            share = 100 * (np.add(of["bytes_up"], of["bytes_down"]) / of["fedavg_bytes"]).mean()
            method, _, rule = name.partition("_")
            lines.append(
                f"| {alpha} | {METHODS[method][0]}{f', {rule}' if rule else ''} "
                + "".join(
                    f"| {spread(100 * np.array(values))} "
                    for values in (of["student"], of["alone"], of["after"], pooled)
                )
                + f"| {spread(closed)} | {np.mean(of['bytes_up']) / 1e6:.2f} "
                f"| {np.mean(of['bytes_down']) / 1e6:.2f} | {share:.1f} | {len(found)} "
                f"| {np.median(of['cpu_seconds']):.0f} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--alphas", default="0.1,1.0", help="of the Dirichlet, joined by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(METHODS), help="names, joined by commas")
    parser.add_argument("--lies", help=f"of one client more, of {', '.join(LIES)}")
    parser.add_argument("--minutes", type=float, default=90.0, help="of processor time, then stop")
    parser.add_argument("--quick", action="store_true", help="few rows; nothing is kept")
    parser.add_argument("--table", action="store_true", help="write docs/federated.md and stop")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    known = [f"{m}{r}" for m in METHODS for r in ("", *(f"_{rule}" for rule in RULES[1:]))]
    if unknown := set(names) - set(known):
        parser.error(f"unknown methods: {sorted(unknown)}. There are {known}")
    lies = arguments.lies.split(",") if arguments.lies else []
    if unknown := set(lies) - set(LIES):
        parser.error(f"unknown lies: {sorted(unknown)}. There are {list(LIES)}")
    settings = dict(SETTINGS)
    if arguments.quick:
        settings.update(private=400, public=200, test=200, rounds=2, queries=100, clients=3)
    kept = None if arguments.quick else read("federated")
    kept = kept or {"settings": settings, "runs": {}}
    if json.loads(json.dumps(settings)) != kept["settings"]:
        raise SystemExit("The results have other settings: remove the file.")
    if not arguments.table:
        benchmark = Benchmark(arguments.data, settings)
        runs = kept.setdefault("lies", {}) if lies else kept["runs"]
        jobs = []
        for seed in range(1 if arguments.quick else arguments.seeds):
            if not lies:
                jobs.append((f"pooled/{seed}", lambda seed=seed: benchmark.pooled(seed)))
            for alpha in arguments.alphas.split(","):
                for name, lie in itertools.product(names, lies):
                    job = lambda a=float(alpha), n=name, k=lie, s=seed: benchmark.with_liar(  # noqa: E731
                        n, a, k, s
                    )
                    jobs.append((f"{float(alpha)}/{name}/{lie}/{seed}", job))
                for name in names if not lies else []:
                    job = lambda a=float(alpha), n=name, s=seed: benchmark.federation(n, a, s)  # noqa: E731
                    jobs.append((f"{float(alpha)}/{name}/{seed}", job))
        for key, job in jobs:
            if key in runs or time.process_time() > 60 * arguments.minutes:
                continue
            keras.backend.clear_session()
            runs[key] = job()
            print(key, runs[key], flush=True)
            if not arguments.quick:
                save("federated", kept)
    print(table(kept), lies_table(kept), sep="\n\n")
    if not arguments.quick:
        put("federated.md", "table", table(kept))
        put("federated.md", "lies", lies_table(kept))


if __name__ == "__main__":
    main()
