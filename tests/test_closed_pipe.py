"""Every command ends without a message if the reader of its pipe closes it, as `lowrank-tune data my.yaml | head -1`
does.

Commands run in forks of one process that has imported torch, so that each takes a second.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowrank_tune.cli import app

pytestmark = pytest.mark.slow

SERVER = """
import json, os, sys
import peft, torch, transformers
from lowrank_tune import cli

for line in iter(sys.stdin.readline, ""):
    child = os.fork()
    if not child:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdin = open("question.txt")
        sys.argv = ["lowrank-tune", *json.loads(line)]
        cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
CLOSED_PIPE = 141
STEPS = ("train.max_steps=2", "evaluate.num_prompts=2", "evaluate.num_completions_to_print=1")
DEMO_STEPS = [f"stages.{stage}.{setting}" for stage in ("sft", "grpo") for setting in STEPS]
ARGUMENTS = {
    "demo": ("--out", "demo", *DEMO_STEPS),
    "doctor": (),
    "examples": (),
    "schema": (),
    "presets": (),
    "data": ("tiny-sft",),
    "plan": ("tiny-sft", "--vram", "8", "evaluate={}"),
    "run": ("tiny-sft", "--out", "second", *STEPS),
    "score": ("tiny-grpo", "--limit", "2"),
    "watch": ("first",),
    "runs": (".",),
    "report": ("first",),
    "compare": ("first", "copy"),
    "chat": ("first", "--max-new-tokens", "4"),
    "eval": ("first", "--num-prompts", "2"),
    "merge": ("first", "--out", "merged"),
    "export": ("first", "--to", "peft", "--out", "exported"),
}
"""Arguments with which a command prints something within seconds; a command without an entry needs none."""
COMMANDS = [
    *(command.name or "" for command in app.registered_commands),
    *(group.name or "" for group in app.registered_groups),
]


class ClosedPipe:
    """Runs commands in a folder, with a pipe without a reader as their stdout."""

    def __init__(self, folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder = folder
        self._server = server

    def exit_code(self, *arguments: str) -> int:
        """Returns the exit code of a command."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(arguments) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def stderr(self) -> str:
        """Returns what the last command printed to stderr."""
        return (self.folder / "stderr.txt").read_text()


@pytest.fixture(scope="module")
def closed_pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedPipe]:
    folder = tmp_path_factory.mktemp("closed_pipe")
    (folder / "question.txt").write_text("What is 2 + 3?\n")
    environ = {**os.environ, "LOWRANK_TUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environ
    ) as server:
        pipe = ClosedPipe(folder, server)
        assert pipe.exit_code("run", "tiny-sft", "--out", "first", *STEPS) == CLOSED_PIPE, pipe.stderr()
        shutil.copytree(folder / "first", folder / "copy")
        yield pipe
        assert server.stdin is not None
        server.stdin.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_pipe_ends_a_command_without_a_message(command: str, closed_pipe: ClosedPipe) -> None:
    code = closed_pipe.exit_code(command, *ARGUMENTS.get(command, ()))
    stderr = closed_pipe.stderr()
    assert code == CLOSED_PIPE, stderr
    for word in ("internal error", "Traceback", "Exception ignored", "BrokenPipe"):
        assert word not in stderr


def test_a_run_whose_output_is_closed_trains_to_its_end(closed_pipe: ClosedPipe) -> None:
    run = closed_pipe.folder / "first"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done" and summary["step"] == 2
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    messages = [event["message"] for event in events if event["event"] == "log_message"]
    (switched_off,) = [message for message in messages if "switched off" in message]
    assert "LineLogger" in switched_off and events[-1]["event"] == "run_ended"
