"""CRD with memory banks: the formula, what moves when, and the row numbers it needs."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy import special

import keras_kd
from keras_kd import losses

SAMPLES, NEGATIVES, WIDTH = 20, 6, 4
INDICES = np.array([3, 0, 7, 19, 5])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def built(rng, **options):
    """A loss with fixed draws, and one batch of features."""
    options = {"reduction": None, "dtype": "float64", **options}
    loss = losses.CRD(samples=SAMPLES, negatives=NEGATIVES, width=WIDTH, **options)
    loss.build((None, 6), (None, 3))
    drawn = rng.integers(0, SAMPLES, (5, NEGATIVES))
    fixed = ops.convert_to_tensor(np.column_stack([INDICES, drawn]).astype("int32"))
    loss.draws = lambda indices: fixed
    return loss, np.array(fixed), rng.normal(size=(5, 6)), rng.normal(size=(5, 3))


def embedded(loss, side, features):
    kernel, bias = loss.embeddings[side].get_weights()
    return unit(features @ kernel + bias)


def expected(anchors, bank, drawn, constant=None):
    """The reference's loss of one side, and its constant."""
    p = np.exp(np.einsum("bd,bkd->bk", anchors, bank[drawn]) / 0.07)
    constant = p.mean() * SAMPLES if constant is None else constant
    p, noise = p / constant, NEGATIVES / SAMPLES
    positive = np.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
    negative = np.log(noise / (p[:, 1:] + noise + 1e-7)).sum(1)
    return -positive - negative, constant


@pytest.fixture
def rng():
    keras.utils.set_random_seed(1)
    return np.random.default_rng(1)


def test_value_is_the_formula_and_the_first_batch_sets_the_constant(rng):
    loss, drawn, teacher, student = built(rng)
    banks = [np.array(bank.bank) for bank in loss.banks]
    ours, z_ours = expected(embedded(loss, 1, student), banks[0], drawn)
    theirs, z_theirs = expected(embedded(loss, 0, teacher), banks[1], drawn)
    value = loss(teacher, student, indices=INDICES, training=True)
    np.testing.assert_allclose(value, ours + theirs, rtol=1e-6)
    for bank, constant in zip(loss.banks, (z_ours, z_theirs)):
        np.testing.assert_allclose(float(bank.log_constant), np.log(constant), rtol=1e-6)
    # The banks have moved by now, the constants stay.
    banks = [np.array(bank.bank) for bank in loss.banks]
    student = student + 1.0
    ours, _ = expected(embedded(loss, 1, student), banks[0], drawn, z_ours)
    theirs, _ = expected(embedded(loss, 0, teacher), banks[1], drawn, z_theirs)
    value = loss(teacher, student, indices=INDICES, training=True)
    np.testing.assert_allclose(value, ours + theirs, rtol=1e-6)


def test_banks_move_in_training_alone(rng):
    loss, _, teacher, student = built(rng)
    before = [np.array(bank.bank) for bank in loss.banks]
    loss(teacher, student, indices=INDICES)
    for bank, old in zip(loss.banks, before):
        np.testing.assert_array_equal(np.array(bank.bank), old)
        assert float(bank.constant_is_set) == 0.0
    loss(teacher, student, indices=INDICES, training=True)
    for side, features in enumerate((teacher, student)):
        new = np.array(loss.banks[side].bank)
        moved = unit(0.5 * before[side][INDICES] + 0.5 * embedded(loss, side, features))
        np.testing.assert_allclose(new[INDICES], moved, rtol=1e-6)
        others = np.setdiff1d(np.arange(SAMPLES), INDICES)
        np.testing.assert_array_equal(new[others], before[side][others])


def test_gradient_reaches_student_and_embeddings(rng, gradient):
    loss, _, teacher, student = built(rng, reduction="sum")
    found = gradient(lambda s: loss(teacher, s, indices=INDICES), student)
    assert np.isfinite(found).all()
    assert (np.abs(found).max(-1) > 1e-3).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precision_is_finite(rng, dtype):
    loss, _, teacher, student = built(rng, dtype=dtype)
    for _ in range(2):
        value = loss(100 * teacher, student, indices=INDICES, training=True)
        assert np.isfinite(ops.convert_to_numpy(ops.cast(value, "float32"))).all()


def test_row_numbers_are_asked_for():
    loss = losses.CRD(samples=SAMPLES)
    assert loss.reads_indices
    assert not losses.CRD().reads_indices
    with pytest.raises(ValueError, match="row numbers"):
        loss(np.ones((2, 3)), np.ones((2, 3)))


def test_draws_are_rows_of_the_data_with_the_own_row_first():
    loss = losses.CRD(samples=SAMPLES, negatives=500, width=WIDTH)
    loss.build((None, 6), (None, 3))
    drawn = ops.convert_to_numpy(loss.draws(ops.convert_to_tensor(INDICES.astype("int32"))))
    assert drawn.shape == (5, 501)
    np.testing.assert_array_equal(drawn[:, 0], INDICES)
    assert set(drawn[:, 1:].ravel()) == set(range(SAMPLES))


def test_memory_is_no_trainable_weight():
    transfer = keras_kd.Transfer(losses.CRD(samples=SAMPLES, negatives=NEGATIVES, width=WIDTH))
    transfer.build((None, 6), (None, 3))
    assert len(transfer.trainable_weights) == 4
    banks = [w for w in transfer.non_trainable_weights if w.shape == (SAMPLES, WIDTH)]
    assert len(banks) == 2


@pytest.mark.parametrize(
    "options", [{"momentum": 1.0}, {"samples": 0}, {"negatives": 0}, {"contrast": 0}, {"width": 0}]
)
def test_bad_arguments_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        losses.CRD(**options)


def test_in_batch_finds_its_own_pair():
    """Perfectly aligned embeddings that are far apart have next to no loss."""
    loss = losses.CRD(width=3, dtype="float64")
    loss.build((None, 3), (None, 3))
    for layer in loss.layers:
        layer.set_weights([np.eye(3), np.zeros(3)])
    assert float(loss(np.eye(3), 5 * np.eye(3))) < 1e-5
    worst = float(loss(np.eye(3), np.roll(np.eye(3), 1, 0)))
    expected = 2 * (special.logsumexp([1 / 0.07, 0, 0]))
    assert worst == pytest.approx(expected)


# ------------------------------------------------------------------ in a distiller


class Seen(losses.Hint):
    """Reads row numbers and books them, in eager steps."""

    reads_indices = True
    batches = ()

    def call(self, y_true, y_pred):
        self.batches.append((ops.convert_to_numpy(self.indices), ops.convert_to_numpy(y_pred)))
        return super().call(y_true, y_pred)


def network(name, width):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(width, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="top")(hidden), name=name)


def data(count=SAMPLES):
    generator = np.random.default_rng(0)
    return generator.normal(size=(count, 4)).astype("float32"), generator.integers(0, 3, count)


def with_banks(teacher, samples=SAMPLES, loss=None, **compiled):
    keras.utils.set_random_seed(4)
    distiller = keras_kd.Distiller(network("student", 3), teacher)
    loss = loss or losses.CRD(samples=samples, negatives=NEGATIVES, width=WIDTH)
    distiller.compile(
        keras.optimizers.SGD(0.05),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss=keras_kd.Transfer(loss, "hidden", "hidden"),
        **compiled,
    )
    return distiller


def memories(distiller):
    loss = distiller.transfers[0].loss
    return [np.array(bank.bank) for bank in loss.banks]


def test_banks_with_a_live_teacher_equal_those_with_a_cached_one(tmp_path):
    x, y = data()
    teacher = network("teacher", 6)
    keras_kd.cache.write(teacher, x, tmp_path / "cache", dtype="float32", taps=["hidden"])
    runs = []
    for source in (teacher, keras_kd.teachers.CachedTeacher(tmp_path / "cache")):
        distiller = with_banks(source)
        keras.utils.set_random_seed(9)
        history = distiller.fit(x, y, batch_size=8, epochs=2, shuffle=True, verbose=0).history
        runs.append((memories(distiller), history["crd"]))
    (live, logs), (cached, cached_logs) = runs
    for one, other in zip(live, cached):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logs, cached_logs, rtol=1e-4)


def tf_dataset(x, y, number=True):
    import tensorflow as tf

    rows = tf.data.Dataset.from_tensor_slices((x, y)).enumerate()
    if number:
        rows = rows.map(lambda i, sample: (keras_kd.teachers.Numbered(sample[0], i), sample[1]))
    else:
        rows = rows.map(lambda i, sample: sample)
    return rows.shuffle(SAMPLES, seed=1).batch(8)


def py_dataset(x, y, number=True):
    class Batches(keras.utils.PyDataset):
        num_batches = 3

        def __getitem__(self, i):
            rows = np.arange(SAMPLES)[::-1][8 * i : 8 * i + 8]
            inputs = keras_kd.teachers.Numbered(x[rows], rows) if number else x[rows]
            return inputs, y[rows]

    return Batches()


def generator(x, y, number=True):
    batches = py_dataset(x, y, number)
    return (batches[i] for i in range(3))


@pytest.mark.parametrize("unlabeled", [False, True])
@pytest.mark.parametrize("kind", ["arrays", "numbered", tf_dataset, py_dataset, generator])
def test_every_row_comes_with_its_number(kind, unlabeled):
    x, y = data()
    teacher = network("teacher", 3)
    loss = Seen()
    Seen.batches = []
    distiller = with_banks(teacher, loss=loss, run_eagerly=True)
    distiller.optimizer.learning_rate = 0.0
    if unlabeled:
        distiller.compile("sgd", distillation_loss=distiller.transfers[0], run_eagerly=True)
        distiller.optimizer.learning_rate = 0.0
    if kind in ("arrays", "numbered"):
        rows = np.arange(SAMPLES)
        inputs = x if kind == "arrays" else keras_kd.teachers.Numbered(x, rows)
        given = (inputs,) if unlabeled else (inputs, y)
        options = {"batch_size": 8, "shuffle": True}
    else:
        given, options = (kind(x, y),), {}
    distiller.fit(*given, verbose=0, **options)
    indices = np.concatenate([each for each, _ in Seen.batches])
    features = np.concatenate([each for _, each in Seen.batches])
    assert sorted(indices) == list(range(SAMPLES))
    assert list(indices) != sorted(indices)
    hidden = keras.Model(distiller.student.input, distiller.student.get_layer("hidden").output)
    np.testing.assert_allclose(features, hidden.predict(x, verbose=0)[indices], rtol=1e-5)


def test_weights_validation_and_prediction_of_numbered_arrays():
    x, y = data()
    distiller = with_banks(network("teacher", 6), metrics=["accuracy"], run_eagerly=True)
    history = distiller.fit(
        x, y, sample_weight=np.ones(SAMPLES), validation_split=0.2, verbose=0
    ).history
    assert {"crd", "val_accuracy"} <= set(history)
    numbered = keras_kd.teachers.Numbered(x, np.arange(SAMPLES))
    np.testing.assert_allclose(
        distiller.predict(numbered, verbose=0), distiller.predict(x, verbose=0), rtol=1e-5
    )
    assert distiller.evaluate(numbered, y, verbose=0) == distiller.evaluate(x, y, verbose=0)
    before = memories(distiller)
    distiller.train_on_batch(keras_kd.teachers.Numbered(x[:4], np.arange(4)), y[:4])
    for old, new in zip(before, memories(distiller)):
        assert np.abs(old - new)[:4].max() > 0
        np.testing.assert_array_equal(old[4:], new[4:])


@pytest.mark.parametrize("kind", [tf_dataset, py_dataset, generator])
def test_unnumbered_data_are_refused_with_advice(kind):
    x, y = data()
    distiller = with_banks(network("teacher", 6), run_eagerly=True)
    with pytest.raises(ValueError, match=r"`crd` remembers every row.*Numbered\(x, indices\)"):
        distiller.fit(kind(x, y, number=False), verbose=0)
    assert int(distiller.optimizer.iterations) == 0


def test_other_misuse_is_refused():
    import tensorflow as tf

    x, y = data()
    distiller = with_banks(network("teacher", 6), samples=SAMPLES - 5)
    with pytest.raises(ValueError, match=r"samples=15 rows.*from 0 to 19.*`samples=20`"):
        distiller.fit(x, y, verbose=0)
    distiller = with_banks(network("teacher", 6), evaluate_distillation=True)
    with pytest.raises(ValueError, match="bring no row numbers"):
        distiller.fit(x, y, validation_data=(x, y), verbose=0)
    with pytest.raises(ValueError, match="bring no row numbers"):
        distiller.train_on_batch(x, y)
    with pytest.raises(ValueError, match="bring no row numbers"):
        distiller.evaluate(x, y, verbose=0)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(5).enumerate()
    batches = batches.map(lambda i, b: (keras_kd.teachers.Numbered(b[0], i), b[1]))
    with pytest.raises(ValueError, match="one row number for a whole batch"):
        distiller.fit(batches, verbose=0)
