"""Calibration and evaluation data: read from every form that Keras takes, checked before use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_kd.export.signature import Arrays, Signature, TensorInfo
from keras_kd.utils import archives
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Data, Tensors
from keras_kd.utils.values import misfit, refuse_holder

CALIBRATION_SAMPLES = 512
"""Samples used for calibration: ranges settle after a few hundred, and each costs one inference."""

_SCALE = 2.5
"""Ratio of standard deviations between calibration and evaluation data beyond which they differ."""

_RANGE = 1.7
"""The same where the ranges differ as much: [-1, 1] against [0, 1] is 2, and 32 honest rows, of
which a few may be far out, differ in one of the two at most."""

_SHIFT = 0.35
"""Share of the range by which both of its ends may move."""


@dataclass(frozen=True)
class Samples:
    """Inputs with their labels, in memory.

    Args:
        x: Whatever structure of arrays the model takes, `(samples, ...)` each.
        y: Labels of the same length, nested like the outputs; `None` without labels.
        count: Number of samples.
        weights: Sample weights of the same length: one array, or nested like the outputs; `None`
            without weights.
    """

    x: Any
    y: Any
    count: int
    weights: Any = None


def read(data: Data, what: str, *, several_inputs: bool, limit: int | None = None) -> Samples:
    """Collect data of any supported form in memory.

    Args:
        data: A NumPy array (or what converts to one), a dict or list of them, a tuple `(x, y)` or
            `(x, y, sample_weight)`, or an iterable of batches of these: `tf.data.Dataset`,
            `keras.utils.PyDataset`, generator.
        what: `"calibration"` or `"evaluation"`, for the messages.
        several_inputs: Whether a list holds one array an input, rather than one array's rows.
        limit: Most samples kept: evenly spaced ones of arrays, the first ones of an iterable.

    Returns:
        The samples.

    Raises:
        ValueError: If there are no samples, or the arrays differ in length.
    """
    refuse_holder(f"The {what} data", data)
    x, y, w = _from_batches(_batches(data, what), what, limit) if _is_stream(data) else _split(data)
    if not several_inputs and isinstance(x, (list, tuple)):
        x = np.asarray(x)
    # Plain Python numbers are the rows of one output, arrays one output each.
    y, w = (np.asarray(part) if _is_plain(part) else part for part in (y, w))
    x, y, w = (None if part is None else _map(as_array, part) for part in (x, y, w))
    if any(array.ndim == 0 for array in (*_leaves(x), *_leaves(y), *_leaves(w))):
        raise ValueError(
            f"The {what} data holds a single value where one row a sample is needed. Pass arrays "
            "of shape (samples, ...)."
        )
    lengths = {len(array) for array in (*_leaves(x), *_leaves(y), *_leaves(w))}
    if not lengths or 0 in lengths:
        raise ValueError(
            f"The {what} data is empty. Pass at least one sample; an exhausted generator or a "
            "`take(0)` also looks like this."
        )
    if len(lengths) > 1:
        raise ValueError(
            f"The arrays of the {what} data have different lengths, {sorted(lengths)}. Every input "
            "and every array of labels or weights needs one row a sample."
        )
    count = lengths.pop()
    if limit is not None and count > limit:
        keep = np.linspace(0, count - 1, limit).astype(int)
        x, y, w = (None if part is None else _map(lambda a: a[keep], part) for part in (x, y, w))
        count = limit
    return Samples(x, y, count, w)


def _is_plain(value: object) -> bool:
    return isinstance(value, (list, tuple)) and not any(
        part is None or hasattr(part, "__array__") for part in value
    )


def _is_stream(data: object) -> bool:
    if isinstance(data, (np.ndarray, dict, list, tuple)):
        return False
    # A framework tensor iterates as well, yet converts to one array.
    return _is_pydataset(data) or (isinstance(data, Iterable) and not hasattr(data, "__array__"))


def _is_pydataset(data: object) -> bool:
    import keras

    return isinstance(data, keras.utils.PyDataset)


def _batches(data: Any, what: str) -> Iterator[Any]:
    if _is_pydataset(data):
        if data.num_batches is None:
            raise ValueError(
                f"The {what} data is a PyDataset without end (`num_batches` is None). Pass one of "
                "finite length."
            )
        return (data[i] for i in range(data.num_batches))
    # `tf.data` calls an endless dataset -1; asking it here costs nothing, reading it never ends.
    cardinality = getattr(data, "cardinality", None)
    if what == "evaluation" and cardinality is not None and int(cardinality()) == -1:
        raise ValueError(
            "The evaluation data is a dataset that repeats without end. Pass one of finite length, "
            "for example `dataset.take(100)`."
        )
    return iter(data)


def _split(element: object) -> tuple[Any, Any, Any]:
    # A tuple is (x,), (x, y) or (x, y, sample_weight), as everywhere in Keras.
    if isinstance(element, tuple):
        if not 1 <= len(element) <= 3:
            raise ValueError(
                f"Data given as a tuple means (x, y) or (x, y, sample_weight), but it has "
                f"{len(element)} entries. Pass several inputs as a list or a dict."
            )
        x, y, w = (*element, None, None)[:3]
        return x, y, w
    return element, None, None


def _from_batches(batches: Iterator[Any], what: str, limit: int | None) -> tuple[Any, Any, Any]:
    xs: list[Any] = []
    others: tuple[list[Any], list[Any]] = ([], [])
    count = size = 0
    # What is read is joined once more when all of it is there.
    free = archives.memory_available()
    for element in batches:
        x, *rest = _split(element)
        x = _map(as_array, x)
        leaves = _leaves(x)
        if not leaves or leaves[0].ndim == 0:
            raise ValueError(
                f"The {what} data yields scalars, not batches. Batch it first, for example with "
                "`dataset.batch(32)`."
            )
        xs.append(x)
        for parts, part in zip(others, rest, strict=True):
            parts.append(None if part is None else _map(as_array, part))
        count += len(leaves[0])
        size += sum(leaf.nbytes for leaf in leaves)
        if free is not None and 2 * size > free:
            raise ValueError(
                f"The {what} data has given {size:,} bytes and goes on, more than the memory of "
                "this machine holds. Pass fewer samples, and none that repeat without end."
            )
        if limit is not None and count >= limit:
            break
    if not xs:
        raise ValueError(
            f"The {what} data is empty: the dataset yielded no batch. A generator that was read "
            "before yields nothing a second time."
        )
    for name, parts in zip(("labels", "weights"), others, strict=True):
        given = sum(part is not None for part in parts)
        if 0 < given < len(parts):
            raise ValueError(
                f"{given} of {len(parts)} batches of the {what} data have {name}. Give them to all "
                "batches, or to none."
            )
    y, w = (None if parts[0] is None else _stack(parts, limit, what) for parts in others)
    return _stack(xs, limit, what), y, w


def _stack(parts: list[Any], limit: int | None, what: str) -> Any:
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: _stack([part[key] for part in parts], limit, what) for key in first}
    if isinstance(first, (list, tuple)):
        return [_stack([part[i] for part in parts], limit, what) for i in range(len(first))]
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"The batches of the {what} data differ in shape beyond the batch dimension: "
            f"{sorted(shapes)}. Pad or resize the samples to one shape."
        )
    return np.concatenate(parts)[:limit]


def as_array(value: object) -> np.ndarray:
    """Return a NumPy array of what may be a tensor of any backend."""
    if isinstance(value, np.ndarray):
        return value
    import keras

    return np.asarray(keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else value)


def _map(function: Callable[[Any], Any], structure: Tensors) -> Any:
    # An output of several may have no labels.
    if structure is None:
        return None
    if isinstance(structure, dict):
        return {key: _map(function, value) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return [_map(function, value) for value in structure]
    return function(structure)


def _leaves(structure: Tensors) -> list[np.ndarray]:
    if structure is None:
        return []
    if isinstance(structure, dict):
        return [leaf for key in sorted(structure) for leaf in _leaves(structure[key])]
    if isinstance(structure, (list, tuple)):
        return [leaf for value in structure for leaf in _leaves(value)]
    return [structure]


def by_name(x: Tensors, signature: Signature, what: str) -> Arrays:
    """Give every input of the model its array.

    Args:
        x: Structure of arrays, `(samples, ...)` each.
        signature: Of the model.
        what: `"calibration"` or `"evaluation"`, for the messages.

    Returns:
        One contiguous array an input, in the input's dtype.

    Raises:
        ValueError: If an input is missing or unknown, a shape does not fit, or values are not
            finite.
    """
    infos = {info.name: info for info in signature.inputs}
    if isinstance(x, dict):
        for name in x:
            if name not in infos:
                hint = did_you_mean(name, infos)
                raise ValueError(
                    f"The {what} data has an entry `{name}`, which is not an input of the model; "
                    f"its inputs are {sorted(infos)}.{hint}"
                )
        missing = sorted(set(infos) - set(x))
        if missing:
            raise ValueError(
                f"The {what} data lacks the inputs {missing}. Pass a dict with one array for each "
                f"of {sorted(infos)}."
            )
        arrays = [x[info.name] for info in signature.inputs]
    else:
        arrays = list(x) if isinstance(x, (list, tuple)) else [x]
        if len(arrays) != len(infos):
            raise ValueError(
                f"The {what} data has {len(arrays)} array(s) and the model {len(infos)} input(s), "
                f"{sorted(infos)}. Pass a dict with one array for each (in a `.npz` file, arrays "
                "of these names)."
            )
    return {
        info.name: _checked(array, info, what)
        for info, array in zip(signature.inputs, arrays, strict=True)
    }


def _checked(array: np.ndarray, info: TensorInfo, what: str) -> np.ndarray:
    if array.dtype.kind not in "biuf" and "bfloat16" not in str(array.dtype):
        raise ValueError(
            f"The {what} data for input `{info.name}` has dtype {array.dtype}; numbers are needed."
        )
    if array.ndim == 0:
        raise ValueError(
            f"The {what} data for input `{info.name}` is a single value where one row a sample is "
            "needed. Pass an array of shape (samples, ...)."
        )
    want = info.shape[1:]
    got = array.shape[1:]
    if len(want) == len(got) + 1 and want[-1] == 1:
        # Keras adds a last axis of one to such data; so does this.
        array, got = array[..., None], (*got, 1)
    if len(got) != len(want) or any(w not in (None, g) for w, g in zip(want, got, strict=True)):
        raise ValueError(
            f"The {what} data for input `{info.name}` has samples of shape {got}, the model takes "
            f"{want}. Resize the data, or batch the dataset if the batch dimension is missing."
        )
    reason = misfit(array, info.dtype)
    if reason is not None:
        raise ValueError(
            f"The {what} data for input `{info.name}` {reason}; the model takes {info.dtype}. "
            "Remove or mend such values."
        )
    array = np.ascontiguousarray(array.astype(info.dtype, copy=False))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        raise ValueError(
            f"The {what} data for input `{info.name}` holds NaN or infinite values in {len(bad)} "
            f"of {len(array)} samples, the first in sample {int(bad[0])}. Remove or mend them."
        )
    return array


def check_same_scale(calibration: Arrays, evaluation: Arrays) -> None:
    """Refuse calibration data of another scale than the evaluation data.

    Ranges taken from wrongly scaled samples give a file that looks right and answers wrongly.

    Args:
        calibration: Arrays by input name.
        evaluation: Arrays by input name.

    Raises:
        ValueError: If, for a float input, the standard deviations differ by more than a factor of
            2.5, or they and the ranges by more than 1.7, or the means by more than two standard
            deviations, or both ends of the range by more than 0.35 of it. A range is that of all
            values but the 2 % at each end.
    """
    for name, reference in evaluation.items():
        if reference.dtype.kind != "f":
            continue
        got = calibration[name]
        std_c, std_e = float(got.std()), float(reference.std())
        mean_c, mean_e = float(got.mean()), float(reference.mean())
        widest = max(std_c, std_e)
        if widest == 0 and mean_c == mean_e:
            continue
        far = (
            widest > _SCALE * min(std_c, std_e)
            or abs(mean_c - mean_e) > 2 * widest
            or _other_range(got, reference, widest > _RANGE * min(std_c, std_e))
        )
        # A handful of samples says little about spread: only their limits are compared then.
        if len(got) < 8 or len(reference) < 8:
            span = max(float(np.ptp(got)), float(np.ptp(reference)))
            far = span > 8 * max(min(float(np.ptp(got)), float(np.ptp(reference))), 1e-12)
        if far:
            raise ValueError(
                f"The calibration data for input `{name}` is of another scale than the evaluation "
                f"data: values from {got.min():.4g} to {got.max():.4g} (mean {mean_c:.4g}, "
                f"standard deviation {std_c:.4g}) against {reference.min():.4g} to "
                f"{reference.max():.4g} (mean {mean_e:.4g}, standard deviation {std_e:.4g}). "
                "Prepare both the same way, for example divide both by 255, or bring both to "
                "[-1, 1]."
            )


def _other_range(got: np.ndarray, reference: np.ndarray, wider: bool) -> bool:
    (low_c, high_c), (low_e, high_e) = (np.quantile(x, (0.02, 0.98)) for x in (got, reference))
    spans = sorted((float(high_c - low_c), float(high_e - low_e)))
    # Rows that are nearly all zeros have no range to compare.
    if spans[1] == 0:
        return False
    if wider and spans[1] > _RANGE * spans[0]:
        return True
    moves = sorted((float(low_c - low_e), float(high_c - high_e)))
    return min(abs(move) for move in moves) > _SHIFT * spans[1] and moves[0] * moves[1] > 0
