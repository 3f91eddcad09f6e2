"""The memory planner's word on each cell, read from a file: `{"shape": "llama-3.1-8b", "planned GiB": {"sft 4x2048": 12.3}}`."""

from __future__ import annotations

import json
from pathlib import Path


def plans(shape: str, file: str | None) -> dict[str, float]:
    """Planned peaks in GiB by the cells' names; none without a file."""
    if file is None:
        return {}
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    if found["shape"] != shape:
        raise SystemExit(f"{file} holds plans for {found['shape']}, not for {shape}")
    return {str(name): float(gib) for name, gib in found["planned GiB"].items()}
