"""DPO: short runs of the tiny model, from the first step to the files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from algorithm_helpers import file_bytes, record_builds, run_with_events, small_dpo
from models import CPU, changed_tensors, perturb
from safetensors.torch import load_file

from lowrank_tune import Recipe, run
from lowrank_tune import assembly as assembly_module
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.assembly import sources as sources_module
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import RunStarted, StepEnd
from lowrank_tune.model.adapters import WEIGHTS
from lowrank_tune.model.roles import Roles


def first_event(events: list[Any], kind: type) -> Any:
    return next(event for event in events if isinstance(event, kind))


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("robust", marks=pytest.mark.slow)])
def test_first_step_has_loss_ln_2_and_kl_0(cache: Path, tmp_path: Path, loss: str) -> None:
    """The first step of a fresh policy has loss ln 2, KL 0 and margin 0."""
    events = run_with_events(small_dpo(dpo={"loss_type": loss}), tmp_path / "run")[1]
    stats = first_event(events, StepEnd).stats
    assert stats["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert stats["kl"] == 0.0
    assert abs(stats["rewards/margins"]) < 1e-4
    assert first_event(events, RunStarted).reference == "the base, adapters off"


# --- a wrong reference ------------------------------------------------------------------------------------------------


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
        run(Recipe.from_dict(small_dpo()), out=tmp_path / "run", ui="none", device=CPU, on_event=events.append)
    assert not any(isinstance(event, StepEnd) for event in events)
    assert not (tmp_path / "run" / "final").exists()
    # Only the check finds it: without the check the run ends normally.
    monkeypatch.setattr(DPO, "check", lambda self, micro, step: None)
    assert run_with_events(small_dpo(), tmp_path / "unchecked")[0].status == "done"


# --- over a frozen SFT adapter ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short SFT run with dropout, which must not be applied when its adapter is frozen below a policy."""
    recipe = {
        "name": "sft",
        "algorithm": "sft",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"policy": {"r": 4, "lora_dropout": 0.2}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 60}], "eval_fraction": 0.1},
        "train": {"max_steps": 6, "global_batch_size": 8, "learning_rate": 5e-3, "gradient_checkpointing": False},
    }
    out = tmp_path_factory.mktemp("below") / "sft"
    run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU)
    return out


def dpo_over_adapter(sft: Path) -> dict[str, Any]:
    """Returns a recipe of DPO over the frozen adapter of an SFT run."""
    return small_dpo(base={"model": "tiny-tutor", "bits": 4}, adapters={"sft": {"path": str(sft)}, "policy": {"r": 4}})


def test_frozen_adapter_and_base_are_unchanged_after_run(
    cache: Path, tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPO over a frozen adapter changes no byte of it, of its files, or of the base."""
    builds = record_builds(monkeypatch)
    files = file_bytes(sft_run)
    events: list[Any] = []
    sft, policy = dict[str, Any](), dict[str, Any]()

    def record(event: Any) -> None:
        events.append(event)
        if isinstance(event, StepEnd) and event.step == event.steps:
            sft.update(builds[0].roles.adapter_tensors("sft"))
            policy.update(builds[0].roles.adapter_tensors("policy"))

    recipe = Recipe.from_dict(dpo_over_adapter(sft_run))
    summary = run(recipe, out=tmp_path / "dpo", ui="none", device=CPU, on_event=record).summary
    assert file_bytes(sft_run) == files
    assert changed_tensors(sft, load_file(sft_run / "final" / WEIGHTS)) == set()
    below = json.loads((sft_run / "summary.json").read_text())
    assert summary["base_hash"]["end"] == summary["base_hash"]["start"] == below["base_hash"]["end"]
    assert set(summary["adapter_hashes"]) == {"sft"}
    assert first_event(events, RunStarted).reference == "the base with the frozen adapter sft"
    assert first_event(events, StepEnd).stats["kl"] == 0.0
    assert all(tensor.any() for key, tensor in policy.items() if "lora_B" in key), "the policy was not trained"


def test_changed_frozen_adapter_stops_run(
    cache: Path, tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen adapter that changes during the run raises TrainingError."""
    builds = record_builds(monkeypatch)

    def nudge(event: Any) -> None:
        if isinstance(event, StepEnd) and event.step == 2:
            parameters = builds[0].base.model.named_parameters()
            next(p for name, p in parameters if ".lt_sft." in name).data[0, 0] += 1e-3

    recipe = Recipe.from_dict(dpo_over_adapter(sft_run))
    with pytest.raises(TrainingError, match="frozen adapter"):
        run(recipe, out=tmp_path / "dpo", ui="none", device=CPU, on_event=nudge)


# --- a continued policy -----------------------------------------------------------------------------------------------


def continued_recipe(path: Path) -> dict[str, Any]:
    """Returns a recipe of DPO that trains a saved adapter further."""
    return small_dpo(base={"model": "tiny-tutor", "bits": 4}, adapters={"policy": {"path": str(path)}})


def test_continued_policy_starts_away_from_reference(cache: Path, tmp_path: Path, sft_run: Path) -> None:
    """A policy that continues a saved adapter has KL > 0 at the first step. A message reports that it may differ from
    its reference."""
    events = run_with_events(continued_recipe(sft_run), tmp_path / "run")[1]
    assert any("need not agree" in getattr(event, "message", "") for event in events)
    assert first_event(events, StepEnd).stats["kl"] > 1e-4


def test_continued_policy_with_wrong_cache_stops_run(
    cache: Path, tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cached log-probs are compared although the policy need not equal its reference."""
    _sums_off(monkeypatch)
    with pytest.raises(TrainingError, match="cached log-probs"):
        run_with_events(continued_recipe(sft_run), tmp_path / "run")
