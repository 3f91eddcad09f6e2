"""A run without a model, for tests of live screens: `event_player.py FOLDER SECONDS [--chain] [--break]`.

Sends the recorded events to the dashboard, with so many seconds between two steps. With `--chain`, the recorded run is
the first of two stages and the recorded DPO run the second; with `--break`, the run raises an exception at its end.
Requests of the control have the effect that they have in the training loop. At the end, `FOLDER/handled.json` contains
the requests in their order.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lowrank_tune.events import Event, LogMessage, RunEnded, RunStarted, StepEnd
from lowrank_tune.training.signals import TrainerControl, handle_signals
from lowrank_tune.ui.terminal.tui import Tui
from lowrank_tune.ui.watch import read_events

RECORDED = Path(__file__).parent / "recorded"


def recorded_events(is_chain: bool) -> Iterator[Event]:
    """Yields the events of the run, or of both stages."""
    for event in read_events(RECORDED / "demo.jsonl"):
        yield replace(event, stage=1, stages=2) if is_chain and isinstance(event, RunStarted) else event
    if is_chain:
        yield from read_events(RECORDED / "dpo.jsonl")


def main(folder: Path, pace: float) -> None:
    control = TrainerControl()
    handled = list[str]()
    with handle_signals(control) as looping:
        screen = Tui(control, folder / "console.log")
        try:
            looping(True)
            stage = 1
            for event in recorded_events("--chain" in sys.argv):
                stage = event.stage if isinstance(event, RunStarted) else stage
                if isinstance(event, RunEnded) and (stage == 2 or "--chain" not in sys.argv):
                    break
                screen(replace(event, time=time.time()))
                if isinstance(event, StepEnd):
                    time.sleep(pace)
                    if event.step == 5:
                        print("a library prints")
                        os.write(2, b"C code writes\n")
                while control.pause and not control.stop:
                    time.sleep(0.02)
                for request in ("save", "evaluate"):
                    if getattr(control, request):
                        setattr(control, request, False)
                        handled.append(request)
                        screen(LogMessage(message=f"met the request to {request}", level="warning"))
                if control.stop:
                    handled.append("stop")
                    break
            if "--break" in sys.argv:
                raise RuntimeError("the run broke")
        finally:
            screen(RunEnded(status="interrupted" if control.stop else "done", step=1, seconds=1.0))
            screen.close()
            (folder / "handled.json").write_text(json.dumps(handled))
    print("THE END")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
