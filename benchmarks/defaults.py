"""Which `alpha` and `temperature` should be the defaults: a small grid, several seeds.

    python benchmarks/defaults.py
    python benchmarks/defaults.py --data ../shared/data/fashion_mnist.npz --rows 12000

Every cell trains the same students from the same initial weights, on the same
batches, for the same number of steps; only the two values differ, and they are
assigned to the live variables of one compiled distiller, so nothing is traced
again. Prints test accuracy in percent, mean and standard deviation over seeds,
and writes the table to `benchmarks/results/`.
"""

import argparse
import json
import pathlib
import time

import keras
import numpy as np

import keras_kd as kd

TEMPERATURES = (1.0, 2.0, 4.0)
ALPHAS = (0.1, 0.5, 0.9)


def convnet(shape, classes, widths, name):
    x = inputs = keras.Input(shape)
    for width in widths:
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes)(x), name=name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--rows", type=int, help="training rows to use")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    started = time.time()
    data = kd.datasets.load(arguments.data)
    rows = arguments.rows or len(data.x_train)
    x, y = data.x_train[:rows], data.y_train[:rows]
    shape, classes = x.shape[1:], data.num_classes
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    keras.utils.set_random_seed(0)
    teacher = convnet(shape, classes, (32, 64), "teacher")
    teacher.compile(keras.optimizers.Adam(2e-3), loss=loss, metrics=["accuracy"])
    teacher.fit(x, y, batch_size=64, epochs=arguments.epochs, verbose=0)
    accuracy = teacher.evaluate(data.x_test, data.y_test, verbose=0)[1]

    steps = arguments.epochs * -(-rows // 64)
    table = {}
    for widths in ((4, 8), (8, 16)):
        student = convnet(shape, classes, widths, f"student_{widths[0]}")
        schedule = keras.optimizers.schedules.CosineDecay(5e-3, steps)
        distiller = kd.Distiller(student, teacher)
        distiller.compile(keras.optimizers.Adam(schedule), loss=loss, metrics=["accuracy"])
        distiller.train_on_batch(x[:64], y[:64])
        cells = [(1.0, 1.0)] + [(a, t) for t in TEMPERATURES for a in ALPHAS]
        results = {cell: [] for cell in cells}
        for seed in range(arguments.seeds):
            keras.utils.set_random_seed(seed)
            fresh = convnet(shape, classes, widths, "fresh").get_weights()
            for alpha, temperature in cells:
                student.set_weights(fresh)
                for variable in distiller.optimizer.variables:
                    variable.assign(keras.ops.zeros_like(variable))
                distiller.alpha.assign(alpha)
                distiller.temperature.assign(temperature)
                keras.utils.set_random_seed(seed)
                distiller.fit(x, y, batch_size=64, epochs=arguments.epochs, verbose=0)
                found = distiller.evaluate(data.x_test, data.y_test, verbose=0, return_dict=True)
                results[alpha, temperature].append(100 * found["accuracy"])
        print(
            f"\n{data.name}: student of {student.count_params():,} parameters, {steps} steps, "
            f"teacher {100 * accuracy:.2f} %"
        )
        rows_out = []
        for (alpha, temperature), values in results.items():
            label = "plain" if alpha == 1.0 else f"alpha {alpha}, T {temperature:g}"
            rows_out.append(
                {
                    "cell": label,
                    "mean": float(np.mean(values)),
                    "std": float(np.std(values, ddof=1)),
                    "values": values,
                }
            )
            print(
                f"  {label:18s} {np.mean(values):6.2f} ± {np.std(values, ddof=1):.2f}", flush=True
            )
        table[student.count_params()] = rows_out
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = f"defaults_{pathlib.Path(data.name).stem}.json"
    (folder / name).write_text(
        json.dumps(
            {
                "data": data.name,
                "rows": rows,
                "epochs": arguments.epochs,
                "seeds": arguments.seeds,
                "teacher_accuracy": accuracy,
                "seconds": round(time.time() - started, 1),
                "keras": keras.__version__,
                "backend": keras.config.backend(),
                "students": table,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"\n{time.time() - started:.0f} s; written to benchmarks/results/{name}")


if __name__ == "__main__":
    main()
