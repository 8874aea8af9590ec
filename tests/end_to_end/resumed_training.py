"""Trainings that are run whole, killed at a step, or run again: `test_resume.py` starts them.

Every line on standard input is one training, a JSON list of the arguments of `train`. Each runs in
a fork of this process, which has done no more than import, and its exit code is printed.
"""

import json
import os
import signal
import sys
import traceback

import keras
import numpy as np
from keras import layers

import keras_kd as kd

EPOCHS = 3


def mlp(width, name):
    inputs = keras.Input((6,))
    x = layers.Dense(width, activation="relu", name="hidden")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.4)(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name=name)


class KillAt(keras.callbacks.Callback):
    """Kills the process where it stands, at this step counted from its start; 0 is never."""

    def __init__(self, last):
        super().__init__()
        self.steps, self.last = 0, last

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, result, data, frequency, kill_at):
    """Train a student.

    Takes the folder of the backup, the file of the final student, the kind of data, how often to
    back up, and the step at which the process kills itself.
    """
    keras.utils.set_random_seed(11)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(44, 6)).astype("float32")
    y = rng.integers(0, 4, 44)
    student, teacher = mlp(5, "student"), mlp(9, "teacher")
    shuffled = None
    if data == "cache":
        path = os.path.join(os.path.dirname(result), "cache")
        if not os.path.exists(os.path.join(path, "manifest.json")):
            kd.cache.write(teacher, x, path)
        teacher = kd.teachers.CachedTeacher(path)
        transfers = [kd.losses.SoftTargets()]
    else:
        transfers = [
            kd.losses.SoftTargets(),
            kd.Transfer(kd.losses.Hint(), teacher="hidden", student="hidden", projector="linear"),
        ]
    if data == "dataset":
        import tensorflow as tf

        shuffled = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(44, seed=5).batch(10)
    given = (shuffled,) if data == "dataset" else (x, y)

    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        distillation_loss=transfers,
        steps_per_execution=2 if data == "together" else 1,
    )
    history = distiller.fit(
        *given,
        batch_size=None if data == "dataset" else 10,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[
            kd.callbacks.ResumableBackup(folder, save_freq=frequency, data=shuffled),
            kd.callbacks.TemperatureAnnealing(start=4.0, end=1.0, steps=15),
            kd.callbacks.AlphaAnnealing(start=0.2, end=0.8, epochs=EPOCHS),
            KillAt(kill_at),
        ],
    ).history
    np.savez(
        result,
        *student.get_weights(),
        iterations=np.array(keras.ops.convert_to_numpy(distiller.optimizer.iterations)),
        **{f"last_{name}": values[-1:] for name, values in history.items()},
    )


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            train(*json.loads(line))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
