"""Recordings in folders, one folder a class: WAV files, as numbers between -1 and 1."""

from __future__ import annotations

import io
import os
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_kd.datasets import class_folders
from keras_kd.datasets.task_data import Raw, TaskData, assemble
from keras_kd.datasets.tfds import MAX_BYTES
from keras_kd.utils import archives

SUFFIXES = (".wav", ".wave")

KIND = class_folders.Kind("recordings", "wav", SUFFIXES)


class _Recording(NamedTuple):
    samples: Any
    rate: int


def load(
    folder: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    length: int | None = None,
) -> TaskData:
    """Load the recordings of `FOLDER/CLASS/*.wav`, or of `FOLDER/train/CLASS/*.wav` and so on.

    Files are uncompressed WAV of one channel (PCM of 8, 16, 24 or 32 bits), all of one rate:
    nothing is resampled. Names that begin with a point are left out. The inputs are float32
    `(rows, samples)` in [-1, 1); zeros follow what is shorter. Classes are numbered in alphabetical
    order of their folders.

    Args:
        folder: Path of the folder.
        validation: A folder of the same classes for this split.
        test: The same.
        classes: The classes in the order of their numbers.
        length: Samples that are read of a recording, longer ones are cut; as many as the longest
            of the training files has without.

    Returns:
        The data of a `classification`, whose `inputs` tell `sample_rate` in Hz and `length`.

    Raises:
        ValueError: Naming the file, if one cannot be read, has no samples, several channels or
            another rate; a folder holds no recordings, or a file outside those for training is of
            none of their classes.
    """
    found = class_folders.find(folder, KIND, validation=validation, test=test, classes=classes)
    first: tuple[Path, int] | None = None
    read: dict[str, list[Any]] = {}
    held = 0
    for split, files in found.files.items():
        read[split] = []
        for path, _ in files:
            recording = _read(path)
            if first is None:
                first = path, recording.rate
            if recording.rate != first[1]:
                raise ValueError(
                    f"`{path}` has {recording.rate:,} samples a second and `{first[0]}` "
                    f"{first[1]:,}. Resample one to the rate of the other: a model hears another "
                    "rate as another pitch."
                )
            held += 4 * len(recording.samples)
            if held > MAX_BYTES:
                raise ValueError(
                    f"The recordings need more than {MAX_BYTES >> 30} GiB as float32. Train from a "
                    "`tf.data.Dataset` with `keras_kd.Distiller`."
                )
            read[split].append(recording.samples)
    assert first is not None
    if length is None:
        length = max(len(samples) for samples in read["train"])
    _check_memory(found, read, length)
    notes = list(found.notes)
    raw: dict[str, Raw] = {}
    for split, recordings in read.items():
        x = np.zeros((len(recordings), length), np.float32)
        for row, samples in enumerate(recordings):
            x[row, : len(samples)] = samples[:length]
        cut = sum(len(samples) > length for samples in recordings)
        if cut:
            notes.append(f"{split}: {cut:,} recordings were cut to {length:,} samples.")
        raw[split] = Raw(x, found.labels(split), found.where(split))
    return assemble(
        os.fspath(folder),
        "classification",
        raw["train"],
        validation=raw.get("validation"),
        test=raw.get("test"),
        class_names=found.names,
        inputs={"kind": "audio", "sample_rate": first[1], "length": length},
        notes=[*notes, "Recordings were scaled to [-1, 1), with zeros behind the shorter ones."],
    )


def _check_memory(found: class_folders.Found, read: dict[str, list[Any]], length: int) -> None:
    """Refuse zeros behind shorter recordings that need more memory than may be had."""
    if 4 * length * sum(map(len, read.values())) <= MAX_BYTES:
        return
    longest = max(range(len(read["train"])), key=lambda row: len(read["train"][row]))
    path, samples = found.files["train"][longest][0], len(read["train"][longest])
    raise ValueError(
        f"With {length:,} samples each the recordings need more than {MAX_BYTES >> 30} GiB as "
        f"float32. The longest for training is `{path}` with {samples:,} samples; zeros follow "
        "what is shorter. `--length N` reads N samples of each."
    )


_UNKNOWN = 2**31 - 2**16
"""Bytes from which a length is what programs write that do not know it."""

_EXTENSIBLE = b"\xfe\xff"
_PCM = bytes.fromhex("0100000000001000800000aa00389b71")


def _plain(data: bytes) -> bytes:
    """Mark PCM of the extensible form, which 24 bits often have, as what Python 3.11 reads."""
    place = 12
    while data[place : place + 4] not in (b"fmt ", b""):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    # The form stands first in this part, and 24 bytes behind it what the extension says it is.
    if data[place + 8 : place + 10] != _EXTENSIBLE or data[place + 32 : place + 48] != _PCM:
        return data
    return data[: place + 8] + b"\x01\x00" + data[place + 10 :]


def _read(path: Path) -> _Recording:
    try:
        with archives.opened(path) as stream:
            content = _plain(stream.read())
        with wave.open(io.BytesIO(content), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            frames = file.getnframes()
            data = file.readframes(frames)
    except (wave.Error, EOFError, OSError, RuntimeError) as error:
        raise ValueError(
            f"`{path}` cannot be read as a recording: {str(error) or 'it ends too early'}. Save it "
            "as uncompressed WAV (PCM), or leave it out."
        ) from error
    if channels != 1:
        raise ValueError(
            f"`{path}` has {channels} channels, and recordings of one are read. Mix them to one, "
            "or keep one of them."
        )
    if width > 4:
        raise ValueError(f"`{path}` has {8 * width} bits a sample. Save it with 16, 24 or 32.")
    if frames * width >= _UNKNOWN:
        raise ValueError(
            f"`{path}` does not say how long it is, as recordings that were written to a pipe do. "
            "Write it to a file, or copy it with a program that mends this (`sox` or `ffmpeg`)."
        )
    if len(data) != frames * width:
        raise ValueError(
            f"`{path}` ends after {len(data) // width:,} of {frames:,} samples. Copy it again, or "
            "leave it out."
        )
    if not data:
        raise ValueError(f"`{path}` holds no samples. Leave it out.")
    if width == 1:
        # Of 8 bits alone WAV keeps numbers without a sign.
        return _Recording((np.frombuffer(data, np.uint8) - np.float32(128)) / np.float32(128), rate)
    whole = np.zeros((frames, 4), np.uint8)
    whole[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(frames, width)
    return _Recording(whole.view("<i4")[:, 0] * np.float32(2**-31), rate)
