"""`keras-kd doctor`: from metadata alone, also without the command line's own packages."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from keras_kd.cli import installation, main


@pytest.fixture
def metadata(monkeypatch):
    """Versions by package, and what this package needs."""
    versions = {"keras_kd": "0.1.0", "keras": "3.15.1", "numpy": "2.4.6", "jax": "0.7.0"}
    needs = [
        "keras>=3.12",
        "numpy>=1.26",
        "tensorflow>=2.20; extra == 'tensorflow'",
        "keras-kd[tensorflow]; extra == 'export'",
        "onnx>=1.19; extra == 'export'",
        "old>=2; extra == 'jax'",
        "jax>=0.6; extra == 'jax'",
    ]

    class Distribution:
        requires = needs

        class metadata:  # noqa: N801
            @staticmethod
            def get_all(name):
                return ["tensorflow", "export", "jax"]

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)
    return versions


def test_extras_and_how_to_get_them(metadata):
    metadata["old"] = "1.5"
    found = installation.collect()
    assert found["problems"] == []
    assert found["backends"] == {"tensorflow": None, "jax": "0.7.0", "torch": None}
    assert found["extras"]["export"] == {
        "complete": False,
        "missing": ["onnx", "tensorflow"],
        "old": {},
        "install": 'pip install "keras_kd[export]"',
    }
    assert found["extras"]["jax"]["old"] == {"old": "1.5, needs >=2"}
    said = installation.text(found)
    assert "export: lacks onnx, tensorflow" in said
    assert "jax: lacks old (1.5, needs >=2)" in said
    assert "Nothing is missing that keras_kd needs to run." in said


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("torch", 'is not installed: pip install "keras_kd[torch]", or set KERAS_BACKEND=jax'),
        ("theano", "is none of tensorflow, jax, torch"),
    ],
)
def test_a_backend_that_cannot_run(metadata, monkeypatch, backend, reason):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    (problem,) = installation.collect()["problems"]
    assert reason in problem
    assert "set by KERAS_BACKEND" in problem


def test_versions_that_do_not_fit(metadata, monkeypatch):
    metadata["keras"] = "3.0.5"
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    first, second = installation.collect()["problems"]
    assert (
        '`keras` 3.0.5 is too old or too new: keras_kd needs >=3.12. pip install "keras>=3.12"'
        in first
    )
    assert "TF_USE_LEGACY_KERAS is set" in second
    del metadata["numpy"]
    assert "`numpy` is not installed" in installation.collect()["problems"][0]


def test_the_backend_of_a_settings_file(metadata, monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert installation.collect()["backend"]["set_by"] == "Keras's default"
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    assert installation.collect()["backend"]["name"] == "jax"
    (tmp_path / "keras.json").write_text("{")
    assert installation.collect()["backend"]["name"] == "tensorflow"


def test_it_imports_nothing_heavy():
    code = (
        "import sys; from keras_kd.cli import main; code = main(['doctor', '--json']);"
        "heavy = {'keras', 'numpy', 'tensorflow', 'jax', 'torch', 'onnx'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["packages"]["keras"] == importlib.metadata.version("keras")
    assert found["backends"]["tensorflow"] == importlib.metadata.version("tensorflow")


@pytest.mark.parametrize("columns", [60, 160])
def test_it_fits_the_terminal(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    assert "Extras" in out
    assert run("doctor", "--quiet")[1] == ""


def test_it_runs_without_the_packages_of_the_command_line(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("keras_kd.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("keras_kd.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["doctor", "--json"]) == 0
    assert "extras" in json.loads(capsys.readouterr().out)
