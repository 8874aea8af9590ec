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
# # Robust: students that stand up to attacks and bad images
#
# A change of the pixels that nobody sees can turn what a model says. Here a robust teacher passes
# on to a small student what it says about attacked images (RSLAD), next to the same student
# trained plainly, and trained on attacked images without a teacher. Then all of them, and the int8
# file, are attacked, corrupted, and asked how sure they are.
#
# Needed: `pip install "keras_kd[all]"`. The full run takes a minute and a half of processor
# time.

# %%
import os
import tempfile
import warnings
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_kd as kd

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Data
#
# If the environment variable `KERAS_KD_DATA` names a folder with `fashion_mnist.npz`, 2,000 images
# of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) are used (MIT license).
# Without it they are scikit-learn's handwritten digits. The outputs that were kept with this
# notebook are of the clothes. Values lie in [0, 1]: a threat is in units of the data, and
# normalization belongs into the model.

# %%
public = os.environ.get("KERAS_KD_DATA")
data = kd.datasets.load(str(Path(public) / "fashion_mnist.npz") if public else "digits")
rows, epochs, tested = (2000, 8, 200) if public else (600, 8, 60)
x, y = data.x_train[:rows], data.y_train[:rows]
x_held, y_held = data.x_validation[:1000], data.y_validation[:1000]
x_test, y_test = data.x_test[:tested], data.y_test[:tested]

# %% [markdown]
# ## The threat
#
# Every pixel may move by 0.1, which is little to the eye. In training an attack takes 5 steps;
# what is measured is attacked by 20, and by a second attack that sees answers alone.

# %%
in_training = kd.robust.Linf(0.1, steps=5)
in_the_test = kd.robust.Linf(0.1, steps=20)
hard_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def convnet(name, *widths):
    z = inputs = keras.Input(data.input_shape, name="image")
    for i, width in enumerate(widths):
        z = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(z)
        z = keras.layers.BatchNormalization(momentum=0.9, name=f"norm{i}")(z)
        z = keras.layers.ReLU(name=f"relu{i}")(z)
        z = keras.layers.MaxPooling2D(name=f"pool{i}")(z)
    z = keras.layers.Flatten(name="features")(z)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(z), name=name)


def trained(model, teacher=None, adversary=None):
    """Train on the same rows, in the same number of steps, and return the model."""
    steps = epochs * -(-len(x) // 128)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, steps)
    distiller = kd.Distiller(model, teacher)
    distiller.compile(keras.optimizers.Adam(rate), hard_loss, adversary=adversary)
    distiller.fit(x, y, batch_size=128, epochs=epochs, verbose=0)
    return model


# %% [markdown]
# ## Two teachers
#
# One is trained plainly, one on attacked images. The share of decisions that an attack leaves as
# they are tells them apart, and needs no labels.

# %%
teachers = {}
for name, adversary in (("plain", None), ("robust", kd.robust.PGDTraining(in_training))):
    keras.utils.set_random_seed(0)
    teachers[name] = trained(convnet(f"{name}_teacher", 16, 32), adversary=adversary)
    answers = np.argmax(teachers[name](x_test), axis=1)
    kept = kd.robust.kept_decisions(teachers[name], x_test, in_training)
    print(
        f"{name:7s} teacher: {np.mean(answers == y_test):.1%} right, keeps {kept:.1%} under attack"
    )

# %% [markdown]
# ## Four students
#
# All begin with the same weights (seed 1). `fit` looks at the teacher before the first step and
# warns about one that is not robust; the warning is printed here.

# %%
ways = {
    "plain": (None, None),
    "attacked images, no teacher": (None, kd.robust.PGDTraining(in_training)),
    "RSLAD, robust teacher": (teachers["robust"], kd.robust.RSLAD(in_training)),
    "RSLAD, plain teacher": (teachers["plain"], kd.robust.RSLAD(in_training)),
}
students = {}
for name, (teacher, adversary) in ways.items():
    keras.utils.set_random_seed(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        students[name] = trained(convnet("student", 5, 9), teacher, adversary)
    for warning in said:
        if "robust" in str(warning.message):
            print(f"{name}: {warning.message}\n")
print(f"parameters: teacher {teachers['robust'].count_params():,}", end=", ")
print(f"student {students['plain'].count_params():,}")

# %% [markdown]
# ## What they stand
#
# `report.adversarial` is the share of rows that stay right under every attack. Flags say when a
# figure is not to be believed, as when an attack merely failed.

# %%
corruptions = ("gaussian_noise", "motion_blur", "brightness", "contrast", "rotate", "pixelate")
reports = {}
for name, model in students.items():
    reports[name] = report = kd.robust.evaluate(
        model,
        x_test,
        y_test,
        in_the_test,
        corruptions=corruptions,
        severities=(1, 3, 5),
        calibrate_on=(x_held, y_held),
        queries=100,
    )
    print(
        f"{name:28s} clean {report.clean:6.1%}  under attack {report.adversarial:6.1%}  "
        f"corrupted {1 - report.mean_corruption_error:6.1%}  calibration error {report.ece:.3f}"
    )
    for flag in report.flags:
        print("  !", flag)

# %% [markdown]
# Six images, and what the plain student and the robust one say of them when they are attacked.
# Each is attacked for itself; an image that a student gets wrong anyway stays as it is. The first
# row is what the plain student says.

# %%
names = data.class_names
if public:
    names = ("T-shirt", "trouser", "pullover", "dress", "coat")
    names += ("sandal", "shirt", "sneaker", "bag", "boot")
figure, axes = plt.subplots(3, 6, figsize=(9, 5), layout="constrained")
shown = {"as it is": x_test[:6]}
for name in ("plain", "RSLAD, robust teacher"):
    shown[f"attack on\n{name}"] = kd.robust.attack(
        students[name], x_test[:6], y_test[:6], in_the_test
    )
for row, (title, images) in zip(axes, shown.items()):
    name = "plain" if "robust" not in title else "RSLAD, robust teacher"
    said = np.argmax(students[name](images), axis=1)
    for axis, image, answer, label in zip(row, images, said, y_test):
        axis.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
        color = "black" if answer == label else "tab:red"
        axis.set_title(names[answer], color=color, fontsize=9)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(title, fontsize=8)
plt.show()

# %% [markdown]
# ## As sure as it is right, then exported
#
# `calibrate` puts one temperature into the last layer: decisions stay, probabilities become
# honest. The student of the robust teacher goes into the files, of the three that stand up the one
# whose calibration error is least; the others go the same way.

# %%
student = students["RSLAD, robust teacher"]
calibrated = kd.robust.calibrate(student, x_held, y_held)
exported = kd.export(
    calibrated,
    folder / "exported",
    precisions=("float32", "int8"),
    calibration=x[:300],
    evaluation=(x_held, y_held),
    labels=names,
    max_drop=0.01,
)
print(exported.table())
print("verified again:", kd.export.verify(folder / "exported").ok)

# %% [markdown]
# ## The file under attack
#
# An int8 file has no gradients to follow. It is attacked by what was found on its float twin, and
# by the square attack, which asks the file itself.

# %%
of_file = kd.robust.evaluate(
    folder / "exported" / "model_int8.tflite",
    x_test,
    y_test,
    in_the_test,
    twin=calibrated,
    queries=100,
)
print(of_file.table())

# %% [markdown]
# ## What did not help
#
# Measured above, on 2,000 clothes and 8 epochs. A share of 200 test rows is known to 7 points
# either way; [docs/robust.md](../docs/robust.md) has more rows and seeds.
#
# - **The robust teacher did not make the student more robust** than attacked images alone did:
#   both are within these 7 points, and the one without a teacher is ahead, clean and attacked.
#   Such short trainings of so small a student gain from RSLAD only in how sure it is. Try
#   `PGDTraining` first.
# - **A teacher that is not robust** was expected to be worse, as the warning says and as papers
#   have measured. Here its student is not: what holds it up are the attacked images.
# - **Robustness is not free**: the plain student has 6 to 10 points more on clean images, and is no
#   worse on corrupted ones. It keeps one decision in two hundred under attack.
# - **Robust students are less sure than they are right**, calibration errors of 12 to 17 % against
#   4 %: `calibrate` brings the one that was exported to 8 % on these rows.
#
# ## Where to go next
#
# - `corruptions="all"`, `second_opinion="art"` (a second library),
#   `report.save_html("robust.html")`.
# - The same from the shell: `keras-kd robust exported/digits --twin student.keras --data digits
#   --epsilon 0.1`.
