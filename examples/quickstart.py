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
# # Quickstart: digits to a phone file in ten minutes
#
# A teacher is trained, a student of about a thirtieth of its size learns from it, and the student
# leaves as an int8 TFLite file that is run and checked. Everything is plain Keras: bring your own
# models and data. It takes about a minute on two processor cores; the ten are for reading.
#
# Needed: `pip install "keras_kd[all]"`.

# %%
import tempfile
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_kd as kd

keras.utils.set_random_seed(7)

# %% [markdown]
# ## Data
#
# Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels. `kd.datasets.load` also takes
# `"tfds:NAME"` and `"FILE.npz"`; any arrays or `tf.data.Dataset` of yours do as well. The
# validation images choose the student, the test images only judge it.

# %%
digits = kd.datasets.load("digits")
print(digits.sizes, digits.input_shape)

# %% [markdown]
# ## Your own teacher and student
#
# Two ordinary Keras models. Both end in logits: ten numbers without a softmax. A model that ends
# in a softmax works too, its logits are found.


# %%
def convnet(name, *widths):
    x = inputs = keras.Input(digits.input_shape, name="image")
    for i, width in enumerate(widths):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(x)
        x = keras.layers.BatchNormalization(momentum=0.9, name=f"norm{i}")(x)
        x = keras.layers.ReLU(name=f"relu{i}")(x)
        if i % 2:
            x = keras.layers.MaxPooling2D(name=f"pool{i}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="digit")(x), name=name)


teacher = convnet("teacher", 32, 32, 64, 64)
student = convnet("student", 8, 8, 16)
plain, first_weights = convnet("plain", 8, 8, 16), student.get_weights()
print(f"parameters: teacher {teacher.count_params():,}, student {student.count_params():,}")

# %%
hard_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
teacher.compile(keras.optimizers.Adam(2e-3), loss=hard_loss, metrics=["accuracy"])
teacher.fit(digits.x_train, digits.y_train, batch_size=64, epochs=12, verbose=0)
teacher_accuracy = teacher.evaluate(digits.x_test, digits.y_test, verbose=0)[1]
print(f"teacher: {teacher_accuracy:.1%} of the test images")

# %% [markdown]
# ## Distill
#
# `compile` and `fit` as in Keras. The temperature softens what the teacher says; here it falls
# from 4 to 1 along a cosine. `StudentCheckpoint` keeps the best student, and the student alone.

# %%
epochs = 25
folder = Path(tempfile.mkdtemp())

distiller = kd.Distiller(student, teacher)
distiller.compile(
    optimizer=keras.optimizers.Adam(5e-3),
    loss=hard_loss,
    metrics=["accuracy"],
    distillation_loss=kd.losses.SoftTargets(),
    alpha=0.5,
)
history = distiller.fit(
    digits.x_train,
    digits.y_train,
    validation_data=(digits.x_validation, digits.y_validation),
    batch_size=64,
    epochs=epochs,
    verbose=0,
    callbacks=[
        kd.callbacks.TemperatureAnnealing(start=4.0, end=1.0, epochs=epochs, kind="cosine"),
        kd.callbacks.StudentCheckpoint(folder / "student.keras", monitor="val_accuracy"),
    ],
).history

student = keras.saving.load_model(folder / "student.keras")
student.compile(loss=hard_loss, metrics=["accuracy"])
student_accuracy = student.evaluate(digits.x_test, digits.y_test, verbose=0)[1]
print(f"student: {student_accuracy:.1%} of the test images")

# %% [markdown]
# ## Did the teacher help?
#
# That is only known beside a student without one: the same first weights, the same number of
# steps, the labels alone. `Distiller(student, None)` trains it.

# %%
plain.set_weights(first_weights)
trainer = kd.Distiller(plain, None)
trainer.compile(keras.optimizers.Adam(5e-3), loss=hard_loss, metrics=["accuracy"])
trainer.fit(
    digits.x_train,
    digits.y_train,
    validation_data=(digits.x_validation, digits.y_validation),
    batch_size=64,
    epochs=epochs,
    verbose=0,
    callbacks=[kd.callbacks.StudentCheckpoint(folder / "plain.keras", monitor="val_accuracy")],
)
plain = keras.saving.load_model(folder / "plain.keras")
plain.compile(loss=hard_loss, metrics=["accuracy"])
plain_accuracy = plain.evaluate(digits.x_test, digits.y_test, verbose=0)[1]
print(f"plain student: {plain_accuracy:.1%}, distilled: {student_accuracy:.1%}")
print(f"one test image is {1 / len(digits.y_test):.1%}")

# %% [markdown]
# ## What happened in training
#
# The two losses, and how often the student's answer is the teacher's.

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
left.plot(history["student_loss"], label="student_loss (labels)")
left.plot(history["distillation_loss"], label="distillation_loss (teacher)")
left.set(xlabel="epoch", ylabel="nats", yscale="log", title="Losses")
left.legend()
middle.plot(history["agreement"], label="agreement with the teacher")
middle.plot(history["val_accuracy"], label="val_accuracy")
middle.set(xlabel="epoch", title="Agreement and accuracy", ylim=(0, 1.02))
middle.legend(loc="lower right")
right.plot(history["temperature"])
right.set(xlabel="epoch", title="Temperature")
plt.show()

# %% [markdown]
# ## Teacher against student
#
# The probability that either gives to the right digit, for each test image. Points near the
# diagonal are images on which the student learned how sure the teacher is.


# %%
def probabilities(model):
    return keras.ops.convert_to_numpy(
        keras.ops.softmax(model.predict(digits.x_test, verbose=0), axis=-1)
    )


rows = np.arange(len(digits.y_test))
from_teacher = probabilities(teacher)[rows, digits.y_test]
from_student = probabilities(student)[rows, digits.y_test]

figure, axes = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
axes.plot([0, 1], [0, 1], color="lightgray", zorder=0)
axes.scatter(from_teacher, from_student, s=8, alpha=0.5)
axes.set(xlabel="teacher", ylabel="student", title="Probability of the right digit", aspect="equal")
plt.show()

# %% [markdown]
# ## Export and verify
#
# Each file is converted, loaded in its own runtime, run on the validation images and compared with
# the Keras model. A file that fails is reported and is never `best`.

# %%
report = kd.export(
    student,
    folder / "exported",
    calibration=digits.x_train[:256],
    evaluation=(digits.x_validation, digits.y_validation),
    labels=digits.class_names,
    history=history,
    teacher=teacher,
    max_drop=0.01,
)
print(report.table())

# %% [markdown]
# Whoever gets the folder can prove the files again, from what is in it alone. In the shell that is
# `keras-kd verify FOLDER`.

# %%
proof = kd.export.verify(folder / "exported")
print("problems found by verify:", proof.problems or "none")

# %% [markdown]
# ## Run the int8 file
#
# As an app does: read scale and zero point from the file, quantize the image, run, take the
# largest output.

# %%
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter(str(folder / "exported" / "model_int8.tflite"))
interpreter.allocate_tensors()
entry, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
scale, zero_point = entry["quantization"]

right_answers = 0
for image, label in zip(digits.x_test, digits.y_test):
    quantized = np.clip(np.round(image / scale) + zero_point, -128, 127).astype("int8")
    interpreter.set_tensor(entry["index"], quantized[None])
    interpreter.invoke()
    right_answers += interpreter.get_tensor(result["index"])[0].argmax() == label
print(f"int8 file: {right_answers / len(digits.y_test):.1%} of the test images")

# %% [markdown]
# ## What did not help
#
# On data this easy the teacher itself: over four seeds, `docs/defaults.md`, a student of this size
# is as good without one, and a temperature of 4 that stays costs a small student accuracy; one
# seed and 359 test images, as here, say nothing about a point. Distillation pays where the teacher
# is far ahead of what the student finds out alone, or where labels are few: see the other
# notebooks. What does not depend on it is the second half, a small file that is proven to work.
#
# ## Where to go next
#
# - Text, speech, tables, ranking and more: the other notebooks in this folder.
# - Does the teacher help at all? `compile(..., distillation_loss="auto")` tries methods on rows
#   that it holds out, and keeps plain training unless another is better beyond chance.
# - Transfer inner layers too: `distillation_loss=[kd.losses.SoftTargets(),
#   kd.Transfer(kd.losses.Hint(), teacher="pool3", student="pool1", projector="auto")]`.
# - The same from the shell: `keras-kd demo`.
