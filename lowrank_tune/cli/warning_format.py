"""Warnings of the kit on the command line: one sentence, without the place in the code."""

from __future__ import annotations

import warnings
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
default_format = warnings.formatwarning


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Returns the text of a warning: `warning: MESSAGE` for those of the kit, with the place in the code for others."""
    if Path(filename).is_relative_to(PACKAGE):
        return f"warning: {message}\n"
    return default_format(
        message,
        category,
        filename,
        lineno,
        line,
    )
