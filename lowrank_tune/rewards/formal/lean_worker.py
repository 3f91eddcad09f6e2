"""The worker side of `lean` (`lean.py`): runs the program on a file with the row's statement and the proof, and reads
its messages. Runs in the worker process.

The program stays in the process group of the worker, which the main process kills as a whole; the program and its
descendants are also killed here however a call ends. The program gets only the environment variables that it needs, a
limit on file sizes, and its own limit on memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lowrank_tune.json_files import parse_json
from lowrank_tune.processes.process_tree import processes, with_descendants

ENVIRONMENT = (
    "PATH",
    "HOME",
    "ELAN_HOME",
    "ELAN_TOOLCHAIN",
    "LEAN_PATH",
    "LEAN_SYSROOT",
    "LAKE_HOME",
)
MAX_OUTPUT_BYTES = 4 << 20  # bytes of messages
MAX_REASON_CHARS = 300
FLAGS = ("--json", "--stdin")
TRUSTED_AXIOMS = frozenset(
    {
        "propext",
        "Classical.choice",
        "Quot.sound",
    }
)
AXIOMS = re.compile(r"depends on axioms: \[([^\]]*)\]")
PROBE_NAME = "lowrank_tries"
PROBE_THEOREM = f"theorem {PROBE_NAME} : True\n:= trivial\n#print axioms {PROBE_NAME}\n"

Messages = Sequence[Mapping[str, Any]]


class LeanFailed(Exception):
    """The program did not check the file; the message is the reason."""


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Returns the grader of `head`, `proof` and `name`: {right, why}, or {row} if Lean rejects the row's own part.
    Raises LeanFailed if the program does not accept a trivial proof."""
    program = spec["program"]
    memory = spec["megabytes"]
    reason = rejection_reason(run_lean(program, PROBE_THEOREM, memory), PROBE_NAME, 3)
    if reason is not None:
        raise LeanFailed(f"the program does not accept a proof of True: {reason}")

    def grade(request: Mapping[str, Any]) -> Mapping[str, Any]:
        head = request["head"]
        name = request["name"]
        text = f"{head}\n{request['proof']}\n#print axioms {name}\n"
        messages = run_lean(program, text, memory)
        reason = rejection_reason(messages, name, text.count("\n"))
        if reason is None:
            return {"right": True, "why": ""}
        num_head_lines = head.count("\n") + 1
        if any(_line(error) <= num_head_lines for error in errors(messages)):
            # an error in the row's own lines: does it remain without the proof of the completion?
            statement_messages = run_lean(program, f"{head}\n:= by sorry\n", memory)
            if error := next(errors(statement_messages), None):
                return {"row": _text(error)}
        return {"right": False, "why": reason}

    return grade


def rejection_reason(
    messages: Messages,
    name: str,
    line: int,
) -> str | None:
    """Returns why the messages do not show a proof: an error, or an axiom that is not trusted. None if they do.

    `line`: the number of the line that prints the axioms; messages about axioms from other lines do not count. Raises
    LeanFailed if that line has no message.
    """
    if error := next(errors(messages), None):
        return f"line {_line(error)}: {_text(error)}"
    infos = []
    for message in messages:
        if _line(message) == line and message.get("severity") in ("information", "info"):
            infos.append(str(message.get("data")))
    prefix = rf"'(?:[^'\s]*\.)?{name}' (?:depends on|does not depend on any) axioms"
    if len(infos) != 1 or not re.match(prefix, infos[0]):
        raise LeanFailed("the program printed no axioms")
    match = AXIOMS.search(infos[0])
    axioms = {axiom.strip() for axiom in match[1].split(",")} if match else set()
    untrusted = axioms - TRUSTED_AXIOMS
    if untrusted:
        return f"uses axioms that are not trusted: {', '.join(sorted(untrusted))[:200]}"
    return None


def errors(messages: Messages) -> Iterator[Mapping[str, Any]]:
    return (message for message in messages if message.get("severity") == "error")


def _text(message: Mapping[str, Any]) -> str:
    return str(message.get("data"))[:MAX_REASON_CHARS]


def _line(message: Mapping[str, Any]) -> int:
    """Returns the line of a message, or 0."""
    position = message.get("pos")
    line = position.get("line") if isinstance(position, dict) else None
    return line if isinstance(line, int) else 0


def run_lean(
    program: Sequence[str],
    text: str,
    megabytes: int,
) -> list[Mapping[str, Any]]:
    """Returns the program's messages for a file. Raises LeanFailed if it was killed, or its exit code does not fit its
    messages."""
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
    has_errors = any(errors(messages))
    if code and not has_errors:
        raise LeanFailed(f"the program ended with code {code}")
    if has_errors and not code:
        raise LeanFailed("the program printed errors and ended with code 0")
    return messages


def _messages(output: str) -> Iterator[Mapping[str, Any]]:
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            message = parse_json(line)
            if isinstance(message, dict):
                yield message


def _limit_resources(megabytes: int) -> None:
    """Runs in the child: limits the memory that it writes to. Address space is not limited, because Lean maps
    libraries of gigabytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    limits = {
        resource.RLIMIT_DATA: (megabytes + 1024) << 20,
        resource.RLIMIT_FSIZE: MAX_OUTPUT_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, maximum in limits.items():
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            maximum = min(maximum, hard)
        resource.setrlimit(limit, (maximum, maximum))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the program and its descendants, if it still runs."""
    if process.poll() is not None:
        return
    for pid in with_descendants([process.pid], processes()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
