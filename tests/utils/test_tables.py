import pytest

from keras_kd.utils.tables import fitted

HEADINGS = ["", "accuracy %", "size", "ms"]
ROWS = [
    ["* tflite int8", "96.38", "6.2 KB", "0.002"],
    ["  onnx float32", "-", "8.1 KB", ""],
]


@pytest.mark.parametrize("least", [None, (20, 12, 9, 9)])
@pytest.mark.parametrize("width", range(12, 130, 3))
def test_no_line_is_longer_than_the_terminal_and_no_figure_is_cut(width, least):
    lines = fitted(HEADINGS, ROWS, width=width, least=least)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for cell in ("96.38", "6.2", "8.1", "0.002", "float32"):
        assert cell in words


def test_columns_are_given_up_in_order():
    lines = fitted(HEADINGS, ROWS, width=28, dispensable=("ms", "accuracy %"))
    assert lines[0].split() == ["size"]
    assert " ".join(lines[-2:]) == "Not shown in 28 columns: ms, accuracy %."
    assert lines[1] == "* tflite int8  6.2 KB"


def test_below_that_each_row_is_a_list():
    assert fitted(HEADINGS, ROWS, width=22) == [
        "* tflite int8",
        "    accuracy %: 96.38",
        "    size: 6.2 KB",
        "    ms: 0.002",
        "  onnx float32",
        "    accuracy %: -",
        "    size: 8.1 KB",
    ]
    pairs = [["teacher", "tiny (24bed6c03ee4)"]]
    assert fitted(["", "cache"], pairs, width=20) == ["teacher: tiny", "  (24bed6c03ee4)"]


def test_a_cell_wider_than_planned_keeps_the_columns_aligned():
    rows = [["a", "1"], ["a much longer name than was planned", "22"]]
    lines = fitted(["", "n"], rows, width=80, least=(8, 5))
    assert {len(line) for line in lines} == {len(rows[1][0]) + 5}


def test_a_column_without_figures_goes_first():
    rows = [["* tflite int8", "-", "6.2 KB"], ["  onnx float32", "", "8.1 KB"]]
    lines = fitted(["", "acc", "size"], rows, width=23, dispensable=("size",))
    assert lines[0].split() == ["size"]
    assert "acc" in fitted(["", "acc", "size"], rows, width=40)[0]
