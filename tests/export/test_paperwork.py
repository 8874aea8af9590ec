import csv
import json
import os
import re
import subprocess
import sys

import jsonschema
import pytest

import keras_kd.export
from keras_kd.export import benchmark, manifest, page


def test_the_manifest_follows_its_schema(report):
    schema = manifest.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads((report.folder / "manifest.json").read_text())
    jsonschema.validate(content, schema)
    content["artifacts"][0]["file"] = "../x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_the_card_says_what_was_measured(report, tmp_path):
    text = report.save_card(tmp_path / "card.md").read_text()
    assert text.startswith("# corners\n")
    assert f"Take `{report.best.file}`" in text
    assert "Classes in order: nw, ne, sw, se." in text
    for artifact in report.artifacts:
        assert f"`{artifact.file}`, SHA-256 `{artifact.sha256}`" in text
        assert f"{100 * artifact.accuracy:.2f}" in text
    (tensor,) = next(
        a for a in report.artifacts if (a.format, a.precision) == ("tflite", "int8")
    ).details["signature"]["inputs"]
    assert f"real = (int8 - {tensor['zero_point']}) * {tensor['scale']:.9g}" in text


@pytest.mark.parametrize("name", ["tflite int8", "tflite float32", "onnx int8"])
def test_python_snippets_run_as_they_are(report, name):
    artifact = next(a for a in report.artifacts if f"{a.format} {a.precision}" == name)
    code = report.snippets(artifact)["python"]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=report.folder,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() in {"nw", "ne", "sw", "se"}


def test_snippets_hold_the_files_own_figures(report):
    artifact = next(a for a in report.artifacts if a.file == "model_int8.tflite")
    code = report.snippets(artifact)
    assert set(code) == {"kotlin", "swift", "cpp", "javascript", "python"}
    signature = artifact.details["signature"]
    for language, text in code.items():
        assert str(signature["inputs"][0]["scale"]) in text, language
        assert str(signature["outputs"][0]["zero_point"]) in text, language
        assert not re.search(r"\{\{|\{%|Undefined", text), language
        # Braces of code that was cut off do not match.
        assert text.count("{") == text.count("}"), language
        assert text.count("(") == text.count(")"), language
    assert "1, 8, 8, 1" in code["javascript"]
    onnx = next(a for a in report.artifacts if a.file == "model_int8.onnx")
    for language, text in report.snippets(onnx).items():
        assert '"image"' in text, language
        assert '"logits"' in text, language
        assert text.count("{") == text.count("}"), language


def test_bench_times_every_file_in_its_own_process(report, tmp_path):
    seen = []
    result = keras_kd.export.bench(
        report.folder, seconds=0.02, progress=lambda *event: seen.append(event)
    )
    rows = result.rows()
    files = [f"{a.format} {a.precision}" for a in report.artifacts]
    assert [row["name"] for row in rows] == ["keras (at export)", *files]
    for row in rows[1:]:
        assert row["error"] is None
        assert 0 < row["p50_ms"] <= row["p90_ms"]
        assert row["cold_start_ms"] > 0
        assert row["warm_start_ms"] > 0
        assert row["peak_memory_bytes"] >= 0
    assert seen[-1] == ("bench", 8, 8)
    assert max(map(len, result.table().splitlines())) <= 80
    assert max(map(len, result.table(60).splitlines())) <= 60
    assert "Not shown in 60 columns: warm ms, memory." in result.table(60)
    with open(result.save_csv(tmp_path / "x.csv")) as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    assert json.loads(result.save_json(tmp_path / "x.json").read_text())["rows"] == rows
    assert result.save_svg(tmp_path / "x.svg").read_text().startswith("<svg")


def test_bench_refuses_what_it_cannot_time(report, tmp_path):
    with pytest.raises(ValueError, match="must be positive"):
        keras_kd.export.bench(report.folder, threads=0)
    for seconds in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`seconds` must be a finite number"):
            keras_kd.export.bench(report.folder, seconds=seconds)
        with pytest.raises(ValueError, match="`seconds` must be a finite number"):
            benchmark.time_calls(lambda: None, seconds=seconds)
    with pytest.raises(ValueError, match="`seconds` must be positive"):
        benchmark.time_calls(lambda: None, seconds=-1)
    for arguments in ({"seconds": "1"}, {"threads": 1.5}, {"threads": "two"}, {"threads": None}):
        with pytest.raises(TypeError, match="must be a"):
            keras_kd.export.bench(report.folder, **arguments)
    with pytest.raises(keras_kd.export.ManifestError):
        keras_kd.export.bench(tmp_path)
    with pytest.raises(FileNotFoundError, match="no Keras model"):
        keras_kd.export.bench(report.folder, model=tmp_path / "none.keras")


def test_the_axis_of_a_share_ends_at_100_percent(monkeypatch):
    monkeypatch.setattr(page, "svg", lambda figure: figure)
    rows = [
        {"name": f"f{i}", "best": False, "bytes": 10 * (i + 1), "accuracy": accuracy}
        for i, accuracy in enumerate((0.9, 1.0))
    ]
    low, high = page._scatter(rows, "bytes", "size", 1.0)["svg"].axes[0].get_ylim()
    assert low < 90
    assert high == 100
