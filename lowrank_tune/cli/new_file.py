"""Files that a command copies for a person: never over one that exists."""

from __future__ import annotations

from pathlib import Path

from lowrank_tune.errors import UserError


def write_new_file(file: Path, text: str, instead: str) -> None:
    """Write a file that does not exist yet. Raises UserError otherwise; `instead` is the advice where it exists."""
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        if file.exists():
            reason = f"is there already; {instead}"
        else:
            reason = f"cannot be written: {error.strerror or error}"
        raise UserError(f"{file}: {reason}") from error
