"""A pair of ResNets on an accelerator: samples per second beside plain student training.

On a machine with a GPU and JAX for it (`pip install -U "jax[cuda12]"`):

    KERAS_BACKEND=jax python benchmarks/gpu.py
    KERAS_BACKEND=jax python benchmarks/gpu.py --precision float32 --batch 512 --repeats 9

On a processor, to see that it runs (small sizes; nothing is written):

    KERAS_BACKEND=jax python benchmarks/gpu.py --quick

The student is a ResNet-18, the teacher a ResNet-50, both for images of `--size`, computing in
`mixed_bfloat16`. The data are made once and lie in main memory; plain training, the distiller and
`keras.distillation` are fed alike. Where no GPU is found the result says so.
"""

import argparse
import os
import sys


def resnet(depths, width, bottleneck, classes, size, name):
    """A residual network with BatchNorm, its four stages as `stage0` ... `stage3`."""
    import keras
    from keras import layers

    def convolution(x, filters, kernel, stride=1):
        x = layers.Conv2D(filters, kernel, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    x = inputs = keras.Input((size, size, 3))
    x = layers.ReLU()(convolution(x, width, 7 if size > 64 else 3, 2 if size > 64 else 1))
    if size > 64:
        x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for stage, depth in enumerate(depths):
        filters = width * 2**stage
        out = filters * (4 if bottleneck else 1)
        for block in range(depth):
            stride = 2 if stage and not block else 1
            shortcut = x
            if stride > 1 or x.shape[-1] != out:
                shortcut = convolution(x, out, 1, stride)
            if bottleneck:
                y = layers.ReLU()(convolution(x, filters, 1))
                y = layers.ReLU()(convolution(y, filters, 3, stride))
                y = convolution(y, out, 1)
            else:
                y = layers.ReLU()(convolution(x, filters, 3, stride))
                y = convolution(y, out, 3)
            last = block == depth - 1
            y = layers.Add()([y, shortcut])
            x = layers.ReLU(name=f"stage{stage}" if last else None)(y)
    x = layers.GlobalAveragePooling2D()(x)
    # Logits in float32, as Keras advises for mixed precision.
    return keras.Model(inputs, layers.Dense(classes, dtype="float32", name="logits")(x), name=name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="mixed_bfloat16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    arguments = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras
    import numpy as np
    from side_by_side import begin, discard, fitting, medians, ours, plain, ratio, save, theirs

    import keras_kd as kd

    if keras.config.backend() != "jax":
        sys.exit("This benchmark is about JAX: run it with KERAS_BACKEND=jax.")
    import jax

    started = begin()
    device = jax.devices()[0]
    depths, width, deep, bottleneck = (2, 2, 2, 2), 64, (3, 4, 6, 3), True
    size, batch, steps, repeats = (
        arguments.size, arguments.batch, arguments.steps, arguments.repeats
    )  # fmt: skip
    if arguments.quick:
        depths, width, deep, bottleneck = (1, 1), 4, (1, 1), False
        size, batch, steps, repeats = 16, 8, 2, 2
    keras.config.set_dtype_policy(arguments.precision)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * steps, size, size, 3)).astype("float32")
    y = rng.integers(0, arguments.classes, len(x))
    shape = (arguments.classes, size)

    def student():
        return resnet(depths, width, False, *shape, "student")

    teacher = resnet(deep, width, bottleneck, *shape, "teacher")
    from keras.distillation import FeatureDistillation

    # Of one form: the peer has no projectors.
    twin = resnet(depths, width, False, *shape, "twin")
    stages = ["stage0", "stage1"]
    mse = [
        FeatureDistillation(loss="mse", teacher_layer_name=s, student_layer_name=s) for s in stages
    ]
    hints = [kd.Transfer(kd.losses.Hint(), s, s, name=f"hint_{s}") for s in stages]
    contenders = {
        "student step": fitting(plain(student()), x, y, batch),
        "teacher forward": lambda: discard(teacher.predict(x, batch_size=batch, verbose=0)),
        "distillation step": fitting(ours(student(), teacher), x, y, batch),
        "distillation step, keras.distillation": fitting(theirs(student(), teacher), x, y, batch),
        "two features": fitting(ours(student(), twin, hints), x, y, batch),
        "two features, keras.distillation": fitting(theirs(student(), twin, mse), x, y, batch),
    }
    seconds = medians(contenders, repeats)
    floor = seconds["student step"] + seconds["teacher forward"]
    step, peer = seconds["distillation step"], seconds["distillation step, keras.distillation"]
    save(
        "gpu",
        started,
        ratios={
            "logits step / (student step + teacher forward)": ratio(step / floor, 1.05),
            "logits step / keras.distillation": ratio(step / peer, 1.0),
            "two feature transfers / keras.distillation": ratio(
                seconds["two features"] / seconds["two features, keras.distillation"], 0.75
            ),
        },
        tables=[
            {
                "columns": [f"{arguments.precision}, batch {batch}", "samples/s", "ms a step"],
                "rows": [
                    [name, batch * steps / value, 1000 * value / steps]
                    for name, value in seconds.items()
                ],
            }
        ],
        notes=[
            f"On {device.device_kind} ({device.platform})"
            + ("" if device.platform == "gpu" else ": no GPU was found")
            + f"; images of {size} by {size}, {arguments.classes} classes."
        ],
        quick=arguments.quick,
        backend="jax",
    )


if __name__ == "__main__":
    main()
