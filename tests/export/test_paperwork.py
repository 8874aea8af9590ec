import csv
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import keras_kd.export
from keras_kd.export import checks, manifest
from keras_kd.export.report import plots, snippets
from keras_kd.export.verification import benchmark, timing


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
    assert "Not shown in 60 columns: warm ms, memory, cold ms." in result.table(60)
    with open(result.save_csv(tmp_path / "x.csv")) as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    assert json.loads(result.save_json(tmp_path / "x.json").read_text())["rows"] == rows
    assert result.save_svg(tmp_path / "x.svg").read_text().startswith("<svg")


def test_bench_refuses_what_it_cannot_time(report, tmp_path):
    with pytest.raises(ValueError, match="must be positive"):
        keras_kd.export.bench(report.folder, threads=0)
    with pytest.raises(ValueError, match="`threads` is at most 1024.*threads=100000"):
        keras_kd.export.bench(report.folder, threads=100_000)
    for seconds in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`seconds` must be a finite number"):
            keras_kd.export.bench(report.folder, seconds=seconds)
        with pytest.raises(ValueError, match="`seconds` must be a finite number"):
            timing.time_calls(lambda: None, seconds=seconds)
    with pytest.raises(ValueError, match="`seconds` must be positive"):
        timing.time_calls(lambda: None, seconds=-1)
    for arguments in ({"seconds": "1"}, {"threads": 1.5}, {"threads": "two"}, {"threads": None}):
        with pytest.raises(TypeError, match="must be a"):
            keras_kd.export.bench(report.folder, **arguments)
    with pytest.raises(keras_kd.export.ManifestError):
        keras_kd.export.bench(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.keras` does not exist"):
        keras_kd.export.bench(report.folder, model=tmp_path / "none.keras")


def test_the_axis_of_a_share_ends_at_100_percent(monkeypatch):
    monkeypatch.setattr(plots, "svg", lambda figure: figure)
    rows = [
        {"name": f"f{i}", "best": False, "bytes": 10 * (i + 1), "accuracy": accuracy}
        for i, accuracy in enumerate((0.9, 1.0))
    ]
    low, high = plots.scatter(rows, "bytes", "size", 1.0)["svg"].axes[0].get_ylim()
    assert low < 90
    assert high == 100


def test_the_plot_of_files_that_do_not_run_is_empty_and_no_error():
    figures = ("bytes", "p50_ms", "p90_ms", "cold_start_ms", "warm_start_ms", "peak_memory_bytes")
    row = {**dict.fromkeys(figures), "name": "onnx int8", "error": "it crashed. " * 20}
    result = benchmark.BenchReport([row], 1)
    assert plots.png(plots.bench_figure(result.rows())).startswith(b"\x89PNG")
    lines = result.table(46).splitlines()
    assert max(map(len, lines)) <= 46
    assert " ".join(lines).count("crashed.") == 20


def artifact(fmt, inputs, outputs):
    details = {"signature": {"inputs": inputs, "outputs": outputs}}
    fields = dict.fromkeys(field.name for field in dataclasses.fields(keras_kd.export.Artifact))
    known = {"format": fmt, "path": Path(f"m.{fmt}"), "details": details, "flags": ()}
    return keras_kd.export.Artifact(**{**fields, **known})


def test_swift_addresses_tensors_by_name():
    # The order of the signature is that of the names, that of the interpreter is the model's.
    inputs = [{"name": name, "shape": ["batch", 3], "dtype": "float32"} for name in ("a", "z")]
    code = snippets.snippets(artifact("tflite", inputs, inputs[:1]), None)["swift"]
    assert 'toInputNamed: "a"' in code
    assert 'toInputNamed: "z"' in code
    assert 'output(named: "a")' in code
    assert "At:" not in code


@pytest.mark.parametrize("fmt", ["tflite", "onnx"])
def test_names_are_written_as_each_language_reads_them(fmt):
    tensor = {"name": 'é "$x" 🙂', "shape": [1, 2], "dtype": "float32"}
    code = snippets.snippets(artifact(fmt, [tensor], [tensor]), ["a $5 note", "b"])
    assert '"a \\$5 note"' in code["kotlin"]
    assert '"é \\"\\$x\\" 🙂"' in code["kotlin"]
    for language in ("swift", "cpp", "javascript", "python"):
        assert '"é \\"$x\\" 🙂"' in code[language], language
        assert "\\u" not in code[language], language


def test_kotlin_buffers_have_the_type_of_the_input():
    tensors = [
        {"name": kind, "shape": [1, 4], "dtype": kind} for kind in ("uint8", "int64", "float32")
    ]
    code = snippets.snippets(artifact("onnx", tensors, tensors[2:]), None)
    assert "ByteBuffer.allocateDirect(4)" in code["kotlin"]
    assert "OnnxJavaType.UINT8," in code["kotlin"]
    assert "LongBuffer.wrap(LongArray(4))" in code["kotlin"]
    assert "FloatBuffer.wrap(FloatArray(4))" in code["kotlin"]
    for kind in ("OnnxJavaType", "ByteBuffer", "LongBuffer", "FloatBuffer"):
        assert len(re.findall(rf"import \S+\.{kind}\n", code["kotlin"])) == 1
    assert "elementType: .uInt8" in code["swift"]
    assert "it.rewind()" in snippets.snippets(artifact("tflite", tensors, tensors), None)["kotlin"]


@pytest.mark.parametrize("values", [(0.0014, 0.02), (0.03, 0.2), (0.002, 8.0), (0.001, 900.0)])
def test_labels_of_a_logarithmic_axis_do_not_overlap(values):
    figure = plots.empty_figure(3.3, 1.6)
    axes = figure.subplots()
    axes.scatter(values, [0] * len(values))
    plots._log_scale(axes)
    axes.tick_params(labelsize=7, which="both")
    figure.draw_without_rendering()
    labels = [*axes.get_xticklabels(which="major"), *axes.get_xticklabels(which="minor")]
    low, high = axes.get_xlim()
    places = sorted(
        (box.x0, box.x1)
        for label in labels
        if label.get_text() and low <= label.get_position()[0] <= high
        for box in [label.get_window_extent()]
    )
    assert len(places) >= 2
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(places))


def test_each_precision_has_its_own_marker():
    assert set(plots._MARKERS) == set(checks.known_precisions())
    assert len(set(plots._MARKERS.values())) == len(plots._MARKERS)
