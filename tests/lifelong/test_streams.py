"""Streams are cut as they say, and refuse what cannot be learned."""

import numpy as np
import pytest
from small_streams import rows

from keras_kd.lifelong import Stream


def test_by_class_gives_each_class_to_one_task():
    x, y = rows()
    stream = Stream.by_class(x, y, tasks=4, seed=3, test=rows(24, seed=1))
    assert [len(task.classes) for task in stream] == [2, 2, 1, 1]
    assert sorted(label for task in stream for label in task.classes) == list(range(6))
    assert stream.samples == 48
    for task in stream:
        np.testing.assert_array_equal(task.x, x[np.isin(y, task.classes)])
        assert set(task.y_test) == set(task.classes)
        assert task.stream is stream


def test_orders_of_classes_follow_the_seed():
    x, y = rows()
    orders = [
        [t.classes.tolist() for t in Stream.by_class(x, y, 3, seed=s)] for s in (0, 0, 1, None)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == [[0, 1], [2, 3], [4, 5]]


def test_a_share_is_held_out_of_each_class():
    x, y = rows()
    for task in Stream.by_class(x, y, tasks=[[0, 3], [5]], test=0.25):
        assert np.unique(task.y_test, return_counts=True)[1].tolist() == [2] * len(task.classes)
        assert np.unique(task.y, return_counts=True)[1].tolist() == [6] * len(task.classes)
        assert not {r.tobytes() for r in task.x} & {r.tobytes() for r in task.x_test}


def test_by_domain_and_by_task():
    x, y = rows()
    domain = np.where(np.arange(48) < 20, "b", "a")
    stream = Stream.by_domain(x, y[:, None], domain, test=(x[:30], y[:30], domain[:30]))
    assert [(task.name, len(task), task.returning) for task in stream] == [
        ("a", 28, True),
        ("b", 20, True),
    ]
    assert [len(task.x_test) for task in stream] == [10, 20]
    stream = Stream.by_task([(x[y < 2], y[y < 2]), (x[y == 4], y[y == 4])], names=["one", "two"])
    assert [task.classes.tolist() for task in stream] == [[0, 1], [4]]
    again = Stream.by_task([(x, y), (x, y)], returning=True)
    assert [task.name for task in again] == ["task 0", "task 1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: Stream.by_class(x, y, tasks=7), "6 classes cannot be cut into tasks=7"),
        (lambda x, y: Stream.by_class(x, y, tasks=[[0, 1], [1, 2]]), r"\[1\] stand in more than"),
        (lambda x, y: Stream.by_class(x, y, tasks=[[0], [9]]), r"no \[9\]"),
        (lambda x, y: Stream.by_class(x, np.eye(6)[y]), "argmax"),
        (lambda x, y: Stream.by_class(x[:9], y), "9 rows and `y` 48"),
        (lambda x, y: Stream.by_class(x, y + 0.5), "integers"),
        (lambda x, y: Stream.by_class(x, y - 1), "class -1"),
        (lambda x, y: Stream.by_class(x, y, 3, test=(x[:, :3], y)), r"shape \(3,\)"),
        (lambda x, y: Stream.by_class(x, y, 3, test=(x, y + 6)), "which no task trains"),
        (lambda x, y: Stream.by_class(x, y, 3, test=1.5), "between 0 and 1"),
        (lambda x, y: Stream.by_class(np.where(x > 2, np.nan, x), y), "NaN"),
        (lambda x, y: Stream.by_domain(x, y, np.zeros(48)), "single value"),
        (lambda x, y: Stream.by_domain(x, y, y[:5]), "each of the 48 rows"),
        (
            lambda x, y: Stream.by_domain(x, y, y % 2, test=(x, y)),
            r"\(x_test, y_test, domain_test\)",
        ),
        (
            lambda x, y: Stream.by_task([(x, y), (x, y)]),
            "Class 0 of `task 1` was in `task 0`",
        ),
        (lambda x, y: Stream.by_task([(x, y)], test=[]), "0 test parts"),
        (lambda x, y: Stream.by_task([x, y]), r"list of `\(x, y\)`"),
        (lambda x, y: Stream.by_task([(x, y)], test=3), "list of `.x_test, y_test.`"),
        (lambda x, y: Stream.by_class(x, y, 3, seed=-1), "`seed` is at least 0"),
        (lambda x, y: Stream.by_domain(x, y, np.where(y > 3, np.nan, y)), "`domain` holds NaN"),
        (lambda x, y: Stream.by_domain(x, y, x[:, 0]), "values between whole numbers"),
        (lambda x, y: Stream.by_class(x, np.ma.masked_equal(y, 1)), "are masked"),
        (lambda x, y: Stream.by_domain(x, y, np.ma.masked_equal(y % 3, 1)), "are masked"),
    ],
)
def test_what_cannot_be_cut_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(*rows())


@pytest.mark.parametrize("tasks", ["5", 2.0, True, [[0.5, 1], [2]], ["01", "23"], None])
def test_tasks_are_counted_or_listed(tasks):
    with pytest.raises(TypeError, match="`tasks` is how many there are, or the classes of each"):
        Stream.by_class(*rows(), tasks=tasks)


def test_numbers_of_numpy_count_tasks_and_shares():
    x, y = rows()
    assert len(Stream.by_class(x, y, tasks=np.int64(3), test=np.float32(0.25))) == 3
    listed = Stream.by_class(x, y, tasks=np.array([[3, 1], [0, 2]]))
    assert [task.classes.tolist() for task in listed] == [[1, 3], [0, 2]]


def test_other_things_than_arrays_are_refused():
    with pytest.raises(TypeError, match="are arrays"):
        Stream.by_class({"a": 1}, [0, 1])
