"""A list of runs as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lowrank_tune.ui.run_list.entry import ListedRun


def runs_as_json(runs: Sequence[ListedRun]) -> str:
    """Returns the runs as a JSON list; `updated` is seconds since the epoch, and a chain has its `stages`."""
    return json.dumps([_to_dict(run) for run in runs], indent=2)


def _to_dict(run: ListedRun) -> dict[str, Any]:
    best = run.best
    result: dict[str, Any] = {
        "name": run.name,
        "folder": str(run.folder),
        "state": run.state.value,
        "algorithm": run.algorithm,
        "base": run.base,
        "best": None if best is None else {"metric": best.name, "value": best.value, "step": best.step},
        "step": run.step,
        "steps": run.steps,
        "updated": run.updated,
        "seconds": round(run.seconds, 1),
        "bytes": run.num_bytes,
        "problem": run.problem,
    }
    if run.stages:
        result["stages"] = [_to_dict(stage) for stage in run.stages]
    return result
