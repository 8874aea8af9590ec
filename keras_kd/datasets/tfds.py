"""Image classification sets of `tensorflow_datasets`, and plain folders of images."""

from __future__ import annotations

import difflib
import math
import os
import types
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.datasets.dataset import Dataset, Pair, assemble, check_image_size

if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_datasets

MAX_BYTES = 8 * 2**30
"""Largest set that is read into memory, in bytes of float32."""


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Dataset:
    """Load an image classification set by its `tensorflow_datasets` name.

    A set that is not yet under `data_dir` is downloaded and prepared there. The test split is
    `test`, or `validation` where `test` is missing or carries no labels; what is then missing is
    taken from `train`.

    Args:
        name: A TFDS name, with a configuration or version where there is one:
            `"mnist"`, `"emnist/letters"`, `"cifar10:3.0.2"`. `"image_folder"` reads
            `data_dir/SPLIT/CLASS/*.png` (or `.jpg`) as it lies there.
        data_dir: Folder where TFDS keeps its data; `None` is TFDS's own default.
        image_size: `(height, width)` in pixels to resize every image to. `None` keeps the size of
            the source, which must then be the same for all.

    Returns:
        A `Dataset`.

    Raises:
        ValueError: If the name is unknown, the set cannot be downloaded, is damaged, too large
            for memory, of varying image size, or has no images with class labels.
        ImportError: If TFDS or TensorFlow is not installed.

    Examples:
        >>> data = load("mnist", image_size=(14, 14))  # doctest: +SKIP

    Reference:
        - [TFDS catalog](https://www.tensorflow.org/datasets/catalog/overview)
    """
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"`tfds:{name}` needs tensorflow_datasets and TensorFlow, but `{error.name}` is not "
            'installed. Install them with: pip install "keras_kd[data,tensorflow]"'
        ) from error
    check_image_size(image_size)
    directory = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    builder = _builder(tfds, name, directory)
    image_key, label_key = _keys(tfds, name, builder.info)
    _prepare(tfds, name, builder)
    info = builder.info
    image, label = info.features[image_key], info.features[label_key]
    if "train" not in info.splits:
        raise ValueError(
            f"`tfds:{name}` has no `train` split: it has {', '.join(info.splits) or 'none'}. "
            "Choose another set, or rename the folder."
        )
    shape = image.shape if image_size is None else (*image_size, image.shape[-1])
    _check_memory(name, shape, sum(split.num_examples for split in info.splits.values()))

    def read(split: str) -> Pair:
        source = builder.as_dataset(split=split, shuffle_files=False)
        source = source.map(lambda row: (row[image_key], row[label_key]))
        if image_size is not None:
            # Antialiased, and rounded back: a resized uint8 image is still a uint8 image.
            source = source.map(
                lambda x, y: (
                    tf.cast(tf.round(tf.image.resize(x, image_size, antialias=True)), x.dtype)
                    if x.dtype.is_integer
                    else tf.image.resize(x, image_size, antialias=True),
                    y,
                )
            )
        return _stacked(name, split, source, info.splits[split].num_examples)

    splits: dict[str, Pair] = {}
    notes: list[str] = []
    for split in ("train", "test", "validation"):
        if split not in info.splits:
            continue
        pair = read(split)
        if split == "test" and int(pair[1].min()) < 0:
            notes.append("The split `test` of the source has no labels and was left out.")
            continue
        splits[split] = pair
    others = [split for split in info.splits if split not in ("train", "test", "validation")]
    if others:
        notes.append(f"Left out were the splits {', '.join(f'`{other}`' for other in others)}.")
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("The split `validation` of the source is the test split here.")
    return assemble(
        f"tfds:{name}",
        splits["train"],
        test=splits.get("test"),
        validation=splits.get("validation"),
        class_names=tuple(label.names),
        notes=notes,
    )


def _builder(tfds: types.ModuleType, name: str, directory: str | None) -> Any:
    if name == "image_folder":
        if directory is None or not os.path.isdir(directory):
            raise ValueError(
                f"`tfds:image_folder` reads the folder `data_dir`, which is {directory!r} and not "
                "a folder. Pass one that holds SPLIT/CLASS/*.png, such as train/cat/1.png."
            )
        builder = tfds.ImageFolder(directory)
        if not builder.info.splits or not builder.info.features["label"].num_classes:
            raise ValueError(
                f"`{directory}` holds no images as SPLIT/CLASS/*.png (or .jpg). Sort them into "
                "folders such as train/cat/1.png and test/cat/2.png."
            )
        return builder
    try:
        return tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError as error:
        known = [*tfds.list_builders(), "image_folder"]
        close = difflib.get_close_matches(name.split("/")[0].split(":")[0], known, n=3)
        guess = (
            f"Did you mean {' or '.join(f'`tfds:{match}`' for match in close)}? " if close else ""
        )
        place = f" nor a prepared set under `{directory}`" if directory else ""
        raise ValueError(
            f"`tfds:{name}` is not a name that tensorflow_datasets {tfds.__version__} knows"
            f"{place}. {guess}`tfds.list_builders()` lists the names."
        ) from error
    except Exception as error:
        # A wrong configuration or version raises whatever the builder of that set raises.
        raise ValueError(
            f"`tfds:{name}` cannot be opened: {_first_line(error)} "
            "Check the configuration and the version after the name."
        ) from error


def _keys(
    tfds: types.ModuleType, name: str, info: tensorflow_datasets.core.DatasetInfo
) -> tuple[str, str]:
    features = dict(info.features)
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    keys = info.supervised_keys
    if keys and len(keys) == 2 and keys[0] in images and keys[1] in labels:
        return keys[0], keys[1]
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    held = ", ".join(f"{key}: {type(kind).__name__}" for key, kind in features.items())
    raise ValueError(
        f"`tfds:{name}` is not an image classification set: it holds {held}. "
        "Choose one with an Image and a ClassLabel, such as `tfds:mnist`."
    )


def _prepare(
    tfds: types.ModuleType, name: str, builder: tensorflow_datasets.core.DatasetBuilder
) -> None:
    if name == "image_folder" or builder.is_prepared():
        return
    try:
        builder.download_and_prepare()
    except Exception as error:
        # Networks, disks, checksums and missing packages all end here, each with its own type.
        raise ValueError(
            f"`tfds:{name}` is not prepared in `{builder.data_path}` and could not be downloaded: "
            f"{_first_line(error)} Prepare it where there is a network, and pass its `data_dir`."
        ) from error


def _check_memory(name: str, shape: tuple[int | None, ...], samples: int) -> None:
    if None in shape:
        return
    needed = 4 * samples * math.prod(shape)  # type: ignore[arg-type]
    if needed > MAX_BYTES:
        raise ValueError(
            f"`tfds:{name}` has {samples:,} images of shape {shape}, {needed / 2**30:.0f} GiB as "
            f"float32, and sets over {MAX_BYTES / 2**30:.0f} GiB are not read into memory. Pass a "
            "smaller `image_size`, or train from a `tf.data.Dataset` with `keras_kd.Distiller`."
        )


def _stacked(name: str, split: str, source: tf.data.Dataset, samples: int) -> Pair:
    """All images of a split in one array, filled as they come."""
    images: np.ndarray[Any, np.dtype[Any]] | None = None
    labels = np.zeros(samples, dtype=np.int64)
    count = 0
    try:
        for image, label in source.as_numpy_iterator():
            if images is None:
                _check_memory(name, image.shape, samples)
                images = np.empty((samples, *image.shape), dtype=image.dtype)
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"The images of `tfds:{name}` differ in size: {images.shape[1:]} and "
                    f"{image.shape} in `{split}`, first in sample {count}. Pass "
                    "`image_size=(height, width)` to resize them."
                )
            if count == samples:
                break
            images[count], labels[count] = image, label
            count += 1
    except ValueError:
        raise
    except Exception as error:
        # A damaged record or image ends in one of TensorFlow's own error types.
        raise ValueError(
            f"The split `{split}` of `tfds:{name}` cannot be read after {count} of {samples} "
            f"samples: {_first_line(error)} Remove the damaged data and prepare them again."
        ) from error
    if images is None:
        raise ValueError(f"The split `{split}` of `tfds:{name}` is empty. Put images in it.")
    return images[:count], labels[:count]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200] + "."
