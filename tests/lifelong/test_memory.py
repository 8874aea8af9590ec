"""What a memory keeps, against the algorithms written out."""

import collections

import numpy as np
import pytest
from small_streams import rows

from keras_kd.lifelong import Memory, herding
from keras_kd.lifelong.memory import Slots


def test_reservoir_draws_as_the_algorithm_says():
    """Slot of row `n`: `randint(0, n)` with `n` in it, kept where it is below the capacity."""
    x, y = np.arange(60.0)[:, None], np.zeros(60, int)
    memory = Memory(7, seed=5)
    for part in (slice(0, 10), slice(10, 60)):
        memory.add(x[part], y[part])
    rng, kept = np.random.default_rng(5), list(range(7))
    for n in range(7, 60):
        slot = int(rng.integers(0, n + 1))
        if slot < 7:
            kept[slot] = n
    assert memory.x[:, 0].tolist() == kept


def test_reservoir_keeps_each_row_as_likely():
    """With `randint` exclusive of the last, row `M` would always be kept."""
    counts = np.zeros(9)
    for seed in range(900):
        slots, held = Slots("reservoir", 3, np.random.default_rng(seed)), {}
        for row in range(9):
            slot = slots.place(0)
            if slot >= 0:
                held[slot] = row
        counts[list(held.values())] += 1
    # Of 900 draws with probability a third; the standard deviation is 14.
    assert np.abs(counts - 300).max() < 60


def test_balanced_keeps_classes_even_whatever_their_order():
    y = np.repeat([0, 1, 2], [400, 40, 8])
    memory = Memory(24, policy="balanced", seed=1)
    memory.add(np.arange(448.0)[:, None], y)
    assert np.bincount(memory.y).tolist() == [8, 8, 8]
    # Within the class that was once the largest every row is as likely.
    late = [
        np.mean(m.x[m.y == 0] >= 200)
        for m in (Memory(8, policy="balanced", seed=s) for s in range(80))
        if m.add(np.arange(400.0)[:, None], np.zeros(400, int)) is None
    ]
    assert abs(np.mean(late) - 0.5) < 0.1


def written_out(features, count):
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, chosen = features.mean(0), []
    for k in range(1, count + 1):
        total = sum((features[i] for i in chosen), np.zeros(features.shape[1]))
        distance = {
            i: np.linalg.norm(mean - (features[i] + total) / k)
            for i in range(len(features))
            if i not in chosen
        }
        chosen.append(min(distance, key=distance.get))
    return chosen


def test_herding_follows_the_running_mean_of_normalized_features():
    features = np.random.default_rng(0).normal(size=(12, 3)) * np.arange(1, 13)[:, None]
    assert herding(features, 7).tolist() == written_out(features, 7)
    assert herding(features, 4).tolist() == written_out(features, 7)[:4]
    assert herding(features, 99).tolist() == written_out(features, 12)
    # Lengths count for nothing.
    assert herding(features * np.arange(12, 0, -1)[:, None], 7).tolist() == written_out(features, 7)


def test_truncation_keeps_the_order_of_herding():
    x, y = rows(40, classes=4)
    features = np.random.default_rng(1).normal(size=(40, 3))
    memory = Memory(12, policy="herding")
    first = y < 2
    memory.add(x[first], y[first], features=features[first])
    assert np.bincount(memory.y).tolist() == [6, 6]
    memory.add(x[~first], y[~first], features=features[~first])
    assert np.bincount(memory.y).tolist() == [3, 3, 3, 3]
    for label in range(4):
        mine = np.flatnonzero(y == label)
        best = mine[written_out(features[mine], 3)]
        np.testing.assert_array_equal(memory.x[memory.y == label], x[best])


def test_herding_shares_a_class_that_comes_back():
    x, y = rows(24, classes=2)
    memory = Memory(9, policy="herding")
    memory.add(x[:12], y[:12])
    memory.add(x[12:], y[12:])
    assert np.bincount(memory.y).tolist() == [5, 4]
    old = {r.tobytes() for r in x[:12]}
    assert sum(r.tobytes() in old for r in memory.x) == 3 + 2


def test_bytes_bound_rows_labels_and_logits():
    x, y = rows(400)
    assert len(Memory(bytes=1000)) == 0
    plain = Memory(bytes=1000)
    plain.add(x, y)
    assert len(plain) == 1000 // (4 * 4 + 8)
    assert plain.nbytes == len(plain) * 24
    memory = Memory(bytes=1000, seed=2)
    memory.add(x, y, logits=np.ones((400, 2)))
    assert len(memory) == 1000 // (16 + 8 + 8 + 4)
    memory.add(x, y, logits=np.full((400, 6), 2.0))
    assert len(memory) == 1000 // (16 + 8 + 24 + 4)
    assert memory.nbytes <= 1000
    # Rows of the first call know two columns, and zeros stand in the others.
    early = memory.known == 2
    assert set(memory.known) == {2, 6}
    assert (memory.logits[early] == [1, 1, 0, 0, 0, 0]).all()
    assert (memory.logits[~early] == 2).all()


def test_logits_move_to_the_columns_of_a_grown_head():
    memory = Memory(4)
    memory.add(np.zeros((4, 2)), np.zeros(4, int), logits=np.tile([1.0, 2.0], (4, 1)))
    memory.spread([1, 3], 5)
    assert memory.logits[0].tolist() == [0, 1, 0, 2, 0]


def test_a_memory_goes_on_from_its_file(tmp_path):
    x, y = rows(100)
    for policy in ("reservoir", "balanced", "herding"):
        one = Memory(10, policy=policy, seed=3)
        one.add(x[:50], y[:50])
        one.save(tmp_path / "memory.npz")
        other = Memory.load(tmp_path / "memory.npz")
        for memory in (one, other):
            memory.add(x[50:], y[50:])
        np.testing.assert_array_equal(one.x, other.x)
        assert collections.Counter(one.y.tolist()) == collections.Counter(other.y.tolist())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "`samples` or by `bytes`"),
        ({"samples": 5, "bytes": 5}, ValueError, "`samples` or by `bytes`"),
        ({"samples": 0}, ValueError, "at least 1"),
        ({"samples": 2.5}, TypeError, "whole number"),
        ({"samples": 5, "policy": "reservoire"}, ValueError, "Did you mean 'reservoir'"),
        ({"samples": 5, "seed": -1}, ValueError, "`seed` is at least 0"),
        ({"samples": 5, "seed": 1.5}, TypeError, "`seed` is a whole number"),
    ],
)
def test_bad_bounds(arguments, error, message):
    with pytest.raises(error, match=message):
        Memory(**arguments)


def test_bad_rows_leave_the_memory_as_it_was(tmp_path):
    x, y = rows()
    memory = Memory(10)
    memory.add(x, y)
    before = memory.x.copy()
    for bad, message in (
        ((x[:, :3], y), "shape"),
        ((x.astype("float64"), y), "dtype"),
        ((x, y, np.zeros((48, 3))), "without logits"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.add(*bad)
    herds = Memory(bytes=400, policy="herding")
    herds.add(x, y, np.zeros((48, 2)))
    held = herds.x.copy()
    for features, message in (
        (np.full((48, 2), np.nan), "`features` holds NaN"),
        (np.zeros((3, 2)), "48 rows and 3 rows of features"),
        (np.zeros(48), r"`\(samples, width\)`"),
    ):
        with pytest.raises(ValueError, match=message):
            # More logits a row, so that fewer rows would fit.
            herds.add(x, y, np.zeros((48, 6)), features=features)
        np.testing.assert_array_equal(herds.x, held)
    with pytest.raises(ValueError, match="`logits` holds NaN"):
        herds.add(x, y, np.full((48, 2), np.nan))
    with pytest.raises(ValueError, match="`count` is at least 0"):
        herding(x, -1)
    with pytest.raises(ValueError, match="A row takes 24 bytes"):
        Memory(bytes=20).add(x, y)
    np.testing.assert_array_equal(memory.x, before)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="bad.npz"):
        Memory.load(tmp_path / "bad.npz")
