"""What either side reads: other modalities and sizes, and the very same random view."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import crossentropy, hard_loss, kl, log_softmax

import keras_kd as kd

SIZE, CLASSES, COUNT = 8, 3, 12


def _network(width, name, size=SIZE):
    """A classifier whose layer `view` passes on what the model reads."""
    inputs = keras.Input((size, size, 1))
    x = layers.Identity(name="view")(inputs)
    x = layers.GlobalMaxPooling2D()(layers.Conv2D(width, 3, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name=name)


def _images():
    rng = np.random.default_rng(0)
    return rng.uniform(size=(COUNT, SIZE, SIZE, 1)).astype("float32"), rng.integers(0, 3, COUNT)


def largest_difference(teacher, student):
    return ops.max(ops.abs(teacher - student), axis=(1, 2, 3))


def energy(teacher, student):
    return ops.mean(ops.square(student), axis=(1, 2, 3))


def _watched(distiller, hard=None):
    """Compile with transfers that log how far the views are apart, and how bright they are."""
    distiller.compile(
        keras.optimizers.SGD(0.01),
        hard,
        distillation_loss=[
            kd.losses.SoftTargets(),
            kd.Transfer(largest_difference, "view", "view", name="apart"),
            kd.Transfer(energy, "view", "view", weight=0.0, name="energy"),
        ],
        # XLA fuses the two sides in its own ways.
        jit_compile=False,
    )
    return distiller


def _augmentations(seed):
    return keras.Sequential(
        [
            layers.RandomFlip("horizontal", seed=seed),
            layers.RandomTranslation(0.2, 0.2, fill_mode="constant", seed=seed + 1),
            layers.RandomZoom(0.2, seed=seed + 2),
        ]
    )


def test_the_same_random_view_through_a_dataset():
    tf = pytest.importorskip("tensorflow")
    x, _ = _images()
    augment = _augmentations(3)
    data = tf.data.Dataset.from_tensor_slices(x).batch(4)
    data = data.map(lambda images: augment(images, training=True))
    distiller = _watched(kd.Distiller(_network(4, "student"), _network(8, "teacher")))
    logs = distiller.fit(data, epochs=3, verbose=0).history
    assert logs["apart"] == [0.0] * 3
    # Every epoch draws views of its own.
    assert len(set(logs["energy"])) == 3


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX draws in the step from state it is given"
)
@pytest.mark.parametrize("same", [True, False])
def test_random_views_inside_the_step(same):
    """Layers of equal seeds draw equal numbers, step after step; others do not."""
    x, _ = _images()
    mine, theirs = _augmentations(3), _augmentations(3 if same else 30)
    distiller = kd.Distiller(
        _network(4, "student"),
        _network(8, "teacher"),
        student_inputs=lambda images: mine(images, training=True),
        teacher_inputs=lambda images: theirs(images, training=True),
    )
    logs = _watched(distiller).fit(x, batch_size=4, epochs=3, shuffle=False, verbose=0).history
    assert (logs["apart"] == [0.0] * 3) == same
    assert len(set(logs["energy"])) == 3


@pytest.mark.parametrize("mixing", ["MixUp", "CutMix"])
def test_mixed_images_and_their_soft_labels(mixing):
    tf = pytest.importorskip("tensorflow")
    x, y = _images()
    layer = getattr(layers, mixing)(seed=5)
    data = tf.data.Dataset.from_tensor_slices(
        {"images": x, "labels": np.eye(CLASSES, dtype="float32")[y]}
    )
    data = data.batch(COUNT).map(lambda batch: layer(batch, training=True))
    data = data.map(lambda batch: (batch["images"], batch["labels"]))
    # What was drawn is kept, so that NumPy can compute the losses from it.
    images, labels = next(iter(data))
    labels = np.asarray(labels)
    assert np.any((labels > 0) & (labels < 1))
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    student, teacher = _network(4, "student"), _network(8, "teacher")
    z_t, z_s = (model.predict(images, verbose=0) for model in (teacher, student))
    distiller = _watched(
        kd.Distiller(student, teacher), keras.losses.CategoricalCrossentropy(from_logits=True)
    )
    kept = tf.data.Dataset.from_tensors((images, labels))
    logs = distiller.fit(kept, verbose=0).history
    hard = -(labels * log_softmax(z_s)).sum(-1).mean()
    soft = kl(z_t, z_s, 1.0).mean()
    assert logs["apart"] == [0.0]
    np.testing.assert_allclose(logs["student_loss"][0], hard, rtol=1e-5)
    np.testing.assert_allclose(logs["soft_targets"][0], soft, rtol=1e-4)
    np.testing.assert_allclose(logs["loss"][0], 0.5 * hard + 0.5 * soft, rtol=1e-5)
    # And the mixing pipeline itself trains.
    assert np.isfinite(distiller.fit(data, epochs=2, verbose=0).history["loss"]).all()


def test_the_teacher_hears_what_the_student_sees():
    rng = np.random.default_rng(0)
    x = {
        "image": rng.uniform(size=(COUNT, SIZE, SIZE, 1)).astype("float32"),
        "sound": rng.normal(size=(COUNT, 20)).astype("float32"),
    }
    y = rng.integers(0, CLASSES, COUNT)
    sound = keras.Input((20,))
    teacher = keras.Model(sound, layers.Dense(CLASSES)(layers.Dense(9, "tanh")(sound)))
    student = _network(4, "student")
    z_t = teacher.predict(x["sound"], verbose=0)
    z_s = student.predict(x["image"], verbose=0)
    distiller = kd.Distiller(
        student,
        teacher,
        teacher_inputs=lambda batch: batch["sound"],
        student_inputs=lambda batch: batch["image"],
    )
    distiller.compile(keras.optimizers.SGD(0.1), crossentropy(), metrics=["accuracy"])
    logs = distiller.fit(x, y, validation_data=(x, y), verbose=0).history
    np.testing.assert_allclose(logs["student_loss"][0], hard_loss(z_s, y).mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["distillation_loss"][0], kl(z_t, z_s, 1).mean(), rtol=1e-5)
    assert distiller.predict(x, verbose=0).shape == (COUNT, CLASSES)
    assert "val_accuracy" in logs


def test_a_student_of_lower_resolution():
    x, y = _images()
    teacher, student = _network(8, "teacher"), _network(4, "student", size=SIZE // 2)
    small = x.reshape(COUNT, 4, 2, 4, 2, 1).mean((2, 4))
    z_t, z_s = teacher.predict(x, verbose=0), student.predict(small, verbose=0)
    distiller = kd.Distiller(
        student, teacher, student_inputs=lambda images: ops.average_pool(images, 2, 2)
    )
    distiller.compile(keras.optimizers.SGD(0.1), crossentropy())
    logs = distiller.fit(x, y, verbose=0).history
    np.testing.assert_allclose(logs["distillation_loss"][0], kl(z_t, z_s, 1).mean(), rtol=1e-4)
    np.testing.assert_allclose(logs["student_loss"][0], hard_loss(z_s, y).mean(), rtol=1e-5)
