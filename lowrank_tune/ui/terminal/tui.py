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

from lowrank_tune.events import Event, LogMessage, RunEnded
from lowrank_tune.training.signals import TrainerControl
from lowrank_tune.ui.gpu_stats import GpuStats
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.device import Redirected
from lowrank_tune.ui.terminal.live_screen import LiveScreen
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import Line

KEY_ACTIONS = {
    "stop": "saving and quitting after this step",
    "pause": "paused: p goes on",
    "evaluate": "evaluating after this step",
    "save": "saving after this step",
}


class Tui:
    """Takes the terminal at once and gives it back in `close`. An event costs a microsecond: nothing of it is drawn by
    the caller."""

    def __init__(
        self,
        control: TrainerControl,
        console_log_path: Path,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.control = control
        self.state = State()
        self._events: deque[Event] = deque()
        self._pending: tuple[str, ...] = ()
        self._gpu = GpuStats()
        self._line_logger: LineLogger | None = None  # takes over where the screen breaks
        self._in_main = threading.current_thread() is threading.main_thread()
        self.screen = LiveScreen(
            self._draw,
            self._changed,
            self._press,
            self._on_failure,
            owns_run=True,
            environ=environ,
        )
        self._redirected = Redirected(console_log_path)
        self.screen.start()

    def __call__(self, event: Event) -> None:
        if self._line_logger is not None:
            self._line_logger(event)
        else:
            self._events.append(event)

    def close(self) -> None:
        """Back to the shell; of a run that did not end well, what went before is told in lines."""
        self.screen.close()
        self._redirected.close(terminal_gone=self.screen.terminal.gone)
        if self._line_logger is not None:
            self._line_logger.close()
        elif not self.screen.terminal.gone:
            self._changed()
            self._print_end()

    def _print_end(self) -> None:
        ended = self.state.ended
        if ended is not None and ended.status == "done":
            return  # the summary says it all
        with suppress(OSError, ValueError):
            line_logger = LineLogger()
            for line in self.state.warnings if ended is not None and ended.status == "failed" else ():
                line_logger(LogMessage(message=line.text, level="warning"))
            if isinstance(ended, RunEnded):
                line_logger(ended)
            line_logger.close()

    def _changed(self) -> bool:
        """Takes in what came; also looks at the requests, which signals and the loop change silently."""
        pending = tuple(text for action, text in KEY_ACTIONS.items() if getattr(self.control, action))
        fresh = bool(self._events) or pending != self._pending
        self._pending = pending
        while self._events:
            self.state.apply(self._events.popleft())
        return fresh

    def _draw(self, view: View, width: int, height: int) -> list[Line]:
        return render(self.state, replace(view, pending=self._pending, gpu=self._gpu.read()), width, height)

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
        """As the first Ctrl-C: in the loop a request, before it an interruption, for there is nothing to save yet. A
        second `q` does nothing."""
        if self.control.stop:
            return
        if self._in_main:
            interrupt_main(signal.SIGINT)
        else:
            self.control.stop = True

    def _on_failure(self, error: Exception) -> None:
        """Called by the session's thread: the rest of the run is told in lines."""
        self._redirected.close()
        line_logger = LineLogger()
        with suppress(OSError, ValueError):
            line_logger(
                LogMessage(
                    message=f"the dashboard broke, plain lines follow: {type(error).__name__}: {error}", level="warning"
                )
            )
        self._line_logger = line_logger
        while self._events:
            line_logger(self._events.popleft())
