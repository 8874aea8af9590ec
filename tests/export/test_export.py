import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import keras
import matplotlib
import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter

import keras_kd.export
from keras_kd.export import ManifestError, Report

FORMATS = ("tflite", "onnx")
PRECISIONS = ("float32", "float16", "dynamic", "int8")


def find(report, name):
    return next(a for a in report.artifacts if f"{a.format} {a.precision}" == name)


def run_tflite(path, x):
    """Answers of a TFLite file, sample by sample, through the plain interpreter."""
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    (before,), (after,) = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for sample in x:
        scale, zero = before["quantization"]
        if scale:
            sample = np.clip(np.round(sample / scale) + zero, -128, 127)
        interpreter.set_tensor(before["index"], sample[None].astype(before["dtype"]))
        interpreter.invoke()
        row = interpreter.get_tensor(after["index"])[0].astype("float32")
        scale, zero = after["quantization"]
        rows.append((row - zero) * scale if scale else row)
    return np.stack(rows)


def test_every_file_is_made_and_passes(report):
    assert [(a.format, a.precision) for a in report.artifacts] == [
        (f, p) for f in FORMATS for p in PRECISIONS
    ]
    for artifact in report.artifacts:
        assert artifact.passed, artifact.reason
        assert artifact.path.is_file()
        assert artifact.bytes == artifact.path.stat().st_size > artifact.gzip_bytes
        assert artifact.sha256 == hashlib.sha256(artifact.path.read_bytes()).hexdigest()
        assert artifact.latency_ms > 0
        assert artifact.batch == "dynamic"


def test_nothing_but_the_export_is_left(report):
    names = {path.name for path in report.folder.iterdir()}
    files = {f"model_{p}.{f}" for f in FORMATS for p in PRECISIONS}
    assert names == files | {"manifest.json", "evaluation.npz"}
    assert [path.name for path in report.folder.parent.iterdir()] == ["corners"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tflite_figures_are_those_of_the_file(report, student, blobs, precision):
    artifact = find(report, f"tflite {precision}")
    x, y = blobs[0][200:], blobs[1][200:]
    want, got = student.predict(x, verbose=0), run_tflite(artifact.path, x)
    assert artifact.accuracy == pytest.approx(np.mean(got.argmax(1) == y), abs=0.0051)
    assert artifact.agreement == pytest.approx(np.mean(got.argmax(1) == want.argmax(1)), abs=0.0051)
    assert artifact.worst == pytest.approx(np.abs(got - want).max(), rel=0.1, abs=1e-5)
    reference = report.manifest["keras"]["accuracy"]
    assert reference == np.mean(want.argmax(1) == y)
    assert artifact.drop == pytest.approx(reference - artifact.accuracy)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnx_figures_are_those_of_the_file(report, student, blobs, precision):
    artifact = find(report, f"onnx {precision}")
    x, y = blobs[0][200:], blobs[1][200:]
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    want = student.predict(x, verbose=0)
    # Dynamic quantization takes one range for the whole batch; a device sees one sample.
    got = np.concatenate([session.run(["logits"], {"image": x[i : i + 1]})[0] for i in range(200)])
    assert artifact.accuracy == pytest.approx(np.mean(got.argmax(1) == y), abs=0.0051)
    assert artifact.worst == pytest.approx(np.abs(got - want).max(), rel=0.1, abs=1e-5)
    noise = np.square(want.astype("float64") - got).sum()
    expected = 10 * np.log10(np.square(want.astype("float64")).sum() / noise)
    # Different batch sizes round float sums differently; that is all of float32's noise.
    assert artifact.sqnr == pytest.approx(expected, abs=10 if precision == "float32" else 0.5)


def test_precision_costs_and_saves_what_it_should(report):
    for fmt in FORMATS:
        full, half, small = (find(report, f"{fmt} {p}") for p in ("float32", "float16", "int8"))
        assert full.sqnr > 100
        assert 50 < half.sqnr < 90
        assert small.sqnr > 25
        assert half.bytes < 0.6 * full.bytes
        assert small.bytes < 0.45 * full.bytes


def test_int8_tflite_is_int8_from_end_to_end(report):
    artifact = find(report, "tflite int8")
    details = artifact.details
    for kind in ("inputs", "outputs"):
        (tensor,) = details["signature"][kind]
        assert tensor["dtype"] == "int8"
        assert tensor["scale"] > 0
        assert -128 <= tensor["zero_point"] <= 127
    assert details["contents"]["float_operators"] == []
    weights = details["contents"]["weight_bits"]
    assert "32" not in weights
    assert weights["8"] > 10_000


def test_int8_onnx_holds_8_bit_weights_and_float_borders(report):
    artifact = find(report, "onnx int8")
    graph = onnx.load(artifact.path).graph
    big = [entry for entry in graph.initializer if np.prod(entry.dims) > 100]
    assert big
    assert {entry.data_type for entry in big} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_files_keep_keras_names_and_a_named_batch(report):
    for artifact in report.artifacts:
        signature = artifact.details["signature"]
        assert [t["name"] for t in signature["inputs"]] == ["image"]
        assert [t["name"] for t in signature["outputs"]] == ["logits"]
        assert signature["inputs"][0]["shape"] == ["batch", 8, 8, 1]
        assert signature["outputs"][0]["shape"] == ["batch", 4]
    interpreter = Interpreter(model_path=str(find(report, "tflite int8").path))
    assert interpreter.get_signature_list() == {
        "serving_default": {"inputs": ["image"], "outputs": ["logits"]}
    }
    assert interpreter.get_input_details()[0]["name"] == "image"
    assert interpreter.get_output_details()[0]["name"] == "logits"
    graph = onnx.load(find(report, "onnx float32").path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "hidden/" in " ".join(name for node in graph.node for name in node.output)


def test_best_is_the_smallest_that_passed(report):
    assert report.best.bytes == min(a.bytes for a in report.artifacts if a.passed)
    assert report.ok


def test_table_reads_at_80_columns(report):
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("* ") for line in lines) == 2
    assert any(line.startswith("  teacher") for line in lines)
    row = next(line for line in lines if "onnx float32" in line)
    assert f"{100 * find(report, 'onnx float32').accuracy:.2f}" in row
    assert str(report) == report.table()


def test_table_gives_up_columns_where_there_is_no_room(report):
    for width in (60, 48):
        lines = report.table(width).splitlines()
        assert max(map(len, lines)) <= width
        rows = [line for line in lines if line[2:].startswith(("tflite ", "onnx "))][:8]
        assert len({len(row) for row in rows}) == 1
        assert f"{100 * find(report, 'tflite int8').accuracy:.2f}" in rows[3]
        assert any(line.startswith(f"Not shown in {width} columns: worst, gzip") for line in lines)
        assert max(map(len, report.layers().table(width).splitlines())) <= width
    assert report.table(160).splitlines()[:9] == report.table().splitlines()[:9]


def test_rows_and_dict_are_plain_json(report):
    rows = report.rows()
    assert [row["name"] for row in rows[:3]] == ["teacher", "keras", "tflite float32"]
    assert len({tuple(sorted(row)) for row in rows}) == 1
    assert rows[0]["parameters"] == 94634
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["best"] == report.best.file
    assert again["rows"][2]["bytes"] == find(report, "tflite float32").bytes


def test_report_loads_again(report):
    assert Report.load(report.folder).to_dict() == report.to_dict()


def test_manifest_names_versions_and_settings(report):
    content = json.loads((report.folder / "manifest.json").read_text())
    assert content["versions"]["keras"] == keras.__version__
    assert {"tensorflow", "onnxruntime", "ai-edge-litert"} <= set(content["versions"])
    assert content["settings"] == {
        "max_drop": 0.05,
        "objective": "size",
        "opset": 17,
        "batch": None,
        "sparse": False,
        "targets": [],
    }
    assert content["model"]["labels"] == ["nw", "ne", "sw", "se"]
    assert content["calibration"]["samples"] == 200


def test_progress_counts_every_step(stages, report):
    assert [event for event in stages if event[0] == "convert"] == [
        ("convert", done, 8) for done in range(9)
    ]
    assert [event for event in stages if event[0] == "verify"] == [
        ("verify", done, 8) for done in range(9)
    ]
    assert stages[-1] == ("write", 1, 1)


def test_html_opens_offline_with_all_plots(report, tmp_path):
    before = dict(matplotlib.rcParams)
    path = report.save_html(tmp_path / "report.html")
    text = path.read_text()
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not matplotlib.pyplot.get_fignums()
    titles = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert titles == [
        "Size against accuracy",
        "Latency against accuracy",
        "Losses by epoch",
        "Metrics by epoch",
        "Noise of int8 by layer",
    ]
    assert text.count("<svg") == 5
    loaded = re.findall(r"""(?:src|href)=["']?([^"' >]+)""", text)
    assert all(target.startswith("#") for target in loaded), loaded
    assert "@import" not in text
    assert "url(http" not in text
    for artifact in report.artifacts:
        assert artifact.file in text
    assert report.save_html(tmp_path / "again.html").read_text() == text


def test_html_escapes_what_a_user_named(report, tmp_path):
    content = json.loads((report.folder / "manifest.json").read_text())
    content["model"]["name"] = "<script>alert(1)</script>"
    text = Report(report.folder, content).save_html(tmp_path / "x.html").read_text()
    assert "<script>" not in text


def test_verify_passes_on_what_was_exported(report):
    again = keras_kd.export.verify(report.folder)
    assert again.ok
    assert again.problems == ()
    assert again.best.file == report.best.file


@pytest.fixture
def copied(report, tmp_path):
    return shutil.copytree(report.folder, tmp_path / "copied")


def test_verify_names_edited_and_missing_files(copied):
    path = copied / "model_int8.onnx"
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    (copied / "model_float16.tflite").unlink()
    with pytest.raises(ManifestError, match=r"`model_float16\.tflite` is missing; `model_"):
        keras_kd.export.verify(copied)


def test_verify_refuses_swapped_files(copied):
    (copied / "model_int8.tflite").rename(copied / "x")
    (copied / "model_dynamic.tflite").rename(copied / "model_int8.tflite")
    (copied / "x").rename(copied / "model_dynamic.tflite")
    with pytest.raises(ManifestError, match=r"model_dynamic\.tflite` is not the file that"):
        keras_kd.export.verify(copied)


def test_verify_finds_a_file_that_answers_otherwise(copied, report):
    # Somebody resealed the manifest around another network: only running it can tell.
    content = json.loads((copied / "manifest.json").read_text())
    float16 = next(r for r in content["artifacts"] if r["file"] == "model_float16.onnx")
    model = onnx.load(copied / "model_float16.onnx")
    weights = max(model.graph.initializer, key=lambda entry: np.prod(entry.dims))
    array = onnx.numpy_helper.to_array(weights)
    weights.CopyFrom(onnx.numpy_helper.from_array(-array, weights.name))
    onnx.save(model, copied / "model_float16.onnx")
    float16["sha256"] = keras_kd.export.manifest.digest(copied / "model_float16.onnx")
    keras_kd.export.manifest.write(content, copied / "manifest.json")
    again = keras_kd.export.verify(copied)
    assert not again.ok
    assert len(again.problems) == 1
    assert again.problems[0].startswith("model_float16.onnx: its ")
    assert find(again, "onnx float16").status == "failed"


def test_overwriting_replaces_the_old_export_and_keeps_other_files(student, blobs, copied):
    x, y = blobs
    (copied / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        keras_kd.export(student, copied, evaluation=(x, y), precisions=["float32"])
    with pytest.raises(ValueError, match="needs calibration data"):
        keras_kd.export(student, copied, evaluation=(x, y), overwrite=True)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    environment = dict(os.environ)
    report = keras_kd.export(
        student,
        copied,
        formats="onnx",
        precisions="float32",
        calibration=x[:200],
        evaluation=x,
        labels=["nw", "ne", "sw", "se"],
        overwrite=True,
    )
    assert dict(os.environ) == environment
    assert {path.name for path in copied.iterdir()} == {
        "model_float32.onnx",
        "manifest.json",
        "evaluation.npz",
        "notes.txt",
    }
    # The same model gives the same bytes.
    assert report.best.path.read_bytes() == before["model_float32.onnx"]
    assert report.best.accuracy is None
    assert report.best.agreement == 1.0


def test_the_package_is_the_function_and_imports_lightly():
    code = (
        "import sys, keras_kd.export, inspect\n"
        "heavy = {'tensorflow', 'keras', 'onnx', 'onnxruntime', 'tf2onnx', 'ai_edge_litert'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert callable(keras_kd.export)\n"
        "assert 'calibration' in inspect.signature(keras_kd.export).parameters\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert "Every file is loaded in its own runtime" in keras_kd.export.export_model.__doc__
