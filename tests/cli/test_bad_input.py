"""Bad input: exit code 2, one line of reason on stderr, nothing on stdout, nothing written."""

import json
import os
import zipfile

import numpy as np
import pytest

from keras_kd.cli import console, main, trial


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """Run a command that must be refused before any training; gives the reason."""

    def never(*_):
        raise AssertionError("Training has started.")

    monkeypatch.setattr(trial, "train_teacher", never)
    monkeypatch.setattr(trial, "train_students", never)

    def command(*arguments):
        before = tree(tmp_path)
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("keras-kd: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert tree(tmp_path) == before
        return err

    return command


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["dem"], "Did you mean 'demo'"),
        (["demo", "--epoch", "3"], r"No such option: --epoch.*See `keras-kd demo --help`"),
        (["demo", "--epochs", "0"], "'--epochs'.*See `keras-kd demo --help`"),
        (["demo", "--epochs", "many"], "'--epochs'.*See `keras-kd demo --help`"),
        (["demo", "--seeds", "-1"], "'--seeds'.*See `keras-kd demo --help`"),
        (["demo", "--data", "digit"], "`tfds:digit`"),
        (["demo", "--data", "missing.npz"], "`missing.npz` does not exist"),
        (["demo", "--data", "tfds:no_such_set"], "`tfds:no_such_set` is not a name"),
        (["demo", "--data-dir", "x"], "applies only to `tfds:` names"),
        (["demo", "--teacher", "missing.keras"], "`missing.keras` does not exist"),
        (["export"], "Missing argument 'STUDENT.keras'"),
        (["export", "missing.keras"], "`missing.keras` does not exist"),
        *(
            (["export", "missing.keras", option, given], f"`{option}` names nothing")
            for option in ("--metrics", "--labels", "--target")
            for given in ("", " ,")
        ),
        (["export", "missing.keras", "--name", ""], "`--name` is empty"),
        (["export", "missing.keras", "--out", ""], "`--out` is empty"),
        (["cache", "verify"], "Missing argument 'DIR'.*See `keras-kd cache verify --help`"),
        (["demo", "--epochs", "3", "--epochs=4"], "`--epochs` is given twice"),
        (["try", "x", "--open", "--no-open"], "`--open` and `--no-open`"),
        (["demo", "--out", ""], "`--out` is empty"),
        (["verify"], "Missing argument 'DIR'"),
        (["verify", "missing"], "`missing` has no manifest.json"),
        (["verify", "."], "has no manifest.json"),
        (["try", "missing", "--teacher", "missing.keras"], "`missing` has no manifest.json"),
        (["cache", "write", "missing.keras", "c"], "`missing.keras` does not exist"),
        (["cache", "verify", "c", "--teacher", "missing.keras"], "`missing.keras` does not exist"),
    ],
)
def test_arguments(refused, arguments, reason):
    import re

    assert re.search(reason, refused(*arguments))


@pytest.mark.parametrize("command", ["verify", "bench", "report"])
def test_a_file_in_place_of_an_export(refused, tmp_path, command):
    (tmp_path / "model.tflite").write_text("x")
    assert "`model.tflite` is a file. Pass the folder that" in refused(command, "model.tflite")


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--teacher", "missing.keras"],
        ["export", "missing.keras"],
        ["cache", "write", "missing.keras", "c"],
    ],
)
def test_a_missing_model_is_told_before_keras_is_imported(refused, monkeypatch, arguments):
    def never():
        raise AssertionError("Keras is being imported.")

    for module in ("demo", "export", "cache"):
        monkeypatch.setattr(f"keras_kd.cli.{module}.import_keras", never)
    assert "`missing.keras` does not exist" in refused(*arguments)


def test_an_unknown_target_is_told_before_keras_is_imported(refused, models, monkeypatch):
    def never():
        raise AssertionError("Keras is being imported.")

    monkeypatch.setattr("keras_kd.cli.export.import_keras", never)
    reason = refused("export", models["good"], "--target", "litert,etos-u55")
    assert "`etos-u55` is no known target" in reason
    assert "Did you mean `ethos-u55`" in reason


@pytest.mark.parametrize("columns", [40, 46, 60, 79])
@pytest.mark.parametrize(
    "command", [["demo"], ["distill"], ["export"], ["cache", "write"], [], ["cache"]]
)
def test_the_help_cuts_nothing_in_a_narrow_terminal(run, monkeypatch, columns, command):
    import re

    def options(text):
        return set(re.findall(r"--[a-z][a-z-]+", text))

    monkeypatch.setenv("COLUMNS", "160")
    code, wide, _ = run(*command, "--help")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert (code, run(*command, "--help")[0]) == (0, 0)
    narrow = run(*command, "--help")[1]
    assert options(narrow) == options(wide)
    assert "…" not in narrow
    assert "..." not in narrow.replace("[ARGS]...", "")
    assert max(map(len, narrow.splitlines())) <= columns


@pytest.mark.parametrize("command", ["demo", "export"])
def test_a_folder_that_is_not_empty_asks_for_overwrite(refused, tmp_path, models, command):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("years of work")
    student = [models["good"]] if command == "export" else []
    assert "--overwrite" in refused(command, *student, "--out", "kept")


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_a_file_in_the_place_of_the_folder(refused, tmp_path, out):
    (tmp_path / "taken").write_text("a file")
    assert "is a file, so nothing can be exported" in refused("demo", "--out", out)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "cannot be written to" in refused("demo", "--out", "closed/out")


@pytest.mark.parametrize("damage", ["truncated", "text", "zip", "folder", "h5"])
@pytest.mark.parametrize("command", ["demo", "export"])
def test_damaged_and_foreign_models(refused, tmp_path, models, image_file, command, damage):
    path = tmp_path / ("model.h5" if damage == "h5" else "model.keras")
    content = models["good"].read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no model")
    wanted = {"folder": "is a folder", "h5": "is no `.keras` file"}.get(damage, "no `.keras` file")
    if command == "demo":
        assert wanted in refused("demo", "--data", image_file, "--teacher", path)
    else:
        assert wanted in refused("export", path)


def test_a_model_of_tf_keras_is_named_as_such(refused, tmp_path, models):
    path = tmp_path / "old.keras"
    with zipfile.ZipFile(models["good"]) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "metadata.json":
                content = json.dumps({**json.loads(content), "keras_version": "2.15.0"})
            target.writestr(name, content)
    assert "written by tf_keras 2.15.0 (Keras 2)" in refused("export", path)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("classes", "has 3 classes. Choose a teacher with 3 outputs"),
        ("shape", "takes inputs of shape (5, 5, 1), but the images"),
        ("unbuilt", "is not built"),
        ("lambda", "Put a layer class in place of the Lambda"),
        ("diverged", "answers the first images of"),
    ],
)
def test_teachers_that_do_not_fit(refused, models, image_file, model, reason):
    assert reason in refused("demo", "--data", image_file, "--teacher", models[model])


def test_data_that_cannot_be_used(refused, tmp_path, image_file):
    (tmp_path / "half.npz").write_bytes(image_file.read_bytes()[:900])
    assert "truncated or of another format" in refused("demo", "--data", "half.npz")
    np.savez(tmp_path / "other.npz", audio=np.zeros(9))
    assert "lacks `x_train`" in refused("demo", "--data", "other.npz")


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": np.zeros((8, 6, 6, 1), "float32") + np.nan}, "NaN"),
        ({"x": np.zeros((0, 6, 6, 1), "float32")}, "empty|no samples"),
        ({"x": np.zeros((8, 7, 6, 1), "float32")}, "shape"),
        ({"audio": np.zeros((8, 6, 6, 1), "float32")}, "Store `x` .* or `image` by"),
        ({"x": np.float32(3)}, "a single value where one row a sample is needed"),
        ({"x": np.full((8, 6, 6, 1), "a")}, "dtype <U1; numbers are needed"),
    ],
)
def test_calibration_that_cannot_be_used(refused, tmp_path, models, arrays, reason):
    import re

    np.savez(tmp_path / "data.npz", **arrays)
    said = refused("export", models["good"], "--calibration", "data.npz")
    assert re.search(reason, said)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--precisions", "int4"], "Did you mean `int8`"),
        (["--formats", "tfl"], "Did you mean `tflite`"),
        (["--formats", ","], "`formats` is empty"),
        (["--max-drop", "2"], "max_drop"),
        (["--objective", "speed"], "objective"),
        (["--labels", "a,b"], "must name the 3 classes"),
        (["--name", "../out"], "name"),
    ],
)
def test_settings_of_the_export(refused, models, image_file, option, reason):
    assert reason in refused("export", models["good"], "--calibration", image_file, *option)


def test_no_data_names_the_option(refused, models):
    said = refused("export", models["good"], "--precisions", "float32")
    assert "`--evaluation DATA` on the command line" in said


def test_int8_without_calibration_says_what_to_pass(refused, models, image_file):
    assert "calibration" in refused("export", models["good"], "--evaluation", image_file)


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("keras_kd.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("keras_kd.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["demo"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "keras-kd: the command line needs `typer`, which is not installed. "
        'Install it with: pip install "keras_kd[report]"\n'
    )
    assert said.out == ""


def test_ctrl_c_while_the_program_is_imported(capsys, monkeypatch):
    import sys

    class Interrupt:
        def find_spec(self, name, path=None, target=None):
            if name == "keras_kd.cli.app":
                raise KeyboardInterrupt

    for name in [name for name in sys.modules if name.startswith("keras_kd.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("keras_kd.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    assert main(["verify", "x"]) == 130
    assert capsys.readouterr().err == "keras-kd: interrupted before any work began.\n"


def test_ctrl_c_shows_nothing_of_what_libraries_said(capfd):
    for error, shown in ((KeyboardInterrupt, ""), (ValueError, "noise")):
        with pytest.raises(error), console.native_silence():
            os.write(2, b"noise")
            raise error
        assert capfd.readouterr().err == shown


def test_a_mistake_of_the_program_keeps_its_traceback(run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("keras_kd.datasets.load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("demo")


def test_the_program_reports_to_nobody(refused, monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    refused("verify", "missing")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    refused("verify", "missing")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
