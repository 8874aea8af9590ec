"""What `keras-kd verify` does once its arguments are known."""

from __future__ import annotations

import contextlib

from keras_kd.cli.console import Terminal, native_silence
from keras_kd.export import warm
from keras_kd.export.verification.reverify import verify
from keras_kd.utils.escaping import plain


def prove(folder: str, *, as_json: bool, quiet: bool, alone: bool = False) -> int:
    """Verify an export and print what was found.

    Args:
        folder: The folder.
        as_json: Whether stdout gets one JSON document.
        quiet: Whether there are no progress bars.
        alone: Whether this process is the command's own.

    Returns:
        The exit code.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    with contextlib.ExitStack() as stack:
        if alone:
            # Libraries say what they miss of the machine when they are imported.
            with native_silence():
                stack.enter_context(warm.forking("measure"))
        report = verify(folder, progress=stack.enter_context(terminal.working()))
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
    return 1 if problems else 0
