"""KTO: runs of the tiny model, from the first step to the files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from algorithm_helpers import run_with_events, small_kto, step_metrics
from crash import run_fingerprint
from models import CPU, perturb
from typer.testing import CliRunner

from lowrank_tune import Recipe, run
from lowrank_tune import assembly as assembly_module
from lowrank_tune.algorithms.kto import KTO
from lowrank_tune.assembly import sources as sources_module
from lowrank_tune.cli import app
from lowrank_tune.config import load_any
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Evaluated, LogMessage, RunStarted, StepEnd, is_warning
from lowrank_tune.model.roles import Roles


def answers(folder: Path, desirable: int, undesirable: int) -> str:
    """Writes a file of answers with labels. Returns its path."""
    rows = []
    for number in range(desirable + undesirable):
        label = number < desirable
        answer = f"It is {number + 1}." if label else "Hard to say."
        rows.append({"prompt": f"What is {number} + 1?", "completion": answer, "label": label})
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def messages_of(events: list[Any]) -> list[str]:
    return [event.message for event in events if isinstance(event, LogMessage)]


@pytest.mark.parametrize("loss_type", ["kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.slow)])
def test_first_step_has_loss_one_half_and_kl_0(cache: Path, tmp_path: Path, loss_type: str) -> None:
    """The first step of a fresh policy has loss 1/2 and KL 0; a validation has the metrics of a step."""
    events = run_with_events(small_kto(kto={"loss_type": loss_type}), tmp_path / "run")[1]
    stats = step_metrics(events)[0]
    assert stats["loss"] == pytest.approx(0.5, abs=1e-5)
    assert stats["kl_per_token"] == 0.0 and stats.get("kl", 0.0) < 1e-4
    assert ("kl" in stats) == (loss_type == "kto")
    assert abs(stats.get("rewards/chosen", 0.0)) < 1e-4
    started = next(event for event in events if isinstance(event, RunStarted))
    assert started.reference == "the base, adapters off"
    evaluated = [event.stats for event in events if isinstance(event, Evaluated) and "eval_loss" in event.stats]
    assert evaluated
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_rewards/chosen"} <= evaluated[-1].keys()
    # 40 pairs without those held out, both answers of each.
    assert any("32 desirable and 32 undesirable rows an epoch" in message for message in messages_of(events))


def test_rare_class_gets_a_weight_that_is_logged(cache: Path, tmp_path: Path) -> None:
    data = {"train": [{"dataset": answers(tmp_path, 30, 10)}], "eval_fraction": 0.0, "max_length": 256}
    outcome, events = run_with_events(small_kto(data=data), tmp_path / "run")
    assert outcome.status == "done"
    expected = "30 desirable and 10 undesirable rows an epoch; kto.desirable_weight is 1, kto.undesirable_weight 2.25"
    assert expected in messages_of(events)
    first = step_metrics(events)[0]["loss"]
    assert 0.5 < first < 0.5 * 2.25, "the loss has the weights"


def test_one_class_gives_a_warning(cache: Path, tmp_path: Path) -> None:
    data = {"train": [{"dataset": answers(tmp_path, 20, 0)}], "eval_fraction": 0.0, "max_length": 256}
    outcome, events = run_with_events(small_kto(data=data), tmp_path / "run")
    assert outcome.status == "done"
    warnings = [event.message for event in events if is_warning(event)]
    assert any("all training rows are desirable" in message for message in warnings)
    assert all("rewards/rejected" not in stats for stats in step_metrics(events))


def _sums_off(patch: pytest.MonkeyPatch) -> None:
    real = sources_module.reference_logps
    patch.setattr(sources_module, "reference_logps", lambda *given: real(*given) + 0.5)


def _top_not_zero(patch: pytest.MonkeyPatch) -> None:
    real = assembly_module.load_roles

    def roles_of(*given: Any) -> Roles:
        roles = real(*given)
        perturb(roles, "policy", size=0.02)
        return roles

    patch.setattr(assembly_module, "load_roles", roles_of)


@pytest.mark.parametrize("tamper", [_top_not_zero, pytest.param(_sums_off, marks=pytest.mark.slow)])
def test_wrong_reference_stops_run_before_first_step(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tamper: Any
) -> None:
    """A policy that does not equal its reference, or wrong cached log-probs, stop the run before a step or a file."""
    tamper(monkeypatch)
    events: list[Any] = []
    with pytest.raises(TrainingError, match="reference.*the base, adapters off"):
        run(Recipe.from_dict(small_kto()), out=tmp_path / "run", ui="none", device=CPU, on_event=events.append)
    assert not any(isinstance(event, StepEnd) for event in events)
    # Only the check finds it: without the check the run ends normally.
    monkeypatch.setattr(KTO, "check", lambda self, micro, step: None)
    assert run_with_events(small_kto(), tmp_path / "unchecked")[0].status == "done"


def test_resumed_run_equals_straight_run(cache: Path, tmp_path: Path) -> None:
    """A run that is interrupted after step 2 and continued has the bytes of one that is not."""

    def stop(event: Any) -> None:
        if isinstance(event, StepEnd) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = small_kto(evaluate={"eval_steps": 2})
    run(Recipe.from_dict(recipe), out=tmp_path / "straight", ui="none", device=CPU)
    first = run(Recipe.from_dict(recipe), out=tmp_path / "resumed", ui="none", device=CPU, on_event=stop)
    assert first.status == "interrupted"
    second = run(Recipe.from_dict(recipe), out=tmp_path / "resumed", ui="none", device=CPU)
    assert second.status == "done"
    assert run_fingerprint(tmp_path / "resumed") == run_fingerprint(tmp_path / "straight")


@pytest.mark.slow
def test_chain_and_commands_over_it(cache: Path, tmp_path: Path) -> None:
    """KTO on top of a frozen SFT adapter, which is its reference; and the commands that read such a run."""
    few = "train={max_steps: 3, global_batch_size: 8, logging_steps: 1}"
    chain = tmp_path / "chain.yaml"
    chain.write_text(
        "name: chain\nbase: {model: tiny-tutor}\nstages:\n  - {name: sft, extends: tiny-sft}\n"
        "  - {name: kto, extends: tiny-kto, reference: sft}\n"
    )
    out = tmp_path / "chain"
    loaded = load_any(str(chain), few, "evaluate.num_prompts=4", "evaluate.num_samples=1")
    outcome = run(loaded, out=out, ui="none", device=CPU)
    assert outcome.status == "done" and outcome.summary["algorithm"] == "sft -> kto"
    events = [json.loads(line) for line in (out / "2-kto" / "events.jsonl").read_text().splitlines()]
    started = next(event for event in events if event["event"] == "run_started")
    assert started["roles"] == {"policy": ["sft", "policy"], "reference": ["sft"]}
    first = next(event for event in events if event["event"] == "step_end")
    assert first["stats"]["loss"] == pytest.approx(0.5, abs=1e-5)
    report = (out / "report.html").read_text()
    assert "KL per token" in report and "implicit reward" in report
    for words in (
        ["eval", str(out / "2-kto"), "--num-prompts", "4"],
        ["compare", str(out / "1-sft"), str(out / "2-kto"), "--html", str(tmp_path / "c.html")],
        ["report", str(out / "2-kto")],
        ["merge", str(out / "2-kto"), "--out", str(tmp_path / "merged")],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)


@pytest.mark.slow
def test_tiny_kto_learns_to_answer(cache: Path, tmp_path: Path) -> None:
    """Exact held-out answers rise from nearly none to most."""
    summary = run(load_any("tiny-kto"), out=tmp_path / "run", ui="none", device=CPU).summary
    assert summary["heldout"]["base"] < 0.1 and summary["heldout"]["kto"] > 0.85
