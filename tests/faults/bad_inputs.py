"""Bad inputs to every part of the package, each made from a seed, and how they are refused."""

import contextlib
import io
import json
import os
import random
import shutil
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
from kills import DIGITS, hashes, rows, small

import keras_kd as kd
import keras_kd.cache
import keras_kd.export
from keras_kd import datasets
from keras_kd.cli import main as command_line
from keras_kd.export import manifest

REFUSALS = (ValueError, TypeError, OSError, ImportError, ArithmeticError)
"""What an error of the caller's may be; anything else is a mistake of the package."""

LONGEST = 2000
"""Characters of a message: more is somebody else's page of text."""

FAMILIES = {}


def bad(function):
    """Register a maker: `maker(folder, rng)` gives a call that must be refused."""
    family = function.__name__.partition("_")[0]
    FAMILIES.setdefault(family, {})[function.__name__] = function
    return function


def chosen(count, rng):
    """Family, name and seed of as many inputs, all families alike, all of a family in turn."""
    for i in range(count):
        family = sorted(FAMILIES)[i % len(FAMILIES)]
        makers = sorted(FAMILIES[family])
        turn = i // len(FAMILIES)
        yield family, makers[turn % len(makers)], rng.randrange(1 << 30)


def tried(folder, family, name, seed):
    """Try one input; gives what is wrong with how it was taken, as sentences."""
    rng = random.Random(seed)
    keras.utils.set_random_seed(seed % 1000)
    place = folder / "work"
    place.mkdir()
    call = FAMILIES[family][name](place, rng)
    before, processes = hashes(place), set(_children())
    began = time.monotonic()
    problems = []
    try:
        if family == "command":
            problems += _refused_by_command(call)
        else:
            call()
            problems.append("it was taken without an error")
    except REFUSALS as error:
        text = str(error)
        if not text.strip():
            problems.append(f"{type(error).__name__} says nothing")
        if len(text) > LONGEST or "Traceback" in text:
            problems.append(f"{type(error).__name__} of {len(text)} characters: {text[:200]!r}")
        if type(error).__module__.split(".")[0] not in ("builtins", "keras_kd", "zipfile"):
            problems.append(f"{type(error).__module__}.{type(error).__name__}: {text[:200]!r}")
    except BaseException as error:
        problems.append(f"{type(error).__name__}: {str(error)[:300]!r}")
    seconds = time.monotonic() - began
    if seconds > 60:
        problems.append(f"it took {seconds:.0f} s to be refused")
    after = hashes(place)
    if after != before:
        changed = sorted(set(after.items()) ^ set(before.items()))
        problems.append(f"files were changed: {sorted({name for name, _ in changed})}")
    if any(_works(child) for child in set(_children()) - processes):
        problems.append("a process is left at work")
    return problems


def _works(process):
    """Whether a process is more than the one that waits for the next export of this program."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
        # A command's is a fork of the command itself. Jobs are forks of the one that waits.
        own = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")
        waits = "keras_kd.export.server" in words or words == own
        return not waits or any(_children(int(process)))
    return False


def _children(parent=None):
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == (parent or os.getpid()) and fields[0] != "Z":
                words = (path.parent / "cmdline").read_text(errors="replace")
                # What Python itself starts for its own use lives as long as it does.
                if "multiprocessing" not in words:
                    yield path.parent.name


def _refused_by_command(arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line([str(word) for word in arguments])
    lines = [line for line in err.getvalue().splitlines() if line.startswith("keras-kd: ")]
    if code != 2:
        yield f"exit code {code} of {[str(word)[-40:] for word in arguments]}"
    if out.getvalue():
        yield f"stdout says {out.getvalue()[:100]!r}"
    if len(lines) != 1:
        yield f"stderr says {err.getvalue()[:300]!r}"
    if any(not letter.isprintable() for letter in "".join(lines)):
        yield f"stderr holds control characters: {lines!r}"


# ------------------------------------------------------------------ training


def _fit(data, teacher=None, options=None, fitting=None, student=None, settings=None):
    def call():
        own = student or small(5, "student")
        before = own.get_weights()
        distiller = kd.Distiller(own, teacher or small(9, "teacher"), **(settings or {}))
        distiller.compile(
            **{
                "optimizer": keras.optimizers.SGD(0.1),
                "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                **(options or {}),
            }
        )
        try:
            distiller.fit(*data, **{"epochs": 2, "batch_size": 8, "verbose": 0, **(fitting or {})})
        except BaseException:
            if any(not np.array_equal(a, b) for a, b in zip(before, own.get_weights())):
                raise AssertionError("the student was changed before the refusal") from None
            raise

    return call


def _spoiled(rng, array, values):
    array = np.array(array)
    array.reshape(-1)[rng.randrange(array.size)] = rng.choice(values)
    return array


@bad
def training_inputs_not_finite(folder, rng):
    x, y = rows()
    return _fit((_spoiled(rng, x, [np.nan, np.inf, -np.inf]), y))


@bad
def training_inputs_of_another_width(folder, rng):
    x, y = rows()
    return _fit((x[:, : rng.randint(1, 5)], y))


@bad
def training_lengths_that_differ(folder, rng):
    x, y = rows()
    return _fit((x, y[: rng.randint(1, 40)]))


@bad
def training_labels_out_of_range(folder, rng):
    x, y = rows()
    return _fit((x, _spoiled(rng, y, [-1, 4, 7, 2**31 - 1])))


@bad
def training_labels_that_wrap(folder, rng):
    x, y = rows()
    return _fit((x, _spoiled(rng, y.astype("int64"), [2**32, 2**32 + 1, -(2**32) + 2])))


@bad
def training_labels_that_are_no_integers(folder, rng):
    x, y = rows()
    return _fit((x, rng.choice([y + 0.5, y.astype(str), y.astype(object), y * np.nan])))


@bad
def training_inputs_that_are_no_numbers(folder, rng):
    x, y = rows()
    return _fit((rng.choice([x.astype(str), x.astype(object)]), y))


@bad
def training_without_samples(folder, rng):
    x, y = rows()
    return _fit(rng.choice([(x[:0], y[:0]), (iter(()),)]))


@bad
def training_validation_that_does_not_fit(folder, rng):
    x, y = rows()
    other = rng.choice([(x[:, :3], y), (x, y + 4), (x, y[:3]), (x * np.nan, y)])
    return _fit((x, y), fitting={"validation_data": other})


@bad
def training_weights_that_do_not_fit(folder, rng):
    x, y = rows()
    weights = rng.choice([np.ones(3), np.full(44, np.nan), np.ones((44, 3))])
    return _fit((x, y), fitting={"sample_weight": weights})


@bad
def training_class_weights(folder, rng):
    x, y = rows()
    weight = {**dict.fromkeys(range(4), 1.0), rng.randrange(4): rng.choice([np.nan, np.inf])}
    return _fit((x, y), fitting={"class_weight": weight})


@bad
def training_teacher_of_other_classes(folder, rng):
    inputs = keras.Input((6,))
    teacher = keras.Model(inputs, keras.layers.Dense(rng.choice([2, 3, 5, 9]))(inputs))
    return _fit(rows(), teacher=teacher)


@bad
def training_teacher_that_diverged(folder, rng):
    teacher = small(9, "teacher")
    teacher.set_weights([_spoiled(rng, w, [np.nan]) for w in teacher.get_weights()])
    return _fit(rows(), teacher=teacher)


@bad
def training_alpha(folder, rng):
    return _fit(rows(), options={"alpha": rng.choice([-0.1, 1.5, np.nan, np.inf, "half", [0.5]])})


@bad
def training_temperature(folder, rng):
    value = rng.choice([0, -1.0, np.nan, np.inf, "hot"])
    return lambda: kd.losses.SoftTargets(temperature=value)


@bad
def training_unknown_loss(folder, rng):
    name = rng.choice(["soft_target", "SoftTarget", "kl_divergenz", 3, object()])
    return _fit(rows(), options={"distillation_loss": name})


@bad
def training_data_of_tf_with_wild_labels(folder, rng):
    import tensorflow as tf

    x, y = rows()
    y = rng.choice([y + 4, y - 9, y.astype(str)])
    return _fit((tf.data.Dataset.from_tensor_slices((x, y)).batch(8),))


@bad
def training_backups(folder, rng):
    value = rng.choice([0, -3, 1.5, "batch", None, True])
    return lambda: kd.callbacks.ResumableBackup(folder / "backup", save_freq=value)


@bad
def training_damaged_backup(folder, rng):
    (folder / "backup").mkdir()
    (folder / "backup" / "state.npz").write_bytes(rng.randbytes(rng.randint(0, 400)))
    backup = kd.callbacks.ResumableBackup(folder / "backup", save_freq=2)
    return _fit(rows(), fitting={"callbacks": [backup]})


@bad
def training_checkpoints(folder, rng):
    (folder / "taken").write_text("mine")
    name = rng.choice(["taken/best.keras", "best.h5", "best"])
    return _fit(
        rows(),
        fitting={"callbacks": [_made(lambda: kd.callbacks.StudentCheckpoint(folder / name))]},
    )


def _made(maker):
    # Some are refused when they are made, which is as good.
    class Lazy(keras.callbacks.Callback):
        def set_model(self, model):
            self.inner = maker()
            self.inner.set_model(model)

        def on_train_begin(self, logs=None):
            self.inner.on_train_begin(logs)

        def on_epoch_end(self, epoch, logs=None):
            self.inner.on_epoch_end(epoch, {"val_loss": 1.0, **(logs or {})})

    return Lazy()


@bad
def training_annealing(folder, rng):
    given = rng.choice(
        [
            {"start": -1.0, "end": 1.0, "epochs": 3},
            {"start": 4.0, "end": 1.0, "epochs": 0},
            {"start": 4.0, "end": np.nan, "epochs": 3},
            {"start": 4.0, "end": 1.0},
            {"start": 4.0, "end": 1.0, "epochs": 3, "kind": "cubic"},
        ]
    )
    return lambda: kd.callbacks.TemperatureAnnealing(**given)


# ------------------------------------------------------------------ caches


def _cache(folder):
    x, _ = rows()
    keras.utils.set_random_seed(3)
    teacher = small(9, "teacher")
    keras_kd.cache.write(teacher, x, folder / "cache", shard_size=11)
    return teacher, x


@bad
def cache_settings(folder, rng):
    given = rng.choice(
        [
            *({"dtype": "float8"}, {"dtype": 3}, {"top_k": 0}, {"top_k": -2}, {"top_k": 99}),
            *({"taps": ["hiden"]}, {"shard_size": 0}, {"batch_size": -1}, {"epochs": 0}),
            *({"epochs": 2}, {"augment": 3}, {"process_index": 2}, {"seed": -1}),
            {"teacher_precision": "float12"},
        ]
    )
    x, _ = rows()
    return lambda: keras_kd.cache.write(small(9, "teacher"), x, folder / "cache", **given)


@bad
def cache_of_data_that_do_not_fit(folder, rng):
    x, _ = rows()
    data = rng.choice([_spoiled(rng, x, [np.nan]), x[:, :3], x[:0], x.astype(str), iter(()), None])
    return lambda: keras_kd.cache.write(small(9, "teacher"), data, folder / "cache")


@bad
def cache_in_place_of_something_else(folder, rng):
    x, _ = rows()
    teacher, _ = _cache(folder)
    (folder / "file").write_text("mine")
    shutil.copytree(DIGITS, folder / "export")
    name = rng.choice(["file", "file/below", "export", "cache"])
    teacher = small(7, "another") if name == "cache" else teacher
    return lambda: keras_kd.cache.write(teacher, x, folder / name)


@bad
def cache_with_flipped_bits(folder, rng):
    _cache(folder)
    path = rng.choice(sorted(folder.rglob("records-*.bin")))
    blob = bytearray(path.read_bytes())
    blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    path.write_bytes(blob)
    return lambda: keras_kd.cache.verify(folder / "cache")


@bad
def cache_cut_short(folder, rng):
    _cache(folder)
    path = rng.choice(sorted(folder.rglob("records-*.bin")))
    blob = path.read_bytes()
    path.write_bytes(blob[: rng.randrange(len(blob))])
    return lambda: keras_kd.cache.verify(folder / "cache")


@bad
def cache_without_a_file(folder, rng):
    _cache(folder)
    names = [path for path in sorted(folder.rglob("*")) if path.suffix == ".bin"]
    rng.choice([*names, folder / "cache" / "manifest.json"]).unlink()
    return lambda: keras_kd.cache.verify(folder / "cache")


@bad
def cache_manifest_of_another_form(folder, rng):
    _cache(folder)
    path = folder / "cache" / "manifest.json"
    content = json.loads(path.read_text())
    key = rng.choice(sorted(content))
    content[key] = rng.choice([None, "x", -1, [], {}, 1e400])
    path.write_text(json.dumps(content))
    return lambda: keras_kd.cache.verify(folder / "cache")


@bad
def cache_of_another_teacher(folder, rng):
    _cache(folder)
    keras.utils.set_random_seed(rng.randint(4, 99))
    return lambda: keras_kd.cache.verify(folder / "cache", teacher=small(9, "teacher"))


@bad
def cache_of_other_data(folder, rng):
    teacher, x = _cache(folder)
    other = rng.choice([x[:-1], x + 1, x[::-1]])
    return lambda: keras_kd.cache.verify(folder / "cache", teacher=teacher, data=other)


@bad
def cache_that_is_no_regular_file(folder, rng):
    _cache(folder)
    path = folder / "cache" / "manifest.json"
    path.unlink()
    if rng.random() < 0.5:
        os.mkfifo(path)
    else:
        path.mkdir()
    return lambda: kd.teachers.CachedTeacher(folder / "cache")


# ------------------------------------------------------------------ exports


def _export(folder, **given):
    x, y = rows()
    usual = {"calibration": x, "evaluation": (x, y)}
    return lambda: keras_kd.export(small(5, "student"), folder / "out", **{**usual, **given})


@bad
def export_arguments(folder, rng):
    return _export(
        folder,
        **rng.choice(
            [
                *({"formats": "tfl"}, {"formats": []}, {"precisions": ["int7"]}),
                *({"precisions": 8}, {"max_drop": 1.1}, {"max_drop": "x"}, {"opset": 99}),
                *({"objective": "speed"}, {"mixed": "no"}, {"sparse": 2}, {"progress": 1}),
                *({"name": "a/b"}, {"name": "a\nb"}, {"name": ""}, {"name": "x" * 300}),
                *({"labels": "abcd"}, {"labels": ["a"]}, {"labels": ["a", "b", "c", None]}),
                *({"history": [1]}, {"history": {"loss": "x"}}, {"history": {"loss": [None]}}),
                *({"normalization": (0, 255)}, {"teacher": {"acc": 1}}, {"teacher": "t.keras"}),
                *({"overwrite": "yes"}, {"allow_flex": 0.5}),
            ]
        ),
    )


@bad
def export_data(folder, rng):
    x, y = rows()
    return _export(
        folder,
        **rng.choice(
            [
                *({"evaluation": (x[:, :2], y)}, {"evaluation": (x, y + 4)}),
                *({"evaluation": (x, y[:3])}, {"evaluation": (x[:0], y[:0])}),
                *({"evaluation": (_spoiled(rng, x, [np.nan]), y)}, {"calibration": 300 * x}),
                *({"calibration": iter(())}, {"calibration": x.astype(str)}),
                *({"calibration": None}, {"evaluation": (x, y.astype(str))}),
                {"calibration": np.float32(3)},
            ]
        ),
    )


@bad
def export_folders(folder, rng):
    (folder / "file").write_text("mine")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "manifest.json").write_text('{"name": "a web app"}')
    (folder / "taken" / "model_int8.onnx").mkdir(parents=True)
    (folder / "taken" / "model_int8.onnx" / "mine").write_text("x")
    _cache(folder)
    name, overwrite = rng.choice(
        [
            *(("file", True), ("file/below", True), ("foreign", True), ("foreign", False)),
            *(("cache", True), ("cache", False), ("taken", True), ("", True), ("a\0b", False)),
        ]
    )
    x, y = rows()
    given = {"calibration": x, "evaluation": (x, y), "overwrite": overwrite}
    path = str(folder / name) if name else ""
    return lambda: keras_kd.export(small(5, "student"), path, **given)


@bad
def export_of_no_model(folder, rng):
    broken = small(5, "student")
    broken.set_weights([_spoiled(rng, w, [np.nan, np.inf]) for w in broken.get_weights()])
    model = rng.choice([broken, keras.Sequential([keras.layers.Dense(3)]), "m.keras", None, kd])
    x, y = rows()
    return lambda: keras_kd.export(model, folder / "out", calibration=x, evaluation=(x, y))


def _digits(folder):
    return Path(shutil.copytree(DIGITS, folder / "out"))


def _uses(rng, folder):
    from keras_kd.cli.try_page import Export

    return rng.choice(
        [
            lambda: keras_kd.export.verify(folder),
            lambda: keras_kd.export.bench(folder, seconds=0.01),
            lambda: Export(folder),
        ]
    )


@bad
def export_with_flipped_bits(folder, rng):
    out = _digits(folder)
    path = rng.choice(sorted(out.iterdir()))
    blob = bytearray(path.read_bytes())
    blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    path.write_bytes(blob)
    return _uses(rng, out)


@bad
def export_cut_short(folder, rng):
    out = _digits(folder)
    path = rng.choice(sorted(out.iterdir()))
    blob = path.read_bytes()
    path.write_bytes(blob[: rng.randrange(len(blob))])
    return _uses(rng, out)


@bad
def export_of_other_kinds_of_files(folder, rng):
    out = _digits(folder)
    path = rng.choice(sorted(out.iterdir()))
    path.unlink()
    rng.choice([lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero")])()
    return _uses(rng, out)


@bad
def export_manifest_of_another_form(folder, rng):
    out = _digits(folder)
    content = manifest.read(out)
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if not place[key] or not isinstance(place[key], (dict, list)) or rng.random() < 0.2:
            break
        place = place[key]
    place[key] = {"no": "object", "one": [10**40]}
    manifest.write(content, out / manifest.FILE)
    return _uses(rng, out)


@bad
def export_samples_that_unpack_to_a_lot(folder, rng):
    out = _digits(folder)
    _bomb(out / "evaluation.npz", "x0", rng)
    content = manifest.read(out)
    content["evaluation"]["sha256"] = manifest.digest(out / "evaluation.npz")
    manifest.write(content, out / manifest.FILE)
    return lambda: keras_kd.export.verify(out)


def _bomb(path, name, rng):
    megabytes = rng.randint(600, 900)
    descr = {"descr": "<f4", "fortran_order": False, "shape": (megabytes << 18,)}
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, descr)
        for _ in range(megabytes):
            member.write(bytes(1 << 20))


@bad
def export_measured_with(folder, rng):
    given = rng.choice(
        [
            *({"threads": 0}, {"threads": 1.5}, {"threads": 10**6}, {"seconds": -1}),
            *({"seconds": np.nan}, {"seconds": "x"}, {"model": folder / "none.keras"}),
            {"model": DIGITS / "digits_int8.onnx"},
        ]
    )
    return lambda: keras_kd.export.bench(DIGITS, **given)


# ------------------------------------------------------------------ data sets


def _images(folder, **changes):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (20, 5, 5)).astype("uint8"), np.arange(20) % 3
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, **changes}
    np.savez(folder / "d.npz", **{key: v for key, v in arrays.items() if v is not None})
    return lambda: datasets.load(folder / "d.npz")


@bad
def datasets_arrays(folder, rng):
    images = np.zeros((20, 5, 5), "float32")
    return _images(
        folder,
        **rng.choice(
            [
                *({"x_train": None}, {"y_test": None}, {"y_train": np.arange(7)}),
                *({"x_train": images * np.nan}, {"x_train": images[:, 0, 0]}),
                *({"y_train": np.full(20, 0.5)}, {"y_train": np.full(20, -1)}),
                *({"y_train": np.full(20, "a")}, {"x_train": np.full((20, 5, 5), "a")}),
                *({"x_test": np.zeros((20, 4, 4), "uint8")}, {"x_validation": images}),
                *({"x_train": images[:0], "y_train": np.arange(0)}, {"class_names": ["a"]}),
            ]
        ),
    )


@bad
def datasets_cut_short(folder, rng):
    call = _images(folder)
    blob = (folder / "d.npz").read_bytes()
    (folder / "d.npz").write_bytes(blob[: rng.randrange(len(blob))])
    return call


@bad
def datasets_of_noise(folder, rng):
    (folder / "d.npz").write_bytes(rng.choice([b"", b"PK\x03\x04"]) + rng.randbytes(300))
    return lambda: datasets.load(folder / "d.npz")


@bad
def datasets_with_pickles(folder, rng):
    return _images(folder, x_train=np.array([{"a": 1}, None], dtype=object))


@bad
def datasets_that_unpack_to_a_lot(folder, rng):
    _bomb(folder / "d.npz", "x_train", rng)
    return lambda: datasets.load(folder / "d.npz")


@bad
def datasets_that_are_no_files(folder, rng):
    path = folder / "d.npz"
    rng.choice([lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero")])()
    return lambda: datasets.load(path)


@bad
def datasets_names(folder, rng):
    name = rng.choice(["digit", "tfds:no_such_set", "d.csv", "", "missing.npz", "tfds:"])
    return lambda: datasets.load(name)


# ------------------------------------------------------------------ the command line


def _model(folder):
    small(5, "student").save(folder / "m.keras")
    return folder / "m.keras"


def _data(folder):
    x, y = rows()
    np.savez(folder / "d.npz", x=x, y=y)
    return folder / "d.npz"


@bad
def command_words(folder, rng):
    return rng.choice(
        [
            *(["exprt"], ["demo", "--epochs", "0"], ["demo", "--data", "x\x1b[2J"], ["verify"]),
            *(["export", folder / "none.keras"], ["try", folder], ["bench", folder / "none"]),
            *(["cache", "info", folder], ["cache", "write"], ["report", folder, "--layer"]),
            ["bench", DIGITS, "--seconds", "nan", "--out", folder / "new"],
        ]
    )


@bad
def command_export_options(folder, rng):
    option = rng.choice(
        [
            *(["--precisions", "int9"], ["--formats", ","], ["--max-drop", "7"]),
            *(["--labels", "a,b"], ["--name", "../x"], ["--name", "a\x07b"], ["--mean", "0"]),
            *(["--mean", "x", "--std", "1"], ["--objective", "best"], ["--out", _data(folder)]),
        ]
    )
    return ["export", _model(folder), "--calibration", _data(folder), *option]


@bad
def command_damaged_models(folder, rng):
    path = _model(folder)
    blob = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        path.write_bytes(blob[: rng.randrange(len(blob) - 1)])
    else:
        path.write_bytes(rng.randbytes(300))
    return ["export", path, "--evaluation", _data(folder)]


@bad
def command_models_that_are_no_files(folder, rng):
    path = folder / "m.keras"
    rng.choice([lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero")])()
    word = rng.choice(["export", "cache", "bench"])
    if word == "bench":
        return ["bench", DIGITS, "--model", path, "--out", folder]
    return [word, path] if word == "export" else ["cache", "write", path, folder / "c"]


@bad
def command_damaged_exports(folder, rng):
    out = _digits(folder)
    content = manifest.read(out)
    content["model"]["name"] = "\x1b]0;x\x07"
    del content[rng.choice(["keras", "evaluation", "best", "layers"])]
    manifest.write(content, out / manifest.FILE)
    return [rng.choice(["verify", "report", "bench", "try"]), out]


@bad
def command_damaged_caches(folder, rng):
    _cache(folder)
    path = rng.choice(sorted((folder / "cache").rglob("*.bin")))
    path.write_bytes(path.read_bytes()[:-1])
    return ["cache", "verify", folder / "cache"]


@bad
def command_data(folder, rng):
    x, y = rows()
    arrays = rng.choice(
        [
            *({"x": x[:, :2]}, {"x": x * np.nan}, {"audio": x}, {"x": x[:0]}, {"x": x, "y": y + 4}),
            {"x": np.float32(1)},
        ]
    )
    np.savez(folder / "bad.npz", **arrays)
    return ["export", _model(folder), "--evaluation", folder / "bad.npz", "--precisions", "float32"]
