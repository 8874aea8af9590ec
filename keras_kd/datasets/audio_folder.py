"""Recordings in folders, one folder a class: WAV files, as numbers between -1 and 1."""

from __future__ import annotations

import os
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_kd.datasets import class_folders
from keras_kd.datasets.task_data import Raw, TaskData, assemble
from keras_kd.datasets.tfds import MAX_BYTES

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
    nothing is resampled. The inputs are float32 `(rows, samples)` in [-1, 1); zeros follow what is
    shorter. Classes are numbered in alphabetical order of their folders.

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


def _read(path: Path) -> _Recording:
    try:
        with wave.open(os.fspath(path), "rb") as file:
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
