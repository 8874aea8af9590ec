"""Two replicas give the numbers of one; in a process of its own, whose devices are set first."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorflow as tf

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import numpy as np
import keras_kd as kd
from small_models import crossentropy, pair, rows

x, y = rows(12)
results = []
for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        student, teacher = pair(kernel_regularizer=keras.regularizers.L2(0.01))
        start = student.get_weights()
        distiller = kd.Distiller(student, teacher)
        hint = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
        distiller.compile(
            keras.optimizers.SGD(0.1),
            loss=crossentropy(),
            metrics=["accuracy"],
            distillation_loss=[kd.losses.SoftTargets(), hint],
            evaluate_distillation=True,
        )
    history = distiller.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    logs = distiller.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    predicted = distiller.predict(x, verbose=0)
    results.append(
        {
            "replicas": strategy.num_replicas_in_sync,
            "history": history,
            "logs": logs,
            "weights": [w.tolist() for w in student.get_weights()],
            "predicted": predicted.tolist(),
        }
    )
print(json.dumps(results))
"""


def test_two_replicas_train_and_report_like_one():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = json.loads(done.stdout.splitlines()[-1])
    assert (one["replicas"], two["replicas"]) == (1, 2)
    for part in ("history", "logs"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            values = value if isinstance(value, list) else [value]
            others = two[part][name] if isinstance(value, list) else [two[part][name]]
            for a, b in zip(values, others):
                assert abs(a - b) < 1e-4 * max(1.0, abs(a)), (part, name, a, b)
    for a, b in zip(flat(one["weights"]), flat(two["weights"])):
        assert abs(a - b) < 1e-4
    for a, b in zip(flat(one["predicted"]), flat(two["predicted"])):
        assert abs(a - b) < 1e-4


def flat(nested):
    if not isinstance(nested, list):
        return [nested]
    return [leaf for inner in nested for leaf in flat(inner)]
