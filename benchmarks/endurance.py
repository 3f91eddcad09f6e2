"""Thousands of steps with the dashboard on: does anything grow? Runs the bundled base in a pseudo-terminal of 120x40,
looks at the process from outside once a second, and at its steps and frames from inside.

    PYTHONPATH=. python benchmarks/endurance.py --out endurance           # 2,000 steps each of sft and grpo
    PYTHONPATH=. python benchmarks/endurance.py --steps 60 --warm-up 10   # a minute
    PYTHONPATH=. python benchmarks/endurance.py --out endurance --read    # the tables of a measurement again

The time of a step depends on its rows and on the machine, whose speed changes by several percent within minutes.
Therefore a fresh process resumes the run from its last checkpoint but one, directly after its end, and does its last
steps again, bit for bit: what an old process has grown by is the ratio of two times of the same step. The slope over
all steps is printed as well, and judged only in a run that is too short for this comparison. Besides, from the wall
time of a step the time is subtracted in which its thread could run, but other processes had the processors; and times
are divided by those of the same work beside them. Run it on an idle machine.

Exit code 0 where nothing grows: the interval of a slope contains 0 or the growth over the run is below its bound, and
the interval of a ratio contains 1 or the ratio is below its bound.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import shutil
import statistics
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slopes import Ratio, Slope, measure_ratio, measure_slope, ratio_table, table

WIDTH, HEIGHT = 120, 40
FULL_CURVES = 256
"""Points of a curve in a long run (`MAX_POINTS`). Some metrics are measured in logging steps only."""
LOGGING_STEPS = 5
COMMON = (
    f"train.logging_steps={LOGGING_STEPS}",
    "train.save_steps={often}",
    "evaluate.eval_steps={often}",
    "evaluate.num_prompts=8",
    "evaluate.num_samples=1",
    "evaluate.max_new_tokens=16",
    "train.learning_rate=1e-5",
)
OVERRIDES = {
    "sft": (
        "train.num_train_epochs=null",
        "train.max_steps={steps}",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
    ),
    "grpo": (
        "train.max_steps={steps}",
        "train.prompts_per_step=2",
        "train.micro_batch_size=8",
        "rollout.num_generations=4",
        "rollout.max_new_tokens=16",
        "rollout.max_num_seqs=8",
        "rewards=[{{name: answer}}, {{name: math_answer}}]",
    ),
}
"""The tiny presets with small steps. The learning rate is low so that completions keep their length: what is looked for
is growth of the kit, not of the answers."""


FRESH_WARM_UP = 10
"""Plain steps of the fresh process that are not compared."""
ENOUGH_PAIRS = 20
"""Steps with which a comparison begins to mean something; a short run has fewer after its last checkpoint but one."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", default=list(OVERRIDES))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=200, help="steps that no slope contains")
    parser.add_argument("--out", type=Path, help="folder for the runs and measurements; kept")
    parser.add_argument("--read", action="store_true", help="only print the tables of an earlier measurement")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        train(options.algorithms[0], options.steps, options.out)
        return 0
    if options.warm_up >= options.steps and not options.read:
        parser.error("--warm-up has to be less than --steps")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        flat = True
        for algorithm in options.algorithms:
            if not options.read:
                observe(algorithm, options.steps, folder / algorithm)
            ratios = against_fresh(folder / algorithm)
            slopes = slopes_of(folder / algorithm, options.warm_up, judges_steps=not ratios)
            print(f"\n{algorithm}: {summary(folder / algorithm)}\n\n{table(slopes)}\n", flush=True)
            if ratios:
                print(ratio_table(ratios), flush=True)
            flat = flat and all(each.is_flat for each in (*slopes, *ratios))
    return 0 if flat else 1


# Inside the process that trains.


def train(algorithm: str, steps: int, folder: Path) -> None:
    """Trains in this process's terminal, and writes the processor time of each step and frame."""
    from lowrank_tune.config import Recipe
    from lowrank_tune.runner import run

    watch_frames(folder / "frames.jsonl")
    watch = StepWatch(folder / "steps.jsonl")
    values = [each.format(steps=steps, often=max(10, steps // 20)) for each in (*COMMON, *OVERRIDES[algorithm])]
    recipe = Recipe.load(f"tiny-{algorithm}", *values)
    run(recipe, out=folder / "run", ui="tui", on_event=watch)


class StepWatch:
    """Writes wall and processor seconds of each plain step: one without a log line, directly after another step; and
    those of the same work after each step (`Reference`)."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.reference = Reference()
        self.plain = False
        self.cpu = 0.0
        self.waited = 0.0

    def __call__(self, event: Any) -> None:
        kind = event.kind
        if kind not in ("step_end", "group_logged"):
            self.plain = False
        if kind != "step_end":
            return
        now = time.thread_time()
        waited = seconds_without_processor()
        row = {
            "step": event.step,
            "time": event.time,
            "wall": event.seconds,
            "alone": event.seconds - (waited - self.waited),
            "cpu": now - self.cpu,
            "reference": self.reference.seconds(),
            "plain": self.plain and not event.logged,
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.plain = True
        self.cpu = time.thread_time()
        self.waited = seconds_without_processor()


class Reference:
    """The same work whenever it is called: a few products of matrices, forward and backward, and a loop in Python.

    Other processes share caches and the power of a core with this one, so that the processor time of everything rises
    with their number. Work that stays the same shows by how much.
    """

    def __init__(self) -> None:
        import torch

        numbers = torch.Generator().manual_seed(0)
        self.rows = torch.randn(256, 256, generator=numbers)
        self.weight = torch.randn(256, 1024, generator=numbers).requires_grad_()

    def seconds(self) -> float:
        started = time.thread_time()
        for _ in range(2):
            (self.rows @ self.weight).tanh().square().mean().backward()
        self.weight.grad = None
        sum(number % 7 for number in range(20_000))
        return time.thread_time() - started


def seconds_without_processor() -> float:
    """Returns how long this thread could have run so far, but other processes had the processors."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def watch_frames(path: Path) -> None:
    """Writes the processor time of each frame of the dashboard, which its screen measures for itself, and that of the
    same frame of a recorded run, drawn directly after it."""
    from dashboard_render import RECORDED

    from lowrank_tune.ui.state import State
    from lowrank_tune.ui.terminal.live_screen import LiveScreen
    from lowrank_tune.ui.terminal.panes import View
    from lowrank_tune.ui.terminal.render import render
    from lowrank_tune.ui.terminal.text_layout import to_ansi
    from lowrank_tune.ui.watch import read_events

    recorded = State()
    for event in read_events(RECORDED):
        recorded.apply(event)
    file = path.open("w", encoding="utf-8")
    draw_frame = LiveScreen._draw_frame

    def draw_and_write(screen: LiveScreen, width: int, height: int) -> None:
        draw_frame(screen, width, height)
        started = time.thread_time()
        "".join(to_ansi(line, True) for line in render(recorded, View(), width, height))
        row = {
            "time": time.time(),
            "cpu": screen.cost,
            "reference": time.thread_time() - started,
            "size": [width, height],
        }
        file.write(json.dumps(row) + "\n")
        file.flush()

    LiveScreen._draw_frame = draw_and_write  # type: ignore[method-assign]


# Outside of it.


def observe(algorithm: str, steps: int, folder: Path) -> None:
    """Runs the training and writes once a second what the kernel counts for its process. Then a fresh process does the
    last steps again."""
    child = start(algorithm, steps, folder)
    with (folder / "process.jsonl").open("w", encoding="utf-8") as file:
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            sample = sample_process(child)
            if sample:
                file.write(json.dumps(sample) + "\n")
                file.flush()
            time.sleep(1)
    check_status(algorithm, ended[1], folder)
    fresh = folder / "fresh"
    rewind(folder / "run", fresh / "run")
    check_status(algorithm, os.waitpid(start(algorithm, steps, fresh), 0)[1], fresh)


def check_status(algorithm: str, status: int, folder: Path) -> None:
    """Raises SystemExit if a training failed."""
    if status:
        raise SystemExit(f"the {algorithm} run ended with status {status}; its screen: {folder / 'screen.txt'}")


def rewind(run: Path, target: Path) -> None:
    """Copies a finished run as it was at its last checkpoint but one."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns(".lock", "final", "summary.json", "report.html"))
    last = max((target / "checkpoints").iterdir(), key=step_of)
    shutil.rmtree(last)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def start(algorithm: str, steps: int, folder: Path) -> int:
    """Starts the training in a pseudo-terminal of its own; returns its process."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, algorithm, "--child", "--steps", str(steps), "--out", str(folder)]
    environ = {**os.environ, "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child, master = pty.fork()
    if child == 0:
        os.execve(words[0], words, environ)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    threading.Thread(target=drain, args=(master, folder / "screen.txt"), daemon=True).start()
    return child


def drain(master: int, path: Path) -> None:
    """Reads what is drawn, as a terminal does, until its process ends, and keeps the last 100 KB."""
    kept = b""
    try:
        while data := os.read(master, 65536):
            kept = (kept + data)[-100_000:]
    except OSError:
        pass
    os.close(master)
    path.write_bytes(kept)


def sample_process(process: int) -> dict[str, float]:
    """Returns memory, descriptors, threads, children and processor seconds of a process; empty if it has ended."""
    proc = Path("/proc") / str(process)
    try:
        children = [child for task in (proc / "task").iterdir() for child in (task / "children").read_text().split()]
        counters = (proc / "stat").read_text().rpartition(")")[2].split()
        return {
            "time": time.time(),
            "rss_mib": resident_mib(proc),
            "children_mib": sum(resident_mib(Path("/proc") / child) for child in children),
            "descriptors": len(list((proc / "fd").iterdir())),
            "threads": len(list((proc / "task").iterdir())),
            "children": len(children),
            "cpu": (int(counters[11]) + int(counters[12])) / os.sysconf("SC_CLK_TCK"),
        }
    except OSError:
        return {}


def resident_mib(proc: Path) -> float:
    """Returns the resident memory of a process, from its folder in /proc."""
    return int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# The figures.


def rows(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def slopes_of(folder: Path, warm_up: int, judges_steps: bool) -> list[Slope]:
    """Returns the slopes of everything that was measured, after the first `warm_up` steps; those of frames since all
    curves have as many points as they ever have."""
    steps = [row for row in rows(folder / "steps.jsonl") if row["step"] > warm_up]
    plain = [row for row in steps if row["plain"]]
    seen = list(with_steps(rows(folder / "process.jsonl"), steps))
    full = [row for row in steps if row["step"] > LOGGING_STEPS * FULL_CURVES]
    frames = list(with_steps(rows(folder / "frames.jsonl"), full or steps))
    level = statistics.median(row["reference"] for row in plain)
    frame_level = statistics.median(row["reference"] for row in frames)
    step_bound = 0.02 if judges_steps else None
    series = [
        ("resident memory", "MiB", seen, 0.01, [row["rss_mib"] for row in seen]),
        ("memory of child processes", "MiB", seen, 0.01, [row["children_mib"] for row in seen]),
        ("open file descriptors", "count", seen, 0.01, [row["descriptors"] for row in seen]),
        ("threads", "count", seen, 0.01, [row["threads"] for row in seen]),
        ("child processes", "count", seen, 0.01, [row["children"] for row in seen]),
        ("step, processor time", "ms", plain, step_bound, relative(plain, "cpu", level)),
        ("step, wall time", "ms", plain, step_bound, relative(plain, "alone", level)),
        ("redraw, processor time", "ms", frames, 0.02, relative(frames, "cpu", frame_level)),
    ]
    return [
        measure_slope(name, unit, [row["step"] for row in data], values, bound)
        for name, unit, data, bound, values in series
    ]


def against_fresh(folder: Path) -> list[Ratio]:
    """Returns the times of the run's last steps divided by those of the same steps in a fresh process; none for a short
    run."""
    old = {row["step"]: row for row in rows(folder / "steps.jsonl") if row["plain"]}
    new = [row for row in rows(folder / "fresh" / "steps.jsonl") if row["plain"]][FRESH_WARM_UP:]
    pairs = [(old[row["step"]], row) for row in new if row["step"] in old]
    if len(pairs) < ENOUGH_PAIRS:
        return []
    return [
        measure_ratio(name, [ratio_of(*pair, key) for pair in pairs], 0.02)
        for name, key in (("step, processor time", "cpu"), ("step, wall time", "alone"))
    ]


def ratio_of(old: dict[str, Any], new: dict[str, Any], key: str) -> float:
    """Returns the ratio of two times, each divided by that of the reference beside it."""
    return float(old[key] / old["reference"] / (new[key] / new["reference"]))


def relative(data: list[dict[str, Any]], key: str, level: float) -> list[float]:
    """Returns times in milliseconds, each divided by that of the reference beside it; `level`: the usual one."""
    return [1000 * level * row[key] / row["reference"] for row in data]


def with_steps(samples: Iterator[dict[str, Any]], steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the samples that were taken between the first and the last of these steps, each with its step."""
    place = 0
    for sample in samples:
        while place + 1 < len(steps) and steps[place + 1]["time"] <= sample["time"]:
            place += 1
        if steps[0]["time"] <= sample["time"] <= steps[-1]["time"]:
            yield {**sample, "step": steps[place]["step"]}


def summary(folder: Path) -> str:
    """Returns how long the run was, and its first and last figures."""
    steps = list(rows(folder / "steps.jsonl"))
    seen = list(rows(folder / "process.jsonl"))
    frames = list(rows(folder / "frames.jsonl"))
    size = "x".join(map(str, frames[-1]["size"]))
    wall = statistics.median(row["wall"] for row in steps)
    return (
        f"{len(steps)} steps in {seen[-1]['time'] - seen[0]['time']:.0f} s of wall time and {seen[-1]['cpu']:.0f} s of "
        f"processor time (a step {1000 * wall:.0f} ms of wall time in the median); "
        f"{len(frames)} frames of {size}; {len(seen)} samples of the process; its peak "
        f"{max(row['rss_mib'] for row in seen):.0f} MiB"
    )


if __name__ == "__main__":
    raise SystemExit(main())
