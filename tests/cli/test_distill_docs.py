"""docs/distill.md: its example runs, and its tables name what there is."""

import re
import tomllib
from pathlib import Path

from keras_kd.cli import config_file, recipes, teachers
from keras_kd.datasets.task_data import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "distill.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_the_example_runs(run, tmp_path):
    (code,) = blocks("python")
    assert "epochs=30" in code
    exec(compile(code.replace("epochs=30", "epochs=1, verbose=0"), "distill.md", "exec"), {})
    first, again = blocks("sh")[0].splitlines()
    short = ["--method", "default", "--epochs", "1", "--precisions", "float32", "--quiet"]
    code, out, err = run(*first.split()[1:], *short)
    assert code == 0, err
    assert "on the test rows" in out
    written = {path.name for path in (tmp_path / "runs" / "digits").iterdir()}
    for name in re.findall(r"`([a-z]+\.(?:keras|json|html|toml))`", PAGE.partition("## Tasks")[0]):
        assert name in written
    # As the second line is written, all options come from the file.
    config = tomllib.loads((tmp_path / "job.toml").read_text())
    assert config["epochs"] == 1
    code, _, err = run(*again.split()[1:], "--quiet", "--formats", "onnx")
    assert code == 0, err


def test_the_page_names_what_there_is():
    for name in (*TASKS, *teachers.ESTIMATORS, *recipes.METHODS[:4]):
        assert f"`{name}`" in PAGE, name


def test_the_configuration_has_options_alone(run, tmp_path):
    (text,) = blocks("toml")
    (tmp_path / "c.toml").write_text(text)
    _, _, err = run("distill", "--config", "c.toml")
    assert "`small.keras` does not exist" in err
    assert not set(tomllib.loads(text)) & set(config_file.UNSAVED)
