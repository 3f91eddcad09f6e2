"""Draw the pictures of the dashboard in `docs/images` from a real terminal: `watch` of recorded runs in tmux.

    PYTHONPATH=. python scripts/dashboard_screenshots.py

Needs tmux. A run is shown as it was after one of its steps, so that it looks like one that runs.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lowrank_tune.ui.terminal.screenshot import screenshot_of_terminal

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SINGLE = {(80, 24): ("demo", 86), (120, 40): ("demo", 86), (200, 50): ("grpo", 22)}
"""Recorded run and step of each size."""
SEVERAL = (("demo", 86), ("dpo", 50), ("grpo", 22))
SEVERAL_SIZE = (120, 40)
WAIT_SECONDS = 60.0


class Tmux:
    """A terminal of its own."""

    def __init__(self) -> None:
        self._words = ["tmux", "-L", f"screenshots{os.getpid()}", "-f", os.devnull, "-u"]

    def __call__(self, *words: str) -> str:
        return subprocess.run([*self._words, *words], capture_output=True, text=True, check=True).stdout

    def captured(self, folders: Sequence[Path], width: int, height: int) -> str:
        """Returns what `watch` of these runs shows, with the escape codes of its colors."""
        command = shlex.join([sys.executable, "-m", "lowrank_tune", "watch", *map(str, folders)])
        environ = ["-e", f"PYTHONPATH={ROOT}", "-e", "LC_ALL=C.UTF-8"]
        size = ["-x", str(width), "-y", str(height)]
        self("new-session", "-d", "-s", "screen", *size, *environ, command)
        end = time.monotonic() + WAIT_SECONDS
        try:
            while "help" not in self("capture-pane", "-p", "-t", "screen"):
                if time.monotonic() > end:
                    raise SystemExit("the dashboard did not appear")
                time.sleep(0.3)
            return self("capture-pane", "-e", "-p", "-t", "screen")
        finally:
            self("kill-session", "-t", "screen")


def write_until(folder: Path, name: str, step: int) -> Path:
    """Writes the events of a recorded run up to a step, with times that end now, as those of a run that runs."""
    lines = (ROOT / "tests" / "recorded" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    kept = list[dict[str, object]]()
    for line in lines:
        event = json.loads(line)
        if event["event"] == "step_end" and event["step"] > step:
            break
        kept.append(event)
    shift = time.time() - float(str(kept[-1]["time"]))
    shifted = [{**event, "time": float(str(event["time"])) + shift} for event in kept]
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in shifted), encoding="utf-8")
    return folder


def draw(name: str, runs: Sequence[tuple[str, int]], width: int, height: int) -> None:
    """Writes the picture of one run or of several."""
    with tempfile.TemporaryDirectory() as root:
        folders = []
        for number, (run, step) in enumerate(runs):
            folder = Path(root) / str(number)
            folder.mkdir()
            folders.append(write_until(folder, run, step))
        captured = Tmux().captured(folders, width, height)
    svg = screenshot_of_terminal(captured, width, height)
    (IMAGES / f"dashboard-{name}.svg").write_text(svg, encoding="utf-8")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for (width, height), run in SINGLE.items():
        draw(f"{width}x{height}", [run], width, height)
    draw("several-runs", SEVERAL, *SEVERAL_SIZE)


if __name__ == "__main__":
    main()
