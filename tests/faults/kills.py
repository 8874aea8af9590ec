"""Work that is killed at random points, and what must be there afterwards."""

import contextlib
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_kd as kd
import keras_kd.cache
import keras_kd.export
from keras_kd.cli import main as command_line
from keras_kd.export import manifest, scratch, staged_folder

DIGITS = Path(__file__).parents[2] / "exported" / "digits"

SCENARIOS = {"cache": 14, "training": 10, "placing": 12, "export": 8, "command": 6}
"""Of fifty kills."""


def chosen(count, rng):
    """Names of scenarios, as many as asked for, in their proportions."""
    names = [name for name, share in SCENARIOS.items() for _ in range(share)]
    picked = [names[i * len(names) // max(count, 1) % len(names)] for i in range(count)]
    rng.shuffle(picked)
    return picked


def signal_for(scenario, rng):
    """SIGKILL, or where a command clears up by itself, one of those that ask it to."""
    if scenario in ("command", "export"):
        return rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    return signal.SIGKILL


def prepare(scenario, folder):
    """What is there before the work begins."""
    if scenario in ("placing", "export", "command"):
        shutil.copytree(DIGITS, folder / "out")


def worked(folder, scenario):
    """Do the work, in this process."""
    return _WORK[scenario](folder)


def checked(folder, scenario, whole, number, code):
    """Look at what a kill left; gives what is wrong, as sentences."""
    (folder / "result.json").unlink(missing_ok=True)
    return list(_CHECKS[scenario](folder, Path(whole), number, code))


def small(width, name):
    inputs = keras.Input((6,), name="x")
    x = layers.Dense(width, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name=name)


def rows(count=44):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 6)).astype("float32"), rng.integers(0, 4, count)


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------ a cache


def write_cache(folder):
    keras.utils.set_random_seed(3)
    x, _ = rows(600)
    keras_kd.cache.write(
        small(9, "teacher"),
        x,
        folder / "cache",
        augment=lambda sample, seed: sample * (1 + seed % 5),
        epochs=2,
        batch_size=16,
        shard_size=40,
    )


def check_cache(folder, whole, number, code):
    write_cache(folder)
    keras_kd.cache.verify(folder / "cache")
    wanted, got = hashes(whole / "cache"), hashes(folder / "cache")
    for name in sorted(set(wanted) ^ set(got)):
        yield f"`{name}` is {'left over' if name in got else 'missing'}"
    for name in set(wanted) & set(got):
        if name.endswith(".bin") and wanted[name] != got[name]:
            yield f"`{name}` holds other bytes than without the kill"


# ------------------------------------------------------------------ a training


def train(folder):
    keras.utils.set_random_seed(11)
    x, y = rows()
    student = small(5, "student")
    distiller = kd.Distiller(student, small(9, "teacher"))
    distiller.compile(
        keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    distiller.fit(
        x,
        y,
        batch_size=4,
        epochs=6,
        verbose=0,
        callbacks=[
            kd.callbacks.ResumableBackup(folder / "backup", save_freq=3),
            kd.callbacks.StudentCheckpoint(
                folder / "best.keras", monitor="loss", save_best_only=False
            ),
        ],
    )
    np.savez(folder / "final.npz", *student.get_weights())


def check_training(folder, whole, number, code):
    if (folder / "best.keras").exists():
        keras.saving.load_model(folder / "best.keras")
    if not (folder / "final.npz").exists() or code != 0:
        train(folder)
    with np.load(whole / "final.npz") as wanted, np.load(folder / "final.npz") as got:
        if any(not np.array_equal(wanted[name], got[name]) for name in wanted.files):
            yield "the student ends up otherwise than without the kill"
    names = [
        {path.relative_to(place).as_posix() for path in place.rglob("*")} - {"log", "result.json"}
        for place in (whole, folder)
    ]
    for name in sorted(names[1] - names[0]):
        # While Keras saves, it has an empty folder for assets among what is temporary.
        if not name.startswith("tmp/tmp") or (folder / name).is_file():
            yield f"`{name}` is left over"


# ------------------------------------------------------------------ the folder of an export


def variant(folder, which):
    """Files of an export whose content tells which one it is, ready to be put in place."""
    content = manifest.read(DIGITS)
    content.pop("seal")
    rows = []
    for row in content["artifacts"]:
        name = f"digits_{row['precision']}{which % 3}.{row['format']}"
        (folder / name).write_bytes(f"{which}".encode())
        rows.append({**row, "file": name, "sha256": manifest.digest(folder / name)})
    (folder / "evaluation.npz").write_bytes(f"{which}".encode())
    content.update(artifacts=rows, best=rows[0]["file"])
    content["evaluation"]["sha256"] = manifest.digest(folder / "evaluation.npz")
    return content


def place_again_and_again(folder):
    for which in range(12):
        with staged_folder.staging(folder / "out") as stage:
            content = variant(stage, which)
            staged_folder.place(stage, folder / "out", content, overwrite=True)


def is_whole(folder):
    """The names that the manifest describes; raises if they do not belong together."""
    content = manifest.read(folder)
    manifest.check_files(folder, content)
    return set(staged_folder.first_names(content)) | {manifest.FILE}


def check_placing(folder, whole, number, code):
    named = is_whole(folder / "out")
    if "digits_int8.onnx" not in named:
        texts = {(folder / "out" / n).read_text() for n in named - {manifest.FILE}}
        if len(texts) > 1:
            yield f"files of {len(texts)} exports lie together"
    with staged_folder.staging(folder / "out") as stage:
        staged_folder.place(stage, folder / "out", variant(stage, 7), overwrite=True)
    named = is_whole(folder / "out")
    for name in sorted(set(os.listdir(folder / "out")) - named):
        yield f"`{name}` is left over in the folder"
    yield from _around(folder, {"out"})


def _around(folder, mine):
    for name in sorted(set(os.listdir(folder)) - {*mine, "log", "result.json", "tmp"}):
        yield f"`{name}` is left over beside the folder"


# ------------------------------------------------------------------ a whole export


def export(folder):
    keras.utils.set_random_seed(5)
    x, y = rows()
    keras_kd.export(
        small(5, "student"),
        folder / "out",
        "onnx",
        "float32",
        evaluation=(x, y),
        overwrite=True,
        name="new",
    )


def workers(folder):
    """Processes that still work for an export with its scratch in this folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
            here = f"TMPDIR={folder}/".encode() in (path.parent / "environ").read_bytes()
            if here and {"keras_kd.export.server", "keras_kd.export.worker"} & set(words):
                found |= {path.parent.name} if state != "Z" else set()
    return found


def run_on(folder, seconds=20):
    """Whether processes that work for an export do not end by themselves."""
    end = time.monotonic() + seconds
    while workers(folder) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(workers(folder))


def check_export(folder, whole, number, code):
    if run_on(folder):
        yield "a worker runs on"
    named = is_whole(folder / "out")
    if named - {"evaluation.npz", manifest.FILE} not in (
        {"digits_int8.onnx", "digits_int8.tflite"},
        {"new_float32.onnx"},
    ):
        # A new export that was killed after it had taken the old one's place.
        marks = [name for name in named if name.startswith("new_float32.")]
        if len(marks) != 1:
            yield f"neither export is there: {sorted(named)}"
    if number != signal.SIGKILL and code not in (0, -number):
        # It has cleared up by itself.
        yield from _around(folder, {"out", "model.keras", "data.npz"})
        for name in os.listdir(folder / "tmp"):
            yield f"`{name}` is left over in the folder for what is temporary"
    # What a killed one could not clear goes with the next one.
    with staged_folder.staging(folder / "out"), scratch.held_folder(folder / "tmp", "keras-kd-"):
        pass
    yield from _around(folder, {"out", "model.keras", "data.npz"})
    for name in os.listdir(folder / "tmp"):
        if name.startswith("keras-kd-"):
            yield f"`{name}` is left over in the folder for what is temporary"


def command(folder):
    keras.utils.set_random_seed(5)
    x, y = rows()
    small(5, "student").save(folder / "model.keras")
    np.savez(folder / "data.npz", x=x, y=y)
    arguments = ["export", folder / "model.keras", "--evaluation", folder / "data.npz"]
    arguments += ["--formats", "onnx", "--precisions", "float32", "--name", "new", "--overwrite"]
    code = command_line([str(word) for word in (*arguments, "--out", folder / "out", "--quiet")])
    if code:
        raise SystemExit(code)


_WORK = {
    "cache": write_cache,
    "training": train,
    "placing": place_again_and_again,
    "export": export,
    "command": command,
}
_CHECKS = {
    "cache": check_cache,
    "training": check_training,
    "placing": check_placing,
    "export": check_export,
    "command": check_export,
}
