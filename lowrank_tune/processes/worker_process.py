"""One worker process as the main process uses it: start, request with a time limit, kill. The other side is
`child.py`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_tune.processes.charged_time import ChargedTime, Starved, TimeLimitReached

SCRIPT = Path(__file__).with_name("child.py")
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
"""Sets have one order in every worker and every run, only the trainer uses the GPU, and a worker uses one core."""
MAX_REPLY_BYTES = 128 << 20
"""A longer reply is a fault: it would fill the memory of the main process."""
RECEIVE_BYTES = 1 << 18


class WorkerTimeout(Exception):
    """No reply in time."""


class WorkerStarved(Exception):
    """No reply, and other programs kept the worker from using its time; the message has the figures."""


class WorkerExited(Exception):
    """The worker ended without a reply; the message is a predicate, as "was killed by SIGSEGV"."""


class ChannelCorrupted(WorkerExited):
    """The worker sent what is no reply to the request: its code wrote to the channel."""

    def __init__(self) -> None:
        super().__init__("wrote to the channel of its worker, which only the kit may use")


class WorkerProcess:
    """One worker process, which answers messages by a `module` of the kit. The kernel kills it when the thread that
    created it ends. Raises OSError if it cannot be started."""

    def __init__(self, module: str) -> None:
        self._channel, child_end = socket.socketpair()
        self._channel.setblocking(False)
        try:
            with child_end:
                self._process = _start(module, child_end.fileno())
        except OSError:
            self._channel.close()
            raise
        self._unsent = memoryview(b"")
        self._received = bytearray()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def request(self, message: object, seconds: float) -> Any:
        """Returns the worker's reply within `seconds` of `ChargedTime`. Raises WorkerTimeout, WorkerStarved or
        WorkerExited; after any of them the worker cannot be used again."""
        if self._received:
            raise ChannelCorrupted
        token = secrets.token_hex(8)
        self._unsent = memoryview(_encode({"token": token, "message": message}))
        charged_time = ChargedTime([self.pid], seconds)
        try:
            while not self._received.endswith(b"\n"):
                self._transfer(charged_time.next_sample)
                if not self._received.endswith(b"\n"):
                    charged_time.check()
        except TimeLimitReached:
            raise WorkerTimeout from None
        except Starved as starved:
            raise WorkerStarved(str(starved)) from None
        except OSError:
            raise WorkerExited(self._exit_reason()) from None
        line = self._received
        self._received = bytearray()
        return _reply_to(token, line)

    def first_request(self, message: object, seconds: float) -> Any:
        """Returns the reply to the first message, within whose `seconds` the worker also starts. Raises
        WorkerExited."""
        try:
            return self.request(message, seconds)
        except WorkerTimeout:
            raise WorkerExited(f"was not ready within {seconds:g} s") from None
        except WorkerStarved as starved:
            raise WorkerExited(f"was not ready, because the machine is too busy: {starved}") from None

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
            received = self._channel.recv(RECEIVE_BYTES)
            if not received:
                raise WorkerExited(self._exit_reason())
            self._received += received
            if len(self._received) > MAX_REPLY_BYTES:
                raise ChannelCorrupted

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

    def leave_to_parent(self) -> None:
        """Frees the resources of a forked process, whose parent uses the worker: the worker continues."""
        self._channel.close()
        self._process.returncode = 0


def _start(module: str, descriptor: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-P",
        "-B",
        str(SCRIPT),
        str(descriptor),
        str(os.getpid()),
        module,
    ]
    # its own session: Ctrl-C is only for the run, which finishes its step
    return subprocess.Popen(
        command,
        pass_fds=[descriptor],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _encode(message: Mapping[str, Any]) -> bytes:
    """Returns a line of JSON. What JSON cannot represent (a date, bytes) becomes text. Not ASCII: two lone surrogates
    would be read back as one character."""
    text = json.dumps(message, default=str, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def _reply_to(token: str, line: bytearray) -> Any:
    """Returns the reply in a line. Raises WorkerExited if the worker could not start, and ChannelCorrupted for anything
    but one reply to the request with this token."""
    if not line.startswith(b"{") or line.count(b"\n") > 1:
        raise ChannelCorrupted
    try:
        envelope = json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        raise ChannelCorrupted from None
    if not isinstance(envelope, dict) or envelope.get("token") != token:
        raise ChannelCorrupted
    if "fault" in envelope:
        raise WorkerExited(f"could not start: {envelope['fault']}")
    if "reply" not in envelope:
        raise ChannelCorrupted
    return envelope["reply"]
