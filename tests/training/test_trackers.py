"""Trackers: what the reader of TensorBoard finds in the files, each step once, and failures that do not stop a run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from models import CPU
from typer.testing import CliRunner

from lowrank_tune import Recipe, UserError, run
from lowrank_tune.cli import app
from lowrank_tune.config import differences
from lowrank_tune.errors import ConfigError
from lowrank_tune.events import Evaluated, Event, LogMessage, RunEnded, RunStarted, SampleLogged, StepEnd
from lowrank_tune.training import trackers
from lowrank_tune.training.sinks import EventBus

STARTED = RunStarted(name="r", algorithm="sft", model="m", roles={}, reference="base", steps=9)
RECIPE = {
    "seed": 3,
    "train": {"learning_rate": 0.001, "report_to": ["wandb"]},
    "data": {"train": [{"dataset": "rows.jsonl"}]},
}


def step(number: int, **stats: float) -> StepEnd:
    return StepEnd(step=number, steps=9, stats=stats, seconds=0.5, tokens=10)


def begin(
    names: Sequence[str],
    folder: Path,
    resumed_from: int | None = None,
    before: Sequence[Event] = (),
    recipe: dict[str, Any] = RECIPE,
) -> list[trackers.Tracker]:
    return trackers.start_trackers(names, "lowrank-tune", "mine", folder, recipe, resumed_from, before)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Returns every point of every scalar, by name and step, as TensorBoard reads it. Fails if a step occurs twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        points = [(point.step, point.value) for point in reader.Scalars(tag)]
        assert len({at for at, _ in points}) == len(points), f"{tag}: a step stands twice"
        found[tag] = dict(points)
    return found


def test_tensorboard_files_hold_what_the_log_holds(tmp_path: Path) -> None:
    """A real run: its files, read back by TensorBoard, against its events.jsonl."""
    pytest.importorskip("tensorboard")
    recipe = Recipe.load(
        "tiny-sft",
        "train.num_train_epochs=null",
        "train.max_steps=3",
        "train.global_batch_size=2",
        "train.report_to=tensorboard",
        "data.train=[{dataset: builtin:arithmetic, max_samples: 8}]",
        "evaluate.num_prompts=2",
        "evaluate.num_samples=1",
        "evaluate.max_new_tokens=4",
        "evaluate.num_completions_to_print=0",
        "base.bits=16",
    )
    outcome = run(recipe, out=tmp_path / "run", ui="none", device=CPU)
    found = scalars(outcome.folder)
    events = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()]
    steps = {event["step"]: event["stats"]["loss"] for event in events if event["event"] == "step_end"}
    assert found["train/loss"] == pytest.approx(steps) and list(steps) == [1, 2, 3]
    checks = {
        event["step"]: event["stats"]["eval_loss"]
        for event in events
        if event["event"] == "evaluated" and "eval_loss" in event["stats"]
    }
    assert found["eval/loss"] == pytest.approx(checks) and found["heldout/base/accuracy"].keys() == {0}
    written = "".join(path.read_text() for path in (outcome.folder / "tensorboard").rglob("hparams.yml"))
    assert "train.learning_rate: 0.002" in written and "base.model: tiny-tutor" in written


def test_continued_run_appends_to_the_same_files(tmp_path: Path) -> None:
    """Killed after step 5, continued from the checkpoint of step 3, killed before any checkpoint and begun again."""
    pytest.importorskip("tensorboard")
    first: list[Event] = [STARTED, Evaluated(step=0, stats={"heldout/base/accuracy": 0.1})]
    first += [step(number, loss=float(number)) for number in range(1, 6)]
    _play(begin(["tensorboard"], tmp_path), first)
    again = [
        STARTED,
        *(step(number, loss=10.0 * number) for number in range(4, 7)),
        RunEnded(status="done", step=6, seconds=1.0),
    ]
    _play(begin(["tensorboard"], tmp_path, 3, first), again)
    assert scalars(tmp_path)["train/loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0, 6: 60.0}
    assert scalars(tmp_path)["heldout/base/accuracy"] == pytest.approx({0: 0.1})
    _play(begin(["tensorboard"], tmp_path), [STARTED, step(1, loss=7.0)])
    assert scalars(tmp_path)["train/loss"] == {1: 7.0}, "a start from nothing forgets what one before it left"


def _play(several: Sequence[trackers.Tracker], events: Sequence[Event]) -> None:
    for tracker in several:
        for event in events:
            tracker(event)
        tracker.close()


class FakeWandb(ModuleType):
    """What accelerate's tracker calls, written down."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.config = SimpleNamespace(update=lambda values, **more: self.calls.append(("config", values)))
        self.Settings = lambda **more: more
        self.fails = False

    def init(self, **arguments: Any) -> Any:
        self.calls.append(("init", arguments))
        return SimpleNamespace(log=self._log, finish=lambda exit_code=0: self.calls.append(("finish", exit_code)))

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no route to https://me:letmein@example.org/")
        self.calls.append(("log", (step, values)))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_moved_run_continues_and_sends_nothing_twice(wandb: FakeWandb, tmp_path: Path) -> None:
    first = [
        STARTED,
        step(1, loss=1.0, kl=float("nan")),
        step(2, loss=2.0),
        Evaluated(step=2, stats={"eval_loss": 0.5}),
        RunEnded(status="interrupted", step=2, seconds=1.0),
    ]
    _play(begin(["wandb"], tmp_path), first)
    _play(
        begin(["wandb"], tmp_path, 1, first),
        [
            STARTED,
            step(2, loss=2.0),
            Evaluated(step=2, stats={"eval_loss": 0.5, "pairs/accuracy": 0.9}),
            step(3, loss=3.0),
            RunEnded(status="done", step=3, seconds=1.0),
        ],
    )
    starts = [values for kind, values in wandb.calls if kind == "init"]
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["project"] == "lowrank-tune" and starts[0]["name"] == "mine"
    sent = [values for kind, values in wandb.calls if kind == "log"]
    assert [(at, sorted(values)) for at, values in sent] == [
        (1, ["train/loss", "train/seconds"]),
        (2, ["train/loss", "train/seconds"]),
        (2, ["eval/loss"]),
        (2, ["pairs/accuracy"]),
        (3, ["train/loss", "train/seconds"]),
    ]
    configured = [values for kind, values in wandb.calls if kind == "config"]
    assert len(configured) == 2 and configured[0]["train.learning_rate"] == 0.001 and configured[0]["run.model"] == "m"
    assert configured[0] == configured[1]
    assert [code for kind, code in wandb.calls if kind == "finish"] == [1, 0], (
        "one that was interrupted is not called finished"
    )
    _play(begin(["wandb"], tmp_path), [STARTED])
    assert wandb.calls[-3][1]["id"] != starts[0]["id"], "a start from nothing is another run"


def test_killed_run_sends_again_what_wandb_may_have_lost(wandb: FakeWandb, tmp_path: Path) -> None:
    killed = [STARTED, step(1, loss=1.0), Evaluated(step=1, stats={"eval_loss": 0.5}), step(2, loss=2.0)]
    _play(begin(["wandb"], tmp_path), killed)
    wandb.calls.clear()
    _play(begin(["wandb"], tmp_path, 1, killed), [STARTED, step(2, loss=2.0)])
    sent = [(values[0], sorted(values[1])) for kind, values in wandb.calls if kind == "log"]
    assert sent == [
        (1, ["train/loss", "train/seconds"]),
        (1, ["eval/loss"]),
        (2, ["train/loss", "train/seconds"]),
    ]


def test_texts_and_secrets_are_never_sent(wandb: FakeWandb, tmp_path: Path) -> None:
    recipe = {
        "base": {"model": "https://me:letmein@example.org/model"},
        "description": "with hf_abcdefghijklmnop inside",
        "adapters": {},
    }
    events = [
        STARTED,
        SampleLogged(step=1, prompt="a private question", completion="a private answer", finish_reason="stop"),
    ]
    _play(begin(["wandb"], tmp_path, recipe=recipe), events)
    everything = repr(wandb.calls) + (tmp_path / "trackers.json").read_text()
    assert "private" not in everything and "letmein" not in everything and "abcdefghijklmnop" not in everything
    assert "https://***@example.org/model" in everything


def test_tracker_that_fails_is_switched_off_and_the_run_continues(wandb: FakeWandb, tmp_path: Path) -> None:
    events: list[Event] = []
    [tracker] = begin(["wandb"], tmp_path)
    tee = EventBus(tracker, _EventList(events))
    wandb.fails = True
    tee(step(1, loss=1.0))
    tee(step(2, loss=1.0))
    notes = [event.message for event in events if isinstance(event, LogMessage)]
    assert len(notes) == 1 and "wandb" in notes[0] and "switched off" in notes[0] and "letmein" not in notes[0]
    assert [event.step for event in events if isinstance(event, StepEnd)] == [1, 2]


class _EventList:
    def __init__(self, events: list[Event]) -> None:
        self.events = events

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None: ...


def test_what_cannot_start_is_refused_before_anything_is_trained(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**arguments: Any) -> Any:
        raise PermissionError("api_key not configured (no-tty)\nmore lines")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="train.report_to: wandb cannot begin: PermissionError: api_key not configured"):
        begin(["wandb"], tmp_path)
    assert not (tmp_path / "trackers.json").exists()


def test_what_is_missing_is_reported_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in ("wandb", "mlflow") else found(name, *more)
    )
    with pytest.raises(ConfigError) as caught:
        trackers.check_installed(["wandb", "mlflow", "wandb"])
    assert [str(fault) for fault in caught.value.problems] == [
        f"train.report_to: {name} is not installed: pip install {name}, or leave it out" for name in ("wandb", "mlflow")
    ]
    result = CliRunner().invoke(
        app, ["run", "tiny-sft", "train.report_to=wandb", "--out", str(tmp_path / "run"), "--ui", "plain"]
    )
    assert result.exit_code == 2 and "pip install wandb" in result.stderr and not (tmp_path / "run").exists()


def test_how_recipes_name_them() -> None:
    one, several = (
        Recipe.load("tiny-sft", f"train.report_to={value}").train.trackers
        for value in ("wandb", "[tensorboard, mlflow]")
    )
    assert one == ("wandb",) and several == ("tensorboard", "mlflow") and Recipe.load("tiny-sft").train.trackers == ()
    for override, words in (
        ("train.report_to=wandbb", "wandb"),
        ("train.project=mine", "does nothing without `train.report_to`"),
    ):
        with pytest.raises(ConfigError, match=words):
            Recipe.load("tiny-sft", override)
    plain = Recipe.load("tiny-sft").to_dict()
    assert not differences(
        plain, Recipe.load("tiny-sft", "train.report_to=[wandb, mlflow]", "train.project=mine").to_dict()
    )
    assert (
        Recipe.from_dict(
            Recipe.load("tiny-sft", "train.report_to=[wandb]", "train.project=mine").to_dict()
        ).train.project
        == "mine"
    )
