"""How a model or an exported file stands up: attacks, corruptions, calibration, and what to doubt.

`evaluate` checks everything first, then works in stages: answers, attacks, doubts, second opinion,
corruptions, calibration. Each stage adds its part to the content of a `RobustReport`. A figure of
robustness that an attack merely failed to lower is the usual mistake of the field, so that a model
is attacked by several attacks whose order of strength is known, and what contradicts it is a flag.
May import: the other modules of `keras_kd.robust`, SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from keras_kd.robust import calibration, corruption, square
from keras_kd.robust import second_opinion as other_library
from keras_kd.robust.attacks import classifier_of, white_box
from keras_kd.robust.classifier import Classifier, FileClassifier, labels_of
from keras_kd.robust.report import RobustReport
from keras_kd.robust.threats import Threat, interval, require_threat
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor

if TYPE_CHECKING:
    import keras


Progress = Callable[[str, int, int], None]
_DOUBTED = 200
"""Rows on which it is looked whether attacks work at all."""
_STRONGER = 0.002
"""Share of the rows by which a weaker attack may be ahead by chance, as in AutoAttack; of few rows
one row is more, and is chance as well."""
_ALIKE = 0.95
"""Share of the rows on which a file and its twin decide alike; int8 changes fewer as a rule."""
_APART = 0.02
"""Share of the rows by which two libraries may differ."""


def evaluate(
    model: keras.Model,
    x: Tensor,
    y: np.ndarray | None,
    threat: Threat | None = None,
    *,
    corruptions: object = None,
    severities: object = corruption.SEVERITIES,
    second_opinion: str | None = None,
    calibrate_on: object = None,
    twin: object = None,
    bounds: tuple[float, float] | None = None,
    queries: int = 500,
    seed: int = 0,
    batch_size: int = 256,
    from_logits: bool | None = None,
    progress: Progress | None = None,
) -> RobustReport:
    """Measure how a model or an exported file stands up.

    A Keras model is attacked by FGSM and PGD and, on the rows that these leave, by the square
    attack. An exported file has no gradients: it is attacked by what PGD finds on its float twin,
    and by the square attack on the file itself. Attack as an attacker would: 20 steps or more.

    Args:
        model: A `keras.Model` with one input and one output, the path of a `.keras` file, or an
            exported file: its path, its folder, or what `keras_kd.export.load` returned.
        x: Inputs `(rows, ...)`, none of those that were trained on.
        y: Labels: class numbers, or one-hot.
        threat: `Linf` or `L2`; `None` leaves attacks out.
        corruptions: Names, `"all"` for those of the inputs' kind, `"image"`, `"audio"`, `"text"`,
            or `None`.
        severities: Of the corruptions.
        second_opinion: `"art"` attacks by AutoPGD of the Adversarial Robustness Toolbox as well.
        calibrate_on: Held-out `(x, y)`: by which temperature the model would be calibrated, and how
            well. `calibrate` makes that model.
        twin: Of an exported file the Keras model that it was made from.
        bounds: Least and greatest value of an input, for the corruptions where no threat says them.
            Defaults to those of `corrupt`.
        queries: Answers that the square attack may ask for, for each row.
        seed: Of attacks, corruptions and the bootstrap.
        batch_size: Rows at once.
        from_logits: Whether a Keras model returns logits; `None` finds out.
        progress: `fn(stage, done, total)`.

    Returns:
        A `RobustReport`.

    Raises:
        TypeError: If the threat is none, or inputs are not in floating point.
        ValueError: If inputs leave the bounds, labels do not fit, or a name is unknown.
        ImportError: If the second library is not installed.

    Examples:
        >>> threat = Linf(8 / 255, steps=20)
        >>> report = evaluate(student, x_test, y_test, threat, corruptions="all")
        >>> report.clean, report.adversarial
        >>> print(report.table())

    Reference:
        - [Carlini et al., 2019](https://arxiv.org/abs/1902.06705)
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), the flags
        - [Hendrycks and Dietterich, 2019](https://arxiv.org/abs/1903.12261)
    """
    checks.whole("queries", queries)
    run = _Evaluation(model, x, y, threat, seed, batch_size, from_logits, progress)
    run.take_bounds(bounds)
    names = corruption.chosen(corruptions, run.x, run.content["bounds"])
    levels = _severities(severities)
    other_library.require(second_opinion)
    if second_opinion is not None and threat is None:
        raise ValueError("A second opinion is one on attacks, and no `threat` was given.")
    run.take_twin(twin)
    if second_opinion is not None and run.twin is None:
        raise ValueError(
            "A second opinion needs gradients, which a file does not have. Pass its Keras model as "
            "`twin`."
        )
    held_out = run.held_out(calibrate_on)
    run.answers()
    if threat is not None:
        run.attacks(queries)
        run.doubts()
        if second_opinion is not None:
            run.opinion()
    run.corruptions(names, levels)
    if held_out is not None:
        run.calibration(*held_out)
    return RobustReport(run.content)


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score.

    Args:
        right: How many of the rows.
        rows: How many there are.

    Returns:
        Lower and upper end in `[0, 1]`.

    Reference:
        - [Wilson, 1927](https://doi.org/10.1080/01621459.1927.10502953)
    """
    from scipy.stats import binomtest

    found = binomtest(right, rows).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


class _Evaluation:
    """One evaluation: what is measured, and what was found so far.

    Args:
        model: As given to `evaluate`, like the rest.
    """

    def __init__(
        self,
        model: keras.Model,
        x: Tensor,
        y: np.ndarray | None,
        threat: Threat | None,
        seed: int,
        batch_size: int,
        from_logits: bool | None,
        progress: Progress | None,
    ) -> None:
        x = checks.as_array(x)
        if not len(x):
            raise ValueError("`x` has no rows to evaluate on.")
        if x.dtype.kind not in "fiu":
            raise TypeError(
                f"Models of numbers are evaluated here, and `x` holds {x.dtype}. Corrupt texts "
                "with `keras_kd.robust.corrupt`, and evaluate the model on the result."
            )
        self.threat = None
        if threat is not None:
            self.threat = require_threat(threat)
            self.threat.require(x)
        self.x = x.astype("float32") if x.dtype.kind == "f" else x
        self.seed = checks.whole("seed", seed, 0)
        self.size = checks.whole("batch_size", batch_size)
        self.progress = progress or (lambda stage, done, total: None)
        self.it = classifier_of(model, self.x[:32], from_logits)
        self.labels = labels_of(y, len(x), self.it.classes)
        if threat is not None and isinstance(self.it, Classifier):
            self.it.require_attackable()
        self.twin: Classifier | None = self.it if isinstance(self.it, Classifier) else None
        self.content: dict[str, Any] = {
            "name": self.it.name,
            "file": isinstance(self.it, FileClassifier),
            "rows": len(x),
            "threat": None if threat is None else str(threat),
            "bounds": self._bounds(),
            "attacks": {},
            "intervals": {},
            "corrupted": {},
            "flags": [],
        }

    def take_bounds(self, bounds: object) -> None:
        """The range of the inputs, where it was given."""
        given, own = interval(bounds), self.content["bounds"]
        if given is not None and own is not None and list(given) != own:
            raise ValueError(
                f"`bounds={given}` are not those of the threat, {tuple(own)}. Leave out one of "
                "them."
            )
        if given is not None:
            self.content["bounds"] = list(given)

    def _bounds(self) -> list[float] | None:
        if self.threat is not None and self.threat.bounds is not None:
            return list(self.threat.bounds)
        return None

    def take_twin(self, twin: object) -> None:
        """The Keras model that a file was made from."""
        if twin is None:
            return
        if isinstance(self.it, Classifier):
            raise ValueError("`twin` belongs to an exported file, and a Keras model was given.")
        found = classifier_of(twin, self.x[:32])
        if not isinstance(found, Classifier) or found.classes != self.it.classes:
            raise ValueError(
                f"`twin` is the Keras model that `{self.it.name}` was made from, with its "
                f"{self.it.classes} classes."
            )
        if self.threat is not None:
            found.require_attackable()
        agree = self._says(found, self.x) == self._says(self.it, self.x)
        if agree.mean() < 0.5:
            raise ValueError(
                f"`twin` decides as `{self.it.name}` does on {100 * agree.mean():.0f} % of the "
                "rows only. It is not the model that the file was made from."
            )
        if agree.mean() < _ALIKE:
            self._flag(
                f"`twin` decides as the file does on {100 * agree.mean():.1f} % of the rows only: "
                "it may not be the model that the file was made from, and what is found on it "
                "transfers less."
            )
        self.twin = found

    def held_out(self, given: object) -> tuple[np.ndarray, np.ndarray] | None:
        """The rows to calibrate on."""
        if given is None:
            return None
        if not isinstance(given, list | tuple) or len(given) != 2:
            raise TypeError("`calibrate_on` is held-out data `(x, y)`.")
        x = np.asarray(ops.convert_to_numpy(given[0]) if ops.is_tensor(given[0]) else given[0])
        if not len(x) or x.shape[1:] != self.x.shape[1:]:
            raise ValueError(
                f"`calibrate_on` holds rows of shape {self.x.shape[1:]}, as `x` does. Received: "
                f"shape {x.shape}."
            )
        checks.require_finite(x, "the inputs of `calibrate_on`")
        return x, labels_of(given[1], len(x), self.it.classes, "the labels of `calibrate_on`")

    def _says(self, classifier: Classifier | FileClassifier, x: np.ndarray) -> np.ndarray:
        return np.asarray(classifier.predict(x, self.size).argmax(axis=1))

    def _right(self, x: np.ndarray) -> np.ndarray:
        return self._says(self.it, x) == self.labels

    def _share(self, name: str, right: np.ndarray) -> float:
        self.content["intervals"][name] = list(wilson(int(right.sum()), len(right)))
        return float(right.mean())

    def _flag(self, text: str) -> None:
        self.content["flags"].append(text)

    # ----------------------------------------------------------------------------- stages

    def answers(self) -> None:
        """Accuracy and calibration on the rows as they are."""
        self.progress("answers", 0, 1)
        logits = self.it.predict(self.x, self.size)
        if not np.isfinite(logits).all():
            raise ValueError(f"`{self.it.name}` answers with NaN or infinite values.")
        self.right = logits.argmax(axis=1) == self.labels
        self.content["clean"] = self._share("clean", self.right)
        sure = calibration.sureness(logits, self.labels, self.seed)
        self.content["sureness"] = sure._asdict()
        bins = calibration.reliability(np.exp(calibration.log_softmax(logits)), self.labels)
        self.content["reliability"] = {
            key: [None if math.isnan(v) else float(v) for v in values]
            for key, values in bins._asdict().items()
        }
        self.progress("answers", 1, 1)

    def attacks(self, queries: int) -> None:
        """FGSM, PGD and square, or transfer and square."""
        threat, found = require_threat(self.threat), self.content["attacks"]
        standing = self.right.copy()
        stages = 3
        self.progress("attacks", 0, stages)
        self.pgd: np.ndarray | None = None
        if self.twin is not None:
            for i, kind in enumerate(("fgsm", "pgd")):
                attacked = white_box(
                    self.twin, self.x, self.labels, threat, kind, self.seed, False, self.size
                )
                threat.require_kept(attacked, self.x)
                if self.twin is not self.it:
                    kept = (self._says(self.twin, attacked) == self.labels) & (
                        self._says(self.twin, self.x) == self.labels
                    )
                    self.content.setdefault("twin", {})[kind] = float(kept.mean())
                    self.pgd = kept if kind == "pgd" else self.pgd
                right = self.right & self._right(attacked)
                name = kind if self.twin is self.it else f"transferred {kind}"
                found[name] = self._share(name, right)
                if kind == "pgd" or self.twin is not self.it:
                    standing &= right
                if kind == "pgd" and self.twin is self.it:
                    self.pgd = right
                self.progress("attacks", i + 1, stages)
        else:
            self._flag(
                "The file was attacked without gradients alone: pass its Keras model as `twin` for "
                "transferred attacks. Its robustness may be far lower."
            )
        self.white = float(standing.mean())
        left = np.flatnonzero(standing)
        if len(left):
            attacked = square.search(
                self.it.predict,
                self.x[left],
                self.labels[left],
                threat,
                queries,
                self.seed,
                batch_size=self.size,
            )
            threat.require_kept(attacked, self.x[left])
            standing[left] = self._says(self.it, attacked) == self.labels[left]
        found["square"] = self._share("square", standing)
        self.content["adversarial"] = self._share("adversarial", standing)
        self.content["queries"] = queries
        self.progress("attacks", stages, stages)

    def doubts(self) -> None:
        """What says that the attacks did not work, so that the figures are too high."""
        found, threat, twin = self.content["attacks"], require_threat(self.threat), self.twin
        gained = self.white - found["square"]
        if twin is self.it and self._ahead(gained):
            self._flag(
                f"The square attack, which sees no gradients, breaks {100 * gained:.1f} points "
                "that PGD left: gradients may be masked, or the steps too few."
            )
        if twin is None:
            return
        own = found if twin is self.it else self.content["twin"]
        if self._ahead(own["pgd"] - own["fgsm"]):
            self._flag(
                f"FGSM ({100 * own['fgsm']:.1f} %) is stronger than PGD ({100 * own['pgd']:.1f} "
                "%), which has more steps: the steps are too long or too few, or gradients are "
                "masked."
            )
        some = np.unique(np.linspace(0, len(self.x) - 1, min(_DOUBTED, len(self.x))).astype(int))
        x, labels = self.x[some], self.labels[some]
        flat = other_library.zero_gradients(twin, x, labels, self.size)
        if flat:
            self._flag(
                f"{flat} of {len(some)} rows have no gradient at all: the model is so sure of them "
                "that its loss is 0 in float32, or something in it has no slope."
            )
        large = self._large(threat, x)
        # From near the rows: far away from all data many models have no slope left.
        broken = white_box(twin, x, labels, large, "pgd", self.seed, False, self.size, threat)
        kept = float(
            ((self._says(twin, broken) == labels) & (self._says(twin, x) == labels)).mean()
        )
        self.content["large_ball"] = {"epsilon": large.epsilon, "accuracy": kept}
        if kept > _APART:
            self._flag(
                f"With a radius of {large.epsilon:g}, in which any input can be reached, "
                f"{100 * kept:.1f} % of {len(some)} rows are still right: the attack does not work."
            )
        few = ops.convert_to_tensor(x[:16])
        runs = [ops.convert_to_numpy(twin.logits(few)) for _ in range(5)]
        spread = float(np.max([np.abs(run - runs[0]).max() for run in runs]))
        if spread > 1e-4:
            self._flag(
                f"The model is random: five runs of the same rows differ by up to {spread:.2g}. "
                "Attack the mean of many runs."
            )
        if twin.probabilities:
            self._flag(
                "The model returns probabilities, and no layer tells their logits: gradients of "
                "sure decisions are lost. Return logits."
            )

    def _ahead(self, share: float) -> bool:
        """Whether a weaker attack leaves fewer rows by more than chance."""
        return share > _STRONGER and round(share * len(self.x)) > 1

    def _large(self, threat: Threat, x: np.ndarray) -> Threat:
        low, high = threat.bounds or (float(x.min()), float(x.max()))
        span = max(high - low, 2 * threat.epsilon)
        if threat.norm == "L2":
            span *= math.sqrt(math.prod(x.shape[1:]))
        return threat.with_changes(epsilon=span, steps=max(threat.steps, 20), restarts=1)

    def opinion(self) -> None:
        """The same by another library."""
        threat, twin = require_threat(self.threat), self.twin
        if twin is None or self.pgd is None:
            return
        self.progress("second opinion", 0, 1)
        attacked = other_library.attacked_by_art(
            twin, self.x, self.labels, threat, self.seed, self.size
        )
        kept = (self._says(twin, attacked) == self.labels) & (
            self._says(twin, self.x) == self.labels
        )
        longest = float(threat.lengths(attacked.astype("float64") - self.x).max())
        if longest > threat.epsilon * (1 + 1e-4):
            self._flag(f"The second library left the ball: it moved a row by {longest:.6g}.")
        own = float(self.pgd.mean())
        self.content["second_opinion"] = {
            "name": "AutoPGD of the Adversarial Robustness Toolbox",
            "accuracy": float(kept.mean()),
            "own": own,
        }
        self.content["intervals"]["second opinion"] = list(wilson(int(kept.sum()), len(kept)))
        apart = abs(own - float(kept.mean()))
        if apart > _APART:
            self._flag(
                f"The two libraries differ by {100 * apart:.1f} points: PGD leaves "
                f"{100 * own:.1f} %, AutoPGD of the Adversarial Robustness Toolbox "
                f"{100 * kept.mean():.1f} %. Take more steps and restarts."
            )
        self.progress("second opinion", 1, 1)

    def corruptions(self, names: list[str], levels: list[int]) -> None:
        """Accuracy under each corruption and severity."""
        done, total = 0, len(names) * len(levels)
        for name in names:
            row: dict[str, float] = {}
            for severity in levels:
                bounds = self.content["bounds"]
                made = corruption.corrupt(self.x, name, severity, self.seed, bounds)
                row[str(severity)] = self._share(f"{name} {severity}", self._right(made))
                done += 1
                self.progress("corruptions", done, total)
            self.content["corrupted"][name] = row

    def calibration(self, x: np.ndarray, labels: np.ndarray) -> None:
        """By which temperature the model would be as sure as it is right."""
        temperature = calibration.best_temperature(self.it.predict(x, self.size), labels)
        logits = self.it.predict(self.x, self.size) / temperature
        after = calibration.sureness(logits, self.labels, self.seed)
        self.content["calibration"] = {"temperature": temperature, **after._asdict()}


def _severities(given: Any) -> list[int]:
    found = list(given) if np.iterable(given) else [given]
    try:
        return sorted({corruption.require_severity(severity) for severity in found or [None]})
    except ValueError as error:
        raise ValueError(
            f"`severities` are of 1, 2, 3, 4, 5. Received: severities={given!r}."
        ) from error
