"""The search beside random search, beside the defaults, and beside an earlier build's export.

    python benchmarks/search.py --dataset digits --trials 24
    python benchmarks/search.py --dataset fashion_mnist --trials 16
    python benchmarks/search.py --dataset fsdd --trials 16
    python benchmarks/search.py --table          # the table in docs/search.md, from the results
    git worktree add --detach ../before b7b2450
    python benchmarks/search.py --rate --against ../before

First part, for each seed: `tune` with Optuna's TPE and with values drawn at random, for equally
many minutes (or `--trials`), within 20 KB and 5 ms, minimizing error and bytes. What is reported is
the accuracy of the int8 files on the test samples, which chose nothing, mean over the seeds of the
last trainings: of what the search keeps; of the winner; of the defaults and of plain training in
the size and at the learning rate of the winner. Beside the first search, in the size of its winner,
what `keras-kd distill` gives as it comes (default distillation, Adam at 0.001, cosine): with the
epochs of a last training, mean of three seeds, and once with as many epochs as the search trained
in all, the last trainings among them. And the hypervolume of the front (validation error below 1,
size below the limit), for which random search needs no last trainings. Studies lie in
`runs/benchmarks`, so that a benchmark that was stopped goes on.

`--rate`: how many candidates are judged a minute. This build searches; the other one does what can
be done with it: weigh the untrained file of each size, train what is within the budget, export it,
run it. Both judge the same candidates in the same order; importing and the teacher count for
nothing.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve()
LIMITS = {"bytes": 20_000, "latency_ms": 5.0}
ROWS = {"digits": None, "fashion_mnist": 6000, "fsdd": None}
EPOCHS = {"digits": 20, "fashion_mnist": 8, "fsdd": 12}
TEACHER_EPOCHS = {"digits": 30, "fashion_mnist": 12, "fsdd": 20}
GOAL = 4.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=ROWS, default="digits")
    parser.add_argument("--folder", type=pathlib.Path, default="../shared/data")
    parser.add_argument("--minutes", type=float, help="of each search")
    parser.add_argument("--trials", type=int, help="of each search, in place of --minutes")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", action="store_true")
    parser.add_argument(
        "--against", type=pathlib.Path, help="checkout of the build to compare with"
    )
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small, and nothing is written")
    parser.add_argument("--sampler", choices=("tpe", "random"), help="one of both")
    parser.add_argument("--table", action="store_true", help="write docs/search.md and stop")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return judge(arguments.child[0], pathlib.Path(arguments.child[1]))
    if arguments.table:
        return table()
    if arguments.rate:
        if arguments.against is None:
            parser.error("--rate needs --against, the checkout to compare with")
        return rate(arguments)
    if (arguments.minutes is None) == (arguments.trials is None):
        parser.error("give one of --minutes and --trials")
    return quality(arguments)


# ---------------------------------------------------------------------- quality


def load(name, folder):
    """Training, validation and test rows."""
    if name == "digits":
        import keras_kd as kd

        d = kd.datasets.load("digits")
        return (
            (d.x_train, d.y_train),
            (d.x_validation, d.y_validation),
            (d.x_test, d.y_test),
        )
    from shared_data import load as shared

    x, y, u, v = shared(name, folder, ROWS[name])
    held = max(200, len(x) // 6)
    return (x[held:], y[held:]), (x[:held], y[:held]), (u, v)


def make_teacher(train, name):
    import keras

    x, y = train
    keras.utils.set_random_seed(0)
    z = inputs = keras.Input(x.shape[1:], name="x")
    for i, width in enumerate((24, 32, 48)):
        if i:
            z = keras.layers.MaxPooling2D(2, padding="same")(z)
        z = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(z)
        z = keras.layers.BatchNormalization(momentum=0.9, name=f"norm{i}")(z)
        z = keras.layers.ReLU(name=f"relu{i}")(z)
    z = keras.layers.GlobalAveragePooling2D(name="pool")(z)
    teacher = keras.Model(inputs, keras.layers.Dense(10, name="logits")(z), name="teacher")
    # At a rate that stays high the statistics of the normalization lag behind the weights.
    rate = keras.optimizers.schedules.CosineDecay(1e-2, TEACHER_EPOCHS[name] * -(-len(x) // 64))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    teacher.compile(keras.optimizers.Adam(rate), loss)
    teacher.fit(x, y, epochs=TEACHER_EPOCHS[name], batch_size=64, verbose=0)
    return teacher


def quality(arguments):
    import keras
    import records
    from side_by_side import machine

    import keras_kd as kd

    name = arguments.dataset
    train, validation, test = load(name, arguments.folder)
    place = HERE.parents[1] / "runs" / "benchmarks" / f"search-{name}"
    place.mkdir(parents=True, exist_ok=True)
    path = place / "teacher.keras"
    if not path.exists():
        make_teacher(train, name).save(path)
    teacher = keras.saving.load_model(path)
    about = {
        "dataset": name,
        "rows": len(train[0]),
        "teacher": accuracy(teacher.predict(test[0], verbose=0), test[1]),
        "minutes": arguments.minutes,
        "trials": arguments.trials,
        "epochs": arguments.epochs or EPOCHS[name],
        "limits": LIMITS,
    }
    found = records.read(f"search_{name}") or {}
    known = found["runs"] if about.items() <= found.items() else []
    found = {**about, "machine": machine(), "runs": list(known)}
    samplers = ("tpe", "random") if arguments.sampler is None else (arguments.sampler,)
    for seed, sampler in itertools.product(range(arguments.seeds), samplers):
        if any((r["seed"], r["sampler"]) == (seed, sampler) for r in known):
            continue
        study = kd.search.tune(
            "shrink",
            teacher,
            train,
            validation,
            space=space(),
            minimize=("error", "bytes"),
            budget=kd.search.Budget(arguments.minutes, trials=arguments.trials, **LIMITS),
            folder=place / f"{sampler}-{seed}-{arguments.minutes or arguments.trials}",
            epochs=about["epochs"],
            seeds=3 if sampler == "tpe" else 2,
            final_epochs=None if sampler == "tpe" else 1,
            seed=seed,
            sampler=sampler,
        )
        said = row(study, sampler, seed)
        if sampler == "tpe":
            own, each = of_finals(study, test), about["epochs"]
            said["test"] = own | untuned(
                study, said["values"], teacher, train, validation, test, each
            )
        found["runs"].append(said)
        print(json.dumps(said), flush=True)
        if not arguments.quick:
            records.save(f"search_{name}", found)


def space():
    import keras_kd as kd

    return {
        "method": ["default", "standardized", "DIST"],
        "temperature": kd.search.Log(1, 10),
        "alpha": kd.search.Float(0, 1),
        "learning_rate": kd.search.Log(1e-3, 2e-2),
        "width": [0.25, 0.375, 0.5, 0.75, 1.0],
    }


def of_finals(study, test):
    """Accuracy on the test rows of the files of the last trainings, by role."""
    from keras_kd.export import load as load_file

    scores = {}
    for path in sorted((study.folder / "finals").glob("*/*.tflite")):
        role = path.stem.split("-")[0]
        scores.setdefault(role, []).append(accuracy(load_file(path)(test[0]), test[1]))
    return {role: float(np.mean(values)) for role, values in scores.items()}


def row(study, sampler, seed):
    """What is kept of a search: its trials and its front."""
    winner = json.loads((study.folder / "result.json").read_text())
    rows = study.rows()
    return {
        "sampler": sampler,
        "seed": seed,
        "trials": len(rows),
        "states": {
            state: sum(r["state"] == state for r in rows) for state in {r["state"] for r in rows}
        },
        "verdict": study.verdict,
        "kept": winner["kept"],
        "values": winner["values"],
        "bytes": None if study.best is None else study.best["bytes"],
        "hypervolume": hypervolume(
            [(r["error"], r["bytes"] / LIMITS["bytes"]) for r in study.front]
        ),
    }


def untuned(study, values, teacher, train, validation, test, epochs):
    """Accuracy of the int8 files that `keras-kd distill` makes as it comes, in the winner's size.

    Once with the epochs of a last training, and once with as many as the search trained in all.
    """
    import keras

    import keras_kd as kd
    from keras_kd.search import candidate, task

    rows = study.rows()
    trained = [r.get("epochs") or epochs for r in rows if r["state"] in ("done", "stopped")]
    last = study.best["epochs"]
    in_all = sum(trained) + 9 * last
    as_it_comes = {**values, "method": "default", "alpha": 0.5, "temperature": 1.0}
    as_it_comes["learning_rate"] = 1e-3

    def score(given, count, seed):
        trainer = candidate.Trainer(
            build="shrink",
            model=teacher,
            answers=kd.teachers.CachedTeacher(study.folder / "answers"),
            train=task.rows_of(train, "train"),
            validation=task.rows_of(validation, "validation"),
            hard=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            epochs=count,
            batch_size=32,
            verbose=0,
            callbacks=None,
        )
        return of_file(trainer.trained(given, seed)[0], train[0], test)

    return {
        "untuned": float(np.mean([score(as_it_comes, last, seed) for seed in (1, 2, 3)])),
        "untuned, all epochs": score(as_it_comes, in_all, 1),
        "epochs in all": in_all,
    }


def of_file(student, calibration, test):
    """Test accuracy of the int8 file of a student."""
    import keras_kd as kd
    from keras_kd.export import load as load_file

    with tempfile.TemporaryDirectory() as folder:
        kd.export(
            student,
            folder,
            formats=("tflite",),
            precisions=("int8",),
            calibration=calibration,
            max_drop=None,
            mixed=False,
            overwrite=True,
        )
        (path,) = pathlib.Path(folder).glob("*.tflite")
        return accuracy(load_file(path)(test[0]), test[1])


def table():
    """Write the table of docs/search.md."""
    import records

    columns = {
        "kept": "what the search gives",
        "winner": "its winner",
        "defaults": "defaults at its learning rate",
        "plain": "plain at its learning rate",
        "untuned": "not searched",
        "untuned, all epochs": "not searched, all the epochs",
    }
    more = ["over not searched", "over all the epochs", "bytes", "hypervolume", "of random search"]
    named = ["set", "teacher", *columns.values(), *more]
    lines = [f"| {' | '.join(named)} |", f"|{'---|' * len(named)}"]
    for name in ROWS:
        found = records.read(f"search_{name}")
        if found is None:
            continue
        runs = [r for r in found["runs"] if r["sampler"] == "tpe"]
        drawn = [r for r in found["runs"] if r["sampler"] == "random"]
        tests = [{"kept": r["test"][r["kept"]], **r["test"]} for r in runs]
        scores = {key: [100 * t[key] for t in tests] for key in columns}
        cells = [name, f"{100 * found['teacher']:.1f}", *map(records.spread, scores.values())]
        for other in ("untuned", "untuned, all epochs"):
            cells.append(records.spread(np.subtract(scores["kept"], scores[other])))
        cells.append(records.spread([r["bytes"] for r in runs], 0))
        cells += [records.spread([r["hypervolume"] for r in each], 4) for each in (runs, drawn)]
        lines.append(f"| {' | '.join(cells)} |")
    records.put("search.md", "searched", "\n".join(lines))


def hypervolume(points):
    """Area that points dominate below (1, 1), both coordinates to be small."""
    area, least = 0.0, 1.0
    for error, size in sorted(points):
        if error < 1 and size < least:
            area += (1 - error) * (least - size)
            least = size
    return area


def accuracy(answers, labels):
    return float(np.mean(np.asarray(answers).argmax(-1) == labels))


# ------------------------------------------------------------------------- rate


def rate(arguments):
    from side_by_side import Seconds, begin, middle, over, save

    started = begin()
    count = 4 if arguments.quick else arguments.candidates
    builds = {"this build": HERE.parents[1], "before": arguments.against.resolve()}
    seconds = {build: [] for build in builds}
    judged = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        train, validation, _ = load("digits", None)
        teacher = make_teacher(train, "digits")
        teacher.save(folder / "teacher.keras")
        np.savez(folder / "data.npz", x=train[0], y=train[1], u=validation[0], v=validation[1])
        for turn in range(1 if arguments.quick else arguments.repeats):
            for build, checkout in builds.items():
                out = subprocess.run(
                    [sys.executable, str(HERE), "--child", build, str(folder)],
                    env={
                        **os.environ,
                        "PYTHONPATH": str(checkout),
                        "KERAS_BACKEND": "tensorflow",
                        "TF_CPP_MIN_LOG_LEVEL": "3",
                        "CANDIDATES": str(count),
                        "EPOCHS": str(arguments.epochs or 6),
                        "TURN": str(turn),
                    },
                    stdout=subprocess.PIPE,
                    check=True,
                    text=True,
                ).stdout
                said = json.loads(out.strip().splitlines()[-1])
                seconds[build].append(Seconds(said["clock"], said["processor"]))
                judged[build] = said
    ours, theirs = (middle(seconds[build]) for build in builds)
    faster = over(theirs, ours, goal=None, note=f"goal: at least {GOAL:g}")
    save(
        "search",
        started,
        ratios={"candidates a minute, this build / build before": faster},
        tables=[
            {
                "columns": ["", "candidates a minute", "of processor time", "trained", "exports"],
                "rows": [
                    [
                        build,
                        60 * count / float(each),
                        60 * count / each.processor,
                        judged[build]["trained"],
                        judged[build]["exports"],
                    ]
                    for build, each in (("this build", ours), ("before", theirs))
                ],
            }
        ],
        notes=[f"{count} candidates, digits, {arguments.epochs or 6} epochs."],
        quick=arguments.quick,
    )


def proposals(count):
    """The same candidates for both builds: half of the sizes are beyond the budget."""
    generator = np.random.default_rng(3)
    return [
        {
            "method": "default",
            "temperature": float(generator.uniform(1, 8)),
            "alpha": float(generator.uniform(0, 1)),
            "learning_rate": 5e-3,
            "width": float(generator.choice([0.25, 0.375, 0.5, 0.75, 1.0])),
            "depth": 1.0,
            "precision": "int8",
        }
        for _ in range(count)
    ]


def judge(build, folder):
    """Judge the candidates by one build; print seconds."""
    sys.path.insert(0, str(HERE.parent))
    import keras
    from export import processor

    import keras_kd as kd

    with np.load(folder / "data.npz") as arrays:
        data = {name: arrays[name] for name in arrays.files}
    teacher = keras.saving.load_model(folder / "teacher.keras")
    answers = folder / f"answers-{build.replace(' ', '-')}"
    kd.cache.write(teacher, data["x"], answers, dtype="float32")
    values = proposals(int(os.environ["CANDIDATES"]))
    keras.ops.zeros(())
    began, spent = time.perf_counter(), processor()
    run = ours if build == "this build" else theirs
    said = run(teacher, data, answers, values, folder / f"{build}-{os.environ['TURN']}")
    said |= {"clock": time.perf_counter() - began, "processor": processor() - spent}
    print(json.dumps(said))


def ours(teacher, data, answers, values, folder):
    """The trials of `tune`, with proposals that are given."""
    import keras_kd as kd
    from keras_kd.search import candidate, files, journal, tuner

    counts = {"trained": 0, "exports": 0}
    count_calls(candidate.Trainer, "trained", counts, "trained")
    count_calls(files.Exporter, "export", counts, "exports")
    search = tuner.Search(
        build="shrink",
        teacher=teacher,
        train=(data["x"], data["y"]),
        validation=(data["u"], data["v"]),
        space=space(),
        minimize=("error", "bytes"),
        device=None,
        budget=kd.search.Budget(None, trials=len(values), **LIMITS),
        folder=folder,
        epochs=int(os.environ["EPOCHS"]),
        verbose=0,
        answers=answers,
    )
    search.work_on(values)
    assert len(journal.read(folder, search.about)) == len(values)
    return counts


def theirs(teacher, data, answers, values, folder):
    """The same with a build that has no search: weigh each size, train what fits, export it."""
    import keras

    import keras_kd as kd

    counts = {"trained": 0, "exports": 0}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    epochs = int(os.environ["EPOCHS"])
    steps = epochs * -(-len(data["x"]) // 32)

    def exported(student, name):
        counts["exports"] += 1
        report = kd.export(
            student,
            folder / name,
            formats=("tflite",),
            precisions=("int8",),
            calibration=data["x"],
            evaluation=(data["u"], data["v"]),
            max_drop=None,
            mixed=False,
        )
        return report.artifacts[0]

    weighed = {}
    for i, each in enumerate(values):
        keras.utils.set_random_seed(0)
        student = kd.students.shrink(teacher, each["width"], name="student")
        if each["width"] not in weighed:
            weighed[each["width"]] = exported(student, f"untrained-{i}")
        file = weighed[each["width"]]
        if file.bytes > LIMITS["bytes"] or (file.latency_ms or 0) > LIMITS["latency_ms"]:
            continue
        distiller = kd.Distiller(student, kd.teachers.CachedTeacher(answers))
        schedule = keras.optimizers.schedules.CosineDecay(each["learning_rate"], steps)
        distiller.compile(
            keras.optimizers.Adam(schedule),
            loss=loss,
            alpha=each["alpha"],
            temperature=each["temperature"],
        )
        distiller.fit(data["x"], data["y"], batch_size=32, epochs=epochs, verbose=0)
        counts["trained"] += 1
        exported(student, f"trained-{i}")
    return counts


def count_calls(owner, name, counts, key):
    given = getattr(owner, name)

    def counted(self, *args, **options):
        counts[key] += 1
        return given(self, *args, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    main()
