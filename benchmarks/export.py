"""What an export costs, the first one of a program and later ones, beside an earlier build.

    git worktree add --detach ../before b7b2450
    python benchmarks/export.py --against ../before [--repeats 3] [--later 3] [--quick]
    python benchmarks/export.py --against ../before --only verify

A student of the size of the demo's goes to its eight files, again and again in one program, by
this build and by the one in the other checkout; programs of the two take turns. Importing Keras and
loading the student count for nothing. Then `keras-kd verify exported/digits` of each checkout.
Processor time is that of the program and of all processes that it started.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve()
GOALS = {"first": 0.6, "later": 0.3, "verify": 0.5}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--against", type=pathlib.Path, help="checkout of the build to compare with"
    )
    parser.add_argument("--repeats", type=int, default=3, help="programs of each build")
    parser.add_argument("--later", type=int, default=3, help="exports after the first, a program")
    parser.add_argument("--only", default="exports,verify", help="parts, separated by commas")
    parser.add_argument("--verifications", type=int, default=7, help="runs of `verify` of each")
    parser.add_argument("--quick", action="store_true", help="one repeat, nothing is written")
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return program(arguments.child, arguments.later)
    if arguments.against is None:
        parser.error("--against is needed: the checkout to compare with")
    return compare(arguments)


def compare(arguments):
    from records import read
    from side_by_side import begin, middle, over, save

    started = begin()
    parts = arguments.only.split(",")
    if arguments.quick:
        arguments.repeats, arguments.later, arguments.verifications = 1, 1, 2
    builds = {"this build": HERE.parents[1], "before": arguments.against.resolve()}
    times = {build: {part: [] for part in ("first", "later", "verify")} for build in builds}
    files, firsts = {}, {build: [] for build in builds}
    with tempfile.TemporaryDirectory() as temporary:
        if "exports" in parts:
            make_student(pathlib.Path(temporary))
        for _ in range(arguments.repeats if "exports" in parts else 0):
            for build, checkout in builds.items():
                found = run_program(checkout, pathlib.Path(temporary), arguments.later)
                exports = [seconds(each) for each in found["exports"]]
                times[build]["first"].append(exports[0])
                times[build]["later"] += exports[1:]
                firsts[build].append(found["exports"][0]["first file"])
                files[build] = found["files"]
        # The first run of each writes its bytecode.
        for turn in range(1 + arguments.verifications if "verify" in parts else 0):
            for build, checkout in builds.items():
                found = verify(checkout)
                times[build]["verify"] += [found] if turn else []
    medians = {
        build: {part: middle(values) for part, values in parts.items() if values}
        for build, parts in times.items()
    }
    ours, theirs = medians["this build"], medians["before"]
    what = {
        "first": "first export of a program / build before",
        "later": "a later one in the same program / build before",
        "verify": "keras-kd verify exported/digits / build before",
    }
    rows = [
        [what[part].split(" /")[0], *cells(ours[part]), *cells(theirs[part])]
        for part in what
        if part in ours
    ]
    ratios = {
        what[part]: over(ours[part], theirs[part], goal=GOALS[part])
        for part in what
        if part in ours
    }
    notes = [
        f"{build}: {files[build]['made']} files, {files[build]['same']} of them byte for byte "
        f"the same in the later exports; the first after {middle(firsts[build]):.1f} s."
        for build in builds
        if build in files
    ]
    before = read("performance_export")
    if before is not None and not arguments.quick:
        # What is left out keeps what was measured of it.
        ratios = {name: ratios.get(name, row) for name, row in before["ratios"].items()} | ratios
        known = {row[0] for row in rows}
        rows = [*(row for row in before["tables"][0]["rows"] if row[0] not in known), *rows]
        notes = notes or before["notes"]
    save(
        "export",
        started,
        ratios=ratios,
        tables=[
            {
                "columns": [
                    *("", "s, this build", "processor s, this build"),
                    *("s, before", "processor s, before"),
                ],
                "rows": rows,
            }
        ],
        notes=notes,
        quick=arguments.quick,
    )


def cells(value):
    return [float(value), value.processor]


def seconds(row):
    from side_by_side import Seconds

    return Seconds(row["clock"], row["processor"])


def make_student(folder):
    """Train a student of the size of the demo's, and save it with its data."""
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import load_digits

    keras.utils.set_random_seed(0)
    source = load_digits()
    x = (source.images[..., None] / 16).astype("float32")
    y = source.target
    parts = [keras.Input((8, 8, 1), name="image")]
    for i, width in enumerate((6, 8, 12)):
        parts += [
            layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}"),
            layers.BatchNormalization(momentum=0.9, name=f"norm{i}"),
            layers.ReLU(name=f"relu{i}"),
        ]
    parts += [layers.GlobalAveragePooling2D(name="pool"), layers.Dense(10, name="logits")]
    student = keras.Sequential(parts, name="student")
    student.compile(
        keras.optimizers.Adam(5e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    student.fit(x[:1365], y[:1365], epochs=8, batch_size=32, verbose=0)
    student.save(folder / "student.keras")
    np.savez(folder / "data.npz", x=x, y=y)


def run_program(checkout, folder, later):
    out = subprocess.run(
        [sys.executable, str(HERE), "--child", str(folder), "--later", str(later)],
        env={**environment(checkout), "KERAS_BACKEND": "tensorflow"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return json.loads(out.strip().splitlines()[-1])


def environment(checkout):
    found = {**os.environ, "PYTHONPATH": str(checkout), "TF_CPP_MIN_LOG_LEVEL": "3"}
    # Installed packages have their bytecode.
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    return found


def program(folder, later):
    """Export again and again; print the seconds of each."""
    import keras
    import numpy as np

    import keras_kd.export

    with np.load(folder / "data.npz") as arrays:
        x, y = arrays["x"], arrays["y"]
    student = keras.saving.load_model(folder / "student.keras")
    student.predict(x[:8], verbose=0)
    found, blobs = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(1 + later):
            first = []

            def told(stage, done, total, first=first):
                if stage == "convert" and done and not first:
                    first.append(time.perf_counter())

            began, spent = time.perf_counter(), processor()
            report = keras_kd.export(
                student,
                pathlib.Path(temporary) / str(i),
                calibration=x[:1365],
                evaluation=(x[1365:1581], y[1365:1581]),
                labels=[str(digit) for digit in range(10)],
                progress=told,
            )
            found.append(
                {
                    "clock": time.perf_counter() - began,
                    "processor": processor() - spent,
                    "first file": first[0] - began if first else None,
                }
            )
            names = [artifact.file for artifact in report.artifacts if artifact.file]
            blobs.append(
                {name: (pathlib.Path(temporary) / str(i) / name).read_bytes() for name in names}
            )
    same = sum(all(each.get(name) == blob for each in blobs[1:]) for name, blob in blobs[0].items())
    print(json.dumps({"exports": found, "files": {"made": len(blobs[0]), "same": same}}))


def processor():
    """Seconds of processor time of this process and of all that it started, ended or not."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        spent = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        parents[int(path.parent.name)] = int(fields[1]), spent
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above][0]
        if above == os.getpid() != pid:
            total += parents[pid][1]
    return total


def verify(checkout):
    from side_by_side import Seconds

    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "keras_kd", "verify", "exported/digits", "--quiet"],
        cwd=checkout,
        env=environment(checkout),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(time.perf_counter() - began, spent)


if __name__ == "__main__":
    main()
