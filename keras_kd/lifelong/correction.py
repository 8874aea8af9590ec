"""Methods that take back, when a task ends, the head's bias towards new classes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from keras_kd.lifelong.distilling import softened_crossentropy
from keras_kd.lifelong.method import Ending, Method
from keras_kd.utils import checks
from keras_kd.utils.types import Array, Tensor

if TYPE_CHECKING:
    from keras_kd.lifelong.lesson import Lesson


class _Corrected(Method):
    """Both train on the rows of the memory as on those of the task, and keep the old answers."""

    terms = ("label_loss", "distillation_loss")
    uses_memory = True
    joins = True
    reads_old = True
    needs_new = True
    temperature: float

    def loss(
        self, lesson: Lesson, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """`(1 - w) CE(y, z) + w CE(softmax(z_old / T), softmax(z / T))`, `w = C_old / C_all`."""
        terms = super().loss(lesson, parts, y, outputs)
        if lesson.old is not None:
            share = len(lesson.old_columns) / lesson.counts[2]
            old = lesson.read_old(parts["x"])["logits"]
            apart = softened_crossentropy(old, lesson.of_old(outputs["logits"]), self.temperature)
            terms["label_loss"] = (1 - share) * terms["label_loss"]
            terms["distillation_loss"] = share * ops.mean(apart)
        return terms


class WeightAligning(_Corrected):
    """Make the columns of new classes as long, on average, as those of old ones.

    Minimizes `(1 - w) CE(y, z) + w CE(softmax(z_old / T), softmax(z / T))` with `w = C_old / C_all`
    on rows of task and memory alike. When the task ends, the new columns of the kernel are
    multiplied by `mean ||old column|| / mean ||new column||`; the bias stays as it is.

    Args:
        temperature: `T`, positive.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If it is not positive.

    Examples:
        >>> method = WeightAligning()
        >>> learner = Learner(model, method=method, memory=Memory(200, policy="herding"))

    Reference:
        - [Zhao et al., 2020](https://arxiv.org/abs/1911.07053), equations 6 to 10
    """

    def __init__(self, temperature: float = 2.0) -> None:
        self.temperature = checks.positive("temperature", temperature)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {"temperature": self.temperature}

    def correct(self, ending: Ending) -> None:
        """Align the lengths of the columns."""
        if not ending.old or not ending.new:
            return
        values = ending.head.arrays()
        kernel = values["kernel"].copy()
        lengths = np.linalg.norm(kernel.astype("float64"), axis=0)
        kernel[:, ending.new] *= lengths[ending.old].mean() / max(lengths[ending.new].mean(), 1e-12)
        ending.head.set_arrays({**values, "kernel": kernel})


class BiasCorrection(_Corrected):
    """Correct the logits of new classes by a factor and a shift, fitted on held-out rows.

    Minimizes `(1 - w) CE(y, z) + w CE(softmax(z_old / T), softmax(z / T))` with `w = C_old / C_all`
    on rows of task and memory alike, but for a share of the memory's rows and as many new ones a
    class. On these, when the task ends, `a * z + b` of the new columns is fitted by the
    crossentropy of the logits plus `shift_penalty * b**2 / 2`, and made part of the Dense layer,
    whose later training begins from it. A head without a bias is given the factor alone.

    Args:
        temperature: `T`, positive.
        held_out: Share of the memory's rows, in (0, 1): 0.1 in the paper.
        shift_penalty: Keeps the shift small where few rows tell of it; the paper has none.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If one is out of range.

    Examples:
        >>> method = BiasCorrection()
        >>> learner = Learner(model, method=method, memory=Memory(200, policy="herding"))

    Reference:
        - [Wu et al., 2019](https://arxiv.org/abs/1905.13260), equations 1 to 5
    """

    def __init__(
        self, temperature: float = 2.0, held_out: float = 0.1, shift_penalty: float = 0.1
    ) -> None:
        self.temperature = checks.positive("temperature", temperature)
        self.holds_out = checks.positive("held_out", held_out)
        if held_out >= 1:
            raise ValueError(f"`held_out` lies in (0, 1). Received: held_out={held_out!r}.")
        self.shift_penalty = checks.number("shift_penalty", shift_penalty, 0)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {
            "temperature": self.temperature,
            "held_out": self.holds_out,
            "shift_penalty": self.shift_penalty,
        }

    def correct(self, ending: Ending) -> None:
        """Fit factor and shift, and fold them into the head."""
        if not ending.old or not ending.new:
            return
        held = np.zeros(0, "int64") if ending.held_y is None else ending.held_y
        columns = ending.head.columns_of(held)
        of_new = np.isin(columns, ending.new)
        if of_new.all() or not of_new.any():
            # Rows of one side alone would draw the columns to that side.
            warnings.warn(
                "`BiasCorrection` corrects nothing, since no rows of both old and new classes could"
                " be held out: the memory has less than two rows a class. Make it larger.",
                stacklevel=2,
            )
            return
        logits = ending.outputs(ending.held_x)["logits"]
        values = ending.head.arrays()
        # A head without a bias has no place for a shift.
        penalty = self.shift_penalty if "bias" in values else np.inf
        factor, shift = fitted_bias(logits, columns, ending.new, penalty)
        kernel = values["kernel"].copy()
        kernel[:, ending.new] *= factor
        changed = {**values, "kernel": kernel}
        if "bias" in values:
            changed["bias"] = values["bias"].copy()
            changed["bias"][ending.new] = factor * changed["bias"][ending.new] + shift
        ending.head.set_arrays(changed)


def fitted_bias(
    logits: Array, y: Array, new: np.ndarray, penalty: float = 0.0, steps: int = 100
) -> tuple[float, float]:
    """The `a` and `b` that minimize `mean CE(y, z') + penalty * b**2 / 2`, by Newton's method.

    `z'` is `a * z + b` in the new columns and `z` in the others: logits, of which the crossentropy
    takes the softmax once. The problem is convex. A factor below 0 would turn the order of the new
    classes around, and 0 would make them one: where the rows ask for either, the factor stays 1.

    Args:
        logits: `(samples, classes)`.
        y: The right columns, `(samples,)`.
        new: Positions of the new columns.
        penalty: Weight of the shift; infinite, and there is none.
        steps: Newton steps at most.

    Returns:
        Factor and shift.
    """
    factor, shift = _fitted(logits, y, new, penalty, (True, bool(np.isfinite(penalty))), steps)
    if factor > 0:
        return factor, shift
    return _fitted(logits, y, new, penalty, (False, bool(np.isfinite(penalty))), steps)


def _fitted(
    logits: Array, y: Array, new: np.ndarray, penalty: float, free: tuple[bool, bool], steps: int
) -> tuple[float, float]:
    """The same of those of factor and shift that are free; the others are 1 and 0."""
    penalty = penalty if free[1] else 0.0
    moves = np.array(free, "float64")
    logits = np.asarray(logits, "float64")
    is_new = np.zeros(logits.shape[1])
    is_new[list(new)] = 1.0
    slopes = np.stack([logits * is_new, np.broadcast_to(is_new, logits.shape)], axis=-1)
    rows = np.arange(len(y))

    def at(point: Array) -> tuple[float, Array]:
        values = logits * (1 - is_new) + slopes @ point
        shifted = values - values.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return float(-log_p[rows, y].mean() + penalty * point[1] ** 2 / 2), np.exp(log_p)

    point = np.array([1.0, 0.0])
    value, p = at(point)
    for _ in range(steps):
        mean = (p[..., None] * slopes).sum(1)
        gradient = (mean - slopes[rows, y]).mean(0) + np.array([0.0, penalty * point[1]])
        gradient *= moves
        second = np.einsum("nc,nci,ncj->ij", p, slopes, slopes) - np.einsum("ni,nj->ij", mean, mean)
        hessian = np.outer(moves, moves) * second / len(y) + np.diag([1e-9, penalty + 1e-9])
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-8:
            trial, trial_p = at(point - size * step)
            if trial <= value - 1e-4 * size * float(gradient @ step):
                break
            size /= 2
        else:
            break
        point, p = point - size * step, trial_p
        if value - trial < 1e-12:
            break
        value = trial
    return float(point[0]), float(point[1])
