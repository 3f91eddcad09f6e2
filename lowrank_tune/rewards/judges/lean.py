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
LONGEST = 4 << 20  # bytes of messages
FLAGS = ("--json", "--stdin")
TRUSTED = frozenset({"propext", "Classical.choice", "Quot.sound"})
AXIOMS = re.compile(r"depends on axioms: \[([^\]]*)\]")
TRIED = "theorem {name} : True\n:= trivial\n#print axioms {name}\n"


class Broken(Exception):
    """The program did not do its work; the message says how."""


def load(job: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Judges `head`, `proof` and `name`: {right, why}, or {row} where the row's own part is not taken. Tries the
    program first."""
    program, memory = job["program"], job["megabytes"]
    if (why := refused(run(program, TRIED.format(name="lowrank_tries"), memory), "lowrank_tries", 3)) is not None:
        raise Broken(f"the program does not check a proof of True: {why}")

    def judge(asked: Mapping[str, Any]) -> Mapping[str, Any]:
        head, name = asked["head"], asked["name"]
        text = f"{head}\n{asked['proof']}\n#print axioms {name}\n"
        messages = run(program, text, memory)
        why = refused(messages, name, text.count("\n"))
        if why is not None and any(_line(each) <= head.count("\n") + 1 for each in errors(messages)):
            # an error that stands in the row's own lines: whose is it?
            bare = run(program, f"{head}\n:= by sorry\n", memory)
            if found := next(errors(bare), None):
                return {"row": str(found.get("data"))[:300]}
        return {"right": why is None, "why": why or ""}

    return judge


def refused(messages: Sequence[Mapping[str, Any]], name: str, line: int) -> str | None:
    """Why what was told proves nothing: an error, or an axiom that is not trusted. `line`: where we ask for the axioms,
    and nobody else.

    Raises Broken where nothing was told at all.
    """
    if error := next(errors(messages), None):
        return f"line {_line(error)}: {str(error.get('data'))[:300]}"
    told = [
        str(each.get("data"))
        for each in messages
        if _line(each) == line and each.get("severity") in ("information", "info")
    ]
    if len(told) != 1 or not re.match(rf"'(?:[^'\s]*\.)?{name}' (?:depends on|does not depend on any) axioms", told[0]):
        raise Broken("the program said nothing of axioms")
    found = AXIOMS.search(told[0])
    others = {axiom.strip() for axiom in found[1].split(",")} - TRUSTED if found else set()
    return f"rests on {', '.join(sorted(others))[:200]}" if others else None


def errors(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (each for each in messages if each.get("severity") == "error")


def _line(message: Mapping[str, Any]) -> int:
    place = message.get("pos")
    line = place.get("line") if isinstance(place, dict) else None
    return line if isinstance(line, int) else 0


def run(program: Sequence[str], text: str, megabytes: int) -> list[Mapping[str, Any]]:
    """The program's messages on a file. Raises Broken where it was killed, or ended with a failure of which no message
    tells."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as told:
        given.write(text.encode())
        given.seek(0)
        process = subprocess.Popen(
            [*program, *FLAGS, "-M", str(megabytes)],
            stdin=given,
            stdout=told,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            preexec_fn=lambda: _confine(megabytes),
        )
        try:
            code = process.wait()
        finally:
            _kill(process)
        size = told.seek(0, os.SEEK_END)
        told.seek(0)
        output = told.read()
    if size >= LONGEST:
        raise Broken("the program wrote too much")
    if code < 0:
        raise Broken(f"the program was killed by {signal.Signals(-code).name}")
    messages = list(_messages(output.decode(errors="replace")))
    if bool(code) != any(errors(messages)):
        raise Broken(f"the program ended with code {code}" + ("" if code else ", though it told of errors"))
    return messages


def _messages(output: str) -> Iterator[Mapping[str, Any]]:
    for line in output.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(message := json.loads(line), dict):
                yield message


def _confine(megabytes: int) -> None:
    """In the child: memory that it writes to is limited; address space is not, for it maps libraries of gigabytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    for limit, most in (
        (resource.RLIMIT_DATA, (megabytes + 1024) << 20),
        (resource.RLIMIT_FSIZE, LONGEST),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The program, and all that descends from it, where it still runs."""
    if process.poll() is not None:
        return
    parents = dict(_processes())
    doomed = [process.pid]
    for pid in doomed:
        doomed += [child for child, parent in parents.items() if parent == pid]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _processes() -> Iterator[tuple[int, int]]:
    """Each process with its parent."""
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{int(name)}/stat", encoding="utf-8", errors="replace") as status:
                yield int(name), int(status.read().rpartition(")")[2].split()[1])
