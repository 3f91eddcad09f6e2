"""`lowrank-tune watch`: the dashboard of runs that happen elsewhere, or happened, from their `events.jsonl` alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, LogMessage, RunEnded, RunStarted
from lowrank_tune.ui.run_paths import EVENTS, ended_process, is_chain, parse_event, stage_folders
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.device import can_show
from lowrank_tune.ui.terminal.live_screen import LiveScreen
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.terminal.render import render_several
from lowrank_tune.ui.terminal.text_layout import Line

POLL_SECONDS = 0.3
MAX_BYTES = 8_000_000


class Tail:
    """Follows a file of events by inode and offset. A half-written last line waits for its end; a line that is no event
    is skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: int | None = None
        self._offset = 0
        self._rest = b""
        self.more = False

    def poll(self) -> tuple[bool, list[Event]]:
        """Whether the file was begun anew (a resumed run replaces it), and the events that came."""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                anew = self._inode is not None and (facts.st_ino != self._inode or facts.st_size < self._offset)
                if anew or self._inode is None:
                    self._inode = facts.st_ino
                    self._offset = 0
                    self._rest = b""
                file.seek(self._offset)
                data = file.read(MAX_BYTES)
        except OSError:
            return False, []
        self._offset = self._offset + len(data)
        self.more = len(data) == MAX_BYTES
        *lines, self._rest = (self._rest + data).split(b"\n")
        return anew, [event for line in lines if (event := parse_event(line)) is not None]


def read_events(path: Path) -> Iterator[Event]:
    """The events that a file holds now."""
    tail = Tail(path)
    while events := tail.poll()[1]:
        yield from events


class Tails:
    """Follows the files of a run's stages in their order; one that is not there yet is waited for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._tails = [Tail(path) for path in paths]

    def poll(self) -> tuple[bool, list[Event]]:
        """As a tail's: whether everything begins anew, and the events that came."""
        anew, events = self._poll()
        if anew:  # an earlier stage may be the one: what follows it must come again too
            self._tails = [Tail(path) for path in self.paths]
            events = self._poll()[1]
        return anew, events

    def _poll(self) -> tuple[bool, list[Event]]:
        anew = False
        events = list[Event]()
        for tail in self._tails:
            fresh, came = tail.poll()
            anew = anew or fresh
            events = events + came
            if tail.more:  # a long file is read in parts, and the next stage comes after its end
                break
        return anew, events


class WatchedRun:
    """One run, or a chain of stages, as it is seen from its files."""

    def __init__(self, *paths: Path, folder: Path | None = None) -> None:
        self.tails = Tails(paths)
        self.state = State()
        self.folder = folder

    def poll(self) -> bool:
        process = None if self.folder is None else ended_process(self.folder)  # before the last events are read
        anew, events = self.tails.poll()
        if anew:
            self.state = State()
        for event in events:
            self.state.apply(event)
        changed = process != self.state.ended_process
        self.state.ended_process = process
        return anew or bool(events) or changed


def event_files(run: Path) -> list[Path]:
    """The files of events of a run or a chain, from its folder, or itself. Raises UserError where there is no run."""
    if is_chain(run):
        return [folder / EVENTS for folder in stage_folders(run)]
    return [_single(run)]


def run_folder(run: Path) -> Path:
    """The folder of a run that is given by its folder, or by its file of events."""
    return run if run.is_dir() else run.parent


def latest_event_file(run: Path) -> Path:
    """A run's file of events; of a chain the one of the stage that began last. Raises UserError where there is none."""
    files = event_files(run)
    return next((file for file in reversed(files) if file.is_file()), files[0])


def _single(run: Path) -> Path:
    path = run / EVENTS if run.is_dir() else run
    if not path.is_file():
        raise UserError(
            f"{run}: no run to watch, for there is no {path.name if run.is_dir() else 'such file or folder'}"
        )
    return path


def watch(runs: Sequence[Path], environ: Mapping[str, str] = os.environ, plain: bool = False) -> None:
    """Shows runs until `q` or Ctrl-C; without a fit terminal, as lines until the last one has ended."""
    for run in runs:
        check_run_format(run)
    paths = [event_files(run) for run in runs]
    if plain or not can_show(sys.stdout, environ, forced=True):
        _print_lines(paths, [run_folder(run) for run in runs])
        return
    watched = [WatchedRun(*files, folder=run_folder(run)) for run, files in zip(runs, paths, strict=True)]
    over = threading.Event()
    failures = []

    def changed() -> bool:
        polled = [watched_run.poll() for watched_run in watched]  # each of them, also after one with news
        return any(polled)

    def draw(view: View, width: int, height: int) -> list[Line]:
        return render_several([watched_run.state for watched_run in watched], view, width, height)

    def on_key(key: str) -> None:
        if key == "q":
            over.set()

    def on_failure(error: Exception) -> None:
        failures.append(error)
        over.set()

    # Ctrl-C is the usual way out. As an exception it could fall into a callback of the interpreter and be lost there.
    before = signal.signal(signal.SIGINT, lambda *_: over.set())
    screen = LiveScreen(draw, changed, on_key, on_failure, owns_run=False, environ=environ)
    screen.start()
    try:
        while not over.wait(POLL_SECONDS) and not screen.terminal.gone:
            pass  # in short waits, so that signals are heard
    finally:
        screen.close()
        signal.signal(signal.SIGINT, before)
    if failures:
        raise failures[0]


def _print_lines(runs: Sequence[Sequence[Path]], folders: Sequence[Path]) -> None:
    """Each run's events as plain lines, one run after the other, followed to its end: that of the last stage, of one
    that broke, or of the process that wrote it."""
    for paths, folder in zip(runs, folders, strict=True):
        tails = Tails(paths)
        line_logger = LineLogger()
        ended = False
        stage = 1
        while not ended:
            process = ended_process(folder)
            _, events = tails.poll()
            for event in events:
                line_logger(event)
                stage = event.stage if isinstance(event, RunStarted) else stage
                ended = isinstance(event, RunEnded) and (event.status != "done" or stage >= len(paths))
            if not events and not ended and process is not None:
                message = (
                    f"{folder}: process {process} has ended before the run did; the command that began it continues it"
                )
                line_logger(LogMessage(message=message, level="warning"))
                ended = True
            if not events and not ended:
                time.sleep(POLL_SECONDS)
        line_logger.close()
