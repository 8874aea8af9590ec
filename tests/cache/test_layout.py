"""The form of the records, and the manifest that describes it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_kd import cache
from keras_kd.cache import reader, samples
from keras_kd.cache.layout import Layout, Manifest, Output
from keras_kd.cache.reader import read_manifest


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        (1000, {"top_k": 100, "augmented": True}, 404),
        (1000, {"top_k": 100}, 400),
        (1000, {}, 2000),
        (1000, {"dtype": "float32"}, 4000),
        (70_000, {"top_k": 100}, 600),
        (65_536, {"top_k": 3}, 12),
        (10, {"top_k": 3, "dtype": "float32"}, 18),
        ((7, 50), {"top_k": 4}, 7 * 4 * 4),
        (10, {"tap_shapes": [(8, 8, 3), (16,)]}, 20 + 2 * (192 + 16)),
    ],
)
def test_bytes_of_a_record(shape, options, expected):
    assert cache.record_bytes(shape, **options) == expected


def test_bytes_of_a_record_refuses_what_write_refuses():
    with pytest.raises(ValueError, match=r"larger than the number of classes.*Pass at most 10"):
        cache.record_bytes(10, top_k=11)
    with pytest.raises(ValueError, match=r"'float16' or 'float32'.*'int8'"):
        cache.record_bytes(10, dtype="int8")
    with pytest.raises(ValueError, match=r"positive integer.*top_k=0"):
        cache.record_bytes(10, top_k=0)


def test_fields_lie_one_after_the_other():
    layout = Layout((Output((1000,), top_k=2), Output((3,))), (("a", (4,)),), "float16", True)
    record = layout.record
    assert record.names == ("seed", "classes_0", "values_0", "logits_1", "tap_0")
    assert [record.fields[name][1] for name in record.names] == [0, 4, 8, 12, 18]
    assert record.itemsize == 26
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_files_are_records_and_nothing_else(written: Path):
    manifest = read_manifest(written)
    assert [entry["samples"] for entry in manifest.shards] == [64, 64, 64, 8]
    sizes = [(written / f"records-000-0000{i}.bin").stat().st_size for i in range(4)]
    expected = cache.record_bytes(5, dtype="float32", tap_shapes=[(16,)])
    assert manifest.record_bytes == expected == 4 * (5 + 16)
    assert sizes == [64 * expected] * 3 + [8 * expected]
    assert sum(sizes) == manifest.nbytes == 200 * expected
    assert {file.suffix for file in written.iterdir()} == {".bin", ".crc", ".json"}
    assert len(list(written.iterdir())) == 9


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["in memory", "from files"])
def test_any_rows_in_any_order(written: Path, monkeypatch, limit):
    monkeypatch.setattr(reader, "HELD_UP_TO", limit)
    monkeypatch.setattr(reader, "_OPEN_FILES", 2)
    records = reader.Records(written)
    record = records.manifest.layout.record
    files = [written / f"records-000-0000{i}.bin" for i in range(4)]
    whole = np.concatenate([np.fromfile(file, record) for file in files])
    rng = np.random.default_rng(0)
    for rows in (
        np.arange(200),
        np.arange(64, 100),
        np.arange(60, 70),
        rng.permutation(200),
        rng.integers(0, 200, 500),
        np.array([199]),
        np.array([], int),
    ):
        found = records.read(rows)
        assert found.dtype == record
        assert np.array_equal(found, whole[rows])
    for rows in ([200], [3, -1]):
        with pytest.raises(IndexError, match=r"holds rows 0 to 199"):
            records.read(np.array(rows))


def test_a_large_cache_does_not_become_resident(tmp_path):
    psutil = pytest.importorskip("psutil")
    count = (reader.HELD_UP_TO >> 12) + 4096
    manifest = Manifest(
        teacher={"name": "zeros", "fingerprint": ""},
        layout=Layout((Output((1024,)),), dtype="float32"),
        template=None,
        inputs=[],
        augment=None,
        epochs=1,
        shard_size=count,
        count=count,
        shards=[{"epoch": 0, "shard": 0, "samples": count, "sha256": ""}],
        complete=True,
    )
    (tmp_path / "manifest.json").write_text(manifest.dumps())
    for name, size in (("records-000-00000.bin", manifest.nbytes), ("inputs-00000.crc", 4 * count)):
        with (tmp_path / name).open("wb") as stream:
            # A hole: it takes no room on the disk.
            stream.truncate(size)
    records = reader.Records(tmp_path, verify=False)
    process, rng = psutil.Process(), np.random.default_rng(0)
    before = process.memory_info().rss
    for _ in range(300):
        assert not records.read(rng.integers(0, count, 128))["logits_0"].any()
    assert process.memory_info().rss - before < 32 << 20 < manifest.nbytes


def test_manifest_round_trip(written: Path):
    manifest = read_manifest(written)
    assert Manifest.loads(manifest.dumps(), "manifest.json") == manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[1]", "damaged"),
        ('{"format": "keras_kd.cache", "version": 3, "layout": {}}', "damaged"),
        ('{"format": "keras_kd.cache", "version": 99}', "version 99"),
        # Without its own checksum, those of the views, and what the teacher was given.
        ('{"format": "keras_kd.cache", "version": 2}', "version 2"),
        ('{"format": "keras_kd.cache", "version": 1}', "version 1"),
        ('{"format": "other", "version": 1}', "not a cache of format"),
    ],
)
def test_manifest_that_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        Manifest.loads(text, "manifest.json")


def test_seeds_do_not_depend_on_the_batch_and_differ():
    rows = np.arange(100_000)
    whole = samples.seeds(7, 3, rows)
    assert np.array_equal(whole[5000:6000], samples.seeds(7, 3, rows[5000:6000]))
    assert whole.dtype == np.uint32
    # Of 100,000 draws from 2**32 about one pair is equal by chance.
    assert len(np.unique(whole)) > 99_990
    assert abs(whole.mean() / 2**31 - 1) < 0.01
    assert not np.array_equal(whole, samples.seeds(7, 4, rows))
    assert not np.array_equal(whole, samples.seeds(8, 3, rows))


def test_digests_tell_samples_apart_whatever_the_float_precision():
    x = np.random.default_rng(0).normal(size=(50, 3, 2)).astype("float16")
    found = samples.digests(x)
    assert len(np.unique(found)) == 50
    assert np.array_equal(found, samples.digests(x.astype("float64")))
    assert np.array_equal(found[10:20], samples.digests(x[10:20]))
    changed = x.copy()
    changed[7, 1, 1] += 1
    assert np.flatnonzero(found != samples.digests(changed)).tolist() == [7]
    assert np.array_equal(samples.digests({"a": x, "b": x[:, 0]}), samples.digests([x, x[:, 0]]))
    assert len(samples.digests(np.array(["a", "b"], object))) == 2


def test_reading_needs_no_keras(written):
    code = (
        "import sys\n"
        "from keras_kd.cache.reader import Records\n"
        "records = Records(sys.argv[1])\n"
        "assert len(records.read([3, 199, 0])) == 3\n"
        "import keras_kd.cache\n"
        "keras_kd.cache.record_bytes(10)\n"
        "keras_kd.cache.verify(sys.argv[1])\n"
        "heavy = {'keras', 'tensorflow', 'jax', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(written)], check=True)
