"""What the dashboard costs: time of a frame at three sizes, of an event, and of a run with and without it.

    PYTHONPATH=. python benchmarks/dashboard_render.py             # with whole demo runs in a pseudo-terminal: about
                                                                   # three minutes on 2 cores
    PYTHONPATH=. python benchmarks/dashboard_render.py --quick     # frames and events only: seconds

Exit code 0 where an event costs under 1 ms (median).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pty
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from lowrank_tune.events import StepEnd
from lowrank_tune.training.signals import TrainerControl
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import to_ansi
from lowrank_tune.ui.terminal.tui import Tui
from lowrank_tune.ui.watch import read_events

RECORDED = Path(__file__).parent.parent / "tests" / "recorded" / "demo.jsonl"
GROWING = (200, 300, 500, 1000, 1500, 2000)
SIZES = ((80, 24), (120, 40), (200, 60))
RUN = """
import sys, time
from lowrank_tune.config import Recipe
from lowrank_tune.runner import run
short = ("name=bench", "evaluate.num_prompts=8", "evaluate.num_samples=1", f"train.num_train_epochs={sys.argv[3]}")
recipe = Recipe.load("tiny-sft", *short)
run(recipe, out=sys.argv[1], ui=sys.argv[2])
"""


def long_state(steps: int) -> State:
    """The recorded run, its steps repeated to so many."""
    state = State()
    events = list(read_events(RECORDED))
    for event in events:
        state.apply(event)
    one = next(event for event in events if isinstance(event, StepEnd))
    for step in range(len(events), steps):
        state.apply(
            StepEnd(
                step=step, steps=steps, stats=one.stats, seconds=one.seconds, tokens=one.tokens, time=one.time + step
            )
        )
    return state


def frame_ms(state: State, width: int, height: int, repeats: int) -> float:
    """Median processor time of a whole frame with its escape codes."""
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        "".join(to_ansi(line, True) for line in render(state, View(), width, height))
        times.append(1000 * (time.thread_time() - started))
    return statistics.median(times)


def print_growing_frames(folder: Path, repeats: int = 60) -> None:
    """Prints the time of a frame of 120x40 after so many steps of a run; the states take turns."""
    states, state = {}, State()
    for event in read_events(folder / "events.jsonl"):
        state.apply(event)
        if isinstance(event, StepEnd) and event.step in GROWING:
            states[event.step] = copy.deepcopy(state)
    times: dict[int, list[float]] = {step: [] for step in states}
    for _ in range(repeats):
        for step, each in states.items():
            times[step].append(frame_ms(each, 120, 40, 1))
    for step, values in times.items():
        print(f"frame 120x40 after {step} steps: {statistics.median(values):.2f} ms")


def drained(master: int) -> None:
    """Reads what is drawn, as a terminal does."""

    def read() -> None:
        try:
            while os.read(master, 65536):
                pass
        except OSError:
            pass

    threading.Thread(target=read, daemon=True).start()


def emit_seconds(events: int) -> tuple[float, float]:
    """Median and worst time of handing an event to a living dashboard; run in a process whose terminal is a
    pseudo-terminal."""
    one = next(event for event in read_events(RECORDED) if isinstance(event, StepEnd))
    times = []
    with tempfile.TemporaryDirectory() as folder:
        screen = Tui(TrainerControl(), Path(folder) / "console.log")
        for _ in range(events):
            started = time.perf_counter()
            screen(one)
            times.append(time.perf_counter() - started)
            time.sleep(0.0005)
        screen.close()
    return statistics.median(times), max(times)


def in_terminal(words: list[str], environ: dict[str, str]) -> None:
    """Runs a program as the leader of its own pseudo-terminal."""
    child, master = pty.fork()
    if child == 0:
        os.execve(words[0], words, environ)
    drained(master)
    _, status = os.waitpid(child, 0)
    os.close(master)
    if status:
        raise SystemExit(f"{words[1:3]} ended with {status}")


def steps_ms(folder: Path) -> float:
    """Median time of the steps of a run."""
    steps = [event.seconds for event in read_events(folder / "events.jsonl") if isinstance(event, StepEnd)]
    return 1000 * statistics.median(steps)


def overhead(repeats: int, epochs: int) -> dict[str, float]:
    """Milliseconds a step of demo runs with and without the screen, which take turns."""
    environ, found = {**os.environ, "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}, {"none": [], "tui": []}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for screen in found if turn % 2 else reversed(found):
                out = Path(folder) / f"{screen}{turn}"
                in_terminal([sys.executable, "-c", RUN, str(out), screen, str(epochs)], environ)
                found[screen].append(steps_ms(out))
    return {screen: statistics.median(times) for screen, times in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="no whole runs")
    parser.add_argument("--run", type=Path, help="only frames after more and more steps of the run in this folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--emit", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run is not None:
        print_growing_frames(options.run)
        return 0
    if options.emit is not None:
        options.emit.write_text(json.dumps(emit_seconds(2000)))
        return 0
    for steps in (226, 20_000):
        state = long_state(steps)
        for width, height in SIZES:
            print(f"frame {width}x{height}, {steps} events: {frame_ms(state, width, height, 20):.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        results_file = Path(folder) / "emit.json"
        in_terminal([sys.executable, __file__, "--emit", str(results_file)], {**os.environ, "TERM": "xterm-256color"})
        median, worst = json.loads(results_file.read_text())
    print(f"an event: median {1e6 * median:.1f} us, worst of 2000 {1e3 * worst:.2f} ms")
    if not options.quick:
        found = overhead(options.repeats, options.epochs)
        print(
            f"a step: {found['none']:.1f} ms without a screen, {found['tui']:.1f} ms with it "
            f"({found['tui'] / found['none'] - 1:+.1%})"
        )
    return 0 if median < 1e-3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
