"""Whether something else is where a run writes its results, which otherwise is found only after the last step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lowrank_tune.checkpoint import RunFolder, as_user_error
from lowrank_tune.config.base import Finding
from lowrank_tune.errors import UserError
from lowrank_tune.manifest import MANIFEST
from lowrank_tune.preflight.stages import PlannedStage
from lowrank_tune.run_summary import read_done_summary

FOLDERS = ("checkpoints", "final")
STAGE_FILES = (
    "base.json",
    "data.json",
    "events.jsonl",
    "samples.jsonl",
    "scores.json",
)
RUN_FILES = (
    "console.log",
    "recipe.yaml",
    "report.html",
    "run.json",
    "summary.json",
)
"""Files of a run, and of a chain and each of its stages."""
MAX_NAMES = 3
CURE = "move it away, or name another folder with --out"


def output_findings(stage: PlannedStage, run_folder: Path) -> Iterator[Finding]:
    """Yields a finding for each path that the stage, or the chain in `run_folder`, cannot replace at its end."""
    folders = [stage.folder / name for name in FOLDERS]
    files = [stage.folder / name for name in (*STAGE_FILES, *RUN_FILES)]
    files += [run_folder / name for name in RUN_FILES]
    try:
        # raises UserError for the folder of a later stage that is no run
        RunFolder.pick(stage.folder)
        with as_user_error(stage.folder):
            messages = [_folder_fault(path) for path in folders]
            if read_done_summary(stage.folder) is None:
                messages.append(_foreign_files(stage.folder / "final"))
            messages += [_file_fault(path) for path in dict.fromkeys(files)]
    except UserError as error:
        messages = [str(error)]
    for message in messages:
        if message:
            yield (), message


def _folder_fault(path: Path) -> str:
    if not os.path.lexists(path) or path.is_dir():
        return ""
    return f"{path} is not a folder, and the run writes a folder of this name: {CURE}"


def _file_fault(path: Path) -> str:
    if not os.path.lexists(path) or path.is_file():
        return ""
    return f"{path} is not a file, and the run writes a file of this name: {CURE}"


def _foreign_files(final: Path) -> str:
    """Returns the fault of a final folder that no run has written.

    The folder of an earlier end of the run is replaced, and the damaged one of a finished stage is set aside.
    """
    if not final.is_dir() or (final / MANIFEST).is_file():
        return ""
    names = sorted(path.name for path in final.iterdir())
    if not names:
        return ""
    listed = ", ".join(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        listed = f"{listed} and {len(names) - MAX_NAMES} more"
    return f"{final} contains files that this program did not write ({listed}): {CURE}"
