"""The data sets of `../shared/data` as arrays, for the benchmarks beside this file."""

import itertools

import numpy as np


def load(name, folder, rows):
    """Arrays scaled as the models read them: x_train, y_train, x_test, y_test."""
    if name == "fashion_mnist":
        with np.load(folder / "fashion_mnist.npz") as d:
            x, y, u, v = (d[k] for k in ("x_train", "y_train", "x_test", "y_test"))
        x, u = (z[..., None].astype("float32") / 255.0 for z in (x, u))
    elif name == "cifar10":
        with np.load(folder / "cifar10_jpeg.npz") as d:
            x, u = (decoded(d, split) for split in ("train", "test"))
            y, v = d["y_train"], d["y_test"]
        x, u = (z.astype("float32") / 255.0 for z in (x, u))
    else:
        with np.load(folder / "fsdd.npz") as d:
            audio, offsets, test = d["audio"], d["offsets"], d["is_test"]
            labels = d["label"]
        features = np.stack([log_spectrogram(audio[a:b]) for a, b in itertools.pairwise(offsets)])
        x, y, u, v = features[~test], labels[~test], features[test], labels[test]
    order = np.random.default_rng(0).permutation(len(x))[:rows]
    return x[order], y[order].astype("int32"), u, v.astype("int32")


def decoded(stored, split):
    import tensorflow as tf

    blob, offsets = stored[f"x_{split}_jpeg"].tobytes(), stored[f"x_{split}_offsets"]
    images = [
        tf.io.decode_jpeg(blob[a:b], channels=3, dct_method="INTEGER_ACCURATE").numpy()
        for a, b in itertools.pairwise(offsets)
    ]
    return np.stack(images)


def log_spectrogram(wave, frames=48, bins=32):
    """Log magnitudes `(frames, bins, 1)` of half a second of 8 kHz audio, centered and scaled."""
    wave = wave.astype("float32") / 32768.0
    length = frames * 80 + 176
    wave = np.pad(wave, (0, max(length - len(wave), 0)))[:length]
    windows = np.lib.stride_tricks.sliding_window_view(wave, 256)[::80][:frames]
    power = np.abs(np.fft.rfft(windows * np.hanning(256))[:, 1:129]).reshape(frames, bins, 4)
    values = np.log(power.mean(-1) + 1e-4)
    return ((values - values.mean()) / (values.std() + 1e-6))[..., None].astype("float32")
