"""A teacher whose answers are read from disk."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.cache import join_arrays, join_datasets, reader, samples, verification
from keras_kd.cache.layout import Manifest, Output
from keras_kd.cache.reader import Records
from keras_kd.cache.stored import StoredTeacher
from keras_kd.models import meaning
from keras_kd.models.model_reader import Answer
from keras_kd.teachers import resolve
from keras_kd.teachers.base import TeacherLike
from keras_kd.teachers.mixtures import mixture_weights, of_units, returned
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.masks import with_joint_mask, with_keras_mask
from keras_kd.utils.types import Data, Tensor, Tensors


class CachedTeacher(StoredTeacher):
    """The answers of a teacher, or of several, that `keras_kd.cache.write` put on disk.

    Several caches are averaged as the models of an `Ensemble` are, without any
    of these models at hand: with `combine="probabilities"` the logits are
    `log(sum_k w_k softmax(z_k))`, with `combine="logits"` they are
    `sum_k w_k z_k`.

    A `keras_kd.Distiller` joins arrays by row by itself, whatever the order in
    which `fit` draws them. A dataset is joined before, with `join`.

    Args:
        path: Folder of a cache, a URL that `etils.epath` reads, or a list of
            them.
        weights: One number a cache, none negative, scaled to sum 1;
            `"confidence"` weighs each sample as in `Ensemble`. `None` weighs
            them equally.
        combine: `"probabilities"` or `"logits"`, for several caches.
        teacher: The model, list of models or `Teacher` whose answers these
            should be; it is only compared. `None` compares nothing.
        augment: The `fn(sample, seed)` that the cache was written with, where
            it was. `None` takes the one with which this process wrote it.
        verify: Whether every byte is compared with its checksum now. Defaults
            to `None`: up to 1 GiB.

    Raises:
        FileNotFoundError: If there is no cache.
        ValueError: If a cache is half written, damaged, of another teacher, or
            needs `augment`; if several do not belong to the same data or have
            other outputs; if `weights` or `combine` do not fit.

    Examples:
        >>> keras_kd.cache.write(teacher, x, "cache")
        >>> distiller = keras_kd.Distiller(student, CachedTeacher("cache"))
        >>> distiller.compile(optimizer="adam", loss=None)
        >>> history = distiller.fit(x)

    Reference:
        - [Wu et al., 2022](https://arxiv.org/abs/2207.10666), section 3.1
        - [Lin et al., 2020](https://arxiv.org/abs/2006.07242), section 3
    """

    def __init__(
        self,
        path: Any,
        weights: Sequence[float] | str | None = None,
        combine: str = "probabilities",
        *,
        teacher: TeacherLike = None,
        augment: Callable[[Any, int], Any] | None = None,
        verify: bool | None = None,
    ) -> None:
        paths = list(path) if isinstance(path, list | tuple) else [path]
        if not paths:
            raise ValueError("A cached teacher needs at least one cache. Received: path=[].")
        self.weights = mixture_weights(weights, len(paths), combine, "caches")
        self.combine = combine
        self.caches = [Records(each, verify) for each in paths]
        if augment is None:
            augment = samples.written_here.get(self.caches[0].manifest.identity)
        self.augment = augment
        self.epoch = 0
        self.run = 0
        self._begins = False
        self.names = [records.manifest.teacher["name"] for records in self.caches]
        self.name = "+".join(self.names)
        _require_alike(self.caches)
        _require_augment(self.caches[0], augment)
        if teacher is not None:
            if len(paths) > 1:
                raise ValueError(
                    "`teacher` is compared with one cache. Received: a teacher and "
                    f"{len(paths)} caches. Open each alone to compare it."
                )
            verification.require_teacher(self.caches[0], resolve.make(teacher, None))

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The flat outputs, as they are stored in the first cache."""
        return self.caches[0].manifest.layout.outputs

    @property
    def kinds(self) -> list[str]:
        """How each flat output was made."""
        return [output.kind for output in self.outputs]

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, where the teacher had any."""
        found = self.caches[0].manifest.teacher.get("classes")
        return None if found is None else [str(each) for each in found]

    def output_template(self) -> Any:
        """The structure of the outputs with names at its leaves, or `None` if unknown."""
        return self.caches[0].manifest.template

    def output_shapes(self) -> list[Any]:
        """The shapes of the flat outputs."""
        return [(None, *output.shape) for output in self.outputs]

    def taps(self) -> list[str]:
        """The tapped tensors that the caches hold, by the paths a `Transfer` names."""
        return [
            self._tap(i, path)
            for i, records in enumerate(self.caches)
            for path, _ in records.manifest.layout.taps
        ]

    def _tap(self, cache: int, path: str) -> str:
        # As in an ensemble, the model's name comes first.
        return path if len(self.caches) == 1 else f"{self.names[cache]}/{path}"

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on.

        Raises:
            ValueError: If a layer is not in the cache.
        """
        held = self.taps()
        for path in paths:
            if path not in held:
                raise ValueError(
                    f"`{path}` is not in the cache `{self.caches[0].root}`, which holds "
                    f"{', '.join(f'`{tap}`' for tap in held) or 'no layers'}."
                    + did_you_mean(path, held, most=3)
                    + " Write the cache again with `taps=[...]`."
                )

    def begin_epoch(self, epoch: int) -> None:
        """Replay the views of this epoch; beyond the last one they begin anew."""
        self.epoch = epoch
        self.run += self._begins
        self._begins = False

    def fetch(self, rows: np.ndarray, epoch: int = 0) -> dict[str, np.ndarray]:
        """Read what was said of some rows.

        Args:
            rows: `(n,)` row numbers.
            epoch: The epoch of the training.

        Returns:
            Arrays `(n, ...)` by name: the row numbers as `indices`, and the
            fields of each cache, `"0/logits_0"`.
        """
        record = {"indices": np.asarray(rows, "int32")}
        for i, records in enumerate(self.caches):
            view = epoch % records.manifest.epochs
            for name, field in reader.decode(records.read(rows, view)).items():
                record[f"{i}/{name}"] = field
        return record

    def held(self) -> dict[str, np.ndarray] | None:
        """All records, decoded, where the caches are in memory and each sample has one answer."""
        if not all(each.in_memory and each.manifest.epochs == 1 for each in self.caches):
            return None
        return self.fetch(np.arange(self.count)) if self.augment is None else None

    def view(self, x: Tensors, rows: np.ndarray, epoch: int = 0, compare: bool = True) -> Any:
        """The inputs of some rows as the teacher saw them in an epoch.

        Args:
            x: Inputs of these rows as the data deliver them.
            rows: `(n,)` row numbers.
            epoch: The epoch of the training.
            compare: Whether they are compared with what the teacher was given.

        Returns:
            `x`, or its augmented views.

        Raises:
            ValueError: If the augmentation gives other views than it did.
        """
        if self.augment is None:
            return x
        manifest = self.caches[0].manifest
        base = (manifest.augment or {})["seed"]
        epoch %= manifest.epochs
        seen = samples.views(self.augment, x, samples.seeds(base, epoch, rows))
        if compare:
            name = samples.name_of(self.augment)
            verification.require_views(self.caches[0], seen, rows, epoch, name)
        return seen

    def split(self, x: Tensors) -> tuple[Any, Any]:
        """Separate what the models read from what was joined to it."""
        return (x.x, x.record) if isinstance(x, join_datasets.Joined) else (x, None)

    def join_fit(
        self,
        x: Tensors,
        y: Tensors | None,
        batch_size: int | None,
        arguments: dict[str, Any],
        asked: bool = False,
    ) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """Join arrays by row, and refuse data that nobody joined.

        Args:
            x: What `fit` was given.
            y: Labels.
            batch_size: Samples a step.
            arguments: The other arguments of `fit`.
            asked: Whether rows that are split off for validation are joined too.

        Returns:
            The same four for `keras.Model.fit`.

        Raises:
            ValueError: If the data are not those of the cache, or a dataset is
                not joined.
        """
        self._begins = True
        return join_arrays.for_fit(self, x, y, batch_size, arguments, asked)

    def join_evaluation(
        self, x: Tensors, y: Tensors | None, sample_weight: Tensors | None, batch_size: int | None
    ) -> tuple[Any, Any, Any, int | None]:
        """Join the arrays that were cached, and refuse other data that nobody joined.

        Args:
            x: What `evaluate` was given.
            y: Labels.
            sample_weight: Weights.
            batch_size: Samples a step.

        Returns:
            The same four for `keras.Model.evaluate`.

        Raises:
            ValueError: If arrays are not those of the cache, or of its views, or a dataset is
                not joined.
        """
        return join_arrays.for_evaluation(self, x, y, sample_weight, batch_size)

    def join(self, data: Data) -> Any:
        """Join the answers to a dataset, in the order in which it was cached.

        What is done to the dataset afterwards, such as shuffling, batching and
        repeating, keeps each sample with its answer. Each batch is compared
        with the inputs that the teacher was given; of a `tf.data.Dataset` one
        row of each batch from the second pass on.

        Args:
            data: A `tf.data.Dataset` of samples or of batches, a
                `keras.utils.PyDataset` of batches, or a generator of batches.

        Returns:
            The same kind of dataset for `fit`.

        Raises:
            ValueError: If the data are not those of the cache, or come in
                another order.
            TypeError: If they are of another type.

        Examples:
            >>> train = CachedTeacher("cache").join(dataset).shuffle(1000).batch(64)
        """
        return join_datasets.dataset(self, data)

    def joined(self, data: Data, rows: np.ndarray) -> Any:
        """Put the stored answers beside some rows of the data.

        Args:
            data: These rows, `(x, y, sample_weight)`.
            rows: `(n,)` their numbers in the data.

        Returns:
            One batch as the distiller reads it.
        """
        x, y, weight = data
        record = self.fetch(rows, self.epoch)
        return join_datasets.packed(
            join_datasets.Joined(self.view(x, rows, self.epoch), record), y, weight
        )

    def answer(
        self, x: Tensors, record: Mapping[str, Tensor] | None = None, units: Sequence[str] = ()
    ) -> Answer:
        """Answer one batch from its record.

        Raises:
            ValueError: If nothing was joined to the batch.
        """
        if record is None:
            raise ValueError(join_datasets.UNJOINED)
        each = [self._answer(i, record) for i in range(len(self.caches))]
        means = [
            meaning.VALUES
            if i < len(units) and units[i] == meaning.VALUES
            else meaning.INDEPENDENT
            if output.binary
            else meaning.CLASSES
            for i, output in enumerate(self.outputs)
        ]
        for unit, stored in zip(means, self.outputs):
            if unit == meaning.VALUES and stored.top_k is not None:
                raise ValueError(
                    f"The cache `{self.caches[0].root}` holds the {stored.top_k} most probable "
                    "classes, and the loss on the labels says that this output is a regression. "
                    "Write the cache again with `top_k=None`."
                )
        logits = [
            with_joint_mask(of_units(list(parts), self.weights, self.combine, unit), parts)
            if len(each) > 1
            else parts[0]
            for unit, *parts in zip(means, *(answer.logits for answer in each))
        ]
        tensors = {path: tensor for answer in each for path, tensor in answer.tensors.items()}
        flat = [
            with_joint_mask(returned(z, output.kind), [z])
            for z, output in zip(logits, self.outputs)
        ]
        template = self.output_template()
        if template is None:
            output = flat[0] if len(flat) == 1 else flat
        else:
            output = keras.tree.pack_sequence_as(template, flat)
        return Answer(output, logits, tensors)

    def _answer(self, cache: int, record: Mapping[str, Tensor]) -> Answer:
        """The answer of one cache."""
        layout = self.caches[cache].manifest.layout

        def masked(tensor: Tensor, name: str) -> Tensor:
            mask = record.get(f"{cache}/{name}")
            return tensor if mask is None else with_keras_mask(tensor, ops.cast(mask, "bool"))

        logits = []
        for i, output in enumerate(layout.outputs):
            if output.top_k is None:
                found = ops.cast(record[f"{cache}/logits_{i}"], "float32")
            else:
                values, classes = record[f"{cache}/values_{i}"], record[f"{cache}/classes_{i}"]
                found = from_top_k(values, classes, output.classes, output.partial)
            logits.append(masked(found, f"mask_{i}"))
        tensors = {
            self._tap(cache, path): masked(
                ops.cast(record[f"{cache}/tap_{i}"], "float32"), f"tap_mask_{i}"
            )
            for i, (path, _) in enumerate(layout.taps)
        }
        return Answer(None, logits, tensors)

    def fingerprint(self) -> str:
        """Identify the teacher that was cached, or the ensemble of those that were."""
        parts = [records.manifest.teacher["fingerprint"] for records in self.caches]
        if len(parts) == 1:
            return parts[0]
        text = f"{self.combine}{self.weights}{parts}"
        return hashlib.sha256(text.encode()).hexdigest()


def from_top_k(values: Tensor, classes: Tensor, count: int, partial: bool = False) -> Tensor:
    """Logits of all classes from the log-probabilities of the K most probable.

    Each other class has the log-probability of its part of what is left,
    `log((1 - sum_k exp(v_k)) / (C - K))`. Where rounding leaves nothing, or
    more than the least of the K, that part is held between 1e-9 and the least.

    Args:
        values: `(batch, ..., K)` log-probabilities at temperature 1, in
            descending order.
        classes: `(batch, ..., K)` integer indices.
        count: Number of classes C.
        partial: Whether these are not the most probable classes but those that are known, so that
            the part of each other one may be more than the least.

    Returns:
        `(batch, ..., C)` log-probabilities, which are logits at temperature 1.
    """
    values = ops.cast(values, "float32")
    shape = tuple(values.shape)
    k = shape[-1]
    if k == count:
        rest = values[..., :1]
    else:
        p = ops.exp(values)
        even = (1.0 - ops.sum(p, axis=-1, keepdims=True)) / (count - k)
        rest = ops.log(ops.maximum(even, 1e-9))
        if not partial:
            rest = ops.minimum(rest, values[..., -1:])
    flat = ops.reshape(values, (-1, k))
    rows = ops.shape(flat)[0]
    base = ops.broadcast_to(ops.reshape(rest, (-1, 1)), (rows, count))
    row = ops.repeat(ops.expand_dims(ops.arange(rows, dtype="int32"), 1), k, axis=1)
    places = ops.stack([row, ops.reshape(ops.cast(classes, "int32"), (-1, k))], axis=-1)
    logits = ops.scatter_update(base, ops.reshape(places, (-1, 2)), ops.reshape(flat, (-1,)))
    return ops.reshape(logits, (-1, *shape[1:-1], count))


def _require_alike(caches: Sequence[Records]) -> None:
    """Raise `ValueError` unless several caches answer the same data in the same form."""
    first = caches[0].manifest
    for records in caches[1:]:
        manifest = records.manifest
        pairs = {
            "data": (first.order, manifest.order),
            "number of samples": (first.count, manifest.count),
            "outputs": (_shapes(first), _shapes(manifest)),
            "classes": _classes(first, manifest),
            "kinds of units": (_independent(first), _independent(manifest)),
            "views": ((first.augment, first.epochs), (manifest.augment, manifest.epochs)),
        }
        for what, (one, other) in pairs.items():
            if one != other:
                raise ValueError(
                    f"The caches `{caches[0].root}` and `{records.root}` differ in their {what}: "
                    f"{one} and {other}. Only caches of the same data and classes are averaged."
                )


def _classes(one: Manifest, other: Manifest) -> tuple[Any, Any]:
    """Names of the classes of two caches, the same where one of them has none."""
    pair = one.teacher.get("classes"), other.teacher.get("classes")
    return (None, None) if None in pair else pair


def _shapes(manifest: Manifest) -> list[Any]:
    return [output.shape for output in manifest.layout.outputs]


def _independent(manifest: Manifest) -> list[str]:
    outputs = manifest.layout.outputs
    return ["independent" if output.binary else "exclusive" for output in outputs]


def _require_augment(records: Records, augment: Callable[[Any, int], Any] | None) -> None:
    saved = records.manifest.augment
    if saved is not None and augment is None:
        raise ValueError(
            f"The cache `{records.root}` was written with the augmentation `{saved['name']}`, and "
            "functions are not saved. Pass it: `CachedTeacher(path, augment=fn)`."
        )
    if saved is None and augment is not None:
        raise ValueError(
            f"The cache `{records.root}` was written without augmentation, so that its answers "
            "are not those to augmented samples. Write it with `augment=` and `epochs=`."
        )
    if saved is not None and samples.name_of(augment) != saved["name"]:  # type: ignore[arg-type]
        raise ValueError(
            f"The cache `{records.root}` was written with the augmentation `{saved['name']}`. "
            f"Received: augment=`{samples.name_of(augment)}`."  # type: ignore[arg-type]
        )
