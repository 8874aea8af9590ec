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
# # Microcontrollers: int8 from the training on, and where the file runs
#
# A microcontroller computes in 8-bit integers, and has a few hundred kilobytes. Here a student of
# separable convolutions is distilled, trained on with the rounding errors of its own int8 file
# (quantization-aware, still under the teacher), exported for one image at a time, and looked up in
# the table of devices.
#
# Needed: `pip install "keras_kd[all]"`. The full run takes about a minute of processor time.

# %%
import os
import tempfile
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_kd as kd

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Data
#
# If the environment variable `KERAS_KD_DATA` names a folder with `fashion_mnist.npz`, 6,000 images
# of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) are used (28 x 28 pixels,
# MIT license). Without it they are scikit-learn's handwritten digits. The outputs that were kept
# with this notebook are of the clothes.

# %%
public = os.environ.get("KERAS_KD_DATA")
data = kd.datasets.load(str(Path(public) / "fashion_mnist.npz") if public else "digits")
rows, epochs, more_epochs = (6000, 8, 3) if public else (600, 4, 2)
x, y = data.x_train[:rows], data.y_train[:rows]
held = data.x_validation[:2000], data.y_validation[:2000]
hard_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

# %% [markdown]
# ## Teacher and student
#
# A separable convolution is a small one for each channel and a product between channels: the form
# that fits a microcontroller. The student reads the image in steps of two, so that no layer has to
# hold a large map in memory.


# %%
def teacher_model():
    z = inputs = keras.Input(data.input_shape, name="image")
    for i, width in enumerate((24, 48)):
        z = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(z)
        z = keras.layers.BatchNormalization(momentum=0.9, name=f"norm{i}")(z)
        z = keras.layers.ReLU(name=f"relu{i}")(z)
        z = keras.layers.MaxPooling2D(name=f"pool{i}")(z)
    z = keras.layers.Dense(64, activation="relu", name="dense")(keras.layers.Flatten()(z))
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(z), name="teacher")


def student_model():
    z = inputs = keras.Input(data.input_shape, name="image")
    z = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="conv")(z)
    z = keras.layers.BatchNormalization(momentum=0.9, name="norm")(z)
    z = keras.layers.ReLU(name="relu")(z)
    for i, width in enumerate((16, 32)):
        z = keras.layers.SeparableConv2D(
            width, 3, strides=1 + i, padding="same", use_bias=False, name=f"separable{i}"
        )(z)
        z = keras.layers.BatchNormalization(momentum=0.9, name=f"norm{i}")(z)
        z = keras.layers.ReLU(name=f"relu{i}")(z)
    z = keras.layers.GlobalAveragePooling2D(name="features")(z)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(z), name="student")


def right(model):
    """Share of 5,000 test images, of a Keras model or of a file."""
    return np.mean(np.argmax(model(data.x_test[:5000]), axis=1) == data.y_test[:5000])


keras.utils.set_random_seed(0)
teacher = teacher_model()
teacher.compile(keras.optimizers.Adam(2e-3), hard_loss)
teacher.fit(x, y, batch_size=64, epochs=8, verbose=0)
print(f"teacher: {teacher.count_params():,} parameters, {right(teacher):.1%} of the test images")

# %% [markdown]
# ## Plain and distilled
#
# The same first weights (seed 1) and the same number of steps. `DIST` compares how student and
# teacher order the classes, which asks less of a small student than the teacher's very numbers.
# `teacher_answers="memory"` asks the teacher once for each image and keeps what it said.


# %%
def trained(model, teacher, epochs, rate):
    steps = epochs * -(-len(x) // 64)
    distiller = kd.Distiller(model, teacher, teacher_answers="memory" if teacher else "auto")
    taught = {"distillation_loss": kd.losses.DIST(), "distillation_loss_weight": 2.0}
    distiller.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        hard_loss,
        **({"student_loss_weight": 1.0, **taught} if teacher else {}),
    )
    callbacks = []
    if kd.compress.is_quantize_aware(model):
        callbacks = [kd.compress.FreezeObservers(epoch=-1)]
    distiller.fit(x, y, batch_size=64, epochs=epochs, verbose=0, callbacks=callbacks)
    return model


students = {}
for name, teaches in (("plain", None), ("distilled", teacher)):
    keras.utils.set_random_seed(1)
    students[name] = trained(student_model(), teaches, epochs, 5e-3)
    print(f"{name:10s} {students[name].count_params():,} parameters, {right(students[name]):.1%}")

# %% [markdown]
# ## Train on with the rounding
#
# `quantize_aware` copies the model with weights and activations rounded as the int8 file rounds
# them; what it learns now it learns in spite of that. `FreezeObservers` holds the ranges still in
# the last epoch. Both students train on, one with the teacher and one without.

# %%
for name, teaches in (("plain", None), ("distilled", teacher)):
    aware = kd.compress.quantize_aware(students[name], calibration=x[:256])
    keras.utils.set_random_seed(2)
    students[f"{name}, aware"] = trained(aware, teaches, more_epochs, 1e-3)
print(kd.compress.summary(students["distilled, aware"]))

# %% [markdown]
# ## Export for one image at a time
#
# `targets` names where the file has to run: the best file is chosen among those that run there. A
# microcontroller has no batches, so `batch=1`. From a quantization-aware model the trained ranges
# go into the file; the others are calibrated on 300 images afterwards.

# %%
reports = {}
for name, model in students.items():
    reports[name] = kd.export(
        model,
        folder / name.replace(", ", "_"),
        formats=("tflite",),
        precisions=("int8",) if name != "distilled, aware" else ("float32", "int8"),
        calibration=x[:300],
        evaluation=held,
        labels=data.class_names,
        targets=["tflite-micro", "ethos-u55"],
        batch=1,
        max_drop=0.02,
    )
teacher_report = kd.export(
    teacher,
    folder / "teacher",
    formats=("tflite",),
    precisions=("float32",),
    evaluation=held,
    max_drop=0.02,
)
print(reports["distilled, aware"].table())

# %% [markdown]
# ## The files side by side
#
# Each int8 file runs on the test images.

# %%
large = teacher_report.best
figures = {"teacher, float32": (right(kd.export.load(large.path)), large.bytes)}
for name, report in reports.items():
    file = next(artifact for artifact in report.artifacts if artifact.precision == "int8")
    figures[f"{name}, int8"] = (right(kd.export.load(file.path)), file.bytes)
for name, (share, size) in figures.items():
    print(f"{name:22s} {share:6.2%} of the test images  {size:9,} bytes")

figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
for name, (share, size) in figures.items():
    axes.scatter(size / 1000, 100 * share)
    axes.annotate(name, (size / 1000, 100 * share), xytext=(6, -3), textcoords="offset points")
axes.set(xscale="log", xlabel="kilobytes", ylabel="% of the test images")
axes.set_xlim(5, 5000)
plt.show()

# %% [markdown]
# ## Where it runs
#
# The answers follow from what is in the file: operators, their versions, types and shapes. `yes`
# is what one wants to read; `no` says why.

# %%
print(reports["distilled, aware"].runtimes())

# %% [markdown]
# ## Onto the device
#
# `verify` runs the files of a folder again and compares hashes. TensorFlow Lite for
# Microcontrollers takes the file as an array of C that is compiled into the program. Beside it the
# device needs memory for what two layers hand over at a time: at least as many bytes as the
# largest input and output of one layer together. (Normalization and ReLU are part of the
# convolution before them in the file.)

# %%
chosen = reports["distilled, aware"]
print("verified again:", kd.export.verify(folder / "distilled_aware").ok)
file = next(artifact for artifact in chosen.artifacts if artifact.precision == "int8")
content = file.path.read_bytes()
lines = [
    ", ".join(f"0x{byte:02x}" for byte in content[i : i + 12]) for i in range(0, len(content), 12)
]
header = "alignas(16) const unsigned char model[] = {\n  " + ",\n  ".join(lines) + "};\n"
(folder / "model.h").write_text(header)
print(header[:160], "...")

fused = (keras.layers.BatchNormalization, keras.layers.ReLU, keras.layers.InputLayer)
largest = max(
    sum(int(np.prod(tensor.shape[1:])) for tensor in (layer.input, layer.output))
    for layer in student_model().layers
    if not isinstance(layer, fused)
)
print(f"model: {len(content):,} bytes, memory for layers: {largest:,} bytes at least")

# %% [markdown]
# ## What did not help
#
# Measured above, on the clothes, with one seed and 5,000 test images, of which a share is known to
# a point:
#
# - **Training with the rounding was not needed**: calibrated afterwards, the int8 files already
#   answer as their float models do, to a tenth of a point. What the aware students have more comes
#   with three more epochs, and helps the plain one most. It pays where rounding hurts: depthwise
#   layers of many channels, fewer bits, ranges that differ much.
# - **int8 did not make the file smaller** than float32: with 1,482 parameters names and structure
#   take most of the bytes. It is integers that the device wants, not a smaller file. The aware
#   file is even a kilobyte larger than the calibrated ones.
# - **The float file** runs on a microcontroller, slowly, and not at all on its NPU, as the table
#   says.
#
# The teacher itself did help: by two points after calibration, by one after three more epochs.
#
# ## Where to go next
#
# - `kd.search.for_device(teacher, data, max_bytes=...)` looks for the student that fits.
# - `kd.compress.prune(..., pattern="channels")` removes channels instead of zeroing weights.
