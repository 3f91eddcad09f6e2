"""Lines of `events.jsonl` that anyone may have edited: a field of a wrong type makes a line that is no event."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune.events import Event, GroupLogged, Progress, RunEnded, SampleLogged, StepEnd, to_json
from lowrank_tune.ui.run_paths import parse_event, read_event_lines

RECORDED = Path(__file__).parents[1] / "recorded"
STEP = StepEnd(step=1, steps=2, stats={"loss": 1.0}, seconds=1.0, tokens=3)
ENDED = RunEnded(status="done", step=2, seconds=1.0)
SAMPLE = SampleLogged(step=1, prompt="a", completion="b", finish_reason="stop")


def parsed(event: Event, **changes: Any) -> Event | None:
    return parse_event(json.dumps({**to_json(event), **changes}).encode())


@pytest.mark.parametrize(
    ("event", "field", "value"),
    [
        (STEP, "time", float("nan")),
        (STEP, "time", "now"),
        (STEP, "step", "1"),
        (STEP, "step", 1.5),
        (STEP, "step", 10**400),
        (STEP, "seconds", float("inf")),
        (STEP, "seconds", None),
        (STEP, "stats", [1]),
        (STEP, "stats", {"loss": "1"}),
        (STEP, "stats", {"loss": 10**400}),
        (STEP, "tokens", {}),
        (ENDED, "status", "almost"),
        (ENDED, "status", []),
        (ENDED, "total_seconds", "1"),
        (SAMPLE, "prompt", 3),
        (SAMPLE, "ground_truth", 3),
        (Progress(description="a", done=1, total=2), "done", "1"),
        (GroupLogged(step=1, prompt="a", completions=[]), "completions", {}),
    ],
)
def test_a_field_of_a_wrong_type_makes_no_event(event: Event, field: str, value: Any) -> None:
    assert parsed(event, **{field: value}) is None


def test_valid_values_make_an_event() -> None:
    for event in (STEP, ENDED, SAMPLE):
        assert parsed(event) == event
    assert parsed(ENDED, total_seconds=1) == RunEnded(
        status="done", step=2, seconds=1.0, total_seconds=1, time=ENDED.time
    )
    assert parsed(SAMPLE, reward=0, ground_truth="4") is not None
    step = parsed(STEP, stats={"loss": None})
    assert isinstance(step, StepEnd) and step.stats["loss"] != step.stats["loss"], "null is nan"


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_line_of_a_recorded_run_is_an_event(path: Path) -> None:
    assert len(list(read_event_lines(path))) == len(path.read_bytes().splitlines()) > 50
