"""`summary.json` in the folder of a run or a chain, which anyone may have edited: whether the run is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_tune.json_files import read_json

SUMMARY = "summary.json"
DONE = "done"
FieldTypes = Mapping[str, type | tuple[type, ...]]
DONE_FIELDS: FieldTypes = {
    "algorithm": str,
    "seconds": (int, float),
    "heldout": dict,
    "heldout_details": dict,
    "answers": dict,
    "warnings": list,
}
"""Fields that every run and chain writes at its end, with their types."""
RUN_FIELDS: FieldTypes = {"step": int, "steps": int}
CHAIN_FIELDS: FieldTypes = {"stages": list}


def read_done_summary(run: Path) -> dict[str, Any] | None:
    """Returns the summary in the folder of a run that is done; None if it is not, or the file is missing or damaged."""
    summary, problem = _read(run)
    return summary if not problem and summary.get("status") == DONE else None


def summary_problem(run: Path) -> str:
    """Returns why the `summary.json` in the folder of a run is damaged; empty if it is not, or if there is none."""
    return _read(run)[1]


def _read(run: Path) -> tuple[dict[str, Any], str]:
    """Returns the content of the file and what is wrong with it. Either may be empty."""
    try:
        summary = read_json(run / SUMMARY)
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"it cannot be read ({error.strerror or error})"
    except ValueError:
        return {}, "it is not valid JSON"
    if not isinstance(summary, dict):
        return {}, "it is not a JSON object"
    if summary.get("status") != DONE:
        return summary, ""
    return summary, _problem_of_done(summary)


def _problem_of_done(summary: Mapping[str, Any]) -> str:
    fields = {**DONE_FIELDS, **(CHAIN_FIELDS if "stages" in summary else RUN_FIELDS)}
    invalid = [name for name, types in fields.items() if not isinstance(summary.get(name), types)]
    if not invalid:
        return ""
    return f"its status is `{DONE}`, and these fields are missing or invalid: {', '.join(invalid)}"
