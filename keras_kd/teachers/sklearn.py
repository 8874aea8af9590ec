"""A fitted estimator of scikit-learn as teacher, passed as the object that it is."""

from __future__ import annotations

import hashlib
import json
import types
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import keras
import numpy as np

from keras_kd.teachers.black_box import PROBABILITIES, VALUES, BlackBox, Told
from keras_kd.utils.types import Tensor, Tensors

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator


class _Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Take in more bytes."""


class EstimatorTeacher(BlackBox):
    """What `from_sklearn` makes: a black box that is known by all that its estimator has learned.

    Args:
        estimator: The estimator.
        predict: As for `BlackBox`.
        outputs: As for `BlackBox`.
        **options: As for `BlackBox`.
    """

    def __init__(
        self, estimator: BaseEstimator, predict: Any, outputs: Any, **options: Any
    ) -> None:
        super().__init__(predict, outputs, **options)
        self.estimator = estimator

    def fingerprint(self) -> str:
        """Identify the estimator by its parameters and by what it has learned."""
        digest = hashlib.sha256(json.dumps(self.described()).encode())
        _feed(digest, self.estimator, [])
        return digest.hexdigest()


def from_sklearn(
    estimator: BaseEstimator,
    *,
    units: int | None = None,
    classes: Sequence[Any] | None = None,
    binary: bool = False,
    name: str | None = None,
    version: str | None = None,
) -> BlackBox:
    """Make a teacher of a fitted estimator of scikit-learn, or of a pipeline that ends in one.

    Classifiers answer by `predict_proba`, in the order of `estimator.classes_`: labels of the
    student are the places in it. Regressors answer by `predict`. The estimator is passed as an
    object and never read from a file, since that would run what is in it.

    Keras hands on float32, and an estimator that was fitted to float64 may decide otherwise where
    a number is at a threshold: fit it to `x.astype("float32")`. A dict of columns is put into the
    order of `feature_names_in_`, and inputs of more axes, as images, are flattened.

    A classifier that counts can answer 0. In its place stands the smallest share that it can
    count: one neighbor of `n_neighbors` with equal weights, the least share of a class in a leaf of
    one tree of a forest; elsewhere as in `BlackBox`.

    Args:
        estimator: The fitted estimator.
        units: `1` makes one unit of two classes, the logit `log p_1 - log p_0`, for a student that
            ends in one. Defaults to one unit a class.
        classes: Names of the classes that the estimator should have, in this order; they are
            compared with `estimator.classes_`. `None` compares nothing.
        binary: Whether the estimator is one of several labels a row (multi-label): each gets one
            unit.
        name: For messages and records. Defaults to the class of the estimator.
        version: As in `BlackBox`. What the estimator has learned counts in any case.

    Returns:
        The teacher.

    Raises:
        TypeError: If it is no estimator, but for instance a path.
        ValueError: If it is not fitted, a classifier without `predict_proba`, has other classes,
            or `units` does not fit it.
        ImportError: If scikit-learn is not installed.

    Examples:
        >>> booster = HistGradientBoostingClassifier().fit(x_train, y_train)
        >>> distiller = keras_kd.Distiller(student, from_sklearn(booster))

    Reference:
        - [Bucila et al., 2006](https://doi.org/10.1145/1150402.1150464), section 2
    """
    probabilities = _answers_probabilities(estimator)
    named = str(name or type(estimator).__name__)
    options = {"name": named, "version": version, "binary": binary}
    if not probabilities:
        if units is not None or classes is not None or binary:
            raise ValueError(
                f"`units`, `classes` and `binary` speak of classes, and `{named}` is a regressor. "
                "Leave them out."
            )

        def values(x: Tensor) -> Any:
            return estimator.predict(_table(estimator, x))

        return EstimatorTeacher(estimator, _quiet(values), VALUES, **options)
    found: Any = getattr(estimator, "classes_", None)
    several = isinstance(found, list)
    if classes is not None:
        ours = None if found is None or several else [str(each) for each in found]
        if ours != [str(each) for each in classes]:
            raise ValueError(
                f"`{named}` has the classes {ours}, in this order. Received: classes="
                f"{[str(each) for each in classes]}. Name them as `estimator.classes_` does, and "
                "label the student's data in that order."
            )
    if units not in (None, 1) or (units == 1 and (several or found is None or len(found) != 2)):
        count = "several outputs" if several else f"{0 if found is None else len(found)} classes"
        raise ValueError(
            f"`units` is 1 for two classes, or None. Received: units={units!r} and `{named}` of "
            f"{count}."
        )
    smallest = _smallest(estimator)
    labels = found if several and found is not None else []
    many = [i for i, each in enumerate(labels) if binary and len(each) > 2]
    if many:
        raise ValueError(
            f"Label {many[0]} of `{named}` has the classes {list(labels[many[0]])}, and with "
            "`binary=True` a label is there or not. Leave `binary` out: each output has classes."
        )
    if several and not binary:
        forms: Any = {f"output_{i}": PROBABILITIES for i in range(len(found))}
    else:
        forms = PROBABILITIES

    def ask(x: Tensor) -> Any:
        p = estimator.predict_proba(_table(estimator, x))
        if isinstance(p, list):
            if binary:
                return np.stack(list(map(_is_there, p, found)), axis=-1)
            return {f"output_{i}": each for i, each in enumerate(p)}
        return p[:, 1] if units == 1 else p

    by_class = None if several or found is None or units == 1 or binary else list(found)
    teacher = EstimatorTeacher(
        estimator, _quiet(ask), forms, classes=by_class, smallest=smallest, **options
    )
    if several and not binary:
        sizes = {f"output_{i}": len(each) for i, each in enumerate(found)}
    elif several or (binary and found is not None):
        sizes = {"output": len(found)}
    elif found is not None:
        sizes = {"output": 1 if units == 1 else len(found)}
    else:
        sizes = {}
    return teacher.expect(
        **{key: Told(PROBABILITIES, (count,), smallest) for key, count in sizes.items()}
    )


def _is_there(p: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The probability that a label is there, its last class; a single class says it of all rows."""
    if len(classes) > 1:
        return p[:, -1]
    return np.full(len(p), float(bool(classes[0])))


def _answers_probabilities(estimator: BaseEstimator) -> bool:
    """Whether this is a fitted classifier, not a regressor.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is not fitted, or tells no probabilities.
    """
    try:
        from sklearn import base
        from sklearn.exceptions import NotFittedError
        from sklearn.utils.validation import check_is_fitted
    except ImportError as error:
        raise ImportError(
            "`from_sklearn` needs scikit-learn: `pip install scikit-learn`."
        ) from error
    if isinstance(estimator, type) or not callable(getattr(estimator, "fit", None)):
        path = " Load it yourself and pass the object: reading it runs what is in the file."
        raise TypeError(
            "`from_sklearn` takes a fitted estimator. Received: estimator of type "
            f"{type(estimator).__name__}." + (path if isinstance(estimator, str) else "")
        )
    named = type(estimator).__name__
    if isinstance(estimator, keras.Model):
        raise TypeError(
            f"`from_sklearn` takes a fitted estimator. Received: the Keras model `{named}`, which "
            "is a teacher by itself."
        )
    if not callable(getattr(estimator, "__sklearn_tags__", None)):
        raise TypeError(
            f"`from_sklearn` takes an estimator of scikit-learn's kind, and `{named}` does not say "
            "what it is: it has no `__sklearn_tags__`. Pass `BlackBox(estimator.predict_proba, "
            "'probabilities')`, or what answers in it."
        )
    try:
        check_is_fitted(estimator)
    except NotFittedError as error:
        raise ValueError(
            f"The estimator `{named}` is not fitted. Call `fit` before it teaches."
        ) from error
    if callable(getattr(estimator, "predict_proba", None)):
        return True
    if base.is_classifier(estimator):
        raise ValueError(
            f"The classifier `{named}` has no `predict_proba`, and its scores are no logits. Fit "
            "it within `sklearn.calibration.CalibratedClassifierCV`."
        )
    if not base.is_regressor(estimator):
        raise TypeError(f"`from_sklearn` takes a classifier or a regressor. Received: a `{named}`.")
    return False


def _table(estimator: BaseEstimator, x: Tensors) -> np.ndarray:
    """One batch as rows of features."""
    names = getattr(estimator, "feature_names_in_", None)
    if isinstance(x, dict) and names is not None and set(map(str, names)) <= set(x):
        x = [x[str(name)] for name in names]
    leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(x)]
    if len(leaves) == 1 and leaves[0].ndim > 1:
        return leaves[0].reshape(len(leaves[0]), -1)
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _quiet(ask: Any) -> Any:
    """Without the warning that arrays have no names of features, of which there are none here."""

    def asked(x: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="X does not have valid feature names")
            return ask(x)

    return asked


def _smallest(estimator: BaseEstimator) -> float | None:
    """The smallest probability above 0 of a classifier that counts, `None` for any other."""
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier

    if isinstance(estimator, KNeighborsClassifier) and estimator.weights in (None, "uniform"):
        return 1.0 / int(estimator.n_neighbors)
    if isinstance(estimator, DecisionTreeClassifier):
        trees = [estimator]
    elif isinstance(estimator, RandomForestClassifier | ExtraTreesClassifier):
        trees = list(estimator.estimators_)
    else:
        return None
    least = 0.5
    for tree in trees:
        shares = tree.tree_.value[tree.tree_.children_left == -1]
        shares = shares / shares.sum(axis=-1, keepdims=True)
        least = min(least, float(shares[shares > 0].min()))
    return least / len(trees)


# What changes no answer.
_IDLE = ("n_jobs", "verbose", "_sklearn_version")


def _feed(digest: _Digest, value: object, within: list[int]) -> None:
    """Hash a value with all that it is made of; objects by what would be saved of them.

    Args:
        digest: Of `hashlib`.
        value: Anything.
        within: Identities of the objects around it, which may hold themselves.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, np.ndarray | np.generic):
        _feed_array(digest, np.asarray(value), within)
    elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | np.ufunc):
        digest.update(f"{getattr(value, '__module__', '')}.{value.__name__};".encode())
    elif id(value) in within:
        digest.update(b"again;")
    elif isinstance(value, dict):
        _feed_parts(digest, value, [*within, id(value)])
    elif isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__}{len(value)};".encode())
        for each in value:
            _feed(digest, each, [*within, id(value)])
    elif isinstance(value, set | frozenset):
        digest.update(f"{sorted(map(repr, value))};".encode())
    else:
        _feed_object(digest, value, [*within, id(value)])


def _feed_array(digest: _Digest, array: np.ndarray, within: list[int]) -> None:
    digest.update(f"{array.shape}{array.dtype.str};".encode())
    if array.dtype.names:
        # Field by field, since nobody writes what lies between them.
        for field in array.dtype.names:
            _feed(digest, array[field], within)
    elif array.dtype.hasobject:
        _feed(digest, array.tolist(), within)
    else:
        digest.update(np.ascontiguousarray(array).tobytes())


def _feed_parts(digest: _Digest, parts: dict[Any, Any], within: list[int]) -> None:
    for key in sorted(parts, key=repr):
        if key not in _IDLE:
            digest.update(f"{key!r}=".encode())
            _feed(digest, parts[key], within)


def _feed_object(digest: _Digest, value: object, within: list[int]) -> None:
    kind = type(value)
    digest.update(f"{kind.__module__}.{kind.__qualname__};".encode())
    try:
        reduced = value.__reduce_ex__(4)
    except TypeError:
        # It cannot be saved, as a lock; there is nothing learned in it.
        return
    if isinstance(reduced, str):
        digest.update(reduced.encode())
        return
    _, arguments, *state = reduced
    _feed(digest, tuple(arguments), within)
    for part in state:
        _feed(digest, part if not hasattr(part, "__next__") else list(part), within)
