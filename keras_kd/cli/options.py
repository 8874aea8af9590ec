"""Options that several commands have, each with its one help text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Exported = Annotated[str, typer.Argument(metavar="DIR", help="A folder with manifest.json.")]
DataDir = Annotated[str | None, typer.Option(metavar="DIR", help="Where TFDS keeps its data.")]
ImageSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Resize TFDS images to N by N pixels.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Silent = Annotated[bool, typer.Option("--quiet", "-q", help="No notes or progress bars.")]


def seed(text: str) -> Any:
    """An option for what NumPy and Keras take as seed.

    Args:
        text: Of what it is the seed.
    """
    return typer.Option(metavar="N", min=0, max=2**32 - 1, help=text)
