"""What is read is not believed: what is shown is measured, and every claim is looked at."""

import contextlib
import json
import os
import random
import shutil
import zipfile
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest

import keras_kd.export
from keras_kd.cli.try_page import Export
from keras_kd.export import ManifestError, Report, manifest
from keras_kd.export.formats import registry
from keras_kd.export.report import plots
from keras_kd.export.verification import reverify

DIGITS = Path(__file__).parents[2] / "exported" / "digits"


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(DIGITS, tmp_path / "copy")


def resealed(folder, change):
    content = manifest.read(folder)
    change(content)
    manifest.write(content, folder / manifest.FILE)


def rehash(folder, content):
    for row in (*content["artifacts"], content["evaluation"]):
        row["sha256"] = manifest.digest(folder / row["file"])


# ------------------------------------------------------------------ verify


def boast(content):
    """Everything that an author may want to say, in all places in which it can be said."""
    content["keras"] = {"accuracy": 1.0, "parameters": 1, "bytes": 1, "latency_ms": 0.001}
    content["teacher"] = {"accuracy": 1.0, "latency_ms": 1e6}
    content["evaluation"]["samples"] = 10**6
    content["history"] = {"loss": [0.0]}
    content["calibration"] = {"samples": 10**6, "ranges": {"image": [0.0, 1.0]}}
    content["versions"] = {"keras": "99"}
    for row in content["artifacts"]:
        row.update(gzip_bytes=1, latency_ms=1e-9, latency_low_ms=1e-9, sparsity=0.99)
        row.update(dense=dict.fromkeys(("bytes", "gzip_bytes"), 10**9))
        row["dense"].update(latency_ms=9.0, latency_low_ms=9.0, slowdown=1.0)
        row["metrics"].update(accuracy=1.0, agreement=1.0, worst=0.0, sqnr=200.0)
        row["flags"], row["notes"] = ["the best of all files"], ["trust me"]


def test_nothing_that_is_shown_is_taken_from_the_manifest(copy):
    honest = keras_kd.export.verify(copy)
    assert honest.ok
    resealed(copy, boast)
    report = keras_kd.export.verify(copy)
    with np.load(copy / "evaluation.npz") as arrays:
        y, labels = arrays["y0"], arrays["t0"]
    right = float(np.mean(y.argmax(-1) == labels))
    by_name = {row["name"]: row for row in report.rows()}
    assert set(by_name) == {"keras", "tflite int8", "onnx int8"}
    assert by_name["keras"]["accuracy"] == right
    assert by_name["keras"]["latency_ms"] is by_name["keras"]["bytes"] is None
    for row, before in zip(report.rows()[1:], honest.rows()[1:], strict=True):
        size = (copy / row["file"]).stat().st_size
        assert row["bytes"] == size
        assert 100 < row["gzip_bytes"] < size + 100
        for key in ("accuracy", "agreement", "worst", "sqnr", "drop", "gzip_bytes", "sparsity"):
            assert row[key] == before[key], key
        assert row["latency_ms"] > 1e-6
    texts = [report.table(), json.dumps(report.manifest), json.dumps(report.to_dict())]
    for text in texts:
        for lie in ("trust me", "best of all", "1000000", "99 %", '"99"'):
            assert lie not in text
    assert report.manifest["evaluation"]["samples"] == len(y)
    assert report.ok


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["artifacts"][0].update(bytes=17), "bytes, and 17 are recorded"),
        (
            lambda c: c["artifacts"][0]["signature"]["inputs"][0].update(scale=2.0),
            "inputs and outputs are not the recorded ones",
        ),
        (lambda c: c["artifacts"][0]["check"]["outputs"].clear(), "figures are recorded for"),
        (lambda c: c["artifacts"][0]["check"].update(accuracy=0.2), "its accuracy on the stored"),
        (lambda c: c["artifacts"][0]["metrics"].update(accuracy=1.0), "its accuracy on the stored"),
        (
            lambda c: c["artifacts"][0]["check"].update(accuracy=None),
            "accuracy is recorded as None",
        ),
        (
            lambda c: c["artifacts"][0]["check"]["outputs"]["logits"].update(agreement=0.5),
            "%, and was 50.00 %",
        ),
        (lambda c: c["artifacts"][0]["check"].update(finite=False), "its answers are finite"),
    ],
)
def test_a_false_claim_is_a_problem(copy, change, reason):
    resealed(copy, change)
    report = keras_kd.export.verify(copy)
    (problem,) = report.problems
    assert problem.startswith("digits_int8.tflite: ")
    assert reason in problem
    assert not report.ok
    assert report.best.file == "digits_int8.onnx"


def test_a_useless_file_recorded_as_passed_is_failed(copy):
    model = onnx.load(copy / "digits_int8.onnx")
    for entry in model.graph.initializer:
        array = onnx.numpy_helper.to_array(entry)
        if array.dtype.itemsize == 1 and array.ndim > 1:
            entry.CopyFrom(onnx.numpy_helper.from_array(np.roll(array, 7), entry.name))
    onnx.save(model, copy / "digits_int8.onnx")

    def lie(content):
        row = next(row for row in content["artifacts"] if row["format"] == "onnx")
        row["bytes"] = (copy / row["file"]).stat().st_size
        rehash(copy, content)

    resealed(copy, lie)
    first = keras_kd.export.verify(copy)
    now = first.artifacts[1].details["check"]

    def agree(content):
        # The author now tells the truth on the stored samples, and lies on all others.
        row = next(row for row in content["artifacts"] if row["format"] == "onnx")
        row["check"] = now
        content["evaluation"]["samples"] = 10**6

    resealed(copy, agree)
    report = keras_kd.export.verify(copy)
    assert [a.status for a in report.artifacts] == ["passed", "failed"]
    assert "it is recorded as passed, and at output `logits` it loses" in report.problems[0]
    assert report.artifacts[1].accuracy == now["accuracy"] < 0.9


def outputs_of(folder, names):
    """Two outputs in both files, of which the manifest may name fewer."""
    model = onnx.load(folder / "digits_int8.onnx")
    (logits,) = model.graph.output
    model.graph.node.append(onnx.helper.make_node("Neg", [logits.name], ["hidden"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("hidden", 1, ["batch", 10]))
    onnx.save(model, folder / "digits_int8.onnx")


def test_an_output_that_the_manifest_does_not_name_is_a_problem(copy):
    outputs_of(copy, ["logits"])

    def keep_the_onnx_file(content):
        row = next(row for row in content["artifacts"] if row["format"] == "onnx")
        row["bytes"] = (copy / row["file"]).stat().st_size
        rehash(copy, content)

    resealed(copy, keep_the_onnx_file)
    (problem,) = keras_kd.export.verify(copy).problems
    assert "the file has outputs ['hidden', 'logits'], and answers are known for" in problem


def test_what_an_output_means_is_told_by_its_labels(copy):
    resealed(copy, lambda c: c["evaluation"]["kinds"]["logits"].update(kind="values"))
    reference = reverify.Stored.read(copy, manifest.read(copy)).reference
    assert reference.kinds["logits"]["kind"] == "classes"


def stored(folder, **changes):
    with np.load(folder / "evaluation.npz") as arrays:
        content = {**dict(arrays), **changes}
    np.savez(folder / "evaluation.npz", **{k: v for k, v in content.items() if v is not None})
    resealed(folder, lambda c: rehash(folder, c))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x0": None}, "they lack x0"),
        ({"y0": None}, "they lack y0"),
        ({"x0": np.zeros((3, 8, 8, 1), "float32")}, "x0 has 3 samples, and 216 are recorded"),
        ({"y0": np.zeros((216, 3), "float32")}, r"y0 has samples of shape \(3,\), not \[10\]"),
        ({"y0": np.full((216, 10), "a")}, "y0 holds no numbers"),
        ({"t0": np.full(216, 12)}, "labels run from 12 to 12"),
        ({"t0": np.zeros((216, 4, 4))}, "do not go together"),
    ],
)
def test_stored_samples_of_other_shapes_are_refused(copy, changes, reason):
    stored(copy, **changes)
    with pytest.raises(ManifestError, match=reason):
        keras_kd.export.verify(copy)


def bomb(path):
    """A small archive that declares 600 megabytes of zeros."""
    descr = {"descr": "<f4", "fortran_order": False, "shape": (600 << 18,)}
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("x0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, descr)
        for _ in range(600):
            member.write(bytes(1 << 20))


def test_stored_samples_that_unpack_to_a_lot_are_refused(copy):
    bomb(copy / "evaluation.npz")
    resealed(copy, lambda c: rehash(copy, c))
    for use in (keras_kd.export.verify, Export):
        with pytest.raises(ManifestError, match="would unpack to"):
            use(copy)


@pytest.mark.parametrize("name", ["digits_int8.onnx", "evaluation.npz", manifest.FILE])
def test_a_fifo_in_place_of_a_file_is_not_waited_for(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    for use in (keras_kd.export.verify, keras_kd.export.bench, Export):
        with pytest.raises(ManifestError, match="named pipe"):
            use(copy)


def test_a_device_is_no_manifest(copy):
    (copy / manifest.FILE).unlink()
    (copy / manifest.FILE).symlink_to("/dev/zero")
    with pytest.raises(ManifestError, match="is a device"):
        manifest.read(copy)


# ------------------------------------------------------------------ external data


def place_of_weights(model, where):
    """Moves one weight of a model to another file, in one of the places a tensor may have."""
    weight = onnx.numpy_helper.from_array(np.ones(4, "float32"), "w")
    onnx.external_data_helper.set_external_data(weight, "weights.bin")
    weight.ClearField("raw_data")
    if where == "initializer":
        model.graph.initializer.append(weight)
    elif where == "constant":
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=weight))
    elif where == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(weight)
    else:
        inner = onnx.helper.make_graph([], "inner", [], [], [weight])
        node = onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner)
        if where == "branch":
            model.graph.node.append(node)
        else:
            model.functions.add().node.append(node)


@pytest.mark.parametrize("where", ["initializer", "constant", "sparse", "branch", "function"])
def test_weights_in_other_files_are_refused(copy, where):
    path = copy / "digits_int8.onnx"
    model = onnx.load(path)
    place_of_weights(model, where)
    path.write_bytes(model.SerializeToString())
    (copy / "weights.bin").write_bytes(bytes(16))
    resealed(copy, lambda c: rehash(copy, c))
    for use in (keras_kd.export.verify, keras_kd.export.bench, Export):
        with pytest.raises(ManifestError, match="onnx` keeps weights in other files"):
            use(copy)


def test_a_tflite_file_with_weights_elsewhere_is_refused(copy):
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    path = copy / "digits_int8.tflite"
    assert registry.get("tflite").outside(path) == ""
    model = flatbuffer_utils.read_model(path)
    group, buffer = schema.ExternalBufferGroupT(), schema.ExternalBufferT()
    group.name = b"weights.bin"
    model.externalBufferGroups, model.externalBuffers = [group], [buffer]
    flatbuffer_utils.write_model(model, path)
    assert "other files" in registry.get("tflite").outside(path)
    path.write_bytes(b"no flatbuffer")
    assert registry.get("tflite").outside(path) == ""


# ------------------------------------------------------------------ a full schema


def leaves(value, path=()):
    if isinstance(value, (dict, list)):
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*path, key))
    else:
        yield path


ODD = [
    *(None, True, -1, 0, 1.5, -1e308, 10**30, "", "x", "../x", "a\nb", "\x1b[2J", "\ud800", [], {}),
    *([None], [[]], {"": None}, {"x": {}}, ["x"] * 3, [1, 2, 3], float("nan")),
]


def changed(rng, content):
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *parents, last = rng.choice([path for path in leaves(content) if path])
        place = content
        for key in parents:
            place = place[key]
        what = rng.random()
        if what < 0.15:
            del place[last]
        elif what < 0.25 and isinstance(place, dict):
            place[f"{last}x"] = place.pop(last)
        elif what < 0.3 and isinstance(place, list):
            place.append(place[last])
        else:
            place[last] = rng.choice(ODD)
    return content


def test_any_manifest_is_read_or_is_one_error(copy, tmp_path, monkeypatch):
    """Three hundred manifests with something odd in them, sealed anew, all of their uses."""
    monkeypatch.setattr(plots, "svg", lambda figure: "<svg></svg>")
    whole = manifest.read(copy)
    whole["history"] = {"loss": [1.0, None], "val_loss": [2.0, 1.0]}
    whole["teacher"] = {"accuracy": 0.5}
    row = {"layer": "conv", "tensor": "conv/x", "sqnr": 9.0, "reads": ["conv"], "covers": ["norm"]}
    whole["layers"] = {"tflite": [row], "onnx": [{**row, "sqnr": None}]}
    rng = random.Random(13)
    read = 0
    for _ in range(300):
        content = changed(rng, whole)
        with contextlib.suppress(ValueError, TypeError):
            # What JSON cannot hold is not written.
            manifest.write(content, copy / manifest.FILE)
        try:
            report = Report.load(copy)
        except ManifestError:
            continue
        read += 1
        report.rows(), report.to_dict(), report.table(60), report.layers().table()
        report.layers().worst("onnx"), json.dumps(report.to_dict(), allow_nan=False)
        report.save_card(tmp_path / "card.md")
        if read % 8 == 0:
            report.save_html(tmp_path / "report.html")
        for artifact in report.artifacts:
            with contextlib.suppress(ValueError):
                # Types that a language has no code for.
                report.snippets(artifact)
        with contextlib.suppress(ValueError):
            Export(copy).describe(None)
        with contextlib.suppress(ManifestError):
            manifest.check_files(copy, report.manifest)
            reverify.Stored.read(copy, report.manifest)
    assert 20 <= read <= 280


def test_what_is_written_follows_the_schema():
    jsonschema.Draft202012Validator.check_schema(manifest.schema())
    jsonschema.validate(json.loads((DIGITS / manifest.FILE).read_text()), manifest.schema())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["calibration"].update(ranges={"x": [1]}), "too few entries"),
        (lambda c: c["calibration"].update(ranges={"x": [1, 2, 3]}), "too many entries"),
        (lambda c: c.update(calibration={}), "lacks `samples`"),
        (lambda c: c.update(history={"loss": ["a"]}), "`history.loss\\[0\\]` is not of type"),
        (lambda c: c.update(layers={"pdf": []}), "`layers.pdf` is not known"),
        (lambda c: c["artifacts"][0].update(bytes=-1), "`artifacts\\[0\\].bytes` lies outside"),
        (lambda c: c["artifacts"][0].update(bytes=10**30), "bytes` lies outside its limits"),
        (lambda c: c["artifacts"][0].update(bytes=None), "has a file and no size"),
        (lambda c: c["artifacts"][0].update(file="a.onnx"), "is no .tflite file"),
        (lambda c: c["artifacts"][0].update(file="a\nb.tflite"), "does not look like"),
        (lambda c: c["artifacts"][0].update(file=c["artifacts"][1]["file"]), "the same file"),
        (lambda c: c["artifacts"][0].update(format="onnx"), "the same format and precision"),
        (lambda c: c["artifacts"][0].update(worst_output="x"), "none of its outputs"),
        (
            lambda c: (
                c["artifacts"][0].update(worst_output="logits"),
                c["artifacts"][0]["metrics"]["outputs"]["logits"].pop("drop"),
            ),
            "what its worst output lost",
        ),
        (lambda c: c["artifacts"][0]["contents"].pop("flex"), "lacks `flex`"),
        (lambda c: c["artifacts"][0]["metrics"]["outputs"].update(a=3), "is not of type object"),
        (lambda c: c["artifacts"][0]["metrics"].update(accuracy=50.0), "outside its limits"),
        (lambda c: c["artifacts"][0]["signature"]["inputs"].clear(), "does not name the inputs"),
        (lambda c: c["model"]["inputs"].append(c["model"]["inputs"][0]), "holds a name twice"),
        (lambda c: c["model"].update(labels=[]), "too few entries"),
        (lambda c: c["evaluation"].update(kinds={}), "does not name the outputs"),
        (lambda c: c["evaluation"].update(stored=300), "more than there are samples"),
        (lambda c: c["evaluation"].update(sha256="a" * 64 + "\n"), "does not look like"),
        (lambda c: c["keras"].clear(), "`keras` lacks"),
    ],
)
def test_claims_that_go_beyond_types_are_looked_at(copy, change, reason):
    content = manifest.read(copy)
    change(content)
    manifest.write(content, copy / manifest.FILE)
    with pytest.raises(ManifestError, match=reason):
        manifest.read(copy)


@pytest.mark.parametrize("command", ["verify", "report", "bench", "try"])
def test_a_command_says_it_in_one_line(copy, capsys, command):
    from keras_kd.cli import main

    resealed_text = json.dumps(manifest.seal({**manifest.read(copy), "calibration": {"a\x1b": 1}}))
    (copy / manifest.FILE).write_text(resealed_text)
    assert main([command, str(copy)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "`calibration` lacks `samples`" in said.err
