"""A screen that lives: one thread that reads keys and draws, seldom and only what changed; suspended and restored as a
shell expects."""

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
from lowrank_tune.ui.terminal.keys import ESCAPE, Keyboard
from lowrank_tune.ui.terminal.panes import SMOOTHINGS, View
from lowrank_tune.ui.terminal.text_layout import Line

FRAME_SECONDS = 0.5
SHARE = 0.03
TICK = 0.25
STALE_TICK = 10.0
JOB_SIGNALS = {
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGTSTP,
    signal.SIGCONT,
}


def handle_key(view: View, key: str) -> View:
    """The view after a key that concerns only how things look."""
    if key in "+=":
        return replace(view, smoothing=min(view.smoothing + 1, len(SMOOTHINGS) - 1))
    if key == "-":
        return replace(view, smoothing=max(view.smoothing - 1, 0))
    if key == "l":
        return replace(view, log_scale=not view.log_scale)
    if key == "g":
        return replace(view, group=not view.group, help=False)
    if key == ESCAPE:
        return replace(view, group=False, help=False)
    if key == "n":
        return replace(view, sample=view.sample + 1)
    if key in "?h":
        return replace(view, help=not view.help)
    return view


class LiveScreen:
    """Shows what `draw(view, width, height)` returns whenever `changed()` says that there is something new; both run in
    its thread."""

    def __init__(
        self,
        draw: Callable[[View, int, int], list[Line]],
        changed: Callable[[], bool],
        on_key: Callable[[str], None],
        on_failure: Callable[[Exception], None],
        owns_run: bool,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.draw = draw
        self.changed = changed
        self.on_key = on_key
        self.on_failure = on_failure
        self.terminal = Terminal(sys.stdout.fileno(), environ)
        self.keyboard = Keyboard(_descriptor_of_stdin())
        self.view = View(
            ascii_only=ascii_only(sys.stdout, environ),
            owns_run=owns_run,
            keys=self.keyboard.descriptor is not None,
        )
        self.cost = self.frames = 0.0
        self._lock = threading.RLock()  # a signal may come while this thread holds it
        self._up = self._suspended = self._closed = False
        self._again = True
        self._handlers: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._live, name="screen", daemon=True)

    def start(self) -> None:
        """Takes the terminal over."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: signal.signal(number, handle)
                for number, handle in ((signal.SIGTSTP, self._suspend), (signal.SIGCONT, self._continued))
            }
        atexit.register(self.close)
        self._thread.start()

    def close(self) -> None:
        """Gives the terminal back as it was. Safe to call twice, from any thread."""
        if self._closed:
            return
        self._closed = True
        self.keyboard.interrupt_read()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(timeout=2.0)
        with self._lock:
            self._leave_screen()
        atexit.unregister(self.close)
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if not self._thread.is_alive():
            self.keyboard.close()
            self.terminal.close()

    def refresh(self) -> None:
        """Something changed that `changed` does not see; from any thread."""
        self._again = True

    def _live(self) -> None:
        # they belong to the main thread, and drawing must not stop the job
        signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        last = 0.0
        drawn_size = (0, 0)
        wait = 0.0
        last_event = time.monotonic()
        try:
            while not self._closed:
                for key in self.keyboard.read(wait):
                    self._press(key)
                now = time.monotonic()
                if self.changed() or now - last_event > STALE_TICK:  # the header tells for how long nothing came
                    self._again = True
                    last_event = now
                with self._lock:
                    self._follow_job()
                    due = last + max(FRAME_SECONDS, self.cost / SHARE)
                    if self._up and now >= due and (self._again or self.terminal.size() != drawn_size):
                        self._again, last, drawn_size = False, now, self.terminal.size()
                        self._frame(*drawn_size)
                wait = min(TICK, max(0.02, due - now)) if self._again else TICK
        except Exception as error:  # a broken screen must leave a sane terminal and a run that goes on
            with self._lock:
                self._leave_screen()
            self.on_failure(error)

    def _frame(self, width: int, height: int) -> None:
        """Draws, and keeps the processor time it took: the next frame may come when that is 3 % of the time passed."""
        started = time.thread_time()
        view = replace(self.view, now=time.time())
        self.terminal.show(self.draw(view, width, height))
        self.cost = time.thread_time() - started
        self.frames = self.frames + 1

    def _press(self, key: str) -> None:
        before = self.view
        self.view = handle_key(self.view, key)
        if self.view is before:
            self.on_key(key)
        self._again = True

    def _follow_job(self) -> None:
        """On the screen only while the job is in the foreground. Leaving it is for `close` and `_suspend` alone."""
        ours = not self.terminal.gone and self.terminal.foreground()
        if ours and not (self._up or self._suspended or self._closed):
            self.keyboard.start()
            self.terminal.enter()
            self._up = self._again = True
        elif self._up and not ours:
            self._up = False  # the terminal is another job's already, and not ours to change

    def _leave_screen(self) -> None:
        if self._up:
            self._up = False
            self.terminal.leave()
            self.keyboard.stop()

    def _suspend(self, number: int, frame: object) -> None:
        """Ctrl-Z: off the screen, then stopped as any other job; on it again when continued in the foreground."""
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
        """After a stop that could not be seen coming, the shell has changed the terminal: begin anew."""
        self._up = False
        self.keyboard.interrupt_read()


def _descriptor_of_stdin() -> int | None:
    with suppress(OSError, ValueError, AttributeError):
        return sys.stdin.fileno()
    return None
