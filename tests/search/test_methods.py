"""Methods compared by training them: `best_method`, and `compile(distillation_loss="auto")`."""

import keras
import numpy as np
import pytest
from small_models import crossentropy, mlp, rows

import keras_kd as kd
from keras_kd.distill import candidates, method_choice, trial_setting
from keras_kd.distill.candidates import CANDIDATES, Made, Situation
from keras_kd.distill.row_errors import RowErrors
from keras_kd.distill.training_rows import Rows


@pytest.fixture(scope="module")
def taught():
    """A teacher that knows the classes of linear data, and the data."""
    x = np.random.default_rng(0).normal(size=(260, 6)).astype("float32")
    y = (x[:, :4] + 0.3 * x[:, 2:]).argmax(1)
    teacher = mlp(width=24, name="teacher")
    teacher.compile(keras.optimizers.Adam(0.03), crossentropy())
    teacher.fit(x[:200], y[:200], epochs=12, verbose=0)
    return teacher, (x[:200], y[:200]), (x[200:], y[200:])


def student():
    return mlp(width=3, name="student")


def situation(**options):
    teacher = mlp(width=9, name="teacher")
    given = {"hard": crossentropy(), "told": "classes", "classes": 4, "student": student()}
    return Situation(**{**given, "teacher": teacher, "x": rows(4)[0], **options})


def made(name, **options):
    return CANDIDATES[name](situation(**options))


def test_weights_shrink_with_the_number_of_classes():
    for classes, wanted in ((3, 9.0), (10, 9.0), (100, 0.9), (1000, 0.09)):
        found = made("standardized", classes=classes).arguments
        assert found["distillation_loss_weight"] == pytest.approx(wanted)
        assert found["student_loss_weight"] == 0.1
    for classes, wanted in ((10, 2.0), (100, 0.2), (160, 0.125), (1000, 0.125)):
        found = made("dist", classes=classes).arguments
        assert found["distillation_loss_weight"] == pytest.approx(wanted)
        assert found["distillation_loss"].temperature == 4


def test_candidates_fit_what_the_outputs_mean():
    def applying(**options):
        return [name for name in CANDIDATES if isinstance(made(name, **options), Made)]

    always = ["plain", "default", "answers"]
    assert applying() == [*always, "standardized", "dist", "features"]
    assert applying(told="values", classes=1, hard="mse") == [*always, "huber", "features"]
    binary = {"told": "independent", "hard": "binary_crossentropy"}
    assert applying(**binary) == [*always, "soft", "features"]
    assert applying(classes=2) == [*always, "features"]
    assert applying(told=None, classes=None) == ["plain", "default"]
    assert applying(teacher=None) == [*always, "standardized", "dist"]
    alone = made("answers", told="values", classes=1, hard="mse").arguments
    assert (alone["alpha"], alone["distillation_loss"].name) == (0.0, "logit_mse")
    summed = crossentropy(reduction="sum")
    assert made("dist", hard=summed).arguments["distillation_loss"].reduction == "sum"


def test_the_last_layers_that_match_are_compared_by_their_kind():
    def net(filters, name):
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(filters, 3, name="conv"),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(4),
            ],
            name=name,
        )

    found = made("features", student=net(2, "s"), teacher=net(5, "t"), x=np.zeros((1, 8, 8, 1)))
    assert found.taps == ("conv",)
    assert found.features == 6 * 6 * 5
    assert found.arguments["distillation_loss"][0].name == "soft_targets"
    assert made("features").taps == ("hidden",)
    assert isinstance(made("features", student=net(2, "s")), str)
    prepared = method_choice.prepared({"features": CANDIDATES["features"]}, situation(), 10**8)
    assert prepared["features"][1] == "the teacher's layers would take 3.6 GB"


def test_the_best_method_is_found_and_repeats(taught, tmp_path, capsys):
    teacher, train, validation = taught
    asked = []

    class Counting(kd.teachers.ModelTeacher):
        def read(self, x, record, units):
            asked.append(1)
            return super().read(x, record, units)

    options = {"methods": ["standardized", "features"], "seeds": 2, "epochs": 3}
    found = kd.search.best_method(
        student, Counting(teacher), train, validation, folder=tmp_path / "f", **options
    )
    said = capsys.readouterr().out
    assert "Trying 3 methods (plain, standardized, features) with 2 seeds: at most 6" in said
    assert "3 epochs of 200 rows each; the teacher is asked once about 200 rows. 60 rows" in said
    assert said.index("Trying") < said.index("training")
    rows = {row["method"]: row for row in found.rows()}
    assert list(rows) == ["plain", "standardized", "features"]
    assert rows["standardized"]["seeds"] == rows["plain"]["seeds"] == 2
    assert found.best in rows
    assert found.verdict in said
    assert found.student is not None or found.best not in rows
    # A cache of 200 rows and a look at the first few: never in the trainings.
    assert len(asked) < 12
    before = len(asked)
    again = kd.search.best_method(
        student, teacher, train, validation, folder=tmp_path / "f", verbose=0, **options
    )
    assert [row["error"] for row in again.rows()] == [row["error"] for row in found.rows()]
    assert (again.best, again.verdict) == (found.best, found.verdict)
    assert len(asked) == before
    assert capsys.readouterr().out == ""
    with pytest.raises(FileExistsError, match="holds another search: its settings differ"):
        kd.search.best_method(
            student, teacher, train, validation, folder=tmp_path / "f", **{**options, "epochs": 4}
        )


def test_equal_methods_leave_plain_training(taught):
    teacher, train, validation = taught
    found = kd.search.best_method(
        student,
        teacher,
        train,
        validation,
        methods={"nothing": {"alpha": 1.0}},
        seeds=2,
        epochs=1,
        verbose=0,
    )
    rows = {row["method"]: row for row in found.rows()}
    # The same seeds: the same weights, the same order of the rows, the same student.
    assert rows["nothing"]["error"] == rows["plain"]["error"]
    assert rows["nothing"]["gain"] == 0
    assert found.best == "plain"
    assert found.arguments == {"alpha": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"methods": ["dits"]}, ValueError, "Did you mean 'dist'"),
        ({"methods": []}, ValueError, "names nothing beside plain"),
        ({"methods": 3}, TypeError, "`methods` is"),
        ({"methods": {"own": {"alhpa": 1}}}, ValueError, "Did you mean 'alpha'"),
        ({"methods": {"own": 3}}, TypeError, "The method 'own'"),
        ({"methods": {"plain": {"alpha": 1}}}, ValueError, "Choose another name"),
        ({"seeds": 0}, ValueError, "`seeds` is at least 1"),
        ({"seeds": [1, 1]}, ValueError, "different seeds"),
        ({"epochs": 0}, ValueError, "`epochs` is at least 1"),
        ({"seeds": "ab"}, TypeError, "`seeds` is a whole number"),
        ({"seeds": [1.5]}, TypeError, "`seeds` is a whole number"),
        ({"seeds": True}, TypeError, "`seeds` is a whole number"),
        ({"student_fn": lambda values: mlp()}, TypeError, "called with no arguments"),
        ({"train": (rows()[0], rows()[1] + 5)}, ValueError, "numbered 0 to 3"),
        ({"validation": (rows()[0], rows()[1] - 1)}, ValueError, "`y` of `validation` holds"),
        ({"train": (rows()[0], np.full(12, np.nan)), "loss": "mse"}, ValueError, "NaN"),
        ({"student_fn": mlp()}, TypeError, "a function that returns a new student"),
        ({"student_fn": lambda: 3}, TypeError, "returns a `keras.Model`"),
        ({"teacher": None}, TypeError, "there is none"),
        ({"train": rows()[0]}, TypeError, "`train` is `.x, y.`"),
        ({"train": (rows()[0],)}, ValueError, "Received: 1 of them"),
        ({"train": (rows()[0], rows(9)[1])}, ValueError, "arrays of 9, 12 rows"),
        ({"validation": rows(features=5)}, ValueError, "Prepare both alike"),
        ({"train": (rows()[0] * np.nan, rows()[1])}, ValueError, "NaN or infinite"),
        ({"train": (rows()[0], np.array(["a"] * 12))}, ValueError, "which loss compares"),
    ],
)
def test_bad_input_is_refused_before_any_training(change, error, words, monkeypatch):
    monkeypatch.setattr(kd.Distiller, "fit", None)
    given = {
        "student_fn": student,
        "teacher": mlp(width=9),
        "train": rows(),
        "validation": rows(),
        **change,
    }
    with pytest.raises(error, match=words):
        kd.search.best_method(**given)


# ------------------------------------------------------------------------ auto


def compiled(teacher, **options):
    distiller = kd.Distiller(student(), teacher)
    distiller.compile(
        keras.optimizers.Adam(0.02),
        crossentropy(),
        distillation_loss="auto",
        # A few steps take less time than making them fast.
        run_eagerly=True,
        **options,
    )
    return distiller


@pytest.fixture
def few(monkeypatch):
    """Two candidates and two seeds, which take less time."""
    chosen = {name: CANDIDATES[name] for name in ("plain", "standardized")}
    monkeypatch.setattr("keras_kd.distill.auto.CANDIDATES", chosen)
    monkeypatch.setattr("keras_kd.distill.auto.SEEDS", 2)
    monkeypatch.setattr("keras_kd.distill.auto.MORE", 0)


def test_auto_chooses_at_the_start_of_the_first_fit(taught, few, capsys, monkeypatch):
    teacher, (x, y), _ = taught
    seen = []
    choose = method_choice.choose

    def watched(setting, *args, **options):
        seen.append((setting.train, setting.validation, setting.epochs, setting.batch_size))
        return choose(setting, *args, **options)

    monkeypatch.setattr(method_choice, "choose", watched)
    distiller = compiled(teacher)
    weights = distiller.student.get_weights()
    at_start = []
    note = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: at_start.append(distiller.student.get_weights())
    )
    keras.utils.set_random_seed(5)
    distiller.fit(x, y, epochs=2, batch_size=45, validation_split=0.25, verbose=2, callbacks=[note])
    out = capsys.readouterr().out
    assert "auto: Trying 2 methods (plain, standardized) with 2 seeds: at most 4" in out
    assert out.index("auto: Trying") < out.index("Epoch 1/2")
    ((train, held, epochs, batch_size),) = seen
    # A tenth of the rows that `fit` trains on; those it validates on are never looked at.
    assert (train.count, held.count, epochs, batch_size) == (135, 15, 2, 45)
    together = np.concatenate([train.x, held.x])
    np.testing.assert_array_equal(np.sort(together, 0), np.sort(x[:150], 0))
    for before, after in zip(weights, at_start[0], strict=True):
        np.testing.assert_array_equal(before, after)
    choice = distiller.method_choice
    assert choice.best in ("plain", "standardized")
    assert f"auto: {choice.verdict}" in out
    plain = choice.best == "plain"
    assert float(distiller.alpha) == (1.0 if plain else 0.5)
    distiller.fit(x, y, epochs=1, verbose=0)
    assert len(seen) == 1, "only the first fit chooses"


def test_auto_trains_as_the_method_that_it_chose_would(taught, few):
    teacher, (x, y), _ = taught

    def weights(**options):
        keras.utils.set_random_seed(2)
        distiller = kd.Distiller(student(), teacher)
        distiller.compile(keras.optimizers.Adam(0.02), crossentropy(), run_eagerly=True, **options)
        distiller.fit(x, y, epochs=2, batch_size=70, verbose=0)
        return distiller

    auto = weights(distillation_loss="auto")
    same = weights(**auto.method_choice.arguments)
    for a, b in zip(auto.student.get_weights(), same.student.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_auto_reads_datasets_and_joined_answers(taught, few, tmp_path):
    import tensorflow as tf

    teacher, (x, y), _ = taught
    x, y = x[:120], y[:120]
    kd.cache.write(teacher, x, tmp_path / "c")
    cached = kd.teachers.CachedTeacher(tmp_path / "c")
    data = tf.data.Dataset.from_tensor_slices((x, y))
    distiller = compiled(cached)
    distiller.fit(cached.join(data).shuffle(120).batch(40), epochs=1, verbose=0)
    assert distiller.method_choice.rows()[1]["seeds"] > 0
    distiller = compiled(cached)
    distiller.fit(x, y, epochs=1, batch_size=40, verbose=0)
    assert distiller.method_choice.rows()[1]["seeds"] > 0


def test_auto_holds_out_labeled_rows_alone_and_others_with_each_seed(taught, few, monkeypatch):
    teacher, (x, y), _ = taught
    seen = []

    def once(setting, teacher, candidate, method, seed, situation):
        answers = teacher.fetch(np.arange(setting.train.count))
        seen.append((method.name, seed, setting.train, setting.validation, answers))
        count = setting.validation.count
        return RowErrors(np.zeros(count), np.ones(count)), None

    monkeypatch.setattr(method_choice, "_once", once)
    y = np.where(np.arange(200) < 120, y, -1)
    distiller = kd.Distiller(student(), teacher)
    distiller.compile(
        "sgd", crossentropy(ignore_class=-1), distillation_loss="auto", run_eagerly=True
    )
    distiller.fit(x, y, epochs=1, batch_size=200, verbose=0)
    assert [each[:2] for each in seen] == [
        *(("plain", 0), ("standardized", 0)),
        *(("plain", 1), ("standardized", 1)),
    ]
    held = [each[3] for each in seen[::2]]
    assert [each.count for each in held] == [12, 12]
    assert min(each.y.min() for each in held) >= 0
    assert len(np.unique(np.concatenate([each.x for each in held]), axis=0)) == 24
    for _, _, train, validation, answers in seen:
        together = np.concatenate([train.x, validation.x])
        np.testing.assert_array_equal(np.sort(together, 0), np.sort(x, 0))
        [logits] = [value for value in answers.values() if value.ndim == 2]
        np.testing.assert_allclose(logits, teacher(train.x), rtol=1e-4, atol=1e-4)
    assert distiller.method_choice.best == "plain"


def chosen_of(monkeypatch, errors, more=(3, 4, 5)):
    """What is chosen of methods with these errors, `(seeds, rows)`, and what was trained."""
    trained = []

    def once(setting, teacher, candidate, method, seed, situation):
        trained.append((method.name, seed))
        wrong = errors[method.name][seed]
        return RowErrors(wrong, np.ones(len(wrong)), wrong + 0.1, wrong + 0.1), None

    monkeypatch.setattr(method_choice, "_once", once)
    methods = {name: (None, Made({"alpha": 0.1})) for name in errors}
    setting = trial_setting.Setting(
        None, lambda seed: student(), *(Rows(*rows(20)),) * 2, crossentropy(), None, 1, 8
    )
    choice = method_choice.choose(
        setting,
        methods,
        None,
        range(3),
        situation=None,
        folds=lambda seed: (setting, None),
        more=more,
    )
    return choice, trained


def test_more_seeds_decide_where_the_first_ones_leave_it_open(monkeypatch):
    rng = np.random.default_rng(3)
    plain = (rng.uniform(size=(6, 100)) < 0.2).astype("float64")
    some, few = plain.copy(), plain.copy()
    for seed, wrong in enumerate(plain):
        some[seed, np.flatnonzero(wrong)[: (1, 3, 1, 3, 2, 2)[seed]]] = 0
        few[seed, np.flatnonzero(wrong)[:6]] = 0
    worse = np.minimum(plain + (rng.uniform(size=(6, 100)) < 0.2), 1)
    given = {"plain": plain, "default": some, "dist": worse}
    found, trained = chosen_of(monkeypatch, given)
    assert trained[-6:] == [(name, seed) for seed in (3, 4, 5) for name in ("plain", "default")]
    assert found.best == "default"
    seeds = [(row["method"], row["seeds"]) for row in found.rows()]
    assert seeds == [("plain", 6), ("default", 6), ("dist", 1)]
    assert chosen_of(monkeypatch, given, more=())[0].best == "plain"
    # Clearly worse than another is out too, however much better than plain training.
    found, trained = chosen_of(monkeypatch, {**given, "right": np.zeros((6, 100))})
    assert [seed for name, seed in trained if name == "default"] == [0]
    assert found.best == "right"
    # Settled already, for one of them or against all.
    for errors, best in (
        ({**given, "dist": few}, "dist"),
        ({"plain": plain, "dist": worse}, "plain"),
    ):
        found, trained = chosen_of(monkeypatch, errors)
        assert (found.best, max(seed for _, seed in trained)) == (best, 2)


def test_auto_says_what_it_cannot_do(taught):
    teacher, (x, y), _ = taught
    for name, value in (("alpha", 0.3), ("temperature", 2.0), ("batch_transform", len)):
        with pytest.raises(ValueError, match=f"Leave `{name}` out"):
            compiled(teacher, **{name: value})
    distiller = compiled(teacher)
    with pytest.raises(ValueError, match="at least 10 of them. Received: 50 rows"):
        distiller.fit(x[:50], y[:50], verbose=0)
    with pytest.raises(ValueError, match="there are none"):
        distiller.fit(x, verbose=0)
    with pytest.raises(ValueError, match="can be read once"):
        distiller.fit(iter([(x, y)]), verbose=0)
    distiller = kd.Distiller(student(), teacher)
    distiller.compile("sgd", None, distillation_loss="auto")
    with pytest.raises(ValueError, match="a hard `loss`"):
        distiller.fit(x, y, verbose=0)


def test_auto_of_a_regression_has_a_loss_to_begin_with():
    assert (
        candidates.CANDIDATES["default"](situation(told="values", hard="mse"))
        .arguments["distillation_loss"]
        .name
        == "logit_mse"
    )
    inputs = keras.Input((6,))
    one = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    two = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    distiller = kd.Distiller(one, two)
    distiller.compile("sgd", "mse", distillation_loss="auto")
    assert distiller.chooses_method
