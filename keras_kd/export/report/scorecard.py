"""The figures of a report that depend on the task: its own metrics, classes, ranks, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras_kd.export.verification.entities import types
from keras_kd.utils.tables import fitted

_HEADINGS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "macro_f1": "macro F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "entity_f1": "entity F1",
    "f1": "F1",
    "auc": "AUC",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R2",
    "spearman": "Spearman",
    "ndcg@10": "NDCG@10",
}
_PER_CLASS = ("precision", "recall", "f1", "auc")
_PARTS = ("entity_precision", "entity_recall")
_FEW = 12
"""Classes up to which the table of a terminal shows each."""


class Scorecard:
    """What an export measured against labels, as far as the task has it.

    Args:
        content: The manifest.
        best: Name of the best file, if there is one.
    """

    def __init__(self, content: dict[str, Any], best: str | None) -> None:
        self._content = content
        self._best = best
        self._kinds = {name: row["kind"] for name, row in content["evaluation"]["kinds"].items()}
        self._metrics: dict[str, list[list[str]]] = content["evaluation"].get("metrics", {})
        self._chosen = next(
            ((name, *rows[0]) for name, rows in self._metrics.items() if rows), None
        )

    @property
    def name(self) -> str | None:
        """What files are judged by: a chosen metric, `"accuracy"`, of plain numbers `"rmse"`.

        `None` where neither labels nor decisions give one.
        """
        if self._chosen is not None:
            return self._chosen[1]
        if any(kind != "values" for kind in self._kinds.values()):
            return "accuracy"
        return "rmse" if self._content["evaluation"]["labeled"] else None

    @property
    def heading(self) -> str | None:
        """The same as a person reads it."""
        name = self.name
        return None if name is None else heading(name)

    def of(self, figures: dict[str, Any]) -> float | None:
        """Return the figure of that name.

        Args:
            figures: Of the Keras model, or the `metrics` of a file.
        """
        if self._chosen is not None:
            row = (figures.get("outputs") or {}).get(self._chosen[0], {}).get("chosen")
            if isinstance(row, dict):
                return row.get(self._chosen[1])
            return row[0]["value"] if row else None
        if self.name == "accuracy":
            return figures.get("accuracy")
        for row in (figures.get("outputs") or {}).values():
            if (row.get("scores") or {}).get("rmse") is not None:
                return float(row["scores"]["rmse"])
        return None

    def text(self, value: float | None) -> str:
        """Return the figure as text: accuracy in percent, others as they are."""
        return figure_text(self.name, value)

    def limit(self, max_drop: float | None) -> str:
        """Say what a file may lose."""
        name = self.heading or "quality"
        if max_drop is None:
            return f"no limit on the {name} lost"
        if self._chosen is not None and self._chosen[2] == "min":
            return f"{name} at most {100 * max_drop:g} % above the Keras model's"
        if self.name in (None, "rmse"):
            return "at least 20 dB of signal over noise kept"
        return f"at most {points(max_drop)} of {name} lost"

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict for the Keras model and each file, and each output with labels.

        The keys are `name`, `output`, the figures of the task (see `scores.scores`) and the metrics
        that were asked for.
        """
        return [
            {
                "name": name,
                "output": output,
                **{k: v for k, v in row["scores"].items() if not k.startswith("per_")},
                **_asked(row),
            }
            for name, output, row in self._scored()
        ]

    def classes(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the figures of each class of each output, of the Keras model and a file.

        Args:
            name: Such as `"tflite int8"`; the best file by default.

        Returns:
            Dicts of `output`, `class` (its name if it has one), `support` (rows, or their weight),
            `precision`, `recall`, `f1`, `auc` of the file, and the same of the Keras model behind
            `keras_`. Empty without labels or classes.
        """
        return self._groups(name, "class", self._names)

    def entities(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the figures of each type of entity, where classes are tags of BIO.

        Args:
            name: As for `classes`.

        Returns:
            Dicts of `output`, `entity` (the type), `support` (entities among the labels),
            `precision`, `recall`, `f1` of the file, and the same of the Keras model behind
            `keras_`. Entities count whole.
        """
        return self._groups(name, "entity", self._types)

    def _groups(
        self, name: str | None, what: str, names_of: Callable[[str, int], list[str]]
    ) -> list[dict[str, Any]]:
        rows = {(who, output): row["scores"] for who, output, row in self._scored()}
        name = name or self._best_name()
        found = []
        for (who, output), scores in rows.items():
            table, before = scores.get(f"per_{what}"), rows.get(("keras", output), {})
            if who != (name or "keras") or not table:
                continue
            names = names_of(output, len(table["support"]))
            earlier = before.get(f"per_{what}") or {}
            keys = [key for key in _PER_CLASS if key in table]
            for k, support in enumerate(table["support"]):
                found.append(
                    {
                        "output": output,
                        what: names[k] if k < len(names) else str(k),
                        "support": support,
                        **{key: _at(table[key], k) for key in keys},
                        **{f"keras_{key}": _at(earlier[key], k) for key in keys if earlier},
                    }
                )
        return found

    def table(self, width: int = 80) -> list[str]:
        """Return the figures of the Keras model, the best file and those that failed, as lines.

        Those of each class follow if they are few; `rows` and `classes` have all of them.
        """
        failed = {
            f"{row['format']} {row['precision']}"
            for row in self._content["artifacts"]
            if row["status"] == "failed"
        }
        shown = {"keras", self._best_name(), *failed}
        rows = [row for row in self.rows() if row["name"] in shown]
        lines: list[str] = []
        if rows:
            several = len({row["output"] for row in rows}) > 1
            keys = list(dict.fromkeys(k for row in rows for k in row))[2:]
            keys = [key for key in keys if any(row.get(key) is not None for row in rows)]
            cells = [
                (
                    f"  {row['name']}" + (f", {row['output']}" if several else ""),
                    *(_digits(row.get(key)) for key in keys),
                )
                for row in rows
            ]
            headings = ["on the labels", *(heading(key) for key in keys)]
            # What was asked for goes last, and before F1 the two that it is made of.
            asked = {name for rows in self._metrics.values() for name, *_ in rows}
            spare = sorted(
                keys, key=lambda key: (key in asked, key not in _PARTS, -keys.index(key))
            )
            dispensable = [heading(key) for key in spare]
            lines += ["", *fitted(headings, cells, width=width, dispensable=dispensable)]
        file = self._best_name() or "the Keras model"
        lines += _table(self.classes(), "class", f"classes of {file}", width)
        lines += _table(self.entities(), "entity", f"entities of {file}", width)
        return lines

    def _scored(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        figures = [("keras", self._content["keras"])]
        figures += [
            (f"{row['format']} {row['precision']}", row.get("metrics") or {})
            for row in self._content["artifacts"]
        ]
        for name, figure in figures:
            for output, row in (figure.get("outputs") or {}).items():
                if row.get("scores"):
                    yield name, output, row

    def _best_name(self) -> str | None:
        for row in self._content["artifacts"]:
            if row["file"] is not None and row["file"] == self._best:
                return f"{row['format']} {row['precision']}"
        return None

    def _types(self, output: str, count: int) -> list[str]:
        tags = self._content["evaluation"]["kinds"].get(output, {}).get("tags")
        return [] if tags is None else types(tags)

    def _names(self, output: str, count: int) -> list[str]:
        names = labels_of(self._content).get(output)
        if names is None:
            return [str(k) for k in range(count)]
        return names if len(names) == count else ["not " + names[-1], names[-1]]


def _table(rows: list[dict[str, Any]], what: str, title: str, width: int) -> list[str]:
    """Lines of a table with a row for each class or entity, if they are few."""
    if not 0 < len(rows) <= _FEW:
        return []
    keys = [key for key in ("precision", "recall", "keras_recall", "f1", "auc") if key in rows[0]]
    named = {"keras_recall": "Keras", "f1": "F1", "auc": "AUC"}
    headings = [title, "support", *(named.get(key, key) for key in keys)]
    several = len({row["output"] for row in rows}) > 1
    cells = [
        (
            f"  {row[what]}" + (f", {row['output']}" if several else ""),
            # Of weights, the sum of those of its rows.
            f"{row['support']:.{0 if row['support'] == round(row['support']) else 1}f}",
            *(_digits(row.get(key)) for key in keys),
        )
        for row in rows
    ]
    return ["", *fitted(headings, cells, width=width, dispensable=headings[:1:-1])]


def labels_of(content: dict[str, Any]) -> dict[str, list[str]]:
    """Return the names of classes by the output whose numbers they name.

    Args:
        content: The manifest.

    Returns:
        The class names of the first output, if it decides between as many classes; empty otherwise:
        a name on any other number would be a false one.
    """
    model, names = content["model"], content["model"]["labels"]
    if not names:
        return {}
    first = model["outputs"][0]
    kind = content["evaluation"]["kinds"].get(first["name"], {}).get("kind")
    units = first["shape"][-1] if len(first["shape"]) > 1 else 1
    fits = len(names) in (1, 2) if kind == "binary" else len(names) == units
    decides = kind in ("classes", "binary", "multilabel")
    return {first["name"]: list(names)} if decides and fits else {}


def figure_text(name: str | None, value: float | None) -> str:
    """Return a figure as text: accuracy in percent, others as they are."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}" if name == "accuracy" else f"{value:.4g}"


def heading(key: str) -> str:
    """Return a key of the scorecard's rows as a person reads it."""
    of_keras = key.removeprefix("keras_")
    if of_keras != key and of_keras in _PER_CLASS:
        return f"Keras {heading(of_keras)}"
    return _HEADINGS.get(key, key)


def points(share: float) -> str:
    """Return a share in 0..1 of a figure as points of percent, such as `1 point`."""
    return f"{100 * share:g} {'point' if share == 0.01 else 'points'}"


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    chosen = row.get("chosen") or {}
    if isinstance(chosen, dict):
        return dict(chosen)
    return {each["name"]: each["value"] for each in chosen}


def _digits(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.4g}"


def _at(values: Sequence[Any], k: int) -> Any:
    """An entry of a list of classes; a manifest of others may have fewer in one than in another."""
    return values[k] if k < len(values) else None
