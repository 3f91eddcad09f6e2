"""Lean in a worker: a file of ours with the model's proof in it, given to the program on its standard input, and its
messages read.

The program stays in the process group of this worker, which its parent kills as a whole; what it started is killed here
too, however a call ends. It gets what it needs of the environment, no file larger than its messages may be, and a limit
on memory of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ENVIRONMENT = ("PATH", "HOME", "ELAN_HOME", "ELAN_TOOLCHAIN", "LEAN_PATH", "LEAN_SYSROOT", "LAKE_HOME")
MAX_OUTPUT_BYTES = 4 << 20  # bytes of messages
FLAGS = ("--json", "--stdin")
TRUSTED_AXIOMS = frozenset({"propext", "Classical.choice", "Quot.sound"})
AXIOMS = re.compile(r"depends on axioms: \[([^\]]*)\]")
PROBE_THEOREM = "theorem {name} : True\n:= trivial\n#print axioms {name}\n"


class LeanFailed(Exception):
    """The program did not do its work; the message says how."""


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Judges `head`, `proof` and `name`: {right, why}, or {row} where the row's own part is not taken. Tries the
    program first."""
    program = spec["program"]
    memory = spec["megabytes"]
    if (
        reason := rejection_reason(
            run_lean(program, PROBE_THEOREM.format(name="lowrank_tries"), memory),
            "lowrank_tries",
            3,
        )
    ) is not None:
        raise LeanFailed(f"the program does not check a proof of True: {reason}")

    def grade(request: Mapping[str, Any]) -> Mapping[str, Any]:
        head = request["head"]
        name = request["name"]
        text = f"{head}\n{request['proof']}\n#print axioms {name}\n"
        messages = run_lean(program, text, memory)
        reason = rejection_reason(messages, name, text.count("\n"))
        if reason is not None and any(_line(message) <= head.count("\n") + 1 for message in errors(messages)):
            # an error that stands in the row's own lines: whose is it?
            statement_messages = run_lean(program, f"{head}\n:= by sorry\n", memory)
            if error := next(errors(statement_messages), None):
                return {"row": str(error.get("data"))[:300]}
        return {"right": reason is None, "why": reason or ""}

    return grade


def rejection_reason(messages: Sequence[Mapping[str, Any]], name: str, line: int) -> str | None:
    """Why what was told proves nothing: an error, or an axiom that is not trusted. `line`: where we ask for the axioms,
    and nobody else.

    Raises LeanFailed where nothing was told at all.
    """
    if error := next(errors(messages), None):
        return f"line {_line(error)}: {str(error.get('data'))[:300]}"
    infos = [
        str(message.get("data"))
        for message in messages
        if _line(message) == line and message.get("severity") in ("information", "info")
    ]
    if len(infos) != 1 or not re.match(
        rf"'(?:[^'\s]*\.)?{name}' (?:depends on|does not depend on any) axioms", infos[0]
    ):
        raise LeanFailed("the program said nothing of axioms")
    match = AXIOMS.search(infos[0])
    if match:
        untrusted = {axiom.strip() for axiom in match[1].split(",")} - TRUSTED_AXIOMS
    else:
        untrusted = set()
    if untrusted:
        return f"rests on {', '.join(sorted(untrusted))[:200]}"
    return None


def errors(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (message for message in messages if message.get("severity") == "error")


def _line(message: Mapping[str, Any]) -> int:
    position = message.get("pos")
    line = position.get("line") if isinstance(position, dict) else None
    return line if isinstance(line, int) else 0


def run_lean(program: Sequence[str], text: str, megabytes: int) -> list[Mapping[str, Any]]:
    """The program's messages on a file. Raises LeanFailed where it was killed, or ended with a failure of which no
    message tells."""
    with tempfile.TemporaryFile() as stdin_file, tempfile.TemporaryFile() as stdout_file:
        stdin_file.write(text.encode())
        stdin_file.seek(0)
        process = subprocess.Popen(
            [*program, *FLAGS, "-M", str(megabytes)],
            stdin=stdin_file,
            stdout=stdout_file,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            preexec_fn=lambda: _limit_resources(megabytes),
        )
        try:
            code = process.wait()
        finally:
            _kill(process)
        size = stdout_file.seek(0, os.SEEK_END)
        stdout_file.seek(0)
        output = stdout_file.read()
    if size >= MAX_OUTPUT_BYTES:
        raise LeanFailed("the program wrote too much")
    if code < 0:
        raise LeanFailed(f"the program was killed by {signal.Signals(-code).name}")
    messages = list(_messages(output.decode(errors="replace")))
    if bool(code) != any(errors(messages)):
        raise LeanFailed(f"the program ended with code {code}" + ("" if code else ", though it told of errors"))
    return messages


def _messages(output: str) -> Iterator[Mapping[str, Any]]:
    for line in output.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(message := json.loads(line), dict):
                yield message


def _limit_resources(megabytes: int) -> None:
    """In the child: memory that it writes to is limited; address space is not, for it maps libraries of gigabytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    for limit, maximum in (
        (resource.RLIMIT_DATA, (megabytes + 1024) << 20),
        (resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            maximum = min(maximum, hard)
        resource.setrlimit(limit, (maximum, maximum))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The program, and all that descends from it, where it still runs."""
    if process.poll() is not None:
        return
    parents = dict(_processes())
    pids = [process.pid]
    for pid in pids:
        pids += [child for child, parent in parents.items() if parent == pid]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _processes() -> Iterator[tuple[int, int]]:
    """Each process with its parent."""
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with (
            contextlib.suppress(OSError, ValueError),
            open(f"/proc/{int(name)}/stat", encoding="utf-8", errors="replace") as status,
        ):
            yield int(name), int(status.read().rpartition(")")[2].split()[1])
