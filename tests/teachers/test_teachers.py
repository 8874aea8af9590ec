"""What stands as a teacher: one model, or several."""

import math

import keras
import numpy as np
import pytest
from keras import layers
from small_models import CLASSES, FEATURES, Counted, crossentropy, kl, log_softmax, mlp, rows

import keras_kd as kd
from keras_kd import teachers
from keras_kd.teachers import Ensemble


def three():
    models = [mlp(width=7, name=f"teacher{i}") for i in range(3)]
    for model in models:
        model.set_weights([4 * w for w in model.get_weights()])
    return models


def distillation(student, teacher, x, **options):
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), loss=None, **{"temperature": 2.0, **options})
    return distiller.train_on_batch(x, return_dict=True)["distillation_loss"]


@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 1.0]])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_the_combination(combine, weights):
    models, student = three(), mlp(name="student")
    x, _ = rows()
    w = np.array(weights or [1.0, 1.0, 1.0])
    w = w / w.sum()
    each = [np.array(model(x), "float64") for model in models]
    if combine == "logits":
        mixed = sum(a * z for a, z in zip(w, each))
    else:
        mixed = np.log(sum(a * np.exp(log_softmax(z)) for a, z in zip(w, each)))
    got = distillation(student, Ensemble(models, weights, combine), x)
    np.testing.assert_allclose(got, kl(mixed, student(x), 2.0).mean(), rtol=1e-4)


def test_a_list_is_an_ensemble_of_equal_weights():
    models, student = three(), mlp(name="student")
    x, _ = rows()
    assert distillation(student, models, x) == pytest.approx(
        distillation(student, Ensemble(models), x), 1e-6
    )


def test_an_ensemble_of_one_is_the_model():
    model, student = three()[0], mlp(name="student")
    x, _ = rows()
    expected = kl(model(x), student(x), 2.0).mean()
    assert distillation(student, [model], x) == pytest.approx(expected, 1e-4)


def test_the_mixture_of_confident_models_stays_finite():
    models = [mlp(name=f"teacher{i}") for i in range(2)]
    for i, model in enumerate(models):
        model.set_weights([0 * w for w in model.get_weights()])
        model.layers[-1].bias.assign([300.0 * (j == i) for j in range(CLASSES)])
    student = mlp(name="student")
    x, _ = rows()
    mixed = np.where(np.arange(CLASSES) < 2, math.log(0.5), -300.0 + math.log(0.5))
    got = distillation(student, models, x, temperature=1.0)
    expected = kl(np.broadcast_to(mixed, (len(x), CLASSES)), student(x), 1.0).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_sigmoid_models_mix_their_probabilities():
    models = [mlp(classes=2, activation="sigmoid", name=f"teacher{i}") for i in range(2)]
    student = mlp(classes=2, activation="sigmoid", name="student")
    x, _ = rows()
    p = np.mean([np.array(m(x), "float64") for m in models], axis=0)
    t, q = np.log(p / (1 - p)), np.array(student(x), "float64")
    p, q = (1 / (1 + np.exp(-z / 2)) for z in (t, np.log(q / (1 - q))))
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    got = distillation(student, models, x)
    np.testing.assert_allclose(got, 4 * each.sum(-1).mean(), rtol=1e-3)


def test_softmax_and_logit_models_mix():
    models = [mlp(activation="softmax", name="a"), mlp(name="b")]
    student = mlp(name="student")
    x, _ = rows()
    p = (np.array(models[0](x), "float64") + np.exp(log_softmax(models[1](x)))) / 2
    got = distillation(student, models, x)
    np.testing.assert_allclose(got, kl(np.log(p), student(x), 2.0).mean(), rtol=1e-3)


def test_layers_of_one_of_them():
    models, student = three(), mlp(width=7, name="student")
    x, _ = rows()
    hint = kd.Transfer(kd.losses.Hint(), "teacher1/hidden", "hidden")
    features = [
        np.array(keras.Model(m.input, m.get_layer("hidden").output)(x))
        for m in (models[1], student)
    ]
    got = distillation(student, models, x, distillation_loss=hint)
    np.testing.assert_allclose(got, ((features[0] - features[1]) ** 2).mean(), rtol=1e-4)


def test_each_model_runs_once_a_step():
    def counted(name):
        inputs = keras.Input((FEATURES,))
        return keras.Model(inputs, layers.Dense(CLASSES)(Counted(name="c")(inputs)), name=name)

    models = [counted("a"), counted("b")]
    distiller = kd.Distiller(mlp(name="student"), models)
    distiller.compile("sgd", loss=crossentropy(), run_eagerly=True)
    x, y = rows()
    distiller.train_on_batch(x, y)
    for model in models:
        model.get_layer("c").calls.clear()
    distiller.train_on_batch(x, y)
    assert [model.get_layer("c").calls for model in models] == [[False], [False]]


def test_an_ensemble_resumes_and_another_one_is_refused(tmp_path):
    models, student = three(), mlp(name="student")
    distiller = kd.Distiller(student, Ensemble(models, [1, 2, 3]))
    distiller.compile("sgd", loss=crossentropy())
    x, y = rows()
    distiller.fit(x, y, verbose=0)
    distiller.save(tmp_path / "d.keras")
    again = kd.load_distiller(tmp_path / "d.keras", teacher=Ensemble(models, [1, 2, 3]))
    assert again.fit(x, y, verbose=0).history == distiller.fit(x, y, verbose=0).history
    with pytest.raises(ValueError, match=r"teacher `teacher0\+teacher1\+teacher2`"):
        kd.load_distiller(tmp_path / "d.keras", teacher=Ensemble(models))


def test_errors():
    models = three()
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])
    with pytest.raises(ValueError, match="`combine`.*'mean'"):
        Ensemble(models, combine="mean")
    for weights in ([1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="`weights`.*one positive number"):
            Ensemble(models, weights)
    with pytest.raises(ValueError, match=r"`hidden` does not say which model.*`teacher0`"):
        distillation(
            mlp(width=7),
            models,
            rows()[0],
            distillation_loss=kd.Transfer(kd.losses.Hint(), "hidden", "hidden"),
        )
    with pytest.raises(ValueError, match="(?i)classes"):
        Ensemble([mlp(classes=3, name="a"), mlp(classes=4, name="b")])


def test_the_fingerprint():
    model = mlp(name="one")
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    twin.name = "two"
    assert teachers.fingerprint(model) == teachers.fingerprint(twin)
    twin.layers[-1].bias.assign([1e-7, 0, 0, 0])
    assert teachers.fingerprint(model) != teachers.fingerprint(twin)
    # The same weights behind another activation say something else.
    other = mlp(activation="softmax")
    other.set_weights(model.get_weights())
    assert teachers.fingerprint(model) != teachers.fingerprint(other)


def test_the_teacher_is_what_was_given():
    model = mlp(name="teacher")
    assert kd.Distiller(mlp(), model).teacher is model
    ensemble = Ensemble([model, mlp(name="b")])
    assert kd.Distiller(mlp(), ensemble).teacher is ensemble
    assert kd.Distiller(mlp()).teacher is None
