"""The figures of a report, against their formulas, and what it draws."""

import math

import numpy as np
import pytest

from keras_kd.lifelong import Report, average_accuracy, backward_transfer, forgetting

R = np.array([[0.9, 0.0, 0.0], [0.5, 0.8, 0.1], [0.6, 0.85, 0.7]])


def test_figures():
    before = R.copy()
    assert average_accuracy(R) == pytest.approx((0.6 + 0.85 + 0.7) / 3)
    assert backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    # The maximum is over the rows before the last one, so that the second task has gained.
    assert forgetting(R) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.85)) / 2)
    np.testing.assert_array_equal(R, before)


def test_forgetting_takes_the_best_of_all_earlier_rows():
    matrix = [[0.5, np.nan, np.nan], [0.9, 0.4, np.nan], [0.2, 0.3, 0.8]]
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.2) + (0.4 - 0.3)) / 2)
    # Not first less last, and not with the last row among the maxima.
    assert forgetting([[0.5, 0.0], [0.7, 0.6]]) == pytest.approx(-0.2)


def test_one_task_has_nothing_to_forget():
    assert math.isnan(forgetting([[0.9]]))
    assert math.isnan(backward_transfer([[0.9, 0.0]]))
    for matrix in ([], [0.5, 0.4], np.zeros((3, 2))):
        with pytest.raises(ValueError, match="tasks learned, tasks"):
            average_accuracy(matrix)


@pytest.fixture
def report():
    rows = [
        {"free": R[i].tolist(), "told": [0.9, float("nan"), 1.0], "bytes": 100 * i, "seconds": 1.5}
        for i in range(2)
    ]
    return Report(rows, ["a", "<b>", "c"], "FineTune()")


def test_report(report, tmp_path):
    assert report.matrix.shape == (2, 3)
    assert report.average_accuracy == pytest.approx((0.5 + 0.8) / 2)
    assert (report.memory_bytes, report.seconds) == (100, 3.0)
    text = report.table()
    assert "max over earlier rows - last row" in text
    assert "50.00" in text
    assert report.to_dict()["matrix"][1] == [0.5, 0.8, 0.1]
    # Of the second task no class was known, so that nothing was asked.
    assert [row[2] for row in report.cells()] == ["-", "-"]
    assert np.isnan(report.measured[:, 1]).all()
    assert "80.00" not in text
    assert report.to_dict()["known_task_accuracy"] is None
    assert report.plot(tmp_path / "plots" / "r.svg").read_text().startswith("<svg")
    assert report.plot(tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    page = report.save_html(tmp_path / "r.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    with pytest.raises(ValueError, match=".svg"):
        report.plot(tmp_path / "r.pdf")


def test_nothing_measured_is_nothing_reported():
    row = {"free": [float("nan")], "told": [float("nan")], "bytes": 0, "seconds": 1.0}
    with pytest.raises(ValueError, match="No task has a test part"):
        Report([row], ["a"], "FineTune()")
