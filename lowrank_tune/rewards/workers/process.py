"""One worker process as the main process uses it: start, request with a time limit, kill. The other side is
`worker.py`."""

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
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
"""Sets have one order in every worker and every run, only the trainer uses the GPU, and a worker uses one core."""


class WorkerTimeout(Exception):
    """No reply in time."""


class WorkerStarved(Exception):
    """No reply, and other programs kept the worker from using its time; the message has the figures."""


class WorkerExited(Exception):
    """The worker ended without a reply; the message is a predicate, as "was killed by SIGSEGV"."""


class Worker:
    """One worker process. The kernel kills it when the thread that created it ends."""

    def __init__(self) -> None:
        self._channel, child_end = socket.socketpair()
        self._channel.setblocking(False)
        with child_end:
            command = [
                sys.executable,
                "-P",
                "-B",
                str(SCRIPT),
                str(child_end.fileno()),
                str(os.getpid()),
            ]
            # its own session: Ctrl-C is only for the run, which finishes its step
            self._process = subprocess.Popen(
                command,
                pass_fds=[child_end.fileno()],
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._unsent = b""
        self._received = b""

    def load(self, worker_specs: Sequence[Mapping[str, Any]], seconds: float) -> list[str | None]:
        """Loads the graders; returns for each of them why it cannot be loaded, or None. Raises WorkerExited."""
        try:
            faults: list[str | None] = self.request(worker_specs, seconds)["faults"]
        except WorkerTimeout:
            raise WorkerExited(f"was not ready within {seconds:g} s") from None
        except WorkerStarved as starved:
            raise WorkerExited(f"was not ready, the machine is too busy: {starved}") from None
        return faults

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, message: object, seconds: float) -> dict[str, Any]:
        """Returns the worker's reply within `seconds` of `ChargedTime`. Raises WorkerTimeout, WorkerStarved or
        WorkerExited; after any of them the worker cannot be used again."""
        # What JSON cannot represent (a date, bytes) is sent as text; ASCII, so that lone surrogates can be sent too.
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
            raise WorkerExited(self._exit_reason()) from None
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _transfer(self, deadline: float) -> None:
        """Sends and receives once, or waits until the deadline."""
        poll = select.poll()
        events = select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN
        poll.register(self._channel, events)
        timeout_ms = max(0.0, 1e3 * (deadline - time.monotonic()))
        ready = dict(poll.poll(timeout_ms)).get(self._channel.fileno(), 0)
        if ready & select.POLLOUT:
            num_sent = self._channel.send(self._unsent)
            self._unsent = self._unsent[num_sent:]
        if ready & ~select.POLLOUT:
            received = self._channel.recv(1 << 16)
            if not received:
                raise WorkerExited(self._exit_reason())
            self._received += received

    def _exit_reason(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            if code < 0:
                return f"was killed by {signal.Signals(-code).name}"
            return f"ended its process with code {code}"
        return "closed its connection"

    def end(self) -> None:
        """Kills the worker and what it started in its session; a thread that waits for its reply gets WorkerExited.
        Can be called from any thread."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Kills the worker and frees its resources. Only for the thread that sends it requests."""
        self.end()
        self._process.wait()
        self._channel.close()
