"""The generated part of docs/models.md: what is tested with each family of models, from tests/support_matrix.py.

    PYTHONPATH=. python scripts/models_page.py           # writes the page
    PYTHONPATH=. python scripts/models_page.py --check   # returns 1 if the page is not up to date

The slow tests run every check over every family, and fail if the page states another result.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from generated_part import update_page

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT / "tests"))
MATRIX: Any = importlib.import_module("support_matrix")
COLUMNS = {
    "all six algorithms": MATRIX.ALGORITHMS,
    "4 bits, rollout, adapters off, rows": ("4 bits", "rollout", "adapters off", "rows"),
    "merge, PEFT": ("merge", "PEFT"),
    "GGUF adapter": ("GGUF adapter",),
}
"""Titles of columns, and the checks that all hold where a column has a yes."""


def table() -> str:
    """Returns a row for each family and a column for each group of checks."""
    assert sorted(check for checks in COLUMNS.values() for check in checks) == sorted(MATRIX.CHECKS)
    lines = [f"| family | `model_type` | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for family in MATRIX.FAMILIES:
        cells = ["yes" if family.refused.keys().isdisjoint(checks) else "no" for checks in COLUMNS.values()]
        lines.append(f"| {family.title} | {model_types(family)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def model_types(family: Any) -> str:
    """Returns the model type of the text model, and that of the multimodal checkpoints that contain it."""
    if family.checkpoint:
        return f"`{family.checkpoint}` (`{family.model_type}`)"
    return f"`{family.model_type}`"


def sentences() -> str:
    """Returns the reasons of each no, and the notes, each after its families."""
    families: dict[str, list[str]] = {}
    for family in MATRIX.FAMILIES:
        for name, reason in family.refused.items():
            families.setdefault(f"no {name}: {reason}", []).append(family.title)
        if family.note:
            families.setdefault(family.note, []).append(family.title)
    return "\n".join(f"- **{'; '.join(titles)}**: {sentence}." for sentence, titles in families.items())


def generated() -> str:
    """Returns the text between the markers."""
    return "\n\n".join(("## Families", table(), "## Reasons and notes", sentences()))


if __name__ == "__main__":
    sys.exit(update_page(PAGE, generated, __doc__))
