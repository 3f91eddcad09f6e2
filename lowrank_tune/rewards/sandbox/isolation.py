"""The levels of isolation that this machine supports. A level counts only if a process at that level was started and
could do nothing that must be refused.

- namespaces: no network, no other process, and a root folder with only Python's library; Landlock too if the kernel has
  it.
- bubblewrap: the same by the program `bwrap`, which more systems allow.
- landlock: the user's other processes and folders exist, but cannot be opened or reached.
- none: only limits, which do not stop malicious code.

At the first three levels there are also a list of allowed system calls (no new process or program, no socket), limits
of memory, CPU and files, an empty environment, and for root the change to the user nobody.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_tune.rewards.sandbox import seccomp
from lowrank_tune.rewards.sandbox.ipc import ChannelClosed, ChannelTimeout, MessageTooLong
from lowrank_tune.rewards.sandbox.launch import (
    Confined,
    Level,
    UnauthenticatedMessage,
    Unconfined,
    bubblewrap_fault,
)
from lowrank_tune.rewards.sandbox.values import DeserializationError, decode, encode

LEVELS: tuple[Level, ...] = ("namespaces", "bubblewrap", "landlock")
"""From the strongest to the weakest."""
PROBE_SECONDS = 10.0
PROBE = """
import os, signal, socket
def works(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True
def child():
    if not os.fork():
        os._exit(0)
def escapes(secret, folder, parent):
    attempts = {
        "reads files": lambda: open(secret).read(),
        "writes files": lambda: open(folder + "/written", "w").write("x"),
        "lists folders": lambda: os.listdir(folder),
        "opens sockets": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "starts processes": child,
        "reaches other processes": lambda: os.kill(parent, 0),
        "has an environment": lambda: None if os.environ else os.stat("/no such file"),
    }
    return [name for name, attempt in attempts.items() if works(attempt)]
"""
"""Code that runs at every level: each of its attempts must be refused."""


@dataclass(frozen=True)
class AvailableIsolation:
    """A level that was tested. `fault`: why it cannot be used. `status`: what `confine` returned in the process."""

    level: Level
    fault: str = ""
    status: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        if self.fault or self.status is None:
            return f"{self.level}: {self.fault}"
        parts = []
        if self.level != "landlock":
            parts.append(str(self.level))
        if self.status["landlock"]:
            parts.append(f"Landlock {self.status['landlock']}")
        if self.level != "none":
            parts.append("seccomp")
        return f"{' + '.join([*parts, 'limits'])}, as user {self.status['uid']}"


@functools.cache
def best_available() -> AvailableIsolation | None:
    """Returns the strongest level that can be used; None if there is none. Tests the levels once."""
    for level in LEVELS:
        available = probe_level(level)
        if not available.fault:
            return available
    return None


def unavailable_reason() -> str:
    """Returns why each level cannot be used."""
    return "; ".join(str(available) for available in map(probe_level, LEVELS))


@functools.cache
def probe_level(level: Level) -> AvailableIsolation:
    """Starts a process at a level and runs the attempts of PROBE in it."""
    if sys.platform != "linux" or not seccomp.is_supported():
        return AvailableIsolation(level, f"not on {sys.platform} {os.uname().machine}")
    if level == "bubblewrap" and shutil.which("bwrap") is None:
        return AvailableIsolation(level, "`bwrap` is not installed")
    solver = Confined("solver", level)
    try:
        status = solver.ready()
        escapes = escape_checks(solver)
    except Unconfined as fault:
        # the processes of the sandbox have no stderr, so bubblewrap's own reason is read from another start
        reason = bubblewrap_fault() if level == "bubblewrap" else ""
        return AvailableIsolation(level, reason or str(fault))
    except ChannelClosed:
        return AvailableIsolation(level, f"the process {solver.end()}")
    except (ChannelTimeout, MessageTooLong, UnauthenticatedMessage, DeserializationError):
        return AvailableIsolation(level, "the process did not answer as it should")
    finally:
        solver.end()
    if escapes and level != "none":
        return AvailableIsolation(
            level,
            f"code at this level {', '.join(escapes)}",
            status,
        )
    return AvailableIsolation(level, status=status)


def escape_checks(solver: Confined) -> list[str]:
    """Returns the attempts of PROBE that succeed inside a process."""
    deadline = time.monotonic() + PROBE_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as handle:
            handle.write("x")
        solver.send(
            encode(
                {
                    "prompt": "",
                    "code": PROBE,
                    "entry": "",
                }
            ),
            deadline,
        )
        loaded = decode(solver.receive(deadline))
        if loaded != ["loaded"]:
            return [f"cannot run ({loaded})"]
        solver.send(encode(["name", "escapes"]), deadline)
        solver.receive(deadline)
        # a list of four values: operation, object 0 of the solver, arguments, named arguments
        arguments = encode([secret, folder, os.getpid()])
        solver.send(b"l4;" + encode("call") + b"o0;" + arguments + encode({}), deadline)
        answer = decode(solver.receive(deadline))
    if answer[0] == "value":
        return list(answer[1])
    return [f"cannot run ({answer})"]
