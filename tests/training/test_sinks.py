"""Event files that survive crashes, full disks and hostile text; a fan-out that a broken screen does not stop."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    LogMessage,
    Progress,
    RunEnded,
    RunStarted,
    SampleLogged,
    StepEnd,
    from_json,
)
from lowrank_tune.training.sinks import EventBus, JsonLines, log_gaps, to_json_line, truncate_after_step


def step(number: int, **stats: float) -> StepEnd:
    return StepEnd(step=number, steps=9, stats=stats or {"loss": 1.0}, seconds=0.1, tokens=10)


def sample(number: int, text: str = "12") -> SampleLogged:
    return SampleLogged(step=number, prompt="7 + 5?", completion=text, finish_reason="stop")


def start(resumed: int = 0) -> RunStarted:
    return RunStarted(
        name="demo",
        algorithm="sft",
        model="m",
        roles={"policy": ["policy"]},
        reference="the base",
        steps=9,
        resumed_from=resumed,
    )


def saved(number: int) -> CheckpointSaved:
    return CheckpointSaved(step=number, path=f"checkpoints/step-{number}", seconds=0.1)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in path.read_text("ascii").splitlines()]


def steps_of(path: Path) -> list[tuple[str, int]]:
    return [(data["event"], data.get("step", -1)) for data in written(path)]


def test_each_event_is_written_at_once_and_is_read_back(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "events.jsonl")
    events: list[Event] = [
        start(),
        step(1),
        Evaluated(step=1, stats={"loss": 1.0}),
        sample(1),
        saved(1),
        LogMessage(message="x"),
        Progress(description="loading", done=1, total=2),
        RunEnded(status="done", step=1, seconds=1.0),
    ]
    for number, event in enumerate(events, 1):
        sink(event)
        assert len(written(tmp_path / "events.jsonl")) == number  # before it is closed
    assert [from_json(data) for data in written(tmp_path / "events.jsonl")] == events
    assert written(tmp_path / "events.jsonl")[1]["v"] == 2
    sink.close()
    sink.close()
    sink(step(2))  # after the end: nothing
    assert len(written(tmp_path / "events.jsonl")) == len(events)


@pytest.mark.parametrize(("done", "total"), [(0, 0), (1, 0), (41, 42), (42, 42), (42, 40), (204, 200)])
def test_progress_is_at_most_100_percent(done: int, total: int) -> None:
    event = Progress(description="reading", done=done, total=total)
    assert event.done == done and event.total == max(done, total)
    old = {"event": "progress", "description": "reading", "done": done, "total": total}
    read = from_json(old)
    assert isinstance(read, Progress) and read.done <= read.total, "also of a file of an earlier version"


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    raw = to_json_line(step(1, loss=math.nan, grad_norm=math.inf, kl=0.5))
    assert b"NaN" not in raw and b"Infinity" not in raw
    event = from_json(json.loads(raw))
    assert isinstance(event, StepEnd)
    assert math.isnan(event.stats["loss"]) and math.isnan(event.stats["grad_norm"]) and event.stats["kl"] == 0.5


@pytest.mark.parametrize(
    "text", ["\ud800 lone", "\x1b[31mred\x1b]52;c;x\x07", "a\nb\r\u2028\x85c\x00", "\u202eabc", "é" * 100_000]
)
def test_hostile_text_is_one_line_and_is_read_back(tmp_path: Path, text: str) -> None:
    sink = JsonLines(tmp_path / "samples.jsonl", event_types=(SampleLogged,))
    sink(sample(1, text))
    sink(step(1))
    sink(sample(2))
    raw = (tmp_path / "samples.jsonl").read_bytes()
    assert raw.count(b"\n") == len(raw.splitlines()) == 2 and raw.isascii() and b"\x1b" not in raw
    event = from_json(json.loads(raw.splitlines()[0]))
    assert isinstance(event, SampleLogged) and event.completion == text


def log_with(path: Path, *events: Event) -> JsonLines:
    sink = JsonLines(path)
    for event in events:
        sink(event)
    return sink


def test_resume_cuts_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    validated = Evaluated(step=2, stats={"loss": 1.0})
    log_with(
        path,
        start(),
        step(1),
        step(2),
        validated,
        saved(2),
        LogMessage(message="kept"),
        step(3),
        LogMessage(message="lost"),
        saved(1),
    ).close()
    with path.open("ab") as file:
        file.write(b'{"v": 2, "event": "st')
    sink = JsonLines(path, resumed_from=2)
    for event in (start(2), step(3), step(4)):
        sink(event)
    kinds = steps_of(path)
    assert kinds == [
        ("run_started", -1),
        ("step_end", 1),
        ("step_end", 2),
        ("evaluated", 2),
        ("checkpoint_saved", 2),
        ("log_message", -1),
        ("run_started", -1),
        ("step_end", 3),
        ("step_end", 4),
    ]
    assert "lost" not in path.read_text()
    assert [name.name for name in tmp_path.iterdir()] == ["events.jsonl"]


@pytest.mark.parametrize("late", [step(3), sample(3), saved(3), Evaluated(step=3, stats={})])
def test_every_kind_of_later_event_begins_the_lost_part(late: Event) -> None:
    first = to_json_line(step(2))
    data = first + to_json_line(late) + to_json_line(LogMessage(message="x"))
    assert truncate_after_step(data, 2) == first
    assert truncate_after_step(data, 3) == data


def test_half_written_and_senseless_lines_are_cut() -> None:
    good = to_json_line(step(1))
    future = b'{"v": 3, "event": "of a later version", "step": 1}\n'
    # a last line without its end is half
    assert truncate_after_step(good + b"\x00\x00\xff\n" + b"[1]\n" + future + good[:-1], 5) == good + future
    assert truncate_after_step(b"[" * 100_000 + b"\n" + good, 5) == good


def test_a_cut_at_every_byte(tmp_path: Path) -> None:
    data = b"".join(to_json_line(step(number)) for number in (1, 2, 3))
    path = tmp_path / "events.jsonl"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        sink = JsonLines(path, resumed_from=2)
        sink(step(3))
        sink.close()
        assert [number for _, number in steps_of(path)] == [*range(1, 1 + min(2, data[:length].count(b"\n"))), 3]


def logs_of_a_run(folder: Path) -> tuple[Path, Path]:
    """Four steps with a sample at the second one and a checkpoint at the third, in both files."""
    events, samples = folder / "events.jsonl", folder / "samples.jsonl"
    lines = [start(), step(1), step(2), sample(2), step(3), saved(3), step(4)]
    events.write_bytes(b"".join(map(to_json_line, lines)))
    samples.write_bytes(to_json_line(sample(2)))
    return events, samples


def test_logs_without_gaps_give_no_sentence(tmp_path: Path) -> None:
    """Nor does what a crash leaves: a last line without its end, and a checkpoint that the log does not name yet."""
    events, samples = logs_of_a_run(tmp_path)
    assert list(log_gaps(events, samples, 3)) == []
    events.write_bytes(events.read_bytes()[:-5])
    assert list(log_gaps(events, samples, 3)) == []
    events.write_bytes(b"".join(raw for raw in events.read_bytes().splitlines(True) if b"checkpoint_saved" not in raw))
    assert list(log_gaps(events, samples, 3)) == []


@pytest.mark.parametrize(
    ("damage", "figures"),
    [
        (lambda data: b"", "0 lines cannot be read, and 3 of 3 steps are missing (the first is step 1)"),
        (lambda data: bytes(len(data)), "0 lines cannot be read, and 3 of 3 steps are missing (the first is step 1)"),
        (lambda data: data[: len(data) // 2], "missing"),
        (
            lambda data: data.replace(b'"step": 2', b'"step": 2\xff', 1),
            "1 line (line 3) cannot be read, and 1 of 3 steps",
        ),
        (lambda data: data.replace(b'"step_end"', b'"stex_end"', 1), "0 lines cannot be read, and 1 of 3 steps"),
        (lambda data: b"[" * 100_000 + b"\n" + data, "1 line (line 1) cannot be read, and 0 of 3 steps are missing;"),
        (lambda data: data + b"x\n" + b"[" * 200 + b"]" * 200 + b"\n", "2 lines (the first is line 8) cannot be read"),
        (None, "3 of 3 steps are missing"),
    ],
)
def test_gaps_of_a_log_are_named(tmp_path: Path, damage: Any, figures: str) -> None:
    events, samples = logs_of_a_run(tmp_path)
    if damage is None:
        events.unlink()
    else:
        events.write_bytes(damage(events.read_bytes()))
    (sentence,) = log_gaps(events, samples, 3)
    assert str(events) in sentence and figures in sentence


def test_the_log_of_an_ended_run_has_its_end(tmp_path: Path) -> None:
    events, samples = logs_of_a_run(tmp_path)
    (sentence,) = log_gaps(events, samples, 3, has_ended=True)
    assert "0 of 3 steps are missing, and so is its end;" in sentence
    with events.open("ab") as file:
        file.write(to_json_line(RunEnded(status="done", step=3, seconds=1.0)))
    assert list(log_gaps(events, samples, 3, has_ended=True)) == []


def test_gaps_of_the_samples_are_named(tmp_path: Path) -> None:
    events, samples = logs_of_a_run(tmp_path)
    samples.write_bytes(samples.read_bytes().replace(b"{", b"", 1))
    (sentence,) = log_gaps(events, samples, 3)
    assert str(samples) in sentence and "0 of 1 samples can be read (1 line (line 1) cannot be read)" in sentence
    samples.unlink()
    (sentence,) = log_gaps(events, samples, 3)
    assert "0 of 1 samples" in sentence


def test_a_new_run_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log_with(path, step(1)).close()
    log_with(path, start()).close()
    assert steps_of(path) == [("run_started", -1)]


def test_a_full_disk_fails_the_run_in_a_sentence(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "events.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    assert sink._file is not None
    os.dup2(full, sink._file)
    with pytest.raises(TrainingError, match="cannot write .*events.jsonl: the disk is full"):
        sink(step(1))
    with pytest.raises(UserError, match="a part of this path is a file"):
        JsonLines(tmp_path / "events.jsonl" / "x.jsonl")


class Broken:
    """A screen that breaks at the event of a number."""

    def __init__(self, error: BaseException, at: int = 1) -> None:
        self.error, self.at, self.seen, self.closed = error, at, 0, False

    def __call__(self, event: Event) -> None:
        self.seen += 1
        if self.seen >= self.at:
            raise self.error

    def close(self) -> None:
        self.closed = True
        raise self.error


class Kept:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("first", [True, False])
def test_a_broken_screen_gives_one_warning_and_is_detached(first: bool) -> None:
    kept, screen = Kept(), Broken(BrokenPipeError("gone"), at=2)
    tee = EventBus(*((screen, kept) if first else (kept, screen)))
    events = [step(number) for number in (1, 2, 3)]
    for event in events:
        tee(event)
    assert screen.seen == 2
    assert [event for event in kept.events if isinstance(event, StepEnd)] == events
    (note,) = [event for event in kept.events if isinstance(event, LogMessage)]
    assert note.level == "warning" and "Broken" in note.message and "gone" in note.message


def test_two_broken_screens_do_not_stop_the_run() -> None:
    kept, screens = Kept(), [Broken(ValueError(str(number))) for number in (1, 2)]
    tee = EventBus(screens[0], kept, screens[1])
    for number in (1, 2):
        tee(step(number))
    assert [screen.seen for screen in screens] == [1, 1]
    assert [type(event) for event in kept.events].count(LogMessage) == 2 and [
        type(event) for event in kept.events
    ].count(StepEnd) == 2


def test_a_full_log_fails_once_after_the_other_sinks_were_called() -> None:
    kept, log = Kept(), Broken(TrainingError("the disk is full"))
    tee = EventBus(log, kept)
    with pytest.raises(TrainingError, match="full"):
        tee(step(1))
    tee(RunEnded(status="failed", step=1, seconds=1.0))  # the run's own farewell must still come out
    assert [type(event) for event in kept.events] == [StepEnd, RunEnded] and log.seen == 1


def test_interrupts_pass() -> None:
    screen = Broken(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        EventBus(screen)(step(1))


def test_attach_and_close() -> None:
    tee, early, late, broken = EventBus(), Kept(), Kept(), Broken(ValueError("x"), at=9)
    tee.attach(broken)
    tee.attach(early)
    tee(step(1))
    tee.attach(late, early.events)
    tee(step(2))
    assert early.events == late.events and len(late.events) == 2
    tee.close()
    assert broken.closed and early.closed and late.closed
    tee(step(3))
    assert len(late.events) == 2


def test_emit_takes_microseconds(tmp_path: Path) -> None:
    tee = EventBus(
        JsonLines(tmp_path / "events.jsonl"), JsonLines(tmp_path / "samples.jsonl", event_types=(SampleLogged,))
    )
    stats = {f"statistic_{number}": 0.1 * number for number in range(15)}
    costs = []
    for number in range(200):
        event = step(number, **stats)
        since = time.process_time()
        tee(event)
        costs.append(time.process_time() - since)
    assert sorted(costs)[100] < 0.05
