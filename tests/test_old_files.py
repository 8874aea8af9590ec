"""Files of an earlier version load and prove themselves; `fixtures/write.py` made them."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_kd as kd
from keras_kd.utils.lazy_registration import CLASSES

PACKAGE = Path(kd.__file__).parent
OLD = Path(__file__).parent / "fixtures" / "v1"


def network(name, units):
    return keras.Sequential(
        [
            keras.Input((6,), name="rows"),
            keras.layers.Dense(units, activation="relu", name="hidden"),
            keras.layers.Dense(3, name="logits"),
        ],
        name=name,
    )


@pytest.fixture(scope="module")
def answers():
    with np.load(OLD / "answers.npz") as arrays:
        return dict(arrays)


def test_every_registered_class_is_found_before_its_module(tmp_path):
    named = {f"keras_kd>{name}" for names in CLASSES.values() for name in names}
    source = "".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))
    pattern = r'register_keras_serializable\(package="keras_kd"\)\nclass (\w+)'
    assert {f"keras_kd>{name}" for name in re.findall(pattern, source)} == named
    for module, names in CLASSES.items():
        assert all(hasattr(importlib.import_module(module), name) for name in names)


def test_a_distiller_is_found_though_its_module_moved():
    code = (
        "import sys, keras, keras_kd as kd\n"
        "assert 'keras_kd.distill' not in sys.modules\n"
        "print(type(keras.saving.load_model(sys.argv[1])).__module__)\n"
    )
    command = [sys.executable, "-c", code, str(OLD / "distiller.keras")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split()[-1] == "keras_kd.distill.distiller"


def test_a_distiller_goes_on_training(answers):
    teacher = network("teacher", 8)
    teacher.set_weights([answers[f"teacher_{i}"] for i in range(4)])
    distiller = kd.load_distiller(OLD / "distiller.keras", teacher)
    x, y = answers["x"], answers["y"]
    np.testing.assert_allclose(
        distiller.student.predict(x, verbose=0), answers["student"], atol=1e-5
    )
    assert [type(t.loss).__name__ for t in distiller.transfers] == ["SoftTargets", "Hint"]
    before = [np.array(w) for w in distiller.student.get_weights()]
    history = distiller.fit(x, y, batch_size=16, verbose=0).history
    assert history["alpha"] == [pytest.approx(0.3)]
    assert history["temperature"] == [pytest.approx(3.0)]
    assert any((a != b).any() for a, b in zip(before, distiller.student.get_weights(), strict=True))


def test_a_compressed_model_answers_as_it_did(answers):
    model = keras.saving.load_model(OLD / "compressed.keras")
    np.testing.assert_allclose(
        model.predict(answers["x"], verbose=0), answers["compressed"], atol=1e-4
    )
    assert kd.compress.is_calibrated(model)
    assert kd.compress.sparsity(kd.compress.finalize(model)) == pytest.approx(0.5, abs=0.05)


def test_a_cache_stands_for_its_teacher(answers):
    teacher = kd.teachers.CachedTeacher(OLD / "cache")
    x, y = answers["x"], answers["y"]
    student = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="logits")])
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss=kd.losses.LogitMSE(),
    )
    found = distiller.fit(x, y, batch_size=48, verbose=0, shuffle=False).history
    # Answers are stored in float16.
    want = np.mean((answers["teacher"] - student.predict(x, verbose=0)) ** 2)
    assert found["distillation_loss"] == [pytest.approx(want, rel=5e-3)]


def test_an_export_is_verified_and_replaced(answers, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(OLD / "export", folder)
    facts = json.loads((OLD / "facts.json").read_text())
    report = kd.export.Report.load(folder)
    assert report.manifest["schema"] == 1
    assert report.best.file == facts["best"]
    assert [artifact.files for artifact in report.artifacts] == [
        (artifact.path,) for artifact in report.artifacts
    ]
    checked = kd.export.verify(folder)
    assert checked.ok, checked.problems
    assert {a.file: a.accuracy for a in checked.artifacts} == pytest.approx(facts["accuracy"])
    run = kd.export.load(folder / "old_float32.onnx")
    np.testing.assert_allclose(run(answers["x"]), answers["student"], atol=1e-4)
    assert "old_int8.tflite" in report.table()
    assert report.runtimes()["old_int8.tflite"]["litert"] == "yes"
    assert len(report.save_card(tmp_path / "card.md").read_text()) > 100
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "best": None}))
    with pytest.raises(kd.export.ManifestError, match="changed after the export"):
        kd.export.verify(folder)
