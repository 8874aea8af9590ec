"""Images in folders, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.datasets import class_folders
from keras_kd.datasets.task_data import Raw, TaskData, assemble
from keras_kd.datasets.tfds import MAX_BYTES

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")

KIND = class_folders.Kind("images", "png", SUFFIXES)


def load(
    folder: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> TaskData:
    """Load the images of `FOLDER/CLASS/*` or `FOLDER/train/CLASS/*` and `FOLDER/test/CLASS/*`.

    Images are read upright, as their EXIF orientation says, gray if all of them are gray and in
    three channels otherwise, without transparency, and scaled from [0, 255] to [0, 1]. Classes are
    numbered in alphabetical order of their folders. Names that begin with a point are left out.

    Args:
        folder: Path of the folder.
        validation: A folder of the same classes for this split.
        test: The same.
        classes: The classes in the order of their numbers.
        image_size: `(height, width)` in pixels to resize every image to, bilinear; needed where the
            images differ in size.

    Returns:
        The data of a `classification`.

    Raises:
        ValueError: Naming the file, if an image cannot be read or differs in size, a folder holds
            no images, or one outside the training images is of none of their classes.
        ImportError: If Pillow is not installed.
    """
    found = class_folders.find(folder, KIND, validation=validation, test=test, classes=classes)
    notes = list(found.notes)
    arrays = _read(found.files, image_size, notes)

    def raw(split: str) -> Raw:
        return Raw(arrays[split], found.labels(split), found.where(split))

    return assemble(
        os.fspath(folder),
        "classification",
        raw("train"),
        validation=raw("validation") if "validation" in arrays else None,
        test=raw("test") if "test" in arrays else None,
        class_names=found.names,
        inputs={"kind": "images", "scale": 255},
        notes=[*notes, "Images were scaled from [0, 255] to [0, 1]."],
    )


def _read(
    flat: dict[str, list[tuple[Path, int]]],
    image_size: tuple[int, int] | None,
    notes: list[str],
) -> dict[str, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "Folders of images need Pillow, which is not installed. "
            'Install it with: pip install "keras_kd[data]"'
        ) from error
    images: dict[str, list[Any]] = {split: [] for split in flat}
    first: tuple[Path, tuple[int, int]] | None = None
    gray, held, transparent = True, 0, 0
    for split, paths in flat.items():
        for path, _ in paths:
            try:
                with Image.open(path) as opened:
                    if opened.mode[0] in "IF":
                        raise ValueError(
                            f"its pixels are `{opened.mode}`, and 8 bits a channel are read: save "
                            "it so"
                        )
                    transparent += "A" in opened.mode or "transparency" in opened.info
                    image = ImageOps.exif_transpose(opened)
                    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
                    gray &= image.mode == "L"
            except Exception as error:
                # Pillow's plugins raise what their formats raise: SyntaxError, struct.error, ...
                raise ValueError(
                    f"`{path}` cannot be read as an image: {' '.join(str(error).split())[:160]}. "
                    "Remove or replace it."
                ) from error
            size = (image.height, image.width)
            if image_size is not None and size != image_size:
                image = image.resize(image_size[::-1], Image.Resampling.BILINEAR)
            elif first is None:
                first = (path, size)
            elif size != first[1]:
                raise ValueError(
                    f"`{path}` has {size[0]} x {size[1]} pixels and `{first[0]}` {first[1][0]} x "
                    f"{first[1][1]}. `--image-size N` resizes all images to N x N."
                )
            array = np.asarray(image)
            held += 4 * 3 * image.width * image.height
            if held > MAX_BYTES:
                raise ValueError(
                    f"The images need more than {MAX_BYTES >> 30} GiB as float32. Pass a smaller "
                    "`--image-size`, or train from a `tf.data.Dataset` with `keras_kd.Distiller`."
                )
            images[split].append(array)
    if transparent:
        notes.append(
            f"{transparent:,} images have a transparency, which was dropped: what is behind it "
            "counts."
        )
    scale = np.float32(1 / 255)
    made = {}
    for split, arrays in images.items():
        if gray:
            stacked = np.stack(arrays)[..., np.newaxis]
        else:
            # A gray image among others has the same value in all three.
            stacked = np.stack(
                [array if array.ndim == 3 else np.stack([array] * 3, axis=-1) for array in arrays]
            )
        made[split] = np.multiply(stacked, scale, dtype=np.float32)
    return made
