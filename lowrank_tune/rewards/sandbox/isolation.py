"""What this machine offers for code that nobody has read. A level counts where a process at it was tried and found
closed.

namespaces: no network, no other process, a root folder with Python's library alone; Landlock too where the kernel has
it. bubblewrap: the same by the program `bwrap`, which some systems allow more. landlock: one's own user's processes and
folders are there, but nothing of them can be opened or reached. At all three: a list of system calls (no process,
program or socket), limits of memory, CPU and files, an empty environment, and for a superuser the change to nobody.
none: limits alone, which stop no one who wants out.
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
from lowrank_tune.rewards.sandbox.launch import Confined, Level, UnauthenticatedMessage, Unconfined
from lowrank_tune.rewards.sandbox.values import DeserializationError, decode, encode

LEVELS: tuple[Level, ...] = ("namespaces", "bubblewrap", "landlock")
"""From the strongest to the floor."""
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
def open_doors(secret, folder, parent):
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
"""Tried at every level: each of these must be refused."""


@dataclass(frozen=True)
class AvailableIsolation:
    """A level that was tried: `fault` says why it is none here. `status` is what the process told of itself."""

    level: Level
    fault: str = ""
    status: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        if self.fault or self.status is None:
            return f"{self.level}: {self.fault}"
        if self.status["landlock"]:
            lock = f" + Landlock {self.status['landlock']}"
        else:
            lock = ""
        base = "" if self.level == "landlock" else self.level
        return (
            f"{base}{lock}{'' if self.level == 'none' else ' + seccomp'} + limits, as user {self.status['uid']}"
        ).removeprefix(" + ")


@functools.cache
def best_available() -> AvailableIsolation | None:
    """The strongest level at or above the floor; None where there is none. Tried once."""
    return next((available for available in map(probe_level, LEVELS) if not available.fault), None)


def unavailable_reason() -> str:
    """Why each level is none here, in words."""
    return "; ".join(str(available) for available in map(probe_level, LEVELS))


@functools.cache
def probe_level(level: Level) -> AvailableIsolation:
    """Starts a process at the level and lets it try the doors."""
    if sys.platform != "linux" or not seccomp.is_supported():
        return AvailableIsolation(level, f"not on {sys.platform} {os.uname().machine}")
    if level == "bubblewrap" and shutil.which("bwrap") is None:
        return AvailableIsolation(level, "`bwrap` is not installed")
    solver = Confined("solver", level)
    try:
        status = solver.ready()
        escapes = escape_checks(solver)
    except Unconfined as fault:
        return AvailableIsolation(level, str(fault))
    except (ChannelClosed, ChannelTimeout, MessageTooLong, UnauthenticatedMessage, DeserializationError) as error:
        return AvailableIsolation(
            level, f"the process {solver.end() if isinstance(error, ChannelClosed) else 'did not answer as it should'}"
        )
    finally:
        solver.end()
    return AvailableIsolation(
        level,
        f"code at this level {', '.join(escapes)}" if escapes and level != "none" else "",
        status,
    )


def escape_checks(solver: Confined) -> list[str]:
    """Which of the attempts of PROBE work from inside a process."""
    deadline = time.monotonic() + PROBE_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as handle:
            handle.write("x")
        solver.send(encode({"prompt": "", "code": PROBE, "entry": ""}), deadline)
        loaded = decode(solver.receive(deadline))
        if loaded != ["loaded"]:
            return [f"cannot run ({loaded})"]
        solver.send(encode(["name", "open_doors"]), deadline)
        solver.receive(deadline)
        solver.send(b"l4;" + encode("call") + b"o0;" + encode([secret, folder, os.getpid()]) + encode({}), deadline)
        answer = decode(solver.receive(deadline))
    if answer[0] == "value":
        return list(answer[1])
    return [f"cannot run ({answer})"]
