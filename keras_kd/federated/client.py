"""What one participant brings to a federation: a model and rows, checked when it is made."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_kd.federated.privacy import Gaussian
from keras_kd.utils import checks

Array = Any
"""A NumPy array."""


class Client:
    """A participant: its model, its private rows, and how it trains on them.

    It is made where it lives, by the function that is given to `Federation(clients=[...])` or named
    in the configuration of a Flower node. Neither rows nor labels nor weights leave that place.

    Args:
        model: A built `keras.Model` with one input and one output, logits or softmax
            probabilities of all classes of the federation, also of those of which this client has
            no rows. If it is compiled, it trains on the private rows with its own optimizer and
            loss, else with Adam and cross-entropy.
        x: Private rows, `(samples, ...)`.
        y: Their classes, integers `(samples,)`.
        validation_data: `(x, y)` on which this client measures itself. Defaults to a part of its
            rows.
        validation_split: The share of the rows that is held out if there are no
            `validation_data`; 0 measures nothing.
        classes: Names of the model's outputs, in their order. Where the server gives names too, a
            client with another order is refused.
        epochs: Passes over the private rows in each round.
        batch_size: Private rows a step.
        public: The public rows, `x` or `(x, y)`, where the client runs in a process of its own.
        privacy: The weakest noise that this client answers with, a `Gaussian`; a server that asks
            for less, or for answers without, gets none. Defaults to what the server asks for.

    Raises:
        TypeError: If the model is no Keras model, or rows are no arrays.
        ValueError: If rows and labels do not fit together or hold NaN.

    Examples:
        >>> def make_client():
        ...     model = keras.Sequential([keras.Input((28, 28, 1)), ..., keras.layers.Dense(10)])
        ...     model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        ...     x, y = load_my_rows()
        ...     return Client(model, x, y, epochs=2)
    """

    def __init__(
        self,
        model: Any,
        x: Any,
        y: Any,
        *,
        validation_data: Any = None,
        validation_split: float = 0.2,
        classes: Sequence[str] | None = None,
        epochs: int = 1,
        batch_size: int = 32,
        public: Any = None,
        privacy: Gaussian | None = None,
    ) -> None:
        checks.require_model(model, "model of a client")
        if privacy is not None and not isinstance(privacy, Gaussian):
            raise TypeError(
                f"`privacy` is one like `Gaussian(10.0, 1e-5, 2.0)`. Received: {privacy!r}."
            )
        self.privacy = privacy
        self.model = model
        self.x, self.y = rows_of(x, y, "x", "y")
        self.classes = names_of(classes)
        self.epochs, self.batch_size = (
            checks.whole("epochs", epochs),
            checks.whole("batch_size", batch_size),
        )
        if not 0 <= checks.number("validation_split", validation_split) < 1:
            raise ValueError(f"`validation_split` lies in [0, 1). Received: {validation_split!r}.")
        self.validation: tuple[Array, Array] | None = None
        if validation_data is not None:
            self.validation = pair_of(validation_data, "validation_data")
            if self.validation[0].shape[1:] != self.x.shape[1:]:
                raise ValueError(
                    f"Rows of `validation_data` have shape {self.validation[0].shape[1:]}, and "
                    f"those of `x` {self.x.shape[1:]}."
                )
        elif held := int(len(self.y) * validation_split):
            order = np.random.default_rng(0).permutation(len(self.y))
            self.validation = self.x[order[:held]], self.y[order[:held]]
            self.x, self.y = self.x[order[held:]], self.y[order[held:]]
        self.public = None if public is None else Public(public)

    def has(self, units: int) -> Array:
        """Which classes the private rows hold, uint8 `(units,)`.

        Args:
            units: Outputs of the model.

        Raises:
            ValueError: If a label has no output.
        """
        labels = self.y if self.validation is None else np.append(self.y, self.validation[1])
        if labels.max() >= units:
            raise ValueError(
                f"A client has the label {int(labels.max())}, and its model "
                f"`{self.model.name}` has {units} outputs, of the classes 0 to {units - 1}."
            )
        # Those of the rows that are trained on: of others the model cannot know.
        return np.isin(np.arange(units), self.y).astype("uint8")


def names_of(classes: Sequence[str] | None) -> list[str] | None:
    """Names of classes, checked.

    Args:
        classes: What was given, or `None`.

    Raises:
        TypeError: If they are no list of names.
    """
    if classes is None:
        return None
    if isinstance(classes, str) or not isinstance(classes, Sequence | np.ndarray):
        raise TypeError(
            f"`classes` lists the names of all classes in order. Received: classes={classes!r}."
        )
    return [str(name) for name in classes]


def made(make: Callable[[], Any]) -> Client:
    """The client that a maker makes.

    Args:
        make: A function without arguments that returns a `Client`, or its arguments: `(model, x,
            y)`, `(model, (x, y))`, `(model, (x, y), (x_validation, y_validation))`, or a dict of
            them by name.

    Raises:
        TypeError: If it returned something else.
    """
    found = make()
    if isinstance(found, Client):
        return found
    if isinstance(found, dict) and {"model", "x", "y"} <= set(found):
        return Client(**found)
    if isinstance(found, tuple | list) and len(found) in (2, 3):
        if isinstance(found[1], tuple | list):
            x, y = found[1]
            return Client(found[0], x, y, validation_data=found[2] if len(found) == 3 else None)
        if len(found) == 3:
            return Client(*found)
    raise TypeError(
        "A function of `clients` returns a `keras_kd.federated.Client`, or `(model, x, y)`. "
        f"Received: {type(found).__name__}."
    )


class Public:
    """The rows that everybody has.

    Args:
        given: `x`, or `(x, y)` where labels are there too.

    Attributes:
        x: Rows, `(rows, ...)`.
        y: Their classes `(rows,)`, or `None`.
        identity: Number of rows and a checksum, by which two copies are compared.

    Raises:
        TypeError: If they are no arrays.
        ValueError: If there are none, or they hold NaN.
    """

    def __init__(self, given: Any) -> None:
        if isinstance(given, tuple | list):
            self.x, self.y = pair_of(given, "public")
        else:
            self.x, self.y = inputs_of(given, "public"), None
        if len(self.x) > 1 and not (self.x[1:] != self.x[:1]).any():
            raise ValueError(
                f"`public` holds one row {len(self.x)} times, so that all answers would be the "
                "same. Pass different rows."
            )
        self.identity = [len(self.x), zlib.crc32(np.ascontiguousarray(self.x))]


def inputs_of(x: Any, name: str) -> Array:
    """Rows of numbers, checked."""
    if isinstance(x, dict) or not hasattr(x, "__array__"):
        raise TypeError(
            f"`{name}` is one array of rows. Received: {type(x).__name__}. Answers are kept by the "
            "number of the row, which datasets and dicts of inputs do not have."
        )
    x = checks.as_array(x)
    if x.ndim < 2 or x.dtype.kind not in "biuf" or not len(x):
        raise ValueError(
            f"`{name}` holds rows of numbers, `(rows, ...)`. Received: shape {x.shape}, dtype "
            f"{x.dtype}."
        )
    checks.require_finite(x, name)
    return x


def pair_of(given: Any, name: str) -> tuple[Array, Array]:
    """Rows and their classes that came as `(x, y)`, checked."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"`{name}` is a pair `(x, y)`. Received: {type(given).__name__}.")
    x, y = given
    return rows_of(x, y, f"x of {name}", f"y of {name}")


def rows_of(x: Any, y: Any, x_name: str, y_name: str) -> tuple[Array, Array]:
    """Rows and their classes, checked."""
    x = inputs_of(x, x_name)
    if not hasattr(y, "__array__"):
        raise TypeError(f"`{y_name}` is an array of classes. Received: {type(y).__name__}.")
    y = checks.as_array(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise ValueError(
            f"`{y_name}` holds one class number a row, integers `(rows,)`. Received: shape "
            f"{y.shape}, dtype {y.dtype}. Of one-hot rows take `y.argmax(-1)`."
        )
    if len(x) != len(y):
        raise ValueError(f"`{x_name}` has {len(x)} rows, and `{y_name}` {len(y)}.")
    if y.min() < 0:
        raise ValueError(f"`{y_name}` holds the class {int(y.min())}, and classes count from zero.")
    return x, y.astype("int64")
