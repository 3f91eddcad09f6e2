"""Runs of the command on a disk that fails: a call that writes raises EIO or ENOSPC or writes a part, or the disk is
full from then on. The run must end with a sentence and leave what was saved; the same command then continues it.

A server imports everything once and forks a child for each run, so that a run costs seconds. `python tests/faults.py
--seconds 600 --seed 1` is the long sweep.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crash import run_fingerprint, small_recipe
from failing_disk import KINDS, FailingDisk, Fault

REASONS = {errno.EIO: [os.strerror(errno.EIO)], errno.ENOSPC: ["the disk is full", os.strerror(errno.ENOSPC)]}
ALGORITHMS = ("sft", "grpo")


# --- in the child -----------------------------------------------------------------------------------------------------


def serve() -> None:
    """Forks a child for each line of stdin, an order, and prints its wait status."""
    for name in ("lowrank_tune.cli", "lowrank_tune.runner", "bitsandbytes"):
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(obey(order))
        print(os.waitpid(child, 0)[1], flush=True)


def obey(order: dict[str, Any]) -> int:
    """The command in this process, its output in a file; returns its exit code."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["LOWRANK_TUNE_CACHE"] = order["cache"]
    sys.argv = ["lowrank-tune", *order["arguments"]]
    if order["die_in"]:
        die_in(*order["die_in"])
    disk = FailingDisk([order["out"], order["cache"]], Fault(**order["fault"]) if order["fault"] else None)
    disk.install()
    code = 99
    try:
        importlib.import_module("lowrank_tune.cli").main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    Path(order["log"] + ".json").write_text(json.dumps({"calls": disk.calls, "hit": disk.hit}))
    return code


def die_in(module: str, kind: str, method: str, call: int) -> None:
    """SIGKILL in a call of this method, after `call` others."""
    owner = getattr(importlib.import_module(module), kind)
    real, calls = getattr(owner, method), iter(range(call))

    def last(*given: Any, **more: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **more)

    setattr(owner, method, last)


# --- in the tests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code (negative: the signal), its output, the calls that wrote, and the call that
    failed."""

    code: int
    text: str
    calls: dict[str, int]
    hit: str

    @property
    def message(self) -> str:
        """The last line of the output."""
        return (self.text.strip().splitlines() or [""])[-1]


class CommandServer:
    """Runs `lowrank-tune run RECIPE --out OUT` in forked processes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        recipe: dict[str, Any],
        out: Path,
        fault: Fault | None = None,
        die_in: tuple[str, str, str, int] | None = None,
    ) -> Outcome:
        """One start of the command. Recipe, log and cache lie beside the folder `out`."""
        assert self.process.stdin and self.process.stdout
        file, log = out.with_name(f"{out.name}.yaml"), out.with_name(f"{out.name}.log")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(recipe))
        facts = Path(f"{log}.json")
        facts.unlink(missing_ok=True)
        order = {
            "arguments": ["run", str(file), "--out", str(out), "--ui", "plain"],
            "out": str(out),
            "cache": str(cache_of(out)),
            "log": str(log),
            "fault": asdict(fault) if fault else None,
            "die_in": die_in,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        found = json.loads(facts.read_text()) if facts.exists() else {"calls": {}, "hit": ""}
        text = log.read_text(errors="replace")
        return Outcome(os.waitstatus_to_exitcode(status), text, found["calls"], found["hit"])

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


def cache_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.cache")


def fault_recipe(algorithm: str) -> dict[str, Any]:
    """Six steps, each second one saved, of which three checkpoints stay."""
    return small_recipe(algorithm, max_steps=6, save_total_limit=3)


def leftovers(*folders: Path) -> list[str]:
    """What only a crash may leave: temporary files and folders."""
    return [
        str(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.name.startswith((".tmp-", ".aside-")) or path.suffix == ".tmp"
    ]


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is what the manifest names, and nothing else is there."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
    except (OSError, ValueError, KeyError):
        return False
    found = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    return found.keys() == {"manifest.json", *files} and all(
        hashlib.blake2b(found[name].read_bytes(), digest_size=16).hexdigest() == facts["blake2b"]
        for name, facts in files.items()
    )


def checkpoints_of(run: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix("step-")): path for path in (run / "checkpoints").glob("step-*")}


def announced_steps(run: Path) -> Iterator[int]:
    """The steps of the checkpoints that the log of a run names."""
    events = run / "events.jsonl"
    for line in events.read_bytes().splitlines() if events.exists() else ():
        if line.endswith(b"}") and (event := json.loads(line))["event"] == "checkpoint_saved":
            yield event["step"]


def check_failed_run(out: Path, outcome: Outcome, fault: Fault) -> None:
    """Checks what must hold for a run with a fault, for each way in which it can end."""
    assert "Traceback" not in outcome.text and "internal error" not in outcome.text, outcome.text
    if outcome.code != 0:
        number = KINDS[fault.kind]
        assert number is not None, f"a short write must be completed: {outcome.message}"
        assert outcome.code == 1 and any(reason in outcome.message for reason in REASONS[number]), outcome.text
        assert str(out) in outcome.message or str(cache_of(out)) in outcome.message, outcome.message
    assert leftovers(out, cache_of(out)) == []
    found = checkpoints_of(out)
    assert all(is_whole(path) for path in found.values()), f"a broken checkpoint of {sorted(found)}"
    assert max(announced_steps(out), default=0) <= max(found, default=0), "a saved checkpoint is gone"


class WriteFaults:
    """Draws of a fault in a run of some algorithm, from a seed. Each is carried out, checked, and continued."""

    def __init__(self, server: CommandServer, folder: Path, seed: int) -> None:
        self.server, self.folder, self.stream, self.count = server, folder, random.Random(seed), 0
        self._straight: dict[str, tuple[dict[str, Any], dict[str, int]]] = {}

    def straight(self, algorithm: str) -> tuple[dict[str, Any], dict[str, int]]:
        """What the undisturbed run leaves, and its calls that write."""
        if algorithm not in self._straight:
            out = self.folder / f"straight-{algorithm}"
            outcome = self.server.run(fault_recipe(algorithm), out)
            assert outcome.code == 0, outcome.text
            self._straight[algorithm] = run_fingerprint(out), outcome.calls
        return self._straight[algorithm]

    def draw(self) -> str:
        """One fault; returns a line about it. Raises AssertionError where something is lost."""
        algorithm, kind = self.stream.choice(ALGORITHMS), self.stream.choice(sorted(KINDS))
        wanted, calls = self.straight(algorithm)
        fault = Fault(kind, self.stream.randrange(calls["write"] if kind == "short" else sum(calls.values())))
        out, recipe = self.folder / f"run-{self.count}", fault_recipe(algorithm)
        self.count += 1
        outcome = self.server.run(recipe, out, fault)
        line = f"{algorithm} {kind} at call {fault.at} ({outcome.hit.replace(str(self.folder), '')})"
        check_failed_run(out, outcome, fault)
        if outcome.code != 0:
            again = self.server.run(recipe, out)
            assert again.code == 0, f"{line}: not continued: {again.text}"
        assert run_fingerprint(out) == wanted, f"{line}: another result"
        return f"{line}: exit {outcome.code}, equal"


def sweep(draw: Callable[[], str], seconds: float) -> None:
    """Draws for so long; prints a line for each, and the counts. Exits with 1 where something was lost."""
    deadline, count, endings = time.monotonic() + seconds, 0, Counter[str]()
    while time.monotonic() < deadline:
        try:
            line = draw()
        except AssertionError as error:
            line = f"{error}: LOST"
        print(f"{count}: {line}", flush=True)
        count, endings = count + 1, endings + Counter([line.rpartition(": ")[2]])
    print(f"{count} draws: {dict(endings)}", flush=True)
    if endings["LOST"]:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="run commands from stdin")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.serve:
        serve()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            sweep(WriteFaults(CommandServer(), Path(scratch), chosen.seed).draw, chosen.seconds)
