"""Figures as a person reads them."""

from __future__ import annotations


def size(count: int | None) -> str:
    """Return a number of bytes as a person reads it, in units of 1,000."""
    if count is None:
        return "-"
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("KB", "MB", "GB"):
        value /= 1000
        if value < 999.5 or unit == "GB":
            break
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def percent(share: float | None) -> str:
    """Return a share in 0..1 as percent with two digits."""
    return "-" if share is None else f"{100 * share:.2f}"


def number(value: float | None) -> str:
    """Return a difference in three significant digits."""
    return "-" if value is None else f"{value:.2g}"


def latency(milliseconds: float | None) -> str:
    """Return milliseconds with the digits that mean something."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.1f}"
