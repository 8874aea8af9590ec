"""Small models with the weights that every backend starts from, and what training makes of them."""

import keras
import numpy as np
from keras import layers

import keras_kd as kd

CLASSES = 4


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def arrays():
    """The weights and data that all backends share."""
    rng = np.random.default_rng(0)
    found = {
        "x": rng.normal(size=(50, 6)).astype("float32"),
        "y": rng.integers(0, 4, 50),
        "weights": rng.uniform(0.5, 1.5, 50).astype("float32"),
        "tokens": np.where(np.arange(5) < rng.integers(1, 6, (12, 1)), 1, 0)
        * rng.integers(1, 11, (12, 5)),
        "token_labels": rng.integers(0, 4, (12, 5)),
    }
    for name, width in (("student", 5), ("teacher", 9)):
        # Dense, BatchNorm (scale, offset, mean, variance), Dense.
        shapes = [(6, width), (width,), *[(width,)] * 4, (width, 4), (4,)]
        for i, shape in enumerate(shapes):
            value = rng.uniform(0.5, 1.5, shape) if i in (2, 5) else rng.normal(size=shape)
            found[f"{name}{i}"] = value.astype("float32")
    for i, shape in enumerate([(5, 9), (9,)]):
        found[f"projection{i}"] = rng.normal(size=shape).astype("float32")
    return found


def mlp(width, name, **options):
    inputs = keras.Input((6,))
    x = layers.Dense(width, name="hidden", **options)(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Activation("relu", name="relu")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits", **options)(x), name=name)


def take(model, shared, prefix):
    """Give a model the weights that every backend starts from."""
    model.set_weights([shared[f"{prefix}{i}"] for i in range(len(model.weights))])
    return model


def student_and_teacher(shared):
    return take(mlp(5, "student"), shared, "student"), take(mlp(9, "teacher"), shared, "teacher")


class Record(keras.callbacks.Callback):
    """The logs of every batch."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append({name: float(value) for name, value in logs.items()})


def weights_of(model):
    return [np.array(w) for w in model.get_weights()]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def twenty_steps():
    """Two transfers, a projector, two annealings, sample weights: compared between backends."""
    shared = arrays()
    student, teacher = student_and_teacher(shared)
    before = weights_of(teacher)
    x, y = shared["x"], shared["y"]
    projector = layers.Dense(9)
    projector.build((None, 5))
    take(projector, shared, "projection")
    hint = kd.Transfer(
        kd.losses.Hint(), teacher="hidden", student="hidden", projector=projector, weight=0.5
    )
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=crossentropy(),
        metrics=["accuracy"],
        distillation_loss=[kd.losses.SoftTargets(), hint],
    )
    record = Record()
    history = distiller.fit(
        x,
        y,
        sample_weight=shared["weights"],
        batch_size=10,
        epochs=4,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=[
            record,
            kd.callbacks.TemperatureAnnealing(start=4.0, end=1.0, steps=20, kind="cosine"),
            kd.callbacks.AlphaAnnealing(start=0.1, end=0.9, epochs=4),
        ],
    ).history
    assert len(record.logs) == 20
    assert same(before, weights_of(teacher))
    assert len(student.trainable_variables) == 6
    parts = ("loss", "student_loss", "distillation_loss", "soft_targets", "hint", "agreement")
    return {
        **{f"weight_{i}": weight for i, weight in enumerate(weights_of(student))},
        **{f"batch_{name}": np.array([logs[name] for logs in record.logs]) for name in parts},
        **{f"epoch_{name}": np.array(values) for name, values in history.items()},
    }
