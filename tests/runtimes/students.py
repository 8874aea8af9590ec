"""Small trained students, exported in every precision: `python students.py FOLDER [NAME ...]`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

import keras_kd.export
from keras_kd import compress
from keras_kd.export.checks import known_precisions
from keras_kd.export.formats.runtime import open_file

TEST = 200
PRECISIONS = tuple(known_precisions())


def corners():
    """Images of a bright spot in one of four corners, with noise: (x, y)."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 600)
    x = rng.normal(0.2, 0.15, (600, 16, 16, 1))
    for i, corner in enumerate(y):
        row, column = 8 * (corner // 2), 8 * (corner % 2)
        x[i, row : row + 8, column : column + 8] += 0.25
    return np.clip(x, 0, 1).astype("float32"), y


def convolutions():
    return [
        keras.Input((16, 16, 1), name="image"),
        layers.Conv2D(16, 3, strides=2, padding="same", activation="relu", name="first"),
        layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="deep"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.Conv2D(32, 3, strides=2, padding="same", activation="relu", name="second"),
        layers.AveragePooling2D(2, name="pool"),
    ]


def cnn():
    return [*convolutions(), layers.Conv2D(4, 2, name="last"), layers.GlobalAveragePooling2D()]


def wide(last=None):
    return [
        keras.Input((16, 16, 1), name="image"),
        layers.Conv2D(16, 3, activation="relu", name="first"),
        layers.MaxPooling2D(name="pool"),
        layers.Flatten(name="flat"),
        layers.Dense(64, activation="relu", name="hidden"),
        layers.Dense(4, activation=last, name="last"),
    ]


def softmax():
    return wide("softmax")


def lstm():
    return [
        keras.Input((16, 16), name="signal"),
        layers.LSTM(24, name="loop"),
        layers.Dense(4, name="last"),
    ]


def gru():
    return [
        keras.Input((16, 16), name="signal"),
        layers.GRU(16, name="loop"),
        layers.Dense(4, name="last"),
    ]


@keras.saving.register_keras_serializable(package="students")
class Residual(layers.Layer):
    """Attention over the rows of an image, and a dense part, each with its input added."""

    def build(self, shape):
        self.attend = layers.MultiHeadAttention(2, 8, name="attend")
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        self.dense = [layers.Dense(32, activation="gelu"), layers.Dense(shape[-1])]
        # Without it, no row would know where it stands.
        self.place = self.add_weight(shape=shape[1:], initializer="random_normal", name="place")
        super().build(shape)

    def call(self, x):
        x = x + self.place
        y = self.norms[0](x)
        x = x + self.attend(y, y)
        return x + self.dense[1](self.dense[0](self.norms[1](x)))


def transformer():
    return [
        keras.Input((16, 16), name="signal"),
        layers.Dense(16, name="embed"),
        Residual(name="block"),
        layers.GlobalAveragePooling1D(name="mean"),
        layers.Dense(4, name="last"),
    ]


def mobile():
    return [
        keras.Input((16, 16, 1), name="image"),
        layers.Conv2D(16, 3, padding="same", use_bias=False, name="first"),
        layers.BatchNormalization(name="norm"),
        layers.Activation("hard_swish", name="swish"),
        layers.UpSampling2D(2, interpolation="bilinear", name="up"),
        layers.DepthwiseConv2D(3, strides=4, activation="relu6", name="deep"),
        layers.Conv2D(24, 1, activation="relu", name="point"),
        layers.AveragePooling2D(4, name="mean"),
        layers.Flatten(name="flat"),
        layers.Dense(4, activation="softmax", name="last"),
    ]


def shortcut():
    """Separable convolutions, weights of channels from their means, and an addition."""
    image = x = keras.Input((16, 16, 1), name="image")
    x = layers.SeparableConv2D(12, 3, strides=2, padding="same", name="separable")(x)
    x = layers.PReLU(shared_axes=[1, 2], name="prelu")(x)
    y = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    y = layers.Conv2D(12, 1, activation="sigmoid", name="excite")(y)
    y = layers.Multiply(name="weigh")([x, y])
    y = layers.Conv2D(12, 3, padding="same", dilation_rate=2, activation="elu", name="wide")(y)
    x = layers.Add(name="add")([x, y])
    x = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.MaxPooling2D(5, name="pool")(x)
    return keras.Model(image, layers.Dense(4, name="last")(layers.Flatten(name="flat")(x)))


def decoder():
    """A transposed convolution beside what it came from."""
    image = keras.Input((16, 16, 1), name="image")
    x = layers.Conv2D(8, 3, padding="same", activation="leaky_relu", name="first")(image)
    y = layers.Conv2D(12, 3, strides=2, padding="same", activation="silu", name="down")(x)
    y = layers.Conv2DTranspose(8, 3, strides=2, padding="same", name="up")(y)
    x = layers.Concatenate(name="join")([x, y])
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.AveragePooling2D(8, name="pool")(x)
    return keras.Model(image, layers.Dense(4, name="last")(layers.Flatten(name="flat")(x)))


def signal():
    return [
        keras.Input((16, 16), name="signal"),
        layers.Conv1D(16, 3, dilation_rate=2, padding="causal", activation="relu", name="causal"),
        layers.Conv1D(16, 3, strides=2, activation="tanh", name="second"),
        layers.MaxPooling1D(2, name="pool"),
        layers.Permute((2, 1), name="turn"),
        layers.Flatten(name="flat"),
        layers.Dense(4, activation="softmax", name="last"),
    ]


def both_ways():
    return [
        keras.Input((16, 16), name="signal"),
        layers.Bidirectional(layers.LSTM(8, return_sequences=True), name="both"),
        layers.TimeDistributed(layers.Dense(4), name="each"),
        layers.Flatten(name="flat"),
        layers.Dense(4, name="last"),
    ]


def words():
    return [
        keras.Input((64,), dtype="int32", name="words"),
        layers.Embedding(16, 8, name="embed"),
        layers.Conv1D(16, 8, strides=8, activation="gelu", name="spans"),
        layers.Flatten(name="flat"),
        layers.Dense(4, name="last"),
    ]


STUDENTS = {
    "cnn": cnn,
    "wide": wide,
    "softmax": softmax,
    "lstm": lstm,
    "aware": cnn,
    "pruned": wide,
    "gru": gru,
    "transformer": transformer,
    "mobile": mobile,
    "mobileaware": mobile,
    "shortcut": shortcut,
    "shortcutaware": shortcut,
    "decoder": decoder,
    "signal": signal,
    "bothways": both_ways,
    "words": words,
}

SERIES = ("lstm", "gru", "transformer", "signal", "bothways")
PROBABILITIES = ("softmax", "mobile", "mobileaware", "signal")


def rows_of(name, x):
    """The images as a student takes them."""
    if name == "words":
        return np.round(15 * x[:, ::2, ::2, 0]).astype("int32").reshape(len(x), -1)
    return x[..., 0] if name in SERIES else x


def make(name, x, y):
    keras.utils.set_random_seed(0)
    made = STUDENTS[name]()
    model = made if isinstance(made, keras.Model) else keras.Sequential(made, name=name)

    def fit(student, epochs):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=name not in PROBABILITIES)
        student.compile(keras.optimizers.Adam(0.004), loss, metrics=["accuracy"])
        student.fit(x[:-TEST], y[:-TEST], epochs=epochs, verbose=0)
        return student

    # Until few decisions hang by a hair: those would change with the last digit.
    fit(model, 8 if name in ("cnn", "wide", "softmax", "lstm", "aware", "pruned") else 40)
    if name.endswith("aware"):
        model = fit(compress.quantize_aware(model), 2)
    if name == "pruned":
        model = compress.prune(model, sparsity=0.8)
        model = compress.finalize(fit(model, 2))
    return model


def export(name, folder):
    """Export one student with a free batch and with a batch of one, and note what the files say."""
    x, y = corners()
    x = rows_of(name, x)
    model = make(name, x, y)
    for batch in (None, 1):
        place = folder / f"{name}-{'free' if batch is None else batch}"
        report = keras_kd.export.export_model(
            model,
            place,
            precisions=PRECISIONS,
            calibration=x[:200],
            evaluation=(x[-TEST:], y[-TEST:]),
            max_drop=None,
            batch=batch,
            sparse=name == "pruned",
            normalization=(0, 255) if x.ndim == 4 else None,
            labels=["a", "b", "c", "d"],
            mixed=False,
            overwrite=True,
        )
        print(report.table(), flush=True)
        np.save(place / "x.npy", x[-TEST:].astype("float32"))
        for artifact in report.artifacts:
            if artifact.path is not None:
                # One at a time and as the file has it, so that each runtime is fed the same.
                runtime = open_file(artifact.path)
                answers = [runtime.run({model.inputs[0].name: row[None]}) for row in x[-TEST:]]
                (output,) = answers[0]
                np.save(f"{artifact.path}.npy", np.concatenate([a[output] for a in answers]))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for student in sys.argv[2:] or STUDENTS:
        export(student, target)
