"""The parent's side of a worker: start it, ask it with a deadline, kill it with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_tune.rewards.workers.charged_time import ChargedTime, Starved, TimeLimitReached

SCRIPT = Path(__file__).with_name("worker.py")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Sets come in one order in every worker and every run, the card stays the trainer's, and workers do not fight over
cores."""


class WorkerTimeout(Exception):
    """No reply in time."""


class WorkerStarved(Exception):
    """No reply, and other programs kept the worker from taking its time; the message holds the figures."""


class WorkerDied(Exception):
    """The worker ended without a reply; the message says how."""


class Worker:
    """One worker process. It must be made by a thread that lives as long as it: the kernel kills it when that thread
    ends."""

    def __init__(self) -> None:
        self._channel, child_end = socket.socketpair()
        self._channel.setblocking(False)
        with child_end:
            command = [sys.executable, "-P", "-B", str(SCRIPT), str(child_end.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                command,
                pass_fds=[child_end.fileno()],
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # a session of its own: Ctrl-C is for the run, which finishes its step
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._unsent = b""
        self._received = b""

    def load(self, worker_specs: Sequence[Mapping[str, Any]], seconds: float) -> list[str | None]:
        """Has the jobs loaded: for each a sentence where it could not be, else None."""
        try:
            faults: list[str | None] = self.request(worker_specs, seconds)["faults"]
        except WorkerTimeout:
            raise WorkerDied(f"was not ready within {seconds:g} s") from None
        except WorkerStarved as starved:
            raise WorkerDied(f"was not ready, the machine is too busy: {starved}") from None
        return faults

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, message: object, seconds: float) -> dict[str, Any]:
        """The worker's reply within so many seconds of `ChargedTime`. Raises WorkerTimeout, WorkerStarved or
        WorkerDied; after any of them the worker is of no more use."""
        # What JSON has no word for (a date, bytes) arrives as text; ASCII, so that lone surrogates travel too.
        self._unsent = json.dumps(message, default=str).encode() + b"\n"
        charged_time = ChargedTime([self.pid], seconds)
        try:
            while b"\n" not in self._received:
                self._transfer(charged_time.next_sample)
                if b"\n" not in self._received:
                    charged_time.check()
        except TimeLimitReached:
            raise WorkerTimeout from None
        except Starved as starved:
            raise WorkerStarved(str(starved)) from None
        except OSError:
            raise WorkerDied(self._exit_reason()) from None
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _transfer(self, deadline: float) -> None:
        """Sends and receives what can be until the deadline."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        events = dict(poll.poll(max(0.0, 1e3 * (deadline - time.monotonic())))).get(self._channel.fileno(), 0)
        if events & select.POLLOUT:
            self._unsent = self._unsent[self._channel.send(self._unsent) :]
        if events & ~select.POLLOUT:
            if not (more := self._channel.recv(1 << 16)):
                raise WorkerDied(self._exit_reason())
            self._received += more

    def _exit_reason(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            if code < 0:
                return f"was killed by {signal.Signals(-code).name}"
            return f"ended its process with code {code}"
        return "closed its connection"

    def end(self) -> None:
        """Ends the worker and what it started in its session; whoever waits for its reply is told that it died. From
        any thread."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Ends the worker and clears up after it. Only for the thread that asks it."""
        self.end()
        self._process.wait()
        self._channel.close()
