"""Every example runs from a fresh kernel, and its notebook holds the same cells.

Running them takes minutes: `make examples`, which continuous integration calls beside `make test`.
"""

import importlib.util
import re
from pathlib import Path

import jupytext
import keras
import pytest

import keras_kd

EXAMPLES = Path(__file__).parents[2] / "examples"

spec = importlib.util.spec_from_file_location("_notebooks", EXAMPLES / "_notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)


@pytest.mark.parametrize("script", notebooks.examples(), ids=lambda path: path.stem)
def test_the_notebook_is_the_script(script):
    written = jupytext.read(script).cells
    paired = jupytext.read(script.with_suffix(".ipynb")).cells
    assert [(c.cell_type, c.source) for c in paired] == [(c.cell_type, c.source) for c in written]
    code = [cell for cell in paired if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "run `make notebooks`: outputs are missing"
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    # What stands above the first cell for jupytext is no cell of its own.
    assert paired[0].cell_type == "markdown"
    assert paired[0].source.startswith("# ")


@pytest.mark.parametrize("script", notebooks.examples(), ids=lambda path: path.stem)
def test_the_notebook_is_small_and_names_no_machine(script):
    written = script.with_suffix(".ipynb").read_text()
    assert len(written) < 200_000, "smaller plots, or fewer of them"
    found = re.search(r"(?<![\w.:/])/(tmp|home|work|root|Users|opt)/\S*", written)
    assert found is None, f"a path of the machine that ran it: {found[0]}"


@pytest.mark.notebooks
@pytest.mark.parametrize("script", notebooks.examples(), ids=lambda path: path.stem)
def test_the_script_runs(script, monkeypatch):
    # On the data that come along, whatever this machine has.
    monkeypatch.delenv("KERAS_KD_DATA", raising=False)
    printed = "".join(
        output["text"]
        for cell in notebooks.execute(script).cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    assert printed.strip()


def test_the_transfer_that_the_quickstart_proposes_fits_its_models():
    text = (EXAMPLES / "quickstart.py").read_text()
    proposed = re.search(r"distillation_loss=(\[.*?\])`", text, re.S)[1].replace("\n#", "\n")
    function = text[text.index("def convnet") : text.index("teacher = convnet")]
    names = {"keras": keras, "kd": keras_kd, "digits": keras_kd.datasets.load("digits")}
    exec(function, names)
    distiller = keras_kd.Distiller(
        names["convnet"]("student", 8, 8, 16), names["convnet"]("teacher", 32, 32, 64, 64)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile("adam", loss, distillation_loss=eval(proposed, names))
    digits = names["digits"]
    history = distiller.fit(digits.x_train[:32], digits.y_train[:32], verbose=0).history
    assert "hint" in history
