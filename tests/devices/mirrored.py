"""One training on one device and on two mirrored ones: `test_devices.py` starts it.

Arguments: the file of the results.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

import keras_kd as kd

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def mlp(width, name):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(width, activation="tanh", name="hidden")(inputs)
    outputs = keras.layers.Dense(4, name="logits", kernel_regularizer="l2")(x)
    return keras.Model(inputs, outputs, name=name)


def train(strategy):
    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(0)
    # 22 rows in batches of 8: the last one is smaller.
    x, y = rng.normal(size=(22, 6)).astype("float32"), rng.integers(0, 4, 22)
    weights = rng.uniform(0.5, 1.5, 22).astype("float32")
    with strategy.scope():
        student, teacher = mlp(5, "student"), mlp(9, "teacher")
        for model in (student, teacher):
            model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
        projector = keras.layers.Dense(9, kernel_initializer=keras.initializers.GlorotUniform(1))
        hint = kd.Transfer(
            kd.losses.Hint(), teacher="hidden", student="hidden", projector=projector, weight=0.5
        )
        distiller = kd.Distiller(student, teacher)
        distiller.compile(
            keras.optimizers.Adam(0.01),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            distillation_loss=[kd.losses.SoftTargets(), hint],
            evaluate_distillation=True,
        )
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(8)
    history = distiller.fit(
        dataset,
        epochs=3,
        verbose=0,
        validation_data=dataset,
        callbacks=[kd.callbacks.TemperatureAnnealing(start=4.0, end=1.0, steps=9)],
    ).history
    results = {f"log_{name}": np.array(values) for name, values in history.items()}
    for i, weight in enumerate((*student.get_weights(), *hint.projection.get_weights())):
        results[f"weight_{i}"] = weight
    return results, strategy.num_replicas_in_sync


one, alone = train(tf.distribute.get_strategy())
two, replicas = train(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
assert (alone, replicas) == (1, 2)
np.savez(
    sys.argv[1],
    **{f"one_{name}": value for name, value in one.items()},
    **{f"two_{name}": value for name, value in two.items()},
)
