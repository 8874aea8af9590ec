"""What clients answer, what is made of their answers, and how everyone learns from it.

A method is a thin class around the functions of `aggregation`: `answer` makes what a client sends
of its logits, `consensus` makes what the student learns of what was joined, `targets` and `loss`
say how a model learns what it was told. A new method derives from `Method` and adds a line to
`METHODS`. May import: `aggregation`, `utils`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_kd.federated.aggregation import Array, shares, sharpened, softmax
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor


def mean_absolute_difference(told: Tensor, logits: Tensor) -> Tensor:
    """`mean_c |t_c - z_c|`, a class for which `told` is NaN counting as met.

    Args:
        told: `(batch, classes)`.
        logits: `(batch, classes)`.

    Returns:
        `(batch,)`.
    """
    wanted = ops.where(ops.isnan(told), logits, told)
    return ops.mean(ops.abs(wanted - logits), axis=-1)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Method:
    """How a federation distils; base of `FedMD`, `DSFL` and `FedDF`.

    Args:
        epochs: Passes of a client over the public rows that it is told of, in each round.
        batch_size: Rows a step of these passes, and of the student's.
        learning_rate: Of the Adam optimizer that clients learn from the answers with.
        student_epochs: Passes of the server's student over all rows that were answered so far, in
            each round.

    Raises:
        ValueError: If a number is out of range.
    """

    name: ClassVar[str] = ""
    probabilities: ClassVar[bool] = False
    """Whether clients send probabilities, which lie in [0, 1], and not logits."""
    tells_student: ClassVar[bool] = False
    """Whether clients are told what the student answers, and not what they joined themselves."""
    patience: ClassVar[int | None] = None
    """Passes without gain on a held-out tenth after which the student stops, if it does."""

    epochs: int = 5
    batch_size: int = 100
    learning_rate: float = 1e-3
    student_epochs: int = 5

    def __post_init__(self) -> None:
        self.epochs = checks.whole("epochs", self.epochs)
        self.batch_size = checks.whole("batch_size", self.batch_size)
        self.learning_rate = checks.positive("learning_rate", self.learning_rate)
        self.student_epochs = checks.whole("student_epochs", self.student_epochs)

    def answer(self, logits: Array) -> Array:
        """What a client sends: float32 `(rows, classes)` of its logits."""
        found = softmax(logits) if self.probabilities else np.asarray(logits)
        return found.astype("float32")

    def consensus(self, joined: Array, known: Array) -> Array:
        """What the joined answers `(rows, classes)` say, as `targets` reads it."""
        return joined

    def targets(self, told: Array, known: Array) -> Array:
        """What `loss` compares the logits of a model with, float32 `(rows, classes)`."""
        raise NotImplementedError

    def loss(self) -> Any:
        """A loss of Keras between `targets` and logits."""
        return keras.losses.CategoricalCrossentropy(from_logits=True)

    def settings(self) -> dict[str, Any]:
        """What clients have to know of the method, as plain numbers."""
        return {
            "method": self.name,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
        }

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({named})"


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FedMD(Method):
    """Mean logits, from which everyone learns by the mean absolute error.

    Args:
        epochs: As in `Method`.
        batch_size: As in `Method`.
        learning_rate: As in `Method`.
        student_epochs: As in `Method`.
        pretrain: Passes over the labeled public rows with which every client begins. They need
            `public=(x, y)`.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> method = FedMD(epochs=1, batch_size=256)

    Reference:
        - [Li and Wang, 2019](https://arxiv.org/abs/1910.03581), algorithm 1
    """

    name = "fedmd"

    pretrain: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pretrain = checks.whole("pretrain", self.pretrain, 0)

    def targets(self, told: Array, known: Array) -> Array:
        """The logits, NaN in classes that no client knows."""
        return np.where(known, told, np.nan).astype("float32")

    def loss(self) -> Any:
        """`mean_absolute_difference`."""
        return mean_absolute_difference

    def settings(self) -> dict[str, Any]:
        """As in `Method`, and the first passes."""
        return {**super().settings(), "pretrain": self.pretrain}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DSFL(Method):
    """Mean probabilities whose entropy is reduced, from which everyone learns by cross-entropy.

    `softmax(mean(p) / era)`. A class is averaged over the clients that know it, and rows are
    scaled to sum to 1 before.

    Args:
        era: Temperature of the entropy reduction, dimensionless: 0.1 makes 0.5 against 0.3 into
            0.88 against 0.12.
        epochs: As in `Method`.
        batch_size: As in `Method`.
        learning_rate: As in `Method`.
        student_epochs: As in `Method`.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> method = DSFL(era=0.1)

    Reference:
        - [Itahara et al., 2020](https://arxiv.org/abs/2008.06180), algorithm 1
    """

    name = "dsfl"
    probabilities = True

    era: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.era = checks.positive("era", self.era)

    def consensus(self, joined: Array, known: Array) -> Array:
        """The joined probabilities with less entropy."""
        return sharpened(shares(np.where(known, joined, 0.0)), self.era, known)

    def targets(self, told: Array, known: Array) -> Array:
        """The probabilities, which may have been rounded on their way."""
        return shares(told).astype("float32")


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FedDF(Method):
    """The server's student learns from the mean logits of all, and the clients from the student.

    The student minimizes `KL(softmax(mean z) || softmax(z))` until a held-out tenth of the rows
    gains no more, with a learning rate that falls by a cosine. Where FedDF sends weights of models
    back, clients here are told what the student answers: nothing but answers crosses.

    Args:
        epochs: As in `Method`.
        batch_size: As in `Method`.
        learning_rate: As in `Method`.
        student_epochs: At most so many passes of the student in each round.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> method = FedDF(student_epochs=20)

    Reference:
        - [Lin et al., 2020](https://arxiv.org/abs/2006.07242), algorithm 1
    """

    name = "feddf"
    tells_student = True
    patience = 3

    batch_size: int = 128
    student_epochs: int = 20

    def targets(self, told: Array, known: Array) -> Array:
        """The softmax of the logits over the classes that somebody knows."""
        return softmax(told, known).astype("float32")


METHODS = {method.name: method for method in (FedMD, DSFL, FedDF)}


def of_settings(said: dict[str, Any]) -> Method:
    """The method that `Method.settings` told of, on the side of a client.

    Args:
        said: The numbers of a packet; those that are no settings are left alone.

    Raises:
        ValueError: If there is no such method.
    """
    checks.one_of("method", said.get("method"), list(METHODS))
    kind = METHODS[said["method"]]
    return kind(**{f.name: said[f.name] for f in dataclasses.fields(kind) if f.name in said})
