"""One JAX process of several that train together: `test_devices.py` starts them.

Arguments: the file of the results, the folder of the backup, the address of the first process (or
`-` for a single one), the number of processes, the number of this one, and `data` or `model`.
"""

import os
import sys

import jax
import keras
import numpy as np

import keras_kd as kd
from keras_kd.backends import jax as backend_jax

result, folder, address, count, number, kind = sys.argv[1:]
if address != "-":
    keras.distribution.initialize(address, int(count), int(number))

devices = keras.distribution.list_devices("cpu")
if address != "-":
    if kind == "data":
        distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    else:
        mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
        layout = keras.distribution.LayoutMap(mesh)
        layout[".*hidden.*kernel"] = (None, "model")
        layout[".*hidden.*bias"] = ("model",)
        distribution = keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
        )
    keras.distribution.set_distribution(distribution)


def mlp(width, name):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(width, activation="tanh", name=f"{name}_hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(x), name=name)


keras.utils.set_random_seed(3)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 6)).astype("float32"), rng.integers(0, 4, 32)
student, teacher = mlp(4, "student"), mlp(8, "teacher")
for model in (student, teacher):
    model.set_weights([rng.normal(size=w.shape).astype("float32") for w in model.weights])
distiller = kd.Distiller(student, teacher)
distiller.compile(
    keras.optimizers.Adam(0.01),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    distillation_loss=[
        kd.losses.SoftTargets(),
        kd.Transfer(kd.losses.PKT(), teacher="teacher_hidden", student="student_hidden"),
    ],
)
backup = kd.callbacks.ResumableBackup(folder, save_freq=1)
written = []


class Look(keras.callbacks.Callback):
    """What this process would have written."""

    def on_train_batch_end(self, batch, logs=None):
        written.append(os.path.exists(os.path.join(folder, "state.npz")))


# With data parallelism a process feeds its own rows of every batch of 8.
parts, part = (int(count), int(number)) if kind == "data" else (1, 0)
mine = np.arange(32).reshape(4, parts, 8 // parts)[:, part].ravel()
history = distiller.fit(
    x[mine],
    y[mine],
    batch_size=8 // parts,
    epochs=2,
    shuffle=False,
    verbose=0,
    callbacks=[backup, Look()],
).history
weights = [backend_jax.whole(v.value) for v in student.variables]
sharded = sum(not v.value.is_fully_replicated for v in teacher.variables)
np.savez(
    result,
    *weights,
    written=np.array(written),
    sharded=np.array(sharded),
    processes=np.array(jax.process_count()),
    **{f"log_{name}": np.array(values) for name, values in history.items()},
)
