"""What a cache holds, how it is continued, and what it refuses."""

import errno
import importlib
import json
import threading
from pathlib import Path
from typing import ClassVar

import keras
import numpy as np
import pytest

import keras_kd as kd
from keras_kd import cache
from keras_kd.cache import storage
from keras_kd.cache.reader import Records, read_manifest
from keras_kd.teachers import CachedTeacher, Ensemble


def _records(path, rows=None, epoch=0):
    records = Records(path)
    return records.read(np.arange(records.count) if rows is None else np.asarray(rows), epoch)


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# ----------------------------------------------------------------- what it holds


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float16", 1e-3)])
def test_logits_are_those_of_the_teacher(tmp_path, teacher, x, dtype, bound):
    manifest = cache.write(teacher, x, tmp_path, dtype=dtype, batch_size=48, shard_size=70)
    assert manifest.complete
    assert manifest.count == 200
    rows = np.array([199, 0, 70, 69, 140, 3, 3])
    found = _records(tmp_path, rows)["logits_0"]
    assert found.dtype == dtype
    expected = teacher.predict(x[rows], verbose=0)
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def test_probabilities_are_stored_as_logits(tmp_path, classifier, x):
    model = classifier(8, 1, activation="softmax")
    cache.write(model, x, tmp_path, dtype="float32")
    logits = keras.Model(model.input, model.get_layer("hidden").output).predict(x, verbose=0)
    kernel, bias = model.get_layer("logits").get_weights()
    assert np.allclose(_records(tmp_path)["logits_0"], logits @ kernel + bias, atol=1e-5)
    assert CachedTeacher(tmp_path).kinds == ["softmax"]


def test_top_k_holds_log_probabilities(tmp_path, teacher, x):
    cache.write(teacher, x, tmp_path, top_k=2)
    records = _records(tmp_path)
    assert records.dtype.itemsize == cache.record_bytes(5, top_k=2) == 8
    assert records["classes_0"].dtype == np.uint16
    z = teacher.predict(x, verbose=0).astype("float64")
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    order = np.argsort(-log_p, axis=-1)[:, :2]
    assert np.array_equal(records["classes_0"], order)
    assert np.allclose(
        records["values_0"], np.take_along_axis(log_p, order, -1), rtol=2e-3, atol=2e-4
    )


def test_wide_indices_beyond_65536_classes(tmp_path):
    classes = 65_537
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(classes)(inputs))
    weights = np.zeros((1, classes), "float32")
    weights[0, -1] = 1.0
    model.set_weights([weights, np.zeros(classes, "float32")])
    cache.write(model, np.ones((3, 1), "float32"), tmp_path, top_k=1)
    records = _records(tmp_path)
    assert records["classes_0"].dtype == np.uint32
    assert records["classes_0"].tolist() == [[65_536]] * 3


def test_several_outputs_taps_and_other_inputs(tmp_path, x):
    inputs = {"a": keras.Input((6,), name="a"), "b": keras.Input((2,), name="b")}
    inner = keras.layers.Dense(3, name="inner")(keras.layers.Concatenate()(list(inputs.values())))
    outputs = {
        "kind": keras.layers.Dense(4, name="kind")(inner),
        "tags": keras.layers.Dense(2, "sigmoid", name="tags")(inner),
    }
    model = keras.Model(inputs, outputs)
    data = {"a": x, "b": x[:, :2]}
    cache.write(
        model,
        (data, np.zeros(200)),
        tmp_path,
        dtype="float32",
        taps=["inner"],
        teacher_inputs=lambda batch: {"a": batch["a"] * 2.0, "b": batch["b"]},
    )
    records = _records(tmp_path)
    seen = {"a": x * 2, "b": x[:, :2]}
    expected = model.predict(seen, verbose=0)
    inner = keras.Model(model.inputs, model.get_layer("inner").output).predict(seen, verbose=0)
    assert np.allclose(records["logits_0"], expected["kind"], atol=1e-5)
    assert np.allclose(1 / (1 + np.exp(-records["logits_1"])), expected["tags"], atol=1e-5)
    assert np.allclose(records["tap_0"], inner, atol=1e-5)
    teacher = CachedTeacher(tmp_path)
    assert teacher.output_template() == {"kind": "kind", "tags": "tags"}
    assert teacher.output_shapes() == [(None, 4), (None, 2)]
    assert teacher.taps() == ["inner"]


def test_an_ensemble_is_cached_as_one_teacher(tmp_path, classifier, x):
    models = [classifier(8, 1), classifier(8, 2)]
    cache.write(Ensemble(models, weights=[3.0, 1.0]), x, tmp_path, dtype="float32")
    p = [np.exp(m.predict(x, verbose=0).astype("float64")) for m in models]
    p = [each / each.sum(-1, keepdims=True) for each in p]
    expected = np.log(0.75 * p[0] + 0.25 * p[1])
    assert np.allclose(_records(tmp_path)["logits_0"], expected, atol=1e-5)


def test_a_subclassed_teacher_of_one_unit(tmp_path, x):
    class Scorer(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)

    model = Scorer()
    expected = model.predict(x, verbose=0)
    cache.write(model, x, tmp_path, dtype="float32")
    assert np.allclose(_records(tmp_path)["logits_0"], expected, atol=1e-6)
    assert CachedTeacher(tmp_path).outputs[0].binary
    with pytest.raises(ValueError, match=r"`top_k` keeps the most probable of exclusive classes"):
        cache.write(model, x, tmp_path / "k", top_k=1)


class _Pages(keras.utils.PyDataset):
    def __init__(self, x, size):
        super().__init__()
        self.x, self.size = x, size

    @property
    def num_batches(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, index):
        batch = self.x[index * self.size : (index + 1) * self.size]
        return batch, np.zeros(len(batch))


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "generator", "iterable"])
def test_any_kind_of_data_gives_the_same_records(tmp_path, teacher, x, written, kind):
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices((x, np.zeros(200))).batch(48)
    elif kind == "PyDataset":
        data = _Pages(x, 48)
    else:
        data = [(x[i : i + 48], None) for i in range(0, 200, 48)]
        data = (batch for batch in data) if kind == "generator" else _Iterable(data)
    progress = []
    manifest = cache.write(
        teacher,
        data,
        tmp_path,
        dtype="float32",
        taps=["hidden"],
        shard_size=64,
        progress=lambda done, total: progress.append((done, total)),
    )
    expected = Records(written)
    assert manifest.complete
    assert manifest.count == 200
    assert manifest.order == expected.manifest.order
    assert manifest.inputs == expected.manifest.inputs == [{"shape": [6], "dtype": "float32"}]
    found, rows = _records(tmp_path), np.arange(200)
    assert np.allclose(found["logits_0"], expected.read(rows)["logits_0"], atol=1e-6)
    assert [done for done, _ in progress] == [48, 96, 144, 192, 200]
    assert progress[0][1] == (240 if kind in ("tf.data", "PyDataset") else None)


class _Iterable:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_the_users_teacher_is_left_alone(tmp_path, classifier, x):
    model = classifier(8, 5)
    before, layers = model.get_weights(), set(vars(model))
    ensemble = Ensemble([model])
    ensemble.reset([f"{model.name}/hidden"])
    taps = ensemble.members[0]._reader.taps
    cache.write(ensemble, x, tmp_path)
    assert ensemble.members[0]._reader.taps is taps
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
    assert set(vars(model)) == layers


# ------------------------------------------------------------------ how it goes on


def test_a_finished_cache_is_left_as_it_is(written, teacher, x):
    before = {file.name: file.stat().st_mtime_ns for file in written.iterdir()}
    progress = []
    manifest = cache.write(
        teacher,
        x,
        written,
        dtype="float32",
        taps=["hidden"],
        batch_size=32,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert manifest.complete
    assert progress[-1] == (200, 200)
    after = {file.name: file.stat().st_mtime_ns for file in written.iterdir()}
    assert {n for n in after if after[n] != before.get(n)} <= {"manifest.json"}


def test_processes_write_the_shards_of_one_cache(tmp_path, written, teacher, x):
    def write(index):
        return cache.write(
            teacher,
            x,
            tmp_path,
            dtype="float32",
            taps=["hidden"],
            batch_size=32,
            shard_size=64,
            process_index=index,
            process_count=3,
        )

    assert not write(2).complete
    names = {file.name for file in tmp_path.iterdir()}
    assert {n for n in names if n.endswith(".bin")} == {"records-000-00002.bin"}
    with pytest.raises(ValueError, match=r"half written"):
        Records(tmp_path)
    assert not write(0).complete
    assert write(1).complete
    assert _files(tmp_path) == _files(written)


def test_an_error_in_a_shard_leaves_the_finished_ones(tmp_path, written, teacher, x, monkeypatch):
    def full(file, before):
        if file.name == "records-000-00002.bin":
            return _Full(file, before)
        return replacing(file, before)

    class _Full:
        """A disk that takes the beginning of a shard and no more."""

        def __init__(self, file, before):
            self.inner = replacing(file, before)

        def __enter__(self):
            self.stream = self.inner.__enter__()
            return self

        def write(self, data):
            self.stream.write(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    replacing = storage.replacing
    arguments = {"dtype": "float32", "taps": ["hidden"], "batch_size": 32, "shard_size": 64}
    monkeypatch.setattr(storage, "replacing", full)
    reason = "Shard 2 .*No space left.*2 finished shards are untouched"
    with pytest.raises(OSError, match=reason) as error:
        cache.write(teacher, x, tmp_path, **arguments)
    assert error.value.errno == errno.ENOSPC
    there = [name for name in _files(tmp_path) if name.endswith((".bin", ".crc"))]
    assert there == [
        "inputs-00000.crc",
        "inputs-00001.crc",
        "records-000-00000.bin",
        "records-000-00001.bin",
    ]
    monkeypatch.undo()
    stamps = {n: (tmp_path / n).stat().st_mtime_ns for n in there}
    assert cache.write(teacher, x, tmp_path, **arguments).complete
    assert _files(tmp_path) == _files(written)
    assert all((tmp_path / n).stat().st_mtime_ns == stamp for n, stamp in stamps.items())


@pytest.mark.parametrize("file", ["records-000-00001.bin", "inputs-00001.crc"])
def test_a_deleted_shard_is_written_again(written, teacher, x, file):
    before = _files(written)
    (written / file).unlink()
    with pytest.raises(ValueError, match=f"`{file}` is missing"):
        CachedTeacher(written)
    cache.write(teacher, x, written, dtype="float32", taps=["hidden"], batch_size=32)
    assert _files(written) == before


def test_two_writers_of_one_shard(tmp_path, teacher, x):
    started, go_on, raised = threading.Event(), threading.Event(), []

    def slow(done, total):
        started.set()
        go_on.wait(20)

    def first():
        cache.write(teacher, x, tmp_path, batch_size=32, shard_size=64, progress=slow)

    thread = threading.Thread(target=first)
    thread.start()
    started.wait(20)
    try:
        cache.write(teacher, x, tmp_path, batch_size=32, shard_size=64)
    except BlockingIOError as error:
        raised.append(str(error))
    go_on.set()
    thread.join()
    assert "is writing shard 0" in raised[0]
    assert "`process_index`" in raised[0]
    assert Records(tmp_path).count == 200
    assert not [file for file in tmp_path.iterdir() if file.suffix in (".lock", ".tmp")]


# ---------------------------------------------------------------- what it refuses


def _refused(match, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=match):
        cache.write(*arguments, **options)


def test_a_refusal_leaves_no_empty_folder(teacher, x, tmp_path):
    _refused("larger than the number of classes", teacher, x, tmp_path / "new", top_k=1000)
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    _refused("larger than the number of classes", teacher, x, tmp_path / "there", top_k=1000)
    assert (tmp_path / "there").exists()


def test_another_teacher_or_form(written, classifier, teacher, x):
    before = _files(written)
    same = {"dtype": "float32", "taps": ["hidden"], "batch_size": 32}
    _refused("cache of another teacher", classifier(16, 9), x, written, **same)
    _refused("records of another form", teacher, x, written, dtype="float16", taps=["hidden"])
    _refused("records of another form", teacher, x, written, dtype="float32")
    _refused("shards of another size", teacher, x, written, shard_size=10, **same)
    assert _files(written) == before


def test_other_data(written, teacher, x):
    before = _files(written)
    same = {"dtype": "float32", "taps": ["hidden"], "batch_size": 32}
    _refused("another number of samples: 200 there, 199 now", teacher, x[:-1], written, **same)
    swapped = x.copy()
    swapped[[70, 71]] = x[[71, 70]]
    _refused("row 70 differs from what it was", teacher, swapped, written, **same)
    batches = ((x[i : i + 50],) for i in range(0, 150, 50))
    _refused("150 samples in epoch 0, and .* begun with 200", teacher, batches, written, **same)
    assert _files(written) == before


def test_top_k_larger_than_the_classes(tmp_path, teacher, x):
    path = tmp_path / "cache"
    _refused("larger than the number of classes.*top_k=6.*5 classes", teacher, x, path, top_k=6)
    assert not (path / "manifest.json").exists()


def test_a_path_that_cannot_be_written(tmp_path, teacher, x):
    (tmp_path / "file").write_text("")
    _refused("cannot be written to .*Choose a folder", teacher, x, tmp_path / "file", error=OSError)
    _refused(
        "cannot be written to .*Choose a folder",
        teacher,
        x,
        tmp_path / "file" / "in",
        error=OSError,
    )
    _refused("is a string or a `pathlib.Path`", teacher, x, 3, error=TypeError)


def test_a_disk_that_is_too_small(tmp_path, teacher, x, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("keras_kd.cache.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"takes 2,000 bytes more .* 1,000 are free") as error:
        cache.write(teacher, x, tmp_path)
    assert error.value.errno == errno.ENOSPC


def test_answers_that_cannot_be_stored(tmp_path, classifier, x):
    bad = x.copy()
    bad[77, 0] = np.nan
    # A NaN does not get through every ReLU: that of oneDNN answers 0.
    linear = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(5)])
    options = {"batch_size": 32, "shard_size": 64}
    _refused("row 77 are NaN or infinite", linear, bad, tmp_path, **options)
    assert (tmp_path / "records-000-00000.bin").stat().st_size == 64 * 10
    model = classifier(8, 1)
    model.get_layer("logits").bias.assign([1e5, 0, 0, 0, 0])
    _refused('row 0 are larger than float16 holds.*dtype="float32"', model, x, tmp_path / "b")
    assert cache.write(model, x, tmp_path / "c", dtype="float32").complete
    assert cache.write(model, x, tmp_path / "d", top_k=2).complete


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 2}, "Without `augment` every epoch is the same"),
        ({"epochs": 0}, "`epochs` is an integer from 1"),
        ({"batch_size": 0}, "`batch_size` is an integer from 1"),
        ({"shard_size": 2.5}, "`shard_size` is an integer from 1"),
        ({"process_index": 1}, "counts from 0 to `process_count` - 1"),
        ({"dtype": "int8"}, "'float16' or 'float32'"),
        ({"taps": ["hiden"]}, "`hiden` is not a layer of the teacher .*Did you mean `hidden`"),
    ],
)
def test_arguments_out_of_range(tmp_path, teacher, x, options, match):
    _refused(match, teacher, x, tmp_path / "cache", **options)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_data_that_cannot_be_cached(tmp_path, teacher, x):
    tf = pytest.importorskip("tensorflow")
    samples = tf.data.Dataset.from_tensor_slices(x)
    _refused("never ends", teacher, samples.batch(8).repeat(), tmp_path)
    _refused("Batch the data", teacher, samples, tmp_path)
    _refused("no rows", teacher, x[:0], tmp_path)
    _refused("yields no batch", teacher, samples.batch(8).take(0), tmp_path)
    _refused("Received: data of type int", teacher, 3, tmp_path, error=TypeError)
    _refused("teacher of a cache is", None, x, tmp_path, error=TypeError)
    shuffled = samples.shuffle(200, reshuffle_each_iteration=True).batch(50)
    augment = {"augment": lambda sample, seed: sample, "epochs": 2}
    _refused("come in another order each time", teacher, shuffled, tmp_path, **augment)
    once = (batch for batch in [x])
    _refused("A generator can be read once", teacher, once, tmp_path / "g", **augment)


# ------------------------------------------------------------------------ verify


def test_verify_finds_and_names_what_is_wrong(written, teacher, classifier, x):
    assert cache.verify(written, teacher=teacher, data=x).count == 200
    with pytest.raises(ValueError, match=r"cache of another teacher"):
        cache.verify(written, teacher=classifier(16, 9))
    with pytest.raises(ValueError, match=r"The data have 100 samples, and the cache .* has 200"):
        cache.verify(written, data=x[:100])
    with pytest.raises(ValueError, match=r"row 0 is another sample"):
        cache.verify(written, data=x[::-1])
    with pytest.raises(ValueError, match=r"answers inputs of the form"):
        cache.verify(written, data=x[:, :5])

    file = written / "records-000-00002.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    for opened in (cache.verify, CachedTeacher):
        with pytest.raises(ValueError, match=r"`records-000-00002.bin` is damaged: its SHA-256"):
            opened(written)
    file.write_bytes(content[:-5])
    (written / "records-000-00000.bin").unlink()
    with pytest.raises(ValueError, match=r"00000.bin` is missing; .*00002.bin` is half written"):
        cache.verify(written)


def test_verify_finds_damaged_inputs_and_manifest(written):
    file = written / "inputs-00001.crc"
    content = bytearray(file.read_bytes())
    content[5] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"`inputs-00001.crc` is damaged"):
        cache.verify(written)
    (written / "manifest.json").write_text((written / "manifest.json").read_text()[:200])
    with pytest.raises(ValueError, match=r"manifest.json` is damaged"):
        cache.verify(written)
    (written / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no `manifest.json` beside its shards"):
        cache.verify(written)
    with pytest.raises(FileNotFoundError, match=r"holds no teacher's cache"):
        cache.verify(written / "nowhere")


def test_a_large_cache_is_checked_when_it_is_asked_for(written, monkeypatch):
    monkeypatch.setattr("keras_kd.cache.reader.CHECKED_AT_OPENING", 100)
    file = written / "records-000-00002.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    CachedTeacher(written)
    with pytest.raises(ValueError, match=r"damaged"):
        CachedTeacher(written, verify=True)


# -------------------------------------------------------------------- URLs, views


@pytest.fixture
def bucket(monkeypatch):
    """A URL whose files live in the memory of this process."""
    pytest.importorskip("etils.epath")
    pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "s3"
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).removeprefix("s3://").strip("/")

    # Not by `EPATH_USE_TF`, which epath reads once a process: another test may have been first.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.setitem(known, "s3", Bucket)
    return Bucket, "s3://bucket/caches/one"


def test_urls_are_written_and_read_through_epath(bucket, teacher, x, written):
    filesystem, url = bucket
    options = {"dtype": "float32", "taps": ["hidden"], "batch_size": 32}
    cache.write(teacher, x, url, shard_size=64, **options)
    stored = {name.rpartition("/")[2]: f.getvalue() for name, f in filesystem.store.items()}
    assert stored == _files(written)
    assert cache.verify(url, teacher=teacher).count == 200
    records = Records(url)
    rows = np.array([130, 1, 199])
    assert np.array_equal(records.read(rows), Records(written).read(rows))
    copies = Path(records._local._folder)
    assert sorted(file.name for file in copies.iterdir()) == [
        f"records-000-0000{i}.bin" for i in (0, 2, 3)
    ]
    del records
    assert not copies.exists()

    name = next(name for name in filesystem.store if name.endswith("00002.bin"))
    del filesystem.store[name]
    with pytest.raises(ValueError, match=r"`records-000-00002.bin` is missing"):
        Records(url)
    cache.write(teacher, x, url, **options)
    assert filesystem.store[name].getvalue() == _files(written)["records-000-00002.bin"]


def test_views_are_replayed(tmp_path, teacher, x):
    def jitter(sample, seed):
        return sample + np.random.default_rng(seed).normal(size=sample.shape)

    options = {"dtype": "float32", "augment": jitter, "epochs": 3, "seed": 5}
    manifest = cache.write(teacher, x, tmp_path, shard_size=64, batch_size=32, **options)
    assert manifest.record_bytes == cache.record_bytes(5, dtype="float32", augmented=True) == 24
    assert len(manifest.shards) == 12
    cached = CachedTeacher(tmp_path, augment=jitter)
    rows = np.array([150, 3, 64])
    seen = []
    for epoch in range(3):
        record = _records(tmp_path, rows, epoch)
        views = np.stack(
            [
                (x[row] + np.random.default_rng(int(seed)).normal(size=6)).astype("float32")
                for row, seed in zip(rows, record["seed"])
            ]
        )
        assert np.array_equal(cached.view(x[rows], rows, epoch), views)
        assert np.allclose(record["logits_0"], teacher.predict(views, verbose=0), atol=1e-5)
        seen.append(record["seed"])
    assert len(np.unique(seen)) == 9
    assert np.array_equal(cached.view(x[rows], rows, 3), cached.view(x[rows], rows, 0))
    before = _files(tmp_path)
    (tmp_path / "records-001-00002.bin").unlink()
    cache.write(teacher, x, tmp_path, batch_size=32, **options)
    assert _files(tmp_path) == before
    _refused("other views", teacher, x, tmp_path, **{**options, "seed": 6})
    json.loads((tmp_path / "manifest.json").read_text())
    kd.cache.verify(tmp_path, teacher=teacher, data=x)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_urls_of_other_schemes_go_through_fsspec(tmp_path, teacher, x, written, scheme):
    pytest.importorskip("upath")
    url = f"file://{tmp_path}/one" if scheme == "file" else f"memory://{tmp_path.name}/one"
    options = {"dtype": "float32", "taps": ["hidden"], "batch_size": 32, "shard_size": 64}

    def stop(done, total):
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(teacher, x, url, progress=stop, **options)
    with pytest.raises(ValueError, match="half written"):
        CachedTeacher(url)
    assert cache.write(teacher, x, url, **options).complete
    cache.verify(url, teacher=teacher, data=x)
    rows = np.array([130, 1, 199])
    assert np.array_equal(Records(url).read(rows), Records(written).read(rows))


def test_urls_that_nothing_reads(teacher, x):
    pytest.importorskip("upath")
    _refused("scheme `nowhere`, which neither etils nor fsspec", teacher, x, "nowhere://a/b")
    with pytest.raises(ValueError, match="scheme `nowhere`"):
        CachedTeacher("nowhere://a/b")


# -------------------------------------------------------- what tells caches apart


def _flip(sample, seed):
    return sample[::-1].copy() if np.random.default_rng(seed).random() < 0.5 else sample


def test_an_augmentation_that_draws_from_more_than_its_seed(tmp_path, teacher, x):
    rng = np.random.default_rng(0)
    options = {"augment": lambda sample, seed: sample + rng.random(), "epochs": 2}
    _refused("another view of row 0 when it is called again", teacher, x, tmp_path, **options)


def test_a_changed_augmentation_does_not_go_on(tmp_path, teacher, x):
    options = {"epochs": 2, "batch_size": 32, "shard_size": 64}
    cache.write(teacher, x, tmp_path, augment=_flip, **options)
    (tmp_path / "records-000-00002.bin").unlink()

    def other(sample, seed):
        # Row 0 has the view that it had.
        return _flip(sample, seed) if (sample == x[0]).all() else sample * 2

    other.__qualname__ = "_flip"
    match = "other views: the augmentation gives another one of row 64 in epoch 0"
    _refused(match, teacher, x, tmp_path, augment=other, **options)


def test_other_teacher_inputs_do_not_go_on(tmp_path, teacher, x):
    options = {"batch_size": 32, "shard_size": 64}
    cache.write(teacher, x, tmp_path, teacher_inputs=lambda batch: batch * 2.0, **options)
    (tmp_path / "records-000-00001.bin").unlink()
    before = _files(tmp_path)
    match = "answers to other `teacher_inputs`"
    for other in (None, lambda batch: batch * -1.0):
        _refused(match, teacher, x, tmp_path, teacher_inputs=other, **options)

    def same_in_row_0(batch):
        first = keras.ops.convert_to_tensor(x[:1])
        alike = keras.ops.all(keras.ops.equal(batch, first), axis=-1, keepdims=True)
        return keras.ops.where(alike, batch * 2.0, batch * 3.0)

    _refused(f"{match}: of row 128", teacher, x, tmp_path, teacher_inputs=same_in_row_0, **options)
    assert _files(tmp_path) == before
    again = cache.write(teacher, x, tmp_path, teacher_inputs=lambda batch: batch * 2.0, **options)
    assert again.complete


def test_a_choice_of_precision_is_kept(tmp_path, teacher, x, monkeypatch):
    times = {"float32": 8.0, "bfloat16": 7.0, "float16": 6.0}
    monkeypatch.setattr(
        "keras_kd.teachers.precision.milliseconds",
        lambda models, x: [9.0, *(times[copy.layers[-1].compute_dtype] for copy in models[1:])],
    )
    monkeypatch.setattr("keras_kd.teachers.precision.agrees", lambda before, after: True)
    options = {"teacher_precision": "auto", "batch_size": 32, "shard_size": 64}
    with pytest.warns(UserWarning, match="folded, in float16"):
        manifest = cache.write(teacher, x, tmp_path, **options)
    assert manifest.teacher["runs"] == ["float16"]
    before = _files(tmp_path)
    (tmp_path / "records-000-00001.bin").unlink()
    # Today float32 would be faster.
    times["float32"] = 1.0
    cache.write(teacher, x, tmp_path, **options)
    assert _files(tmp_path) == before


class _Drawn:
    """Batches in a new order in each pass."""

    def __init__(self, x):
        self.x, self.rng = x, np.random.default_rng(0)

    def __iter__(self):
        rows = self.rng.permutation(len(self.x))
        return iter([self.x[rows[i : i + 50]] for i in range(0, len(rows), 50)])


def test_data_in_a_new_order_each_pass(tmp_path, teacher, x):
    _refused("come in another order each time they are read", teacher, _Drawn(x), tmp_path)


@pytest.mark.parametrize("order", ["reversed", "beyond the first shard"])
@pytest.mark.parametrize("form", ["arrays", "batches"])
def test_two_processes_with_other_data(tmp_path, teacher, x, order, form):
    other = x[::-1].copy() if order == "reversed" else x.copy()
    if order != "reversed":
        other[64:] = x[64:][::-1]
    options = {"batch_size": 32, "shard_size": 64, "process_count": 2}

    def given(x):
        return x if form == "arrays" else _Iterable([x[i : i + 40] for i in range(0, 200, 40)])

    cache.write(teacher, given(x), tmp_path, process_index=0, **options)
    match = "answers to other data" if order == "reversed" else "row 128 differs"
    _refused(match, teacher, given(other), tmp_path, process_index=1, **options)


# ------------------------------------------------------------------------ damage


def test_every_flipped_byte_of_the_manifest_is_found(written):
    file = written / "manifest.json"
    whole = file.read_bytes()
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << (i % 8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"manifest.json` is (damaged|not a cache of format)"):
            read_manifest(written)
    # What JSON takes for the same.
    file.write_bytes(whole.replace(b"\n", b"\r\n"))
    with pytest.raises(ValueError, match="damaged"):
        read_manifest(written)


def test_write_mends_what_is_damaged(written, teacher, x):
    before = _files(written)
    for name in ("records-000-00002.bin", "inputs-00001.crc"):
        content = bytearray(before[name])
        content[37] ^= 4
        (written / name).write_bytes(content)
    assert cache.write(
        teacher, x, written, dtype="float32", taps=["hidden"], batch_size=32
    ).complete
    assert _files(written) == before


def test_a_truncated_entry_is_named(tmp_path, teacher, x):
    def stop(done, total):
        if done > 100:
            raise KeyboardInterrupt

    options = {"batch_size": 32, "shard_size": 64}
    with pytest.raises(KeyboardInterrupt):
        cache.write(teacher, x, tmp_path, progress=stop, **options)
    entry = tmp_path / "shard-000-00000.json"
    entry.write_bytes(entry.read_bytes()[:30])
    _refused(r"shard-000-00000.json` is damaged.*Delete it", teacher, x, tmp_path, **options)
    entry.unlink()
    assert cache.write(teacher, x, tmp_path, **options).complete
