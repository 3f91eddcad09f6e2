"""The command line on the device: a training run, a run that is interrupted and resumed, chat, and a checked merge."""

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
INTERRUPT_AFTER, SHORT_STEPS = 2, 4
"""The step after which a run receives SIGTERM, and the number of its steps."""
ADAPTER = "final/adapter_model.safetensors"
QUESTION = "What is 6 * 33?"
INTERRUPTED = 130


@dataclass(frozen=True)
class ProductSize:
    """Settings of the run that learns, and the least rise of its held-out accuracy."""

    settings: tuple[str, ...]
    min_rise: float


GPU = ProductSize(("evaluate.eval_steps=24", "evaluate.num_prompts=100", "evaluate.num_samples=2"), 0.3)
TINY = ProductSize(
    ("train.max_steps=16", "evaluate.eval_steps=16", "evaluate.num_prompts=40", "evaluate.num_samples=1"), 0.1
)


def cli(*words: str) -> list[str]:
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
    """A command that runs in the background and writes its output to a file."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def wait(self) -> tuple[int, float]:
        """Return the exit code and the seconds that the command took."""
        code = self.process.wait()
        return code, time.perf_counter() - self.started

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def start(folder: Path, name: str, *words: str) -> Started:
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            cli(*words),
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
    """Return the command of the run that is compared with and without an interruption."""
    return run_words(
        out,
        f"train.max_steps={SHORT_STEPS}",
        "train.logging_steps=1",
        "evaluate.num_prompts=4",
        "evaluate.num_samples=1",
    )


def measure(folder: Path, size: ProductSize) -> Iterator[Record]:
    """Yield one record for each command. Independent runs run concurrently."""
    training = start(folder, "train", *run_words("train", *size.settings))
    straight = start(folder, "straight", *short_run("straight"))
    yield check_resume(folder, straight)
    yield check_training(folder, training, size)
    yield check_chat(folder)
    yield check_merge(folder)


def product_record(step: str, **values: Any) -> Record:
    return {"kind": "product", "step": step, **values}


def check_training(folder: Path, training: Started, size: ProductSize) -> Record:
    """Compare the held-out accuracy before and after `PRESET`."""
    code, seconds = training.wait()
    if code:
        return product_record("train", seconds=seconds, failed=f"exit code {code}: {training.log_tail()}")
    summary = json.loads((folder / "train" / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["heldout"]["base"], summary["heldout"]["grpo"]
    checks = {"held-out accuracy rises": after - before > size.min_rise}
    tokens = summary["last"]["tokens_per_second"]
    return product_record(
        "train", seconds=seconds, accuracy_before=before, accuracy_after=after, tokens_per_second=tokens, checks=checks
    )


def check_resume(folder: Path, straight: Started) -> Record:
    """Interrupt a run by SIGTERM, resume it, and compare its adapter with that of a run that was not interrupted,
    bit for bit."""
    interrupted = start(folder, "interrupted", *short_run("resumed"))
    while interrupted.process.poll() is None and steps_done(folder / "resumed") < INTERRUPT_AFTER:
        time.sleep(0.02)
    interrupted.process.send_signal(signal.SIGTERM)
    code, _ = interrupted.wait()
    if code != INTERRUPTED:
        return product_record("resume", failed=f"exit code {code} after SIGTERM: {interrupted.log_tail()}")
    at_step = steps_done(folder / "resumed")
    again = start(folder, "again", *short_run("resumed"))
    for name, command in (("the resumed run", again), ("the straight run", straight)):
        code, seconds = command.wait()
        if code:
            return product_record("resume", failed=f"{name}: exit code {code}: {command.log_tail()}")
    tensors, expected = (load_file(folder / name / ADAPTER) for name in ("resumed", "straight"))
    differences = [float((tensors[name] - expected[name]).abs().max()) for name in expected]
    equal = all(torch.equal(tensors[name], expected[name]) for name in expected)
    checks = {"the run was interrupted before its end": at_step < SHORT_STEPS, "resume is bit-exact": equal}
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
            if event.get("event") == "step_end":
                steps.append(int(event["step"]))
    return steps[-1]


def command(folder: Path, words: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(cli(*words), input=text, capture_output=True, text=True, env=environment(), cwd=folder)


def check_chat(folder: Path) -> Record:
    """Ask the trained model one question through a pipe."""
    started = time.perf_counter()
    done = command(folder, ["chat", "train"], QUESTION + "\n")
    seconds = time.perf_counter() - started
    if done.returncode:
        return product_record("chat", seconds=seconds, failed=f"exit code {done.returncode}: {done.stderr[-500:]}")
    answer = done.stdout.strip()
    return product_record("chat", seconds=seconds, answer=answer, checks={"chat answers": bool(answer)})


def check_merge(folder: Path) -> Record:
    """Merge the adapter into its base and compare the result with what was trained."""
    started = time.perf_counter()
    done = command(folder, ["merge", "train", "--out", "merged"])
    seconds = time.perf_counter() - started
    report = folder / "merged" / "merge.json"
    if not report.exists():
        return product_record("merge", seconds=seconds, failed=f"exit code {done.returncode}: {done.stderr[-500:]}")
    figures = json.loads(report.read_text(encoding="utf-8"))
    checks = {"the merged model is what was trained": done.returncode == 0}
    return product_record("merge", seconds=seconds, kl=figures["kl"], checks=checks)
