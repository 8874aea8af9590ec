"""`keras-kd robust`, on a saved model and on the committed export."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_kd as kd

DIGITS = Path(__file__).resolve().parents[2] / "exported" / "digits"


@pytest.fixture
def saved(tmp_path):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
    model = keras.Sequential(layers, name="flat")
    data = kd.datasets.load("digits")
    model.compile(
        keras.optimizers.Adam(0.03), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(data.x_train, data.y_train, batch_size=64, epochs=4, verbose=0)
    model.save(tmp_path / "flat.keras")
    return model, data


def test_a_model_is_attacked_and_reported(run, saved, tmp_path):
    model, data = saved
    code, out, err = run(
        *("robust", "flat.keras", "--data", "digits", "--epsilon", "1/10", "--samples", "40"),
        *("--queries", "20", "--corruptions", "contrast,fog", "--severities", "2,4"),
        *("--calibrate-on", "digits", "--html", "r.html", "--json", "--quiet"),
    )
    assert code == 0, err
    document = json.loads(out)
    right = model.predict(data.x_test[:40], verbose=0).argmax(-1) == data.y_test[:40]
    assert document["clean"] == right.mean()
    attacked = kd.robust.attack(
        model, data.x_test[:40], data.y_test[:40], kd.robust.Linf(0.1, steps=20)
    )
    kept = right & (model.predict(attacked, verbose=0).argmax(-1) == data.y_test[:40])
    assert document["attacks"]["pgd"] == kept.mean()
    assert set(document["corrupted"]["fog"]) == {"2", "4"}
    assert document["calibration"]["temperature"] > 0
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_an_exported_file_without_its_model_is_flagged(run):
    code, out, err = run(
        *("robust", DIGITS / "digits_int8.tflite", "--data", "digits", "--epsilon", "0.1"),
        *("--samples", "20", "--queries", "5", "--quiet"),
    )
    assert code == 1, err
    assert "without gradients" in " ".join(out.split())
    assert "adversarial" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.keras", "--data", "digits"), "nowhere.keras"),
        (("nowhere.tflite", "--data", "digits"), "does not exist"),
        (("flat.keras", "--data", "digitz"), "not a data set"),
        (("flat.keras", "--data", "digits", "--epsilon", "0"), "greater than 0"),
        (("flat.keras", "--data", "digits", "--epsilon", "8/0"), "fraction"),
        (("flat.keras", "--data", "digits", "--norm", "l1"), "linf"),
        (("flat.keras", "--data", "digits", "--second-opinion", "art"), "--epsilon"),
        (("flat.keras", "--data", "digits", "--epsilon", "1", "--bounds", "0"), "two numbers"),
        (("flat.keras", "--data", "digits", "--epsilon", ".1", "--bounds", ".5,1"), "bounds"),
        (("flat.keras", "--data", "digits", "--corruptions", "fogg"), "Did you mean 'fog'"),
        (("flat.keras", "--data", "digits", "--severities", "9"), "severities"),
        (("flat.keras", "--data", "digits", "--html", "no/r.html"), "no folder"),
        (("flat.keras", "--data", "bare.npz"), "Store `x` and `y`"),
    ],
)
def test_bad_input_is_one_line(run, saved, tmp_path, arguments, words):
    np.savez(tmp_path / "bare.npz", z=np.zeros(3))
    code, out, err = run("robust", *arguments, "--quiet")
    assert code == 2
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1
