"""`keras-kd report`: what an export measured, as a table, a page and a card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import keras_kd.export
from keras_kd.cli import options, outputs
from keras_kd.cli.console import Terminal
from keras_kd.export.staged_folder import written_together
from keras_kd.export.target import check_names_free, check_writable


def report(
    folder: options.Exported,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to write.  [default: as DIR]")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also print the noise of each int8 layer.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what an export measured, without running anything.

    Prints the table and writes `report.html`, a page that opens offline, and `card.md`, a model
    card. `keras-kd verify` runs the files again.

    Exit code 0 if there is a file to take, 1 if none passed its check, 2 for bad input.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    target = check_target(folder, out, ("report.html", "card.md"))
    known = keras_kd.export.Report.load(folder)
    with terminal.working(), written_together(target) as made:
        names = [known.save_html(made / "report.html"), known.save_card(made / "card.md")]
    document = known.to_dict()
    texts = [known.table(terminal.width), ""]
    if layers:
        document["layers"] = known.layers().rows()
        texts += [known.layers().table(terminal.width), ""]
    written = " and ".join(path.name for path in names)
    terminal.result(document, *texts, f"{written} are in {target}.")
    raise typer.Exit(0 if known.best is not None else 1)


def check_target(folder: str, out: str | None, names: Sequence[str]) -> Path:
    """Return the folder to write to, the export's own by default.

    Args:
        folder: The export.
        out: What `--out` gave.
        names: What is going to be written there.

    Returns:
        A folder that can be written to, and that may not be there yet.

    Raises:
        ValueError: If there is no manifest in `folder`.
        FileExistsError: If something that is no file has one of the names.
        OSError: If the target is a file or cannot be written to.
    """
    # Before anything is made or measured.
    keras_kd.export.Report.load(folder)
    target = outputs.folder_of(out, Path(folder))
    check_writable(target)
    check_names_free(target, names)
    return target
