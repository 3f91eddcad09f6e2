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
from lowrank_tune.config.yaml import dotted, leaves
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError
from lowrank_tune.events import Evaluated, Event, RunEnded, RunStarted, StepEnd

STATE_FILE = "trackers.json"
SECRET_PATTERN = re.compile(
    r"\b(?:hf|sk|gh[opsu]|glpat|xox[bp])[_-][\w-]{10,}|(?<=//)[^/\s:@]+:[^/\s@]+(?=@)|(?<=[?&]token=)[^&\s]+", re.I
)
REDACTED = "***"
LoggedSteps = frozenset[tuple[str, int]]
"""Statistics, by name and step, that an earlier start of the run has sent."""


@dataclass(frozen=True)
class TrackerRun:
    """What a tracker is told of a run: the project that it belongs to, its name there, its folder, whether it goes on
    after a checkpoint (`resumed_from`), and the id under which an earlier start began it."""

    project: str
    name: str
    folder: Path
    resumed_from: int | None
    previous_id: str | None

    @property
    def is_continued(self) -> bool:
        return self.resumed_from is not None and self.previous_id is not None


def _tensorboard(trackers: Any, run: TrackerRun) -> tuple[Any, str]:
    """Files in the run's folder. A start from nothing forgets what one before it left there."""
    purge = 0 if run.resumed_from is None else run.resumed_from + 1
    return trackers.TensorBoardTracker("tensorboard", str(run.folder), purge_step=purge), "tensorboard"


def _wandb(trackers: Any, run: TrackerRun) -> tuple[Any, str]:
    if run.is_continued and run.previous_id:
        run_id = run.previous_id
    else:
        run_id = token_hex(8)
    import wandb  # heavy, and only where it is asked for

    quiet = wandb.Settings(console="off")  # else it keeps all that the dashboard draws
    return trackers.WandBTracker(
        run.project,
        name=run.name,
        id=run_id,
        resume="allow",
        dir=str(run.folder),
        settings=quiet,
    ), run_id


def _trackio(trackers: Any, run: TrackerRun) -> tuple[Any, str]:
    if run.is_continued and run.previous_id:
        name = run.previous_id
    else:
        name = f"{run.name}-{token_hex(2)}"
    return trackers.TrackioTracker(run.project, name=name, resume="allow"), name


def _mlflow(trackers: Any, run: TrackerRun) -> tuple[Any, str]:
    run_id = run.previous_id if run.is_continued else None
    return trackers.MLflowTracker(experiment_name=run.project, run_id=run_id, run_name=run.name), run_id or ""


TRACKER_FACTORIES: Mapping[str, Callable[[Any, TrackerRun], tuple[Any, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
"""A tracker that has not begun, and the id under which a later start finds its run again (MLflow's comes when it
begins)."""


def check_installed(names: Iterable[str]) -> None:
    """Raises Faults where a tracker is not installed, with what to install."""
    missing = [name for name in dict.fromkeys(names) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                ConfigProblem(f"{name} is not installed: pip install {name}, or leave it out", "train.report_to")
                for name in missing
            ]
        )


class Tracker:
    """One tracker as a sink."""

    def __init__(
        self,
        name: str,
        inner: Any,
        settings: Mapping[str, Any],
        fresh: bool,
        logged: LoggedSteps,
    ) -> None:
        self.name = name
        self._inner = inner
        self._settings = settings
        self._fresh = fresh
        self._logged = logged
        self._status = "failed"  # until the run says how it ended

    def __call__(self, event: Event) -> None:
        try:
            self._handle_event(event)
        except Exception as error:  # whatever a network or a disk does; the fan-out switches this sink off and says so
            raise RuntimeError(f"{self.name}: {redact(_first_line(error))}") from error

    def _handle_event(self, event: Event) -> None:
        if isinstance(event, RunStarted) and self._fresh:
            facts = {
                "algorithm": event.algorithm,
                "model": event.model,
                "device": event.device,
                "trained_parameters": event.trainable,
            }
            self._inner.store_init_configuration(
                {**self._settings, **{f"run.{name}": redact(value) for name, value in facts.items()}}
            )
            self._fresh = False
        elif isinstance(event, StepEnd):
            self._log(
                {f"train/{name}": value for name, value in {**event.stats, "seconds": event.seconds}.items()},
                event.step,
            )
        elif isinstance(event, Evaluated):
            self._log({grouped_metric_name(name): value for name, value in event.stats.items()}, event.step)

        elif isinstance(event, RunEnded):
            self._status = event.status

    def _log(self, values: Mapping[str, float], step: int) -> None:
        new_values = {
            name: float(value)
            for name, value in values.items()
            if math.isfinite(value) and (name, step) not in self._logged
        }
        if new_values:
            self._inner.log(new_values, step=step)

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
                f"{self.name} could not be closed: {redact(_first_line(error))}",
                RuntimeWarning,
                stacklevel=2,
            )


def grouped_metric_name(name: str) -> str:
    """Return a held-out metric under its group, as transformers' reporting does: `eval_loss` is `eval/loss`.

    `heldout/...` and `pairs/...` have their group already; a name without one belongs to `eval/`.
    """
    if name.startswith("eval_"):
        return "eval/" + name.removeprefix("eval_")
    return name if "/" in name else f"eval/{name}"


def last_logged_steps(events: Iterable[Event], up_to: int | None = None) -> LoggedSteps:
    """What a log says was measured, up to a step: read before a continued run cuts it."""
    logged: set[tuple[str, int]] = set()
    for event in events:
        if isinstance(event, (StepEnd, Evaluated)) and (up_to is None or event.step <= up_to):
            if isinstance(event, StepEnd):
                logged |= {(f"train/{name}", event.step) for name in (*event.stats, "seconds")}
            else:
                logged |= {(grouped_metric_name(name), event.step) for name in event.stats}
    return frozenset(logged)


def start_trackers(
    names: Sequence[str],
    project: str,
    name: str,
    folder: Path,
    recipe: Mapping[str, Any],
    resumed_from: int | None,
    earlier_events: Sequence[Event],
) -> list[Tracker]:
    """Starts the trackers of a run; `earlier_events` are the events of its earlier starts. Raises UserError where one
    cannot begin, after closing those that could."""
    if not names:
        return []
    from accelerate import PartialState, tracking  # seconds, and only where a tracker is asked for

    PartialState()  # accelerate's trackers want to know that there is one process
    state = _read_state(folder)
    started = list[Tracker]()
    try:
        for tracker_name in dict.fromkeys(names):
            previous_id = state.get(tracker_name)
            run = TrackerRun(project, name, folder, resumed_from, previous_id if isinstance(previous_id, str) else None)
            inner, state[tracker_name] = _start_tracker(tracker_name, tracking, run)
            if not run.is_continued:
                logged = frozenset[tuple[str, int]]()
            else:
                logged = last_logged_steps(earlier_events, resumed_from if tracker_name == "tensorboard" else None)
            started.append(Tracker(tracker_name, inner, flatten_settings(recipe), not run.is_continued, logged))
    except BaseException:
        for tracker in started:
            tracker.close()
        raise
    write_file(folder / STATE_FILE, json.dumps({"version": 1, "runs": state}, indent=2).encode())
    return started


def _start_tracker(name: str, tracking: Any, run: TrackerRun) -> tuple[Any, str]:
    try:
        inner, run_id = TRACKER_FACTORIES[name](tracking, run)
        inner.start()
        return inner, run_id or str(inner.tracker.info.run_id)
    except Exception as error:
        message = redact(_first_line(error))
        raise UserError(
            f"train.report_to: {name} cannot begin: {type(error).__name__}: {message}; mend that, or leave it out"
        ) from error


def flatten_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting under its dotted name, as trackers take them; secrets masked."""
    return {
        dotted(path): redact(value) if isinstance(value, (bool, int, float, str)) else redact(json.dumps(value))
        for path, value in leaves(dict(recipe))
    }


def redact(value: Any) -> Any:
    """A text without what looks like a token or a password in an address."""
    if isinstance(value, str):
        return SECRET_PATTERN.sub(REDACTED, value)
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        runs = json.loads((folder / STATE_FILE).read_bytes())["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return runs if isinstance(runs, dict) else {}
