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
# # Migrating from keras.distillation and from TFMOT
#
# Side by side: the code that you have, the code that takes its place, and figures of both on the
# same model, data and steps. The first half is about `keras.distillation`, which comes with Keras;
# the second about TensorFlow Model Optimization (TFMOT), which does not take Keras 3 models.
#
# Needed: `pip install "keras_kd[all]"`. The full run takes about three minutes of processor time.

# %%
import os
import tempfile
from pathlib import Path

import keras
import numpy as np

import keras_kd as kd

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Data, teacher and student
#
# If the environment variable `KERAS_KD_DATA` names a folder with `fashion_mnist.npz`, 4,000 images
# of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) are used (MIT license).
# Without it they are scikit-learn's handwritten digits. The outputs that were kept with this
# notebook are of the clothes.

# %%
public = os.environ.get("KERAS_KD_DATA")
data = kd.datasets.load(str(Path(public) / "fashion_mnist.npz") if public else "digits")
rows, epochs, seeds = (4000, 8, 2) if public else (600, 3, 1)
x, y = data.x_train[:rows], data.y_train[:rows]
x_test, y_test = data.x_test[:5000], data.y_test[:5000]
held = data.x_validation[:1000], data.y_validation[:1000]
hard_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def convnet(name, *widths):
    z = inputs = keras.Input(data.input_shape, name="image")
    for i, width in enumerate(widths):
        z = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(z)
        z = keras.layers.BatchNormalization(momentum=0.9, name=f"norm{i}")(z)
        z = keras.layers.ReLU(name=f"relu{i}")(z)
        z = keras.layers.MaxPooling2D(name=f"pool{i}")(z)
    z = keras.layers.GlobalAveragePooling2D(name="features")(z)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(z), name=name)


def student_model(seed=1):
    keras.utils.set_random_seed(seed)
    return convnet("student", 8, 16)


def right(model):
    return np.mean(np.argmax(model(x_test), axis=1) == y_test)


keras.utils.set_random_seed(0)
teacher = convnet("teacher", 24, 48)
teacher.compile(keras.optimizers.Adam(3e-3), hard_loss)
teacher.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
print(f"teacher: {teacher.count_params():,} parameters, {right(teacher):.1%} of the test images")
print(f"student: {student_model().count_params():,} parameters")

# %% [markdown]
# ## From keras.distillation
#
# | `keras.distillation` | `keras_kd` |
# |---|---|
# | `Distiller(teacher, student, ...)` | `Distiller(student, teacher)`: what you get comes first |
# | `student_loss_weight=0.5`, in `Distiller` | `alpha=0.5`, in `compile` |
# | `LogitsDistillation(3.0, loss=KLDivergence())` | `kd.losses.SoftTargets(3.0)` |
# | `LogitsDistillation(loss="mse")` | `kd.losses.LogitMSE()` |
# | `FeatureDistillation(...)`, of equal shapes | `kd.Transfer(kd.losses.Hint(), ...)`, of any |
# | `distillation_loss_weights=[1.0, 0.5]` | `kd.Transfer(..., weight=0.5)` |
# | `total_loss` in the logs | `loss`, and `agreement` and each transfer too |
#
# Below, `theirs` and `ours` are the same training: the same weights at the beginning, the same
# order of the rows, the same formula `0.5 CE + 0.5 T**2 KL`. They end with the same weights, but
# for rounding, which Adam enlarges where a gradient is near zero.

# %%
from keras.distillation import Distiller as KerasDistiller
from keras.distillation import LogitsDistillation


def theirs(student, **loss):
    distiller = KerasDistiller(
        teacher,
        student,
        distillation_losses=LogitsDistillation(temperature=3.0, **loss),
        student_loss_weight=0.5,
    )
    distiller.compile(keras.optimizers.Adam(3e-3), loss=hard_loss)
    return distiller


def ours(student, **settings):
    distiller = kd.Distiller(student, teacher, teacher_answers="memory")
    distiller.compile(keras.optimizers.Adam(3e-3), loss=hard_loss, **settings)
    return distiller


def plain(student):
    student.compile(keras.optimizers.Adam(3e-3), loss=hard_loss)
    return student


def trained(make, seed=1, epochs=epochs, **settings):
    student = student_model(seed)
    trainer = make(student, **settings)
    keras.utils.set_random_seed(seed)
    trainer.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    return student


soft = kd.losses.SoftTargets(temperature=3.0)
dist = {
    "distillation_loss": kd.losses.DIST(),
    "student_loss_weight": 1.0,
    "distillation_loss_weight": 2.0,
}
one = trained(theirs, epochs=1, loss=keras.losses.KLDivergence())
other = trained(ours, epochs=1, distillation_loss=soft, alpha=0.5)
apart = max(np.abs(a - b).max() for a, b in zip(one.get_weights(), other.get_weights()))
print(f"after an epoch the weights differ by {apart:.1e} at most")

# %% [markdown]
# What differs is the default. `LogitsDistillation()` takes `loss="kl_divergence"`, and only an
# instance of `keras.losses.KLDivergence` gets a softmax before it: with the name, the formula of
# the divergence is applied to the logits as they are, clipped to between 1e-7 and 1, which is no
# divergence of two distributions.

# %%
ways = {
    "plain": (plain, {}),
    'keras.distillation, its default loss="kl_divergence"': (theirs, {}),
    "keras.distillation, KLDivergence() instance": (theirs, {"loss": keras.losses.KLDivergence()}),
    "keras_kd, the same formula": (ours, {"distillation_loss": soft, "alpha": 0.5}),
    "keras_kd, its defaults": (ours, {}),
    "keras_kd, DIST": (ours, dist),
}
students = {}
for name, (make, settings) in ways.items():
    students[name] = [trained(make, seed, **settings) for seed in range(1, 1 + seeds)]
    shares = [100 * right(student) for student in students[name]]
    spread = f" ± {np.std(shares, ddof=1):.2f}" if seeds > 1 else ""
    print(f"{name:54s} {np.mean(shares):.2f}{spread} % of the test images")

# %% [markdown]
# A checkpoint of `keras.distillation` holds the teacher; one of `keras_kd` holds the student, the
# optimizer and a fingerprint, and goes on with the teacher that you pass to `kd.load_distiller`.

# %%
for name, distiller in (
    ("keras.distillation", theirs(student_model(), loss=keras.losses.KLDivergence())),
    ("keras_kd", ours(student_model(), distillation_loss=soft)),
):
    distiller.fit(x[:64], y[:64], verbose=0)
    distiller.save(folder / "checkpoint.keras")
    size = (folder / "checkpoint.keras").stat().st_size
    print(f"checkpoint of {name:20s} {size / 1000:6.0f} KB")
again = kd.load_distiller(folder / "checkpoint.keras", teacher=teacher)
print("goes on at step", int(again.optimizer.iterations))

# %% [markdown]
# ## From TFMOT
#
# `import tensorflow_model_optimization` sets `TF_USE_LEGACY_KERAS`, after which `tf.keras` is
# another Keras for the whole process, and its functions raise on models of Keras 3. So its code
# does not run beside this one; here it stands as text.
#
# | TFMOT | `kd.compress`, `kd` |
# |---|---|
# | `quantize_model(model)` | `quantize_aware(model, calibration=x[:256])` |
# | `TFLiteConverter`, int8 set by hand | `kd.export(model, folder, precisions=("int8",))` |
# | `quantize_annotate_layer`, `QuantizeConfig` | `annotations={"layer": Annotation(...)}` |
# | `prune_low_magnitude(model, schedule)` | `prune(model, schedule=...)`, TFMOT's own too |
# | callback `UpdatePruningStep()` | none: the layer counts its steps |
# | `strip_pruning(model)` | `finalize(model)` |
# | `cluster_weights(model, 16, ...)` | `cluster(model, clusters=16)` |
# | a teacher beside it: a loop of your own | `kd.Distiller(quantize_aware(student), teacher)` |
#
# `kd.compress.tfmot.quantize` runs TFMOT's training in a process of its own, for models whose
# layers both know. The plain student trains on with the labels in both; then ours also under the
# teacher.

# %%
more = max(1, epochs // 4)
start = students["plain"][0]
opinion = kd.compress.tfmot.quantize(
    start, x, y, epochs=more, batch_size=64, learning_rate=3e-4, seed=1
)
(folder / "tfmot_int8.tflite").write_bytes(opinion.tflite)


def aware(student, teacher, **settings):
    model = kd.compress.quantize_aware(student, calibration=x[:256])
    distiller = kd.Distiller(model, teacher, teacher_answers="memory" if teacher else "auto")
    distiller.compile(keras.optimizers.Adam(3e-4), loss=hard_loss, **settings)
    keras.utils.set_random_seed(1)
    distiller.fit(x, y, batch_size=64, epochs=more, verbose=0)
    return model


models = {
    "plain student, calibrated": start,
    "plain student, quantization-aware": aware(start, None),
    "distilled, quantization-aware": aware(students["keras_kd, DIST"][0], teacher, **dist),
}
reports = {
    name: kd.export(
        model,
        folder / name.replace(" ", "_"),
        formats=("tflite",),
        precisions=("int8",),
        calibration=x[:300],
        evaluation=held,
        max_drop=0.02,
    )
    for name, model in models.items()
}
files = {"TFMOT, quantization-aware": folder / "tfmot_int8.tflite"}
files |= {name: report.artifacts[0].path for name, report in reports.items()}
for name, path in files.items():
    answers = kd.export.load(path)(x_test)
    share = np.mean(answers.argmax(axis=1) == y_test)
    print(f"{name:34s} {share:.2%} of the test images  {path.stat().st_size:,} bytes")
print(reports["distilled, quantization-aware"].table())
print("verified again:", all(kd.export.verify(report.folder).ok for report in reports.values()))

# %% [markdown]
# ## Pruning with the schedule that you have
#
# A schedule of TFMOT is taken as it is, loaded from its file alone; the mask lives in the layer,
# so that no callback has to be remembered. Without its zeros (`sparse=True`) the file is smaller.

# %%
steps = more * -(-len(x) // 64)
schedule = kd.compress.tfmot.pruning_schedule().PolynomialDecay(
    0.0, 0.5, begin_step=0, end_step=steps // 2, frequency=max(1, steps // 20)
)
pruned = kd.compress.prune(students["keras_kd, DIST"][0], schedule=schedule)
distiller = ours(pruned, **dist)
distiller.fit(x, y, batch_size=64, epochs=more, verbose=0)
pruned = kd.compress.finalize(pruned)
kernels = [layer.kernel.numpy() for layer in pruned.layers if hasattr(layer, "kernel")]
zeros = sum((kernel == 0).sum() for kernel in kernels) / sum(kernel.size for kernel in kernels)
print(f"{zeros:.0%} of the kernels are zeros, {right(pruned):.2%} of the test images")
for sparse in (False, True):
    report = kd.export(
        pruned,
        folder / f"pruned_{sparse}",
        formats=("tflite",),
        precisions=("float32",),
        evaluation=held,
        sparse=sparse,
    )
    print(f"sparse={sparse}: {report.best.bytes:,} bytes")

# %% [markdown]
# ## What did not help, and what these figures do not say
#
# Measured above, on 4,000 clothes in 8 epochs at one rate, with two seeds:
#
# - **The same formula is the same training**: the two rows of it agree to 0.02 points, and the
#   weights to rounding. Moving costs nothing in accuracy.
# - **Which loss is best is not to be read here**: the seeds differ by up to 8 points, more than
#   the methods do. [docs/methods.md](../docs/methods.md) compares them with longer trainings and
#   three seeds, `keras.distillation` and its default among them.
# - **Quantization-aware training under the teacher** was no better than with the labels alone: it
#   began with a student that was worse by chance, and had two epochs. TFMOT's and ours, with the
#   same labels and steps, are level.
# - **Half of the weights as zeros** took 15 % off the float file, since each weight that stays
#   brings an index. A student this small has little to prune.
#
# ## Where to go next
#
# - The table of losses in [docs/methods.md](../docs/methods.md), and of layers in
#   [docs/compress.md](../docs/compress.md).
# - `kd.compress.tfmot.from_tf_keras(path)` reads a model that tf_keras saved.
