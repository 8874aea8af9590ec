"""The committed files of exported/digits: whole, loadable, and as accurate as their README says."""

import re
from pathlib import Path

import numpy as np
import pytest

import keras_kd.export
from keras_kd import datasets
from keras_kd.export.formats.runtime import open_file, run_all
from keras_kd.export.manifest import digest

FOLDER = Path(__file__).parents[2] / "exported" / "digits"
TEXT = (FOLDER.parent / "README.md").read_text(encoding="utf-8")


def test_the_folder_holds_what_the_manifest_says():
    report = keras_kd.export.Report.load(FOLDER)
    files = {artifact.file for artifact in report.artifacts}
    assert files == {"digits_int8.tflite", "digits_int8.onnx"}
    assert {path.name for path in FOLDER.iterdir()} == {*files, "manifest.json", "evaluation.npz"}
    for artifact in report.artifacts:
        assert artifact.passed
        assert artifact.sha256 == digest(artifact.path)
        assert artifact.bytes == artifact.path.stat().st_size


@pytest.mark.parametrize("name", ["digits_int8.tflite", "digits_int8.onnx"])
def test_a_file_has_the_stated_accuracy_and_size(name):
    data = datasets.load("digits")
    stated = re.search(rf"`{name}` \| ([\d,]+) \| ([\d.]+) %", TEXT)
    assert stated, f"exported/README.md states no size and accuracy of {name}"
    runtime = open_file(FOLDER / name)
    outputs = run_all(runtime, {"image": data.x_test})["logits"]
    accuracy = np.mean(outputs.argmax(axis=-1) == data.y_test)
    # Another processor may round one sample the other way.
    assert abs(100 * accuracy - float(stated[2])) <= 100 * 1.01 / len(data.x_test)
    assert (FOLDER / name).stat().st_size == int(stated[1].replace(",", ""))


def test_the_ten_lines_of_the_readme_run(monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parents[1])
    codes = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "exported/README.md", "exec"), {})
    # The first image of the source is a zero.
    assert capsys.readouterr().out.split() == ["0", "0"]
