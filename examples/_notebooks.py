"""Make the notebooks from the examples: `python examples/_notebooks.py [NAME ...]`.

To add one: write `examples/NAME.py` in py:percent form, beginning as
`quickstart.py` does, run `make notebooks`, look at it, and commit both files.
`make examples` executes every example, and `make test` compares each pair.
"""

import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent

# What TensorFlow's C++ side writes before anyone can ask it not to.
NOISE = re.compile(
    r"^(WARNING: All log messages|[IWE]0000 |.*TF-TRT|INFO: Created|To enable the following"
    r"|WARNING:tensorflow:\d+ out of the last|TqdmWarning: IProgress|findfont: ).*\n?",
    re.M,
)

# Where a warning says that it comes from: a path of this machine, another in every run, and the
# line that called.
PLACE = re.compile(r"^/\S*\.py:\d+: (\w*Warning: .*\n)  .*\n?", re.M)


def examples():
    """The scripts that have a notebook."""
    return sorted(p for p in FOLDER.glob("*.py") if not p.name.startswith("_"))


def execute(script, timeout=600):
    """Run a script's cells in a fresh kernel and return the notebook with its outputs."""
    notebook = jupytext.read(script)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    # What a cell prints arrives in pieces, others in every run: it is put together again.
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": FOLDER}},
        coalesce_streams=True,
    )
    client.execute(env=environment)
    for number, cell in enumerate(notebook.cells):
        # Random identifiers and times would change the file at every run.
        cell["id"] = f"cell-{number}"
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_quiet, cell.outputs) if output is not None]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _quiet(output):
    if output.output_type == "stream":
        output["text"] = NOISE.sub("", PLACE.sub(r"\1", output["text"]))
        if not output["text"].strip():
            return None
    return output


def main(names):
    """Write `NAME.ipynb` beside each `NAME.py`."""
    for script in examples():
        if not names or script.stem in names:
            target = script.with_suffix(".ipynb")
            temporary = target.with_suffix(".tmp")
            nbformat.write(execute(script, timeout=3600), temporary)
            temporary.replace(target)
            print(f"wrote {target.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
