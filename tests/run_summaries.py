"""The least that `summary.json` of a run that is done has to contain."""

from __future__ import annotations

from typing import Any

DONE_SUMMARY: dict[str, Any] = {
    "status": "done",
    "algorithm": "sft",
    "step": 1,
    "steps": 1,
    "seconds": 1.0,
    "heldout": {},
    "heldout_details": {},
    "answers": {},
    "warnings": [],
}
DONE_CHAIN = {**{key: DONE_SUMMARY[key] for key in DONE_SUMMARY if key not in ("step", "steps")}, "stages": []}
