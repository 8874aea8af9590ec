"""Attacks: inputs within a threat that a model gets wrong.

`ascend` is the one walk uphill, in the compiled step of a training and in evaluation alike;
`attack` is the public door. FGSM and PGD follow the gradient, in inference mode, so that no
BatchNorm statistics move; the square attack (`square.py`) asks for answers alone. May import:
`backends`, `threats`, `formulas`, `classifier`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_kd import backends
from keras_kd.robust import formulas, square
from keras_kd.robust.classifier import Classifier, FileClassifier, in_batches, labels_of
from keras_kd.robust.threats import Threat, require_threat
from keras_kd.utils import archives, checks
from keras_kd.utils.types import Tensor

KINDS = ("fgsm", "pgd", "square")


def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    threat: Threat,
    steps: int | None = None,
    step: float | None = None,
) -> Tensor:
    """Walk uphill within the threat: `x <- within(x + step * unit(gradient))`, again and again.

    Args:
        objective: `fn(x)`: the values `(batch,)` that are made as great as possible.
        x: Inputs `(batch, ...)`.
        start: Where the walk begins, within the threat.
        threat: How far and by which steps.
        steps: Defaults to those of the threat.
        step: Length of a step. Defaults to that of the threat.

    Returns:
        The last inputs, with no gradient.
    """
    length = threat.step if step is None else step

    def body(_: Tensor, at: Tensor) -> Tensor:
        gradient = backends.gradient(objective, at)
        # A gradient that is no number would carry the row to nowhere.
        gradient = ops.where(ops.isfinite(gradient), gradient, ops.zeros_like(gradient))
        return threat.within(at + length * threat.unit(gradient), x)

    x, start = (ops.stop_gradient(ops.convert_to_tensor(part)) for part in (x, start))
    count = threat.steps if steps is None else steps
    found = body(0, start) if count == 1 else ops.fori_loop(0, count, body, start)
    return ops.stop_gradient(found)


def attack(
    model: keras.Model,
    x: Tensor,
    y: np.ndarray | None,
    threat: Threat,
    kind: str = "pgd",
    *,
    targeted: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    queries: int = 1000,
    from_logits: bool | None = None,
) -> np.ndarray:
    """Attack each row of some inputs.

    The result is within the ball and the bounds, which is checked. A row that is wrong as it is
    stays as it is. The same seed gives the same rows, whatever the batch size and, but for
    rounding, the backend.

    Args:
        model: A `keras.Model` with one input and one output: logits or probabilities of exclusive
            classes, or one unit. For `"square"` also an exported file: its path, or what
            `keras_kd.export.load` returned.
        x: Inputs `(rows, ...)` in floating point, within the threat's bounds.
        y: Labels: class numbers `(rows,)` or one-hot; `None` for the model's own decisions.
            With `targeted=True` the classes to be reached.
        threat: `Linf` or `L2`.
        kind: `"fgsm"`: one step of length `epsilon` from the input. `"pgd"`: the threat's steps
            and restarts, each from a random point of the ball. `"square"`: random search without
            gradients.
        targeted: Whether `y` is what the model is to be made say.
        seed: Of random starts and searches.
        batch_size: Rows at once.
        queries: Answers that `"square"` may ask for, for each row.
        from_logits: Whether the model returns logits; `None` finds out.

    Returns:
        float32 `(rows, ...)`.

    Raises:
        TypeError: If the threat is none, or inputs are not in floating point.
        ValueError: If inputs leave the bounds, labels do not fit, or the kind is unknown.
        FloatingPointError: If the attack did not stay within the threat.

    Examples:
        >>> threat = Linf(0.1, steps=20)
        >>> attacked = attack(model, x, y, threat, kind="pgd")

    Reference:
        - [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572)
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
        - [Andriushchenko et al., 2020](https://arxiv.org/abs/1912.00049)
    """
    require_kind(kind)
    require_threat(threat)
    checks.whole("seed", seed, 0)
    checks.whole("batch_size", batch_size)
    checks.whole("queries", queries)
    x = checks.as_array(x)
    threat.require(x)
    x = x.astype("float32")
    classifier = classifier_of(model, x[:32], from_logits)
    if isinstance(classifier, Classifier):
        classifier.require_attackable()
    if isinstance(classifier, FileClassifier) and kind != "square":
        raise ValueError(
            f"An exported file has no gradients for {kind!r}. Attack it with `kind='square'`, or "
            "attack the Keras model that it was made from and run the file on the result."
        )
    before = classifier.predict(x, batch_size)
    if y is None and targeted:
        raise ValueError("A targeted attack needs `y`, the classes that it is to reach.")
    labels = before.argmax(-1) if y is None else labels_of(y, len(x), classifier.classes)
    if kind == "square" or isinstance(classifier, FileClassifier):
        found = square.search(
            classifier.predict, x, labels, threat, queries, seed, targeted, batch_size
        )
    else:
        found = white_box(classifier, x, labels, threat, kind, seed, targeted, batch_size)
    threat.require_kept(found, x)
    return found


def require_kind(kind: object) -> None:
    """Raise `ValueError` for a kind of attack that is not known, with a close match."""
    checks.one_of("kind", kind, KINDS)


def classifier_of(
    model: keras.Model, rows: np.ndarray, from_logits: bool | None = None
) -> Classifier | FileClassifier:
    """A model, a file that was loaded, or the path of one, as logits.

    Args:
        model: A `keras.Model`, an exported file or its path, or that of a `.keras` file.
        rows: A few inputs.
        from_logits: Whether it returns logits; `None` finds out.
    """
    from keras_kd.export.loaded import LoadedModel, load

    checks.logits_flags(from_logits)
    if isinstance(model, str | Path):
        if str(model).endswith(".keras"):
            archives.keras_file(model)
            loaded = keras.saving.load_model(model, compile=False, safe_mode=True)
            return Classifier(loaded, rows, from_logits)
        model = load(model)
    if isinstance(model, LoadedModel):
        return FileClassifier(model, rows, from_logits)
    return Classifier(model, rows, from_logits)


def white_box(
    classifier: Classifier,
    x: np.ndarray,
    labels: np.ndarray,
    threat: Threat,
    kind: str,
    seed: int,
    targeted: bool = False,
    batch_size: int = 256,
    starts: Threat | None = None,
) -> np.ndarray:
    """FGSM or PGD on many rows; the arguments are those of `attack`.

    With `starts` PGD begins anywhere in the ball of that threat.
    """
    sign = -1.0 if targeted else 1.0
    once = kind == "fgsm"

    def run(x: Tensor, labels: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def objective(at: Tensor) -> Tensor:
            return sign * formulas.crossentropy(classifier.logits(at), labels)

        start = threat.within(x + start, x)
        if once:
            found = ascend(objective, x, start, threat, steps=1, step=threat.epsilon)
        else:
            found = ascend(objective, x, start, threat)
        logits = classifier.logits(found)
        said = ops.cast(ops.argmax(logits, axis=-1), labels.dtype)
        done = said == labels if targeted else said != labels
        return found, sign * formulas.crossentropy(logits, labels), done

    program = backends.program(run, [classifier.model])
    labels = labels.astype("int32")
    worst = x.copy()
    said = classifier.predict(x, batch_size).argmax(-1)
    done = said == labels if targeted else said != labels
    # What is wrong as it is needs no attack.
    loss = np.where(done, np.inf, -np.inf)
    for restart in range(1 if once else threat.restarts):
        left = np.flatnonzero(~done)
        if not len(left):
            break
        # Drawn for all rows, so that a row's start does not depend on the others.
        drawn = threat if starts is None else starts
        start = np.zeros_like(x) if once else drawn.noise(x.shape, (seed, restart))
        found, value, now = in_batches(program, batch_size, x[left], labels[left], start[left])
        better = now | (value > loss[left])
        worst[left[better]], loss[left[better]] = found[better], value[better]
        done[left[now]] = True
    return worst
