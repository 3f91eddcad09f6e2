"""What an earlier session of a run has sent to a tracker: it is not sent again, and what a kill may have lost is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowrank_tune.events import Evaluated, Event, RunEnded, RunStarted, StepEnd

BUFFER_SECONDS = 60.0
"""wandb's process writes its file every 15 s (seen with 0.31), and loses the rest when this process is killed."""
LoggedSteps = frozenset[tuple[str, int]]
"""Metrics, by name and step, that an earlier session of the run has sent."""


@dataclass(frozen=True)
class SentBefore:
    """`logged` was sent; `lost` may have been lost, and the continued run does not measure it again."""

    logged: LoggedSteps = frozenset()
    lost: Sequence[Event] = ()


def sent_before(
    tracker: str,
    events: Sequence[Event],
    resumed_from: int,
    first_step: int = 0,
) -> SentBefore:
    """Returns what the earlier sessions, whose events these are, have sent to a tracker.

    `first_step` is the first one that the tracker does not have, if it reports that (wandb online).
    """
    if tracker == "tensorboard":
        # purges what follows the checkpoint, so those steps are logged again
        return SentBefore(last_logged_steps(events, resumed_from))
    if tracker != "wandb" or not events or isinstance(events[-1], RunEnded):
        return SentBefore(last_logged_steps(events))
    since = _buffered_since(events)
    sent: list[Event] = []
    lost: list[Event] = []
    for event in events:
        if not isinstance(event, (StepEnd, Evaluated)):
            continue
        if event.time < since or event.step < first_step:
            sent.append(event)
        elif event.step <= resumed_from:
            lost.append(event)
    return SentBefore(last_logged_steps(sent), lost)


def _buffered_since(events: Sequence[Event]) -> float:
    """Returns the time from which on a killed session may have lost what it sent. A session that was killed soon may
    also have lost what it sent again for the one before it."""
    kept = [event for event in events if isinstance(event, (StepEnd, Evaluated, RunStarted, RunEnded))]
    since = events[-1].time - BUFFER_SECONDS
    for before, event in zip(kept[-2::-1], kept[:0:-1], strict=True):
        if isinstance(event, RunStarted) and event.time >= since:
            if isinstance(before, RunEnded):
                break
            since = min(since, before.time - BUFFER_SECONDS)
    return since


def last_logged_steps(events: Iterable[Event], up_to: int | None = None) -> LoggedSteps:
    """Returns the metrics in a log, up to a step. The log is read before a resumed run truncates it."""
    logged: set[tuple[str, int]] = set()
    for event in events:
        if not isinstance(event, (StepEnd, Evaluated)) or (up_to is not None and event.step > up_to):
            continue
        if isinstance(event, StepEnd):
            names = [f"train/{name}" for name in (*event.stats, "seconds")]
        else:
            names = [grouped_metric_name(name) for name in event.stats]
        logged |= {(name, event.step) for name in names}
    return frozenset(logged)


def grouped_metric_name(name: str) -> str:
    """Returns a held-out metric with its group, as transformers' reporting does: `eval_loss` becomes `eval/loss`.

    `heldout/...` and `pairs/...` have a group already; a name without one belongs to `eval/`.
    """
    if name.startswith("eval_"):
        return "eval/" + name.removeprefix("eval_")
    if "/" in name:
        return name
    return f"eval/{name}"
