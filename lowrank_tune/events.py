"""Events of a run: small frozen values. Screens, files and trackers are sinks; the training loop only calls `emit`.

One event is one JSON object in `events.jsonl`: `{"v": 2, "event": "step_end", "time": 1763800000.0, "step": 1, "stats":
{...}}`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeGuard

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; `time` is seconds since the epoch."""

    kind: ClassVar[str] = ""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The first event of each session.

    `reference` describes what the policy is compared with. `memory_total_gib` is the memory of the GPU, or of the
    machine without a GPU, 0 if unknown. In a chain this is stage `stage` of `stages`. `loading_seconds` are those of
    this session before this event; `earlier_sessions` is None in the logs of older versions.

    `shares_first_session`: whether an earlier stage of the chain ran in the first session of this stage; None outside
    of chains and in the logs of older versions.
    """

    kind: ClassVar[str] = "run_started"
    name: str
    algorithm: str
    model: str
    roles: Mapping[str, list[str]]
    reference: str
    steps: int
    resumed_from: int = 0
    trainable: int = 0
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    memory_total_gib: float = 0.0
    stage: int = 1
    stages: int = 1
    earlier_sessions: int | None = None
    earlier_seconds: float = 0.0
    loading_seconds: float = 0.0
    shares_first_session: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """A long job other than training (loading, tokenizing, evaluating): `done` of `total` units.

    `total` is never less than `done`: a job that turns out to be longer than expected has as many units as are done.
    """

    kind: ClassVar[str] = "progress"
    description: str
    done: int
    total: int

    def __post_init__(self) -> None:
        if self.done > self.total:
            object.__setattr__(self, "total", self.done)


@dataclass(frozen=True, kw_only=True)
class StepEnd(Event):
    """One optimizer step. `stats` are means over the step, `seconds` its wall time."""

    kind: ClassVar[str] = "step_end"
    step: int
    steps: int
    stats: Mapping[str, float]
    seconds: float
    tokens: int
    logged: bool = True


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Metrics on held-out rows or prompts after `step` steps."""

    kind: ClassVar[str] = "evaluated"
    step: int
    stats: Mapping[str, float]
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleLogged(Event):
    """An answer of the model to a held-out prompt after `step` steps."""

    kind: ClassVar[str] = "sample_logged"
    step: int
    prompt: str
    completion: str
    finish_reason: str
    ground_truth: str | None = None
    reward: float | None = None
    role: str = "policy"


@dataclass(frozen=True, kw_only=True)
class GroupLogged(Event):
    """The completions of one prompt in a step, each `{"text", "reward", "advantage", "finish_reason", "parts"}`."""

    kind: ClassVar[str] = "group_logged"
    step: int
    prompt: str
    completions: list[Mapping[str, Any]]
    ground_truth: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete on disk."""

    kind: ClassVar[str] = "checkpoint_saved"
    step: int
    path: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LogMessage(Event):
    """A message for the user: information or a warning."""

    kind: ClassVar[str] = "log_message"
    message: str
    level: Literal["info", "warning"] = "info"


def warning(message: str) -> LogMessage:
    """Returns the event of a warning."""
    return LogMessage(message=message, level="warning")


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The last event of a session of `seconds`. In a chain this is stage `stage` of `stages`, also if it failed before
    its `RunStarted`.

    `total_seconds` are those of all `sessions`, None in the logs of older versions. `total_tokens` and
    `total_step_seconds` are those of all steps. `shares_first_session` as in `RunStarted`.
    """

    kind: ClassVar[str] = "run_ended"
    status: Literal["done", "interrupted", "failed"]
    step: int
    seconds: float
    message: str = ""
    stage: int = 1
    stages: int = 1
    total_seconds: float | None = None
    sessions: int = 1
    total_tokens: int = 0
    total_step_seconds: float = 0.0
    shares_first_session: bool | None = None


Emit = Callable[[Event], None]


def is_warning(event: Event) -> TypeGuard[LogMessage]:
    """Returns whether an event is a warning for the user."""
    return isinstance(event, LogMessage) and event.level == "warning"


@contextmanager
def loading_progress(name: str, emit: Emit) -> Iterator[None]:
    """Emits the start of loading a model as a job of one unit, and after the block its end."""
    description = f"loading {name}"
    emit(Progress(description=description, done=0, total=1))
    yield
    emit(Progress(description=description, done=1, total=1))


def ignore_event(event: Event) -> None:
    """Does nothing: the `Emit` of a caller that needs no events."""


@dataclass
class ProgressBar:
    """Emits a limited number of `Progress` events while a job is done."""

    description: str
    total: int
    emit: Emit
    updates: int = 20
    done: int = 0

    def advance(self, count: int = 1) -> None:
        """Adds `count` finished units; emits an event if a further fraction of `1 / updates` is done."""
        before = self.done
        self.done += count
        if self.done * self.updates // self.total != before * self.updates // self.total:
            self.report()

    def report(self) -> None:
        """Emits the state."""
        self.emit(
            Progress(
                description=self.description,
                done=self.done,
                total=self.total,
            )
        )


KINDS: dict[str, type[Event]] = {
    kind.kind: kind
    for kind in (
        RunStarted,
        Progress,
        StepEnd,
        Evaluated,
        SampleLogged,
        GroupLogged,
        CheckpointSaved,
        LogMessage,
        RunEnded,
    )
}


def to_json(event: Event) -> dict[str, Any]:
    """Returns the event as an object of `events.jsonl`."""
    return {"v": VERSION, "event": event.kind, **asdict(event)}


def from_json(data: Mapping[str, Any]) -> Event | None:
    """Returns the event of an object of `events.jsonl`, None for an unknown kind. Unknown fields are ignored; a null
    metric becomes nan."""
    kind = KINDS.get(data.get("event", ""))
    if kind is None:
        return None
    field_names = {f.name for f in fields(kind)}
    known_data = {key: value for key, value in data.items() if key in field_names}
    stats = known_data.get("stats")
    # JSON has no nan, so the file contains null
    if isinstance(stats, dict):
        known_data["stats"] = {name: float("nan") if value is None else value for name, value in stats.items()}
    return kind(**known_data)
