"""`lowrank-tune watch FOLDER`: the newest run of a folder of runs, and each run that starts later."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.errors import UserError
from lowrank_tune.events import LogMessage
from lowrank_tune.ui.run_paths import EVENTS, is_chain, read_event_lines, run_folders
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.device import can_show
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.watch import Tails, WatchedRun, WatchScreen, event_files, print_lines

CHECK_SECONDS = 1.0
"""Time between two checks for a newer run."""


def newest_watchable(folder: Path) -> Path | None:
    """Returns the run of a folder whose last session started last, of those that have a file of events or are a chain;
    None if there is none."""
    try:
        runs = run_folders(folder)
    except OSError:
        return None
    return next((run for run in runs if (run / EVENTS).is_file() or is_chain(run)), None)


class NewerRun:
    """Looks for a run of a folder that started after the one that is watched, at most once in `CHECK_SECONDS`."""

    def __init__(
        self,
        folder: Path,
        run: Path,
    ) -> None:
        self.folder = folder
        self.run = run
        self._checked = time.monotonic()

    def find(self) -> Path | None:
        """Returns the newer run, None if there is none or if it is too early for another check."""
        now = time.monotonic()
        if now - self._checked < CHECK_SECONDS:
            return None
        self._checked = now
        newest = newest_watchable(self.folder)
        return None if newest == self.run else newest

    def exists(self) -> bool:
        return self.find() is not None


class NewestRun(WatchedRun):
    """The state of the newest run of a folder; when a newer run starts, of that one."""

    def __init__(self, runs_folder: Path) -> None:
        self.runs_folder = runs_folder
        run = _first_run(runs_folder)
        super().__init__(*event_files(run), folder=run)
        self._newer = NewerRun(runs_folder, run)

    def poll(self) -> bool:
        """Reads the new events, of a newer run if there is one; returns whether the state changed."""
        newer = self._newer.find()
        if newer is not None:
            self._follow(newer)
        return super().poll() or newer is not None

    def _follow(self, run: Path) -> None:
        files = event_files(run)
        self.folder = run
        self.tails = Tails(files)
        self.state = State()
        # the log counts its times from the first event, which is this one
        message = _message(run, self.runs_folder)
        self.state.apply(replace(message, time=_first_time(files[0]) or message.time))
        self._newer = NewerRun(self.runs_folder, run)


def watch_folder(
    folder: Path,
    environ: Mapping[str, str] = os.environ,
    plain: bool = False,
) -> None:
    """Shows the newest run of a folder until `q` or Ctrl-C; without a suitable terminal, prints lines until the newest
    run has ended.

    Raises UserError if no run can be watched.
    """
    if plain or not can_show(
        sys.stdout,
        environ,
        forced=True,
    ):
        _print_newest(folder)
        return
    WatchScreen([NewestRun(folder)]).run(environ)


def _print_newest(folder: Path) -> None:
    run: Path | None = _first_run(folder)
    while run is not None:
        logger = LineLogger()
        logger(_message(run, folder))
        logger.close()
        print_lines(
            event_files(run),
            run,
            NewerRun(folder, run).exists,
        )
        newest = newest_watchable(folder)
        run = None if newest == run else newest


def _first_run(folder: Path) -> Path:
    run = newest_watchable(folder)
    if run is None:
        raise UserError(f"{folder}: no run to watch: no folder in it has a file {EVENTS}")
    check_run_format(run)
    return run


def _first_time(file: Path) -> float | None:
    """Returns the time of the first event of a file, None if there is none yet."""
    with suppress(OSError):
        return next((event.time for event in read_event_lines(file)), None)
    return None


def _message(
    run: Path,
    folder: Path,
) -> LogMessage:
    return LogMessage(message=f"watching {run}, the newest run in {folder}")
