"""What a search found: the best file, the front, a line a trial, and how to do it again."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keras_kd.export.writing import write_file
from keras_kd.search import record
from keras_kd.utils import archives
from keras_kd.utils.escaping import plain
from keras_kd.utils.tables import fitted
from keras_kd.utils.values import all_digits, known_keys

OBJECTIVES = ("error", "bytes", "latency_ms")

_RESULT = "result.json"
_VALUES = ("method", "temperature", "alpha", "learning_rate", "width", "depth", "precision")


def objectives(given: Iterable[str] | str) -> tuple[str, ...]:
    """What is minimized, without repetition.

    Args:
        given: What was passed as `minimize`.

    Raises:
        TypeError: If they are no names.
        ValueError: If there is none, one twice, or an unknown one.
    """
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`minimize` lists objectives of {', '.join(OBJECTIVES)}. Received: minimize={given!r}."
        )
    names = ["latency_ms" if name == "latency" else name for name in names]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"`minimize` names different objectives of {', '.join(OBJECTIVES)}. Received: "
            f"minimize={given!r}."
        )
    known_keys(map(str, names), OBJECTIVES, "minimize")
    return tuple(names)


class Study:
    """A search in its folder. `Study(folder)` reads one that `tune` has written.

    Args:
        folder: Of the search.

    Attributes:
        folder: Where it is.
        verdict: What to do, in a sentence: take the winner, keep the defaults, keep plain training,
            or not reachable, with how near the nearest file came.
        best: Values of the student that is kept, its `seed` and `epochs`, and the `error`,
            `bytes`, `latency_ms` and path `file` of its exported file; `None` where nothing is
            within the budget, or the search has not ended.
        front: The trials that no other one beats in everything, as rows of `rows()`, the lowest
            error first.
        errors: Errors of the last trainings, one a seed, of `winner`, `plain` and `defaults`.
        minimize: The objectives.
        regression: Whether errors are mean squared ones, and no shares.

    Raises:
        FileNotFoundError: If there is no search in the folder.
        ValueError: If its record is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / record.FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"`{self.folder}` holds no search. Pass a folder that `keras_kd.search.tune` wrote."
            )
        self.about = dict(record.read(path)["about"])
        self.minimize = tuple(self.about["minimize"])
        self.regression = bool(self.about["regression"])
        result = self.folder / _RESULT
        said = json.loads(archives.read_bytes(result)) if result.exists() else {}
        self.verdict: str = said.get("verdict", "the search has not ended: call it again")
        self.errors: dict[str, list[float]] = said.get("errors", {})
        self._front: list[int] = said.get("front", [])
        self._timed: dict[str, dict[str, float]] = said.get("timed", {})
        self.best: dict[str, Any] | None = said.get("best")
        if self.best is not None:
            self.best["file"] = self.folder / self.best["file"]
        self._rows = self._read()

    @property
    def front(self) -> list[dict[str, Any]]:
        """The trials that no other one beats in everything."""
        rows = {row["trial"]: row for row in self._rows}
        return [rows[slot] for slot in self._front if slot in rows]

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict a trial.

        Keys: `trial`, `role` (`"plain"` and `"defaults"` of the references), the values by
        parameter, `state` (`"done"`, `"stopped"` early, `"beyond"` the budget, `"running"`),
        `epochs` where it was stopped, `error`, `bytes`, `latency_ms` of the file, `front`,
        `reason`. What was not trained, or not to the end, has size and latency of the untrained
        file, and the error of the Keras model.
        """
        return [dict(row) for row in self._rows]

    def table(self, width: int = 80) -> str:
        """Return a line a trial, the verdict below.

        Args:
            width: Most columns of text.
        """
        shown = self.parameters(varying=True)
        headings = ["trial", *(_SHORT.get(name, name) for name in shown)]
        headings += ["error" if self.regression else "error %", "bytes", "ms", ""]
        cells = []
        for row in self._rows:
            mark = "* " if row["front"] else "  "
            name = f"{row['trial']} {row['role']}".strip()
            cells.append(
                [
                    mark + name,
                    *(_text(row.get(key)) for key in shown),
                    self.error_text(row["error"]),
                    "-" if row["bytes"] is None else f"{row['bytes']:,}",
                    "-" if row["latency_ms"] is None else f"{row['latency_ms']:.3g}",
                    _STATES.get(row["state"], row["state"]),
                ]
            )
        lines = fitted(headings, cells, width=width, dispensable=("lr", "T", "alpha"))
        lines += ["", *textwrap.wrap(plain(self.verdict), width)]
        if self.best is not None:
            lines += textwrap.wrap(
                plain(
                    f"{self.best['file']}: {self.best['bytes']:,} bytes, "
                    f"{self.best['latency_ms']:.3g} ms, error {self.error_text(self.best['error'])}"
                    f"{'' if self.regression else ' %'} on the validation rows, which chose it"
                ),
                width,
            )
        return "\n".join(lines)

    def error_text(self, error: float | None) -> str:
        """An error as it is shown."""
        if error is None:
            return "-"
        return f"{error:.4g}" if self.regression else f"{100 * error:.2f}"

    @property
    def config(self) -> dict[str, Any]:
        """The options with which `keras-kd distill --config` trains the best student again.

        Empty where nothing is within the budget. Paths of teacher and data are in it where `tune`
        was given them as `config`.
        """
        if self.best is None:
            return {}
        best = self.best
        found: dict[str, Any] = {"task": self.about["task"], **self.about["config"]}
        if "width" in best:
            # A rounded width is another student.
            kept = (all_digits(best[name]) for name in ("width", "depth"))
            found["student"] = f"shrink:{','.join(kept)}"
        is_plain = best["method"] == "plain" or best["alpha"] == 1
        found["method"] = "plain" if is_plain else best["method"]
        if not is_plain:
            found |= {"temperature": float(best["temperature"]), "alpha": float(best["alpha"])}
        if self.about["device"]:
            found["device"] = list(self.about["device"])
        return found | {
            "epochs": best["epochs"],
            "batch_size": self.about["batch_size"],
            "learning_rate": float(best["learning_rate"]),
            "seed": int(best["seed"]),
            "formats": "tflite",
            "precisions": best["precision"],
            # The file's own error was what chose it.
            "max_drop": 1.0,
        }

    def save_config(self, path: str | os.PathLike[str]) -> Path:
        """Write `config` as TOML and return the path.

        Args:
            path: The file; its folder must exist.

        Raises:
            ValueError: If nothing is within the budget.
            ImportError: If `tomli_w` is missing.
        """
        if self.best is None:
            raise ValueError(f"There is no student to train again: {self.verdict}.")
        try:
            import tomli_w
        except ImportError as error:
            raise ImportError(
                "A configuration is written with `tomli_w`, which is not installed. Install it "
                'with `pip install "keras_kd[search]"`.'
            ) from error
        return write_file(path, tomli_w.dumps(self.config))

    def plot(self, path: str | os.PathLike[str], kind: str = "front") -> Path:
        """Draw the trials.

        Args:
            path: A `.png` or `.svg` file; its folder must exist.
            kind: `"front"`, error against bytes or latency; or `"parallel"`, a line a trial through
                its values.

        Returns:
            The path.

        Raises:
            ValueError: If the kind or the suffix is unknown.
            ImportError: If Matplotlib is missing.
        """
        from keras_kd.search import page

        return page.save(self, path, kind)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the study as one HTML page that opens offline, and return the path.

        Args:
            path: The file; its folder must exist.

        Raises:
            ImportError: If Jinja or Matplotlib is missing.
        """
        from keras_kd.search import page

        return write_file(path, page.render(self))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        best = None if self.best is None else {**self.best, "file": str(self.best["file"])}
        return {
            "folder": str(self.folder),
            "verdict": self.verdict,
            "best": best,
            "front": self.front,
            "trials": self.rows(),
            "errors": self.errors,
            "minimize": list(self.minimize),
            "config": self.config,
        }

    def take(self, file: str | os.PathLike[str], error: float, latency_ms: float) -> None:
        """Put another file of the best student in place of the one that the search exported.

        Args:
            file: Inside the folder of the search.
            error: Its error on the validation rows.
            latency_ms: Median of one inference.

        Raises:
            ValueError: If nothing is within the budget, or the file lies elsewhere.
        """
        if self.best is None:
            raise ValueError(f"There is no best student: {self.verdict}.")
        name = Path(file).relative_to(self.folder)
        size = Path(file).stat().st_size
        path = self.folder / _RESULT
        said = json.loads(archives.read_bytes(path))
        said["best"] |= {
            "file": str(name),
            "error": error,
            "bytes": size,
            "latency_ms": latency_ms,
        }
        write_file(path, json.dumps(said, indent=2) + "\n")
        self.best = {**said["best"], "file": Path(file)}

    def remark(self, text: str) -> None:
        """Keep a remark behind the verdict.

        Args:
            text: Half a sentence.
        """
        path = self.folder / _RESULT
        said = json.loads(archives.read_bytes(path))
        if not said["verdict"].endswith(f"; {text}"):
            said["verdict"] += f"; {text}"
        write_file(path, json.dumps(said, indent=2) + "\n")
        self.verdict = said["verdict"]

    def __str__(self) -> str:
        return self.table()

    def parameters(self, varying: bool = False) -> list[str]:
        """Return the names of the values.

        Args:
            varying: Only of those that differ from trial to trial.
        """
        names = list(dict.fromkeys(name for row in self._rows for name in row["values"]))
        ordered = [name for name in _VALUES if name in names]
        ordered += [name for name in names if name not in _VALUES]
        if not varying:
            return ordered
        return [n for n in ordered if len({row["values"].get(n) for row in self._rows}) > 1]

    def _read(self) -> list[dict[str, Any]]:
        if not (self.folder / "journal.log").exists():
            return []
        from keras_kd.search import journal

        rows = []
        for trial in journal.read(self.folder, self.about):
            said = trial.said
            file = said.get("file") or said.get("weighed") or {}
            timed = self._timed.get(str(trial.slot), {})
            rows.append(
                {
                    "trial": trial.slot,
                    "role": trial.role,
                    **trial.values,
                    "values": trial.values,
                    "state": "stopped" if said.get("stopped") else trial.state,
                    "epochs": said.get("stopped"),
                    "error": said.get("error"),
                    "bytes": file.get("bytes"),
                    "latency_ms": timed.get("median_ms", file.get("latency_ms")),
                    "front": trial.slot in self._front,
                    "reason": said.get("reason", ""),
                }
            )
        return rows


_SHORT = {"temperature": "T", "learning_rate": "lr"}
_STATES = {"done": "", "beyond": "over budget"}


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
