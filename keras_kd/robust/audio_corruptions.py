"""Audio as microphones hear it: `(samples, channels)` in `[-1, 1]`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def noise(wave: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """White noise, 30 to 5 dB below the row's own mean power."""
    ratio = (30, 20, 15, 10, 5)[severity - 1]
    power = float(np.mean(np.square(wave)))
    # Silence has a floor of noise all the same.
    scale = np.sqrt(max(power, 1e-6) / 10 ** (ratio / 10))
    return wave + scale * rng.standard_normal(wave.shape)


def shift(wave: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Begin late or early by 2 to 25 % of the length, with silence beside it."""
    share = (0.02, 0.05, 0.1, 0.17, 0.25)[severity - 1]
    by = max(1, round(share * len(wave)))
    found = np.zeros_like(wave)
    if rng.random() < 0.5:
        found[by:] = wave[:-by]
    else:
        found[:-by] = wave[by:]
    return found


def gain(wave: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Too quiet by 3 to 24 dB."""
    return wave * 10 ** (-(3, 6, 12, 18, 24)[severity - 1] / 20)


def clipping(wave: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Cut at 80 to 10 % of the row's own peak."""
    peak = float(np.abs(wave).max()) * (0.8, 0.6, 0.4, 0.2, 0.1)[severity - 1]
    return np.clip(wave, -peak, peak)


def reverb(wave: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Echoes that die away over an eighth of the length, 10 to 70 % of what is heard."""
    from scipy.signal import fftconvolve

    share = (0.1, 0.2, 0.35, 0.5, 0.7)[severity - 1]
    length = max(2, len(wave) // 8)
    echo = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length)
    echo[0] = 0.0
    echo /= np.linalg.norm(echo)
    heard = fftconvolve(wave, echo[:, None], axes=0)[: len(wave)]
    return (1 - share) * wave + share * heard


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "noise": noise,
    "shift": shift,
    "gain": gain,
    "clipping": clipping,
    "reverb": reverb,
}
"""The corruptions of audio by name."""
