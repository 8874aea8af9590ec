"""`keras-kd verify`: an export proven again from its files."""

from __future__ import annotations

from typing import Annotated

import typer

import keras_kd.export
from keras_kd.cli.console import Terminal
from keras_kd.utils.escaping import plain


def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder with manifest.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Check exported files: hashes, loading, and the answers on the stored samples.

    All figures are measured anew. Hashes show accidents, not who made the files.

    Exit code 0 if every file is the one that was exported and answers as it did then, 1 if one
    does not answer so, 2 if a file is missing, swapped or edited.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    with terminal.working() as work:
        report = keras_kd.export.verify(folder, progress=work)
    problems = list(report.problems)
    failed = [artifact for artifact in report.artifacts if not artifact.passed]
    checked = [artifact for artifact in report.artifacts if artifact.file is not None]
    samples = report.manifest["evaluation"]["samples"]
    if problems:
        verdict = f"{len(problems)} of {len(checked)} files do not answer as when exported:"
        verdict = "\n".join([verdict, *(f"  {problem}" for problem in problems)])
        verdict += (
            "\nExport again on this machine, or take a runtime of the versions in the manifest."
        )
    else:
        verdict = (
            f"Verified: {len(checked)} of {len(checked)} files have the recorded hash, load, and "
            f"answer {samples} stored samples as when they were exported."
        )
        if failed:
            verdict += f"\n{len(failed)} had failed the export's own check, as the table says."
    for output, names in report.manifest["evaluation"]["not_measured"].items():
        verdict += (
            f"\nNot measured again, and no limit on it: {plain(', '.join(names))} of output "
            f"`{plain(output)}`, which needs the code or the samples of the export."
        )
    terminal.result(
        {**report.to_dict(), "problems": problems}, report.table(terminal.width), "", verdict
    )
    raise typer.Exit(1 if problems else 0)
