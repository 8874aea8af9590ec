"""`keras-kd verify`: an export proven again from its files."""

from __future__ import annotations

import typer

from keras_kd.cli import options
from keras_kd.cli.verification import prove


def verify(
    folder: options.Exported,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check exported files: hashes, loading, and the answers on the stored samples.

    All figures are measured anew. Hashes show accidents, not who made the files.

    Exit code 0 if every file is the one that was exported and answers as it did then, 1 if one
    does not answer so, 2 if a file is missing, swapped or edited.
    """
    raise typer.Exit(prove(folder, as_json=as_json, quiet=quiet))
