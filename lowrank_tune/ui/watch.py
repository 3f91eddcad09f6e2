"""`lowrank-tune watch`: the dashboard of running or finished runs, from their `events.jsonl` alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, RunEnded, RunStarted, warning
from lowrank_tune.ui.run_paths import (
    EVENTS,
    ended_process,
    is_chain,
    parse_event,
    read_event_lines,
    running_process,
    stage_folders,
)
from lowrank_tune.ui.state import State
from lowrank_tune.ui.system_stats import Reading, SystemStats
from lowrank_tune.ui.terminal.device import can_show
from lowrank_tune.ui.terminal.live_screen import LiveScreen
from lowrank_tune.ui.terminal.navigation import settle
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.terminal.several import render_several
from lowrank_tune.ui.terminal.text_layout import Line

POLL_SECONDS = 0.3
MAX_BYTES = 8_000_000


class Tail:
    """Follows a file of events by inode and offset.

    A half-written last line is read when it is complete; a line that is not an event is skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.more = False
        self._inode: int | None = None
        self._offset = 0
        self._rest = b""

    def poll(self) -> tuple[bool, list[Event]]:
        """Returns whether the file was replaced, as by a resumed run, and the new events."""
        try:
            with self.path.open("rb") as file:
                is_replaced = self._check_inode(os.fstat(file.fileno()))
                file.seek(self._offset)
                data = file.read(MAX_BYTES)
        except OSError:
            return False, []
        self._offset += len(data)
        self.more = len(data) == MAX_BYTES
        *lines, self._rest = (self._rest + data).split(b"\n")
        return is_replaced, [event for line in lines if (event := parse_event(line)) is not None]

    def _check_inode(self, stat: os.stat_result) -> bool:
        """Begins at the start of a new file, or of one that became shorter; returns whether it replaces an old one."""
        is_first = self._inode is None
        if not is_first and stat.st_ino == self._inode and stat.st_size >= self._offset:
            return False
        self._inode = stat.st_ino
        self._offset = 0
        self._rest = b""
        return not is_first


def read_events(path: Path) -> Iterator[Event]:
    """Yields the events that a file contains now; none if it does not exist or cannot be read."""
    with suppress(OSError):
        yield from read_event_lines(path)


class Tails:
    """Follows the files of a run's stages in their order; a file that does not exist yet is waited for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._tails = [Tail(path) for path in paths]

    def poll(self) -> tuple[bool, list[Event]]:
        """Returns whether all events begin again, and the new events."""
        is_replaced, events = self._poll()
        if is_replaced:
            # it may be the file of an earlier stage: the events of later stages must follow it again
            self._tails = [Tail(path) for path in self.paths]
            _, events = self._poll()
        return is_replaced, events

    def _poll(self) -> tuple[bool, list[Event]]:
        is_replaced = False
        events = list[Event]()
        for tail in self._tails:
            is_new_file, new_events = tail.poll()
            is_replaced = is_replaced or is_new_file
            events += new_events
            if tail.more:
                # a long file is read in parts, and the next stage comes after its end
                break
        return is_replaced, events


class WatchedRun:
    """The state of one run, or of a chain of stages, from its files."""

    def __init__(self, *paths: Path, folder: Path | None = None) -> None:
        self.tails = Tails(paths)
        self.state = State()
        self.folder = folder
        self.system: SystemStats | None = None

    def poll(self) -> bool:
        """Reads the new events; returns whether the state changed."""
        # before the events are read: a process that has ended has written all of them
        process = None if self.folder is None else ended_process(self.folder)
        is_replaced, events = self.tails.poll()
        if is_replaced:
            self.state = State()
        for event in events:
            self.state.apply(event)
        has_new_process = process != self.state.ended_process
        self.state.ended_process = process
        return self._poll_system() or is_replaced or bool(events) or has_new_process

    def _poll_system(self) -> bool:
        """Reads the load while a process on this machine writes the run; returns whether there is a new reading."""
        process = None if self.folder is None else running_process(self.folder)
        if process is None:
            had_process = self.system is not None
            self.system = None
            return had_process
        if self.system is None or self.system.process != process:
            self.system = SystemStats(process)
        return self.system.poll()

    def readings(self) -> tuple[Reading, ...]:
        """Returns the recent load, the newest last."""
        return () if self.system is None else tuple(self.system.history)


def event_files(run: Path) -> list[Path]:
    """Returns the files of events of a run or a chain, from its folder or from a file of events.

    Raises UserError if it is not a run.
    """
    if is_chain(run):
        return [folder / EVENTS for folder in stage_folders(run)]
    path = run / EVENTS if run.is_dir() else run
    if not path.is_file():
        missing = EVENTS if run.is_dir() else "such file or folder"
        raise UserError(f"{run}: not a run to watch: there is no {missing}")
    return [path]


def run_folder(run: Path) -> Path:
    """Returns the folder of a run, from itself or from its file of events."""
    return run if run.is_dir() else run.parent


def watch(
    runs: Sequence[Path],
    environ: Mapping[str, str] = os.environ,
    plain: bool = False,
) -> None:
    """Shows runs until `q` or Ctrl-C; without a suitable terminal, prints lines until the last run has ended.

    Raises UserError if a path is not a run.
    """
    for run in runs:
        check_run_format(run)
    paths = [event_files(run) for run in runs]
    folders = [run_folder(run) for run in runs]
    if plain or not can_show(sys.stdout, environ, forced=True):
        for stage_paths, folder in zip(paths, folders, strict=True):
            print_lines(stage_paths, folder)
        return
    watched = [WatchedRun(*files, folder=folder) for files, folder in zip(paths, folders, strict=True)]
    WatchScreen(watched).run(environ)


class WatchScreen:
    """The dashboard of watched runs: `q` or Ctrl-C closes it."""

    def __init__(self, runs: Sequence[WatchedRun]) -> None:
        self.runs = runs
        self.over = threading.Event()
        self.failure: Exception | None = None

    def run(self, environ: Mapping[str, str]) -> None:
        """Shows the runs until the screen is closed. Raises what the drawing raised."""
        # the default handler raises KeyboardInterrupt, which a callback of the interpreter could swallow
        before = signal.signal(signal.SIGINT, self._on_signal)
        screen = LiveScreen(
            self._draw,
            self._poll,
            self._on_key,
            self._on_failure,
            self._settle,
            owns_run=False,
            environ=environ,
        )
        screen.start()
        try:
            # in short waits, so that signals are handled
            while not self.over.wait(POLL_SECONDS) and not screen.terminal.gone:
                pass
        finally:
            screen.close()
            signal.signal(signal.SIGINT, before)
        if self.failure is not None:
            raise self.failure

    def _poll(self) -> bool:
        # `any` of a generator would not poll the runs after the first one with news
        polled = [run.poll() for run in self.runs]
        return any(polled)

    def _draw(
        self,
        view: View,
        width: int,
        height: int,
    ) -> list[Line]:
        return render_several(
            [run.state for run in self.runs],
            self._with_load(view),
            width,
            height,
        )

    def _with_load(self, view: View) -> View:
        """Returns the view with the load of the run that fills the screen, without any if there are several."""
        shown = self.runs[view.run - 1 : view.run] if view.run else self.runs
        return replace(view, system=shown[0].readings() if len(shown) == 1 else ())

    def _settle(
        self,
        view: View,
        width: int,
        height: int,
    ) -> View:
        return settle(
            [run.state for run in self.runs],
            self._with_load(view),
            width,
            height,
        )

    def _on_key(self, key: str) -> None:
        if key == "q":
            self.over.set()

    def _on_failure(self, error: Exception) -> None:
        self.failure = self.failure or error
        self.over.set()

    def _on_signal(self, number: int, frame: object) -> None:
        self.over.set()


def never() -> bool:
    return False


def print_lines(
    paths: Sequence[Path],
    folder: Path,
    is_superseded: Callable[[], bool] = never,
) -> None:
    """Prints the events of a run as lines until its end: that of its last stage, of a stage that failed or was
    interrupted, or of the process that wrote it; or until `is_superseded` returns True."""
    tails = Tails(paths)
    line_logger = LineLogger()
    stage = 1
    is_over = False
    while not is_over and not is_superseded():
        process = ended_process(folder)
        _, events = tails.poll()
        for event in events:
            line_logger(event)
            if isinstance(event, RunStarted):
                stage = event.stage
            is_over = isinstance(event, RunEnded) and (event.status != "done" or stage >= len(paths))
        if events or is_over:
            continue
        if process is None:
            time.sleep(POLL_SECONDS)
            continue
        line_logger(warning(f"{folder}: process {process} has ended before the run did; the same command continues it"))
        is_over = True
    line_logger.close()
