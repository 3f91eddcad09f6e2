"""The dashboard of a run in this terminal: a sink that only queues events. The thread of its screen applies and draws
them."""

from __future__ import annotations

import os
import signal
import threading
from _thread import interrupt_main
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lowrank_tune.events import Event, warning
from lowrank_tune.training.signals import TrainerControl
from lowrank_tune.ui.state import State
from lowrank_tune.ui.system_stats import SystemStats
from lowrank_tune.ui.terminal.device import Redirected
from lowrank_tune.ui.terminal.live_screen import LiveScreen
from lowrank_tune.ui.terminal.navigation import settle
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import Block

PENDING_LABELS = {
    "stop": "saving and quitting after this step",
    "pause": "paused: p continues",
    "evaluate": "evaluating after this step",
    "save": "saving after this step",
}
"""Text in the header for each request of `TrainerControl`."""


class Tui:
    """A sink that uses the terminal from its creation to `close`. An event costs the caller about a microsecond."""

    def __init__(
        self,
        control: TrainerControl,
        console_log_path: Path,
    ) -> None:
        self.control = control
        self.state = State()
        self._events: deque[Event] = deque()
        self._pending: tuple[str, ...] = ()
        self._system = SystemStats(os.getpid())
        # replaces the screen after an error of the screen
        self._line_logger: LineLogger | None = None
        self._in_main = threading.current_thread() is threading.main_thread()
        self.screen = LiveScreen(
            self._draw,
            self._changed,
            self._press,
            self._on_failure,
            self._settle,
            owns_run=True,
        )
        self._redirected = Redirected(console_log_path)
        self.screen.start()

    def __call__(self, event: Event) -> None:
        if self._line_logger is not None:
            self._line_logger(event)
        else:
            self._events.append(event)

    def close(self) -> None:
        """Restores the terminal. The end of a run that was not completed is printed in lines."""
        self.screen.close()
        self._redirected.close(terminal_gone=self.screen.terminal.gone)
        if self._line_logger is not None:
            self._line_logger.close()
        elif not self.screen.terminal.gone:
            self._apply_events()
            self._print_end()

    def _print_end(self) -> None:
        """Prints the end, and before it the warnings of a failed run. The summary of a completed run contains both."""
        ended = self.state.ended
        if ended is None or ended.status == "done":
            return
        with suppress(OSError, ValueError):
            line_logger = LineLogger()
            if ended.status == "failed":
                for line in self.state.warnings:
                    line_logger(warning(line.text))
            line_logger(ended)
            line_logger.close()

    def _changed(self) -> bool:
        """Applies new events; returns whether there were any, or whether the requests to the training loop changed."""
        pending = tuple(text for request, text in PENDING_LABELS.items() if getattr(self.control, request))
        is_changed = pending != self._pending
        self._pending = pending
        has_reading = self._system.poll()
        return self._apply_events() or is_changed or has_reading

    def _apply_events(self) -> bool:
        is_changed = bool(self._events)
        while self._events:
            self.state.apply(self._events.popleft())
        return is_changed

    def _draw(
        self,
        view: View,
        width: int,
        height: int,
    ) -> Block:
        view = replace(
            view,
            pending=self._pending,
            system=tuple(self._system.history),
        )
        return render(self.state, view, width, height)

    def _settle(
        self,
        view: View,
        width: int,
        height: int,
    ) -> View:
        return settle(
            [self.state],
            replace(view, system=tuple(self._system.history)),
            width,
            height,
        )

    def _press(self, key: str) -> None:
        if key == "q":
            self._request_stop()
        elif key == "p":
            self.control.pause = not self.control.pause
        elif key == "s":
            self.control.save = True
        elif key == "e":
            self.control.evaluate = True

    def _request_stop(self) -> None:
        """Has the effect of the first Ctrl-C: a request within the training loop; an interrupt before it, because there
        is nothing to save yet. A second `q` has no effect."""
        if self.control.stop:
            return
        if self._in_main:
            interrupt_main(signal.SIGINT)
        else:
            self.control.stop = True

    def _on_failure(self, error: Exception) -> None:
        """Prints the rest of the run in lines. The thread of the screen calls it."""
        self._redirected.close()
        line_logger = LineLogger()
        message = f"the dashboard failed, plain lines follow: {type(error).__name__}: {error}"
        with suppress(OSError, ValueError):
            line_logger(warning(message))
        self._line_logger = line_logger
        while self._events:
            line_logger(self._events.popleft())
