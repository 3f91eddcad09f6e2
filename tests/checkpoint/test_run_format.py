"""A run folder of another format is refused by every command that opens it, with the version that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune.assembly.finished_run import load_finished_reward_run, load_finished_run
from lowrank_tune.chat import target as chat_target
from lowrank_tune.checkpoint.folder import RunFolder
from lowrank_tune.checkpoint.run_format import LAST_READER, VERSION, check_run_format
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.target import resolve_target
from lowrank_tune.ui.compare.runs import read_runs
from lowrank_tune.ui.report import write_report
from lowrank_tune.ui.watch import watch

OLD_RECIPE: dict[str, Any] = {"name": "old", "algorithm": "sft", "train": {"steps": 3}}


def ignore(event: Any) -> None:
    """Drop an event."""


def run_folder(path: Path, version: Any) -> Path:
    """A finished run, as far as the commands look before they read its recipe."""
    (path / "final").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"version": version, "recipe": OLD_RECIPE}))
    (path / "events.jsonl").write_text('{"v": 1, "event": "step", "step": 1, "steps": 3, "stats": {}, "seconds": 1}\n')
    return path


def continue_run(path: Path) -> None:
    (path / "checkpoints" / "step-1").mkdir(parents=True)
    (path / "final").rmdir()
    RunFolder.open(path, OLD_RECIPE, "", lambda old, new: [], True, ignore)


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "chat": lambda path: chat_target.resolve_target(str(path)),
    "eval": lambda path: resolve_target(str(path), None, ignore),
    "export": load_finished_run,
    "report": write_report,
    "compare": lambda path: read_runs([path, run_folder(path.parent / "other", VERSION)]),
    "watch": lambda path: watch([path], {}, plain=True),
    "score": load_finished_reward_run,
    "run": continue_run,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_older_run_is_refused_with_the_version_that_reads_it(tmp_path: Path, command: str) -> None:
    run = run_folder(tmp_path / "old", 1)
    with pytest.raises(UserError) as caught:
        COMMANDS[command](run)
    message = str(caught.value)
    assert message.startswith(f"{run} has run format 1, and this version reads format {VERSION}: ")
    assert LAST_READER[1] in message and "\n" not in message


@pytest.mark.parametrize("version", [VERSION + 1, 0, "x", None, 1.5])
def test_a_format_that_is_not_known_asks_for_a_newer_version(tmp_path: Path, version: Any) -> None:
    with pytest.raises(UserError, match="a newer lowrank_tune wrote it"):
        check_run_format(run_folder(tmp_path / "run", version))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"version": 2}'])
def test_unreadable_run_file_is_left_to_the_caller(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    check_run_format(tmp_path)
    check_run_format(tmp_path / "absent")
