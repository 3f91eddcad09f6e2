"""What can be done with the result of a run: each step as a command and as a call in Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.json_files import get_objects


@dataclass(frozen=True)
class NextStep:
    """A step in words, as a command of the shell, and as lines of Python."""

    words: str
    command: str
    python: str


def next_steps(summary: Mapping[str, Any], folder: Path) -> list[NextStep]:
    """Returns the steps that fit the result; for a run that is not done, how to continue it."""
    if summary.get("status") != "done":
        words = "the same call continues it from its newest checkpoint"
        return [NextStep(words, "lowrank-tune run RECIPE", f"run(RECIPE, out={_text(folder)})")]
    run = shlex.quote(str(folder))
    report = NextStep(
        "write report.html again",
        f"lowrank-tune report {run}",
        _call("lowrank_tune.ui.report", "write_report", f"Path({_text(folder)})"),
    )
    if _is_reward_model(get_objects(summary, "stages") or [summary]):
        command = f"lowrank-tune score {run} --file rows.jsonl"
        return [NextStep("score answers with it", command, ""), report]
    return [*_policy_steps(run, folder), report]


def _is_reward_model(stages: Iterable[Mapping[str, Any]]) -> bool:
    return all(stage.get("algorithm") == "reward" for stage in stages)


def _policy_steps(run: str, folder: Path) -> list[NextStep]:
    options = f"Path({_text(folder)}), ExportOptions('gguf')"
    return [
        NextStep(
            "ask it",
            f"lowrank-tune chat {run}",
            _call("lowrank_tune.chat", "ask", f"{_text(folder)}, 'Your question?'"),
        ),
        NextStep(
            "measure it on held-out questions",
            f"lowrank-tune eval {run}",
            _call(
                "lowrank_tune.evaluation",
                "evaluate",
                f"{_text(folder)}, Options()",
                "Options, ",
            ),
        ),
        NextStep(
            "write it for llama.cpp",
            f"lowrank-tune export {run} --to gguf",
            _call(
                "lowrank_tune.export.export",
                "export",
                options,
                "ExportOptions, ",
            ),
        ),
    ]


def _call(
    module: str,
    function: str,
    arguments: str,
    also: str = "",
) -> str:
    lines = [f"from {module} import {also}{function}", f"{function}({arguments})"]
    if "Path(" in arguments:
        lines.insert(0, "from pathlib import Path")
    return "\n".join(lines)


def _text(folder: Path) -> str:
    """Returns the path as a literal of Python."""
    return json.dumps(str(folder))
