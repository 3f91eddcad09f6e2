"""Writes files that a command copies for the user, never over an existing one."""

from __future__ import annotations

from pathlib import Path

from lowrank_tune.errors import UserError


def write_new_file(
    file: Path,
    text: str,
    instead: str,
) -> None:
    """Writes a new file. Raises UserError if it exists, with the advice `instead`, or cannot be written."""
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        if file.exists():
            reason = f"is there already; {instead}"
        else:
            reason = f"cannot be written: {error.strerror or error}"
        raise UserError(f"{file}: {reason}") from error
