"""`lowrank-tune runs`: the runs and chains of a folder, newest first. Nothing here imports torch."""

from __future__ import annotations

from lowrank_tune.ui.run_list.entry import ListedRun, RunState
from lowrank_tune.ui.run_list.folder import list_runs
from lowrank_tune.ui.run_list.json_output import runs_as_json
from lowrank_tune.ui.run_list.table import print_runs

__all__ = [
    "ListedRun",
    "RunState",
    "list_runs",
    "print_runs",
    "runs_as_json",
]
