"""Tables from CSV files: numbers, categories and texts as a model reads them, and a target.

The training file decides what a column is and which categories, classes and words there are; the
other files are read by that. `TaskData.inputs` says how, so that the same can be done to a row
elsewhere.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_kd.datasets import class_names, text_files, vocabulary
from keras_kd.datasets.task_data import UNLABELED, Raw, TaskData, assemble, check_task
from keras_kd.utils.errors import did_you_mean

_DELIMITERS = ",;\t|"

MOST_CATEGORIES = 256
"""Different texts in a column beyond which it is hardly a category."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A file as text.

    Args:
        path: Of the file.
        columns: The names in its first line.
        rows: Cells.
        lines: The line in which each row begins, from 1.
    """

    path: str
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]

    def where(self, row: int) -> str:
        """Say where a row stands."""
        return f"`{self.path}`, line {self.lines[row]}"

    def column(self, name: str) -> list[str]:
        """The cells of a column, without spaces around them."""
        place = self.columns.index(name)
        return [row[place].strip() for row in self.rows]


@dataclasses.dataclass(frozen=True)
class Column:
    """How one column becomes numbers.

    Args:
        name: In the first line of the file.
        values: The categories, one number each that is 1 where the cell holds it; `None` for a
            column of numbers, which is one number.
        mean: What is subtracted from a number.
        std: What it is divided by.
    """

    name: str
    values: tuple[str, ...] | None = None
    mean: float = 0.0
    std: float = 1.0

    def encode(self, table: Table) -> tuple[Any, int]:
        """Return float32 `(rows, numbers)`, and how many cells hold an unknown category."""
        cells = table.column(self.name)
        if self.values is None:
            numbers = np.array([_number(cell, table, i, self.name) for i, cell in enumerate(cells)])
            with np.errstate(over="ignore"):
                scaled = ((numbers - self.mean) / self.std).astype(np.float32)
            if not np.isfinite(scaled).all():
                row = int(np.argmin(np.isfinite(scaled)))
                raise ValueError(
                    f"{table.where(row)}: `{self.name}` is {cells[row][:40]}, which no float32 "
                    f"holds with mean {self.mean:g} and deviation {self.std:g} as in the training "
                    "file. Mend the cell, or leave the row out."
                )
            return scaled[:, None], 0
        place = {value: i for i, value in enumerate(self.values)}
        made = np.zeros((len(cells), len(self.values)), np.float32)
        unknown = 0
        for i, cell in enumerate(cells):
            if cell in place:
                made[i, place[cell]] = 1.0
            else:
                unknown += 1
        return made, unknown

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        if self.values is not None:
            return {"name": self.name, "values": list(self.values)}
        return {"name": self.name, "mean": self.mean, "std": self.std}


def load(
    path: str | os.PathLike[str],
    task: str,
    target: Sequence[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    text: str | None = None,
    categories: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    standardize: bool = False,
    unlabeled: bool = False,
    words: str | os.PathLike[str] | None = None,
    length: int | None = None,
    delimiter: str | None = None,
    group: str | None = None,
) -> TaskData:
    """Load a table.

    The inputs are one row of numbers, columns in the order of the file: a column of numbers is one
    of them, a column of texts is a category, with one number for each of its values in the training
    file in alphabetical order, 1 where the cell holds it and 0 elsewhere. Numbers have a point
    before their decimals: columns of `0,5`, `12%` or `$3` are refused unless they are named as
    categories. With `text` the inputs are the numbers of the words of that one column instead, and
    all others are left out.

    Classes are numbered in alphabetical order, or as numbers if they are whole numbers; whole
    numbers from 0 on are class numbers as they stand.

    Args:
        path: Path of the file, UTF-8, maybe gzipped, with names in its first line.
        task: `classification`, `multilabel`, `regression` or `ranking`.
        target: Name of the column with the label; several for labels, targets or items.
        validation: Another file of the same columns for this split.
        test: The same.
        text: Name of the column whose words are the input.
        categories: Columns that hold numbers, and are categories all the same.
        leave_out: Columns that are no input.
        classes: The classes in the order of their numbers.
        standardize: Whether columns of numbers get mean 0 and standard deviation 1, as measured on
            the training file.
        unlabeled: Whether rows with an empty target are kept, for the teacher alone.
        words: A vocabulary file; built from the training rows without.
        length: Words that are read of a text; as many as the longest has, 128 at most, without.
        delimiter: What separates cells; found in the first line without.
        group: Of a ranking whose items are rows: the column that is the same for all items of a
            list. The one target is the gain of the item then, and lists are not split up.

    Returns:
        The data.

    Raises:
        ValueError: Naming file and line, if a file cannot be read, a column is missing, a target is
            missing or unknown, a number is none, or a text has no words.
    """
    check_task(task)
    if task == "tokens":
        raise ValueError("Tokens are read from CoNLL or `.npz` files, not from CSV files.")
    table = read(path, delimiter)
    _check_names(table, target, text, categories, leave_out, group)
    _check_group(task, target, group)
    if unlabeled and task != "classification":
        raise ValueError(
            f"Rows without a target are read for `classification` alone, not for `{task}`."
        )
    files = {"train": table}
    for split, other in (("validation", validation), ("test", test)):
        if other is not None:
            files[split] = _matching(read(other, delimiter), table)
    notes: list[str] = []
    for one in files.values():
        spare = [column for column in one.columns if column not in table.columns]
        if spare:
            notes.append(
                f"`{one.path}` has {_listed(spare)} beside the columns of `{table.path}`: left out."
            )
    names, labels = _labels(files, task, list(target), classes, unlabeled)
    lacking = [name for name in names if name.lower() in (*_MISSING, "nan")]
    if task == "classification" and classes is None and lacking:
        notes.append(
            f"`{lacking[0]}` is a class of its own among those of `{target[0]}`. Where it means "
            "that there is no label, leave the cell empty."
        )
    if text is not None:
        x, inputs = _texts(files, text, words, length, notes)
    else:
        ignored = {*target, *leave_out, group}
        inside = [column for column in table.columns if column not in ignored]
        columns = _columns(table, inside, categories, notes)
        if standardize:
            columns = [_standardized(column, table) for column in columns]
        x, inputs = {}, {"kind": "table", "columns": [column.to_dict() for column in columns]}
        for split, one in files.items():
            parts = [column.encode(one) for column in columns]
            x[split] = np.concatenate([part for part, _ in parts], axis=1)
            unknown = sum(count for _, count in parts)
            if unknown:
                notes.append(
                    f"{unknown:,} cells of `{one.path}` hold categories that `{table.path}` has "
                    "not: they are 0 everywhere."
                )
    raw = {
        split: Raw(x[split], labels[split], one.where, one.path, groups=_groups(one, group))
        for split, one in files.items()
    }
    return assemble(
        os.fspath(path),
        task,
        raw["train"],
        validation=raw.get("validation"),
        test=raw.get("test"),
        class_names=names,
        inputs=inputs,
        unlabeled=unlabeled,
        notes=notes,
        texts={split: one.column(text) for split, one in files.items()} if text else None,
    )


def read(path: str | os.PathLike[str], delimiter: str | None = None) -> Table:
    """Read a CSV file as text.

    Args:
        path: Path of the file.
        delimiter: What separates cells; found in the first line without.

    Returns:
        The table.

    Raises:
        ValueError: If it cannot be read, has no rows, names a column twice, or a row has another
            number of cells.
    """
    name = os.fspath(path)
    content = text_files.read(name, "a CSV file")
    start = content.lstrip("\r\n")
    first = start[: start.find("\n") + 1] or start
    if delimiter is None:
        tabs = name.lower().endswith((".tsv", ".tsv.gz")) and "\t" in first
        delimiter = "\t" if tabs else max(_DELIMITERS, key=lambda one: first.count(one))
    # Cells between tabs are not quoted: a text that begins with a quote would swallow more rows.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ValueError(
            "`delimiter` is one character, and neither a quote nor the end of a line. Received: "
            f"delimiter={delimiter!r}."
        )
    lines_of = io.StringIO(content, newline="")
    # Quotes behind a space quote as well; cells are stripped of spaces in any case.
    reader = csv.reader(
        lines_of,
        delimiter=delimiter,
        quoting=quoting,
        strict=True,
        skipinitialspace=delimiter != " ",
    )
    rows: list[list[str]] = []
    lines: list[int] = []
    before = 0
    try:
        for cells in reader:
            if cells:
                rows.append(cells)
                lines.append(before + 1)
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"`{name}`, line {reader.line_num}: {error}. Mend the line.") from error
    if rows[0] == ["sep=", ""]:
        # By this line Excel is told what separates cells.
        rows, lines = rows[1:] or [[]], lines[1:]
    columns = [cell.strip() for cell in rows[0]]
    for i, column in enumerate(columns):
        if not column or column in columns[:i]:
            index = " The index of pandas is left out by `to_csv(index=False)`."
            raise ValueError(
                f"The first line of `{name}` "
                + (f"names the column `{column}` twice" if column else "leaves a column unnamed")
                + ". It holds one name a column."
                + (index if i == 0 else "")
            )
    for cells, line in zip(rows[1:], lines[1:], strict=True):
        if len(cells) != len(columns):
            raise ValueError(
                f"`{name}`, line {line} has {len(cells)} cells and the first line {len(columns)}, "
                f"separated by {delimiter!r}. Put cells that hold it in double quotes."
            )
    if len(rows) < 2:
        raise ValueError(f"`{name}` has a first line and no rows. Put data below it.")
    return Table(name, columns, rows[1:], lines[1:])


def _check_names(
    table: Table,
    target: Sequence[str],
    text: str | None,
    categories: Sequence[str],
    leave_out: Sequence[str],
    group: str | None,
) -> None:
    if not target:
        raise ValueError(
            f"No target is named. `{table.path}` has the columns {_listed(table.columns)}: say "
            "which holds the label, `--target COLUMN`."
        )
    for role, names in (
        ("target", target),
        ("text", [text] if text is not None else []),
        ("category", categories),
        ("leave-out", leave_out),
        ("group", [group] if group is not None else []),
    ):
        for name in names:
            if name in table.columns:
                continue
            hint = did_you_mean(name, table.columns)
            if len(table.columns) == 1:
                hint = " If cells are separated by something else, say so: `--delimiter`."
            raise ValueError(
                f"`--{role}` names the column `{name}`, and `{table.path}` has "
                f"{_listed(table.columns)}.{hint}"
            )
    for i, name in enumerate(target):
        if name in target[:i]:
            raise ValueError(f"`--target` names the column `{name}` twice. Name each once.")
        if name == text or name in categories or name in leave_out:
            raise ValueError(f"The column `{name}` is the target, and cannot be an input too.")
        if name == group:
            raise ValueError(f"The column `{name}` is the target, and cannot be the group too.")


def _check_group(task: str, target: Sequence[str], group: str | None) -> None:
    if group is None:
        return
    if task != "ranking":
        raise ValueError(
            f"`--group {group}` says which rows are one list to rank, and the task is `{task}`. "
            "Pass `--task ranking`, or leave the group out (`--leave-out` for an input)."
        )
    if len(target) > 1:
        raise ValueError(
            f"With `--group` each row is one item, and has one gain. Received: {len(target)} "
            f"targets, {_listed(target)}. Several are the items of one row, without a group."
        )


def _groups(table: Table, group: str | None) -> Any:
    """The number of each row's list in the order in which lists begin, or `None`."""
    if group is None:
        return None
    cells = table.column(group)
    for row, cell in enumerate(cells):
        if not cell:
            raise ValueError(
                f"{table.where(row)}: the group `{group}` is missing. Fill it in, or leave the row "
                "out."
            )
    place = {cell: number for number, cell in enumerate(dict.fromkeys(cells))}
    return np.array([place[cell] for cell in cells])


def _matching(other: Table, table: Table) -> Table:
    missing = [name for name in table.columns if name not in other.columns]
    if missing:
        hint = did_you_mean(missing[0], [c for c in other.columns if c not in table.columns])
        raise ValueError(
            f"`{other.path}` lacks the column `{missing[0]}` that `{table.path}` has. It has "
            f"{_listed(other.columns)}.{hint}"
        )
    return other


def _columns(
    table: Table, names: list[str], categories: Sequence[str], notes: list[str]
) -> list[Column]:
    if not names:
        raise ValueError(f"`{table.path}` has no column beside the target: there is no input.")
    found = []
    for name in names:
        cells = table.column(name)
        if name not in categories and _is_numeric(cells):
            found.append(Column(name))
            continue
        if name not in categories:
            _check_marks(table, name, cells)
        values = sorted(set(cells))
        if len(values) > MOST_CATEGORIES and name not in categories:
            raise ValueError(
                f"The column `{name}` of `{table.path}` holds {len(values):,} different texts, too "
                f"many for a category. `--leave-out {name}` ignores it, `--text {name}` reads its "
                f"words, `--category {name}` insists."
            )
        if len(values) == len(cells) > 9 and name not in categories:
            notes.append(
                f"The column `{name}` of `{table.path}` holds another text in each row, as names, "
                f"dates and keys do: no row tells of another one. `--leave-out {name}` ignores it."
            )
        found.append(Column(name, tuple(values)))
    return found


def _is_numeric(cells: Sequence[str]) -> bool:
    # A column of numbers with a few texts in it has a fault, which is told by its line; one of
    # texts with a few numbers among them, as codes have, is a category.
    numbers = sum(_parsed(cell) is not None for cell in cells)
    return 2 * numbers > sum(cell.lower() not in _MISSING for cell in cells)


_MISSING = ("", "-", "?", "na", "n/a", "#n/a", "<na>", "null", "none", "missing")
"""What stands where there is no number, and makes a column of numbers none of texts."""

# `0,5`, `1,234.5`, `1 234`, `1_234`, `12%`, `€3`, `(3)`, and 3 behind the minus sign of Unicode:
# numbers with a mark that Python's have not.
_MARKED = re.compile(
    r"\(?[+\-\u2212]?[$€£]?\s?\d{1,3}([ ,'_\u00a0\u202f]?\d{3})*([.,]\d+)?\s?[$€£%]?\)?"
)


def _check_marks(table: Table, name: str, cells: Sequence[str]) -> None:
    # A category of each number would be taken without a word otherwise.
    marked = [
        row for row, cell in enumerate(cells) if _parsed(cell) is None and _MARKED.fullmatch(cell)
    ]
    numbers = sum(_parsed(cell) is not None for cell in cells)
    some = sum(cell.lower() not in _MISSING for cell in cells)
    if marked and 2 * (numbers + len(marked)) > some:
        raise ValueError(
            f"{table.where(marked[0])}: the column `{name}` holds `{cells[marked[0]][:40]}`. "
            "Numbers have a point before their decimals, and no other marks. Write them so, or "
            f"read the column as a category: `--category {name}`."
        )


def _parsed(cell: str) -> float | None:
    try:
        # `1_000` is a number to Python alone.
        return float(cell) if "_" not in cell else None
    except ValueError:
        return None


def _number(cell: str, table: Table, row: int, name: str, target: bool = False) -> float:
    value = _parsed(cell)
    if value is None:
        what = f"holds the text `{cell[:40]}`" if cell else "is empty"
        cure = (
            "Mend the cell, or leave the row out."
            if target
            else "Mend the cell, leave the row out, or read the column as a category: `--category "
            f"{name}`."
        )
        raise ValueError(f"{table.where(row)}: the number column `{name}` {what}. {cure}")
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        raise ValueError(
            f"{table.where(row)}: `{name}` is {cell[:40]}, which is no finite float32. Mend the "
            "cell, or leave the row out."
        )
    return value


def _standardized(column: Column, table: Table) -> Column:
    if column.values is not None:
        return column
    cells = table.column(column.name)
    numbers = np.array([_number(cell, table, i, column.name) for i, cell in enumerate(cells)])
    std = float(numbers.std())
    return dataclasses.replace(column, mean=float(numbers.mean()), std=std if std > 0 else 1.0)


def _labels(
    files: dict[str, Table],
    task: str,
    target: list[str],
    classes: Sequence[str] | None,
    unlabeled: bool,
) -> tuple[list[str], dict[str, Any]]:
    for split, table in files.items():
        for name in target:
            for row, cell in enumerate(table.column(name)):
                if not cell and not (unlabeled and split == "train"):
                    raise ValueError(
                        f"{table.where(row)}: the target `{name}` is missing. Fill it in, or leave "
                        "the row out"
                        + (
                            "; `--unlabeled` keeps such rows, for the teacher alone."
                            if task == "classification" and split == "train"
                            else "."
                        )
                    )
    if task != "classification":
        return target, {
            split: np.array(
                [
                    [
                        _number(cell, table, row, name, target=True)
                        for row, cell in enumerate(table.column(name))
                    ]
                    for name in target
                ]
            ).T
            for split, table in files.items()
        }
    if len(target) > 1:
        raise ValueError(
            f"`classification` has one target column. Received: {_listed(target)}. Several columns "
            "of 0 and 1 are `--task multilabel`."
        )
    table = files["train"]
    cells = [cell for cell in table.column(target[0]) if cell]
    class_names.check(sorted(set(cells)), lambda name: table.where(_row_of(table, target, name)))
    names = _class_names(cells) if classes is None else [str(name) for name in classes]
    place = {name: i for i, name in enumerate(names)}
    numeric = classes is None and all(_whole(cell) is not None for cell in cells)
    labels = {}
    for split, one in files.items():
        numbers = []
        for row, cell in enumerate(one.column(target[0])):
            whole = _whole(cell) if numeric else None
            key = cell if whole is None else str(whole)
            if not cell:
                numbers.append(UNLABELED)
            elif key in place:
                numbers.append(place[key])
            else:
                hint = class_names.hint(key, names)
                which = "`--classes` names" if classes is not None else f"`{table.path}` has"
                raise ValueError(
                    f"{one.where(row)} is of class `{cell[:40]}`, which is none of those that "
                    f"{which}.{hint}"
                )
        labels[split] = np.array(numbers)
    return names, labels


def _row_of(table: Table, target: Sequence[str], cell: str) -> int:
    return table.column(target[0]).index(cell)


def _class_names(cells: Sequence[str]) -> list[str]:
    found = set(cells)
    numbers = [_whole(cell) for cell in found]
    if None in numbers:
        return sorted(found)
    known = sorted({number for number in numbers if number is not None})
    # A class number of a model's units, of which some may have no row here.
    if known[0] == 0 and known[-1] < max(2 * len(known), 16):
        return [str(number) for number in range(known[-1] + 1)]
    return [str(number) for number in known]


def _whole(cell: str) -> int | None:
    value = _parsed(cell)
    if value is None or not math.isfinite(value) or value != round(value):
        return None
    # Numbers of 17 digits and more are not what a float makes of them.
    return int(cell) if re.fullmatch(r"[+-]?\d+", cell) else int(value)


def _texts(
    files: dict[str, Table],
    name: str,
    words: str | os.PathLike[str] | None,
    length: int | None,
    notes: list[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    split_up: dict[str, list[list[str]]] = {}
    for split, table in files.items():
        split_up[split] = [vocabulary.words(cell) for cell in table.column(name)]
        for row, found in enumerate(split_up[split]):
            if not any(map(text_files.visible, found)):
                raise ValueError(
                    f"{table.where(row)}: the text `{name}` is empty: it has no words. Leave the "
                    "row out."
                )
    known = vocabulary.build(split_up["train"]) if words is None else vocabulary.read(words)
    if length is None:
        length = min(max(map(len, split_up["train"])), vocabulary.LONGEST)
    x = {}
    for split, rows in split_up.items():
        x[split], cut, unknown = vocabulary.encode(rows, known, length)
        total = sum(min(len(row), length) for row in rows)
        notes.append(
            f"{split}: {unknown:,} of {total:,} words are not in the vocabulary of {len(known):,}"
            + (f", and {cut:,} texts were cut to {length} words." if cut else ".")
        )
    return x, {"kind": "text", "column": name, "length": length, "vocabulary": known}


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
