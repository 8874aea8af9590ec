"""Formats: one of somebody else's is exported, verified, reported and loaded as ours are."""

import json
from pathlib import Path

import jsonschema
import keras
import numpy as np
import pytest
import toy_format
from keras import layers

import keras_kd.export
from keras_kd.export import manifest
from keras_kd.export.formats import registry
from keras_kd.export.formats.base import Format

X = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")


@pytest.fixture(autouse=True, scope="module")
def known():
    registry.register(toy_format.Toy)
    yield
    registry.unregister("toy")


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5,), name="rows"),
            layers.Dense(7, activation="relu", name="hidden"),
            layers.Dense(3, name="logits"),
        ]
    )


@pytest.fixture(scope="module")
def report(known, tmp_path_factory):
    model = network()
    return keras_kd.export(
        model,
        tmp_path_factory.mktemp("toys") / "out",
        formats=("toy", "onnx"),
        precisions=("float32", "float16"),
        evaluation=(X, model.predict(X, verbose=0).argmax(-1)),
        name="net",
    )


def test_a_registered_format_gets_a_verified_row(report, tmp_path):
    rows = {row["name"]: row for row in report.rows()}
    assert rows["toy float32"]["status"] == rows["toy float16"]["status"] == "passed"
    assert rows["toy float32"]["accuracy"] == 1
    assert rows["toy float32"]["worst"] < 1e-5 < rows["toy float16"]["worst"] < 1e-2
    first = report.artifacts[0]
    assert [path.name for path in first.files] == ["net_float32.toy", "net_float32.toyw"]
    assert first.bytes == sum(path.stat().st_size for path in first.files)
    (more,) = first.details["more_files"]
    assert [first.sha256, more["sha256"]] == list(map(manifest.digest, first.files))
    assert more["bytes"] == first.files[1].stat().st_size
    assert first.details["contents"]["operators"] == {"MatMul": 2}
    jsonschema.validate(report.manifest, manifest.schema())
    assert "toy float16" in report.table()
    assert registry.get("toy").color in report.save_html(tmp_path / "r.html").read_text()
    assert "net_float32.toy" in report.save_card(tmp_path / "c.md").read_text()
    with pytest.raises(ValueError, match="format toy, for which there is no code"):
        report.snippets(first)


def test_its_files_are_verified_loaded_and_timed(report):
    checked = keras_kd.export.verify(report.folder)
    assert checked.ok
    assert {artifact.format for artifact in checked.artifacts} == {"toy", "onnx"}
    run = keras_kd.export.load(report.artifacts[0].path)
    expected = network().predict(X, verbose=0)
    np.testing.assert_allclose(run(X), expected, atol=1e-5)


def test_every_file_of_an_artifact_is_hashed(report):
    path = report.folder / "net_float16.toyw"
    blob = path.read_bytes()
    path.write_bytes(blob[:-1] + b"\1")
    try:
        with pytest.raises(keras_kd.export.ManifestError, match=r"net_float16.toyw.* differs"):
            keras_kd.export.verify(report.folder)
    finally:
        path.write_bytes(blob)


def test_files_of_one_artifact_take_the_place_of_others_together(report, tmp_path):
    folder = tmp_path / "out"
    for seed in (1, 2):
        model = network()
        model.set_weights([seed * w for w in model.get_weights()])
        again = keras_kd.export(
            model, folder, "toy", "float32", evaluation=X, name="net", overwrite=seed == 2
        )
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["evaluation.npz", "manifest.json", "net_float32.toy", "net_float32.toyw"]
        assert keras_kd.export.verify(folder).ok
        assert again.best.file == "net_float32.toy"


def test_manifests_name_each_file_of_an_artifact_once(report, tmp_path):
    for change, reason in (
        (lambda row: row["more_files"][0].update(bytes=9**9), "is less than"),
        (lambda row: row["more_files"][0].update(file="other.toyw"), "have other names"),
        (lambda row: row["more_files"][0].update(file="net_float16.toyw"), "name the same file"),
        (lambda row: row["more_files"][0].update(file="../x.toyw"), "outside the folder"),
        (lambda row: row["more_files"][0].pop("sha256"), "`sha256`"),
    ):
        content = json.loads((report.folder / "manifest.json").read_text())
        change(content["artifacts"][0])
        manifest.write(content, tmp_path / "manifest.json")
        with pytest.raises(keras_kd.export.ManifestError, match=reason):
            manifest.read(tmp_path)


def test_the_first_version_of_manifests_knows_no_other_formats(report, tmp_path):
    content = json.loads((report.folder / "manifest.json").read_text())
    manifest.write({**content, "schema": 1}, tmp_path / "manifest.json")
    with pytest.raises(keras_kd.export.ManifestError, match="none of version 1"):
        manifest.read(tmp_path)


def test_names_suffixes_and_homes_of_formats_are_checked():
    def made(**changes):
        return type("Other", (toy_format.Toy,), {"__module__": "m", "__qualname__": "O", **changes})

    with pytest.raises(ValueError, match="`onnx` is a format of keras_kd"):
        registry.register(made(name="onnx"))
    with pytest.raises(ValueError, match=r"suffix `.toyw?` of the format `other` is that of `toy`"):
        registry.register(made(name="other"))
    with pytest.raises(ValueError, match="other processes cannot import"):
        registry.register(made(name="other", __module__="__main__"))
    with pytest.raises(ValueError, match=r"`toi` is no format.*Did you mean `toy`"):
        registry.get("toi")


def test_the_toy_is_short_and_a_format_in_all_that_is_asked():
    assert len(Path(toy_format.__file__).read_text().splitlines()) < 60
    members = {name for name in vars(Format) if not name.startswith("_")}
    for each in registry.every():
        assert members <= set(dir(each))
