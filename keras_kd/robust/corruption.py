"""What happens to inputs outside the laboratory: the door to all corruptions, by name.

A corruption is a function `fn(row, severity, rng)` in a registry of its kind: `image_corruptions`,
`audio_corruptions` or `text_corruptions`; images and audio come as float64 in units of their
bounds, `[0, 1]` and `[-1, 1]`. A new one is a function and a line of its module's `CORRUPTIONS`.
Each row has random numbers of its own, from the seed and its place, the same for all severities, so
that a greater severity is more of the same. May import: NumPy, SciPy, Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_kd.robust import audio_corruptions, image_corruptions, text_corruptions
from keras_kd.robust.threats import interval
from keras_kd.utils import checks
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
KINDS: dict[str, dict[str, Callable[..., Any]]] = {
    "image": image_corruptions.CORRUPTIONS,
    "audio": audio_corruptions.CORRUPTIONS,
    "text": text_corruptions.CORRUPTIONS,
}


def corruptions(kind: str | None = None) -> list[str]:
    """Name the corruptions that `corrupt` knows.

    Args:
        kind: `"image"`, `"audio"` or `"text"`; `None` for all of them.

    Returns:
        Names, in the order of reports.

    Raises:
        ValueError: If there is no such kind.

    Examples:
        >>> corruptions("text")
        ['typos', 'casing', 'spacing']
    """
    if kind is None:
        return [name for names in KINDS.values() for name in names]
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"`kind` is one of {_close(kind, KINDS)}")
    return list(KINDS[kind])


def corrupt(
    x: Tensor,
    name: str,
    severity: int = 3,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
) -> Any:
    """Corrupt each row of some inputs.

    Images take the severities of CIFAR-10-C and MNIST-C; what they count in pixels, of 32 and of
    28, grows and shrinks with the image.

    Args:
        x: Images `(rows, height, width)` or `(rows, height, width, channels)`; audio
            `(rows, samples)` or `(rows, samples, channels)`; or texts, a list or an array of
            strings.
        name: One of `corruptions()`.
        severity: 1 to 5.
        seed: Of the random numbers. Row `i` has those of `(seed, i)`.
        bounds: Least and greatest value. Defaults to `(0, 255)` for uint8 images, to `(0, 1)` for
            others, to the range of the dtype for whole numbers of audio, and to `(-1, 1)` for
            others.

    Returns:
        The same shape and dtype, within the bounds; of texts a list or an array, as given.

    Raises:
        TypeError: If `x` is of another type.
        ValueError: If the name is unknown, the severity out of range, or values leave the bounds.

    Examples:
        >>> darker = corrupt(images, "contrast", severity=3, seed=0)

    Reference:
        - [Hendrycks and Dietterich, 2019](https://arxiv.org/abs/1903.12261)
        - [Mu and Gilmer, 2019](https://arxiv.org/abs/1906.02337)
    """
    kind = kind_of(name)
    severity = require_severity(severity)
    checks.whole("seed", seed, 0)
    function = KINDS[kind][name]
    if kind == "text":
        return _texts(x, function, severity, seed)
    array = checks.as_array(x)
    ranks = (3, 4) if kind == "image" else (2, 3)
    if array.dtype.kind not in "fiu" or array.ndim not in ranks:
        wanted = (
            "(rows, height, width[, channels])" if kind == "image" else "(rows, samples[, ...])"
        )
        raise TypeError(
            f"`{name}` corrupts numbers {wanted}. Received: {array.dtype}, shape {array.shape}."
        )
    if kind == "image" and array.ndim == 3 and array.shape[-1] in (1, 3) and len(array):
        raise ValueError(
            f"`x` has shape {array.shape}, which is one image with its channels, and rows of "
            "images are corrupted. Pass `x[None]`."
        )
    low, high = _bounds(array, kind, bounds)
    flat = array.ndim == ranks[0]
    found = np.empty_like(array)
    for i, row in enumerate(array):
        unit = (row.astype("float64") - low) / (high - low)
        unit = unit if kind == "image" else 2 * unit - 1
        rng = np.random.default_rng((seed, i))
        made = function(unit[..., None] if flat else unit, severity, rng)
        made = made[..., 0] if flat else made
        made = np.clip(made, 0, 1) if kind == "image" else (np.clip(made, -1, 1) + 1) / 2
        values = low + made * (high - low)
        found[i] = np.round(values) if array.dtype.kind in "iu" else values
    return found


def require_severity(severity: object) -> int:
    """A severity, or `ValueError`."""
    if not checks.is_whole(severity) or severity not in SEVERITIES:
        raise ValueError(f"`severity` is 1, 2, 3, 4 or 5. Received: severity={severity!r}.")
    return int(severity)


def kind_of(name: object) -> str:
    """The kind that a corruption belongs to, or `ValueError` with a close match."""
    for kind, names in KINDS.items():
        if isinstance(name, str) and name in names:
            return kind
    raise ValueError(f"A corruption is one of {_close(name, corruptions())}")


def chosen(names: Any, x: np.ndarray, bounds: Sequence[float] | None = None) -> list[str]:
    """The corruptions that a report asks for.

    Args:
        names: A name, several, a kind, `"all"` for those of the inputs' kind, or `None`.
        x: The inputs.
        bounds: As for `corrupt`.

    Raises:
        TypeError: If they are no names.
        ValueError: If a name is unknown, or belongs to inputs of another kind, or the inputs leave
            their bounds.
    """
    if names is None:
        return []
    if not isinstance(names, str | list | tuple):
        raise TypeError(
            "`corruptions` is a name, a list of names, a kind, 'all' or `None`. Received: "
            f"corruptions={names!r}."
        )
    found = _named(names, x)
    for kind in dict.fromkeys(map(kind_of, found)):
        if kind not in _fitting(x):
            name = next(name for name in found if kind_of(name) == kind)
            raise ValueError(
                f"{name!r} is a corruption of {kind}, which inputs of shape {x.shape} and dtype "
                f"{x.dtype} are not."
            )
        if kind != "text":
            _bounds(x, kind, bounds)
    return found


def _fitting(x: np.ndarray) -> tuple[str, ...]:
    """The kinds that inputs may be of, the likeliest first."""
    if x.dtype.kind in "OSU":
        return ("text",)
    return {2: ("audio",), 3: ("image", "audio"), 4: ("image",)}.get(x.ndim, ())


def _named(names: str | Sequence[Any], x: np.ndarray) -> list[str]:
    own = next(iter(_fitting(x)), None)
    if isinstance(names, str) and names == "all":
        if own is None:
            raise ValueError(
                f"Nothing tells which corruptions inputs of shape {x.shape} have. Name them: "
                f"{', '.join(corruptions())}."
            )
        return corruptions(own)
    if isinstance(names, str) and names in KINDS:
        return corruptions(names)
    return [names] if isinstance(names, str) else list(names)


def _close(name: object, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known, quote="'")
    return f"{', '.join(map(repr, known))}. Received: {name!r}.{hint}"


def _bounds(array: np.ndarray, kind: str, bounds: Sequence[float] | None) -> tuple[float, float]:
    whole = array.dtype.kind in "iu"
    given = interval(bounds)
    if given is not None:
        low, high = given
    elif kind == "image":
        low, high = (0.0, 255.0) if whole else (0.0, 1.0)
    else:
        limits = np.iinfo(array.dtype) if whole else None
        low, high = (float(limits.min), float(limits.max)) if limits else (-1.0, 1.0)
    if array.size:
        least, most = float(array.min()), float(array.max())
        slack = 1e-5 * (high - low)
        if not (least >= low - slack and most <= high + slack):
            raise ValueError(
                f"The inputs run from {least:.6g} to {most:.6g}, outside of the bounds "
                f"({low:g}, {high:g}). Pass the range that they have: `bounds=(low, high)`."
            )
    return low, high


def _texts(x: Tensor, function: Callable[..., str], severity: int, seed: int) -> Any:
    given = np.asarray(ops.convert_to_numpy(x) if ops.is_tensor(x) else x)
    try:
        texts = [t.decode() if isinstance(t, bytes) else t for t in given.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise ValueError(f"Texts in bytes are UTF-8: {error}. Decode them as they are.") from error
    if isinstance(x, list | tuple) and given.ndim > 1:
        raise TypeError(
            f"Texts are a list of strings. Received: lists within a list, shape {given.shape}. "
            "Pass an array to keep its shape."
        )
    if isinstance(x, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            "Texts are a list or an array of strings. Received: "
            f"{type(x).__name__}{'' if isinstance(x, str) else f' of {given.dtype}'}."
        )
    made = [
        function(text, severity, np.random.default_rng((seed, i))) for i, text in enumerate(texts)
    ]
    if isinstance(x, list | tuple):
        return made
    if given.dtype.kind == "S":
        return np.array([text.encode() for text in made]).reshape(given.shape)
    return np.array(made, dtype=object if given.dtype.kind == "O" else None).reshape(given.shape)
