"""Runs the teacher once over the data and keeps what it says."""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd import teachers
from keras_kd.cache import layout, samples, sources, storage
from keras_kd.cache.layout import Layout, Manifest, Output

_STORED = "the cache may hold"


def write(
    teacher: Any,
    data: Any,
    path: Any,
    top_k: int | None = None,
    dtype: str = "float16",
    taps: Sequence[str] = (),
    augment: Callable[[Any, int], Any] | None = None,
    epochs: int = 1,
    *,
    batch_size: int = 128,
    shard_size: int | None = None,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    teacher_inputs: Callable[[Any], Any] | None = None,
    from_logits: bool | None = None,
    binary: bool | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Manifest:
    """Run a teacher over data once and write its answers to a cache.

    Stored are logits; with `top_k`, the log-probabilities at temperature 1 of
    the K most probable classes, from which every other class gets an equal part
    of what is left, `(1 - sum of the K probabilities) / (C - K)`. From both the
    distiller computes its softened losses at any temperature.

    A call that was killed, at whatever point, is continued by the same call:
    finished shards stay as they are. A call on a finished cache checks that
    teacher and data are those of the cache, and runs the teacher on one batch.

    Args:
        teacher: A built `keras.Model`, a list of them, or a
            `keras_kd.teachers.Teacher`.
        data: Arrays `x` or `(x, y)`; a `tf.data.Dataset`, a
            `keras.utils.PyDataset` or an iterable of batches, in an order that
            is the same in every pass; a generator for a single one.
        path: Folder of the cache, or a URL that `etils.epath` reads.
        top_k: How many classes to store; `None` stores all.
        dtype: `"float16"` or `"float32"`.
        taps: Paths of teacher layers whose tensors are stored too.
        augment: `fn(sample, seed)`, which gives one view of one sample: NumPy
            arrays without a batch axis, and an integer below 2**32. It must
            depend on nothing else. The training replays the very same views.
        epochs: Views of each sample.
        batch_size: Samples a forward pass, for arrays.
        shard_size: Samples a shard. Defaults to a sixteenth of the data, at
            least 1,024 and at most 65,536 samples or 256 MiB.
        seed: Integer from which the seeds of all views are made.
        process_index: Which of `process_count` processes this one is. Each
            writes every `process_count`-th shard; the last to finish completes
            the manifest.
        process_count: How many processes write this cache together.
        teacher_inputs: As for `keras_kd.Distiller`.
        from_logits: As for `keras_kd.Distiller`: `False` where the teacher hides
            how it makes probabilities.
        binary: Whether the units of the outputs are independent (multi-label).
            Defaults to `None`: where they are made by a sigmoid, or one unit.
        progress: Called as `progress(done, total)` with the number of records
            that are there; `total` is `None` where it is not known.

    Returns:
        The manifest; `manifest.complete` tells whether other processes are
        still to finish.

    Raises:
        ValueError: If an argument is out of range, a layer is not found, the
            teacher's answers are not finite, or the folder holds the cache of
            another teacher, of other data, or of another form.
        TypeError: If teacher, data, path or `augment` is of another type.
        BlockingIOError: If another process is writing the same shard.
        OSError: If the path cannot be written or the disk is full; finished
            shards are untouched.

    Example:
        >>> manifest = keras_kd.cache.write(teacher, x_train, "cache", top_k=10)
        >>> teacher = keras_kd.teachers.CachedTeacher("cache")
        >>> keras_kd.Distiller(student, teacher)

    Reference:
        - [Wu et al., 2022](https://arxiv.org/abs/2207.10666), section 3.1
    """
    _check_arguments(
        top_k=top_k,
        epochs=epochs,
        batch_size=batch_size,
        shard_size=shard_size,
        process_count=process_count,
        process_index=process_index,
        seed=seed,
    )
    layout.require_dtype(dtype)
    if augment is not None and not callable(augment):
        raise TypeError(
            f"`augment` is a function of one sample and a seed. Received: augment={augment!r}."
        )
    if epochs > 1 and augment is None:
        raise ValueError(
            f"Without `augment` every epoch is the same. Received: epochs={epochs}. Leave `epochs` "
            "at 1, which serves any number of training epochs, or pass `augment`."
        )
    made = teachers.make(teacher, from_logits)
    if made is None or not made.models:
        raise TypeError(
            "The teacher of a cache is a `keras.Model`, a list of them, or an `Ensemble`. Received: "
            f"teacher={teacher!r}."
        )
    made = teachers.apart(made)
    if isinstance(taps, str):
        taps = (taps,)
    made.reset(list(taps))
    source = sources.source(data, batch_size)
    if isinstance(source, sources.Stream) and source.once and epochs > 1:
        raise ValueError(
            f"A generator can be read once. Received: epochs={epochs}. Pass arrays, a "
            "`tf.data.Dataset` or a `keras.utils.PyDataset`."
        )
    root = _writable(storage.folder(path))
    writer = _Writer(root, made, source, epochs, augment, seed, teacher_inputs, binary, progress)
    writer.process = (process_index, process_count)
    return writer.run(list(taps), top_k, dtype, shard_size)


def _check_arguments(**given: Any) -> None:
    least = {"process_index": 0, "seed": 0}
    for name, value in given.items():
        if value is None and name in ("top_k", "shard_size"):
            continue
        low = least.get(name, 1)
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < low:
            raise ValueError(f"`{name}` is an integer from {low}. Received: {name}={value!r}.")
    if given["process_index"] >= given["process_count"]:
        raise ValueError(
            "`process_index` counts from 0 to `process_count` - 1. Received: "
            f"process_index={given['process_index']}, process_count={given['process_count']}."
        )


def _writable(root: Any) -> Any:
    """Make the folder, or say why not before the teacher runs."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise type(error)(
            error.errno,
            f"The cache cannot be written to `{root}`: {error.strerror or error}. Choose a folder "
            "in which you may create files",
        ) from error
    return root


class _Answers(keras.Model):
    """The teacher's answers in the form in which they are stored; compiled as `predict` is."""

    def __init__(self, run: Callable[[Any], dict[str, Any]]) -> None:
        super().__init__(name="keras_kd_cache", autocast=False)
        self._run = run
        self.built = True

    def call(self, inputs: Any) -> dict[str, Any]:
        return self._run(inputs)


class _Shard:
    """A shard that is being written, under a temporary name and a lock."""

    def __init__(self, root: Any, epoch: int, index: int, stack: contextlib.ExitStack) -> None:
        self.epoch, self.index = epoch, index
        name = layout.records_file(epoch, index)
        stack.enter_context(
            storage.claimed(root / f"{name}.lock", f"shard {index} of epoch {epoch} of `{root}`")
        )
        # Another process may have finished it while this one was on its way.
        self.finished = (root / layout.entry_file(epoch, index)).exists()
        self._stream = None
        if not self.finished:
            self._stream = stack.enter_context(storage.replacing(root / name))
        self._digest = hashlib.sha256()
        self.samples = 0
        self.crc: list[np.ndarray] = []

    def append(self, records: np.ndarray, crc: np.ndarray) -> None:
        self.samples += len(records)
        self.crc.append(crc)
        if self._stream is not None:
            data = memoryview(np.ascontiguousarray(records).view("u1")).cast("B")
            self._stream.write(data)
            self._digest.update(data)

    def entry(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "shard": self.index,
            "samples": self.samples,
            "sha256": self._digest.hexdigest(),
        }


class _Writer:
    """One call of `write`."""

    process = (0, 1)
    manifest: Manifest

    def __init__(
        self,
        root: Any,
        teacher: teachers.Teacher,
        source: sources.Source,
        epochs: int,
        augment: Callable[[Any, int], Any] | None,
        seed: int,
        teacher_inputs: Callable[[Any], Any] | None,
        binary: bool | None,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.root = root
        self.teacher = teacher
        self.source = source
        self.epochs = epochs
        self.augment = augment
        self.seed = seed
        self.teacher_inputs = teacher_inputs or (lambda x: x)
        self.binary = binary
        self.progress = progress or (lambda done, total: None)
        self.finished: dict[tuple[int, int], dict[str, Any]] = {}
        self.done = 0
        self.is_binary: list[bool] = []

    # -------------------------------------------------------------- what to write

    def run(
        self, taps: list[str], top_k: int | None, dtype: str, shard_size: int | None
    ) -> Manifest:
        earlier = read_manifest(self.root) if has_manifest(self.root) else None
        x = self.source.first()
        sources.require_batched(x, self.teacher.models[0])
        self._describe(x, taps, top_k, dtype, shard_size)
        if earlier is not None:
            _require_same(earlier, self.manifest, self.root, shard_size)
            self.manifest.shard_size = earlier.shard_size
            self._find_finished(earlier)
        self._require_space()
        if earlier is None:
            storage.write_text(self.root / layout.MANIFEST, self.manifest.dumps())
        for epoch in range(self.epochs):
            self._write_epoch(epoch)
        return self._complete()

    def _describe(
        self, x: Any, taps: list[str], top_k: int | None, dtype: str, shard_size: int | None
    ) -> None:
        """Find the form of the records from one batch of answers."""
        view, seed = self._view(x, 0, 0)
        if "unknown" in self.teacher.kinds:
            self.teacher.inspect(self.teacher_inputs(view))
        shapes = self.teacher.output_shapes()
        one_unit = [shape[-1] == 1 for shape in shapes] if shapes else []
        self._prepare(top_k, dtype, one_unit)
        answers = self._answers(view)
        found = [tuple(answers[f"shape_{i}"]) for i in range(len(self.is_binary))]
        if shapes is None and self.binary is None and any(shape[-1] == 1 for shape in found):
            self._prepare(top_k, dtype, [shape[-1] == 1 for shape in found])
            answers = self._answers(view)
        kinds = ["logits" if kind == "unknown" else kind for kind in self.teacher.kinds]
        outputs = tuple(
            Output(tuple(int(n) for n in shape), kind, binary, top_k)
            for shape, kind, binary in zip(found, kinds, self.is_binary)
        )
        shapes_of_taps = tuple(
            (path, tuple(int(n) for n in answers[f"tap_{i}"].shape[1:]))
            for i, path in enumerate(taps)
        )
        form = Layout(outputs, shapes_of_taps, dtype, self.augment is not None)
        self.manifest = Manifest(
            teacher={"name": self.teacher.name, "fingerprint": self.teacher.fingerprint()},
            layout=form,
            template=self.teacher.output_template(),
            inputs=samples.describe(x),
            augment=None
            if self.augment is None
            else {"name": samples.name_of(self.augment), "seed": self.seed},
            epochs=self.epochs,
            shard_size=shard_size or _shard_size(self.source.estimate, form.record.itemsize),
            count=self.source.count,
            versions=_versions(),
        )
        self._first = self._records(answers, seed, 0)
