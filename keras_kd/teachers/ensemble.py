"""Several models as one teacher, weighed alike, by hand, by confidence or by validation data."""

import copy
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd import backends
from keras_kd.models import meaning
from keras_kd.models.model_reader import Answer
from keras_kd.teachers import mixtures
from keras_kd.teachers.base import Teacher
from keras_kd.teachers.mixtures import mixture_weights, returned
from keras_kd.teachers.model import ModelTeacher
from keras_kd.utils import checks
from keras_kd.utils.masks import keras_mask, with_joint_mask
from keras_kd.utils.types import Data, Tensor, Tensors


class Ensemble(Teacher):
    """Several models as one teacher.

    With `combine="probabilities"` the logits are
    `log(sum_k w_k softmax(z_k))`, the mixture of the models' distributions
    (for sigmoid outputs, and those of one unit that `BinarySoftTargets` reads,
    the logit of the mean probability; one unit that is no probability is
    averaged as it is); with `combine="logits"` they are `sum_k w_k z_k`.

    With `weights="confidence"` every sample has weights of its own,
    `w_k = exp(-H_k) / sum_j exp(-H_j)`, where `H_k` is the entropy in nats of
    model `k`'s distribution at temperature 1. The teacher runs without labels,
    so that this takes the place of the cross-entropy by which CA-MKD weighs
    models; for two models the formula is otherwise the same, and for more it
    lets one sure model outweigh all others, where CA-MKD gives none more than
    `1 / (K - 1)`. Each position of a sequence and each independent unit is
    weighed by itself. `learn_weights` finds fixed weights on validation data.

    Args:
        models: Built `keras.Model`s, or teachers that are no Keras models, as
            `from_onnx` makes them, with outputs of the same structure. Of a
            dict of inputs each model reads those that it declares by name.
        weights: One float a model, dimensionless, none negative and not all
            zero, scaled to sum 1; or `"confidence"`. `None` weighs them
            equally.
        combine: `"probabilities"` or `"logits"`.
        from_logits: Whether the models' outputs are logits; `None` finds out
            for each.

    Raises:
        ValueError: If there are no models, their outputs are not of the same
            names, classes and kinds, one is a `CachedTeacher`, the weights do
            not fit, or `combine` is unknown.

    Examples:
        >>> teacher = Ensemble([model_a, model_b], weights=[2.0, 1.0])
        >>> by_sample = Ensemble([model_a, model_b], weights="confidence")

    Reference:
        - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), section 3
        - [Kwon et al., 2020](https://doi.org/10.1109/ICASSP40776.2020.9054698), weights by entropy
        - [Zhang et al., 2022](https://arxiv.org/abs/2201.00007), section 2.2 (CA-MKD)
    """

    def __init__(
        self,
        models: Sequence[Any],
        weights: Sequence[float] | str | None = None,
        combine: str = "probabilities",
        from_logits: bool | None = None,
    ) -> None:
        if not models:
            raise ValueError("An ensemble needs at least one model. Received: models=[].")
        self.combine = combine
        self._weights = mixture_weights(weights, len(models), combine, "models")
        self.members = [_member(model, from_logits) for model in models]
        self.from_logits = self.members[0].from_logits
        self.name = "+".join(member.name for member in self.members)
        self._require_alike()

    def _require_alike(self) -> None:
        """Raise `ValueError` if outputs cannot be averaged, as far as they are known."""
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
            for one, other in zip(*(each.output_shapes() or [] for each in (first, member))):
                if not checks.may_be_one(one[1:], other[1:]):
                    raise ValueError(
                        "The models of an ensemble must answer in the same shape. Received: "
                        f"`{first.name}` with {tuple(one)}, `{member.name}` with {tuple(other)}."
                    )
            if None not in (first.classes, member.classes) and first.classes != member.classes:
                raise ValueError(
                    "The models of an ensemble must have the same classes in the same order. "
                    f"Received: `{first.name}` with {first.classes}, `{member.name}` with "
                    f"{member.classes}."
                )
            ours, theirs = first.output_template(), member.output_template()
            by_name = isinstance(ours, dict) or isinstance(theirs, dict)
            several = len(keras.tree.flatten(ours)) > 1 and None not in (ours, theirs)
            if by_name and several and _named(ours) != _named(theirs):
                raise ValueError(
                    "The models of an ensemble must have outputs of the same names. Received: "
                    f"`{first.name}` with {_named(ours)}, `{member.name}` with {_named(theirs)}."
                )
        for i, kinds in enumerate(zip(*(member.kinds for member in self.members))):
            if {"softmax", "sigmoid"} <= set(kinds):
                raise ValueError(
                    "The models of an ensemble must have outputs of one kind, exclusive classes or "
                    f"independent ones. Received for output {i}: "
                    + ", ".join(f"`{m.name}` with {k}" for m, k in zip(self.members, kinds))
                    + "."
                )

    @property
    def weights(self) -> Any:
        """The weights in force: floats of sum 1, or `"confidence"`; a new value is checked."""
        return self._weights

    @weights.setter
    def weights(self, value: Sequence[float] | str | None) -> None:
        self._weights = mixture_weights(value, len(self.members), self.combine, "models")

    @property
    def baked(self) -> Any:
        """The combination and its weights, and what stands for the members."""
        return self.combine, str(self._weights), [member.baked for member in self.members]

    @property
    def models(self) -> list[Any]:
        """The Keras models, in the order given."""
        return [model for member in self.members for model in member.models]

    @property
    def compiled(self) -> bool:  # type: ignore[override]
        """Whether none of the members is asked on the host."""
        return all(member.compiled for member in self.members)

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, of the first member that has any."""
        return next((m.classes for m in self.members if m.classes is not None), None)

    def apart(self) -> Teacher:
        """The same members, with a choice of their own of the layers that are read."""
        twin = copy.copy(self)
        twin.members = [member.apart() for member in self.members]
        return twin

    def at_precision(self, precision: str) -> Teacher:
        """This ensemble, whose members run in this precision from now on."""
        self.members = [member.at_precision(precision) for member in self.members]
        return self

    def require_batch(self, x: Tensors) -> None:
        """Raise `ValueError` for single samples, as far as the first model tells."""
        self.members[0].require_batch(x)

    def failure(self) -> BaseException | None:
        """Take the error of the first member that could not raise it."""
        return next(filter(None, [member.failure() for member in self.members]), None)

    @property
    def kinds(self) -> list[str]:
        """How each flat output is made: as the models say that tell probabilities from logits."""
        each = zip(*(member.kinds for member in self.members))
        return [next((k for k in kinds if k in _PROBABILITIES), kinds[0]) for kinds in each]

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

    def inspect(self, x: Tensors) -> None:
        """Find out from a concrete batch what the layers alone do not tell."""
        for member in self.members:
            member.inspect(x)
        self._require_alike()

    def refresh(self) -> bool:
        """Follow the models' weights where a copy of them is run."""
        # All of them, whatever the first one says.
        found = [member.refresh() for member in self.members]
        return any(found)

    @property
    def precisions(self) -> list[str]:
        """How each model runs."""
        return [each for member in self.members for each in member.precisions]

    def take_precisions(self, precisions: Sequence[str]) -> None:
        """Run the models as another process chose, where this one has the choice."""
        for member, precision in zip(self.members, precisions):
            member.take_precisions([precision])

    def require_logits(self, output: int) -> None:
        """Raise `ValueError` unless the logits of a flat output can be read of every model."""
        for member in self.members:
            member.require_logits(output)

    def is_last(self, output: int) -> bool:
        """Whether the classes of a flat output lie on its last axis, as far as that is known."""
        return all(member.is_last(output) for member in self.members)

    def is_doubtful(self, output: int) -> bool:
        """Whether a flat output that is read as it is may be no logits."""
        return any(member.is_doubtful(output) for member in self.members)

    def own_loss(self, output: int) -> Any:
        """The loss that the first model was compiled with for a flat output."""
        return self.members[0].own_loss(output)

    def answer(
        self, x: Tensors, record: Mapping[str, Tensor] | None = None, units: Sequence[str] = ()
    ) -> Answer:
        """Answer one batch."""
        answers = [member.answer(x, None, units) for member in self.members]
        each = enumerate(zip(*(answer.logits for answer in answers)))
        logits = [
            with_joint_mask(
                mixtures.of_units(list(parts), self._weights, self.combine, _unit(units, i)), parts
            )
            for i, parts in each
        ]
        tensors = {
            f"{member.name}/{path}": tensor
            for member, answer in zip(self.members, answers)
            for path, tensor in answer.tensors.items()
        }
        flat = [
            with_joint_mask(returned(z, self._returns(i, _unit(units, i))), [z])
            for i, z in enumerate(logits)
        ]
        output = keras.tree.pack_sequence_as(answers[0].output, flat)
        return Answer(output, logits, tensors)

    def _returns(self, output: int, unit: str) -> str:
        """Whether an output is logits or what `"softmax"` or `"sigmoid"` makes of them."""
        kind = self.kinds[output]
        if unit == meaning.VALUES:
            return "values"
        if kind not in _PROBABILITIES and self.from_logits is False:
            return "sigmoid" if unit == meaning.INDEPENDENT else "softmax"
        return kind

    def fingerprint(self) -> str:
        """Identify the ensemble by its models and weights."""
        parts = [member.fingerprint() for member in self.members]
        text = f"{self.combine}{self._weights}{parts}"
        return hashlib.sha256(text.encode()).hexdigest()

    def learn_weights(
        self,
        x: Data,
        y: Tensors | None = None,
        sample_weight: Tensors | None = None,
        *,
        binary: bool | None = None,
        batch_size: int = 256,
        tolerance: float = 1e-6,
        max_iterations: int = 10_000,
    ) -> list[float]:
        """Set the weights to those that predict held-out labels best.

        They minimize the cross-entropy of the mixture,
        `-mean_i log(sum_k w_k p_ik[y_i])` for `combine="probabilities"` and
        `-mean_i log softmax(sum_k w_k z_ik)[y_i]` for `combine="logits"`, over
        the simplex `w_k >= 0`, `sum_k w_k = 1`. Both are convex: the first is
        minimized by expectation-maximization, the second by projected
        gradients, until no weights can be better by `tolerance`. Cross-entropies
        of several outputs are added up. A distiller takes the new weights with
        its next `fit`.

        Every model runs once over the data, and their answers are held in
        memory: 8 bytes for each row, model and class.

        Args:
            x: Inputs that the models were not trained on: arrays, or a dataset
                that yields `(x, y)` or `(x, y, sample_weight)` in batches.
            y: Labels, as the outputs are structured: integers, or
                probabilities of all classes; numbers in [0, 1] for independent
                units.
            sample_weight: `(batch,)`, or the shape of integer labels. Keras
                masks of the outputs count as well.
            binary: Whether the units of the outputs are independent. `None`
                takes sigmoid and one-unit outputs for such, and those of models
                that were compiled with a binary loss.
            batch_size: Samples that the models read at a time, for arrays.
            tolerance: Largest distance from the least cross-entropy, in nats.
            max_iterations: After so many the search ends with a warning.

        Returns:
            The weights, one a model, of sum 1; some may be 0.

        Raises:
            ValueError: If there are no labels, labels or weights do not fit
                the outputs, the models were compiled with the loss of a
                regression, or an answer is not finite. The weights then stay
                as they were.

        Examples:
            >>> teacher = Ensemble([model_a, model_b])
            >>> weights = teacher.learn_weights(x_val, y_val)

        Reference:
            - [Dempster et al., 1977](https://doi.org/10.1111/j.2517-6161.1977.tb01600.x), 4.3
            - [Birgin et al., 2000](https://doi.org/10.1137/S1052623497330963), algorithm 2.2
        """
        for name, value in (
            ("batch_size", batch_size),
            ("tolerance", tolerance),
            ("max_iterations", max_iterations),
        ):
            if not 0 < value < np.inf:
                raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}.")
        batches = _batches(x, y, sample_weight, batch_size)
        seen = self._observe(batches, binary)
        weights, _ = mixtures.learned(seen, self.combine, tolerance, max_iterations)
        self._weights = [float(w) for w in weights]
        return list(self._weights)

    def _unit_of(self, output: int, count: int, binary: bool | None, name: str) -> str:
        """What an output means, where weights are learned by its crossentropy."""
        own = self.own_loss(output)
        told = meaning.of_output(None, (self.kinds[output],), own)
        if binary is not None:
            told = meaning.INDEPENDENT if binary else meaning.CLASSES
        elif told == meaning.VALUES:
            raise ValueError(
                "`learn_weights` compares the models by the crossentropy of classes, and "
                f"`{name}` was trained with `loss={meaning.name_of(own)!r}`, that of a regression. "
                "Give `weights=`, or `binary=` where the outputs are logits after all."
            )
        return meaning.INDEPENDENT if count == 1 else told or meaning.CLASSES

    def _observe(
        self, batches: Iterable[tuple[Tensors, Tensors, Tensors | None]], binary: bool | None
    ) -> list[mixtures.Observations]:
        """What every model says of labeled batches, output by output."""
        kept: dict[int, list[tuple[Any, Any, Any]]] = {}
        names: list[str] = []
        units: list[str] = []
        for x, y, weight in batches:
            if not names:
                self.inspect(x)
                template = self.output_template()
                names = keras.tree.flatten(template) if template is not None else ["output"]
                shapes = self.output_shapes() or []
                units = [
                    self._unit_of(i, shape[-1], binary, names[i]) for i, shape in enumerate(shapes)
                ]
            labels = checks.per_output(y, self.output_template())
            weights = checks.per_output(weight, self.output_template())
            with backends.inference_only():
                answers = [member.answer(x, None, units) for member in self.members]
            for i, label in enumerate(labels):
                if label is None:
                    continue
                self.require_logits(i)
                each = [answer.logits[i] for answer in answers]
                logits = np.stack([_plain(z) for z in each], axis=-2)
                row_weight = None if weights[i] is None else np.asarray(weights[i], "float64")
                for mask in map(keras_mask, each):
                    if mask is not None:
                        valid = ops.convert_to_numpy(mask).astype("float64")
                        row_weight = valid if row_weight is None else (valid.T * row_weight.T).T
                if row_weight is None:
                    row_weight = np.ones(len(logits))
                kept.setdefault(i, []).append((logits, ops.convert_to_numpy(label), row_weight))
        if not kept:
            raise ValueError(
                "`learn_weights` compares the models with labels, and there are none. Pass `y`, "
                "one array for each output, or a dataset that yields `(x, y)`."
            )
        return [
            mixtures.observations(
                np.concatenate([logits for logits, _, _ in found]),
                np.concatenate([label for _, label, _ in found]),
                np.concatenate([weight for _, _, weight in found]),
                units[i] == meaning.INDEPENDENT,
                names[i],
            )
            for i, found in kept.items()
        ]


_PROBABILITIES = ("softmax", "sigmoid")


def _member(model: keras.Model | Teacher, from_logits: bool | None) -> Teacher:
    """A member made of what the user passed.

    Raises:
        ValueError: If its answers would have to be joined to the data.
    """
    member = model if isinstance(model, Teacher) else ModelTeacher(model, from_logits)
    if member.needs_join:
        raise ValueError(
            f"`{member.name}` answers rows by their number, beside which no model can be asked. "
            "Average caches alone, `CachedTeacher([path, ...])`, or write one of the whole "
            "ensemble."
        )
    return member


def _unit(units: Sequence[str], output: int) -> str:
    """What an output means; classes where nobody says."""
    return units[output] if output < len(units) else meaning.CLASSES


def _named(template: Tensors) -> list[Any]:
    """Names of the flat outputs."""
    return list(keras.tree.flatten(template))


def _batches(
    x: Data, y: Tensors | None, weight: Tensors | None, size: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Batches `(x, y, sample_weight)` of arrays or of a dataset, which is read once."""
    if isinstance(x, keras.utils.PyDataset):
        data = x
        x = (data[i] for i in range(data.num_batches))
    if hasattr(x, "element_spec") or inspect.isgenerator(x):
        if y is not None or weight is not None:
            raise ValueError(
                "A dataset yields its labels and weights itself. Received: `y` or `sample_weight` "
                f"beside `x` of type {type(x).__name__}."
            )
        return map(_unpacked, x)
    lengths = {
        name: sorted({len(leaf) for leaf in keras.tree.flatten(value) if leaf is not None})
        for name, value in (("x", x), ("y", y), ("sample_weight", weight))
    }
    counts = {count for found in lengths.values() for count in found}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "`x`, `y` and `sample_weight` have the same number of rows, at least one. Received: "
            + ", ".join(f"{name} with {found or 'none'}" for name, found in lengths.items())
            + "."
        )
    data = keras.tree.map_structure(np.asarray, (x, y, weight), none_is_leaf=False)
    return (
        keras.tree.map_structure(
            lambda leaf, start=start: leaf[start : start + size], data, none_is_leaf=False
        )
        for start in range(0, counts.pop(), size)
    )


def _unpacked(batch: object) -> tuple[Any, Any, Any]:
    plain = keras.tree.map_structure(np.asarray, batch, none_is_leaf=False)
    x, y, weight = keras.utils.unpack_x_y_sample_weight(plain)
    return x, y, weight


def _plain(logits: Tensor) -> np.ndarray:
    """Logits in NumPy, in a type that it has."""
    wide = keras.backend.standardize_dtype(logits.dtype) == "float64"
    return ops.convert_to_numpy(logits if wide else ops.cast(logits, "float32"))


def _classes(teacher: Teacher) -> list[Any] | None:
    """How many units each flat output has, or `None` where that is not known yet."""
    shapes = teacher.output_shapes()
    return None if shapes is None else [shape[-1] for shape in shapes]
