"""What commands print: lines that fit the terminal, words that stay whole."""

import io
import os
import random

import pytest
from rich.console import Console

from keras_kd.cli import console


def as_rich_does(text, width):
    shown = io.StringIO()
    Console(file=shown, width=width, highlight=False).print(text, markup=False)
    return [line.rstrip() for line in shown.getvalue().splitlines()]


@pytest.mark.parametrize("width", [12, 40, 80])
@pytest.mark.parametrize("letters", ["abc-./`", "ab\u00e9\u4e2d-"])
def test_lines_are_broken_as_rich_breaks_them(width, letters):
    draw = random.Random(width)
    words = ["".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(300)]
    lines = []
    while words:
        count = draw.randint(1, 30)
        lines.append(" " * draw.choice([0, 2, 4]) + " ".join(words[:count]))
        words = words[count:]
    text = "\n".join(["short", "", *lines])
    found = [line.rstrip() for line in console.wrapped(text, width).splitlines()]
    assert found == as_rich_does(text, width)


def test_the_width_is_that_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "57")
    assert console.columns() == 57
    monkeypatch.setenv("COLUMNS", "none")
    size = os.terminal_size((91, 20))
    monkeypatch.setattr(os, "get_terminal_size", lambda stream: size)
    assert console.columns() == 91
    monkeypatch.setattr(os, "get_terminal_size", lambda stream: os.stat("no terminal"))
    assert console.columns() == 80


def test_no_name_becomes_an_emoji():
    assert console.wrapped("output :a: of `x`", 80) == "output :a: of `x`"
