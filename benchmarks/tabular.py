"""A gradient-boosted teacher and a tiny Keras student on tables: AUC on held-out rows, three seeds.

    python benchmarks/tabular.py
    python benchmarks/tabular.py --data ../shared/data --seeds 5

The teacher is scikit-learn's `HistGradientBoostingClassifier`, asked once through
`keras_kd.cache.write`. All three students start from the same weights and see the same batches: one
learns from the labels, one from labels and teacher, one from the teacher's answers alone. Bank
Marketing is split at random, four to one, since its rows come in the order of dates, and without
`duration`, which is known only after the call.
"""

import argparse
import csv
import gzip
import pathlib
import tempfile
import time

import keras
import numpy as np
import records
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import keras_kd as kd

EPOCHS, BATCH, WIDTH = 10, 128, 8
STUDENTS = ("labels", "labels and teacher", "teacher alone")


def table(path, delimiter):
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        names, *rows = csv.reader(stream, delimiter=delimiter)
    return {name: np.array(column) for name, column in zip(names, zip(*rows))}


def features(train, test, target, positive, left_out=()):
    """Both parts in numbers, fitted to the first: one-hot categories, standardized numbers."""

    def is_number(column):
        try:
            column.astype("float32")
        except ValueError:
            return False
        return True

    names = [name for name in train if name != target and name not in left_out]
    numbers = [i for i, name in enumerate(names) if is_number(train[name])]
    others = [i for i in range(len(names)) if i not in numbers]
    encoder = ColumnTransformer(
        [
            ("numbers", StandardScaler(), numbers),
            ("others", OneHotEncoder(handle_unknown="ignore", sparse_output=False), others),
        ]
    )
    parts = [
        np.stack([part[name] for name in names], axis=1).astype(object) for part in (train, test)
    ]
    for part in parts:
        part[:, numbers] = part[:, numbers].astype("float32")
    x, u = encoder.fit_transform(parts[0]), encoder.transform(parts[1])
    y, v = ((part[target] == positive).astype("int32") for part in (train, test))
    return x.astype("float32"), y, u.astype("float32"), v


def load(name, folder):
    if name == "Adult":
        train, test = (table(folder / f"adult_{part}.csv.gz", ",") for part in ("train", "test"))
        return features(train, test, "income", ">50K")
    whole = table(folder / "bank_marketing_full.csv.gz", ";")
    rows = np.arange(len(whole["y"]))
    chosen = train_test_split(rows, test_size=0.2, random_state=0, stratify=whole["y"])
    parts = [{key: column[part] for key, column in whole.items()} for part in chosen]
    return features(*parts, "y", "yes", left_out=("duration",))


def student(columns):
    inputs = keras.Input((columns,))
    x = keras.layers.Dense(WIDTH, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(x), name="student")


def trained(kind, teacher, x, y, seed):
    keras.utils.set_random_seed(seed)
    model = student(x.shape[1])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    distiller = kd.Distiller(model, None if kind == "labels" else teacher)
    distiller.compile(
        keras.optimizers.Adam(2e-3),
        None if kind == "teacher alone" else loss,
        distillation_loss=None if kind == "labels" else kd.losses.BinarySoftTargets(),
        steps_per_execution=16,
    )
    keras.utils.set_random_seed(seed)
    distiller.fit(
        x, None if kind == "teacher alone" else y, batch_size=BATCH, epochs=EPOCHS, verbose=0
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=folder)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results, lines = [], []
    for name in ("Adult", "Bank Marketing"):
        clock, processor = time.time(), time.process_time()
        x, y, u, v = load(name, arguments.data)
        booster = HistGradientBoostingClassifier(random_state=0).fit(x, y)
        teacher_auc = roc_auc_score(v, booster.predict_proba(u)[:, 1])
        with tempfile.TemporaryDirectory() as path:
            teacher = kd.teachers.from_sklearn(booster, units=1)
            kd.cache.write(teacher, x, path, dtype="float32", batch_size=4096)
            cached = kd.teachers.CachedTeacher(path)
            found = {kind: [] for kind in STUDENTS}
            for seed in range(arguments.seeds):
                for kind in STUDENTS:
                    model = trained(kind, cached, x, y, seed)
                    answers = model.predict(u, batch_size=4096, verbose=0)
                    found[kind].append(float(roc_auc_score(v, answers[:, 0])))
        spent = {"seconds": time.time() - clock, "cpu_seconds": time.process_time() - processor}
        gain = np.array(found["labels and teacher"]) - np.array(found["labels"])
        results.append(
            {
                "data": name,
                "rows": [len(x), len(u)],
                "columns": x.shape[1],
                "parameters": model.count_params(),
                "teacher_auc": float(teacher_auc),
                "auc": found,
                "gain": {
                    "mean": float(gain.mean()),
                    "standard_error": float(gain.std(ddof=1) / np.sqrt(len(gain))),
                },
                **{key: round(value, 1) for key, value in spent.items()},
            }
        )
        cells = [
            f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" for values in found.values()
        ]
        shown = f"{gain.mean():+.4f} ± {gain.std(ddof=1) / np.sqrt(len(gain)):.4f}"
        row = [name, f"{len(x):,} / {len(u):,}", f"{teacher_auc:.4f}", *cells, shown]
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], spent, flush=True)
    records.save(
        "tabular",
        {
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "seeds": arguments.seeds,
            "keras": keras.__version__,
            "backend": keras.config.backend(),
            "results": results,
        },
    )
    head = [
        "| Data | rows, train / test | teacher | student: labels | labels and teacher "
        "| teacher alone | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    records.put("teachers.md", "tabular", "\n".join([*head, *lines]))


if __name__ == "__main__":
    main()
