"""A backup goes on with the training that it is of, and with no other."""

import errno
import json
import os
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import crossentropy, mlp, rows

import keras_kd as kd
from keras_kd.callbacks import (
    AlphaAnnealing,
    ResumableBackup,
    StudentCheckpoint,
    TemperatureAnnealing,
)
from keras_kd.models import training_identity
from keras_kd.utils import files


class KilledError(Exception):
    pass


class Kill(keras.callbacks.Callback):
    """Raises after a number of steps of one `fit`."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, batch, logs=None):
        self.steps -= 1
        if not self.steps:
            raise KilledError


class Program:
    """A training as a program would write it, with some settings changed."""

    def __init__(self, folder, **changes):
        keras.backend.clear_session()
        keras.utils.set_random_seed(3)
        self.folder, self.changes = folder, dict(changes)
        take = self.changes.pop
        student = mlp(name="student", activation=take("student_activation", None))
        teacher = mlp(take("teacher_width", 9), name="teacher")
        scale = take("teacher_scale", 1.0)
        teacher.set_weights([scale * w for w in teacher.get_weights()])
        precision = take("precision", "float32")
        self.distiller = kd.Distiller(student, teacher, teacher_precision=precision)
        transfer = kd.Transfer(
            kd.losses.Hint(),
            "hidden",
            "hidden",
            projector="linear",
            weight=take("transfer_weight", 0.3),
        )
        optimizer = take("optimizer", None) or keras.optimizers.SGD(take("learning_rate", 0.1))
        self.distiller.compile(
            optimizer,
            loss=take("loss", None) or crossentropy(),
            distillation_loss=[kd.losses.SoftTargets(temperature=take("own", None)), transfer],
            **take("weights_of_losses", {"alpha": take("alpha", 0.5)}),
            temperature=take("temperature", 2.0),
            run_eagerly=True,
        )
        x, y = rows(take("count", 24), seed=take("seed", 0))
        x = take("inputs", lambda x: x)(x)
        self.data = take("data", lambda x, y: (x, y))(x, take("labels", lambda y: y)(y))
        self.options = {"batch_size": 4, "epochs": 2, **self.changes}

    def run(self, *callbacks):
        backup = ResumableBackup(self.folder, save_freq=2)
        options = {"verbose": 0, "callbacks": [backup, *callbacks], **self.options}
        return self.distiller.fit(*self.data, **options).history


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """What the program without changes has left after five steps."""
    folder = tmp_path_factory.mktemp("unchanged") / "backup"
    with pytest.raises(KilledError):
        Program(folder).run(Kill(5))
    return folder


@pytest.fixture
def killed(tmp_path, unchanged):
    """Run a program for five steps, and give its folder."""

    def run(**changes):
        folder = tmp_path / "backup"
        if not changes:
            return shutil.copytree(unchanged, folder)
        with pytest.raises(KilledError):
            Program(folder, **changes).run(Kill(5))
        return folder

    return run


def test_the_same_program_goes_on(killed):
    folder = killed()
    backed_up = (folder / "state.npz").read_bytes()
    assert os.listdir(folder) == ["state.npz"]
    whole = Program(folder / "another")
    whole.run()
    resumed = Program(folder)
    resumed.run()
    for a, b in zip(whole.distiller.student.get_weights(), resumed.distiller.student.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert not folder.exists()
    # More epochs, metrics and callbacks are no other training.
    folder.mkdir()
    (folder / "state.npz").write_bytes(backed_up)
    longer = Program(folder, epochs=3)
    assert len(longer.run(keras.callbacks.TerminateOnNaN())["loss"]) == 3


def warm(x, y):
    return x, y, np.full(len(x), 0.5, "float32")


def dataset(x, y):
    return (tf.data.Dataset.from_tensor_slices((x, y)).batch(4),)


CHANGES = {
    "alpha": ({"alpha": 0.9}, "`alpha` was 0.5 and is 0.9"),
    "temperature": ({"temperature": 3.0}, "`temperature` was 2.0 and is 3.0"),
    "weights in place of alpha": (
        {"weights_of_losses": {"student_loss_weight": 1.0, "distillation_loss_weight": 1.0}},
        "`weighs_by_alpha` was True and is False",
    ),
    "teacher's precision": (
        {"precision": "bfloat16"},
        "`teacher_precision` was 'float32' and is 'bfloat16'",
    ),
    "learning rate": ({"learning_rate": 0.01}, "`optimizer.learning_rate` was 0.1"),
    "optimizer": ({"optimizer": keras.optimizers.SGD(0.1, nesterov=True)}, "`optimizer.nesterov`"),
    "clipping": ({"optimizer": keras.optimizers.SGD(0.1, clipnorm=1.0)}, "`optimizer.clipnorm`"),
    "schedule": (
        {"optimizer": keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9))},
        "`optimizer.learning_rate",
    ),
    "hard loss": ({"loss": "sparse_categorical_crossentropy"}, "`loss"),
    "smoothing": (
        {"loss": crossentropy(ignore_class=3)},
        "`loss.ignore_class` was None and is 3",
    ),
    "own temperature": ({"own": 4.0}, "temperature` was None and is 4.0"),
    "transfer's weight": ({"transfer_weight": 0.7}, "`weight of transfer hint` was 0.3"),
    "teacher's weights": ({"teacher_scale": 1.5}, "`model.teacher.fingerprint`"),
    "student": ({"student_activation": "softplus"}, "activation` was 'linear' and is 'softplus'"),
    "number of rows": ({"count": 28}, r"`steps an epoch` was 6 and is 7"),
    "values of x": ({"inputs": lambda x: x * 2}, "`values of x`"),
    "order of x": ({"inputs": lambda x: x[::-1].copy()}, "`values of x`"),
    "dtype of x": ({"inputs": lambda x: x.astype("float64")}, "`dtype of x`"),
    "labels": ({"labels": lambda y: (y + 1) % 4}, "`values of y`"),
    "batch size": ({"batch_size": 8}, "`steps an epoch`|`batch size`"),
    "a dataset": ({"data": dataset, "batch_size": None}, "`batch size`"),
    "weights": ({"data": lambda x, y: (x, y), "sample_weight": np.ones(24)}, "sample_weight`"),
    "class weights": ({"class_weight": {0: 2.0}}, "`class_weight` was None and is {'0': 2.0}"),
    "shuffling": ({"shuffle": False}, "`shuffle` was None and is False"),
    "split": ({"validation_split": 0.25}, "`validation_split`|`steps an epoch`"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_another_training_is_refused_before_its_first_step(killed, change):
    folder = killed()
    before = (folder / "state.npz").read_bytes()
    options, reason = CHANGES[change]
    program = Program(folder, **options)
    weights = program.distiller.student.get_weights()
    match = f"is a backup of another training: .*({reason}).*delete the folder to begin anew"
    with pytest.raises(ValueError, match=match):
        program.run()
    for a, b in zip(weights, program.distiller.student.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert (folder / "state.npz").read_bytes() == before


def test_elements_and_length_of_a_dataset(killed, tmp_path):
    folder = killed(data=dataset, batch_size=None)
    match = "`batches` was 6 and is 7|`steps an epoch` was 6 and is 7"
    with pytest.raises(ValueError, match=match):
        Program(folder, data=dataset, batch_size=None, count=28).run()

    def other(x, y):
        return (tf.data.Dataset.from_tensor_slices((x, y.astype("int32"))).batch(4),)

    with pytest.raises(ValueError, match="`elements of the dataset`"):
        Program(folder, data=other, batch_size=None).run()
    Program(folder, data=dataset, batch_size=None).run()


def test_a_cached_teacher_is_part_of_it(killed, tmp_path):
    folder = killed()
    program = Program(folder)
    cache = tmp_path / "cache"
    other = mlp(9, name="teacher")
    kd.cache.write(other, program.data[0], cache, taps=["hidden"])
    distiller = kd.Distiller(program.distiller.student, kd.teachers.CachedTeacher(cache))
    name = "model.teacher.fingerprint"
    before = training_identity.of_training(program.distiller)[name]
    distiller.compile("sgd", loss=crossentropy())
    assert (
        training_identity.of_training(distiller)[name]
        == distiller._pairing.teacher.fingerprint()
        != before
    )


def test_the_same_process_may_go_on_with_values_that_have_moved(tmp_path):
    program = Program(tmp_path / "backup")
    moving = [
        TemperatureAnnealing(start=4.0, end=1.0, steps=12),
        AlphaAnnealing(start=0.1, end=0.9, epochs=2),
    ]
    with pytest.raises(KilledError):
        program.run(*moving, Kill(5))
    # As when a cell of a notebook is stopped and run again.
    program.distiller.optimizer.learning_rate = 0.05
    program.run(*moving)
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        lambda file: file.write_text("{}"),
        lambda file: np.savez(file, place=np.array("{}")),
        lambda file: np.savez(file, place=np.array('{"epoch": "x", "batch": 0}')),
        lambda file: (file.unlink(), os.mkfifo(file)),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["truncated", "text", "no position", "no numbers", "a pipe", "a folder"],
)
def test_backups_that_are_none(killed, spoil):
    folder = killed()
    spoil(folder / "state.npz")
    with pytest.raises(ValueError, match=r"state.npz` is no readable backup: .*delete the folder"):
        Program(folder).run()


def test_a_backup_of_an_earlier_version_is_refused(killed):
    file = killed() / "state.npz"
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "settings"}
        assert json.loads(str(archive["settings"]))["alpha"] == 0.5
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match="written by an earlier version"):
        Program(file.parent).run()


# ---------------------------------------------------------------------- folders


def places(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "taken.keras").mkdir()
    return {
        "a file in the way": tmp_path / "file" / "folder",
        "deeper": tmp_path / "file" / "more" / "folder",
    }


@pytest.mark.parametrize("place", ["a file in the way", "deeper"])
@pytest.mark.parametrize("kind", ["backup", "checkpoint", "checkpoint by epoch"])
def test_folders_are_tried_before_the_first_step(tmp_path, place, kind):
    folder = places(tmp_path)[place]
    callback = {
        "backup": lambda: ResumableBackup(folder),
        "checkpoint": lambda: StudentCheckpoint(folder / "student.keras", monitor="loss"),
        "checkpoint by epoch": lambda: StudentCheckpoint(
            folder / "{epoch:02d}" / "student.keras", monitor="loss"
        ),
    }[kind]()
    program, steps = Program(tmp_path / "unused"), []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    with pytest.raises(OSError, match="cannot write to .*Choose a folder"):
        program.distiller.fit(*program.data, verbose=0, callbacks=[callback, count])
    assert not steps
    assert (tmp_path / "file").read_text() == "a file"


def test_a_folder_in_place_of_a_checkpoint(tmp_path):
    places(tmp_path)
    program = Program(tmp_path / "unused")
    checkpoint = StudentCheckpoint(tmp_path / "taken.keras", monitor="loss")
    with pytest.raises(IsADirectoryError, match="there is a folder of that name"):
        program.distiller.fit(*program.data, verbose=0, callbacks=[checkpoint])


def test_trying_a_folder_leaves_nothing(tmp_path):
    program = Program(tmp_path / "unused")
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(sorted(os.listdir(tmp_path)))
    )
    callbacks = [
        ResumableBackup(tmp_path / "backup"),
        StudentCheckpoint(tmp_path / "ckpt" / "{epoch}.keras", "loss", save_best_only=False),
        look,
    ]
    program.distiller.fit(*program.data, batch_size=12, verbose=0, callbacks=callbacks)
    assert seen == [[], []]
    assert os.listdir(tmp_path / "ckpt") == ["1.keras"]


@pytest.mark.parametrize(
    "name", ["state.npz.tmp", f".{os.getpid()}-state.npz"], ids=["fixed", "of the process"]
)
def test_links_in_a_backup_are_not_followed(tmp_path, name):
    precious = tmp_path / "precious"
    precious.write_text("do not lose me")
    folder = tmp_path / "backup"
    folder.mkdir()
    (folder / name).symlink_to(precious)
    with pytest.raises(KilledError):
        Program(folder).run(Kill(5))
    assert precious.read_text() == "do not lose me"
    assert (folder / "state.npz").is_file()


def test_a_full_disk_keeps_the_backup_before_and_its_advice(killed, monkeypatch):
    folder = killed()
    before = (folder / "state.npz").read_bytes()
    create = files.create

    class Full:
        def __init__(self, path):
            self.stream = create(path)

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.stream.close()
            raise OSError(errno.EIO, "could not close")

    def full(path):
        return Full(path) if os.fspath(path).endswith("state.npz.tmp") else create(path)

    monkeypatch.setattr(files, "create", full)
    match = "The backup .* could not be written: No space left.*The one before is untouched"
    with pytest.raises(OSError, match=match) as caught:
        Program(folder).run()
    assert caught.value.errno == errno.ENOSPC
    assert (folder / "state.npz").read_bytes() == before
    assert os.listdir(folder) == ["state.npz"]
    monkeypatch.undo()
    Program(folder).run()


def test_names_that_keras_numbers_are_no_settings():
    """A model that is made anew in one process has other names."""

    def made():
        inputs = keras.Input((6,))
        x = keras.layers.Dense(5, activation="tanh")(inputs)
        student = keras.Model(inputs, keras.layers.Dense(4)(x))
        distiller = kd.Distiller(student, mlp(name="teacher"))
        distiller.compile("sgd", crossentropy())
        found = training_identity.of_training(distiller)
        return {name: value for name, value in found.items() if "fingerprint" not in name}

    first, second = made(), made()
    assert training_identity.difference(first, second) is None
