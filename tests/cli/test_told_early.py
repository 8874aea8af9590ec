"""What a path, a name or a number on the command line tells is said before Keras is imported."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

DIGITS = Path(__file__).parents[2] / "exported" / "digits"

PROGRAM = """
import contextlib, io, json, sys
import importlib.abc, importlib.machinery

class Never(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in ("keras", "tensorflow"):
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is being imported")

    def exec_module(self, module):
        raise AssertionError

sys.meta_path.insert(0, Never())
from keras_kd.cli import main
said = []
for arguments in json.load(open(sys.argv[1])):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    said.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""

# Files that are no model, and what is said of each.
MODELS = {
    "missing.keras": "does not exist",
    "folder.keras": "is a folder",
    "text.keras": "no `.keras` file",
    "half.keras": "no `.keras` file",
    "other.keras": "it has no `config.json`",
    "old.keras": r"written by tf_keras 2.15.0 \(Keras 2\)",
    "model.h5": "is no `.keras` file",
    "": "does not exist",
}
DATA = {
    "missing.npz": "does not exist",
    "folder.npz": "is a folder",
    "text.npz": "not a readable `.npz` file",
    "digit": "`tfds:digit`",
    "": "empty",
}
FOLDERS = {"missing": "has no manifest.json", "empty": "has no manifest.json"}
FILES = {
    "missing.tflite": "does not exist",
    "missing": "does not exist",
    "empty": "has no manifest.json",
    "text.bin": r"A `.keras` file loads with",
}
GOOD = "good.keras"

CASES = [
    *([["bench", "digits", "--model", name], said] for name, said in MODELS.items()),
    *([["bench", name], said] for name, said in FOLDERS.items()),
    *([["bench", name, "--model", "missing.keras"], "does not exist"] for name in FOLDERS),
    *([["report", name], said] for name, said in FOLDERS.items()),
    *([["verify", name], said] for name, said in FOLDERS.items()),
    *([["try", name], said] for name, said in FOLDERS.items()),
    *([["try", "digits", "--teacher", name], said] for name, said in MODELS.items()),
    [["try", "digits", "--port", "70000"], "--port"],
    [["bench", "digits", "--threads", "0"], "--threads"],
    [["bench", "digits", "--seconds", "0", "--out", "new"], "must be positive"],
    [["bench", "digits", "--out", "text.bin"], "text.bin"],
    [["report", "digits", "--out", "text.bin"], "text.bin"],
    *([["export", name], said] for name, said in MODELS.items()),
    *([["export", GOOD, "--calibration", name], said] for name, said in DATA.items()),
    *([["export", GOOD, "--evaluation", name], said] for name, said in DATA.items()),
    [["export", GOOD, "--formats", "tfl"], "Did you mean `tflite`"],
    [["export", GOOD, "--precisions", "int4"], "Did you mean `int8`"],
    [["export", GOOD, "--max-drop", "2"], "max_drop"],
    [["export", GOOD, "--objective", "sise"], "Did you mean `size`"],
    [["export", GOOD, "--batch", "2"], "`batch` must be"],
    [["export", GOOD, "--name", "a/b"], "`name` is"],
    [["export", GOOD, "--target", "etos-u55"], "Did you mean `ethos-u55`"],
    [["export", GOOD, "--out", "full"], "is not empty"],
    [["export", GOOD, "--out", "text.bin/x"], "is a file"],
    *([["demo", "--teacher", name], said] for name, said in MODELS.items()),
    *([["demo", "--data", name], said] for name, said in DATA.items()),
    *(
        [["distill", "--data", "digits", "--teacher", name, "--student", GOOD], said]
        for name, said in {
            **MODELS,
            "folder.keras": "holds no cache",
            "model.h5": "is no teacher",
            "": "is no teacher",
        }.items()
    ),
    *(
        [["distill", "--data", "digits", "--teacher", GOOD, "--student", name], said]
        for name, said in MODELS.items()
        if name
    ),
    *(
        [["distill", "--data", "digits", "--teacher", name, "--student", GOOD], said]
        for name, said in {
            "empty": "holds no cache",
            "digits": "holds no cache",
            "missing.onnx": "does not exist",
            "rows.npz": "A teacher's answers are",
            "gradient-bosting": "Did you mean `gradient-boosting`",
        }.items()
    ),
    *(
        [["distill", "--data", "digits", "--teacher", GOOD, "--student", GOOD, *more], said]
        for more, said in (
            (["--task", "clasification"], "Did you mean"),
            (["--formats", "onx"], "Did you mean `onnx`"),
            (["--precisions", "int7"], "precisions"),
            (["--max-drop", "-1"], "max_drop"),
            (["--out", "full"], "is not empty"),
            (["--validation", "rows.npz"], "does not apply"),
            (["--save-config", "missing/a.toml"], "there is no folder"),
        )
    ),
    *(
        [["distill", "--data", name, "--teacher", GOOD, "--student", GOOD], said]
        for name, said in {**DATA, "": "`--data` is missing"}.items()
    ),
    *([["tune", "--teacher", name], said] for name, said in MODELS.items()),
    *([["tune", "--teacher", GOOD, "--data", name], said] for name, said in DATA.items()),
    [["tune", "--teacher", GOOD, "--minimize", "eror"], "Did you mean 'error'"],
    [["tune", "--teacher", GOOD, "--search", "widht=0.5,1"], "mean 'width'"],
    [["tune", "--teacher", GOOD, "--search", "method=DISTT,DIST"], "mean 'DIST'"],
    [["tune", "--teacher", GOOD, "--search", "width=0.5,2"], "`width` lies"],
    [["tune", "--teacher", GOOD, "--out", "text.bin"], "text.bin"],
    *([["lifelong", name], said] for name, said in MODELS.items()),
    *([["lifelong", GOOD, "--data", name], said] for name, said in DATA.items()),
    [["lifelong", GOOD, "--method", "replai"], "Did you mean 'replay'"],
    [["lifelong", GOOD, "--out", "text.bin"], "text.bin"],
    *([["robust", name, "--data", "digits"], said] for name, said in FILES.items()),
    *(
        [["robust", name, "--data", "digits"], said]
        for name, said in MODELS.items()
        if name[-6:] == ".keras"
    ),
    *([["robust", GOOD, "--data", name], said] for name, said in DATA.items()),
    *(
        [["robust", GOOD, "--data", "digits", "--calibrate-on", name], said]
        for name, said in DATA.items()
    ),
    *(
        [["robust", "digits", "--data", "digits", "--epsilon", "0.1", "--twin", name], said]
        for name, said in MODELS.items()
    ),
    [["robust", GOOD, "--data", "digits", "--bounds", "0"], "two numbers"],
    [["robust", GOOD, "--data", "digits", "--severities", "a"], "whole numbers from 1 to 5"],
    [["robust", GOOD, "--data", "digits", "--severities", "6"], "whole numbers from 1 to 5"],
    [["robust", GOOD, "--data", "digits", "--norm", "l3"], "`linf` or `l2`"],
    [["robust", GOOD, "--data", "digits", "--html", "missing/a.html"], "no folder"],
    *(
        [["cache", "write", name, "c"], said]
        for name, said in {**MODELS, "model.h5": "is no such file"}.items()
    ),
    *([["cache", "write", GOOD, "c", "--data", name], said] for name, said in DATA.items()),
    [["cache", "write", GOOD, "c", "--dtype", "float8"], "'float16' or 'float32'"],
    [["cache", "write", "rows.npz", "c"], "A teacher's answers are"],
    [["cache", "verify", "missing"], "missing"],
    [["cache", "verify", "digits"], "digits"],
    [["cache", "info", "missing"], "missing"],
    *(
        [["cache", "verify", "c", "--teacher", name], said]
        for name, said in MODELS.items()
        if name != "model.h5"
    ),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each command line came to, all of them in one process; and the folder it ran in."""
    folder = tmp_path_factory.mktemp("early")
    shutil.copytree(DIGITS, folder / "digits")
    for name in ("empty", "full", "folder.keras", "folder.npz"):
        (folder / name).mkdir()
    for name in ("text.keras", "text.npz", "text.bin", "model.h5", "full/mine"):
        (folder / name).write_text("no model")
    about = {"config.json": "{}", "metadata.json": json.dumps({"keras_version": "3.12.0"})}
    old = {**about, "metadata.json": json.dumps({"keras_version": "2.15.0"})}
    for name, members in (
        (GOOD, about),
        ("old.keras", old),
        ("other.keras", {"hello.txt": "hello"}),
    ):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, text in members.items():
                archive.writestr(member, text)
    (folder / "half.keras").write_bytes((folder / GOOD).read_bytes()[:60])
    np.savez(folder / "rows.npz", x=np.zeros((4, 2)))
    before = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    cases = folder.parent / "cases.json"
    cases.write_text(json.dumps([arguments for arguments, _ in CASES]))
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cases)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    after = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return before == after, json.loads(ran.stdout)


def test_every_command_tells_it_before_keras_is_imported(told):
    same, told = told
    wrong = [] if same else ["something was written"]
    for (arguments, reason), (code, out, err) in zip(CASES, told, strict=True):
        fits = (code, out) == (2, "") and err.count("\n") == 1
        if not fits or not re.search(reason, err):
            wrong.append(f"{arguments}: {code} {out!r} {err!r}, not {reason!r}")
    assert not wrong, "\n".join(wrong)
