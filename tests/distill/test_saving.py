"""Saved without the teacher, and resumed where training stopped."""

import json
import pathlib
import warnings
import zipfile

import keras
import numpy as np
import pytest
from keras import layers
from small_models import CLASSES, FEATURES, crossentropy, mlp, rows

import keras_kd as kd
from keras_kd.utils import lazy_registration


def dropping(width, name):
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(width, activation="relu", name="hidden")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.4, name="drop")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name=name)


class Halves(keras.callbacks.Callback):
    """Anneals by the epoch, from what the distiller holds."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.temperature.assign(8.0 / 2**epoch)
        self.model.alpha.assign(0.1 * epoch)


def make(student=None, teacher=None, transfer=None, eager=True):
    keras.utils.set_random_seed(11)
    student, teacher = student or dropping(5, "student"), teacher or dropping(40, "teacher")
    transfer = transfer or kd.Transfer(
        kd.losses.Hint(), "norm", "norm", projector="linear", weight=2.0
    )
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.02, 40)),
        loss=crossentropy(),
        metrics=["accuracy"],
        distillation_loss=[kd.losses.SoftTargets(), transfer],
        alpha=0.3,
        temperature=3.0,
        # Eager steps spare the tests most of their time; two of them are compiled.
        run_eagerly=eager,
    )
    return distiller


def train(distiller, first, last, callbacks=()):
    x, y = rows(14)
    return distiller.fit(
        x,
        y,
        batch_size=4,
        epochs=last,
        initial_epoch=first,
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
    ).history


def everything(distiller):
    variables = [*distiller.student.variables]
    for transfer in distiller.transfers:
        variables += transfer.variables
    return [np.array(v) for v in [*variables, *distiller.optimizer.variables]]


def assert_equal(one, other):
    first, second = everything(one), everything(other)
    assert len(first) == len(second)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("eager", [True, False])
def test_training_goes_on_bit_for_bit(tmp_path, eager):
    distiller = make(eager=eager)
    train(distiller, 0, 2, [Halves()])
    path = tmp_path / "d.keras"
    distiller.save(path)
    loaded = kd.load_distiller(path, teacher=distiller.teacher)
    assert_equal(distiller, loaded)
    assert float(loaded.temperature) == float(distiller.temperature) == 4.0
    assert float(loaded.alpha) == float(distiller.alpha)
    assert float(loaded.transfers[1].weight) == 2.0
    # Dropout takes up its stream of random numbers where it stopped.
    logs = [train(each, 2, 5, [Halves()]) for each in (distiller, loaded)]
    assert logs[0] == logs[1]
    assert "hint" in logs[0]
    assert_equal(distiller, loaded)


def test_it_evaluates_and_predicts_like_before(tmp_path):
    distiller = make()
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    x, y = rows(14)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), distiller.predict(x, verbose=0))
    assert loaded.evaluate(x, y, verbose=0) == distiller.evaluate(x, y, verbose=0)


def test_the_file_holds_no_teacher(tmp_path):
    distiller = make(teacher=dropping(4000, "teacher"), transfer=kd.Transfer(kd.losses.LogitMSE()))
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    plain = distiller.student
    plain.compile(keras.optimizers.Adam(), loss="mse")
    plain.optimizer.build(plain.trainable_variables)
    plain.save(tmp_path / "s.keras")
    sizes = [(tmp_path / name).stat().st_size for name in ("d.keras", "s.keras")]
    assert sizes[0] < 1.5 * sizes[1] < distiller.teacher.count_params()
    with zipfile.ZipFile(tmp_path / "d.keras") as archive:
        assert b"4000" not in archive.read("config.json")


def test_another_teacher_is_refused_by_name(tmp_path):
    distiller = make()
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    other = dropping(40, "impostor")
    with pytest.raises(ValueError, match="teacher `teacher`, .*`impostor`.*same teacher"):
        kd.load_distiller(tmp_path / "d.keras", teacher=other)
    with pytest.raises(ValueError, match="trained with the teacher `teacher`. Pass it as"):
        kd.load_distiller(tmp_path / "d.keras")


def test_a_reloaded_teacher_is_the_same_teacher(tmp_path):
    distiller = make()
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    distiller.teacher.save(tmp_path / "t.keras")
    teacher = keras.models.load_model(tmp_path / "t.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    train(distiller, 1, 2), train(loaded, 1, 2)
    assert_equal(distiller, loaded)


def test_loaded_by_keras_it_predicts_and_says_what_it_lacks(tmp_path):
    distiller = make()
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.models.load_model(tmp_path / "d.keras")
    x, y = rows(14)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), distiller.predict(x, verbose=0))
    loaded.evaluate(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"without its teacher.*`keras_kd\.load_distiller"):
        loaded.fit(x, y, verbose=0)


def test_it_is_saved_and_loaded_before_the_first_step(tmp_path):
    distiller = make()
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    for each in (distiller, loaded):
        keras.utils.set_random_seed(1)
        train(each, 0, 1)
    assert len(loaded.trainable_variables) == len(distiller.trainable_variables)


def test_the_explicit_weights_come_back(tmp_path):
    distiller = make()
    distiller.compile(
        "sgd",
        loss=crossentropy(),
        student_loss_weight=0.2,
        distillation_loss_weight=3.0,
        run_eagerly=True,
    )
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    assert train(loaded, 1, 2) == train(distiller, 1, 2)


def test_an_uncompiled_distiller_comes_back(tmp_path):
    distiller = kd.Distiller(dropping(5, "student"), dropping(9, "teacher"))
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    assert not loaded.compiled
    loaded.compile("sgd", loss=crossentropy(), run_eagerly=True)
    assert np.isfinite(train(loaded, 0, 1)["loss"]).all()


def test_recompiled_after_loading(tmp_path):
    distiller = make()
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    loaded.compile(
        "sgd", loss=crossentropy(), distillation_loss=kd.losses.LogitMSE(), run_eagerly=True
    )
    assert "logit_mse" in train(loaded, 1, 2)
    assert len(loaded.transfers) == 1


def test_input_functions_are_asked_for(tmp_path):
    def doubled(x):
        return 2 * x

    student, teacher = dropping(5, "student"), dropping(9, "teacher")
    distiller = kd.Distiller(student, teacher, teacher_inputs=doubled)
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    with pytest.raises(ValueError, match="`teacher_inputs`, and functions are not saved"):
        kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=teacher, teacher_inputs=doubled)
    assert train(loaded, 1, 2) == train(distiller, 1, 2)


def test_a_student_of_the_users_own_class(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class Mine(keras.Model):
        def __init__(self, width=4, **options):
            super().__init__(**options)
            self.width = width
            self.hidden = layers.Dense(width, name="hidden")
            self.last = layers.Dense(CLASSES, name="last")

        def call(self, x):
            return self.last(self.hidden(x))

        def get_config(self):
            return {**super().get_config(), "width": self.width}

    teacher = dropping(9, "teacher")
    distiller = make(Mine(), teacher, kd.Transfer(kd.losses.Hint(), "hidden", "hidden", "linear"))
    train(distiller, 0, 2)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    assert_equal(distiller, loaded)
    assert train(loaded, 2, 3) == train(distiller, 2, 3)


def test_a_loss_with_layers_of_its_own(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class Learned(kd.losses.Hint):
        """A hint with a learned scale, held in a layer of the loss."""

        def build(self, teacher_shape, student_shape):
            self.scale = layers.Dense(teacher_shape[-1], name="scale")
            self.scale.build(student_shape)
            self.built = True

        @property
        def layers(self):
            return [self.scale]

        def call(self, teacher, student):
            return keras.ops.mean(keras.ops.square(teacher - self.scale(student)), axis=-1)

    distiller = make(transfer=kd.Transfer(Learned(name="learned"), "norm", "norm"))
    train(distiller, 0, 1)
    assert len(distiller.transfers[1].trainable_variables) == 2
    before = [np.array(v) for v in distiller.transfers[1].trainable_variables]
    train(distiller, 1, 2)
    assert (before[0] != np.array(distiller.transfers[1].trainable_variables[0])).any()
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    assert_equal(distiller, loaded)
    assert train(loaded, 2, 3) == train(distiller, 2, 3)
    assert_equal(distiller, loaded)


def test_a_shared_layer_stays_as_the_teacher_has_it(tmp_path):
    teacher = dropping(5, "teacher")
    inputs = keras.Input((FEATURES,))
    x = teacher.get_layer("norm")(teacher.get_layer("hidden")(inputs))
    student = keras.Model(inputs, layers.Dense(CLASSES, name="own")(x), name="student")
    distiller = make(student, teacher, kd.Transfer(kd.losses.LogitMSE()))
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    assert_equal(distiller, loaded)
    assert train(loaded, 1, 3) == train(distiller, 1, 3)
    assert_equal(distiller, loaded)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_resumes(tmp_path, policy):
    student, teacher = mlp(name="student", dtype=policy), mlp(name="teacher")
    transfer = kd.Transfer(kd.losses.Hint(), "hidden", "hidden", projector="linear")
    distiller = make(student, teacher, transfer)
    train(distiller, 0, 1)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=teacher)
    assert_equal(distiller, loaded)
    assert train(loaded, 1, 2) == train(distiller, 1, 2)
    assert_equal(distiller, loaded)


def test_weights_alone(tmp_path):
    distiller = make()
    train(distiller, 0, 1)
    distiller.save_weights(tmp_path / "d.weights.h5")
    saved = [np.array(v) for v in distiller.student.variables]
    train(distiller, 1, 2)
    distiller.load_weights(tmp_path / "d.weights.h5")
    for a, b in zip(saved, distiller.student.variables):
        np.testing.assert_array_equal(a, b)


def test_backup_and_restore_goes_on(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    whole = make()
    train(whole, 0, 3, [Halves()])
    distiller = make()
    with pytest.raises(KeyboardInterrupt):
        train(
            distiller,
            0,
            3,
            [Halves(), keras.callbacks.BackupAndRestore(tmp_path / "backup"), Interrupt()],
        )
    again = make()
    train(again, 0, 3, [Halves(), keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    for a, b in zip(whole.student.variables, again.student.variables):
        np.testing.assert_array_equal(np.array(a), np.array(b), err_msg=a.path)


# ------------------------------------------------------------------- updates of low rank


def adapted(student=None):
    """A distiller whose student trains updates in attention, in a layer of its own, and a head."""
    keras.utils.set_random_seed(7)
    if student is None:
        inputs = keras.Input((FEATURES, 8))
        x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
        x = layers.BatchNormalization(name="norm")(layers.Dense(8, "gelu", name="dense")(x))
        x = layers.GlobalAveragePooling1D()(x)
        student = keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name="student")
        kd.students.enable_lora(student, 1, alpha=3, train=["head"])
    inputs = keras.Input((FEATURES, 8))
    teacher = keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(inputs)), name="teacher")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.Adam(0.01), loss=None)
    return distiller


def fit_adapted(distiller):
    x = np.random.default_rng(1).normal(size=(12, FEATURES, 8)).astype("float32")
    return distiller.fit(x, batch_size=4, epochs=2, shuffle=False, verbose=0).history


def assert_same_training(one, other):
    names = [[v.path for v in each.student.trainable_variables] for each in (one, other)]
    assert names[0] == names[1]
    assert any("attention/query/lora" in name for name in names[0])
    assert_equal(one, other)
    assert fit_adapted(one) == fit_adapted(other)
    assert_equal(one, other)


def test_low_rank_updates_go_on_bit_for_bit(tmp_path):
    distiller = adapted()
    fit_adapted(distiller)
    distiller.save(tmp_path / "d.keras")
    loaded = kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)
    assert int(loaded.optimizer.iterations) == int(distiller.optimizer.iterations) == 6
    assert not loaded.student.get_layer("norm").trainable
    assert loaded.student.get_layer("dense").lora_alpha == 3
    assert_same_training(distiller, loaded)


def test_low_rank_updates_in_weights_alone(tmp_path):
    distiller, other = adapted(), adapted()
    fit_adapted(distiller), fit_adapted(other), fit_adapted(other)
    distiller.save_weights(tmp_path / "d.weights.h5")
    other.load_weights(tmp_path / "d.weights.h5")
    assert_same_training(distiller, other)


def test_the_optimizer_is_never_left_out_in_silence(tmp_path):
    distiller = adapted()
    fit_adapted(distiller)
    distiller.save(tmp_path / "whole.keras")
    with (
        zipfile.ZipFile(tmp_path / "whole.keras") as whole,
        zipfile.ZipFile(tmp_path / "other.keras", "w") as other,
    ):
        for name in whole.namelist():
            data = whole.read(name)
            if name == "config.json":
                config = json.loads(data)
                # As files were that knew nothing of the updates.
                del config["config"]["trained"]
                data = json.dumps(config).encode()
            other.writestr(name, data)
    with pytest.raises(ValueError, match=r"optimizer in `.*other.keras` has the state of other"):
        kd.load_distiller(tmp_path / "other.keras", teacher=distiller.teacher)


def test_a_distiller_that_has_not_stepped_loads_without_a_warning(tmp_path):
    distiller = kd.Distiller(mlp(name="student"))
    distiller.compile("adam", loss=crossentropy())
    distiller.save(tmp_path / "d.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.load_distiller(tmp_path / "d.keras")


# ------------------------------------------------------------------- foreign files


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file `.*nowhere\.keras`"):
        kd.load_distiller(tmp_path / "nowhere.keras")


def test_a_truncated_file(tmp_path):
    distiller = make()
    path = tmp_path / "d.keras"
    distiller.save(path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"is no `\.keras` file, or only a part of one"):
            kd.load_distiller(path, teacher=distiller.teacher)


def test_a_damaged_file(tmp_path):
    distiller = make()
    path = tmp_path / "d.keras"
    distiller.save(path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("model.weights.h5")
    start = info.header_offset + 200
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"`model\.weights\.h5` in it is damaged"):
        kd.load_distiller(path, teacher=distiller.teacher)


def test_a_zip_of_something_else(tmp_path):
    path = pathlib.Path(tmp_path / "other.keras")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"is no `\.keras` file: it has no `config\.json`"):
        kd.load_distiller(path)


def test_a_model_that_is_no_distiller(tmp_path):
    mlp(name="student").save(tmp_path / "s.keras")
    with pytest.raises(ValueError, match="holds a Functional, not a distiller.*load_model"):
        kd.load_distiller(tmp_path / "s.keras")


def test_a_file_that_wants_to_run_code_is_refused(tmp_path):
    inputs = keras.Input((FEATURES,))
    student = keras.Model(inputs, layers.Lambda(lambda x: x[:, :CLASSES])(layers.Dense(9)(inputs)))
    distiller = kd.Distiller(student, mlp(name="teacher"))
    distiller.save(tmp_path / "d.keras")
    with pytest.raises(ValueError, match="(?i)lambda"):
        kd.load_distiller(tmp_path / "d.keras", teacher=distiller.teacher)


def test_compressed_models_load_before_their_module(tmp_path):
    """Keras knows the layers by stand-ins, once it and `keras_kd` are imported, in safe mode."""
    model = kd.compress.quantize_aware(kd.compress.prune(dropping(6, "small"), 0.5))
    model.save(tmp_path / "m.keras")
    known = keras.saving.get_custom_objects()
    before = {name: value for name, value in known.items() if name.startswith("keras_kd>")}
    layers_ = {n for n, value in before.items() if value.__module__.startswith("keras_kd.compress")}
    assert layers_ == {f"keras_kd>{n}" for n in lazy_registration.CLASSES["keras_kd.compress"]}
    for name in layers_:
        del known[name]
    try:
        with pytest.raises(TypeError, match="Could not locate class"):
            keras.models.load_model(tmp_path / "m.keras")
        lazy_registration.register(keras)
        again = keras.models.load_model(tmp_path / "m.keras", safe_mode=True)
    finally:
        known.update(before)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in model.layers]
    x = np.random.default_rng(0).normal(size=(4, FEATURES)).astype("float32")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    # A class that is there already stays.
    lazy_registration.register(keras)
    assert known["keras_kd>QuantizedLayer"] is kd.compress.QuantizedLayer
