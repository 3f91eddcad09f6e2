"""Experiment trackers as sinks: TensorBoard, Weights & Biases, Trackio and MLflow, through accelerate's classes for
them.

Each is a sink of its own, so that one that breaks takes no other down: it is switched off, a warning says so, and the
run goes on. What is missing or cannot begin is told before training. A continued run goes on in the same tracker run,
and no step stands there twice: TensorBoard is told to forget what came after the checkpoint, and the others are not
sent again what they were sent. Only numbers and the recipe's settings are sent, never texts of rows, prompts or
completions; what looks like a secret in a setting is masked.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from lowrank_tune.checkpoint import write_file
from lowrank_tune.errors import Fault, Faults, UserError
from lowrank_tune.events import Event, RunEnded, RunStarted, StepDone, Validated
from lowrank_tune.recipe.tree import dotted, leaves

STATE = "trackers.json"
PARTS = {"validation_": "validation/", "heldout_": "heldout/", "pairs_": "pairs/"}
SECRET = re.compile(
    r"\b(?:hf|sk|gh[opsu]|glpat|xox[bp])[_-][\w-]{10,}|(?<=//)[^/\s:@]+:[^/\s@]+(?=@)|(?<=[?&]token=)[^&\s]+", re.I
)
MASK = "***"
Told = frozenset[tuple[str, int]]
"""Statistics, by name and step, that an earlier start of the run has sent."""


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run: the project that it belongs to, its name there, its folder, whether it goes on
    after a checkpoint (`resumed_from`), and the id under which an earlier start began it."""

    project: str
    name: str
    folder: Path
    resumed_from: int | None
    known: str | None

    @property
    def continued(self) -> bool:
        return self.resumed_from is not None and self.known is not None


def _tensorboard(trackers: Any, run: Run) -> tuple[Any, str]:
    """Files in the run's folder. A start from nothing forgets what one before it left there."""
    purge = 0 if run.resumed_from is None else run.resumed_from + 1
    return trackers.TensorBoardTracker("tensorboard", str(run.folder), purge_step=purge), "tensorboard"


def _wandb(trackers: Any, run: Run) -> tuple[Any, str]:
    number = run.known if run.continued and run.known else token_hex(8)
    import wandb  # heavy, and only where it is asked for

    quiet = wandb.Settings(console="off")  # else it keeps all that the dashboard draws
    return trackers.WandBTracker(
        run.project, name=run.name, id=number, resume="allow", dir=str(run.folder), settings=quiet
    ), number


def _trackio(trackers: Any, run: Run) -> tuple[Any, str]:
    name = run.known if run.continued and run.known else f"{run.name}-{token_hex(2)}"
    return trackers.TrackioTracker(run.project, name=name, resume="allow"), name


def _mlflow(trackers: Any, run: Run) -> tuple[Any, str]:
    known = run.known if run.continued else None
    return trackers.MLflowTracker(experiment_name=run.project, run_id=known, run_name=run.name), known or ""


MAKERS: Mapping[str, Callable[[Any, Run], tuple[Any, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
"""A tracker that has not begun, and the id under which a later start finds its run again (MLflow's comes when it
begins)."""


def check(names: Iterable[str]) -> None:
    """Raises Faults where a tracker is not installed, with what to install."""
    missing = [name for name in dict.fromkeys(names) if importlib.util.find_spec(name) is None]
    if missing:
        raise Faults(
            [
                Fault(f"{name} is not installed: pip install {name}, or leave it out", "train.report_to")
                for name in missing
            ]
        )


class Tracker:
    """One tracker as a sink."""

    def __init__(self, name: str, inner: Any, settings: Mapping[str, Any], fresh: bool, told: Told) -> None:
        self.name, self._inner, self._settings, self._fresh, self._told = name, inner, settings, fresh, told
        self._status = "failed"  # until the run says how it ended

    def __call__(self, event: Event) -> None:
        try:
            self._take(event)
        except Exception as error:  # whatever a network or a disk does; the fan-out switches this sink off and says so
            raise RuntimeError(f"{self.name}: {masked(_first_line(error))}") from error

    def _take(self, event: Event) -> None:
        if isinstance(event, RunStarted) and self._fresh:
            facts = {
                "algorithm": event.algorithm,
                "model": event.model,
                "device": event.device,
                "trained_parameters": event.trainable,
            }
            self._inner.store_init_configuration(
                {**self._settings, **{f"run.{name}": masked(value) for name, value in facts.items()}}
            )
            self._fresh = False
        elif isinstance(event, StepDone):
            self._log(
                {f"train/{name}": value for name, value in {**event.stats, "seconds": event.seconds}.items()},
                event.step,
            )
        elif isinstance(event, Validated):
            self._log({named(name): value for name, value in event.stats.items()}, event.step)

        elif isinstance(event, RunEnded):
            self._status = event.status

    def _log(self, values: Mapping[str, float], step: int) -> None:
        kept = {
            name: float(value)
            for name, value in values.items()
            if math.isfinite(value) and (name, step) not in self._told
        }
        if kept:
            self._inner.log(kept, step=step)

    def close(self) -> None:
        """Ends the tracker's run as this one ended. The run is over: that a network is gone now is told, and breaks
        nothing."""
        try:
            if self.name == "wandb" and self._status != "done":
                self._inner.tracker.finish(exit_code=1)
            elif self.name == "mlflow" and self._status != "done":
                import mlflow  # heavy, and only where it is asked for

                mlflow.end_run("FAILED" if self._status == "failed" else "KILLED")
            else:
                self._inner.finish()
        except Exception as error:
            warnings.warn(
                f"{self.name} could not be closed: {masked(_first_line(error))}", RuntimeWarning, stacklevel=2
            )


def named(name: str) -> str:
    """A held-out statistic under the part of the charts that it belongs to."""
    for prefix, part in PARTS.items():
        if name.startswith(prefix):
            return part + name.removeprefix(prefix)
    return f"validation/{name}"


def told_in(events: Iterable[Event], up_to: int | None = None) -> Told:
    """What a log says was measured, up to a step: read before a continued run cuts it."""
    found: set[tuple[str, int]] = set()
    for event in events:
        if isinstance(event, (StepDone, Validated)) and (up_to is None or event.step <= up_to):
            if isinstance(event, StepDone):
                found |= {(f"train/{name}", event.step) for name in (*event.stats, "seconds")}
            else:
                found |= {(named(name), event.step) for name in event.stats}
    return frozenset(found)


def begin(
    names: Sequence[str],
    project: str,
    name: str,
    folder: Path,
    recipe: Mapping[str, Any],
    resumed_from: int | None,
    before: Sequence[Event],
) -> list[Tracker]:
    """Starts the trackers of a run; `before` are the events of its earlier starts. Raises UserError where one cannot
    begin, after closing those that could."""
    if not names:
        return []
    from accelerate import PartialState, tracking  # seconds, and only where a tracker is asked for

    PartialState()  # accelerate's trackers want to know that there is one process
    state, begun = _read(folder), list[Tracker]()
    try:
        for each in dict.fromkeys(names):
            known = state.get(each)
            run = Run(project, name, folder, resumed_from, known if isinstance(known, str) else None)
            inner, state[each] = _started(each, tracking, run)
            told = (
                frozenset[tuple[str, int]]()
                if not run.continued
                else told_in(before, resumed_from if each == "tensorboard" else None)
            )
            begun.append(Tracker(each, inner, flat(recipe), not run.continued, told))
    except BaseException:
        for tracker in begun:
            tracker.close()
        raise
    write_file(folder / STATE, json.dumps({"version": 1, "runs": state}, indent=2).encode())
    return begun


def _started(name: str, tracking: Any, run: Run) -> tuple[Any, str]:
    try:
        inner, number = MAKERS[name](tracking, run)
        inner.start()
        return inner, number or str(inner.tracker.info.run_id)
    except Exception as error:
        told = masked(_first_line(error))
        raise UserError(
            f"train.report_to: {name} cannot begin: {type(error).__name__}: {told}; mend that, or leave it out"
        ) from error


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting under its dotted name, as trackers take them; secrets masked."""
    return {
        dotted(path): masked(value) if isinstance(value, (bool, int, float, str)) else masked(json.dumps(value))
        for path, value in leaves(dict(recipe))
    }


def masked(value: Any) -> Any:
    """A text without what looks like a token or a password in an address."""
    return SECRET.sub(MASK, value) if isinstance(value, str) else value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / STATE).read_bytes())["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
