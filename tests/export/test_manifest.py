import json

import pytest

from keras_kd.export import ManifestError, manifest
from keras_kd.export.writing import write_file


def content(**changes):
    return {
        "schema": manifest.VERSION,
        "artifacts": [{"file": "model_int8.tflite"}, {"file": None}],
        "evaluation": {"file": "evaluation.npz"},
        **changes,
    }


def test_a_manifest_comes_back_as_written(tmp_path):
    manifest.write(content(value=float("inf")), tmp_path / manifest.FILE)
    got = manifest.read(tmp_path)
    assert got["artifacts"][0]["file"] == "model_int8.tflite"
    assert got["value"] is None
    assert [path.name for path in tmp_path.iterdir()] == [manifest.FILE]


def test_an_edited_manifest_is_refused(tmp_path):
    path = tmp_path / manifest.FILE
    manifest.write(content(accuracy=0.9), path)
    path.write_text(path.read_text().replace("0.9", "0.99"))
    with pytest.raises(ManifestError, match="changed after the export"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"schema": 99}', "null"])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / manifest.FILE).write_text(text)
    with pytest.raises(ManifestError):
        manifest.read(tmp_path)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        manifest.read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../x.tflite", "/etc/passwd", "sub/x.tflite", "..", "."])
def test_a_path_that_leaves_the_folder_is_refused_even_if_sealed(tmp_path, name):
    manifest.write(content(artifacts=[{"file": name}]), tmp_path / manifest.FILE)
    with pytest.raises(ManifestError, match="outside the folder"):
        manifest.read(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_text("x")
    inside = tmp_path / "export"
    inside.mkdir()
    (inside / "model_int8.tflite").symlink_to(tmp_path / "secret")
    manifest.write(content(), inside / manifest.FILE)
    with pytest.raises(ManifestError, match="outside the folder"):
        manifest.read(inside)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_seal_covers_every_value():
    one = manifest.seal(content(x=1))
    assert manifest.seal(json.loads(json.dumps(one)))["seal"] == one["seal"]
    assert manifest.seal(content(x=2))["seal"] != one["seal"]
