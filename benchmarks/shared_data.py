"""The data sets of `../shared/data` as arrays, for the benchmarks beside this file."""

import collections
import csv
import gzip
import itertools
import re
import zlib

import numpy as np


def load(name, folder, rows):
    """Arrays scaled as the models read them: x_train, y_train, x_test, y_test."""
    if name == "fashion_mnist":
        with np.load(folder / "fashion_mnist.npz") as d:
            x, y, u, v = (d[k] for k in ("x_train", "y_train", "x_test", "y_test"))
        x, u = (z[..., None].astype("float32") / 255.0 for z in (x, u))
    elif name == "cifar10":
        with np.load(folder / "cifar10_jpeg.npz") as d:
            # The images lie in a shuffled order: the first ones are any ones.
            x, u = decoded(d, "train", rows), decoded(d, "test")
            y, v = d["y_train"][:rows], d["y_test"]
        x, u = (z.astype("float32") / 255.0 for z in (x, u))
    else:
        with np.load(folder / "fsdd.npz") as d:
            audio, offsets, test = d["audio"], d["offsets"], d["is_test"]
            labels = d["label"]
        features = np.stack([log_spectrogram(audio[a:b]) for a, b in itertools.pairwise(offsets)])
        x, y, u, v = features[~test], labels[~test], features[test], labels[test]
    order = np.random.default_rng(0).permutation(len(x))[:rows]
    return x[order], y[order].astype("int32"), u, v.astype("int32")


def decoded(stored, split, rows=None):
    import tensorflow as tf

    blob, offsets = stored[f"x_{split}_jpeg"].tobytes(), stored[f"x_{split}_offsets"]
    offsets = offsets if rows is None else offsets[: rows + 1]
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


def speakers(folder, held_out=(4, 5)):
    """FSDD without two of the six speakers, who are the test rows: x, y, u, v."""
    with np.load(folder / "fsdd.npz") as d:
        audio, offsets, labels, speaker = (d[k] for k in ("audio", "offsets", "label", "speaker"))
    features = np.stack([log_spectrogram(audio[a:b]) for a, b in itertools.pairwise(offsets)])
    test, labels = np.isin(speaker, held_out), labels.astype("int32")
    order = np.random.default_rng(0).permutation(np.flatnonzero(~test))
    return features[order], labels[order], features[test], labels[test]


def messages(folder):
    """SMS Spam, a fifth of it for the test: (texts, 1 for spam) twice."""
    with gzip.open(folder / "sms_spam.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    order = np.random.default_rng(0).permutation(len(rows))
    texts = [rows[i]["text"] for i in order]
    labels = np.array([rows[i]["label"] == "spam" for i in order]).astype("int32")
    test = len(rows) // 5
    return (texts[test:], labels[test:]), (texts[:test], labels[:test])


def bags(train, test, words):
    """Which of the most frequent words of the training texts each text holds, and their number."""
    from sklearn.feature_extraction.text import CountVectorizer

    counts = CountVectorizer(max_features=words, binary=True).fit(train)
    x, u = (counts.transform(rows).toarray().astype("float32") for rows in (train, test))
    return x, u, x.shape[1]


_PARTS = (4096, 1024, 1024, 256)


def sentences(folder, length=64):
    """WNUT-17 as numbers: (x, y) of train, dev and test, how many numbers there are, and tags.

    A token is four numbers in tables of their own, by a hash: its word, its first three letters,
    its last three, and its shape, as `Xx0`. Tag 0 is outside, 2k + 1 begins and 2k + 2 goes on with
    the kind k; -1 is no token.
    """
    parts = [_tagged(folder / f"wnut17_{split}.conll.gz") for split in ("train", "dev", "test")]
    kinds = sorted({tag[2:] for rows in parts for row in rows for _, tag in row if tag != "O"})
    made = []
    for rows in parts:
        x = np.zeros((len(rows), length, len(_PARTS)), "int32")
        y = np.full((len(rows), length), -1, "int32")
        for i, row in enumerate(rows):
            for j, (token, tag) in enumerate(row[:length]):
                x[i, j] = _numbers(token)
                y[i, j] = 0 if tag == "O" else 2 * kinds.index(tag[2:]) + 1 + (tag[0] == "I")
        made.append((x, y))
    return *made, 1 + sum(_PARTS), 1 + 2 * len(kinds)


def _numbers(token):
    word = token.lower()
    shape = re.sub("[0-9]", "0", re.sub("[a-z]", "x", re.sub("[A-Z]", "X", token)))
    shape = re.sub(r"(.)\1+", r"\1", shape)
    begins = 1 + np.cumsum([0, *_PARTS[:-1]])
    values = (word, word[:3], word[-3:], shape)
    return [
        begin + zlib.crc32(value.encode()) % size
        for begin, value, size in zip(begins, values, _PARTS)
    ]


def _tagged(path):
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        blocks = file.read().replace("\r", "")
    rows = [
        [tuple(line.split("\t")) for line in block.split("\n") if line.strip()]
        for block in re.split(r"\n\s*\n", blocks)
    ]
    return [row for row in rows if row]


def ratings(folder, least_raters=20, least_rated=8, held_out=600):
    """MovieTweetings: what users rated first, and the gains of what they rated last.

    Movies of at least 20 ratings and users with at least 8 of them. The last fifth of a user's
    ratings is what is to be ranked, with the rating as its gain. Some users are the test rows: x,
    gains, u, test gains.
    """
    with gzip.open(folder / "movietweetings100k_ratings.dat.gz", "rt", encoding="utf-8") as file:
        rows = [line.strip().split("::") for line in file]
    raters = collections.Counter(movie for _, movie, *_ in rows)
    items = {
        movie: i for i, movie in enumerate(sorted(m for m in raters if raters[m] >= least_raters))
    }
    users = collections.defaultdict(list)
    for user, movie, rating, when in rows:
        if movie in items:
            users[user].append((int(when), items[movie], int(rating)))
    kept = [sorted(found) for _, found in sorted(users.items()) if len(found) >= least_rated]
    x, gains = np.zeros((2, len(kept), len(items)), "float32")
    for i, found in enumerate(kept):
        first = len(found) - max(2, len(found) // 5)
        x[i, [item for _, item, _ in found[:first]]] = 1
        gains[i, [item for _, item, _ in found[first:]]] = [r for _, _, r in found[first:]]
    # A movie that was rated twice is known already, and nothing is left of a row of zeros.
    gains[x > 0] = 0
    rows = np.flatnonzero(gains.sum(1) > 0)
    rows = np.random.default_rng(0).permutation(rows)
    test, train = rows[:held_out], rows[held_out:]
    return x[train], gains[train], x[test], gains[test]
