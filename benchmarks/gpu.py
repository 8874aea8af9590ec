"""A pair of ResNets on an accelerator: samples per second beside plain student training.

On a machine with a GPU, and JAX and PyTorch for it (`pip install -U "jax[cuda13]" torch`):

    KERAS_BACKEND=jax python benchmarks/gpu.py
    KERAS_BACKEND=jax python benchmarks/gpu.py --precision float32 --batch 128 --repeats 9

On a processor, to see that it runs (small sizes; nothing is written):

    KERAS_BACKEND=jax python benchmarks/gpu.py --quick

The student is a ResNet-18, the teacher a ResNet-50, both for images of `--size`, computing in
`mixed_bfloat16`. The batches lie in the memory of the device, on every side, so that what is
compared is computing and not how images reach the device. The same job as a plain PyTorch loop
(channels last, `torch.autocast` in bfloat16, teacher under `no_grad`) runs in a process of its own
and takes turns. Where no GPU is found the result says so. With
`JAX_COMPILATION_CACHE_DIR` set XLA compiles the steps once for many runs.
"""

import argparse
import json
import os
import sys
import time


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


def torch_resnet(depths, width, bottleneck, classes, size):
    """The same network in PyTorch, channels last."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before, filters, stride):
            super().__init__()
            out = filters * (4 if bottleneck else 1)
            # Kernel, filters and stride of each convolution.
            plan = [(1, filters, 1), (3, filters, stride), (1, out, 1)]
            plan = plan if bottleneck else [(3, filters, stride), (3, out, 1)]
            body, channels = [], before
            for kernel, filters, by in plan:
                body += [*convolution(channels, filters, kernel, by), nn.ReLU()]
                channels = filters
            self.body = nn.Sequential(*body[:-1])
            self.shortcut = nn.Sequential()
            if stride > 1 or before != out:
                self.shortcut = nn.Sequential(*convolution(before, out, 1, stride))

        def forward(self, x):
            return torch.relu(self.body(x) + self.shortcut(x))

    def convolution(before, filters, kernel, stride=1):
        made = nn.Conv2d(before, filters, kernel, stride, kernel // 2, bias=False)
        return made, nn.BatchNorm2d(filters)

    large = size > 64
    parts = [*convolution(3, width, 7 if large else 3, 2 if large else 1), nn.ReLU()]
    parts += [nn.MaxPool2d(3, 2, 1)] if large else []
    before = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            parts.append(Block(before, width * 2**stage, 2 if stage and not block else 1))
            before = width * 2**stage * (4 if bottleneck else 1)
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)]
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)


def child(student, teacher, classes, size, batch, steps, autocast):
    """The same job as a PyTorch loop; `student` and `teacher` are depths, width and bottleneck."""
    import torch
    from torch_loop import serve

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    batches = [
        (
            torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last),
            torch.randint(0, classes, (batch,), device=device),
        )
        for _ in range(steps)
    ]
    serve(
        lambda: torch_resnet(*student, classes, size),
        {"live": torch_resnet(*teacher, classes, size).to(device).eval()},
        batches,
        autocast,
    )


def resident(batches):
    """Batches that lie on the device, as a dataset of Keras."""
    import keras

    class Resident(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    return Resident()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="mixed_bfloat16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*json.loads(arguments.child))
        return
    os.environ.setdefault("KERAS_BACKEND", "jax")
    # The loop in PyTorch needs room beside it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    import keras
    from keras.distillation import FeatureDistillation
    from side_by_side import begin, discard, medians, ours, plain, ratio, save, theirs
    from torch_loop import Loop

    import keras_kd as kd

    if keras.config.backend() != "jax":
        sys.exit("This benchmark is about JAX: run it with KERAS_BACKEND=jax.")
    import jax

    started = begin()
    device = jax.devices()[0]
    small, large = ((2, 2, 2, 2), 64, False), ((3, 4, 6, 3), 64, True)
    size, batch, steps, repeats = (
        arguments.size, arguments.batch, arguments.steps, arguments.repeats
    )  # fmt: skip
    if arguments.quick:
        small, large = ((1, 1), 4, False), ((1, 1), 4, True)
        size, batch, steps, repeats = 16, 8, 2, 2
    keras.config.set_dtype_policy(arguments.precision)
    keras.utils.set_random_seed(0)
    shape = (arguments.classes, size)
    batches = [
        (
            jax.random.normal(jax.random.key(i), (batch, size, size, 3)),
            jax.random.randint(jax.random.key(-i), (batch,), 0, arguments.classes),
        )
        for i in range(steps)
    ]
    labeled, images = resident(batches), resident([(x,) for x, _ in batches])

    def student(name="student"):
        return resnet(*small, *shape, name)

    def fitting(model):
        return lambda: discard(model.fit(labeled, shuffle=False, verbose=0))

    def told(name, run):
        """The contender, which says how long its first turn took: XLA compiles in it."""
        at = time.perf_counter()
        run()
        print(f"{name}: first turn {time.perf_counter() - at:.1f} s", file=sys.stderr, flush=True)
        return run

    teacher = resnet(*large, *shape, "teacher")
    # Of one form: the peer has no projectors.
    twin, stages = student("twin"), ["stage0", "stage1"]
    mse = [
        FeatureDistillation(loss="mse", teacher_layer_name=s, student_layer_name=s) for s in stages
    ]
    hints = [kd.Transfer(kd.losses.Hint(), s, s, name=f"hint_{s}") for s in stages]
    autocast = arguments.precision == "mixed_bfloat16"
    loop = Loop(small, large, *shape, batch, steps, autocast, script=__file__)
    contenders = {
        "student step": fitting(plain(student())),
        "teacher forward": lambda: discard(teacher.predict(images, verbose=0)),
        "distillation step": fitting(ours(student(), teacher)),
        "distillation step, keras.distillation": fitting(theirs(student(), teacher)),
        "second student forward": lambda: discard(twin.predict(images, verbose=0)),
        "two features": fitting(ours(student(), twin, hints)),
        "two features, keras.distillation": fitting(theirs(student(), twin, mse)),
        "student step, PyTorch": loop("alone"),
        "teacher forward, PyTorch": loop("teacher"),
        "distillation step, PyTorch": loop("live"),
    }
    seconds = medians({name: told(name, run) for name, run in contenders.items()}, repeats)
    loop.close()
    step = seconds["distillation step"]
    alone, features = seconds["student step"], seconds["two features"]
    save(
        "gpu",
        started,
        ratios={
            "logits step / (student step + teacher forward)": ratio(
                step / (alone + seconds["teacher forward"]), 1.05
            ),
            "logits step / keras.distillation": ratio(
                step / seconds["distillation step, keras.distillation"], 1.0
            ),
            "logits step / PyTorch loop": ratio(step / seconds["distillation step, PyTorch"]),
            "two feature transfers / (student step + teacher forward)": ratio(
                features / (alone + seconds["second student forward"])
            ),
            "two feature transfers / keras.distillation": ratio(
                features / seconds["two features, keras.distillation"], 0.75
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
            + f"; images of {size} by {size}, {arguments.classes} classes, in its memory.",
        ],
        quick=arguments.quick,
        backend="jax",
    )


if __name__ == "__main__":
    main()
