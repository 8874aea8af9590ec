"""Versions of installed packages: those that `importlib.metadata` tells."""

import sys
from importlib import metadata

import pytest

from keras_kd.export.manifest import versions as of_an_export
from keras_kd.utils import installed


def told(name):
    try:
        return {name: metadata.version(name)}
    except metadata.PackageNotFoundError:
        return {}


def test_they_are_those_that_python_tells():
    names = sorted({each.metadata["Name"] for each in metadata.distributions()})
    assert len(names) > 20
    expected = {key: version for name in names for key, version in told(name).items()}
    assert installed.versions(names) == expected
    assert of_an_export()["keras"] == metadata.version("keras")


def describe(folder, stem, version, file="METADATA"):
    (folder / stem).mkdir(parents=True)
    (folder / stem / file).write_text(f"Metadata-Version: 2.1\nName: x\nVersion: {version}\n")


@pytest.mark.parametrize("asked", ["Two-Words", "two_words", "two.words"])
def test_spellings_forms_and_the_first_on_the_path(tmp_path, monkeypatch, asked):
    describe(tmp_path / "a", "two_words-1.5+local.dist-info", "1.5+local")
    describe(tmp_path / "b", "two_words-2.0.dist-info", "2.0")
    describe(tmp_path / "b", "older.egg-info", "0.3", "PKG-INFO")
    (tmp_path / "none.zip").write_bytes(b"")
    found = [str(tmp_path / name) for name in ("missing", "none.zip", "a", "b")]
    monkeypatch.setattr(sys, "path", found)
    assert installed.versions([asked, "older", "absent"]) == {asked: "1.5+local", "older": "0.3"}
