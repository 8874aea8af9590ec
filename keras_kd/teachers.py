"""What may stand as a teacher: a model, several models, or outputs read from disk."""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.taps import Answer, Reader
from keras_kd.taps import output_template as output_template
from keras_kd.typing import Tensor

__all__ = ["CachedTeacher", "Ensemble", "ModelTeacher", "Teacher", "fingerprint"]


def fingerprint(model: Any) -> str:
    """Identify a model by its layers and the bytes of its weights.

    Names do not count, since Keras numbers them anew in each process.

    Args:
        model: A built Keras model.

    Returns:
        A SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for layer in model._flatten_layers():
        activation = getattr(layer, "activation", None)
        digest.update(f"{type(layer).__name__}:{getattr(activation, '__name__', '')};".encode())
    for weight in model.weights:
        value = np.ascontiguousarray(ops.convert_to_numpy(weight))
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


class Teacher:
    """What the distiller asks of any teacher.

    Attributes:
        name: For messages and the saved record.
        variables: The variables that must stay as they are.
        kinds: `"logits"`, `"softmax"`, `"sigmoid"` or `"unknown"` for each
            flat output.
    """

    name: str

    @property
    def models(self) -> list[Any]:
        """The models that are run; none where outputs are read from disk."""
        return []

    @property
    def kinds(self) -> list[str]:
        """How each flat output is made."""
        raise NotImplementedError

    def output_template(self) -> Any:
        """The structure of the outputs with names at its leaves, or `None` if unknown."""
        return None

    def output_shapes(self) -> list[Any] | None:
        """The shapes of the flat outputs, or `None` where they are not known yet."""
        return None

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on."""
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Whether nothing is left that only a batch can tell of the outputs."""
        return True

    def inspect(self, x: Any) -> None:
        """Find out from a concrete batch what the layers alone do not tell."""

    def split(self, x: Any) -> tuple[Any, Any]:
        """Separate what the models read from what was joined to it.

        Args:
            x: One batch as the data deliver it.

        Returns:
            The models' input, and a record of the teacher's outputs or `None`.
        """
        return x, None

    def join_fit(
        self, x: Any, y: Any, batch_size: int | None, arguments: dict[str, Any]
    ) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """Change what `fit` was given, where outputs must be joined to the data.

        Args:
            x: Inputs, or a dataset.
            y: Labels.
            batch_size: Samples a step.
            arguments: The other arguments of `fit`.

        Returns:
            The same four for `keras.Model.fit`.
        """
        return x, y, batch_size, arguments

    def begin_epoch(self, epoch: int) -> None:
        """Take note that this epoch of the training begins."""

    def read(self, x: Any, record: Any, binary: Sequence[bool]) -> Answer:
        """Answer one batch, with `training=False`.

        Args:
            x: What the teacher reads.
            record: What `split` found.
            binary: For each flat output whether its units are independent.

        Returns:
            Output, logits and tapped tensors.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Identify the teacher by its weights."""
        raise NotImplementedError


class ModelTeacher(Teacher):
    """A Keras model as teacher.

    Args:
        model: A built `keras.Model`.
        from_logits: Whether its outputs are logits; `None` finds out.

    Raises:
        TypeError: If it is no Keras 3 model.
        ValueError: If it is not built.
    """

    def __init__(self, model: Any, from_logits: bool | None = None) -> None:
        require_model(model, "teacher")
        if not model.built:
            raise ValueError(
                f"The teacher `{model.name}` has no weights yet: it was never built. Load its "
                "trained weights, or call it once on a batch, before distilling from it."
            )
        self.model = model
        self.name = model.name
        self.from_logits = from_logits
        self._reader = Reader(model, "teacher", from_logits)

    @property
    def models(self) -> list[Any]:
        """The model."""
        return [self.model]

    @property
    def kinds(self) -> list[str]:
        """How each flat output is made."""
        return self._reader.kinds()

    def output_template(self) -> Any:
        """The structure of the outputs with names at its leaves, or `None` if unknown."""
        return self._reader.template

    def output_shapes(self) -> list[Any] | None:
        """The shapes of the flat outputs, or `None` for a model without a graph."""
        return self._reader.shapes

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on."""
        self._reader.reset(paths)

    @property
    def settled(self) -> bool:
        """Whether the layers tell all there is to know of the outputs."""
        return self._reader.settled

    def inspect(self, x: Any) -> None:
        """Find out from a concrete batch what the layers alone do not tell."""
        self._reader.inspect(x)

    def read(self, x: Any, record: Any, binary: Sequence[bool]) -> Answer:
        """Answer one batch."""
        return self._reader.read(x, False, binary)

    def fingerprint(self) -> str:
        """Identify the teacher by its weights."""
        return fingerprint(self.model)


class Ensemble(Teacher):
    """Several models as one teacher.

    With `combine="probabilities"` the logits are
    `log(sum_k w_k softmax(z_k))`, the mixture of the models' distributions
    (for sigmoid or one-unit outputs the logit of the mean probability); with
    `combine="logits"` they are `sum_k w_k z_k`.

    Args:
        models: Built `keras.Model`s with outputs of the same structure.
        weights: One positive float a model, dimensionless, scaled to sum 1.
            `None` weighs them equally.
        combine: `"probabilities"` or `"logits"`.
        from_logits: Whether the models' outputs are logits; `None` finds out
            for each.

    Raises:
        ValueError: If there are no models, the weights do not fit, or
            `combine` is unknown.

    Example:
        >>> teacher = Ensemble([model_a, model_b], weights=[2.0, 1.0])

    Reference:
        - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), section 3
    """

    def __init__(
        self,
        models: Sequence[Any],
        weights: Sequence[float] | None = None,
        combine: str = "probabilities",
        from_logits: bool | None = None,
    ) -> None:
        if not models:
            raise ValueError("An ensemble needs at least one model. Received: models=[].")
        self.weights = mixture_weights(weights, len(models), combine, "models")
        self.members = [ModelTeacher(model, from_logits) for model in models]
        self.combine = combine
        self.name = "+".join(member.name for member in self.members)
        counts = {len(member.kinds) for member in self.members}
        if len(counts) > 1:
            raise ValueError(
                "The models of an ensemble must have the same outputs. Received: models with "
                f"{' and '.join(str(c) for c in sorted(counts))} outputs."
            )
        first = self.members[0]
        for member in self.members[1:]:
            if None not in (_classes(first), _classes(member)) and _classes(first) != _classes(
                member
            ):
                raise ValueError(
                    "The models of an ensemble must have the same classes. Received: "
                    f"`{first.name}` with {_classes(first)}, `{member.name}` with "
                    f"{_classes(member)}."
                )

    @property
    def models(self) -> list[Any]:
        """The models, in the order given."""
        return [member.model for member in self.members]

    @property
    def kinds(self) -> list[str]:
        """How each flat output of the first model is made."""
        return self.members[0].kinds

    def output_template(self) -> Any:
        """The structure of the first model's outputs."""
        return self.members[0].output_template()

    def output_shapes(self) -> list[Any] | None:
        """The shapes of the flat outputs of the first model."""
        return self.members[0].output_shapes()

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on: `"model/layer"` names the model first.

        Raises:
            ValueError: If a path does not begin with the name of a model.
        """
        by_member: dict[int, list[str]] = {i: [] for i in range(len(self.members))}
        for path in paths:
            model, _, inner = path.partition("/")
            owners = [i for i, member in enumerate(self.members) if member.name == model]
            if len(owners) != 1 or not inner:
                names = ", ".join(f"`{member.name}`" for member in self.members)
                raise ValueError(
                    f"`{path}` does not say which model of the ensemble is read. Begin with its "
                    f"name, `model/layer`; the models are {names}, and names must be unique."
                )
            by_member[owners[0]].append(inner)
        for i, inner_paths in by_member.items():
            self.members[i].reset(inner_paths)

    @property
    def settled(self) -> bool:
        """Whether the layers of all models tell all there is to know of the outputs."""
        return all(member.settled for member in self.members)

    def inspect(self, x: Any) -> None:
        """Find out from a concrete batch what the layers alone do not tell."""
        for member in self.members:
            member.inspect(x)

    def read(self, x: Any, record: Any, binary: Sequence[bool]) -> Answer:
        """Answer one batch."""
        answers = [member.read(x, None, binary) for member in self.members]
        logits = [
            combined(list(each), self.weights, self.combine, i < len(binary) and binary[i])
            for i, each in enumerate(zip(*(answer.logits for answer in answers)))
        ]
        tensors = {
            f"{member.name}/{path}": tensor
            for member, answer in zip(self.members, answers)
            for path, tensor in answer.tensors.items()
        }
        output = keras.tree.pack_sequence_as(answers[0].output, logits)
        return Answer(output, logits, tensors)

    def fingerprint(self) -> str:
        """Identify the ensemble by its models and weights."""
        parts = [member.fingerprint() for member in self.members]
        text = f"{self.combine}{self.weights}{parts}"
        return hashlib.sha256(text.encode()).hexdigest()


def mixture_weights(
    weights: Sequence[float] | None, count: int, combine: str, what: str
) -> list[float]:
    """Weights of several teachers, scaled to sum 1.

    Args:
        weights: One positive float each, or `None` for equal weights.
        count: How many there are.
        combine: `"probabilities"` or `"logits"`.
        what: `"models"` or `"caches"`, for the message.

    Raises:
        ValueError: If the weights do not fit, or `combine` is unknown.
    """
    if combine not in ("probabilities", "logits"):
        raise ValueError(
            f"`combine` of several {what} is 'probabilities' or 'logits'. "
            f"Received: combine={combine!r}."
        )
    given = list(weights) if weights is not None else [1.0] * count
    if len(given) != count or not all(np.isfinite(w) and w > 0 for w in given):
        raise ValueError(
            f"`weights` of {count} {what} holds one positive number for each. "
            f"Received: weights={given!r}."
        )
    return [w / sum(given) for w in given]


def combined(
    logits: Sequence[Tensor], weights: Sequence[float], combine: str, binary: bool
) -> Tensor:
    """The logits of several teachers as one: see `Ensemble`.

    Args:
        logits: One tensor a teacher, all of one shape.
        weights: One float a teacher, of sum 1.
        combine: `"probabilities"` or `"logits"`.
        binary: Whether the units are independent.
    """
    logits = [ops.cast(z, "float32") for z in logits]
    if combine == "logits":
        return _sum(w * z for w, z in zip(weights, logits))
    if binary:
        positive = _log_mixture(weights, [ops.log_sigmoid(z) for z in logits])
        negative = _log_mixture(weights, [ops.log_sigmoid(-z) for z in logits])
        return positive - negative
    return _log_mixture(weights, [ops.log_softmax(z, axis=-1) for z in logits])


def _classes(teacher: ModelTeacher) -> list[Any] | None:
    """How many units each flat output has, or `None` where that is not known yet."""
    shapes = teacher.output_shapes()
    return None if shapes is None else [shape[-1] for shape in shapes]


def _log_mixture(weights: Sequence[float], logs: Sequence[Tensor]) -> Tensor:
    """`log(sum_k w_k exp(l_k))` without leaving log space."""
    shifted = [log_p + float(np.log(w)) for w, log_p in zip(weights, logs)]
    return ops.logsumexp(ops.stack(shifted, axis=0), axis=0)


def _sum(terms: Any) -> Tensor:
    total: Any = 0.0
    for term in terms:
        total = total + term
    return total


def apart(teacher: Teacher) -> Teacher:
    """A teacher of the same models that reads layers of its own choice."""
    if isinstance(teacher, Ensemble):
        twin = copy.copy(teacher)
        twin.members = [_apart(member) for member in teacher.members]
        return twin
    return _apart(teacher) if isinstance(teacher, ModelTeacher) else teacher


def _apart(teacher: ModelTeacher) -> ModelTeacher:
    twin = copy.copy(teacher)
    twin._reader = copy.copy(teacher._reader)
    return twin


def make(teacher: Any, from_logits: bool | None, precision: str = "float32") -> Teacher | None:
    """A teacher from what the user passed: a model, a list, a `Teacher` or `None`."""
    # Imported here, since it builds on the classes of this module.
    from keras_kd.precision import at_precision

    made: Teacher | None
    if teacher is None or isinstance(teacher, Teacher):
        made = teacher
    elif isinstance(teacher, list | tuple):
        made = Ensemble(teacher, from_logits=from_logits)
    else:
        made = ModelTeacher(teacher, from_logits)
    return at_precision(made, precision)


def require_model(model: Any, side: str) -> None:
    """Raise `TypeError` unless `model` is a Keras 3 model."""
    if isinstance(model, keras.Model):
        return
    if any(base.__module__.split(".")[0] == "tf_keras" for base in type(model).__mro__):
        raise TypeError(
            f"The {side} `{getattr(model, 'name', model)}` is a tf_keras (Keras 2) model. "
            "Rebuild it with Keras 3 and copy its weights: "
            "`new.set_weights(old.get_weights())`."
        )
    raise TypeError(
        f"The {side} must be a `keras.Model`. Received: {side} of type {type(model).__name__}."
    )


# Last, since it builds on the classes above.
from keras_kd.cache.teacher import CachedTeacher as CachedTeacher  # noqa: E402
