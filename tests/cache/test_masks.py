"""What the teacher masks is part of its answers: a cache counts what the live teacher counts."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_kd as kd
from keras_kd import cache
from keras_kd.cache import layout
from keras_kd.cache.layout import Layout, Output
from keras_kd.cache.reader import read_manifest

WORDS, TAGS, LENGTH, COUNT = 9, 4, 6, 24


def _tagger(width, name, masked):
    """`Conv1D` drops a mask, `Dense` passes it on."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(WORDS, width, mask_zero=masked, name="words")(inputs)
    if masked:
        x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        x = layers.Dense(5, name="hidden")(x)
    else:
        x = layers.Conv1D(5, 3, padding="same", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(TAGS, name="tags")(x), name=name)
    rng = np.random.default_rng(width)
    model.set_weights([rng.normal(0, 1, w.shape) for w in model.get_weights()])
    return model


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.integers(1, WORDS, (COUNT, LENGTH))
    valid = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, COUNT)[:, None]
    return np.where(valid, x, 0).astype("int32"), rng.integers(0, TAGS, x.shape), valid


@pytest.fixture(scope="module")
def tagger():
    return _tagger(7, "teacher", True)


@pytest.fixture(scope="module")
def path(tagger, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "cache"
    cache.write(
        tagger,
        data[0],
        path,
        dtype="float32",
        taps=["hidden", "attention:scores", "attention:query"],
    )
    return path


def _logs(teacher, x, y=None, tapped=True, **options):
    student = _tagger(5, "student", False)
    transfers = [kd.losses.SoftTargets(temperature=2.0), kd.losses.DIST()]
    if tapped:
        transfers.append(kd.Transfer(kd.losses.Hint(), "hidden", "hidden"))
        transfers.append(kd.Transfer(kd.losses.PKT(), "hidden", "hidden"))
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss=transfers,
        evaluate_distillation=True,
        run_eagerly=options.pop("eager", True),
    )
    logs = distiller.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, **options).history
    if y is not None:
        found = distiller.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
        logs.update({f"evaluate_{name}": [value] for name, value in found.items()})
    return logs


def _same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("eager", [True, False])
def test_a_cache_counts_what_its_teacher_counts(tagger, data, path, eager):
    x, y, valid = data
    live = _logs(tagger, x, y, eager=eager)
    _same(live, _logs(kd.teachers.CachedTeacher(path), x, y, eager=eager))
    # And padding would make a difference.
    z_t = tagger.predict(x, verbose=0).argmax(-1)
    z_s = _tagger(5, "student", False).predict(x, verbose=0).argmax(-1)
    assert abs((z_t == z_s)[valid].mean() - (z_t == z_s).mean()) > 0.02


def test_the_first_step_against_numpy(tagger, data, path):
    """The agreement over what the teacher masks nothing of."""
    x, _, valid = data
    z_t = tagger.predict(x, verbose=0)
    z_s = _tagger(5, "student", False).predict(x, verbose=0)
    distiller = kd.Distiller(_tagger(5, "student", False), kd.teachers.CachedTeacher(path))
    distiller.compile(
        keras.optimizers.SGD(0.0),
        # The first says that the outputs are classes, so that there is an agreement.
        distillation_loss=[kd.losses.SoftTargets(), kd.losses.LogitMSE()],
        run_eagerly=True,
    )
    logs = distiller.fit(x, batch_size=COUNT, verbose=0).history
    same = z_t.argmax(-1) == z_s.argmax(-1)
    np.testing.assert_allclose(logs["agreement"][0], same[valid].mean(), rtol=1e-6)
    gap = ((z_t - z_s) ** 2).mean(-1)
    np.testing.assert_allclose(logs["logit_mse"][0], gap[valid].mean(), rtol=1e-5)


def test_a_joined_dataset(tagger, data, path):
    tf = pytest.importorskip("tensorflow")
    x, y, _ = data
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    joined = kd.teachers.CachedTeacher(path).join(batches)
    _same(_logs(tagger, batches), _logs(kd.teachers.CachedTeacher(path), joined))


def test_the_most_probable_classes(tagger, data, tmp_path):
    x, y, _ = data
    cache.write(tagger, x, tmp_path / "cache", top_k=TAGS, dtype="float32")
    cached = kd.teachers.CachedTeacher(tmp_path / "cache")
    _same(_logs(tagger, x, y, tapped=False), _logs(cached, x, y, tapped=False))


def test_several_teachers_live_and_from_disk(tagger, data, path, tmp_path):
    """A position counts where none of them masks it."""
    x, y, valid = data
    other = _tagger(6, "other", False)
    cache.write(other, x, tmp_path / "other", dtype="float32")
    both = kd.teachers.CachedTeacher([tmp_path / "other", path])
    live = _logs([other, tagger], x, y, tapped=False)
    _same(live, _logs(both, x, y, tapped=False))
    ours = _tagger(5, "student", False).predict(x[:8], verbose=0)
    logits = np.log(
        sum(
            np.exp(z - np.log(np.exp(z).sum(-1, keepdims=True))) / 2
            for z in (m.predict(x[:8], verbose=0) for m in (other, tagger))
        )
    )
    distiller = kd.Distiller(_tagger(5, "student", False), [other, tagger])
    distiller.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    found = distiller.train_on_batch(x[:8], return_dict=True)["agreement"]
    same = logits.argmax(-1) == ours.argmax(-1)
    np.testing.assert_allclose(found, same[valid[:8]].mean(), rtol=1e-6)


def test_what_is_stored(path, data):
    _, _, valid = data
    manifest = read_manifest(path)
    assert manifest.layout.outputs[0].mask == (LENGTH,)
    assert manifest.layout.tap_masks == ((LENGTH,), (1, LENGTH, LENGTH), (LENGTH,))
    record = kd.teachers.CachedTeacher(path).fetch(np.arange(COUNT))
    np.testing.assert_array_equal(record["0/mask_0"], valid)
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    np.testing.assert_array_equal(record["0/tap_mask_1"], pairs)
    assert Layout.from_json(json.loads(json.dumps(manifest.layout.to_json()))) == manifest.layout
    assert cache.verify(path).complete
    assert cache.record_bytes((LENGTH, TAGS), masked=True) == LENGTH * TAGS * 2 + LENGTH
    assert cache.record_bytes((LENGTH, TAGS), top_k=2, masked=True) == LENGTH * 2 * 4 + LENGTH


def _of_version(path, version):
    """The manifest as that version wrote it: `mask` was not known."""
    file = path / layout.MANIFEST
    saved = layout.unsealed(file.read_text())
    saved["version"] = version
    for each in (*saved["layout"]["outputs"], *saved["layout"]["taps"]):
        each.pop("mask", None)
    file.write_text(layout.sealed(saved))


def test_a_cache_of_before_is_read_where_it_can_be_right(written, x, losses, classifier):
    """Rows have no masks; where there are positions nobody can tell what was masked."""
    classes = classifier(16, 1)
    before = losses(kd.teachers.CachedTeacher(written), x, np.zeros(200, int))
    _of_version(written, 3)
    assert losses(kd.teachers.CachedTeacher(written), x, np.zeros(200, int)) == before
    shards = [file.stat().st_mtime_ns for file in sorted(written.glob("records-*"))]
    manifest = cache.write(classes, x, written, dtype="float32", taps=["hidden"], shard_size=64)
    assert manifest.complete
    assert [f.stat().st_mtime_ns for f in sorted(written.glob("records-*"))] == shards
    assert layout.unsealed((written / layout.MANIFEST).read_text())["version"] == layout.VERSION


def test_a_cache_of_before_with_positions_is_refused(tagger, data, tmp_path):
    x = data[0]
    cache.write(tagger, x, tmp_path / "cache")
    _of_version(tmp_path / "cache", 3)
    with pytest.raises(ValueError, match=r"cache 3, which forgot .* Write the cache again"):
        kd.teachers.CachedTeacher(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"which forgot"):
        cache.write(tagger, x, tmp_path / "cache")
    assert Layout((Output((3,)),), (("map", (4, 4, 2)),)).may_be_masked
    assert not Layout((Output((3,)),), (("pooled", (4,)),)).may_be_masked
