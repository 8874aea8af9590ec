"""`keras-kd doctor`: what is installed, which backend runs, and how to get what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from keras_kd.cli import installation, options
from keras_kd.cli.console import Terminal


def doctor(
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only problems.")] = False,
) -> None:
    """Show versions, backends and extras, what is missing and how to get it.

    Nothing is imported but the metadata of packages, so that it answers where a backend is broken.

    Exit code 0 if nothing keeps keras_kd from working, 1 if something does.
    """
    found = installation.collect()
    terminal = Terminal(as_json=as_json, quiet=quiet)
    said = installation.text(found)
    if quiet:
        said = "\n".join(installation.problems(found))
    terminal.result(found, *([said] if said else []))
    raise typer.Exit(1 if found["problems"] else 0)
