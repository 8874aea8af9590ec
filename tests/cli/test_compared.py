"""What the README's table says of keras.distillation and TFMOT, seen in a run of each."""

import subprocess
import sys
import zipfile
from importlib.util import find_spec

import keras
import numpy as np
import pytest

import keras_kd as kd

distillation = pytest.importorskip("keras.distillation")

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = np.arange(16) % 3


def network(width=1, seed=0):
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((4,)), keras.layers.Dense(8 * width), keras.layers.Dense(3)]
    return keras.Sequential(layers)


def theirs(student, teacher, **options):
    loss = distillation.LogitsDistillation(temperature=2.0, loss=keras.losses.KLDivergence())
    distiller = distillation.Distiller(
        teacher=teacher, student=student, distillation_losses=[loss], student_loss_weight=0.0
    )
    distiller.compile(keras.optimizers.SGD(0.1), loss=LOSS, **options)
    return distiller, loss


def ours(student, teacher, **options):
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.1), loss=LOSS, alpha=0.0, temperature=2.0, **options)
    return distiller


def step(distiller, student, **data):
    distiller.fit(X, Y, batch_size=16, shuffle=False, verbose=0, **data)
    return np.concatenate([weight.ravel() for weight in student.get_weights()])


def test_sample_weights():
    half = np.repeat([1.0, 0.0], 8)
    moved = {}
    for name, make in (("ours", ours), ("theirs", theirs)):
        for kind, weights in (("plain", None), ("half", half)):
            student = network()
            distiller = make(student, network(4, seed=1))
            distiller = distiller[0] if isinstance(distiller, tuple) else distiller
            moved[name, kind] = step(distiller, student, sample_weight=weights)
    np.testing.assert_array_equal(moved["theirs", "half"], moved["theirs", "plain"])
    assert np.abs(moved["ours", "half"] - moved["ours", "plain"]).max() > 1e-4


def test_a_temperature_changed_after_the_first_step():
    moved = {}
    for after in (2.0, 8.0):
        student = network()
        distiller = ours(student, network(4, seed=1))
        step(distiller, student)
        distiller.temperature.assign(after)
        moved["ours", after] = step(distiller, student)
        student = network()
        distiller, loss = theirs(student, network(4, seed=1))
        step(distiller, student)
        loss.temperature = after
        moved["theirs", after] = step(distiller, student)
    np.testing.assert_array_equal(moved["theirs", 2.0], moved["theirs", 8.0])
    assert np.abs(moved["ours", 2.0] - moved["ours", 8.0]).max() > 1e-4


def test_training_without_labels():
    distiller = kd.Distiller(network(), network(4, seed=1))
    distiller.compile(keras.optimizers.SGD(0.1), loss=None)
    assert distiller.fit(X, verbose=0).history["distillation_loss"][0] > 0
    student = network()
    loss = distillation.LogitsDistillation(loss=keras.losses.KLDivergence())
    peer = distillation.Distiller(
        teacher=network(4, seed=1), student=student, distillation_losses=[loss]
    )
    with pytest.raises(Exception, match=r"(?i)loss"):
        peer.compile(keras.optimizers.SGD(0.1), loss=None)
        peer.fit(X, verbose=0)


def test_evaluation_without_the_teacher():
    class Counting(keras.layers.Layer):
        calls = 0

        def call(self, x):
            Counting.calls += 1
            return x

    calls = {}
    for name, make in (("ours", ours), ("theirs", theirs)):
        teacher = keras.Sequential([keras.Input((4,)), Counting(), keras.layers.Dense(3)])
        distiller = make(network(), teacher, run_eagerly=True)
        distiller = distiller[0] if isinstance(distiller, tuple) else distiller
        Counting.calls = 0
        distiller.evaluate(X, Y, batch_size=8, verbose=0)
        calls[name] = Counting.calls
    assert calls["ours"] == 0
    assert calls["theirs"] >= 2


def test_checkpoints_without_the_teacher(tmp_path):
    sizes = {}
    for name, make in (("ours", ours), ("theirs", theirs)):
        distiller = make(network(), network(100, seed=1))
        distiller = distiller[0] if isinstance(distiller, tuple) else distiller
        distiller.fit(X, Y, verbose=0)
        distiller.save(tmp_path / f"{name}.keras")
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as archive:
            sizes[name] = archive.getinfo("model.weights.h5").file_size
    teacher = network(100).count_params() * 4
    assert sizes["theirs"] > teacher
    # HDF5 itself takes some tens of kilobytes; the teacher's weights are not among them.
    network().save_weights(tmp_path / "student.weights.h5")
    alone = (tmp_path / "student.weights.h5").stat().st_size
    assert sizes["ours"] < 4 * alone


TFMOT = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
assert "TF_USE_LEGACY_KERAS" not in os.environ
import tensorflow_model_optimization as tfmot
print("legacy", os.environ.get("TF_USE_LEGACY_KERAS"))
for name, method in (
    ("quantize", tfmot.quantization.keras.quantize_model),
    ("prune", tfmot.sparsity.keras.prune_low_magnitude),
):
    try:
        method(model)
    except Exception as error:
        print(name, "raises", type(error).__name__)
    else:
        print(name, "works")
"""


# Importing TFMOT here would set TF_USE_LEGACY_KERAS for all tests.
@pytest.mark.skipif(find_spec("tensorflow_model_optimization") is None, reason="needs TFMOT")
def test_tfmot_and_keras_3_models():
    run = subprocess.run([sys.executable, "-c", TFMOT], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.split("\n")
    assert "legacy 1" in lines
    assert any(line.startswith("quantize raises") for line in lines)
    assert any(line.startswith("prune raises") for line in lines)
