"""Runs the teacher once over the data and keeps what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keras_kd.cache import layout, shards, sources, writer
from keras_kd.cache.answers import Answers
from keras_kd.cache.layout import Manifest
from keras_kd.teachers import resolve
from keras_kd.teachers.base import TeacherLike
from keras_kd.utils import checks
from keras_kd.utils.types import Data, PathLike

if TYPE_CHECKING:
    pass


def write(
    teacher: TeacherLike,
    data: Data,
    path: PathLike,
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
    teacher_precision: str = "float32",
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
        teacher_precision: As for `keras_kd.Distiller`. With `taps` the teacher
            runs as it was given, since folding changes inner layers.
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

    Examples:
        >>> manifest = keras_kd.cache.write(teacher, x_train, "cache", top_k=10)
        >>> teacher = keras_kd.teachers.CachedTeacher("cache")
        >>> keras_kd.Distiller(student, teacher)

    Reference:
        - [Wu et al., 2022](https://arxiv.org/abs/2207.10666), section 3.1
    """
    check_arguments(
        top_k=top_k,
        epochs=epochs,
        batch_size=batch_size,
        shard_size=shard_size,
        process_count=process_count,
        process_index=process_index,
        seed=seed,
    )
    layout.require_dtype(dtype)
    checks.logits_flags(from_logits)
    checks.functions(teacher_inputs=teacher_inputs)
    if augment is not None and not callable(augment):
        raise TypeError(
            f"`augment` is a function of one sample and a seed. Received: augment={augment!r}."
        )
    if epochs > 1 and augment is None:
        raise ValueError(
            f"Without `augment` every epoch is the same. Received: epochs={epochs}. Leave `epochs` "
            "at 1, which serves any number of training epochs, or pass `augment`."
        )
    made = resolve.make(teacher, from_logits, teacher_precision)
    if made is None or made.needs_join:
        raise TypeError(
            "The teacher of a cache is a `keras.Model`, a list of them, or another teacher that "
            f"answers inputs alone, as `Ensemble` or `BlackBox`. Received: teacher={teacher!r}."
        )
    made = made.apart()
    if isinstance(taps, str):
        taps = (taps,)
    made.reset(list(taps))
    source = sources.source(data, batch_size)
    if isinstance(source, sources.Stream) and source.once and epochs > 1:
        raise ValueError(
            f"A generator can be read once. Received: epochs={epochs}. Pass arrays, a "
            "`tf.data.Dataset` or a `keras.utils.PyDataset`."
        )
    return writer.run(
        path,
        source,
        Answers(made, list(taps), top_k, dtype, teacher_inputs, binary),
        precision=teacher_precision,
        views=shards.Views(augment, seed, epochs),
        process=(process_index, process_count),
        progress=progress,
        shard_size=shard_size,
    )


def check_arguments(**given: Any) -> None:
    """Raise `ValueError` unless the numbers given to `write` are in their ranges."""
    least = {"process_index": 0, "seed": 0}
    for name, value in given.items():
        if value is None and name in ("top_k", "shard_size"):
            continue
        low = least.get(name, 1)
        if not checks.is_whole(value) or value < low:
            raise ValueError(f"`{name}` is an integer from {low}. Received: {name}={value!r}.")
    if given["process_index"] >= given["process_count"]:
        raise ValueError(
            "`process_index` counts from 0 to `process_count` - 1. Received: "
            f"process_index={given['process_index']}, process_count={given['process_count']}."
        )
