"""How long one inference takes, how much memory it needs, how long a start lasts."""

from __future__ import annotations

import csv
import io
import json
import os
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_kd.export import manifest
from keras_kd.export.checks import number
from keras_kd.export.formats import registry
from keras_kd.export.report.scorecard import Scorecard
from keras_kd.export.scratch import working_folder
from keras_kd.export.worker_pool import run_tasks
from keras_kd.export.writing import write_file
from keras_kd.utils import archives
from keras_kd.utils.escaping import plain
from keras_kd.utils.tables import fitted

_MOST_THREADS = 1024
"""Of 100,000, each with a stack of its own, a machine takes minutes and gigabytes to start."""


def bench(
    folder: str | os.PathLike[str],
    threads: int = 1,
    *,
    model: str | os.PathLike[str] | None = None,
    seconds: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchReport:
    """Time every file of an export on this machine, each in a process of its own.

    Args:
        folder: What `keras_kd.export` wrote.
        threads: Threads that a runtime may use.
        model: The Keras model as a `.keras` file, to be timed as well (`predict_on_batch` on the
            TensorFlow backend). Without it its latency at the time of the export is shown.
        seconds: How long each file is measured.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The figures.

    Raises:
        ManifestError: If the folder holds no export, or its files are not the exported ones.
        TypeError: If `threads` is no integer, or `seconds` no number.
        ValueError: If `threads` or `seconds` is not positive, or not finite, or there are more than
            1,024 threads.
        FileNotFoundError: If there is no file `model`.
        ValueError: If `model` is no `.keras` file, or takes other inputs than the exported model.

    Examples:
        >>> print(keras_kd.export.bench("exported/digits").table())  # doctest: +SKIP
    """
    number("threads", threads, whole=True)
    number("seconds", seconds)
    if threads < 1 or seconds <= 0:
        raise ValueError(
            "`threads` and `seconds` must be positive. "
            f"Received: threads={threads!r}, seconds={seconds!r}."
        )
    if threads > _MOST_THREADS:
        raise ValueError(
            f"`threads` is at most {_MOST_THREADS}: runtimes start each of them, busy or not. "
            f"Received: threads={threads!r}; this machine has {os.cpu_count()} processors."
        )
    folder, path = Path(folder), Path(model or "")
    if model is not None:
        # Before the files are hashed, and looked into by packages that take their time to import.
        _check_model(path)
    content = manifest.read(folder)
    manifest.check_files(folder, content)
    sample = str((folder / content["evaluation"]["file"]).resolve())
    names = [info["name"] for info in content["model"]["inputs"]]
    card = Scorecard(content, content["best"])
    scores = {
        f"{row['format']} {row['precision']}": card.of(row.get("metrics") or {})
        for row in content["artifacts"]
    }
    scores["keras"] = card.of(content["keras"])
    tasks = [
        {
            "id": f"{row['format']} {row['precision']}",
            "format": row["format"],
            "path": str((folder / row["file"]).resolve()),
            "bytes": row["bytes"],
        }
        for row in content["artifacts"]
        if row["file"] is not None
    ]
    if model is not None:
        tasks.insert(0, {"id": "keras", "path": str(path.resolve()), "bytes": path.stat().st_size})
    rows: list[dict[str, Any]] = []
    if model is None:
        recorded = content["keras"]
        rows.append(
            {
                **dict.fromkeys(_COLUMNS),
                "name": "keras (at export)",
                "bytes": recorded["bytes"],
                "p50_ms": recorded["latency_ms"],
                "score": card.of(recorded),
            }
        )
    with working_folder() as scratch:
        for i, task in enumerate(tasks):
            if progress is not None:
                progress("bench", i, len(tasks))
            # A process each: peak memory only ever grows, and a cold start happens once.
            job = {"kind": "bench", "formats": registry.foreign()}
            settings = {"threads": threads, "seconds": seconds, "sample": sample, "names": names}
            result = run_tasks(job, [{**task, **settings}], scratch / str(i))[task["id"]]
            if task["id"] == "keras" and "error" in result:
                # It comes first: nothing was measured yet, and nothing is written.
                raise ValueError(
                    f"The Keras model `{path}` is not the one that was exported to "
                    f"`{folder}`: {result['error']}. Pass the model that was exported."
                )
            row = {**dict.fromkeys(_COLUMNS), "name": task["id"], "bytes": task["bytes"]}
            row["score"] = scores.get(task["id"])
            rows.append({**row, **{key: result[key] for key in _COLUMNS if key in result}})
    if progress is not None:
        progress("bench", len(tasks), len(tasks))
    return BenchReport(rows, threads, card.name)


def _check_model(path: Path) -> None:
    problem = archives.file_problem(path)
    advice = "Pass a file that `model.save('name.keras')` wrote."
    if problem is not None:
        raise FileNotFoundError(f"The Keras model `{path}` {problem}. {advice}")
    try:
        with archives.archive(path) as found:
            known = "config.json" in found.namelist()
    except zipfile.BadZipFile:
        known = False
    if not known or path.suffix != ".keras":
        raise ValueError(f"The Keras model `{path}` is no `.keras` file. {advice}")


_COLUMNS = (
    *("name", "bytes", "p50_ms", "p90_ms", "cold_start_ms", "warm_start_ms", "peak_memory_bytes"),
    *("score", "error"),
)


class BenchReport:
    """Latency, start and memory of every file.

    Args:
        rows: One dict a file: `name`, `bytes`, `p50_ms` and `p90_ms` (of one inference, batch of
            one), `cold_start_ms` (loading the file and one inference, for the first time in the
            process), `warm_start_ms` (the same again, median of five), `peak_memory_bytes` (more
            than the process had before loading), `score` (what files are judged by, as the export
            measured it), `error`. What was not measured is `None`.
        threads: Threads that the runtimes used.
        metric: Name of the score, such as `"accuracy"` or `"ndcg@10"`; `None` where files are
            judged by no figure of the task.
    """

    def __init__(self, rows: list[dict[str, Any]], threads: int, metric: str | None = None) -> None:
        self._rows = rows
        self.threads = threads
        self.metric = metric

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures, one dict a file."""
        return [dict(row) for row in self._rows]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "threads": self.threads,
            "metric": self.metric,
            "rows": manifest.plain(self._rows),
        }

    def table(self, width: int = 80) -> str:
        """Return the figures as text.

        Args:
            width: Most columns of text. Below 80 the least important figures are left out, which
                the line under them says.
        """
        from keras_kd.export.report.figures import latency, size
        from keras_kd.export.report.scorecard import figure_text, heading

        headings = [f"{self.threads} thread(s), batch of 1", "size", "p50 ms", "p90 ms", "cold ms"]
        headings += ["warm ms", "memory"]
        least = [24, 8, 8, 8, 8, 8, 8]
        spare = ["warm ms", "memory", "cold ms", "p90 ms"]
        cells = [
            [
                plain(row["name"]),
                size(row["bytes"]),
                *(latency(row[key]) for key in _COLUMNS[2:6]),
                size(row["peak_memory_bytes"]),
            ]
            for row in self._rows
        ]
        if self.metric is not None:
            # What a file is worth beside what it costs.
            name = "acc" if self.metric == "accuracy" else plain(heading(self.metric))
            headings.insert(1, name)
            least.insert(1, max(len(name) + 1, 7))
            for row, cell in zip(self._rows, cells, strict=True):
                cell.insert(1, figure_text(self.metric, row["score"]))
        lines = fitted(headings, cells, width=width, dispensable=spare, least=least)
        if self.metric is not None:
            unit = " in %" if self.metric == "accuracy" else ""
            text = f"{plain(heading(self.metric))}{unit}: as measured at the export."
            lines += textwrap.wrap(text, min(width, 80))
        for row in self._rows:
            if row["error"]:
                text = plain(f"x {row['name']}: {row['error']}")
                lines += textwrap.wrap(text, min(width, 80), subsequent_indent="    ")
        return "\n".join(lines)

    def save_csv(self, path: str | Path) -> Path:
        """Write the figures as comma-separated values and return the path."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        return write_file(path, buffer.getvalue())

    def save_json(self, path: str | Path) -> Path:
        """Write the figures as JSON and return the path."""
        return write_file(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def save_svg(self, path: str | Path) -> Path:
        """Write a plot of latency, starts and memory as SVG and return the path."""
        from keras_kd.export.report.plots import bench_figure, svg

        return write_file(path, svg(bench_figure(self.rows())))

    def save_png(self, path: str | Path) -> Path:
        """Write the same plot as PNG and return the path."""
        from keras_kd.export.report.plots import bench_figure, png

        return write_file(path, png(bench_figure(self.rows())))

    def __str__(self) -> str:
        return self.table()
