"""Starts confined processes and exchanges messages with them. Runs in the worker process, which must not end before
they do."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lowrank_tune.rewards.sandbox import mounts
from lowrank_tune.rewards.sandbox.handshake import NONCE_BYTES
from lowrank_tune.rewards.sandbox.ipc import Channel, ChannelClosed, ChannelTimeout
from lowrank_tune.rewards.sandbox.values import DeserializationError, decode

Level = Literal["namespaces", "bubblewrap", "landlock", "none"]
SandboxRole = Literal["solver", "tester"]
FOLDER = Path(__file__).resolve().parent
MEMORY_BYTES = 1 << 30  # of address space
CPU_SECONDS = 20
MAX_EXTRA_TASKS = 512  # processes and threads in addition to those that the user already has
START_SECONDS = 20.0
ENDING_SECONDS = 0.5  # between the end of the stream and the end of the process
PACKAGE = "lowrank_tune.rewards.sandbox"
BOOT = f"""import sys
for name in ("lowrank_tune", "lowrank_tune.rewards", "{PACKAGE}"):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [sys.argv[1]]
from {PACKAGE}.child import main
main(*sys.argv[2:])"""
"""The first code of a confined Python: makes only this package importable. The packages around it need more than the
standard library."""


class Unconfined(Exception):
    """A process could not be confined at its level; the message is the reason."""


class UnauthenticatedMessage(Exception):
    """A message without the nonce and its number: the code itself wrote to the stream of its results."""


class Confined:
    """One confined process at a level, which waits for its first message."""

    def __init__(self, role: SandboxRole, level: Level) -> None:
        parent_end, child_end = socket.socketpair()
        self._channel = Channel(parent_end)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._num_received = 0
        numbers = [
            child_end.fileno(),
            os.getpid(),
            MEMORY_BYTES,
            CPU_SECONDS,
            max_tasks(),
        ]
        with child_end:
            self._process = subprocess.Popen(
                [
                    *python(level),
                    role,
                    level,
                    *map(str, numbers),
                ],
                pass_fds=[child_end.fileno()],
                cwd="/",
                start_new_session=True,
                # sets have one order; the process clears its environment later
                env={"PYTHONHASHSEED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def ready(self) -> Mapping[str, Any]:
        """Returns the status of the process once it is confined, and sends the nonce. Raises Unconfined."""
        deadline = time.monotonic() + START_SECONDS
        try:
            status: Mapping[str, Any] = decode(self._channel.receive(deadline))
            self._channel.send(self._nonce, deadline)
        except (ChannelClosed, DeserializationError):
            raise Unconfined(f"it {self.end()}") from None
        except ChannelTimeout:
            raise Unconfined(f"it was not ready within {START_SECONDS:g} s") from None
        if "fault" in status:
            raise Unconfined(status["fault"])
        return status

    @property
    def pid(self) -> int:
        """The process id of the child; at some levels the code runs in a descendant of it."""
        return self._process.pid

    def send(self, message: bytes, deadline: float) -> None:
        """Sends a message. Raises ChannelTimeout or ChannelClosed."""
        self._channel.send(message, deadline)

    def flush(self, deadline: float) -> None:
        """Sends what `send` could not send in time. Raises ChannelTimeout or ChannelClosed."""
        self._channel.flush(deadline)

    def receive(self, deadline: float) -> bytes:
        """Returns the next message. Raises ChannelTimeout, ChannelClosed, MessageTooLong or UnauthenticatedMessage."""
        message = self._channel.receive(deadline)
        self._num_received += 1
        head = self._nonce + struct.pack("<I", self._num_received)
        if not message.startswith(head):
            raise UnauthenticatedMessage
        return message[len(head) :]

    def end(self) -> str:
        """Kills the process and its descendants. Returns how it had ended by itself, as a predicate."""
        # a process that has closed the stream gets a moment to end by itself
        deadline = time.monotonic() + (ENDING_SECONDS if self._channel.closed() else 0)
        while not (finished := self._finished()) and time.monotonic() < deadline:
            time.sleep(0.002)
        # before it was waited for, its process id cannot belong to another process
        if self._process.returncode is None:
            # its group, if it has created one by now, and the process itself
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._channel.close()
        return exit_reason(code if finished else None)

    def _finished(self) -> bool:
        """Returns whether the process has ended, without removing it from the process table."""
        if self._process.returncode is not None:
            return True
        return (
            os.waitid(
                os.P_PID,
                self._process.pid,
                os.WEXITED | os.WNOWAIT | os.WNOHANG,
            )
            is not None
        )


def exit_reason(code: int | None) -> str:
    """Returns how a process ended, as a predicate; None: it still ran."""
    if code is None:
        return "closed its connection"
    # a process that waits for another one exits with 128 plus its signal
    number = -code if code < 0 else code - 128
    if number in signal.valid_signals() and number:
        return f"was killed by {signal.Signals(number).name}"
    return f"ended its process with code {code}"


@functools.cache
def interpreter() -> str:
    """Returns the path of this Python, outside of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def python(level: Level) -> tuple[str, ...]:
    """Returns the command of a confined Python, up to the arguments of `child.main`.

    The flags isolate it like -I, which would ignore PYTHONHASHSEED too.
    """
    flags = ("-P", "-s", "-S", "-B", "-X", "utf8", "-c", BOOT)
    if level == "bubblewrap":
        return (*bubblewrap(), interpreter(), *flags, "/kit")
    return (interpreter(), *flags, str(FOLDER))


def bubblewrap() -> list[str]:
    """Returns the command of bubblewrap, which mounts only the paths of `mounts` and this package."""
    library = os.path.realpath(os.path.dirname(os.__file__))
    command = [
        # confined processes have no PATH
        shutil.which("bwrap") or "bwrap",
        *(f"--unshare-{namespace}" for namespace in ("pid", "net", "ipc", "uts", "cgroup-try")),
        "--die-with-parent",
    ]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # to change to the user nobody
    else:
        command += [
            "--unshare-user",
            "--uid",
            "65534",
            "--gid",
            "65534",
        ]
    visible = [*mounts.readable([library]), interpreter()]
    folders = {str(folder) for path in visible for folder in Path(path).parents} - {"/"}
    for folder in sorted(folders):
        # a folder that is closed to other users outside is open inside
        command += ["--perms", "0755", "--dir", folder]
    for path in visible:
        command += [
            "--dev-bind" if path in mounts.DEVICES else "--ro-bind",
            path,
            path,
        ]
    for name, target in mounts.root_symlinks():
        command += ["--symlink", target, name]
    return [
        *command,
        "--ro-bind",
        str(FOLDER),
        "/kit",
        "--chdir",
        "/",
        "--",
    ]


def bubblewrap_fault() -> str:
    """Returns the message with which bubblewrap refuses to start any process here; empty if it starts one, or does not
    end."""
    try:
        done = subprocess.run(
            [*bubblewrap(), interpreter(), "-S", "-c", ""],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=START_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if done.returncode and lines else ""


@functools.cache
def max_tasks() -> int:
    """Returns how many processes and threads the confined user may have: those that it has now, and some more."""
    uid = str(os.geteuid() or 65534)
    count = 0
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            status = (process / "status").read_text()
        except OSError:  # the process has ended
            continue
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        if fields.get("Uid", "").split()[:1] == [uid]:
            count += int(fields.get("Threads", "1"))
    return count + MAX_EXTRA_TASKS
