"""`lowrank-tune watch`: the dashboard of runs that happen elsewhere, or happened, from their `events.jsonl` alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, RunEnded, from_json
from lowrank_tune.ui.frame import Line
from lowrank_tune.ui.panes import View
from lowrank_tune.ui.plain import Plain
from lowrank_tune.ui.render import render_several
from lowrank_tune.ui.session import Session
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal import can_show

POLL_SECONDS, MOST_BYTES = 0.3, 8_000_000


class Tail:
    """Follows a file of events by inode and offset. A half-written last line waits for its end; a line that is no event is skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: int | None = None
        self._offset, self._rest = 0, b""

    def poll(self) -> tuple[bool, list[Event]]:
        """Whether the file was begun anew (a resumed run replaces it), and the events that came."""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                anew = self._inode is not None and (facts.st_ino != self._inode or facts.st_size < self._offset)
                if anew or self._inode is None:
                    self._inode, self._offset, self._rest = facts.st_ino, 0, b""
                file.seek(self._offset)
                data = file.read(MOST_BYTES)
        except OSError:
            return False, []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return anew, [event for line in lines if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    try:
        data = json.loads(line)
        return from_json(data) if isinstance(data, dict) else None
    except (ValueError, TypeError, RecursionError):
        return None


def events_in(path: Path) -> Iterator[Event]:
    """The events that a file holds now."""
    tail = Tail(path)
    while events := tail.poll()[1]:
        yield from events


class Watched:
    """One run as it is seen from its file."""

    def __init__(self, path: Path) -> None:
        self.tail, self.state = Tail(path), State()

    def poll(self) -> bool:
        anew, events = self.tail.poll()
        if anew:
            self.state = State()
        for event in events:
            self.state.apply(event)
        return anew or bool(events)


def file_of(run: Path) -> Path:
    """A run's file of events, from its folder or itself. Raises UserError where there is none."""
    path = run / "events.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"{run}: no run to watch, for there is no {path.name if run.is_dir() else 'such file or folder'}")
    return path


def watch(runs: Sequence[Path], environ: Mapping[str, str] = os.environ, plain: bool = False) -> None:
    """Shows runs until `q` or Ctrl-C; without a fit terminal, as lines until the last one has ended."""
    paths = [file_of(run) for run in runs]
    if plain or not can_show(sys.stdout, environ, forced=True):
        return _lines(paths)
    watched = [Watched(path) for path in paths]
    over, failures = threading.Event(), []

    def changed() -> bool:
        return any([one.poll() for one in watched])

    def draw(view: View, width: int, height: int) -> list[Line]:
        return render_several([one.state for one in watched], view, width, height)

    def press(key: str) -> None:
        if key == "q":
            over.set()

    def broke(error: Exception) -> None:
        failures.append(error)
        over.set()

    # Ctrl-C is the usual way out. As an exception it could fall into a callback of the interpreter and be lost there.
    before = signal.signal(signal.SIGINT, lambda *_: over.set())
    session = Session(draw, changed, press, broke, mine=False, environ=environ)
    session.start()
    try:
        while not over.wait(POLL_SECONDS) and not session.terminal.gone:
            pass  # in short waits, so that signals are heard
    finally:
        session.close()
        signal.signal(signal.SIGINT, before)
    if failures:
        raise failures[0]


def _lines(paths: Sequence[Path]) -> None:
    """Each run's events as plain lines, one run after the other, followed to its end."""
    for path in paths:
        tail, plain, ended = Tail(path), Plain(), False
        while not ended:
            _, events = tail.poll()
            for event in events:
                plain(event)
                ended = isinstance(event, RunEnded)
            if not events and not ended:
                time.sleep(POLL_SECONDS)
        plain.close()
