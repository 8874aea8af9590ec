"""`keras-kd bench`: how fast the files of an export are on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

import keras_kd.export
from keras_kd.cli import inputs, options
from keras_kd.cli.console import Terminal
from keras_kd.cli.report import check_target
from keras_kd.export.staged_folder import written_together


def bench(
    folder: options.Exported,
    threads: Annotated[int, typer.Option(min=1, help="Threads that a runtime may use.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(metavar="STUDENT.keras", help="The Keras model, to be timed as well."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long each file is measured.")] = 1.0,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to write.  [default: as DIR]")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time every exported file in its runtime, each in a process of its own.

    Prints the median and the 90th percentile of one inference, the first (cold) and a later (warm)
    start, and the memory that a file adds to the process, and writes them as `bench.csv`,
    `bench.json` and `bench.png`. The Keras model stands beside the files: measured with `--model`,
    otherwise as it was when they were exported.

    Exit code 0 if every file was measured, 1 if one does not run, 2 for bad input.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    # The cheap checks come first: runtimes take seconds to import.
    if model is not None:
        inputs.check_model_file(model, "model")
    target = check_target(folder, out, ("bench.csv", "bench.json", "bench.png"))
    with terminal.working() as work:
        result = keras_kd.export.bench(folder, threads, model=model, seconds=seconds, progress=work)
        with written_together(target) as made:
            written = [
                result.save_csv(made / "bench.csv"),
                result.save_json(made / "bench.json"),
                result.save_png(made / "bench.png"),
            ]
    names = ", ".join(path.name for path in written)
    terminal.result(result.to_dict(), result.table(terminal.width), "", f"{names} are in {target}.")
    raise typer.Exit(1 if any(row["error"] for row in result.rows()) else 0)
