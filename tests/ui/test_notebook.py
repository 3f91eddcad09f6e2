"""The output of a run in a notebook: one output, drawn about once a second, with inert text; and the result as HTML."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from event_player import RECORDED, recorded_events
from malformed_yaml import HOSTILE_TEXTS, is_inert

from lowrank_tune.errors import ConfigError, ConfigProblem, UserError
from lowrank_tune.events import Event, Progress, RunEnded, SampleLogged, StepEnd, warning
from lowrank_tune.ui.notebook import NotebookView, in_notebook, result_html, view
from lowrank_tune.ui.notebook.kernel import Output, OutputSlot
from lowrank_tune.ui.notebook.next_steps import next_steps


class Slot(OutputSlot):
    """Keeps what was shown."""

    def __init__(self) -> None:
        self.shown: list[Output] = []

    def show(self, output: Output) -> None:
        self.shown.append(output)


def drawn(events: Iterable[Event], seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """What a view shows of events that come every `seconds`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(view.time, "monotonic", lambda: clock.now)
    slot = Slot()
    sink = NotebookView(slot)
    for event in events:
        sink(event)
        clock.now += seconds
    sink.close()
    return slot.shown


def visible(html: str) -> str:
    return re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


def test_a_run_is_drawn_in_place_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    events = list(recorded_events(is_chain=False))
    shown = drawn(events, 0.1, monkeypatch)
    jobs = sum(isinstance(event, Progress) and event.done == 0 for event in events)
    assert 5 < len(shown) <= len(events) * 0.1 + jobs + 3
    last = visible(shown[-1].html)
    steps = [event for event in events if isinstance(event, StepEnd)]
    assert f"step {steps[-1].step} of {steps[-1].steps} (100.0 %)" in last and 'lt-done">done' in last
    assert last.count("<svg") == 4 and "validation" in last and "KL to the reference" in last
    samples = [event for event in events if isinstance(event, SampleLogged)]
    assert samples[-1].completion.strip()[:20] in last
    assert not shown[-1].html.count("<script") and "http" not in shown[-1].html
    middle = visible(shown[len(shown) * 3 // 4].html)
    assert "ETA" in middle and 'lt-running">running' in middle
    assert shown[-1].text.startswith("demo: done, step") or ": done, step" in shown[-1].text


def test_the_end_is_drawn_although_a_drawing_was_just_before(monkeypatch: pytest.MonkeyPatch) -> None:
    events = list(recorded_events(is_chain=False))
    assert isinstance(events[-1], RunEnded)
    shown = drawn(events, 0.0, monkeypatch)
    assert 'lt-done">done' in shown[-1].html
    job = Progress(description="loading weights", done=0, total=1)
    sink = NotebookView(slot := Slot())
    for event in (*events[:150], job):
        sink(event)
    assert "loading weights" in slot.shown[-1].html, "it may take minutes until the next event"
    sink(events[-1])
    assert 'lt-done">done' in slot.shown[-1].html, "before the sink is closed"
    # the last events of a run that was killed are drawn at its close
    cut = [*events[:150], warning("the last word")]
    assert "the last word" in drawn(cut, 0.0, monkeypatch)[-1].html


def test_a_chain_has_a_line_for_each_finished_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    last = visible(drawn(recorded_events(is_chain=True), 0.02, monkeypatch)[-1].html)
    assert "stage 1 of 2: SFT, " in last and "DPO of" in last and "implicit reward" in last


def test_a_side_of_a_pair_is_no_answer_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    events = list(recorded_events(is_chain=False))[:100]
    sides = [
        SampleLogged(step=1, prompt="q", completion=f"a {side} one", finish_reason="stop", role=side, reward=1.0)
        for side in ("chosen", "rejected")
    ]
    last = drawn([*events, *sides], 0.02, monkeypatch)[-1].html
    assert "newest answer" in last and "a rejected one" not in last and "a chosen one" not in last


def test_a_continued_run_shows_its_earlier_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    slot = Slot()
    sink = NotebookView(slot)
    events = list(recorded_events(is_chain=False))
    sink.replay(events[:200])
    first = sum(isinstance(event, StepEnd) for event in events[:200])
    assert first and len(sink.run.log.series["loss"]) == first and len(slot.shown) == 1
    sink.replay(events[:200])
    assert len(sink.run.log.series["loss"]) == first, "a replay begins again"


@pytest.mark.parametrize("bad", HOSTILE_TEXTS)
def test_text_of_models_and_data_is_inert(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events = list(recorded_events(is_chain=False))[:40]
    events += [
        SampleLogged(step=1, prompt=bad, completion=bad, finish_reason="stop", ground_truth=bad),
        warning(bad),
        Progress(description=bad, done=1, total=3),
    ]
    assert is_inert(visible(drawn(events, 0.02, monkeypatch)[-1].html).replace("<svg", "<").replace("</svg", "</"))
    assert is_inert(visible(result_html({"status": bad, "name": bad, "warnings": [bad]}, Path("absent"))))


def test_a_failure_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [*recorded_events(is_chain=False)][:-1]
    failed = RunEnded(status="failed", step=3, seconds=1.0, message="the disk is full")
    last = drawn([*events, failed], 0.02, monkeypatch)[-1].html
    assert "the disk is full" in last and 'lt-failed">failed' in last


def test_only_a_kernel_is_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shells: dict[str, Any] = {"kernel": SimpleNamespace(kernel=object()), "terminal": SimpleNamespace(), "none": None}
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook() and "IPython" not in sys.modules, "it is not imported for that"
    for name, shell in shells.items():
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))  # type: ignore[arg-type]
        assert in_notebook() == (name == "kernel")


def test_one_output_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()

    def display(output: Output, display_id: bool) -> Any:
        calls.append(f"display {output!r} {display_id}")
        return SimpleNamespace(update=lambda output: calls.append(f"update {output!r}"))

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    slot = OutputSlot()
    for text in "abc":
        slot.show(Output("<p>", text))
    assert calls == ["display a True", "update b", "update c"]


def test_errors_of_the_user_have_no_traceback_in_a_notebook() -> None:
    error = ConfigError([ConfigProblem("unknown key", "train.epohs")])
    assert error._render_traceback_() == ["ConfigError: train.epohs: unknown key"]
    assert UserError("a\nb")._render_traceback_() == ["UserError: a\nb"]


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "events.jsonl").write_bytes((RECORDED / "demo.jsonl").read_bytes())
    return tmp_path


SUMMARY = {
    "status": "done",
    "name": "my-run",
    "algorithm": "sft",
    "step": 96,
    "steps": 96,
    "seconds": 61.0,
    "sessions": 2,
    "last": {"step": 96, "loss": 0.5, "kl": 0.25, "mean_token_accuracy": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4}
    | {"entropy": 0.1, "tokens_per_second": 10.0, "memory_gib": 0.5, "rewards/rejected": -1.5},
    "best": {"step": 90, "loss": 0.625},
    "heldout_details": {"base": {"accuracy": 0.016, "mean_length": 40.6}, "sft": {"accuracy": 0.462}},
    "heldout_pairs": {"accuracy": 0.75},
    "warnings": ["3 rows were dropped"],
}


def test_a_result_has_curves_tables_and_next_steps(folder: Path) -> None:
    html = result_html(SUMMARY, folder)
    page = visible(html)
    assert page.count("<svg") == 4 and "<script" not in html
    cells = [re.sub("<[^>]*>", "|", row) for row in re.findall("<tr>.*?</tr>", page, flags=re.DOTALL)]
    table = [[cell for cell in row.split("|") if cell.strip()] for row in cells]
    assert ["loss", "0.500", "0.625"] in table and ["step", "96", "90"] in table
    assert ["exact answers (pass@1)", "1.6 %", "46.2 %"] in table and ["held-out pairs right, sft", "75.0 %"] in table
    assert ["tokens per answer", "40.6"] in table and ["implicit reward, rejected", "-1.500"] in table
    assert "96 of 96 steps, 1:01 (2 sessions)" in page and "3 rows were dropped" in page
    assert "4 more figures" in page
    assert f"lowrank-tune chat {folder}" in page and "from lowrank_tune.chat import ask" in page


def test_a_result_without_readable_events_has_its_figures(tmp_path: Path) -> None:
    page = visible(result_html(SUMMARY, tmp_path / "moved"))
    assert "<svg" not in page and "0.625" in page


@pytest.mark.parametrize(
    "summary",
    [
        SUMMARY,
        {**SUMMARY, "algorithm": "reward"},
        {"status": "done", "stages": [{"algorithm": "sft"}, {"algorithm": "grpo"}]},
    ],
)
def test_next_steps_are_commands_and_calls_that_exist(summary: dict[str, Any]) -> None:
    from lowrank_tune.cli import app

    commands = {command.name for command in app.registered_commands}
    steps = next_steps(summary, Path("runs/it's mine"))
    assert len(steps) >= 2
    for step in steps:
        assert step.command.split()[1] in commands
        tree = ast.parse(step.python)
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        names = {alias.name: node.module for node in imports for alias in node.names}
        for name, module in names.items():
            assert hasattr(importlib.import_module(str(module)), name)
        assert {node.func.id for node in calls if isinstance(node.func, ast.Name)} <= names.keys()


def test_an_interrupted_run_has_its_continuation(folder: Path) -> None:
    page = visible(result_html({**SUMMARY, "status": "interrupted"}, folder))
    assert "the same call continues it" in page and json.dumps(str(folder))[1:-1] in page and "chat" not in page


def test_every_chart_keeps_its_colors_without_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class of a line or a circle in the charts has a rule in the style sheet of the notebook."""
    stages = [replace(event) for event in recorded_events(is_chain=True)]
    html = drawn(stages, 0.02, monkeypatch)[-1].html
    kinds = set(re.findall(r'<path class="([a-z]+)"', html))
    assert kinds and all(f"svg path.{kind} " in html for kind in kinds)
    style = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)[0]
    rules = [rule.strip() for rule in re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL).split("}") if rule.strip()]
    selectors = [part.strip() for rule in rules for part in rule.split("{")[0].split(",")]
    assert all(selector.startswith(".lowrank-tune") for selector in selectors), "no rule reaches the page around it"
