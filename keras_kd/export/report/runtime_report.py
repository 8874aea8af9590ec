"""Where the files of an export run, as a report tells it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from keras_kd.export.formats import registry
from keras_kd.export.formats.device_table import find, runs, together


class RuntimeReport(Mapping[str, Mapping[str, str]]):
    """Where the files of an export run: answers by file name and runtime.

    Args:
        manifest: Of the export.

    Examples:
        >>> where = report.runtimes()  # doctest: +SKIP
        >>> where["digits_int8.tflite"]["tflite-2.14"]  # doctest: +SKIP
        'yes'
    """

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._rows = [row for row in manifest["artifacts"] if row.get("file")]

    def __getitem__(self, file: str) -> Mapping[str, str]:
        for row in self._rows:
            if row["file"] == file:
                return dict(row.get("runtimes", {}))
        raise KeyError(file)

    def __iter__(self) -> Iterator[str]:
        return (row["file"] for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict for each file and runtime: `file`, `runtime`, `runs`, `answer`."""
        return [
            {"file": file, "runtime": name, "runs": runs(answers, name), "answer": answer}
            for file, answers in self.items()
            for name, answer in answers.items()
        ]

    def since(self, file: str) -> str:
        """Return which versions of its own runtime know all of a file, as a person reads it.

        Args:
            file: Its name.

        Returns:
            Such as `"TensorFlow Lite 2.17 and newer"`; empty if the manifest does not say.
        """
        row = next(row for row in self._rows if row["file"] == file)
        if row.get("since") is None or row["format"] not in registry.names():
            return ""
        return f"{registry.get(row['format']).runtime} {row['since']} and newer"

    def advice(self) -> dict[str, str]:
        """Return by runtime the settings under which its answers are those of the report."""
        used = {name for row in self._rows for name in row.get("runtimes", {})}
        known = {name: find(name) for name in sorted(used)}
        return {name: each.advice for name, each in known.items() if each and each.advice}

    def table(self, width: int = 80) -> str:
        """Return the answers as text: a block for each file, runtimes with one answer together.

        Args:
            width: Most columns of text.
        """
        lines = []
        for row in self._rows:
            since = self.since(row["file"])
            text = row["file"] + (f" ({since})" if since else "")
            lines += textwrap.wrap(text, width, subsequent_indent="    ")
            for answer, names in together(row.get("runtimes", {})).items():
                text = f"{', '.join(names)}: {answer}"
                lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ")
        for name, advice in self.advice().items():
            lines += textwrap.wrap(f"{name}: {advice}", width, subsequent_indent="  ")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()
