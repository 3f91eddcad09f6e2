"""Experiment trackers as sinks: TensorBoard, Weights & Biases, Trackio and MLflow, through accelerate's classes for
them.

Each tracker is a sink: one that fails is switched off with a warning, and the run continues. A tracker that is not
installed or cannot start is an error before training. A resumed run continues the same tracker run without duplicate
steps: TensorBoard purges what follows the checkpoint, and the other trackers do not get again what was sent
(`tracker_history.py`). Only numbers and the recipe's settings are sent, never text of rows, prompts or completions;
text that looks like a secret is redacted.
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
from lowrank_tune.json_files import read_json
from lowrank_tune.training.tracker_history import SentBefore, grouped_metric_name, sent_before

STATE_FILE = "trackers.json"
SECRET_PATTERN = re.compile(
    r"\b(?:hf|sk|gh[opsu]|glpat|xox[bp])[_-][\w-]{10,}|(?<=//)[^/\s:@]+:[^/\s@]+(?=@)|(?<=[?&]token=)[^&\s]+", re.I
)
REDACTED = "***"
SETTINGS_EACH_SESSION = ("wandb", "trackio")
"""Trackers that get the settings again when a run continues: trackio replaces those of the earlier session by none, and
a killed wandb may not have stored them. MLflow refuses settings that have changed."""


@dataclass(frozen=True)
class TrackerRun:
    """Identity of a run for a tracker.

    `resumed_from` is the step of the checkpoint that the run continues, `previous_id` the tracker's id of the run in an
    earlier session.
    """

    project: str
    name: str
    folder: Path
    resumed_from: int | None
    previous_id: str | None

    @property
    def continued_id(self) -> str | None:
        """The tracker's id of the run that this session continues, None for a new one."""
        return None if self.resumed_from is None else self.previous_id


def _tensorboard(trackers: Any, run: TrackerRun) -> tuple[Any, str]:
    """Writes files in the run folder. A run that starts again from step 0 purges the earlier files."""
    purge = 0 if run.resumed_from is None else run.resumed_from + 1
    return trackers.TensorBoardTracker(
        "tensorboard",
        str(run.folder),
        purge_step=purge,
    ), "tensorboard"


def _wandb(trackers: Any, run: TrackerRun) -> tuple[Any, str]:
    run_id = run.continued_id or token_hex(8)
    # optional and slow to import
    import wandb

    # without this wandb stores everything that the dashboard draws
    quiet = wandb.Settings(console="off")
    return trackers.WandBTracker(
        run.project,
        name=run.name,
        id=run_id,
        resume="allow",
        dir=str(run.folder),
        settings=quiet,
    ), run_id


def _trackio(trackers: Any, run: TrackerRun) -> tuple[Any, str]:
    name = run.continued_id or f"{run.name}-{token_hex(2)}"
    return trackers.TrackioTracker(
        run.project,
        name=name,
        resume="allow",
    ), name


def _mlflow(trackers: Any, run: TrackerRun) -> tuple[Any, str]:
    run_id = run.continued_id
    return trackers.MLflowTracker(
        experiment_name=run.project,
        run_id=run_id,
        run_name=run.name,
    ), run_id or ""


TRACKER_FACTORIES: Mapping[str, Callable[[Any, TrackerRun], tuple[Any, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
"""Functions that return a tracker that is not started, and its id of the run (MLflow sets the id at the start)."""


def check_installed(names: Iterable[str]) -> None:
    """Raises ConfigError if a tracker is not installed, with what to install."""
    problems: list[ConfigProblem] = []
    for name in dict.fromkeys(names):
        if importlib.util.find_spec(name) is None:
            message = f"{name} is not installed: pip install {name}, or leave it out"
            problems.append(ConfigProblem(message, "train.report_to"))
    if problems:
        raise ConfigError(problems)


@dataclass(eq=False)
class Tracker:
    """One tracker as a sink."""

    name: str
    _inner: Any
    _settings: Mapping[str, Any]
    _sends_settings: bool
    _before: SentBefore
    _status: str = "failed"
    """Until `RunEnded` sets it."""

    def __call__(self, event: Event) -> None:
        try:
            self._handle_event(event)
        # any error of a network or a disk: the event bus switches this sink off with a warning
        except Exception as error:
            raise RuntimeError(f"{self.name}: {redact(_first_line(error))}") from error

    def _handle_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, StepEnd):
            stats = {**event.stats, "seconds": event.seconds}
            self._log({f"train/{name}": value for name, value in stats.items()}, event.step)
        elif isinstance(event, Evaluated):
            self._log({grouped_metric_name(name): value for name, value in event.stats.items()}, event.step)
        elif isinstance(event, RunEnded):
            self._status = event.status

    def _start(self, event: RunStarted) -> None:
        """Sends the settings if they are due, then what a killed session may have lost."""
        if self._sends_settings:
            facts = {
                "algorithm": event.algorithm,
                "model": event.model,
                "device": event.device,
                "trained_parameters": event.trainable,
            }
            run_facts = {f"run.{name}": redact(value) for name, value in facts.items()}
            self._inner.store_init_configuration({**self._settings, **run_facts})
            self._sends_settings = False
        for lost in self._before.lost:
            self._handle_event(lost)
        self._before = SentBefore(self._before.logged)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        new_values: dict[str, float] = {}
        for name, value in values.items():
            if math.isfinite(value) and (name, step) not in self._before.logged:
                new_values[name] = float(value)
        if new_values:
            self._inner.log(new_values, step=step)

    def close(self) -> None:
        """Ends the tracker's run with the status of this run. An error here is only a warning."""
        try:
            if self.name == "wandb" and self._status != "done":
                self._inner.tracker.finish(exit_code=1)
            elif self.name == "mlflow" and self._status != "done":
                # optional and slow to import
                import mlflow

                mlflow.end_run("FAILED" if self._status == "failed" else "KILLED")
            else:
                self._inner.finish()
        except Exception as error:
            warnings.warn(
                f"{self.name} could not be closed: {redact(_first_line(error))}",
                RuntimeWarning,
                stacklevel=2,
            )


def start_trackers(
    names: Sequence[str],
    project: str,
    name: str,
    folder: Path,
    recipe: Mapping[str, Any],
    resumed_from: int | None,
    earlier_events: Sequence[Event],
) -> list[Tracker]:
    """Starts the trackers of a run; `earlier_events` are those of its earlier sessions.

    Raises UserError if one cannot start, after closing those that could.
    """
    if not names:
        return []
    # takes seconds, so it is imported only if a tracker is used
    from accelerate import PartialState, tracking

    # accelerate's trackers read the number of processes from it
    PartialState()
    state = _read_state(folder)
    started = list[Tracker]()
    try:
        for tracker_name in dict.fromkeys(names):
            previous_id = state.get(tracker_name)
            if not isinstance(previous_id, str):
                previous_id = None
            run = TrackerRun(
                project,
                name,
                folder,
                resumed_from,
                previous_id,
            )
            inner, state[tracker_name] = _start_tracker(tracker_name, tracking, run)
            is_new = run.continued_id is None
            before = SentBefore()
            if not is_new and resumed_from is not None:
                before = sent_before(
                    tracker_name,
                    earlier_events,
                    resumed_from,
                    _first_step(inner),
                )
            started.append(
                Tracker(
                    tracker_name,
                    inner,
                    flatten_settings(recipe),
                    is_new or tracker_name in SETTINGS_EACH_SESSION,
                    before,
                )
            )
    except BaseException:
        for tracker in started:
            tracker.close()
        raise
    write_file(folder / STATE_FILE, json.dumps({"version": 1, "runs": state}, indent=2).encode())
    return started


def _first_step(inner: Any) -> int:
    """Returns the first step that a run of wandb does not have on its server; 0 offline, and for other trackers."""
    return int(getattr(inner.tracker, "starting_step", 0))


def _start_tracker(
    name: str,
    tracking: Any,
    run: TrackerRun,
) -> tuple[Any, str]:
    try:
        inner, run_id = TRACKER_FACTORIES[name](tracking, run)
        inner.start()
        return inner, run_id or str(inner.tracker.info.run_id)
    except Exception as error:
        message = redact(_first_line(error))
        raise UserError(
            f"train.report_to: {name} cannot begin: {type(error).__name__}: {message}; correct that, or leave it out"
        ) from error


def flatten_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every setting by its dotted name, as trackers take them, with secrets redacted."""
    flat: dict[str, Any] = {}
    for path, value in leaves(dict(recipe)):
        plain = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        flat[dotted(path)] = redact(plain)
    return flat


def redact(value: Any) -> Any:
    """Returns a text without parts that look like an access token, or like a password in a URL."""
    if isinstance(value, str):
        return SECRET_PATTERN.sub(REDACTED, value)
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:300]


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        runs = read_json(folder / STATE_FILE)["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return runs if isinstance(runs, dict) else {}
