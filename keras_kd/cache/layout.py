"""What a cache looks like on disk: the records, the manifest, and the names of the files.

```
cache/
  manifest.json              what is cached, of which teacher and data; checksums of all shards
  records-000-00000.bin      epoch 0, shard 0: fixed-size records, one after the other
  inputs-00000.crc           shard 0: four bytes a sample, the CRC-32 of its inputs
  views-000-00000.crc        epoch 0, shard 0: four bytes a view, its CRC-32, with `augment`
  shard-000-00000.json       a finished shard's entry, until the manifest is complete
```
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_kd.utils import values
from keras_kd.utils.folders import CACHE_FORMAT
from keras_kd.utils.folders import MANIFEST as MANIFEST

FORMAT = CACHE_FORMAT
VERSION = 4
# The third stored no masks, and is read where there are none to store.
_WITHOUT_MASKS = 3


@dataclasses.dataclass(frozen=True)
class Output:
    """One flat output of the teacher.

    Attributes:
        shape: Shape of one sample's logits, classes last.
        kind: `"logits"`, `"softmax"` or `"sigmoid"`: how the model made its
            output; what is stored are always logits.
        binary: Whether the units are independent.
        top_k: How many classes are stored, `None` for all.
        mask: Shape of one sample's Keras mask, `None` where the output has none.
        partial: Whether the stored classes are those that somebody knew, so that others may be
            more probable.
    """

    shape: tuple[int, ...]
    kind: str = "logits"
    binary: bool = False
    top_k: int | None = None
    mask: tuple[int, ...] | None = None
    partial: bool = False

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.shape[-1]

    @property
    def index_dtype(self) -> str:
        """The narrowest unsigned integer that counts the classes."""
        return "uint16" if self.classes <= 65536 else "uint32"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields of one record, in the order in which they lie on disk.

    Attributes:
        outputs: The teacher's flat outputs.
        taps: Path and shape of each tapped feature.
        dtype: `"float16"` or `"float32"`: of logits, top-k values and taps.
        seeded: Whether each record begins with the seed of its view.
        tap_masks: Shape of the Keras mask of each tapped feature, `None` where it has
            none; or nothing where no feature has one.
    """

    outputs: tuple[Output, ...]
    taps: tuple[tuple[str, tuple[int, ...]], ...] = ()
    dtype: str = "float16"
    seeded: bool = False
    tap_masks: tuple[tuple[int, ...] | None, ...] = ()

    @property
    def record(self) -> np.dtype:
        """The packed NumPy dtype of one record, little-endian."""
        value = np.dtype(self.dtype).newbyteorder("<")
        fields: list[Any] = [("seed", "<u4")] if self.seeded else []
        for i, output in enumerate(self.outputs):
            if output.top_k is None:
                fields.append((f"logits_{i}", value, output.shape))
            else:
                shape = (*output.shape[:-1], output.top_k)
                index = np.dtype(output.index_dtype).newbyteorder("<")
                fields += [(f"classes_{i}", index, shape), (f"values_{i}", value, shape)]
            if output.mask is not None:
                fields.append((f"mask_{i}", "?", output.mask))
        for i, (_, shape) in enumerate(self.taps):
            fields.append((f"tap_{i}", value, shape))
            if self.tap_mask(i) is not None:
                fields.append((f"tap_mask_{i}", "?", self.tap_mask(i)))
        return np.dtype(fields)

    def tap_mask(self, tap: int) -> tuple[int, ...] | None:
        """Shape of the Keras mask of a tapped feature, `None` where it has none."""
        return self.tap_masks[tap] if tap < len(self.tap_masks) else None

    @property
    def may_be_masked(self) -> bool:
        """Whether anything has positions, of which a Keras mask could tell."""
        shapes = [output.shape for output in self.outputs] + [shape for _, shape in self.taps]
        return any(len(shape) > 1 for shape in shapes)

    def to_json(self) -> dict[str, Any]:
        """The layout as the manifest keeps it."""
        return {
            "outputs": [_without_none(dataclasses.asdict(each)) for each in self.outputs],
            "taps": [
                _without_none({"path": path, "shape": list(shape), "mask": self.tap_mask(i)})
                for i, (path, shape) in enumerate(self.taps)
            ],
            "dtype": self.dtype,
            "seeded": self.seeded,
            "record_bytes": self.record.itemsize,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Layout":
        """The layout that a manifest describes."""
        masks = tuple(_as_mask(tap.get("mask")) for tap in saved["taps"])
        return cls(
            tuple(
                Output(
                    **{**each, "shape": tuple(each["shape"]), "mask": _as_mask(each.get("mask"))}
                )
                for each in saved["outputs"]
            ),
            tuple((tap["path"], tuple(tap["shape"])) for tap in saved["taps"]),
            saved["dtype"],
            saved["seeded"],
            masks if any(mask is not None for mask in masks) else (),
        )


def _without_none(saved: dict[str, Any]) -> dict[str, Any]:
    """What describes an output or a tap; what came later is left out where it says nothing."""
    idle = {"mask": None, "partial": False}
    return {key: value for key, value in saved.items() if key not in idle or value != idle[key]}


def _as_mask(saved: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape of a mask, as JSON keeps it, back as a tuple."""
    return None if saved is None else tuple(saved)


def record_bytes(
    output_shape: Sequence[int] | int,
    top_k: int | None = None,
    dtype: str = "float16",
    tap_shapes: Sequence[Sequence[int]] = (),
    augmented: bool = False,
    masked: bool = False,
) -> int:
    """Compute the bytes that a cache takes for each sample and epoch.

    `4·augmented + b·prod(shape) + b·sum(prod(tap))` with all classes, and
    `4·augmented + K·(i + b)·positions + b·sum(prod(tap))` with the top K, where
    `b` is 2 for float16 and 4 for float32, `i` is 2 up to 65,536 classes and 4
    beyond, and `positions` counts the tokens or pixels of one sample, 1 for a
    classifier; `masked` adds one byte for each of these. Beside that the cache takes
    four bytes a sample, whatever the number of epochs, to recognize the inputs, and one manifest.

    Args:
        output_shape: Shape of one sample's logits, classes last; a single
            integer is the number of classes.
        top_k: How many classes are stored; `None` stores all.
        dtype: `"float16"` or `"float32"`.
        tap_shapes: Shapes of one sample's tapped features.
        augmented: Whether each record holds the seed of its view.
        masked: Whether the output carries a Keras mask. Masks of tapped features add
            one byte for each of their positions.

    Returns:
        Bytes a record.

    Raises:
        ValueError: If `top_k` or `dtype` is none of those that `write` takes.

    Examples:
        >>> record_bytes(1000, top_k=100, augmented=True)
        404

    Reference:
        - [Wu et al., 2022](https://arxiv.org/abs/2207.10666), section 3.1
    """
    require_dtype(dtype)
    shape = (output_shape,) if isinstance(output_shape, int) else tuple(output_shape)
    require_top_k(top_k, shape[-1])
    taps = tuple((str(i), tuple(tap)) for i, tap in enumerate(tap_shapes))
    output = Output(shape, top_k=top_k, mask=shape[:-1] if masked else None)
    return Layout((output,), taps, dtype, augmented).record.itemsize


def require_dtype(dtype: str) -> None:
    """Raise `ValueError` unless logits can be stored in this dtype."""
    if dtype not in ("float16", "float32"):
        raise ValueError(
            f"`dtype` of a cache is 'float16' or 'float32'. Received: dtype={dtype!r}."
        )


def require_top_k(top_k: int | None, classes: int) -> None:
    """Raise `ValueError` unless there are `top_k` classes to store."""
    if top_k is None:
        return
    if not values.is_whole(top_k) or top_k < 1:
        raise ValueError(
            f"`top_k` is the number of classes stored a sample, a positive integer, or None for "
            f"all. Received: top_k={top_k!r}."
        )
    if top_k > classes:
        raise ValueError(
            f"`top_k` is larger than the number of classes. Received: top_k={top_k} and a teacher "
            f"of {classes} classes. Pass at most {classes}, or None to store all."
        )


@dataclasses.dataclass
class Manifest:
    """What a cache holds: `manifest.json`.

    Attributes:
        teacher: `{"name", "fingerprint", "precision"}` of the model or ensemble;
            `"runs"`, the precision in which each model was run; and `"given"`,
            what `teacher_inputs` made of the first row.
        layout: The fields of a record.
        template: Names of the teacher's outputs, structured like them, or `None`.
        inputs: `{"shape", "dtype"}` of each flat input of one sample.
        augment: `{"name", "seed"}` where views are replayed, else `None`.
        epochs: How many views there are of each sample.
        shard_size: Samples a shard.
        count: Samples, or `None` while it is not known.
        first: The CRC-32 of the first row's inputs.
        order: SHA-256 over the CRC-32 of all inputs in their order.
        shards: Entries of the finished shards: epoch, number, samples, the
            SHA-256 of their files.
        complete: Whether all shards are there.
        versions: What wrote it.
    """

    teacher: dict[str, Any]
    layout: Layout
    template: Any
    inputs: list[dict[str, Any]]
    augment: dict[str, Any] | None
    epochs: int
    shard_size: int
    count: int | None = None
    first: int | None = None
    order: str | None = None
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    complete: bool = False
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self.layout.record.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.record_bytes * self.epochs * (self.count or 0)

    @property
    def identity(self) -> str:
        """A SHA-256 of what is cached, and how: the same for all processes that write it."""
        parts = [
            self.teacher["fingerprint"],
            self.teacher["precision"],
            self.teacher.get("runs"),
            self.teacher.get("given"),
            self.first,
            self.layout.to_json(),
            self.inputs,
            self.augment,
            self.epochs,
            self.shard_size,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def shard_count(self, count: int) -> int:
        """How many shards `count` samples of one epoch take."""
        return math.ceil(count / self.shard_size)

    def dumps(self) -> str:
        """The manifest as JSON."""
        saved = {"format": FORMAT, "version": VERSION, **vars(self)}
        saved["layout"] = self.layout.to_json()
        return sealed(saved)

    @classmethod
    def loads(cls, text: str | bytes, path: object) -> "Manifest":
        """Read a manifest.

        Raises:
            ValueError: If the text is no manifest of this version, or a byte of
                it is another than was written.
        """
        try:
            text = text.decode() if isinstance(text, bytes) else text
            saved = json.loads(text)
            # With one of the two it is a manifest of ours in which a byte has changed.
            foreign = isinstance(saved, dict) and not {"format", "layout"} & set(saved)
            known, version = not foreign and saved["format"] == FORMAT, saved.get("version")
            if known and version in (VERSION, _WITHOUT_MASKS):
                saved = unsealed(text)
                del saved["format"], saved["version"]
                saved["layout"] = Layout.from_json(saved["layout"])
                if version == VERSION or not saved["layout"].may_be_masked:
                    return cls(**saved)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"`{path}` is damaged: it is no manifest of a teacher's cache ({error!r}). Write "
                "the cache again; the shards beside it cannot be told apart without it."
            ) from error
        if foreign:
            raise ValueError(
                f"`{path}` is the manifest of something else: it lacks `layout`. Pass the folder "
                "that `keras_kd.cache.write` wrote."
            )
        if known and version == _WITHOUT_MASKS:
            raise ValueError(
                f"`{path}` is a cache of format {FORMAT} {version}, which forgot what the teacher "
                "masks of its positions, so that padding would count. Write the cache again with "
                "`keras_kd.cache.write`, to another path or after deleting the folder."
            )
        raise ValueError(
            f"`{path}` is not a cache of format {FORMAT} {VERSION}. Received: version {version!r}. "
            "Write the cache again with `keras_kd.cache.write`."
        )


def sealed(saved: dict[str, Any]) -> str:
    """JSON that holds its own SHA-256, over what it says in one fixed form."""
    plain = json.dumps(saved, sort_keys=True).encode()
    return json.dumps({**saved, "checksum": hashlib.sha256(plain).hexdigest()}, indent=1) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` was given.

    Raises:
        ValueError: If a byte is another than was written.
    """
    saved: dict[str, Any] = json.loads(text)
    if not isinstance(saved, dict):
        raise ValueError("it is no JSON object")
    saved.pop("checksum", None)
    # The text as a whole: so blanks and escapes count as well.
    if sealed(saved) != text:
        raise ValueError("its checksum is not that of what it says")
    return saved


def records_file(epoch: int, shard: int) -> str:
    """Name of the file with the records of a shard."""
    return f"records-{epoch:03d}-{shard:05d}.bin"


def inputs_file(shard: int) -> str:
    """Name of the file that identifies the inputs of a shard."""
    return f"inputs-{shard:05d}.crc"


def views_file(epoch: int, shard: int) -> str:
    """Name of the file that identifies the views of a shard."""
    return f"views-{epoch:03d}-{shard:05d}.crc"


def files_of(entry: dict[str, Any], record_bytes: int) -> list[tuple[str, int, str | None]]:
    """The files of a finished shard: name, bytes, and SHA-256.

    Args:
        entry: The shard's entry.
        record_bytes: Bytes of one record.
    """
    epoch, shard, samples = entry["epoch"], entry["shard"], entry["samples"]
    files = [(records_file(epoch, shard), samples * record_bytes, entry["sha256"])]
    # The inputs are the same in every epoch, and are written with the first.
    files.append((inputs_file(shard), samples * 4, entry.get("inputs")))
    if "views" in entry:
        files.append((views_file(epoch, shard), samples * 4, entry["views"]))
    return files


def entry_file(epoch: int, shard: int) -> str:
    """Name of the file that says that a shard is finished."""
    return f"shard-{epoch:03d}-{shard:05d}.json"
