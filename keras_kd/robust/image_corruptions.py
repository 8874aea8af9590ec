"""Images as cameras and scanners see them: `(height, width, channels)` in `[0, 1]`.

Severities are those of CIFAR-10-C (Hendrycks and Dietterich; noise, blur, weather, digital) and of
MNIST-C (Mu and Gilmer; shapes and strokes). Lengths in pixels are those of an image of 32 pixels
and scale with its shorter side. Where a source has a severity that changes an image less than the
one before it, ours grows.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable

import numpy as np

_SIDE = 32


def _scale(image: np.ndarray) -> float:
    return min(image.shape[:2]) / _SIDE


# ------------------------------------------------------------------------------- noise


def gaussian_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of one size, as in the dark."""
    return image + (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1] * rng.standard_normal(image.shape)


def shot_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of few photons, greater where it is bright."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return rng.poisson(np.clip(image, 0, 1) * photons) / photons


def impulse_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Single values black or white."""
    rate = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    draws, white = rng.random(image.shape), rng.random(image.shape) < 0.5
    return np.where(draws < rate, white.astype(float), image)


def speckle_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Noise in proportion to the brightness."""
    size = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    return image * (1 + size * rng.standard_normal(image.shape))


# -------------------------------------------------------------------------------- blur


def gaussian_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A soft focus."""
    return _blurred(image, (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1] * max(_scale(image), 0.8))


def defocus_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Points become disks."""
    from scipy.ndimage import convolve

    radius = (0.6, 0.8, 1.0, 1.4, 1.8)[severity - 1] * max(_scale(image), 0.9)
    reach = math.ceil(radius)
    down, across = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    # The share of a pixel that lies in the disk, roughly.
    disk = np.clip(radius + 0.5 - np.hypot(down, across), 0, 1)
    return convolve(image, (disk / disk.sum())[..., None], mode="nearest")


def glass_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels swapped with neighbors, as through frosted glass."""
    share = (0.1, 0.25, 0.4, 0.6, 0.9)[severity - 1]
    found = _blurred(image, 0.2)
    draws = rng.random(image.shape[:2])
    moves = rng.integers(-1, 2, (*image.shape[:2], 2))
    for i in range(1, image.shape[0] - 1):
        for j in range(1, image.shape[1] - 1):
            if draws[i, j] < share:
                there = i + moves[i, j, 0], j + moves[i, j, 1]
                found[i, j], found[there] = found[there].copy(), found[i, j].copy()
    return _blurred(found, 0.2)


def motion_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A line in place of each point, in a direction of the row's own."""
    from scipy.ndimage import convolve

    length = (1.5, 2.5, 3.5, 4.5, 6.0)[severity - 1] * max(_scale(image), 0.5)
    angle = rng.uniform(0, math.pi)
    reach = math.ceil(length / 2)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for t in np.linspace(-length / 2, length / 2, 41):
        down, across = reach + t * math.sin(angle), reach + t * math.cos(angle)
        i, j = math.floor(down), math.floor(across)
        for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (1 - abs(down - i - di)) * (1 - abs(across - j - dj))
            if weight > 1e-9:
                kernel[i + di, j + dj] += weight
    return convolve(image, (kernel / kernel.sum())[..., None], mode="nearest")


# ----------------------------------------------------------------------- light, weather


def brightness(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The value of each color raised, with its hue and saturation kept."""
    value = image.max(axis=-1, keepdims=True)
    raised = np.minimum(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 1.0)
    return np.where(value > 0, image * raised / np.where(value > 0, value, 1), raised)


def contrast(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """All values nearer to their mean."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + mean


def fog(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A veil of clouds, by the diamond-square algorithm, over a darkened image."""
    thick = (0.2, 0.5, 0.75, 1.0, 1.5)[severity - 1]
    veil = _clouds(max(image.shape[:2]), rng)[: image.shape[0], : image.shape[1], None]
    top = max(float(image.max()), 1e-6)
    return (image + thick * veil) * top / (top + thick)


def spatter(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Drops on the lens, more of them with each severity."""
    share = (0.03, 0.06, 0.1, 0.15, 0.22)[severity - 1]
    field = _blurred(rng.standard_normal(image.shape[:2])[..., None], max(1.5 * _scale(image), 0.5))
    drops = field > np.quantile(field, 1 - share)
    return np.where(drops, 0.9 * 0.7 + 0.3 * image, image)


# ----------------------------------------------------------------------------- digital


def pixelate(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks of 2 to 6 of 32 pixels that have one color each.

    CIFAR-10-C shrinks images to 95 to 65 % and back, where 85 % may change them less than 90 %.
    Images of few pixels are mixed with blocks of a third of their side, a fifth to all of them.
    """
    small = min(image.shape[:2]) < 20
    found, share = image, severity / 5 if small else 1.0
    for axis in (0, 1):
        block = max(severity + 1, round((severity + 1) * _scale(image)))
        block = max(2, math.ceil(min(image.shape[:2]) / 3)) if small else block
        begins = np.arange(0, image.shape[axis], block)
        sizes = np.diff([*begins, image.shape[axis]])
        sums = np.add.reduceat(found, begins, axis=axis)
        shape = [-1 if a == axis else 1 for a in range(found.ndim)]
        found = np.repeat(sums / sizes.reshape(shape), sizes, axis=axis)
    return (1 - share) * image + share * found


def jpeg_compression(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 80 to 40; images of other than three channels one channel at a time."""
    quality = (80, 65, 58, 50, 40)[severity - 1]
    if image.shape[-1] == 3:
        return _through_jpeg(image, quality)
    return np.stack([_through_jpeg(c, quality) for c in np.moveaxis(image, -1, 0)], axis=-1)


# ------------------------------------------------------------------------------ shapes


def rotate(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Turned by 7 to 40 degrees, to the left or to the right."""
    angle = math.radians((7, 14, 21, 30, 40)[severity - 1]) * rng.choice([-1, 1])
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return _warped(image, np.array(turn))


def shear(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Slanted by 0.1 to 0.6 pixels a line."""
    slant = (0.1, 0.2, 0.3, 0.45, 0.6)[severity - 1] * rng.choice([-1, 1])
    return _warped(image, np.array([[1, 0], [slant, 1]]))


def scale(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Smaller by a tenth to a half, in the middle of the frame."""
    return _warped(image, np.eye(2) / (0.9, 0.8, 0.7, 0.6, 0.5)[severity - 1])


def translate(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Moved by 1 to 5 of 28 pixels, in a direction of the row's own."""
    angle = rng.uniform(0, 2 * math.pi)
    by = severity * min(image.shape[:2]) / 28 * np.array([math.sin(angle), math.cos(angle)])
    return _warped(image, np.eye(2), by)


# ----------------------------------------------------------------------------- strokes


def stripe(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A band of inverted columns in the middle, a tenth to a half of the width."""
    width = max(severity, round(image.shape[1] * severity / 10))
    begin = (image.shape[1] - width) // 2
    found = image.copy()
    found[:, begin : begin + width] = 1 - found[:, begin : begin + width]
    return found


def dotted_line(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """One to five dotted lines across."""
    return _drawn(image, [_points(rng, image.shape, 1) for _ in range(5)][:severity], dotted=True)


def zigzag(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """One to five zigzags across."""
    return _drawn(image, [_points(rng, image.shape, 6) for _ in range(5)][:severity], dotted=False)


def edges(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Its own outlines in place of the image, by a fifth to the whole (for MNIST-C's Canny)."""
    from scipy.ndimage import sobel

    share = severity / 5
    slope = np.hypot(sobel(image, axis=0), sobel(image, axis=1))
    top = float(slope.max())
    return (1 - share) * image + share * (slope / top if top > 0 else slope)


# ------------------------------------------------------------------------------- parts


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def _clouds(side: int, rng: np.random.Generator, wibble: float = 2.0) -> np.ndarray:
    """A fractal of this side and more, in `[0, 1]`: noise halved with each finer grid."""
    from scipy.ndimage import zoom

    size = 2 ** math.ceil(math.log2(max(side, 4)))
    found = np.zeros((size, size))
    cells, height = 2, 1.0
    while cells <= size:
        found += height * zoom(rng.uniform(-1, 1, (cells, cells)), size / cells, order=1)
        cells, height = 2 * cells, height / wibble
    found -= found.min()
    return found / max(float(found.max()), 1e-12)


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "`jpeg_compression` needs Pillow, which is not installed. Install it with "
            '`pip install "keras_kd[robust]"`.'
        ) from error
    buffer = io.BytesIO()
    Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype("uint8")).save(
        buffer, "JPEG", quality=quality
    )
    with Image.open(buffer) as stored:
        return np.asarray(stored, "float64") / 255


def _warped(image: np.ndarray, matrix: np.ndarray, by: np.ndarray | float = 0.0) -> np.ndarray:
    """The image under a map about its middle, with black outside."""
    from scipy.ndimage import affine_transform

    middle = (np.array(image.shape[:2]) - 1) / 2
    offset = middle - matrix @ middle + by
    channels = [
        affine_transform(c, matrix, offset, order=1, mode="constant")
        for c in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def _points(rng: np.random.Generator, shape: tuple[int, ...], bends: int) -> np.ndarray:
    """A path from the left edge to the right one, `(bends + 1, 2)`."""
    down = rng.uniform(0, shape[0] - 1, bends + 1)
    return np.stack([down, np.linspace(0, shape[1] - 1, bends + 1)], axis=1)


def _drawn(image: np.ndarray, paths: list[np.ndarray], dotted: bool) -> np.ndarray:
    found = image.copy()
    for path in paths:
        ends = itertools.pairwise(path)
        steps = 2 * max(image.shape[:2])
        pixels = [a + (b - a) * t for a, b in ends for t in np.linspace(0, 1, steps)]
        for i, j in np.round(pixels).astype(int):
            if not dotted or j % 3 != 2:
                found[i, j] = 1.0
    return found


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "speckle_noise": speckle_noise,
    "gaussian_blur": gaussian_blur,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "brightness": brightness,
    "contrast": contrast,
    "fog": fog,
    "spatter": spatter,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
    "rotate": rotate,
    "shear": shear,
    "scale": scale,
    "translate": translate,
    "stripe": stripe,
    "dotted_line": dotted_line,
    "zigzag": zigzag,
    "edges": edges,
}
"""The corruptions of images by name."""
