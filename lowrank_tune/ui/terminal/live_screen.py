"""A live screen: one thread that reads keys and draws, at most twice a second and only lines that changed. Ctrl-Z and
`fg` work as in any other program."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lowrank_tune.ui.terminal.device import Terminal, ascii_only
from lowrank_tune.ui.terminal.keys import Keyboard
from lowrank_tune.ui.terminal.navigation import handle_key
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.text_layout import Block

FRAME_SECONDS = 0.5
"""Minimum time between two frames."""
MAX_TIME_SHARE = 0.03
"""Share of the time that drawing may take: after a slow frame the next one comes later, unless a key or another size
requests it."""
TICK_SECONDS = 0.25
"""Time between two checks for changes."""
STALE_TICK_SECONDS = 10.0
"""Time after which a frame is drawn although nothing changed: the header shows how old the last event is."""
JOB_SIGNALS = {
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGTSTP,
    signal.SIGCONT,
}
"""Signals that are handled by the main thread only."""


class LiveScreen:
    """Shows what `draw(view, width, height)` returns, whenever `changed()` returns True; both run in its thread.

    `on_key` is called with each key that does not change the view. `settle(view, width, height)` returns the view
    within what there is to show; a key may lead beyond it. After an exception the screen is left and `on_failure` is
    called; the run continues.
    """

    def __init__(
        self,
        draw: Callable[[View, int, int], Block],
        changed: Callable[[], bool],
        on_key: Callable[[str], None],
        on_failure: Callable[[Exception], None],
        settle: Callable[[View, int, int], View],
        owns_run: bool,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.draw = draw
        self.changed = changed
        self.on_key = on_key
        self.on_failure = on_failure
        self.settle = settle
        self.terminal = Terminal(sys.stdout.fileno(), environ)
        self.keyboard = Keyboard(_descriptor_of_stdin())
        self.view = View(
            ascii_only=ascii_only(sys.stdout, environ),
            owns_run=owns_run,
            keys=self.keyboard.descriptor is not None,
        )
        self.cost = 0.0
        # reentrant, because a signal may interrupt the thread that holds it
        self._lock = threading.RLock()
        self._is_shown = False
        self._suspended = False
        self._closed = False
        self._is_outdated = True
        self._has_key = False
        self._last_frame = 0.0
        self._last_change = 0.0
        self._drawn_size = (0, 0)
        self._handlers: dict[int, Any] = {}
        self._thread = threading.Thread(
            target=self._loop,
            name="screen",
            daemon=True,
        )

    def start(self) -> None:
        """Starts the thread, which enters the screen."""
        if _is_main_thread():
            self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
            self._handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, self._continued)
        atexit.register(self.close)
        self._thread.start()

    def close(self) -> None:
        """Restores the terminal. Any thread may call it, also more than once."""
        if self._closed:
            return
        self._closed = True
        self.keyboard.interrupt_read()
        is_started = self._thread.ident is not None
        if is_started and threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)
        with self._lock:
            self._leave_screen()
        atexit.unregister(self.close)
        if _is_main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if not self._thread.is_alive():
            self.keyboard.close()
            self.terminal.close()

    def refresh(self) -> None:
        """Requests a frame for a change that `changed` does not report. Any thread may call it."""
        self._is_outdated = True

    def _loop(self) -> None:
        # these signals are for the main thread, and drawing in the background must not stop the job
        signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        self._last_change = time.monotonic()
        wait = 0.0
        try:
            while not self._closed:
                for key in self.keyboard.read(wait):
                    self._press(key)
                wait = self._update(time.monotonic())
        except Exception as error:
            # an error of the screen must neither leave the terminal in a bad state nor stop the run
            with self._lock:
                self._leave_screen()
            self.on_failure(error)

    def _update(self, now: float) -> float:
        """Draws a frame if one is needed and allowed; returns the seconds to wait for the next key or change."""
        if self.changed() or now - self._last_change > STALE_TICK_SECONDS:
            self._is_outdated = True
            self._last_change = now
        with self._lock:
            self._follow_job()
            due = self._last_frame + self._frame_seconds()
            if self._is_shown and now >= due:
                self._draw_if_outdated(now)
        if not (self._is_outdated and self._is_shown):
            return TICK_SECONDS
        return min(TICK_SECONDS, max(0.02, due - now))

    def _frame_seconds(self) -> float:
        """Returns the least time from the last frame to the next one."""
        if self._has_key or self.terminal.size() != self._drawn_size:
            return FRAME_SECONDS
        return max(FRAME_SECONDS, self.cost / MAX_TIME_SHARE)

    def _draw_if_outdated(self, now: float) -> None:
        size = self.terminal.size()
        if not self._is_outdated and size == self._drawn_size:
            return
        # before the frame is drawn, since `refresh` may request another one meanwhile
        self._is_outdated = False
        self._has_key = False
        self._last_frame = now
        self._drawn_size = size
        self._draw_frame(*size)

    def _draw_frame(self, width: int, height: int) -> None:
        """Draws a frame and stores the processor time that it took."""
        started = time.thread_time()
        self.view = self.settle(self.view, width, height)
        view = replace(self.view, now=time.time())
        self.terminal.show(self.draw(view, width, height))
        self.cost = time.thread_time() - started

    def _press(self, key: str) -> None:
        before = self.view
        self.view = handle_key(before, key, time.time())
        if self.view is before:
            self.on_key(key)
        self._has_key = True
        self._is_outdated = True

    def _follow_job(self) -> None:
        """Enters the screen as soon as the job is in the foreground. Only `close` and `_suspend` leave the screen."""
        is_foreground = not self.terminal.gone and self.terminal.foreground()
        if not is_foreground:
            # the terminal belongs to another job, which may have changed it
            self._is_shown = False
        elif not (self._is_shown or self._suspended or self._closed):
            self.keyboard.start()
            self.terminal.enter()
            self._is_shown = True
            self._is_outdated = True

    def _leave_screen(self) -> None:
        if self._is_shown:
            self._is_shown = False
            self.terminal.leave()
            self.keyboard.stop()

    def _suspend(self, number: int, frame: object) -> None:
        """Handles Ctrl-Z: leaves the screen and stops the process. `_follow_job` enters the screen again later."""
        self._suspended = True
        if self._lock.acquire(timeout=1.0):
            self._leave_screen()
            self._lock.release()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._suspend)
        self._suspended = False
        self.keyboard.interrupt_read()

    def _continued(self, number: int, frame: object) -> None:
        """Enters the screen again after a stop that cannot be handled (SIGSTOP): the shell has changed the terminal."""
        self._is_shown = False
        self.keyboard.interrupt_read()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _descriptor_of_stdin() -> int | None:
    with suppress(OSError, ValueError, AttributeError):
        return sys.stdin.fileno()
    return None
