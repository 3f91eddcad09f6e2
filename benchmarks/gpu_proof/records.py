"""Records of a proof: a file of JSON lines. A record is on disk before the next measurement starts, so a killed
proof loses nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path | None, record: Mapping[str, Any]) -> None:
    """Append one record and flush it to the disk. Without a path nothing is written."""
    if path is None:
        return
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            # The process that wrote the last line may have been killed in the middle of it.
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record, default=str).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """Return all complete records. A line that a killed process left incomplete is ignored."""
    return parse(path.read_bytes())


def parse(text: bytes) -> list[Record]:
    complete = []
    for line in text.split(b"\n"):
        try:
            complete.append(json.loads(line))
        except ValueError:
            continue
    return complete


class Tail:
    """Read the records that were added to a file since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def new(self) -> list[Record]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self.position += len(complete)
        return parse(complete)
