"""Image classification sets by name."""

from __future__ import annotations

import os

from keras_kd.datasets import digits, files, tfds
from keras_kd.datasets.dataset import Dataset


def load(
    name: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Dataset:
    """Load an image classification set by name, split three ways and scaled.

    The test split is what the source calls so. Where the source brings no validation split,
    one is taken from the training samples with a fixed seed, each class in proportion, so that
    the test samples never choose a model.

    Args:
        name: `"digits"` (scikit-learn's handwritten digits, embedded), `"tfds:NAME"` for any
            `tensorflow_datasets` name with images and class labels (`"tfds:mnist"`),
            `"tfds:image_folder"` for a folder `SPLIT/CLASS/*.png` given as `data_dir`, or the
            path of a `.npz` file with `x_train`, `y_train`, `x_test`, `y_test`.
        data_dir: Folder where TFDS keeps its data. Only for `tfds:` names.
        image_size: `(height, width)` in pixels to resize every image to. Only for `tfds:` names,
            and needed there where the images differ in size.

    Returns:
        A `Dataset`.

    Raises:
        ValueError: If the name is unknown, an option does not apply to it, or the data are
            missing, damaged, or no image classification set.
        ImportError: If the package that holds the data is not installed.

    Examples:
        >>> data = load("digits")
        >>> data.input_shape, data.num_classes, len(data.x_test)
        ((8, 8, 1), 10, 359)
    """
    text = os.fspath(name)
    if text.startswith("tfds:"):
        return tfds.load(text.removeprefix("tfds:"), data_dir=data_dir, image_size=image_size)
    for option, value in (("data_dir", data_dir), ("image_size", image_size)):
        if value is not None:
            raise ValueError(
                f"`{option}` was passed with the data set `{text}`, but it applies only to "
                f"`tfds:` names. Leave it out, or name a TFDS set such as `tfds:mnist`."
            )
    if text == "digits":
        return digits.load()
    check_name(text)
    return files.load(text)


def check_name(text: str) -> None:
    """Refuse what names no data set.

    Args:
        text: `digits`, `tfds:NAME` or a path that ends in `.npz`, at which there may be nothing.

    Raises:
        ValueError: If it is none of these.
    """
    if text == "digits" or text.startswith("tfds:") or text.endswith(".npz"):
        return
    hint = (
        "It is a file: only `.npz` files are read, with the arrays `x_train`, `y_train`, "
        "`x_test` and `y_test`."
        if os.path.isfile(text)
        else f"A TFDS set is written with its prefix, `tfds:{text}`."
        if text.isidentifier()
        else ""
    )
    raise ValueError(
        f"`{text}` is not a data set. Expected `digits`, `tfds:NAME` or the path of a `.npz` "
        f"file. {hint}".rstrip()
    )
