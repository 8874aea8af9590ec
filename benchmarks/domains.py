"""Nine data sets of nine kinds: teacher, plain student, distilled student, int8 file.

    python benchmarks/domains.py                      # all sets, three seeds; goes on where it was
    python benchmarks/domains.py --only fsdd,adult
    python benchmarks/domains.py --only fsdd --again  # its rows once more
    python benchmarks/domains.py --table              # docs/results.md, from the results

The teacher has learned from many labeled rows. The student is a small net and has fewer; where a
set is large enough these are others, new to the teacher, and beside them there are rows without
labels, which the teacher answers too. With each seed the student starts from the same weights:
plain training on the labels (`alpha=1`), the default loss of `compile`, and
`distillation_loss="auto"`, which tries methods on tenths of the student's own labeled rows and
chooses without the test rows. Where there are rows without labels, plain training is measured a
second time with as many steps as the others take. The `auto` student of the first seed is exported
to TFLite, and its float32 and int8 files answer all test rows. The teacher's answers are read from
a cache of its outputs, so methods that read its layers are not among those that are tried.

Every run is kept in `benchmarks/results/domains.json` as soon as it is done. Sizes are such that
all of it takes about half an hour of one core.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import classes
import keras
import methods
import numpy as np
import shared_data
import tabular
from records import put, read, save, spread
from side_by_side import machine
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, ndcg_score, roc_auc_score
from threadpoolctl import threadpool_limits

import keras_kd as kd

RESULTS = "domains"
WAYS = ("plain", "longer", "default", "auto")


class Setting(NamedTuple):
    """How one set is cut, and how long is trained.

    Args:
        seen: Rows with labels that the teacher learns from.
        labeled: Rows with labels that the student has; the first of the teacher's own where
            `shared`, else the next ones, which are new to the teacher.
        unlabeled: Rows without labels that the student has beside them, new to the teacher too.
        teacher_epochs: Passes of a Keras teacher.
        epochs: Passes of a student over its rows, for every way.
        batch: The student's rows a step.
        rate: Its first learning rate; it falls as a cosine.
        shared: Whether the student's rows are among the teacher's.
    """

    seen: int
    labeled: int
    unlabeled: int
    teacher_epochs: int | None
    epochs: int
    batch: int
    rate: float
    shared: bool = False


SETTINGS = {
    "adult": Setting(20000, 4000, 8561, None, 15, 64, 2e-3),
    "bank_marketing": Setting(20000, 4000, 8950, None, 15, 64, 2e-3),
    "sms_spam": Setting(2460, 1000, 1000, None, 20, 32, 5e-3),
    "banking77": Setting(6003, 2000, 2000, 12, 15, 64, 5e-3),
    "movietweetings": Setting(1871, 1000, 0, 20, 15, 64, 5e-3, shared=True),
    "fsdd": Setting(2000, 2000, 0, 8, 8, 64, 5e-3, shared=True),
    "wnut17": Setting(3394, 1009, 2000, 8, 18, 64, 5e-3),
    "fashion_mnist": Setting(8000, 3000, 0, 4, 8, 128, 5e-3),
    "cifar10": Setting(10000, 3000, 0, 6, 8, 128, 5e-3),
}
ITEMS = 10


NO_LABEL = -1


@dataclasses.dataclass
class Domain:
    """One data set, ready for its students.

    Args:
        metric: What `score` answers, in percent.
        x: The student's rows, those with labels first.
        y: Their labels, `NO_LABEL` where there is none; of rankings shares of the items.
        labeled: How many have a label.
        u: Test inputs, whose labels `score` knows.
        score: From answers to the test inputs to figures by name, the first is the metric.
        answers: The teacher's logits for the student's rows.
        teacher: What `score` says of the teacher, its kind, and its rows.
        student: Makes a new student.
        loss: Makes the hard loss.
        mask: Which tokens count.
    """

    metric: str
    x: Any
    y: Any
    labeled: int
    u: Any
    score: Callable[[Any], dict[str, float]]
    answers: Any
    teacher: dict[str, Any]
    student: Callable[[], Any]
    loss: Callable[[], Any]
    mask: Any = None


def cut(setting, count):
    """Row numbers of the teacher and of the student, and how many of the latter have labels."""
    begin = 0 if setting.shared else setting.seen
    mine = np.arange(begin, min(count, begin + setting.labeled + setting.unlabeled))
    return np.arange(min(count, setting.seen)), mine, setting.labeled


def hidden(y, labeled):
    """Labels of which only the first ones are known."""
    y = y.copy()
    y[labeled:] = NO_LABEL
    return y


def of_classes():
    """Also of tokens: what has no label counts nowhere."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=NO_LABEL)


def of_items():
    return keras.losses.CategoricalCrossentropy(from_logits=True)


def logits_of_two(logit):
    """`(rows, 2)` logits of no and yes."""
    return np.stack([np.zeros_like(logit), logit], axis=1).astype("float32")


def accuracy(labels):
    return lambda answers: {"accuracy": 100 * float(np.mean(answers.argmax(-1) == labels))}


def auc(labels):
    def score(answers):
        return {
            "auc": 100 * roc_auc_score(labels, answers[:, 1] - answers[:, 0]),
            "accuracy": 100 * float(np.mean(answers.argmax(1) == labels)),
        }

    return score


def f1(labels):
    def score(answers):
        found = answers.argmax(1)
        return {
            "f1": 100 * f1_score(labels, found),
            "accuracy": 100 * float(np.mean(found == labels)),
        }

    return score


def entities(labels):
    """F1 of whole entities, as CoNLL counts them, and of the tokens in them."""

    def score(answers):
        guessed = np.where(labels < 0, -1, answers.argmax(-1))
        found, real = spans(guessed), spans(labels)
        inside = labels > 0
        right = (guessed == labels) & inside
        return {
            "entity_f1": 200 * len(found & real) / max(1, len(found) + len(real)),
            "token_f1": 200 * int(right.sum()) / max(1, int(inside.sum() + (guessed > 0).sum())),
        }

    return score


def spans(tags):
    """`(row, begin, end, kind)` of each entity; 0 is outside, 2k + 1 begins and 2k + 2 goes on."""
    found = set()
    for row, line in enumerate(tags.tolist()):
        begin, kind = 0, None
        for place, tag in enumerate([*line, 0]):
            goes_on = tag > 0 and tag % 2 == 0 and (tag - 1) // 2 == kind
            if kind is not None and not goes_on:
                found.add((row, begin, place, kind))
                kind = None
            if tag > 0 and kind is None:
                begin, kind = place, (tag - 1) // 2
    return found


def ranked(seen, gains):
    """NDCG and recall among the best ten of what a user has not rated before."""

    def score(answers):
        answers = np.where(seen > 0, -1e9, answers)
        best = np.argpartition(-answers, ITEMS, axis=1)[:, :ITEMS]
        hits = np.take_along_axis(gains > 0, best, 1).sum(1)
        most = np.minimum((gains > 0).sum(1), ITEMS)
        return {
            "ndcg@10": 100 * float(ndcg_score(gains, answers, k=ITEMS)),
            "recall@10": 100 * float(np.mean(hits / most)),
        }

    return score


def fitted(model, x, y, loss, epochs, batch, rate):
    """A Keras teacher, trained on labels."""
    steps = epochs * -(-len(x) // batch)
    model.compile(
        keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(rate, steps)),
        loss,
        steps_per_execution=8,
    )
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)
    return lambda rows: model.predict(rows, batch_size=256, verbose=0)


def known(score, answer, kind, u, rows):
    return {"kind": kind, "rows": rows, **score(answer(u))}


def images(name, setting, folder):
    if name == "fsdd":
        x, y, u, v = shared_data.speakers(folder)
    else:
        rows = setting.seen + setting.labeled + setting.unlabeled
        x, y, u, v = shared_data.load(name, folder, rows)
    shape, score = x.shape[1:], accuracy(v)
    theirs, mine, labeled = cut(setting, len(x))
    large = methods.convnet(shape, (16, 32, 64), "teacher", flip=name == "cifar10")
    batch = 64 if name == "fsdd" else 128
    answer = fitted(large, x[theirs], y[theirs], of_classes(), setting.teacher_epochs, batch, 3e-3)
    x, y = x[mine], hidden(y[mine], labeled)
    return Domain(
        "accuracy",
        x,
        y,
        labeled,
        u,
        score,
        answer(x),
        known(score, answer, f"convnet, {large.count_params():,} parameters", u, len(theirs)),
        lambda: methods.convnet(shape, (8, 16, 32), "student", small=True),
        of_classes,
    )


def banking77(name, setting, folder):
    x, y, u, v = classes.texts(folder, 77)
    x, u = unit(x), unit(u)
    words, score = x.shape[1], accuracy(v)
    theirs, mine, labeled = cut(setting, len(x))
    wide = classes.net(words, 256, 77, 0.25)
    answer = fitted(wide, x[theirs], y[theirs], of_classes(), setting.teacher_epochs, 64, 2e-3)
    x, y = x[mine], hidden(y[mine], labeled)
    return Domain(
        "accuracy",
        x,
        y,
        labeled,
        u,
        score,
        answer(x),
        known(score, answer, f"dense net, {wide.count_params():,} parameters", u, len(theirs)),
        lambda: of_words(words, 77, 28),
        of_classes,
    )


def sms_spam(name, setting, folder):
    (train, y), (test, v) = shared_data.messages(folder)
    weights = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    theirs, mine, labeled = cut(setting, len(train))
    linear = LogisticRegression(C=100.0, max_iter=300)
    linear.fit(weights.fit_transform([train[i] for i in theirs]), y[theirs])
    score = f1(v)

    def answer(texts):
        return logits_of_two(linear.decision_function(weights.transform(texts)))

    texts, y = [train[i] for i in mine], hidden(y[mine], labeled)
    x, u, words = shared_data.bags(texts, test, 1000)
    return Domain(
        "F1 of spam",
        unit(x),
        y,
        labeled,
        unit(u),
        score,
        answer(texts),
        known(score, answer, "logistic regression on n-grams", test, len(theirs)),
        lambda: of_words(words, 2, 8),
        of_classes,
    )


def of_words(words, units, width):
    """The mean of the words' embeddings, and a layer of logits: rows have unit length."""
    inputs = keras.Input((words,))
    x = keras.layers.Dense(width, use_bias=False, kernel_initializer="random_uniform")(inputs)
    return keras.Model(inputs, keras.layers.Dense(units)(x))


def unit(rows):
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)).astype("float32")


def small(columns):
    inputs = keras.Input((columns,))
    x = keras.layers.Dense(tabular.WIDTH, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def table(name, setting, folder):
    title = DOMAINS[name][0]
    x, y, u, v = tabular.load(title, folder)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    columns, score = x.shape[1], auc(v)
    theirs, mine, labeled = cut(setting, len(x))
    # Beside other work its threads would wait for one another, at full speed.
    with threadpool_limits(1):
        booster = HistGradientBoostingClassifier(random_state=0).fit(x[theirs], y[theirs])

    def answer(rows):
        return logits_of_two(booster.decision_function(rows))

    x, y = x[mine], hidden(y[mine], labeled)
    return Domain(
        "AUC",
        x,
        y,
        labeled,
        u,
        score,
        answer(x),
        known(score, answer, "gradient boosting", u, len(theirs)),
        lambda: small(columns),
        of_classes,
    )


def tagger(length, rows, tags, embedding, width, layers, dropout=0.0):
    """Embeddings of a token's word, begin, end and shape, and convolutions over its neighbors."""
    inputs = keras.Input((length, 4), dtype="int32")
    x = keras.layers.Embedding(rows, embedding)(inputs)
    x = keras.layers.Reshape((length, 4 * embedding))(x)
    for _ in range(layers):
        x = keras.layers.Dropout(dropout)(x) if dropout else x
        x = keras.layers.Conv1D(width, 3, padding="same", activation="relu")(x)
    x = keras.layers.Dropout(dropout)(x) if dropout else x
    return keras.Model(inputs, keras.layers.Dense(tags)(x))


def wnut17(name, setting, folder):
    """Its training sentences are the teacher's; the student has its development sentences."""
    (x, y), (known_x, known_y), (u, v), rows, tags = shared_data.sentences(folder)
    length, score = x.shape[1], entities(v)
    large = tagger(length, rows, tags, 32, 128, 2, 0.3)
    answer = fitted(large, x, y, of_classes(), setting.teacher_epochs, 32, 2e-3)
    teacher = known(score, answer, f"convnet, {large.count_params():,} parameters", u, len(x))
    mine = np.concatenate([known_x, x[: setting.unlabeled]])
    tokens = np.concatenate([known_y, y[: setting.unlabeled]])
    return Domain(
        "F1 of entities",
        mine,
        hidden(tokens, setting.labeled),
        setting.labeled,
        u,
        score,
        answer(mine),
        teacher,
        lambda: tagger(length, rows, tags, 8, 24, 1),
        of_classes,
        mask=tokens >= 0,
    )


def ranker(items, widths, dropout=0.0):
    """From the items that a user rated to a score of each item."""
    x = inputs = keras.Input((items,))
    x = keras.layers.UnitNormalization()(x)
    x = keras.layers.Dropout(dropout)(x) if dropout else x
    for width in widths:
        x = keras.layers.Dense(width, activation="tanh")(x)
    return keras.Model(inputs, keras.layers.Dense(items)(x))


def movietweetings(name, setting, folder):
    x, gains, u, v = shared_data.ratings(folder)
    items = x.shape[1]
    y = gains / gains.sum(1, keepdims=True)
    score = ranked(u, v)
    theirs, mine, labeled = cut(setting, len(x))
    large = ranker(items, (256,), 0.5)
    answer = fitted(large, x[theirs], y[theirs], of_items(), setting.teacher_epochs, 64, 1e-3)
    x, y = x[mine], y[mine].copy()
    # A row of no gain has no label.
    y[labeled:] = 0
    return Domain(
        "NDCG@10",
        x,
        y,
        labeled,
        u,
        score,
        answer(x),
        known(score, answer, f"dense net, {large.count_params():,} parameters", u, len(theirs)),
        lambda: ranker(items, (16,)),
        of_items,
    )


DOMAINS = {
    "adult": ("Adult", table),
    "bank_marketing": ("Bank Marketing", table),
    "sms_spam": ("SMS Spam", sms_spam),
    "banking77": ("Banking77", banking77),
    "movietweetings": ("MovieTweetings", movietweetings),
    "fsdd": ("FSDD, speakers held out", images),
    "wnut17": ("WNUT-17", wnut17),
    "fashion_mnist": ("Fashion-MNIST", images),
    "cifar10": ("CIFAR-10 (JPEG copy)", images),
}


def trained(setting, domain, cache, way, seed):
    """One student; its figures on the test rows, what was chosen, and the processor time."""
    x, y, epochs = domain.x, domain.y, setting.epochs
    teacher, options = kd.teachers.CachedTeacher(cache), {}
    if way in ("plain", "longer"):
        # Without a teacher, rows without labels teach nothing.
        epochs = epochs if way == "plain" else round(epochs * len(x) / domain.labeled)
        teacher, x, y = None, x[: domain.labeled], y[: domain.labeled]
    elif way == "auto":
        options = {"distillation_loss": "auto"}
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    student = domain.student()
    distiller = kd.Distiller(student, teacher)
    steps = epochs * -(-len(x) // setting.batch)
    distiller.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(setting.rate, steps)),
        domain.loss(),
        steps_per_execution=8,
        **options,
    )
    keras.utils.set_random_seed(seed)
    began = time.process_time()
    distiller.fit(x, y, batch_size=setting.batch, epochs=epochs, verbose=0)
    spent = time.process_time() - began
    found = domain.score(student.predict(domain.u, batch_size=256, verbose=0))
    run = {**found, "cpu_seconds": round(spent, 1)}
    choice = distiller.method_choice
    if choice is not None:
        kept = ("method", "seeds", "error", "gain", "bound", "row_bound", "loss_gain", "loss_bound")
        rows = [{key: row[key] for key in kept} for row in choice.rows() if row["seeds"]]
        run |= {"method": choice.best, "tried": rows}
    return run, student


def exported(domain, student):
    """The files of one student: figures on the test rows, bytes, milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = kd.export(
            student,
            pathlib.Path(folder) / "files",
            ("tflite",),
            ("float32", "int8"),
            calibration=domain.x[:256],
            evaluation=domain.u[:256],
            max_drop=None,
            mixed=False,
        )
        found = {}
        for artifact in report.artifacts:
            if artifact.path is None:
                found[artifact.precision] = {"reason": artifact.reason}
                continue
            run = kd.export.load(artifact.path)
            found[artifact.precision] = {
                **domain.score(np.asarray(run(domain.u))),
                "bytes": artifact.bytes,
                "latency_ms": artifact.latency_ms,
                "reason": artifact.reason,
            }
    return found


def measure(name, folder, seeds, kept, keep):
    """All runs of one set that are not there yet."""
    title, make = DOMAINS[name]
    setting = SETTINGS[name]
    entry = kept["sets"].setdefault(name, {"settings": list(setting), "runs": {}, "files": {}})
    if entry["settings"] != list(setting):
        raise SystemExit(f"The results of {name} have other settings: remove them first.")
    ways = [way for way in WAYS if setting.unlabeled or way != "longer"]
    missing = [
        (seed, way) for seed in seeds for way in ways if way not in entry["runs"].get(str(seed), {})
    ]
    if not missing and entry["files"]:
        return
    began = time.process_time()
    keras.utils.set_random_seed(0)
    domain = make(name, setting, folder)
    student = domain.student()
    entry |= {
        "title": title,
        "metric": domain.metric,
        "key": next(key for key in domain.teacher if key not in ("kind", "rows")),
        "rows": [domain.labeled, len(domain.x) - domain.labeled, len(domain.u)],
        "parameters": student.count_params(),
        "teacher": {**domain.teacher, "cpu_seconds": round(time.process_time() - began, 1)},
    }
    print(f"{name} teacher {entry['teacher']}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        kd.cache.write_answers(cache, domain.x, logits=domain.answers, mask=domain.mask)
        for seed, way in missing:
            run, student = trained(setting, domain, cache, way, seed)
            entry["runs"].setdefault(str(seed), {})[way] = run
            if way == "auto" and not entry["files"]:
                entry["files"] = exported(domain, student)
                print(f"{name} files {entry['files']}", flush=True)
            keep(kept)
            print(f"{name} seed {seed} {way:8s} {run}", flush=True)


def over(runs, key, way, other):
    """Points gained over another way with equal seeds, and their standard error."""
    gains = [run[way][key] - run[other][key] for run in runs]
    error = f" ± {np.std(gains, ddof=1) / np.sqrt(len(gains)):.2f}" if len(gains) > 1 else ""
    return float(np.mean(gains)), error


def plainly(runs, key):
    """The better one of the two plain trainings, by its mean."""
    ways = [way for way in ("plain", "longer") if all(way in run for run in runs)]
    return max(ways, key=lambda way: np.mean([run[way][key] for run in runs]))


def whole(run):
    return {"plain", "default", "auto"} <= set(run)


def tables(kept):
    """`docs/results.md` between its markers: the students, their files, and what was chosen."""
    students = [
        "| Data | metric, % | rows: teacher; student with, without labels; test | seeds | teacher "
        "| plain | plain, as many steps | default | auto | auto over plain | auto over default |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    files = [
        "| Data | student | float32 file | int8 file | difference | bytes, float32 "
        "| bytes, int8 | µs, float32 | µs, int8 | Command |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    chosen = [
        "| Data | seed | chosen | less error on held-out rows, points "
        "| more of the metric on the test rows | CPU s: plain, auto |",
        "|---|---|---|---|---|---|",
    ]
    gains, lost, outdated = [], [], []
    for name in DOMAINS:
        entry = kept["sets"].get(name)
        if entry is None or not entry["files"]:
            continue
        key, teacher = entry["key"], entry["teacher"]
        runs = [run for run in entry["runs"].values() if whole(run)]
        values = {way: [run[way][key] for run in runs if way in run] for way in WAYS}
        better = plainly(runs, key)
        plain, error = over(runs, key, "auto", better)
        default, other = over(runs, key, "auto", "default")
        gains.append((plain, default))
        labeled, unlabeled, test = entry["rows"]
        rows = f"{teacher['rows']:,}; {labeled:,}, {unlabeled:,}; {test:,}"
        old = entry["settings"] != list(SETTINGS[name])
        outdated += [entry["title"]] if old else []
        title = entry["title"] + (" *" if old else "")
        students.append(
            f"| {title} | {entry['metric']} | {rows} | {len(runs)} | {teacher[key]:.2f} | "
            + " | ".join(spread(values[way], 2) for way in WAYS)
            + f" | {plain:+.2f}{error} | {default:+.2f}{other} |"
        )
        student, (full, small) = runs[0]["auto"][key], entry["files"].values()
        lost.append(small[key] - student)
        files.append(
            f"| {entry['title']} | {student:.2f} | {full[key]:.2f} | {small[key]:.2f} "
            f"| {small[key] - student:+.2f} | {full['bytes']:,} | {small['bytes']:,} "
            f"| {1000 * full['latency_ms']:.1f} | {1000 * small['latency_ms']:.1f} "
            f"| `python benchmarks/domains.py --again --only {name}` |"
        )
        for seed, run in entry["runs"].items():
            if whole(run):
                chosen.append(choice(entry, seed, run, better))
    told = kept["machine"]
    counted = [
        f"Of {len(gains)} sets `auto` gains at least half a point over plain training on "
        f"{sum(plain >= 0.5 for plain, _ in gains)}, is within half a point of it on "
        f"{sum(-0.5 < plain < 0.5 for plain, _ in gains)}, and is below it on "
        f"{sum(plain < 0 for plain, _ in gains)}; it is below the default loss on "
        f"{sum(default < 0 for _, default in gains)}. The int8 file is within half a point of the "
        f"student it was made from on {sum(abs(each) <= 0.5 for each in lost)}, more than that "
        f"below it on {sum(each < -0.5 for each in lost)} and above it on "
        f"{sum(each > 0.5 for each in lost)}.",
        "",
        f"Measured on {told['processor']}, {told['cores']} cores, beside other work, with "
        f"TensorFlow {told['tensorflow']} and Keras {told['keras']}; "
        f"{sum(_seconds(entry) for entry in kept['sets'].values()) / 60:.0f} minutes of processor "
        "time in all.",
    ]
    if outdated:
        counted += [
            "",
            f"\\* {' and '.join(outdated)}: from runs before the last change of `auto` and of the "
            "cut of the sets; all rows of the student were the teacher's, and had labels.",
        ]
    return "\n".join([*students, "", *counted, "", *files, "", *chosen])


def choice(entry, seed, run, better):
    """What was chosen with one seed: what it gained where it was chosen, and on the test rows."""
    auto, key = run["auto"], entry["key"]
    [row] = [row for row in auto["tried"] if row["method"] == auto["method"]]
    held = "" if row["gain"] is None else f"{100 * row['gain']:+.2f}"
    spent = f"{run['plain']['cpu_seconds']:.0f}, {auto['cpu_seconds']:.0f}"
    return (
        f"| {entry['title']} | {seed} | {auto['method']} | {held} "
        f"| {auto[key] - run[better][key]:+.2f} | {spent} |"
    )


def _seconds(entry):
    each = [run["cpu_seconds"] for ways in entry["runs"].values() for run in ways.values()]
    return entry["teacher"]["cpu_seconds"] + sum(each)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--only", help="names of sets, joined by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one seed; nothing is kept")
    parser.add_argument("--again", action="store_true", help="forget earlier results of the sets")
    parser.add_argument("--table", action="store_true", help="write docs/results.md and stop")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(DOMAINS)
    if unknown := set(names) - set(DOMAINS):
        parser.error(f"unknown sets: {sorted(unknown)}. There are {list(DOMAINS)}")
    kept = (None if arguments.quick else read(RESULTS)) or {"machine": machine(), "sets": {}}
    if not arguments.table:
        keep = (lambda kept: None) if arguments.quick else (lambda kept: save(RESULTS, kept))
        for name in names:
            if arguments.again:
                kept["sets"].pop(name, None)
            count = 1 if arguments.quick else arguments.seeds
            seeds = range(arguments.first_seed, arguments.first_seed + count)
            measure(name, arguments.data, seeds, kept, keep)
    body = tables(kept)
    print(body)
    if not arguments.quick:
        put("results.md", "results", body)


if __name__ == "__main__":
    main()
