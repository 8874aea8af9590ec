"""Frozen layers and low-rank updates: counts by hand, training that moves only these."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_kd as kd
from keras_kd.students import enable_lora, freeze

sys.path.insert(0, str(Path(__file__).parent))

from students_models import batch, resnet, run, transformer


def _values(model):
    return {v.path: ops.convert_to_numpy(v) for v in model.variables}


def _moved(model, before):
    return {path for path, value in _values(model).items() if (value != before[path]).any()}


def test_freeze_counts_what_trains():
    student = resnet(1, 8)
    assert freeze(student, train=["head"]) == 32 * 5 + 5
    assert freeze(student, train="c20a") == 9 * 16 * 32
    assert freeze(student) == 0
    student.get_layer("head").trainable = True
    assert len(student.trainable_variables) == 2


def test_lora_trains_rank_times_inputs_and_outputs():
    student = transformer(1, 16, 4)
    x = np.random.default_rng(0).integers(1, 20, (8, 9))
    before = run(student, x)
    # Attention: kernels (16, 4, 4) twice 3 and one (4, 4, 16); Keras's A has all axes but the last.
    attention = 3 * 2 * (16 * 4 + 4) + 2 * (4 * 4 + 16)
    feed = 2 * (16 + 64) + 2 * (64 + 16)
    embed, head = 2 * (20 + 16), 2 * (16 + 5)
    assert enable_lora(student, rank=2) == attention + feed + embed + head
    np.testing.assert_allclose(run(student, x), before, rtol=1e-5, atol=1e-6)
    names = {v.name for v in student.trainable_variables}
    assert all("lora" in name for name in names)


def test_predictions_after_lora_see_the_updates():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    student = keras.Model(inputs, layers.Dense(8, name="wide")(inputs))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    # Keras compiles it here, before there are updates.
    before = student.predict(x, verbose=0)
    enable_lora(student, rank=1)
    np.testing.assert_allclose(student.predict(x, verbose=0), before, rtol=1e-5, atol=1e-6)
    student.get_layer("wide").lora_kernel_b.assign(np.ones((1, 8)))
    after = student.predict(x, verbose=0)
    np.testing.assert_allclose(after, run(student, x), rtol=1e-5, atol=1e-6)
    assert np.abs(after - before).max() > 0.01


def test_lora_leaves_out_kernels_that_are_no_larger_than_their_update():
    student = transformer(1, 16, 4)
    # 4 * (16 * 4 + 4) = 272 of 256: the projections of attention gain nothing.
    assert enable_lora(student, rank=4, train=["head"]) == (
        4 * (4 * 4 + 16) + 2 * 4 * (16 + 64) + 4 * (20 + 16) + 16 * 5 + 5
    )
    student = transformer(1, 16, 4)
    assert enable_lora(student, rank=4, layers=["up0"]) == 4 * (16 + 64)
    student = transformer(1, 16, 4)
    assert enable_lora(student, 4, layers=["att0"]) == 3 * 4 * (16 * 4 + 4) + 4 * (4 * 4 + 16)


def test_only_the_updates_move_in_a_distiller_and_the_file_has_them_merged(tmp_path):
    student, teacher = transformer(1, 16, name="student"), transformer(2, 16, name="teacher")
    count = enable_lora(student, rank=2, train=["head"])
    assert count == sum(int(np.prod(v.shape)) for v in student.trainable_variables)
    x = np.random.default_rng(0).integers(1, 20, (32, 9))
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.Adam(0.01), loss=None)
    assert sum(int(np.prod(v.shape)) for v in distiller.trainable_variables) == count
    before = _values(student)
    losses = distiller.fit(x, epochs=4, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    moved = _moved(student, before)
    assert moved == {v.path for v in student.trainable_variables}
    assert all("lora" in path or path.startswith("head") for path in moved)
    student.save(tmp_path / "student.keras")
    again = keras.saving.load_model(tmp_path / "student.keras", safe_mode=True)
    np.testing.assert_allclose(run(again, x), run(student, x), rtol=1e-5, atol=1e-6)
    for layer in again._flatten_layers():
        if isinstance(layer, layers.Dense) and layer.lora_enabled:
            assert not ops.convert_to_numpy(layer.lora_kernel_b).any()


def test_convolutions_take_updates():
    student = resnet(1, 8)
    assert enable_lora(student, rank=1, layers=["c20a"]) == 3 * 3 * 16 + 32


def test_bad_values_are_refused_and_nothing_is_frozen():
    student = transformer(1)
    with pytest.raises(ValueError, match="rank=0"):
        enable_lora(student, rank=0)
    with pytest.raises(ValueError, match="alpha=-1"):
        enable_lora(student, alpha=-1)
    with pytest.raises(ValueError, match=r"`hea` is not a layer.*`head`"):
        enable_lora(student, train=["hea"])
    with pytest.raises(ValueError, match="rank 99"):
        enable_lora(student, rank=99)
    with pytest.raises(ValueError, match="no weights yet"):
        freeze(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(TypeError, match="Received: str"):
        freeze("student")
    assert len(student.trainable_variables) == len(student.variables) - sum(
        "seed" in v.path for v in student.variables
    )


def test_updates_that_were_merged_by_saving_begin_anew(tmp_path):
    student = resnet(1, 8)
    count = enable_lora(student, rank=2, layers=["c20a", "head"], train=["b20a"], alpha=6)
    x = batch(student)
    for name in ("c20a", "head"):
        student.get_layer(name).lora_kernel_b.assign_add(
            np.ones(student.get_layer(name).lora_kernel_b.shape)
        )
    student.save(tmp_path / "student.keras")
    again = keras.saving.load_model(tmp_path / "student.keras")
    before = run(again, x)
    np.testing.assert_allclose(before, run(student, x), rtol=1e-5, atol=1e-6)
    assert enable_lora(again, 2, layers=["c20a", "head"], train=["b20a"], alpha=6) == count
    np.testing.assert_array_equal(run(again, x), before)
    for name in ("c20a", "head"):
        layer = again.get_layer(name)
        assert layer.lora_alpha == 6
        # As far from zero as a new update: He's uniform distribution.
        a = ops.convert_to_numpy(layer.lora_kernel_a)
        limit = np.sqrt(6 / np.prod(a.shape[:-1]))
        assert limit / 2 < np.abs(a).max() <= limit
    again.compile(keras.optimizers.SGD(0.1), "mse")
    start = _values(again)
    again.train_on_batch(x, np.ones((len(x), 5), "float32"))
    assert {"c20a/lora_kernel_b", "head/lora_kernel_b"} <= _moved(again, start)


def test_another_rank_or_scale_is_refused():
    student = resnet(1, 8)
    count = enable_lora(student, rank=2, layers=["c20a"], alpha=4)
    with pytest.raises(ValueError, match="`c20a` has an update of rank 2.*rank=8"):
        enable_lora(student, rank=8)
    # The same again, and other layers beside it, are fine.
    assert enable_lora(student, rank=2, layers=["c20a"]) == count
    assert student.get_layer("c20a").lora_alpha == 4
    student.get_layer("c20a").lora_kernel_b.assign_add(np.ones((2, 32)))
    with pytest.raises(ValueError, match=r"alpha 4.*alpha=8"):
        enable_lora(student, rank=2, layers=["c20a"], alpha=8)
    assert enable_lora(student, rank=1, layers=["head"]) == 32 + 5
