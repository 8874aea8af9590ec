"""Tables in plain text, for `print`."""

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def fitted(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    dispensable: Sequence[str] = (),
    least: Sequence[int] | None = None,
    left: int = 1,
) -> list[str]:
    """Lay out a table as lines that are never longer than a terminal is wide.

    Where there is no room for all columns, those without a figure and then the dispensable ones are
    left out, and a line below says so. Where there is no room for the others either, each row
    becomes lines of `heading: cell`.

    Args:
        headings: One a column.
        rows: Cells, as they are printed.
        width: Most characters in a line.
        dispensable: Headings in the order in which their columns are given up.
        least: Width of each column, with the space before it, where there is room for all of them.
            Defaults to what the cells need.
        left: Number of columns that are aligned to the left.

    Returns:
        The lines.
    """
    gap = 1 if width < 100 or least is not None else 3
    needed = [
        max(map(len, column)) + (gap if i else 0)
        for i, column in enumerate(zip(headings, *rows, strict=True))
    ]
    spaces = needed if least is None else [max(pair) for pair in zip(needed, least, strict=True)]
    shown = list(range(len(headings)))
    if sum(spaces) > width:
        # The first column gives what it can spare before any column goes.
        spaces = [max(needed[0], width - sum(spaces[1:])), *spaces[1:]]
    dropped = []
    # What no row has says least of all.
    columns = zip(headings, *rows, strict=True)
    empty = [heading for heading, *cells in columns if heading and set(cells) <= {"-", ""}]
    for heading in dict.fromkeys((*empty, *dispensable)):
        if sum(spaces[i] for i in shown) <= width:
            break
        dropped.append(heading)
        shown.remove(list(headings).index(heading))
    if sum(spaces[i] for i in shown) > width:
        spaces = needed
    if sum(spaces[i] for i in shown) > width:
        return _stacked(headings, rows, width)

    def line(cells: Sequence[str]) -> str:
        parts = [
            f"{' ' * gap * (i > 0)}{cells[i]}".ljust(spaces[i])
            if i < left
            else cells[i].rjust(spaces[i])
            for i in shown
        ]
        return "".join(parts).rstrip()

    lines = [line(headings), *map(line, rows)]
    if dropped:
        lines += textwrap.wrap(f"Not shown in {width} columns: {', '.join(dropped)}.", width)
    return lines


def _stacked(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Each row as its first cell and a line for each of the others that is not empty."""
    lines: list[str] = []
    for first, *others in rows:
        if len(others) == 1:
            texts = [f"{first}: {others[0]}"]
        else:
            pairs = zip(headings[1:], others, strict=True)
            texts = [first, *(f"    {heading}: {cell}" for heading, cell in pairs if cell)]
        for i, text in enumerate(texts):
            # Marks before the name, such as `* `, keep their place.
            lines += textwrap.wrap(text, width, subsequent_indent="      " if i else "  ")
    return lines


def render(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", width: int = 80
) -> str:
    """Lay out a table as Keras lays out `model.summary()`.

    Args:
        columns: Headings.
        rows: Cells, written with `str`, aligned to the right where they are numbers.
        title: A line above the table.
        width: Characters a line at most; long cells are wrapped.

    Returns:
        Lines of text without colors, the last without a line break.
    """
    # Keras itself depends on rich.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i, heading in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        cells = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row]
        table.add_row(*(Text(cell) for cell in cells))
    written = io.StringIO()
    console = Console(
        width=width, highlight=False, force_terminal=False, color_system=None, file=written
    )
    if title:
        console.print(Text(title))
    console.print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()).strip("\n")
