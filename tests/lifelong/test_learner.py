"""Learners on small streams: what each method does, what is refused, what is left on disk."""

import json

import keras
import numpy as np
import pytest
from keras import ops
from small_streams import learned, model, rows, stream

from keras_kd import lifelong
from keras_kd.lifelong import Memory, Stream, batches
from keras_kd.lifelong.correction import BiasCorrection, WeightAligning

METHODS = {
    "fine_tune": (lifelong.FineTune, None),
    "joint": (lifelong.Joint, None),
    "lwf": (lifelong.LearningWithoutForgetting, None),
    "replay": (lambda: lifelong.Replay(batch_size=6), lambda: Memory(12)),
    "dark": (lifelong.DarkReplay, lambda: Memory(12, policy="balanced")),
    "dark_herding": (lifelong.DarkReplay, lambda: Memory(bytes=500, policy="herding")),
    "icarl": (lifelong.ICaRL, lambda: Memory(12, policy="herding")),
    "lucir": (lifelong.LessForgetting, lambda: Memory(12, policy="herding")),
    "podnet": (lifelong.PodNet, lambda: Memory(12)),
    "wa": (lifelong.WeightAligning, lambda: Memory(12, policy="herding")),
    "bic": (lambda: lifelong.BiasCorrection(held_out=0.3), lambda: Memory(18, policy="herding")),
    "ewc": (lambda: lifelong.ElasticWeights(samples=4), None),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_in_a_plain_model(name, tmp_path):
    method, memory = METHODS[name]
    learner = learned(method(), memory and memory())
    report = learner.report()
    assert learner.classes.tolist() == list(range(6))
    assert report.matrix.shape == (3, 3)
    # Classes that are still to come are never answered.
    assert (report.matrix[np.triu_indices(3, 1)] == 0).all()
    told = learner.report(known_task=True)
    assert (told.matrix[np.tril_indices(3)] >= report.matrix[np.tril_indices(3)]).all()
    path = tmp_path / "student.keras"
    learner.model.save(path)
    plain = keras.saving.load_model(path)
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    x, y = rows(24, seed=1)
    answers = ops.convert_to_numpy(plain(x)).argmax(-1)
    np.testing.assert_array_equal(answers, learner.predict(x))
    assert np.mean(answers == y) == pytest.approx(report.average_accuracy)
    if learner.memory is not None:
        assert report.memory_bytes >= learner.memory.nbytes > 0
        bound = learner.memory.bytes
        assert bound is None or learner.memory.nbytes <= bound
    assert report.seconds > 0


def test_replay_forgets_less_than_fine_tuning():
    def report(*method):
        return learned(*method, epochs=4, optimizer=keras.optimizers.SGD(0.5)).report()

    plain, replay = report(lifelong.FineTune()), report(lifelong.Replay(), Memory(12))
    assert plain.average_accuracy < replay.average_accuracy
    assert replay.forgetting < plain.forgetting


def test_memory_holds_rows_of_the_stream_with_the_logits_of_their_step():
    """One step a task: the logits are those of the weights before it, in training mode."""
    x, y = rows()
    tasks = Stream.by_class(x, y, tasks=2, seed=None)
    student = model()
    before = ops.convert_to_numpy(student(x))
    learner = lifelong.Learner(student, lifelong.DarkReplay(), Memory(30))
    learner.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    learner.fit(tasks[0], batch_size=24, verbose=0)
    memory = learner.memory
    assert memory.known.tolist() == [3] * 24
    row_of = {row.tobytes(): i for i, row in enumerate(x)}
    numbers = [row_of[row.tobytes()] for row in memory.x]
    np.testing.assert_array_equal(memory.y, y[numbers])
    np.testing.assert_allclose(memory.logits, before[numbers][:, :3], rtol=1e-4, atol=1e-5)
    learner.fit(tasks[1], batch_size=24, verbose=0)
    assert memory.logits.shape == (30, 6)
    assert sorted(set(memory.known)) == [3, 6]
    assert not memory.logits[memory.known == 3][:, 3:].any()


def test_old_columns_and_the_momentum_go_on():
    """With a rate of zero nothing moves, and the grown head holds what there was."""
    student = model()
    learner = lifelong.Learner(student, lifelong.FineTune())
    learner.compile(keras.optimizers.Adam(0.05), run_eagerly=True)
    tasks = stream()
    learner.fit(tasks[0], batch_size=8, verbose=0)
    kernel, state = learner.model.layers[-1].get_weights()[0], list(learner._optimizer)
    learner.compile(keras.optimizers.Adam(0.0), run_eagerly=True)
    learner._optimizer[1] = np.float32(0.0)
    learner.fit(tasks[1], batch_size=99, verbose=0)
    np.testing.assert_array_equal(learner.model.layers[-1].get_weights()[0][:, :2], kernel)
    assert int(learner._optimizer[0]) == int(state[0]) + 1
    # First moments of the old columns decay from what they were: their gradient is not zero.
    moment = next(a for a in learner._optimizer if a.shape == (5, 4))
    assert np.abs(moment[:, :2]).max() > 0


def test_weights_are_aligned():
    learner = learned(WeightAligning(), Memory(12, policy="herding"), of=list(stream())[:1])
    task, seen = stream()[1], {}
    correct = WeightAligning.correct

    def watched(method, ending):
        seen["before"] = ending.head.arrays()
        correct(method, ending)
        seen.update(after=ending.head.arrays(), old=ending.old, new=ending.new)

    learner.method.correct = lambda ending: watched(learner.method, ending)
    learner.fit(task, batch_size=8, verbose=0)
    assert (seen["old"], seen["new"]) == ([0, 1], [2, 3])
    lengths = np.linalg.norm(seen["before"]["kernel"], axis=0)
    factor = lengths[:2].mean() / lengths[2:].mean()
    expected = seen["before"]["kernel"] * [1, 1, factor, factor]
    np.testing.assert_allclose(seen["after"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_array_equal(seen["after"]["bias"], seen["before"]["bias"])


def test_bias_correction_holds_rows_out_and_folds_its_fit():
    learner = learned(
        BiasCorrection(held_out=0.25), Memory(16, policy="herding"), of=list(stream())[:1]
    )
    kept = learner.memory.x.copy()
    seen, correct = {}, BiasCorrection.correct

    def watched(ending):
        seen.update(ending=ending, before=ending.outputs(ending.held_x)["logits"])
        correct(learner.method, ending)
        seen["after"] = ending.outputs(ending.held_x)["logits"]

    learner.method.correct = watched
    learner.fit(stream()[1], batch_size=8, verbose=0)
    ending = seen["ending"]
    # A quarter of eight rows a class of the memory, and as many of each new class.
    assert np.unique(ending.held_y, return_counts=True)[1].tolist() == [2, 2, 2, 2]
    held = {row.tobytes() for row in ending.held_x}
    assert not held & {row.tobytes() for row in ending.x}
    assert len(held & {row.tobytes() for row in kept}) == 4
    from keras_kd.lifelong.correction import fitted_bias

    factor, shift = fitted_bias(seen["before"], ending.held_y, [2, 3], 0.1)
    expected = seen["before"] * [1, 1, factor, factor] + [0, 0, shift, shift]
    np.testing.assert_allclose(seen["after"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [WeightAligning, lambda: BiasCorrection(held_out=0.3)])
def test_the_first_task_of_a_model_that_knows_classes_is_corrected_too(make):
    x, y = rows()
    memory = Memory(12, policy="herding")
    learner = lifelong.Learner(model(units=4), make(), memory, classes=[0, 1, 2, 3])
    learner.compile("sgd", run_eagerly=True)
    seen = []
    learner.method.correct = lambda ending: seen.append((ending.old, ending.new))
    learner.fit(Stream.by_task([(x[y > 3], y[y > 3])])[0], verbose=0)
    assert seen == [([0, 1, 2, 3], [4, 5])]


def test_a_memory_of_one_row_a_class_is_too_small_to_correct_by():
    learner = learned(BiasCorrection(), Memory(2, policy="herding"), of=list(stream())[:1])
    with pytest.warns(UserWarning, match="corrects nothing"):
        learner.fit(stream()[1], verbose=0)


@pytest.mark.parametrize(
    "method", [lifelong.Replay(), lifelong.DarkReplay(forward="joint"), lifelong.DarkReplay()]
)
def test_statistics_of_batches_are_of_the_task_before_the_memory_holds_a_row(method):
    """A herding memory is empty for all of the first task."""

    def learned_statistics(method, memory):
        inputs = keras.Input((4,))
        normalized = keras.layers.BatchNormalization(momentum=0.0)(inputs)
        student = keras.Model(inputs, keras.layers.Dense(6)(normalized))
        learner = lifelong.Learner(student, method, memory)
        learner.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
        learner.fit(stream()[0], batch_size=8, verbose=0)
        return student.layers[1].get_weights()[2:]

    plain = learned_statistics(lifelong.FineTune(), None)
    for found, expected in zip(learned_statistics(method, Memory(8, policy="herding")), plain):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_each_draw_of_a_step_is_one_of_its_own():
    memory = Memory(20)
    memory.add(*rows())
    pool = batches.Pool(memory, *rows(seed=1))
    plan = batches.Plan(
        pool, np.arange(20, 68), 10, 8, np.random.default_rng(0), held=range(20),
        draws=("logits", "labels"), draw_size=10,
    )  # fmt: skip
    one, other = (np.concatenate(plan.replayed[name]) for name in ("logits", "labels"))
    # Of two draws among 20 rows one in twenty is the same by chance.
    assert (one == other).mean() < 0.12
    assert len({tuple(draw) for draw in plan.replayed["logits"]}) == 60
    assert set(one) == set(range(20))


def test_icarl_answers_the_nearest_mean():
    learner = learned(lifelong.ICaRL(), Memory(12, policy="herding"))
    reader, memory = learner.head.reader(), learner.memory
    x, _ = rows(24, seed=1)

    def unit(rows):
        features = ops.convert_to_numpy(reader(rows)["features"])
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    held = unit(memory.x)
    means = np.stack([held[memory.y == label].mean(0) for label in range(6)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    distances = np.linalg.norm(unit(x)[:, None] - means[None], axis=-1)
    np.testing.assert_array_equal(learner.predict(x), distances.argmin(1))


def test_domains_and_the_accuracy_of_what_is_to_come():
    x, y = rows()
    domain = np.repeat([0, 1], 24)
    tasks = Stream.by_domain(x, y, domain, test=(x, y, domain))
    learner = learned(lifelong.DarkReplay(), Memory(12), of=tasks)
    report = learner.report()
    assert learner.classes.tolist() == list(range(6))
    np.testing.assert_array_equal(report.matrix, learner.report(known_task=True).matrix)
    # The second domain has the same classes, and can be answered before it comes.
    assert report.matrix[0, 1] > 0


def test_fit_is_that_of_keras():
    learner = lifelong.Learner(model(), lifelong.FineTune())
    metric = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")
    learner.compile("sgd", metrics=["accuracy", metric], run_eagerly=True)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=0, min_delta=10.0)
    history = learner.fit(stream()[0], epochs=5, verbose=0, callbacks=[stop], validation_split=0.25)
    assert set(history.history) >= {"loss", "label_loss", "accuracy", "top2", "val_loss"}
    assert len(history.epoch) == 2
    x, y = rows(12, classes=2)
    learner.fit(stream()[1], verbose=0, validation_data=(x + 0 * x, y + 2))


def test_state_on_disk(tmp_path):
    def run(method=None, optimizer=None, tasks=None, **options):
        return learned(
            method or lifelong.DarkReplay(),
            Memory(12),
            of=tasks or stream(),
            optimizer=optimizer,
            folder=tmp_path / "runs",
            **options,
        )

    first = run()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["state.npz"]
    again = run(student=model(seed=5))
    for a, b in zip(first.model.get_weights(), again.model.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert first.report().to_dict() == again.report().to_dict()
    before = (tmp_path / "runs" / "state.npz").read_bytes()
    x, y = rows()
    other = Stream.by_class(x + 1, y, tasks=3, seed=None)
    for options, message in (
        ({"method": lifelong.DarkReplay(alpha=0.9)}, "alpha=0.2"),
        ({"optimizer": keras.optimizers.SGD(0.3)}, "optimizer"),
        ({"tasks": other}, "another training, by task 0: `data`"),
        ({"epochs": 2}, "`epochs` was 1 and is 2"),
        ({"seed": 4}, "`seed`"),
        ({"student": model(width=7)}, "features"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    assert (tmp_path / "runs" / "state.npz").read_bytes() == before
    (tmp_path / "runs" / "state.npz").write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="state.npz"):
        run()


def test_interrupted_in_a_process_that_goes_on(tmp_path):
    """Ctrl-C, and the same task again: as if it had not been."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    weights = []
    for folder, stops in ((None, False), (None, True), (tmp_path, True)):
        learner = lifelong.Learner(model(), lifelong.DarkReplay(), Memory(12), folder, save_freq=1)
        learner.compile(keras.optimizers.SGD(0.1, momentum=0.5), run_eagerly=True)
        for task in list(stream())[:2]:
            if stops:
                with pytest.raises(KeyboardInterrupt):
                    learner.fit(task, batch_size=8, verbose=0, callbacks=[Stop()])
            learner.fit(task, batch_size=8, verbose=0)
        weights.append(learner.model.get_weights())
    for other in weights[1:]:
        for a, b in zip(weights[0], other):
            np.testing.assert_array_equal(a, b)


def fits(learner, task, **options):
    learner.compile("sgd", run_eagerly=True)
    learner.fit(task, verbose=0, **options)


def of_memory(memory, method=None):
    return lifelong.Learner(model(), method or lifelong.Replay(), memory)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: of_memory(None), ValueError, r"memory=keras_kd.lifelong.Memory\(200\)"),
        (lambda: lifelong.Learner(model(), lifelong.FineTune), TypeError, "not the class"),
        (lambda: lifelong.Learner(model(), "der"), TypeError, r"`DarkReplay\(\)`"),
        (lambda: of_memory(200), TypeError, "`memory` is a `Memory`"),
        (lambda: fits(of_memory(Memory(49)), stream()[0]), ValueError, "the whole stream has 48"),
        (lambda: fits(of_memory(Memory(5)), rows()), TypeError, "task of a `Stream`"),
        (lambda: fits(of_memory(Memory(5)), stream()[0], epochs=0), ValueError, "`epochs`"),
        (
            lambda: fits(
                of_memory(Memory(5)), Stream.by_class(rows(features=3)[0], rows()[1], 3)[0]
            ),
            ValueError,
            r"inputs of shape \(4,\)",
        ),
        (lambda: lifelong.DarkReplay(alpha=-1.0), ValueError, "`alpha`"),
        (lambda: lifelong.DarkReplay(forward="seperate"), ValueError, "Did you mean 'separate'"),
        (lambda: lifelong.Replay(batch_size=0), ValueError, "`batch_size` is at least 1"),
        (lambda: lifelong.LearningWithoutForgetting(temperature=0), ValueError, "greater than 0"),
        (lambda: lifelong.ICaRL(loss="bec"), ValueError, "Did you mean 'bce'"),
        (lambda: lifelong.BiasCorrection(held_out=1.0), ValueError, "held_out"),
        (lambda: lifelong.ElasticWeights(decay=2.0), ValueError, "decay"),
        (lambda: lifelong.LessForgetting(rivals=None), TypeError, "`rivals`"),
        (lambda: lifelong.ElasticWeights(samples=None), TypeError, "`samples`"),
        (lambda: lifelong.Learner(model(), lifelong.FineTune(), seed="a"), TypeError, "`seed`"),
        (
            lambda: lifelong.Learner(model(4), lifelong.ICaRL(), Memory(5), classes=range(4)),
            ValueError,
            "`ICaRL` answers by the rows that it has seen",
        ),
        (
            lambda: lifelong.Learner(model(), lifelong.FineTune(), classes=6),
            TypeError,
            "`classes` lists",
        ),
        (
            lambda: fits(of_memory(Memory(5)), stream()[0], validation_data=rows()),
            ValueError,
            r"the classes \[2, 3, 4, 5\], of which no row is trained",
        ),
        (
            lambda: fits(of_memory(Memory(5)), stream()[0], validation_data=rows()[0]),
            ValueError,
            r"`validation_data` is `\(x, y\)`",
        ),
        (
            lambda: fits(of_memory(Memory(5)), stream()[0], validation_split="0.1"),
            TypeError,
            "`validation_split`",
        ),
        (lambda: of_memory(Memory(5)).report(), ValueError, "No task has been learned"),
        (lambda: of_memory(Memory(5)).fit(stream()[0]), ValueError, "before `fit`"),
    ],
)
def test_bad_input(act, error, message):
    with pytest.raises(error, match=message):
        act()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("sparse_categorical_crossentropy", "does not take logits"),
        (keras.losses.SparseCategoricalCrossentropy(), "from_logits=False"),
        (keras.losses.CategoricalCrossentropy(from_logits=True), "one-hot"),
        (keras.losses.MeanSquaredError(), "cannot compare columns"),
        (lambda y, logits: ops.mean(logits), r"gives shape \(\) for 3 rows"),
    ],
)
def test_losses_that_do_not_fit(loss, message):
    learner = lifelong.Learner(model(), lifelong.FineTune())
    with pytest.raises(ValueError, match=message):
        learner.compile("sgd", loss=loss)
    with pytest.raises(ValueError, match="weighted_metrics"):
        learner.compile("sgd", weighted_metrics=[])


def test_tasks_that_cannot_follow():
    learner = learned(lifelong.FineTune(), of=list(stream())[:2])
    before = learner.model.get_weights()
    with pytest.raises(ValueError, match=r"classes \[0, 1\] of .* are known already"):
        learner.fit(stream()[0], verbose=0)
    x, y = rows()
    learner = learned(WeightAligning(), Memory(12), of=list(stream())[:1])
    again = Stream.by_domain(x[y < 2], y[y < 2], np.arange((y < 2).sum()) % 2)[0]
    with pytest.raises(ValueError, match="brings none"):
        learner.fit(again, verbose=0)
    # The labels of such a task would be read nowhere.
    learner = learned(lifelong.ICaRL(), Memory(12), of=list(stream())[:1])
    with pytest.raises(ValueError, match="brings none"):
        learner.fit(again, verbose=0)
    assert before


def test_a_memory_that_is_not_read_is_said_to_be():
    with pytest.warns(UserWarning, match="reads no memory"):
        learner = lifelong.Learner(model(), lifelong.FineTune(), Memory(5))
    assert learner.memory is None
    full = Memory(5)
    full.add(*rows())
    with pytest.raises(ValueError, match="holds 5 rows already"):
        lifelong.Learner(model(), lifelong.Replay(), full)


def test_report_is_plain_values():
    text = json.dumps(learned(lifelong.FineTune()).report().to_dict(), allow_nan=False)
    assert "average_accuracy" in text
