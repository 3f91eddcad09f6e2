"""Contenders in processes of their own that work in turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import prepare_process

from learning_curves import ours, peer
from learning_curves.meter import Meter
from learning_curves.task import Task

CONTENDERS: dict[tuple[str, str], Callable[[Task, Meter], None]] = {
    ("ours", "grpo"): ours.grpo,
    ("ours", "dpo"): ours.dpo,
    ("trl", "grpo"): peer.grpo,
    ("trl", "dpo"): peer.dpo,
}


def in_process(function: Callable[..., None], threads: int, *arguments: Any) -> None:
    """Calls a function in a process of its own, so that this one stays small. Raises SystemExit if it fails."""
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(function, threads, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def _call(function: Callable[..., None], threads: int, arguments: Sequence[Any]) -> None:
    prepare_process(threads)
    function(*arguments)


def compete(task: Task, names: Sequence[str]) -> None:
    """Runs the contenders of a task, one at a time, each up to its next saved adapter. Raises SystemExit if one
    fails."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        task.of(name).mkdir()
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=_work, args=(task, name, end), daemon=True))
        processes[-1].start()
        end.close()
    for pipe in pipes.values():
        pipe.recv()
    _take_turns(task, pipes)
    for process in processes:
        process.join()


def _take_turns(task: Task, pipes: dict[str, Connection]) -> None:
    """Runs the contenders in turns until all have ended; which one begins depends on the seed."""
    names = list(pipes)
    first = task.seed % len(names)
    names = names[first:] + names[:first]
    while names:
        for name in list(names):
            pipes[name].send("turn")
            try:
                answer = pipes[name].recv()
            except EOFError:
                raise SystemExit(f"{name} failed in {task.folder.name}") from None
            if answer == "done":
                names.remove(name)


def _work(task: Task, name: str, pipe: Connection) -> None:
    """A contender's process."""
    prepare_process(task.threads)
    meter = Meter(task, name, pipe)
    # Trainers print their log lines.
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        CONTENDERS[name, task.settings.algorithm](task, meter)
    pipe.send("done")
