"""The product itself, by its command line: a run that learns, a run that is interrupted and resumed, chat, and a
merge that is checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gpu_proof.records import Record

ROOT = Path(__file__).parents[2]
PRESET = "tiny-grpo"
CUT_AFTER, CUT_STEPS = 2, 4
"""The interrupted run gets SIGTERM after this step, and has so many steps."""
ADAPTER = "final/adapter_model.safetensors"
QUESTION = "What is 6 * 33?"
INTERRUPTED = 130


@dataclass(frozen=True)
class ProductSize:
    """Settings of the run that learns, and the least rise of its held-out accuracy."""

    settings: tuple[str, ...]
    min_rise: float


GPU = ProductSize(("evaluate.every=24", "evaluate.prompts=100", "evaluate.samples=2"), 0.3)
TINY = ProductSize(("train.steps=16", "evaluate.every=16", "evaluate.prompts=40", "evaluate.samples=1"), 0.1)


def kit(*words: str) -> list[str]:
    return [sys.executable, "-m", "lowrank_tune", *words]


def environment() -> dict[str, str]:
    """Return the environment with this checkout first among the packages, and no contact to the hub.

    The commands run in another folder, so relative paths become absolute.
    """
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [str(ROOT), *map(os.path.abspath, given)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


@dataclass
class Started:
    """A command in the background; its output goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def wait(self) -> tuple[int, float]:
        """Return the exit code and the seconds that the command took."""
        code = self.process.wait()
        return code, time.perf_counter() - self.started

    def failure(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def start(folder: Path, name: str, *words: str) -> Started:
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            kit(*words),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(),
            cwd=folder,
        )
    return Started(process, log, time.perf_counter())


def run_words(out: str, *settings: str) -> list[str]:
    return ["run", PRESET, "--out", out, "--ui", "plain", *settings]


def short_run(out: str) -> list[str]:
    """The run that is repeated, interrupted or not."""
    return run_words(out, f"train.steps={CUT_STEPS}", "train.log_every=1", "evaluate.prompts=4", "evaluate.samples=1")


def measure(folder: Path, size: ProductSize) -> Iterator[Record]:
    """Yield a record for each thing that the product does. Runs that do not depend on each other run side by side."""
    learning = start(folder, "learn", *run_words("learn", *size.settings))
    straight = start(folder, "straight", *short_run("straight"))
    yield resumed(folder, straight)
    yield learned(folder, learning, size)
    yield chat(folder)
    yield merged(folder)


def product_record(step: str, **values: Any) -> Record:
    return {"kind": "product", "step": step, **values}


def learned(folder: Path, learning: Started, size: ProductSize) -> Record:
    """Held-out accuracy before and after `PRESET`."""
    code, seconds = learning.wait()
    if code:
        return product_record("learn", seconds=seconds, failed=f"exit code {code}: {learning.failure()}")
    summary = json.loads((folder / "learn" / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["heldout"]["base"], summary["heldout"]["grpo"]
    checks = {"held-out accuracy rises": after - before > size.min_rise}
    tokens = summary["last"]["tokens_per_second"]
    return product_record(
        "learn", seconds=seconds, accuracy_before=before, accuracy_after=after, tokens_per_second=tokens, checks=checks
    )


def resumed(folder: Path, straight: Started) -> Record:
    """Interrupt a run by SIGTERM, resume it, and compare its adapter with that of a run that was not interrupted,
    bit for bit."""
    cut = start(folder, "cut", *short_run("resumed"))
    while cut.process.poll() is None and steps_done(folder / "resumed") < CUT_AFTER:
        time.sleep(0.02)
    cut.process.send_signal(signal.SIGTERM)
    code, _ = cut.wait()
    if code != INTERRUPTED:
        return product_record("resume", failed=f"exit code {code} after SIGTERM: {cut.failure()}")
    at_step = steps_done(folder / "resumed")
    again = start(folder, "again", *short_run("resumed"))
    for name, command in (("the resumed run", again), ("the straight run", straight)):
        code, seconds = command.wait()
        if code:
            return product_record("resume", failed=f"{name}: exit code {code}: {command.failure()}")
    tensors, expected = (load_file(folder / name / ADAPTER) for name in ("resumed", "straight"))
    differences = [float((tensors[name] - expected[name]).abs().max()) for name in expected]
    equal = all(torch.equal(tensors[name], expected[name]) for name in expected)
    checks = {"the run was interrupted before its end": at_step < CUT_STEPS, "resume is bit-exact": equal}
    return product_record(
        "resume", interrupted_after_step=at_step, seconds=seconds, max_difference=max(differences), checks=checks
    )


def steps_done(run: Path) -> int:
    """Return the last step in a run's events, 0 before there is one."""
    events = run / "events.jsonl"
    if not events.exists():
        return 0
    steps = [0]
    for line in events.read_text(encoding="utf-8").splitlines():
        if line.startswith("{") and line.endswith("}"):
            event = json.loads(line)
            if event.get("event") == "step":
                steps.append(int(event["step"]))
    return steps[-1]


def command(folder: Path, words: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(kit(*words), input=text, capture_output=True, text=True, env=environment(), cwd=folder)


def chat(folder: Path) -> Record:
    """Ask the trained model one question through a pipe."""
    started = time.perf_counter()
    done = command(folder, ["chat", "learn"], QUESTION + "\n")
    seconds = time.perf_counter() - started
    if done.returncode:
        return product_record("chat", seconds=seconds, failed=f"exit code {done.returncode}: {done.stderr[-500:]}")
    answer = done.stdout.strip()
    return product_record("chat", seconds=seconds, answer=answer, checks={"chat answers": bool(answer)})


def merged(folder: Path) -> Record:
    """Merge the adapter into its base and compare the result with what was trained."""
    started = time.perf_counter()
    done = command(folder, ["merge", "learn", "--out", "merged"])
    seconds = time.perf_counter() - started
    report = folder / "merged" / "merge.json"
    if not report.exists():
        return product_record("merge", seconds=seconds, failed=f"exit code {done.returncode}: {done.stderr[-500:]}")
    figures = json.loads(report.read_text(encoding="utf-8"))
    checks = {"the merged model is what was trained": done.returncode == 0}
    return product_record("merge", seconds=seconds, kl=figures["kl"], checks=checks)
