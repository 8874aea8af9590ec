"""The same attack by another library, the Adversarial Robustness Toolbox: AutoPGD on crossentropy.

Its defaults are those of a demonstration, so that everything is passed: radius, step, restarts and
batch size. `predict` of its TensorFlow classifier ignores the batch size, so that rows are given in
parts. Its `AutoAttack` needs a package that it does not declare and is another ensemble than that
of the paper; AutoPGD needs neither. May import: `art`, in its functions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd import backends
from keras_kd.robust import formulas
from keras_kd.robust.classifier import Classifier, batches_of, in_batches
from keras_kd.robust.threats import Threat
from keras_kd.utils.types import Tensor

NAMES = ("art",)


def require(name: object) -> None:
    """Raise unless there is such a second opinion, and its library is installed.

    Args:
        name: `"art"` or `None`.

    Raises:
        ValueError: If it is neither.
        ImportError: If the library is missing.
    """
    if name is None:
        return
    if name not in NAMES:
        raise ValueError(
            "`second_opinion` is 'art', the Adversarial Robustness Toolbox, or `None`. Received: "
            f"second_opinion={name!r}."
        )
    if importlib.util.find_spec("art") is None:
        raise ImportError(
            "The second opinion needs the Adversarial Robustness Toolbox, which is not installed. "
            'Install it with `pip install "keras_kd[robust]"`.'
        )


def attacked_by_art(
    classifier: Classifier,
    x: np.ndarray,
    labels: np.ndarray,
    threat: Threat,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """Attack rows by AutoPGD of the Adversarial Robustness Toolbox.

    Args:
        classifier: A Keras model.
        x: `(rows, ...)`, float32.
        labels: `(rows,)` class numbers.
        threat: `Linf` or `L2`; its steps are those of AutoPGD, its step the first one.
        seed: Of its random starts.
        batch_size: Rows at once.

    Returns:
        float32 `(rows, ...)`.
    """
    with _quiet(), _seeded(seed):
        from art.attacks.evasion import AutoProjectedGradientDescent

        estimator = _estimator(classifier, x.shape[1:], threat, batch_size)
        search = AutoProjectedGradientDescent(
            estimator,
            norm=np.inf if threat.norm == "Linf" else 2,
            eps=threat.epsilon,
            # Its own paper begins with steps of twice the radius.
            eps_step=2 * threat.epsilon,
            max_iter=threat.steps,
            nb_random_init=threat.restarts,
            batch_size=batch_size,
            # Without it the loss is that of the estimator, which is the same crossentropy.
            loss_type="cross_entropy" if keras.config.backend() == "tensorflow" else None,
            verbose=False,
        )
        one_hot = np.eye(classifier.classes, dtype="float32")[labels]
        parts = [search.generate(x[s], one_hot[s]) for s in batches_of(len(x), batch_size)]
    return np.concatenate(parts).astype("float32")


def _estimator(
    classifier: Classifier, shape: tuple[int, ...], threat: Threat, batch_size: int
) -> Any:
    """The model as the library's classifier; on TensorFlow with gradients of the library's own."""
    clip = threat.bounds
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf
        from art.estimators.classification import TensorFlowV2Classifier

        # For any number of rows, since the library leaves out those that it is done with.
        any_rows = [tf.TensorSpec((None, *shape), "float32")]
        compiled = tf.function(classifier.logits, input_signature=any_rows)

        def model(x: Tensor, training: bool = False) -> Any:
            return compiled(tf.convert_to_tensor(x, "float32"))

        class OnTensorFlow(TensorFlowV2Classifier):
            def predict(self, x: np.ndarray, **_: object) -> np.ndarray:
                return classifier.predict(x.astype("float32"), batch_size)

        return OnTensorFlow(
            model=model, nb_classes=classifier.classes, input_shape=shape, clip_values=clip
        )
    from art.estimators import BaseEstimator, LossGradientsMixin
    from art.estimators.classification import ClassifierMixin

    def slope(x: Tensor, y: Tensor) -> Tensor:
        return backends.gradient(lambda at: formulas.crossentropy(classifier.logits(at), y), x)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return formulas.crossentropy(classifier.logits(x), y)

    programs = [backends.program(fn, [classifier.model]) for fn in (slope, loss)]

    class Estimator(ClassifierMixin, LossGradientsMixin, BaseEstimator):
        def __init__(self) -> None:
            super().__init__(model=classifier.model, clip_values=clip)
            self.nb_classes = classifier.classes

        @property
        def input_shape(self) -> tuple[int, ...]:
            return shape

        def predict(self, x: np.ndarray, **_: object) -> np.ndarray:
            return classifier.predict(x.astype("float32"), batch_size)

        def _of(self, program: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> Any:
            labels = y.argmax(axis=1).astype("int32")
            return in_batches(program, batch_size, x.astype("float32"), labels)

        def loss_gradient(self, x: np.ndarray, y: np.ndarray, **_: object) -> Any:
            return self._of(programs[0], x, y)

        def compute_loss(self, x: np.ndarray, y: np.ndarray, **_: object) -> Any:
            return self._of(programs[1], x, y)

        def fit(self, x: Tensor, y: np.ndarray | None, **_: object) -> None:
            raise NotImplementedError("It is attacked, and not trained.")

    return Estimator()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The library draws from NumPy's global numbers, which go on afterwards as if it had not."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("art")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def zero_gradients(
    classifier: Classifier, x: np.ndarray, labels: np.ndarray, batch_size: int
) -> int:
    """Count the rows whose crossentropy has no gradient at all.

    Args:
        classifier: A Keras model.
        x: `(rows, ...)`, float32.
        labels: `(rows,)` class numbers.
        batch_size: Rows at once.
    """

    def run(x: Tensor, y: Tensor) -> Tensor:
        slope = backends.gradient(lambda at: formulas.crossentropy(classifier.logits(at), y), x)
        return ops.max(ops.abs(ops.reshape(slope, (ops.shape(slope)[0], -1))), axis=1)

    program = backends.program(run, [classifier.model])
    return int((in_batches(program, batch_size, x, labels.astype("int32")) == 0).sum())
