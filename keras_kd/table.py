"""Tables in plain text, for `print`."""

import io
from collections.abc import Iterable, Sequence
from typing import Any


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
