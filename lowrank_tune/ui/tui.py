"""The dashboard of a run in this terminal: a sink that only queues events; its session's thread applies and draws
them."""

from __future__ import annotations

import os
import signal
import threading
from _thread import interrupt_main
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lowrank_tune.control import Control
from lowrank_tune.events import Event, Note, RunEnded
from lowrank_tune.ui.card import Card
from lowrank_tune.ui.frame import Line
from lowrank_tune.ui.panes import View
from lowrank_tune.ui.plain import Plain
from lowrank_tune.ui.render import render
from lowrank_tune.ui.session import Session
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal import Redirected

WISHES = {
    "stop": "saving and quitting after this step",
    "pause": "paused: p goes on",
    "evaluate": "evaluating after this step",
    "save": "saving after this step",
}


class Tui:
    """Takes the terminal at once and gives it back in `close`. An event costs a microsecond: nothing of it is drawn by
    the caller."""

    def __init__(self, control: Control, console_log: Path, environ: Mapping[str, str] = os.environ) -> None:
        self.control, self.state = control, State()
        self._events: deque[Event] = deque()
        self._asked: tuple[str, ...] = ()
        self._card = Card()
        self._plain: Plain | None = None  # takes over where the screen breaks
        self._in_main = threading.current_thread() is threading.main_thread()
        self.session = Session(self._draw, self._changed, self._press, self._broke, mine=True, environ=environ)
        self._redirected = Redirected(console_log)
        self.session.start()

    def __call__(self, event: Event) -> None:
        if self._plain is not None:
            self._plain(event)
        else:
            self._events.append(event)

    def close(self) -> None:
        """Back to the shell; of a run that did not end well, what went before is told in lines."""
        self.session.close()
        self._redirected.close(lost=self.session.terminal.gone)
        if self._plain is not None:
            self._plain.close()
        elif not self.session.terminal.gone:
            self._changed()
            self._tell_end()

    def _tell_end(self) -> None:
        ended = self.state.ended
        if ended is not None and ended.status == "done":
            return  # the summary says it all
        with suppress(OSError, ValueError):
            plain = Plain()
            for said in self.state.warnings if ended is not None and ended.status == "failed" else ():
                plain(Note(message=said.text, level="warning"))
            if isinstance(ended, RunEnded):
                plain(ended)
            plain.close()

    def _changed(self) -> bool:
        """Takes in what came; also looks at the wishes, which signals and the loop change silently."""
        asked = tuple(text for wish, text in WISHES.items() if getattr(self.control, wish))
        fresh = bool(self._events) or asked != self._asked
        self._asked = asked
        while self._events:
            self.state.apply(self._events.popleft())
        return fresh

    def _draw(self, view: View, width: int, height: int) -> list[Line]:
        return render(self.state, replace(view, asked=self._asked, card=self._card.read()), width, height)

    def _press(self, key: str) -> None:
        if key == "q":
            self._stop()
        elif key == "p":
            self.control.pause = not self.control.pause
        elif key == "s":
            self.control.save = True
        elif key == "e":
            self.control.evaluate = True

    def _stop(self) -> None:
        """As the first Ctrl-C: in the loop a wish, before it an interruption, for there is nothing to save yet. A
        second `q` does nothing."""
        if self.control.stop:
            return
        if self._in_main:
            interrupt_main(signal.SIGINT)
        else:
            self.control.stop = True

    def _broke(self, error: Exception) -> None:
        """Called by the session's thread: the rest of the run is told in lines."""
        self._redirected.close()
        plain = Plain()
        with suppress(OSError, ValueError):
            plain(
                Note(
                    message=f"the dashboard broke, plain lines follow: {type(error).__name__}: {error}", level="warning"
                )
            )
        self._plain = plain
        while self._events:
            plain(self._events.popleft())
