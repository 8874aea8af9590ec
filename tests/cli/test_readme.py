"""The README's and CONTRIBUTING's code runs, and the tests they name exist."""

import ast
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.M | re.S)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = blocks(README, "python")
    assert "epochs=30" in example
    short = example.replace("epochs=30", "epochs=1, verbose=0")
    # One file of the eight, and any accuracy: this is about the code.
    short = short.replace('"runs/mine",', '"runs/mine", ("tflite",), ("int8",), max_drop=None,')
    monkeypatch.chdir(tmp_path)
    exec(compile(short, "README.md", "exec"), {})
    assert "tflite int8" in capsys.readouterr().out
    assert (tmp_path / "runs" / "mine" / "manifest.json").is_file()


def test_the_comparison_names_tests_that_exist():
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", README)
    assert len(named) == README.count("`tests/")
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_paths_in_the_texts_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:examples|docs|exported|keras_kd)/[\w./]*)`", text):
            stands_for_any = "NAME" in path
            assert stands_for_any or (ROOT / path).exists(), f"{name} names {path}"


def test_the_loss_of_the_guide_works():
    import keras

    from keras_kd.losses import logits

    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = guide.partition("## Adding a loss")[2].partition("\n## ")[0]
    code, row = blocks(section, "python")
    space = dict(vars(logits))
    exec(compile(re.sub(r"^   ", "", code, flags=re.M), "CONTRIBUTING.md", "exec"), space)
    try:
        teacher, student = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 4.0]])
        loss = space["LogitMAE"](reduction=None)
        np.testing.assert_allclose(loss(teacher, student), [1.0, 1.5])
    finally:
        keras.saving.get_custom_objects().pop("keras_kd>LogitMAE")
    assert "losses.LogitMAE" in row
