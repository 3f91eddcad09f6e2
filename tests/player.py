"""A run without a model, for tests of live screens: `player.py FOLDER [SECONDS]` plays the recorded events to the dashboard at that pace.

It obeys the control as the loop does, and leaves what it was asked in `FOLDER/asked.json`, which a sane end completes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from lowrank_tune.control import Control, asked_by_signals
from lowrank_tune.events import Note, RunEnded, StepDone
from lowrank_tune.ui.tui import Tui
from lowrank_tune.ui.watch import events_in

RECORDED = Path(__file__).parent / "recorded" / "demo.jsonl"


def main(folder: Path, pace: float) -> None:
    control, met = Control(), []
    with asked_by_signals(control) as looping:
        screen = Tui(control, folder / "console.log")
        try:
            looping(True)
            for event in events_in(RECORDED):
                if isinstance(event, RunEnded):
                    break
                screen(replace(event, time=time.time()))
                if isinstance(event, StepDone):
                    time.sleep(pace)
                    if event.step == 5:
                        print("a library prints")
                        os.write(2, b"C code writes\n")
                while control.pause and not control.stop:
                    time.sleep(0.02)
                for wish in ("save", "evaluate"):
                    if getattr(control, wish):
                        setattr(control, wish, False)
                        met.append(wish)
                        screen(Note(message=f"met the wish to {wish}", level="warning"))
                if control.stop:
                    met.append("stop")
                    break
            if "--break" in sys.argv:
                raise RuntimeError("the run broke")
        finally:
            screen(RunEnded(status="interrupted" if control.stop else "done", step=1, seconds=1.0))
            screen.close()
            (folder / "asked.json").write_text(json.dumps(met))
    print("THE END")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
