import json
import re
from pathlib import Path

import jsonschema
import pytest

from keras_kd.export import ManifestError, json_schema, manifest
from keras_kd.export.writing import write_file

ROOT = Path(__file__).parents[2]
WHOLE = json.loads((ROOT / "exported" / "digits" / manifest.FILE).read_text())
ROW = next(row for row in WHOLE["artifacts"] if row["file"])


def content(**changes):
    return {**WHOLE, "artifacts": [{**ROW, "file": "model_int8.tflite"}], **changes}


def test_a_manifest_comes_back_as_written(tmp_path):
    manifest.write(content(value=float("inf")), tmp_path / manifest.FILE)
    got = manifest.read(tmp_path)
    assert got["artifacts"][0]["file"] == "model_int8.tflite"
    assert got["value"] is None
    assert [path.name for path in tmp_path.iterdir()] == [manifest.FILE]


def test_an_edited_manifest_is_refused(tmp_path):
    path = tmp_path / manifest.FILE
    manifest.write(content(accuracy=0.123), path)
    path.write_text(path.read_text().replace("0.123", "0.999"))
    with pytest.raises(ManifestError, match="changed after the export"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"schema": 99}', "null", "[" * 200_000])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / manifest.FILE).write_text(text)
    with pytest.raises(ManifestError):
        manifest.read(tmp_path)


def changed(change):
    copy = json.loads(json.dumps(content()))
    change(copy)
    return copy


CHANGES = {
    "no artifacts": lambda c: c.pop("artifacts"),
    "artifacts as text": lambda c: c.update(artifacts="x"),
    "an artifact as number": lambda c: c.update(artifacts=[3]),
    "no evaluation": lambda c: c.update(evaluation=None),
    "no figures": lambda c: c["artifacts"][0].pop("metrics"),
    "no hash": lambda c: c["artifacts"][0].pop("sha256"),
    "size as text": lambda c: c["artifacts"][0].update(bytes="x"),
    "true as number": lambda c: c["model"].update(parameters=True),
    "unknown status": lambda c: c["artifacts"][0].update(status="perhaps"),
    "no file": lambda c: c["evaluation"].update(file=None),
    "short hash": lambda c: c["evaluation"].update(sha256="ab"),
    "limit beyond 1": lambda c: c["settings"].update(max_drop=2),
    "no inputs": lambda c: c["model"].update(inputs=[]),
    "teacher as list": lambda c: c.update(teacher=[]),
    "versions as numbers": lambda c: c.update(versions={"keras": 3}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_sealed_manifest_of_another_form_is_refused_as_jsonschema_does(tmp_path, change):
    wanted = manifest.schema()
    assert json_schema.fault(manifest.seal(content()), wanted, wanted) == ""
    manifest.write(changed(change), tmp_path / manifest.FILE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads((tmp_path / manifest.FILE).read_text()), wanted)
    with pytest.raises(
        ManifestError, match="does not have the form of a manifest: (`|it lacks)"
    ) as caught:
        manifest.read(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_schema_is_made_of_what_is_understood():
    text = json.dumps(manifest.schema())
    keys = set(re.findall(r'"([$a-zA-Z]+)": ', text))
    unknown = {"anyOf", "allOf", "not", "else", "uniqueItems", "contains"}
    assert not keys & (unknown | {"prefixItems", "patternProperties", "minLength", "maxLength"})


def test_not_a_number_is_no_json(tmp_path):
    path = tmp_path / manifest.FILE
    manifest.write(content(accuracy=0.123), path)
    path.write_text(path.read_text().replace("0.123", "NaN"))
    with pytest.raises(ManifestError, match="holds NaN, which is no JSON"):
        manifest.read(tmp_path)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        manifest.read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../x.tflite", "/etc/passwd", "sub/x.tflite", "..", "."])
def test_a_path_that_leaves_the_folder_is_refused_even_if_sealed(tmp_path, name):
    manifest.write(content(artifacts=[{**ROW, "file": name}]), tmp_path / manifest.FILE)
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
