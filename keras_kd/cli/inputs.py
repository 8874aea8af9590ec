"""Models and arrays from the paths on the command line, checked before any work starts."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd import datasets
from keras_kd.cli.stored_rows import are_images, are_splits, shapes_of, split
from keras_kd.datasets import files
from keras_kd.datasets.task_data import count as rows_in
from keras_kd.utils import archives
from keras_kd.utils.types import Tensors

if TYPE_CHECKING:
    import keras

    from keras_kd.cli.console import Work


_ADVICE = "Expected a file that `model.save('name.keras')` wrote"


def slug(name: str) -> str:
    """Return a name for the folder and the files of a data set.

    Args:
        name: Of a TFDS set, or the path of a file or folder.
    """
    stem = name.removeprefix("tfds:") if name.startswith("tfds:") else Path(name).name
    for end in (".gz", ".npz", ".csv", ".tsv", ".conll", ".conllu", ".bio", ".iob"):
        stem = stem.removesuffix(end)
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem) or (
        "demo"
    )


def words(text: str | None) -> list[str]:
    """Return what is separated by commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def words_of_all(texts: Sequence[str] | None) -> list[str]:
    """Return what is separated by commas in an option that may be given several times."""
    return [word for text in texts or () for word in words(text)]


def stages(work: Work, prefix: str) -> Callable[[str, int, int], None]:
    """Return a progress callback that shows stages under longer names."""
    return lambda stage, done, total: work(f"{prefix}{stage}", done, total)


def pixels_of(about: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return mean and deviation of pixels that files carry along; `None` of what is no images.

    Args:
        about: How inputs are made of what a file holds, `TaskData.inputs`.
    """
    return (0, 255) if about.get("kind") == "images" else None


def first_rows(x: Any, count: int = 32) -> Any:
    """Return the first rows of an array, or of each of a dict of arrays."""
    if isinstance(x, dict):
        return {name: array[:count] for name, array in x.items()}
    return x[:count]


def check_model_file(path: str, what: str, *, inside: bool = True) -> None:
    """Refuse a path at which there is no `.keras` file, before Keras is imported.

    Args:
        path: Path of the file.
        what: What the errors call it, such as `"teacher"`.
        inside: Whether to look into it.

    Raises:
        ValueError: If there is no such file, or one of another kind.
    """
    problem = archives.file_problem(path)
    if problem is not None:
        raise ValueError(f"The {what} `{path}` {problem}. {_ADVICE}.")
    if not path.endswith(".keras"):
        raise ValueError(
            f"The {what} `{path}` is no `.keras` file. {_ADVICE}; other formats load in Python and "
            "are saved again from there."
        )
    if not inside:
        return
    archives.keras_file(path, whole=False)
    with archives.archive(path) as found:
        names = found.namelist()
        try:
            about = json.loads(found.read("metadata.json")) if "metadata.json" in names else {}
            version = str(about.get("keras_version", ""))
        except (ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"`{path}` has a damaged `metadata.json`. {_ADVICE}.") from error
    if version.startswith("2."):
        raise ValueError(
            f"The {what} `{path}` was written by tf_keras {version} (Keras 2), which Keras 3 "
            "cannot read. Rebuild the model with Keras 3, copy its weights and save it again."
        )


def check_data(name: str | None, option: str) -> None:
    """Refuse a name behind which there are no data, before Keras is imported.

    Args:
        name: Of a data set, or the path of a `.npz` file; `None` where none was given.
        option: What gave it.

    Raises:
        ValueError: If there is no such set or file, or the file is no `.npz` file.
    """
    if name is None:
        return
    if not name:
        raise ValueError(f"`{option}` is empty. Name a data set or a `.npz` file.")
    if name.endswith(".npz"):
        archives.names(name)
    else:
        datasets.images.check_name(name)


def load_model(path: str, what: str) -> Any:
    """Load a built Keras 3 model from a `.keras` file, in safe mode.

    Args:
        path: Path of the file.
        what: What the errors call it, such as `"teacher"`.

    Returns:
        The `keras.Model`.

    Raises:
        ValueError: If the file is missing, truncated, foreign, written by tf_keras, holds code, or
            holds a model that is not built.
    """
    check_model_file(path, what)
    import keras

    archives.keras_file(path)
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        # Classes that are not known, lambdas, weights of other shapes: each has its own type.
        raise ValueError(f"The {what} `{path}` cannot be loaded: {_why(error)}") from error
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"The {what} `{path}` holds a {type(model).__name__}, not a model. {_ADVICE}."
        )
    if not model.built or not model.weights:
        raise ValueError(
            f"The {what} `{path}` is not built: it has no weights. Call the model once on data, "
            "or give it an `Input`, train it, and save it again."
        )
    return model


def check_classifier(model: keras.Model, what: str, data: datasets.Dataset) -> None:
    """Refuse a model that does not take the images of a data set, or answers them with NaN.

    Args:
        model: A built `keras.Model`.
        what: What the errors call it.
        data: A `keras_kd.datasets.Dataset`.

    Raises:
        ValueError: If inputs or classes differ, or an answer is not finite.
    """
    import keras

    inputs = keras.tree.flatten(model.inputs or [])
    outputs = keras.tree.flatten(model.outputs or [])
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            f"The {what} `{model.name}` has {len(inputs)} inputs and {len(outputs)} outputs, and "
            "the demo needs one of each. Distill other models in Python with `keras_kd.Distiller`."
        )
    shape, classes = tuple(inputs[0].shape[1:]), outputs[0].shape[-1]
    fits = len(shape) == len(data.input_shape) and all(
        size in (None, wanted) for size, wanted in zip(shape, data.input_shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"The {what} `{model.name}` takes inputs of shape {shape}, but the images of "
            f"`{data.name}` have shape {data.input_shape}. Choose a {what} trained on such images."
        )
    if len(outputs[0].shape) != 2 or classes != data.num_classes:
        raise ValueError(
            f"The {what} `{model.name}` has outputs of shape {tuple(outputs[0].shape)}, but "
            f"`{data.name}` has {data.num_classes} classes. Choose a {what} with "
            f"{data.num_classes} outputs, or the data it was trained on."
        )
    answers = keras.ops.convert_to_numpy(model(data.x_train[:32], training=False))
    if not np.isfinite(answers).all():
        raise ValueError(
            f"The {what} `{model.name}` answers the first images of `{data.name}` with NaN or "
            f"infinite values. It may have diverged: choose a {what} whose training ended well."
        )


def check_inputs(x: Tensors, what: str, model: keras.Model) -> None:
    """Refuse data that a model does not take, before it runs.

    Args:
        x: An array, or a dict of arrays by input name.
        what: What the errors call the data, such as `"cached"`.
        model: The model that reads them; a subclassed one declares no inputs and is not asked.

    Raises:
        ValueError: If an input is missing or unknown, a shape does not fit, or values are not
            finite numbers.
    """
    import keras

    from keras_kd.export.signature import Signature, TensorInfo, is_symbolic
    from keras_kd.export.source import data

    infos: tuple[TensorInfo, ...] = ()
    if is_symbolic(model):
        infos = tuple(
            TensorInfo(tensor.name, (None, *tensor.shape[1:]), str(tensor.dtype))
            for tensor in keras.tree.flatten(model.inputs)
        )
    # What a lookup layer does with strings is its own affair.
    if infos and all(info.dtype != "string" for info in infos):
        data.by_name(x, Signature("functional", infos, ()), what)


def read_samples(path: str, role: str, model: keras.Model) -> tuple[Any, Any, str]:
    """Read inputs, and labels if there are any, for a model.

    A `.npz` file holds `x` and maybe `y`; or one array for each input of the model by its name, and
    maybe `y` or one array for each output; or it is a data set with `x_train` and the rest, see
    `stored_rows`. Of a data set the calibration takes training rows and the evaluation validation
    rows.

    Args:
        path: Path of the file, or the name of a data set.
        role: `"calibration"` or `"evaluation"`.
        model: The model that reads them.

    Returns:
        Inputs, labels or `None`, and a sentence on what they are.

    Raises:
        ValueError: If the file cannot be read or holds none of these.
    """
    import keras

    from keras_kd.models.output_kinds import output_template

    if not path.endswith(".npz"):
        return _of_dataset(path, role)
    arrays = files.read(path)
    shapes = shapes_of(model)
    inputs = list(shapes)
    outputs = keras.tree.flatten(output_template(model))
    # The names of several inputs say more than an `x` among them.
    named = len(inputs) > 1 and set(inputs) <= set(arrays)
    if "x" in arrays and not named:
        x, y = arrays["x"], arrays.get("y")
    elif inputs and set(inputs) <= set(arrays):
        x = {name: arrays[name] for name in inputs}
        if len(inputs) == 1:
            x = x[inputs[0]]
        y = None if "y" in inputs else arrays.get("y")
        if y is None and outputs and set(outputs) <= set(arrays):
            y = {name: arrays[name] for name in outputs}
    elif are_splits(arrays, shapes):
        if are_images(arrays, shapes):
            return _of_dataset(path, role)
        part = "train" if role == "calibration" else "validation"
        x, y = split(path, arrays, shapes, part, tuple(map(str, outputs)))
        kind = "training" if part == "train" else part
        note = f"{role.capitalize()}: {rows_in(x):,} {kind} rows of {path}."
        return x, None if role == "calibration" else y, note
    else:
        wanted = " and ".join(f"`{name}`" for name in inputs) or "one array an input"
        raise ValueError(
            f"`{path}` holds {', '.join(f'`{name}`' for name in arrays) or 'no arrays'}, and no "
            f"inputs for the {role}. Store `x` (and `y`), or {wanted} by the model's input names, "
            "or `x_train`, `y_train`, `x_test` and `y_test`."
        )
    first = next(iter(x.values())) if isinstance(x, dict) else x
    # A single value has no length; the export says what is wrong with it.
    count = len(first) if first.ndim else 0
    return x, y, f"{role.capitalize()}: {count:,} samples of {path}."


def read_weights(path: str, model: keras.Model) -> Any:
    """Read the sample weights of a `.npz` file: its array `sample_weight`, if it has one.

    Args:
        path: Path of the file, or the name of a data set, which has none.
        model: The model that reads the file's inputs; one of them may have that name.

    Returns:
        The array, or `None`.
    """
    if not path.endswith(".npz") or "sample_weight" in [t.name for t in model.inputs or []]:
        return None
    return files.read(path).get("sample_weight")


def _of_dataset(name: str, role: str) -> tuple[Any, Any, str]:
    data = datasets.load(name)
    if role == "calibration":
        return data.x_train, None, f"Calibration: the training images of {name}."
    count = len(data.x_validation)
    return (
        data.x_validation,
        data.y_validation,
        f"Evaluation: the {count:,} validation images of {name}.",
    )


def _why(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "lambda" in text.lower() or "unsafe" in text.lower():
        return (
            "it holds code, as Lambda layers do, and code in files is never run. Put a layer class "
            "in place of the Lambda and save the model again."
        )
    first = text.split(". ")[0].rstrip(".")[:240]
    if "register" in text.lower() or "custom" in text.lower():
        return f"{first}. Models with classes of your own are used from Python, which imports them."
    return f"{first}. Save it again with the Keras version in use."
