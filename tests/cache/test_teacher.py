"""Training from a cache: the same as with the teacher, whatever feeds the data."""

import keras
import numpy as np
import pytest

import keras_kd as kd
from keras_kd import cache
from keras_kd.cache import samples, verification
from keras_kd.cache import teacher as cached_teacher
from keras_kd.cache.join_datasets import Joined
from keras_kd.teachers import CachedTeacher, Ensemble

_ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


def _same(found, expected, bound=1e-6):
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert np.abs(np.array(found[name]) - np.array(values)).max() <= bound, name


# ------------------------------------------------------------------------ arrays


@pytest.mark.parametrize(
    "options",
    [
        {
            "batch_size": 48,
            "shuffle": _ON_TENSORFLOW or "batch",
            "compile": {"run_eagerly": False},
        },
        {"shuffle": False, "class_weight": {0: 3.0, 1: 0.5}},
        {"batch_size": 200, "validation_split": 0.25},
        {"steps_per_epoch": 4, "shuffle": False},
    ],
    ids=["shuffled", "class_weight", "validation_split", "steps_per_epoch"],
)
def test_arrays_train_as_with_the_live_teacher(written, teacher, x, y, losses, options):
    _same(losses(CachedTeacher(written), x, y, **options), losses(teacher, x, y, **options))


def test_lists_of_inputs_and_of_labels_are_joined(tmp_path, x, y):
    inputs = [keras.Input((2,)), keras.Input((4,))]
    joined = keras.layers.Concatenate()(inputs)
    outputs = [keras.layers.Dense(5)(joined), keras.layers.Dense(1)(joined)]
    model = keras.Model(inputs, outputs, name="two")
    rows, labels = [x[:, :2], x[:, 2:]], [y, x[:, :1]]
    cache.write(model, rows, tmp_path / "c")
    data = CachedTeacher(tmp_path / "c").join_fit(rows, labels, 32, {"shuffle": False})[0]
    found = keras.tree.flatten(next(iter(data)) if _ON_TENSORFLOW else data[0])
    arrays = [keras.ops.convert_to_numpy(leaf) for leaf in found]
    for given in (*rows, *labels):
        assert any(np.array_equal(array, given[:32]) for array in arrays)


@pytest.mark.skipif(not _ON_TENSORFLOW, reason="of tf.data alone")
def test_arrays_are_read_without_the_autotuner_that_holds_epochs_back(written, x, y):
    data = CachedTeacher(written).join_fit(x, y, 32, {})[0]
    assert data.options().autotune.enabled is False


def test_weights_and_validation_data(written, teacher, x, y, losses):
    weight = np.linspace(0, 2, 200).astype("float32")
    options = {"sample_weight": weight, "validation_data": (x[:50], y[:50]), "shuffle": False}
    found = losses(CachedTeacher(written), x, y, **options)
    _same(found, losses(teacher, x, y, **options))
    assert "val_loss" in found


def test_no_labels(written, teacher, x, losses):
    _same(
        losses(CachedTeacher(written), x, loss=None, shuffle=False),
        losses(teacher, x, loss=None, shuffle=False),
    )


def test_taps_and_softmax_outputs(tmp_path, classifier, x, y, losses):
    model = classifier(16, 7, activation="softmax")
    cache.write(model, x.astype("float64"), tmp_path, dtype="float32", taps=["hidden"])

    def distillation():
        hint = kd.losses.Hint()
        return [
            kd.Transfer(hint, teacher="hidden", student="hidden", projector="linear"),
            kd.losses.SoftTargets(temperature=4.0),
        ]

    runs = [
        losses(t, x, y, shuffle=False, compile={"distillation_loss": distillation()})
        for t in (CachedTeacher(tmp_path), model)
    ]
    # A live tap and a stored one differ in the last bit, and the projector's draw is the same.
    _same(runs[0], runs[1], 1e-5)
    teacher = CachedTeacher(tmp_path)
    rows = np.arange(20)
    answer = teacher.answer(None, teacher.fetch(rows), [False])
    probabilities = model.predict(x[:20], verbose=0)
    assert np.allclose(keras.ops.convert_to_numpy(answer.output), probabilities, atol=1e-5)
    with pytest.raises(ValueError, match=r"`hiden` is not in the cache.*Did you mean `hidden`"):
        teacher.reset(["hiden"])


def test_row_numbers_reach_the_losses(written, x, y, classifier):
    seen = []

    class Spy(kd.losses.SoftTargets):
        def call(self, y_true, y_pred):
            seen.append(keras.ops.convert_to_numpy(self.indices))
            return super().call(y_true, y_pred)

    distiller = kd.Distiller(classifier(4, 2), CachedTeacher(written))
    distiller.compile(loss=None, distillation_loss=Spy(), run_eagerly=True)
    distiller.fit(x, batch_size=64, verbose=0)
    rows = np.concatenate([batch for batch in seen if len(batch)])[-200:]
    assert sorted(rows.tolist()) == list(range(200))
    assert rows.tolist() != list(range(200))


def test_evaluate_and_predict_need_no_cache(written, x, y, classifier):
    distiller = kd.Distiller(classifier(4, 2), CachedTeacher(written))
    distiller.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert np.isfinite(distiller.evaluate(x[:30], y[:30], verbose=0, return_dict=True)["loss"])
    assert distiller.predict(x[:30], verbose=0).shape == (30, 5)


def test_saved_distillers_take_the_cache_for_the_teacher(tmp_path, written, teacher, x, y, losses):
    cached = CachedTeacher(written, teacher=teacher)
    assert cached.fingerprint() == kd.teachers.fingerprint(teacher)
    student = keras.models.clone_model(teacher)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(loss=None)
    distiller.fit(x, verbose=0)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=cached)
    loaded.fit(x, verbose=0)
    assert isinstance(loaded.teacher, CachedTeacher)


# ------------------------------------------------------------------------- top K


def _numpy_from_top_k(logits, k):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    top = np.argsort(-p, -1)[..., :k]
    kept = np.take_along_axis(p, top, -1)
    rest = (1 - kept.sum(-1, keepdims=True)) / (p.shape[-1] - k)
    full = np.broadcast_to(rest, p.shape).copy()
    np.put_along_axis(full, top, kept, -1)
    return full


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_spreads_the_rest_evenly(tmp_path, temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 30)).astype("float32") * 3
    inputs = keras.Input((30,))
    cache.write(keras.Model(inputs, inputs), logits, tmp_path, top_k=5)
    teacher = CachedTeacher(tmp_path)
    rows = rng.permutation(64)
    answer = teacher.answer(None, teacher.fetch(rows), [False])
    z = keras.ops.convert_to_numpy(answer.logits[0]).astype("float64")
    expected = _numpy_from_top_k(logits[rows].astype("float64"), 5)
    assert np.allclose(np.exp(z), expected, rtol=5e-3, atol=1e-3)
    softened = np.exp(z / temperature)
    softened /= softened.sum(-1, keepdims=True)
    powered = expected ** (1 / temperature)
    powered /= powered.sum(-1, keepdims=True)
    assert np.allclose(softened, powered, rtol=2e-2, atol=1e-3)


def test_top_k_of_confident_and_of_all_classes():
    confident = np.array([[0.0, -30.0, -31.0]], "float16")
    z = keras.ops.convert_to_numpy(
        cached_teacher.from_top_k(confident, np.array([[3, 0, 7]], "int32"), 10)
    )
    assert np.isfinite(z).all()
    assert z[0, [3, 0, 7]].tolist() == [0.0, -30.0, -31.0]
    # No class is more probable than the least of those that were kept.
    assert (np.delete(z[0], [3, 0, 7]) == -31.0).all()
    every = keras.ops.convert_to_numpy(
        cached_teacher.from_top_k(
            np.log(np.array([[0.7, 0.2, 0.1]], "float32")), np.array([[2, 0, 1]], "int32"), 3
        )
    )
    assert np.allclose(np.exp(every), [[0.2, 0.1, 0.7]])
    tokens = np.log(np.array([[[0.6, 0.2], [0.5, 0.3]]], "float32"))
    z = keras.ops.convert_to_numpy(
        cached_teacher.from_top_k(tokens, np.array([[[0, 1], [2, 3]]], "int32"), 4)
    )
    assert np.allclose(np.exp(z), [[[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.5, 0.3]]], atol=1e-6)


def test_training_from_the_top_k(tmp_path, teacher, x, y, losses):
    cache.write(teacher, x, tmp_path, top_k=5, dtype="float32")
    found = losses(CachedTeacher(tmp_path), x, y, shuffle=False)
    _same(found, losses(teacher, x, y, shuffle=False), 1e-5)


# ---------------------------------------------------------------- several caches


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_caches_are_averaged_as_models_are(tmp_path, classifier, x, y, losses, combine):
    models = [classifier(8, 11), classifier(8, 12)]
    for i, model in enumerate(models):
        cache.write(model, x, tmp_path / str(i), dtype="float32", taps=["hidden"])
    paths = [tmp_path / "0", tmp_path / "1"]
    cached = CachedTeacher(paths, weights=[3, 1], combine=combine)
    ensemble = Ensemble(models, weights=[3, 1], combine=combine)
    assert cached.fingerprint() == ensemble.fingerprint()
    assert cached.taps() == [f"{model.name}/hidden" for model in models]
    _same(losses(cached, x, y, shuffle=False), losses(ensemble, x, y, shuffle=False))


def test_caches_that_do_not_belong_together(tmp_path, written, teacher, classifier, x):
    cache.write(teacher, x[::-1], tmp_path / "other_data")
    cache.write(classifier(4, 1, classes=3), x, tmp_path / "other_classes")
    for name, what in (("other_data", "data"), ("other_classes", "outputs")):
        with pytest.raises(ValueError, match=f"differ in their {what}"):
            CachedTeacher([written, tmp_path / name])
    with pytest.raises(ValueError, match=r"`weights` of 2 caches.*\[1.0, -1.0\]"):
        CachedTeacher([written, written], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match=r"`combine` of several caches"):
        CachedTeacher([written, written], combine="mean")
    with pytest.raises(ValueError, match=r"at least one cache"):
        CachedTeacher([])
    with pytest.raises(ValueError, match=r"compared with one cache"):
        CachedTeacher([written, written], teacher=teacher)


# ---------------------------------------------------------------------- datasets


class _Pages(keras.utils.PyDataset):
    def __init__(self, x, y, size, shuffled=False):
        super().__init__()
        self.x, self.y, self.size, self.shuffled = x, y, size, shuffled

    @property
    def num_batches(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return self.x[part], self.y[part]


def _batches(x, y, size, passes=1):
    for _ in range(passes):
        for i in range(0, len(x), size):
            yield x[i : i + size], y[i : i + size]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("shard", ["whole", "file"])
def test_tf_data(written, teacher, x, y, losses, batched, shard):
    tf = pytest.importorskip("tensorflow")
    samples = tf.data.Dataset.from_tensor_slices((x, y))
    data = samples.batch(48) if batched else samples
    if shard == "file":
        # As from files: neither the length nor the shape of a batch is known.
        spec = data.element_spec
        data = tf.data.Dataset.from_generator(lambda d=data: iter(d), output_signature=spec)
    joined = CachedTeacher(written).join(data)
    assert int(joined.cardinality()) == int(data.cardinality())

    def finish(dataset):
        # The seed of a shuffle comes from the global one at this moment, too.
        keras.utils.set_random_seed(5)
        return dataset if batched else dataset.shuffle(200, seed=1).batch(48)

    eager = {"run_eagerly": shard == "file"}
    found = losses(CachedTeacher(written), finish(joined), compile=eager)
    _same(found, losses(teacher, finish(data), compile=eager))


def test_samples_that_make_no_dense_batches_are_joined_one_by_one(written, x, y):
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((x, y))
    # Boxes, say: a number of their own in each sample.
    data = data.map(lambda x, y: (x, tf.range(y + 1)))
    cached = CachedTeacher(written)
    for row, (joined, boxes) in enumerate(cached.join(data).take(70)):
        assert int(joined.record["indices"]) == row
        assert np.array_equal(joined.x, x[row])
        assert len(boxes) == y[row] + 1


def test_a_dataset_that_changes_after_its_first_pass_is_found(written, x, y):
    tf = pytest.importorskip("tensorflow")
    cached = CachedTeacher(written)
    calls = []

    def samples():
        calls.append(None)
        # The first look and the first pass are in order, the others are not.
        return iter(zip(x, y) if len(calls) <= 2 else zip(x[::-1], y[::-1]))

    spec = (tf.TensorSpec((6,), tf.float32), tf.TensorSpec((), tf.int64))
    joined = cached.join(tf.data.Dataset.from_generator(samples, output_signature=spec).batch(32))
    assert sum(len(labels) for _, labels in joined) == 200
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"row \d+ is another sample"):
        for _ in joined:
            pass


def test_pydataset_and_generator(written, teacher, x, y, losses):
    cached = CachedTeacher(written)
    live = losses(teacher, _Pages(x, y, 48), shuffle=False)
    _same(losses(cached, cached.join(_Pages(x, y, 48)), shuffle=False), live)
    generated = cached.join(_batches(x, y, 48, passes=4))
    _same(losses(cached, generated, steps_per_epoch=5), live)


def test_validation_with_a_cache_of_its_own(tmp_path, written, teacher, x, y, losses):
    tf = pytest.importorskip("tensorflow")
    cache.write(teacher, x[:64], tmp_path, dtype="float32", taps=["hidden"])
    data = tf.data.Dataset.from_tensor_slices((x[:64], y[:64])).batch(32)
    options = {"shuffle": False, "compile": {"evaluate_distillation": True}}
    found = losses(
        CachedTeacher(written), x, y, validation_data=CachedTeacher(tmp_path).join(data), **options
    )
    expected = losses(teacher, x, y, validation_data=data, **options)
    _same(found, expected)
    assert "val_distillation_loss" in found


def test_validation_arrays_need_a_cache_of_their_own(written, x, y, losses):
    options = {"validation_data": (x[:50], y[:50]), "compile": {"evaluate_distillation": True}}
    message = r"The data have 50 samples.*write a cache of them and pass `CachedTeacher\(path\)"
    with pytest.raises(ValueError, match=message):
        losses(CachedTeacher(written), x, y, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"validation_split": 0.25, "validation_batch_size": 20},
        {"validation_split": 0.25, "sample_weight": np.linspace(0, 2, 200).astype("float32")},
        {"validation_data": "rows"},
        {"validation_data": "weighted rows", "validation_batch_size": 50},
    ],
    ids=["split", "weighted split", "data", "weighted data"],
)
def test_validation_on_rows_of_the_cache_asks_it(written, teacher, x, y, losses, options):
    weight = np.linspace(2, 0, 200).astype("float32")
    rows = {"rows": (x, y), "weighted rows": (x, y, weight)}
    if "validation_data" in options:
        options = {**options, "validation_data": rows[options["validation_data"]]}
    options = {**options, "shuffle": False, "compile": {"evaluate_distillation": True}}
    found = losses(CachedTeacher(written), x, y, **options)
    _same(found, losses(teacher, x, y, **options))
    assert "val_distillation_loss" in found


def test_evaluation_of_the_cached_arrays_asks_the_cache(written, teacher, classifier, x, y):
    results = []
    for each in (teacher, CachedTeacher(written)):
        distiller = kd.Distiller(classifier(4, 2), each)
        distiller.compile(
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            evaluate_distillation=True,
            run_eagerly=True,
        )
        weight = np.linspace(0, 2, 200).astype("float32")
        results.append(
            distiller.evaluate(x, y, 48, sample_weight=weight, return_dict=True, verbose=0)
        )
    _same(results[1], results[0])
    with pytest.raises(ValueError, match="row 3 is another sample"):
        distiller.evaluate(np.where(np.arange(200)[:, None] == 3, 9.0, x), y, verbose=0)


def test_a_cache_of_views_has_no_answers_to_the_data_as_they_are(tmp_path, teacher, x, y, losses):
    def shifted(sample, seed):
        return sample + np.float32(seed % 7)

    cache.write(teacher, x, tmp_path, augment=shifted, epochs=2)
    for options in ({"validation_data": (x, y)}, {"validation_split": 0.25}):
        with pytest.raises(ValueError, match="holds its answers to augmented views"):
            losses(
                CachedTeacher(tmp_path), x, y, compile={"evaluate_distillation": True}, **options
            )


def test_an_unjoined_dataset_is_refused_with_advice(written, x, y, classifier):
    distiller = kd.Distiller(classifier(4, 2), CachedTeacher(written))
    distiller.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = distiller.student.get_weights()
    unjoined = [_Pages(x, y, 48), _batches(x, y, 48)]
    if _ON_TENSORFLOW:
        import tensorflow as tf

        unjoined.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(48))
    for data in unjoined:
        with pytest.raises(ValueError, match=r"Join the dataset .*`cached.join\(dataset\)`"):
            distiller.fit(data, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, distiller.student.get_weights()))


def test_a_shuffled_or_other_dataset_is_refused(written, x, y):
    tf = pytest.importorskip("tensorflow")
    cached = CachedTeacher(written)
    samples = tf.data.Dataset.from_tensor_slices((x, y))
    other = r"row 0 is another sample.*join them before shuffling"
    for data in (
        samples.shuffle(200, seed=1),
        samples.shuffle(200, seed=1).batch(32),
        _Pages(x[::-1], y, 32),
    ):
        with pytest.raises(ValueError, match=other):
            cached.join(data)
    with pytest.raises(ValueError, match=other):
        next(cached.join(_batches(x[::-1], y, 32)))
    with pytest.raises(ValueError, match=r"have 150 samples, and the cache .* has 200"):
        cached.join(samples.take(150))
    with pytest.raises(ValueError, match=r"answers inputs of the form"):
        cached.join(samples.map(lambda x, y: (x[:5], y)).batch(32))
    with pytest.raises(ValueError, match=r"has 4 batches of 48 samples, and the cache"):
        cached.join(_Pages(x[:190], y, 48))
    with pytest.raises(ValueError, match=r"have 96 samples, and the cache .* has 200"):
        list(cached.join(_batches(x[:96], y, 48)))
    with pytest.raises(TypeError, match=r"arrays go to `fit` as they are"):
        cached.join(x)


def test_rows_that_are_missing_or_swapped_are_found_on_the_way(written, x, y):
    tf = pytest.importorskip("tensorflow")
    cached = CachedTeacher(written)
    swapped = x.copy()
    swapped[[150, 151]] = x[[151, 150]]
    for data, match in (
        (tf.data.Dataset.from_tensor_slices((swapped, y)).batch(32), "row 150 is another"),
        (tf.data.Dataset.from_tensor_slices((x[:198], y[:198])).batch(32), "have 198 samples"),
        (
            tf.data.Dataset.from_tensor_slices((np.tile(x, (2, 1)),)).batch(32).prefetch(1),
            "more samples",
        ),
    ):
        joined = cached.join(data)
        with pytest.raises(tf.errors.InvalidArgumentError, match=match):
            for _ in joined:
                pass
    with pytest.raises(ValueError, match=r"has 4 batches of 32 samples, and the cache"):
        cached.join(tf.data.Dataset.from_tensor_slices((x[:128], y[:128])).batch(32))
    # Taking fewer on purpose is no mistake.
    whole = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    assert len(list(cached.join(whole).take(2))) == 2
    assert len(list(cached.join(whole).repeat(3))) == 21


@pytest.mark.parametrize("form", ["known length", "unknown length", "by sample"])
def test_all_rows_are_compared_once_and_one_of_each_batch_after_that(
    written, x, y, monkeypatch, form
):
    tf = pytest.importorskip("tensorflow")
    cached = CachedTeacher(written)
    data = tf.data.Dataset.from_tensor_slices((x, y))
    if form != "by sample":
        data = data.batch(50)
    if form == "unknown length":
        data = data.filter(lambda *_: True)
    # As Keras reads a dataset of known length, which never asks for its end.
    joined = cached.join(data)
    if form == "by sample":
        joined = joined.batch(50)
    seen, compared = [], verification.require_inputs

    def spy(cache, inputs, row):
        seen.append((row, len(inputs[0])))
        return compared(cache, inputs, row)

    monkeypatch.setattr(verification, "require_inputs", spy)
    asks = form == "unknown length"
    for whole in (True, False, False):
        seen.clear()
        elements = iter(joined)
        for _ in range(4):
            next(elements)
        if asks:
            assert next(elements, None) is None
        assert len(seen) == (1 if form == "by sample" else 4)
        if whole:
            assert sum(count for _, count in seen) == 200
        else:
            assert all(count == 1 for _, count in seen)


@pytest.mark.parametrize("batched", [True, False])
def test_a_dataset_that_keeps_what_it_read_is_read_once(written, x, batched):
    tf = pytest.importorskip("tensorflow")
    reads = []

    def read(sample):
        reads.append(sample)
        return sample

    data = tf.data.Dataset.from_tensor_slices(x)
    data = data.map(lambda v: tf.ensure_shape(tf.numpy_function(read, [v], v.dtype), v.shape))
    # It keeps nothing unless it is asked for its end.
    data = data.batch(50).cache() if batched else data.cache()
    joined = CachedTeacher(written).join(data)
    reads.clear()
    for _ in range(3):
        assert len(list(joined)) == (4 if batched else 200)
    assert len(reads) == 200


def test_other_arrays_are_refused(written, x, y, losses):
    cached = CachedTeacher(written)
    changed = x.copy()
    changed[123, 2] += 1e-3
    for data, match in (
        (x[:100], "have 100 samples, and the cache .* has 200"),
        (x[::-1], "row 0 is another sample"),
        (changed, "row 123 is another sample"),
        # The student is looked at first.
        (x[:, :5], r"the student .* reads inputs of shape \(None, 6\)"),
        (x[:, None], "answers inputs of the form"),
    ):
        with pytest.raises(ValueError, match=match):
            losses(cached, data, y[: len(data)])
    with pytest.raises(ValueError, match=r"`validation_split` leaves no rows"):
        losses(cached, x, y, validation_split=0.9999)


# ------------------------------------------------------------------------- views


def _jitter(sample, seed):
    return sample + np.random.default_rng(seed).normal(size=sample.shape).astype("float32")


def test_training_replays_the_views(tmp_path, classifier, teacher, x, y):
    cache.write(teacher, x, tmp_path, dtype="float32", augment=_jitter, epochs=2)
    seen = []

    def spy(batch):
        seen.append(keras.ops.convert_to_numpy(batch))
        return batch

    # The process that wrote it knows the function; any other is told.
    cached = CachedTeacher(tmp_path)
    assert cached.augment is _jitter
    distiller = kd.Distiller(classifier(4, 2), cached, student_inputs=spy)
    distiller.compile(loss=None, run_eagerly=True)
    history = distiller.fit(x, epochs=3, batch_size=200, shuffle=False, verbose=0).history
    views = [cached.view(x, np.arange(200), epoch) for epoch in range(2)]
    trained = [batch for batch in seen if len(batch) == 200][-3:]
    for batch, epoch in zip(trained, (0, 1, 0)):
        assert np.array_equal(batch, views[epoch])

    live = kd.Distiller(classifier(4, 2), teacher)
    live.compile(loss=None)
    for epoch in range(3):
        logs = live.fit(views[epoch % 2], batch_size=200, shuffle=False, verbose=0).history
        assert abs(logs["loss"][0] - history["loss"][epoch]) < 1e-6

    tf = pytest.importorskip("tensorflow")
    again = kd.Distiller(classifier(4, 2), cached)
    again.compile(loss=None)
    data = cached.join(tf.data.Dataset.from_tensor_slices(x).batch(200))
    logs = again.fit(data, epochs=3, verbose=0).history
    assert np.allclose(logs["loss"], history["loss"], atol=1e-6)
    element = next(iter(data))
    assert isinstance(element[0], Joined)


@pytest.mark.parametrize("form", ["finite", "repeat", "prefetch", "half epochs"])
def test_epoch_e_shows_view_e(tmp_path, classifier, teacher, x, form):
    tf = pytest.importorskip("tensorflow")
    cache.write(teacher, x, tmp_path, dtype="float32", augment=_jitter, epochs=3)
    cached = CachedTeacher(tmp_path)
    data = cached.join(tf.data.Dataset.from_tensor_slices(x).batch(50))
    steps = {"half epochs": 2}.get(form, 4)
    if form != "finite":
        data = data.repeat()
    if form == "prefetch":
        data = data.prefetch(3)
    seen = []

    def spy(batch):
        if len(batch) == 50:
            seen.append(keras.ops.convert_to_numpy(batch))
        return batch

    distiller = kd.Distiller(classifier(4, 2), cached, student_inputs=spy)
    distiller.compile(loss=None, run_eagerly=True)
    seen.clear()
    for _ in range(2):
        distiller.fit(data, epochs=6, steps_per_epoch=steps, verbose=0)
        trained = seen[-6 * steps :]
        for i, batch in enumerate(trained):
            epoch, rows = (i // 4) % 3, np.arange(50 * (i % 4), 50 * (i % 4) + 50)
            assert np.array_equal(batch, cached.view(x[rows], rows, epoch)), (i, epoch)
        seen.clear()


def test_the_augmentation_must_be_that_of_the_cache(tmp_path, written, teacher, x, losses):
    cache.write(teacher, x, tmp_path, augment=_jitter, epochs=2)

    def other(sample, seed):
        return sample

    with pytest.raises(ValueError, match=r"written with the augmentation `_jitter`.*Received"):
        CachedTeacher(tmp_path, augment=other)
    other.__qualname__ = "_jitter"
    with pytest.raises(ValueError, match=r"`_jitter` gives another view of row 0"):
        losses(CachedTeacher(tmp_path, augment=other), x, loss=None)

    def but_row_0(sample, seed):
        return _jitter(sample, seed) * (1 if (sample == x[0]).all() else 2)

    but_row_0.__qualname__ = "_jitter"
    cached = CachedTeacher(tmp_path, augment=but_row_0)
    with pytest.raises(ValueError, match=r"`_jitter` gives another view of row [1-9]"):
        losses(cached, x, loss=None)

    def seldom(sample, seed):
        return _jitter(sample, seed) * (2 if (sample == x[2]).all() else 1)

    # Not among the rows that are looked at before, but when it is shown.
    seldom.__qualname__ = "_jitter"
    with pytest.raises(Exception, match=r"`_jitter` gives another view of row 2"):
        losses(CachedTeacher(tmp_path, augment=seldom), x, loss=None)
    samples.written_here.clear()
    with pytest.raises(ValueError, match=r"functions are not saved. Pass it"):
        CachedTeacher(tmp_path)
    with pytest.raises(ValueError, match=r"written without augmentation"):
        CachedTeacher(written, augment=_jitter)
