"""One worker of a `MultiWorkerMirroredStrategy`: `test_devices.py` starts two.

Arguments: the ports of the workers, the number of this one, and `plain` or `distilled`.
"""

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_kd as kd

ports, number, kind = sys.argv[1].split(","), int(sys.argv[2]), sys.argv[3]
os.environ["TF_CONFIG"] = json.dumps(
    {
        "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
        "task": {"type": "worker", "index": number},
    }
)

strategy = tf.distribute.MultiWorkerMirroredStrategy()


def mlp(width):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(width, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4)(x))


with strategy.scope():
    model = mlp(5) if kind == "plain" else kd.Distiller(mlp(5), mlp(9))
    model.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
x, y = np.ones((16, 6), "float32"), np.zeros(16, "int32")
history = model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(8), epochs=1, verbose=0)
print("trained", history.history["loss"])
