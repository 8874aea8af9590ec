"""Pages of reports: one HTML file each, which opens offline."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from keras_kd.utils.escaping import plain


def filled(package: str, *template: str, **values: object) -> str:
    """Fill in the template of a page.

    Args:
        package: The package that the template lies in.
        *template: Its path there.
        **values: What it reads. Texts are shown as they are, whatever they hold; only what the
            template marks as safe is HTML.

    Returns:
        The page.

    Raises:
        ImportError: If Jinja is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            f"The HTML report needs {error.name}, which is not installed. Install it with "
            '`pip install "keras_kd[report]"`.'
        ) from error
    source = files(package).joinpath(*template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return environment.from_string(source).render(**values)


def _shown(value: object) -> Any:
    # What is marked as safe is made here, and keeps its lines.
    return plain(value) if type(value) is str else value
