"""Whole runs of PPO: one base and no second copy, values that are saved and come back, rates and clips of their own,
and the tiny RLHF."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_helpers import run_with_events, step_metrics
from models import CPU, changed_tensors, perturb
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lowrank_tune import Recipe, run
from lowrank_tune import config as all_settings
from lowrank_tune import runner as runner_module
from lowrank_tune.algorithms import ppo as ppo_module
from lowrank_tune.algorithms.rollouts import RolloutCollector
from lowrank_tune.config import load_any
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import GroupLogged
from lowrank_tune.generation import cpu_weights
from lowrank_tune.generation.cpu_linears import FastLinears
from lowrank_tune.model.adapters import CONFIG, WEIGHTS, read_adapter
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY
from lowrank_tune.training.trainer import Trainer, make_optimizer


def small(sft: Path, steps: int = 2, **ppo: Any) -> dict[str, Any]:
    return {
        "name": "ppo",
        "algorithm": "ppo",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"sft": {"path": str(sft)}, "policy": {"r": 4}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 20}]},
        "rewards": [{"name": "answer"}, {"name": "length", "target_tokens": 5, "weight": 0.5}],
        "rollout": {"num_generations": 2, "max_new_tokens": 10},
        "ppo": {"num_ppo_epochs": 2, "num_mini_batches": 2, **ppo},
        "train": {
            "max_steps": steps,
            "prompts_per_step": 4,
            "micro_batch_size": 3,
            "learning_rate": 5e-3,
            "gradient_checkpointing": False,
        },
    }


@pytest.mark.slow
def test_a_run_leaves_its_base_alone_and_can_be_repeated(tmp_path: Path, sft_run: Path) -> None:
    files = {path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()}
    outcome, events = run_with_events(small(sft_run), tmp_path / "one")
    assert {path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()} == files
    below = json.loads((sft_run / "summary.json").read_text())
    assert outcome.summary["base_hash"]["end"] == outcome.summary["base_hash"]["start"] == below["base_hash"]["end"]
    assert set(outcome.summary["adapter_hashes"]) == {"sft"}
    steps = step_metrics(events)
    assert (
        steps[0]["kl"] == 0.0 < steps[1]["kl"]
        and steps[0]["sampling/sampling_logp_difference/mean"] < 1e-5
        and steps[0]["value"] == 0.0 != steps[1]["value"]
    )
    metrics = {
        "reward",
        "scores",
        "kl",
        "kl_coef",
        "value_loss",
        "explained_variance",
        "clip_ratio",
        "value_clip_ratio",
        "entropy",
        "completions/mean_length",
        "completions/clipped_ratio",
        "approx_kl",
        "rewards/answer/mean",
        "rewards/length/mean",
    }
    assert metrics <= steps[1].keys() and all(map(math.isfinite, steps[1].values()))
    ended = {name: load_file(tmp_path / "one" / "final" / name / WEIGHTS) for name in ("", "value")}
    assert HEAD_WEIGHT_KEY in ended["value"] and HEAD_WEIGHT_KEY not in ended[""]
    for tensors in ended.values():
        assert all(tensor.any() for key, tensor in tensors.items() if "lora_A" not in key), (
            "nothing was trained: the test saw nothing"
        )
    _, again = run_with_events(small(sft_run), tmp_path / "two")
    assert step_metrics(again) == steps
    assert all(
        not changed_tensors(tensors, load_file(tmp_path / "two" / "final" / name / WEIGHTS))
        for name, tensors in ended.items()
    )
    groups = [event.completions for event in events if isinstance(event, GroupLogged)]
    assert len(groups) == 2 and all(isinstance(one["advantage"], float) for group in groups for one in group)


@pytest.mark.parametrize("critic", [pytest.param("separate", marks=pytest.mark.slow), "shared"])
def test_value_is_restored_bit_for_bit(
    tmp_path: Path,
    sft_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    critic: str,
) -> None:
    ended: dict[str, Tensor] = {}
    finish = runner_module.Stage.finish

    def keep(stage: Any, *how: Any) -> None:
        finish(stage, *how)
        ended.update(stage.built.roles.adapter_tensors("value"))

    monkeypatch.setattr(runner_module.Stage, "finish", keep)
    run_with_events(small(sft_run, critic=critic, num_mini_batches=1), tmp_path / "one")
    monkeypatch.setattr(runner_module.Stage, "finish", finish)
    final = tmp_path / "one" / "final"
    assert not changed_tensors(load_file(final / "value" / WEIGHTS), ended) and ended[HEAD_WEIGHT_KEY].any()
    assert json.loads((final / "value" / CONFIG).read_text())["modules_to_save"] == ["score"]
    checkpoint = tmp_path / "one" / "checkpoints" / "step-2" / "value"
    assert (checkpoint / WEIGHTS).read_bytes() == (final / "value" / WEIGHTS).read_bytes()
    assert read_adapter(str(final), "here").head is None, "what a user takes away is a plain policy"
    if critic == "shared":
        assert set(ended) == {HEAD_WEIGHT_KEY}
        return
    assert not changed_tensors(read_adapter(str(final / "value"), "here", head=True).tensors, ended)
    recipe = small(sft_run, steps=1)
    recipe["adapters"]["value"] = {"path": str(final / "value")}
    seen = loaded_values(monkeypatch)
    run_with_events(recipe, tmp_path / "two")
    assert not changed_tensors(seen[0], ended), "the value goes on from there"


def loaded_values(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The value's tensors as each run begins with them."""
    seen: list[dict[str, Tensor]] = []
    train = runner_module.Stage.train

    def look(stage: Any, *how: Any) -> Any:
        seen.append(stage.built.roles.adapter_tensors("value"))
        return train(stage, *how)

    monkeypatch.setattr(runner_module.Stage, "train", look)
    return seen


def test_a_policy_that_is_not_its_reference_is_refused(
    tmp_path: Path,
    sft_run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = runner_module.build

    def perturbed(*given: Any, **more: Any) -> Any:
        built = real(*given, **more)
        perturb(built.roles, "policy", size=0.05)
        return built

    monkeypatch.setattr(runner_module, "build", perturbed)
    with pytest.raises(TrainingError, match="the reference is not what it must be"):
        run_with_events(small(sft_run), tmp_path / "run")


# --- one base ---------------------------------------------------------------------------------------------------------


def storages() -> dict[int, Tensor]:
    """Returns every tensor that has memory, once a storage. A graph that torch keeps may have tensors without."""
    gc.collect()
    found: dict[int, Tensor] = {}
    for one in gc.get_objects():
        if (
            issubclass(type(one), Tensor)
            and not isinstance(one, FakeTensor)
            and one.device == CPU
            and one.layout == torch.strided
            and one.untyped_storage().nbytes()
        ):
            found.setdefault(one.untyped_storage().data_ptr(), one)
    return found


def growth(monkeypatch: pytest.MonkeyPatch, sft: Path, out: Path) -> tuple[int, int, list[str]]:
    """Returns the bytes of an update beyond those before its rollout and before the first graph of policy and value;
    the bytes of the rollout's scratch memory; and copies of tensors of the base."""
    before, looked = dict[int, None](), set[str]()
    most, scratch, copies = 0, 0, list[str]()
    draw, opened = RolloutCollector.collect, FastLinears.__init__

    def drawing(self: RolloutCollector, *how: Any) -> Any:
        before.update(dict.fromkeys(storages()))
        return draw(self, *how)

    def opening(self: FastLinears, *how: Any) -> None:
        nonlocal scratch
        opened(self, *how)
        scratch = max(scratch, self.scratch_bytes)

    def looking(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def term(self: Any, micro: Any) -> Any:
            nonlocal most
            if name in looked:
                return real(self, micro)
            looked.add(name)
            fresh = {place: one for place, one in storages().items() if place not in before}
            most = max(most, sum(one.untyped_storage().nbytes() for one in fresh.values()))
            model = self.context.roles.base.model
            own = {name: one for name, one in (*model.named_parameters(), *model.named_buffers()) if "lora" not in name}
            shapes = {
                (m.base_layer.out_features, m.base_layer.in_features)
                for m in model.modules()
                if hasattr(m, "base_layer")
            }
            for one in fresh.values():
                copies.extend(
                    name
                    for name, base in own.items()
                    if one.data_ptr() != base.data_ptr()
                    and one.shape == base.shape
                    and one.dtype == base.dtype
                    and torch.equal(one, base)
                )
                if tuple(one.shape) in shapes and one.is_floating_point():
                    copies.append(f"unpacked {tuple(one.shape)}")
            return real(self, micro)

        return term

    with monkeypatch.context() as patch:
        patch.setattr(RolloutCollector, "collect", drawing)
        patch.setattr(FastLinears, "__init__", opening)
        for name in ("_policy_term", "_value_term"):
            patch.setattr(ppo_module.PPO, name, looking(name, getattr(ppo_module.PPO, name)))
        run_with_events(small(sft, steps=1, num_ppo_epochs=1, num_mini_batches=1), out)
    return most, scratch, copies


@pytest.mark.slow
def test_no_second_base_is_in_memory_during_an_update(
    tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights in oneDNN's blocks have no storage that could be counted; plain copies have the same lifetime.
    monkeypatch.setattr(cpu_weights, "has_blocked_weights", lambda: False)
    most, scratch, copies = growth(monkeypatch, sft_run, tmp_path / "one")
    assert scratch > 1 << 20 and most < scratch / 4 and copies == [], (most, scratch)
    kept: list[Any] = []
    monkeypatch.setattr(FastLinears, "close", lambda self: kept.append(self))
    most, scratch, copies = growth(monkeypatch, sft_run, tmp_path / "two")
    assert most > 0.9 * scratch and any(name.startswith("unpacked") for name in copies), (
        "a scratch that is not freed would not be seen"
    )


# --- rates and clips of their own -------------------------------------------------------------------------------------


def loop_of(groups: Any, flat: list[nn.Parameter]) -> Trainer:
    train = all_settings.TrainingConfig(max_steps=4, learning_rate=1e-3, lr_scheduler_type="constant")
    return Trainer(
        None,
        flat,
        make_optimizer(groups, train, CPU),
        train,
        4,
        0,
        CPU,
        lambda event: None,
        lambda progress, last: None,
    )  # type: ignore[arg-type]


def test_each_group_is_clipped_by_itself() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    loop = loop_of([{"params": [one], "share": 1.0}, {"params": [other], "share": 4.0}], [one, other])
    one.grad, other.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.0, 0.5])
    assert float(loop._clip_gradients()) == pytest.approx(math.hypot(50.0, 0.5))
    assert torch.allclose(one.grad, torch.tensor([0.6, 0.8]), atol=1e-5) and other.grad.tolist() == [0.0, 0.5]
    alone = loop_of([one, other], [one, other])
    one.grad, other.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.0, 0.5])
    assert float(alone._clip_gradients()) == pytest.approx(math.hypot(50.0, 0.5)) and float(other.grad.norm()) < 0.02


def test_value_has_its_own_learning_rate(tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = Trainer._step

    def look(self: Trainer) -> None:
        step(self)
        rates.append([group["lr"] for group in self.optimizer.param_groups])

    monkeypatch.setattr(Trainer, "_step", look)
    run_with_events(small(sft_run, value_learning_rate=2e-2), tmp_path / "run")
    assert rates == [pytest.approx([5e-3, 2e-2]), pytest.approx([2.5e-3, 1e-2])], (
        "one schedule, a cosine over two steps"
    )


# --- the reward model's start -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory, sft_run: Path) -> Path:
    recipe = {
        "name": "reward",
        "algorithm": "reward",
        "base": {"model": "tiny-tutor"},
        "adapters": {"sft": {"path": str(sft_run)}, "reward": {"r": 4}},
        "data": {"train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 30}]},
        "train": {
            "max_steps": 3,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 5e-3,
            "gradient_checkpointing": False,
        },
    }
    out = tmp_path_factory.mktemp("judge") / "reward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_TUNE_CACHE", str(out.parent / "cache"))
        run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU)
    return out


def test_a_value_can_begin_as_the_reward_model(
    tmp_path: Path,
    sft_run: Path,
    reward_run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = small(sft_run, steps=1, critic_init="reward")
    recipe["adapters"]["reward"] = {"path": str(reward_run)}
    recipe["rewards"] = [{"name": "reward_model", "weight": 0.5}]
    seen = loaded_values(monkeypatch)
    outcome, events = run_with_events(recipe, tmp_path / "run")
    judge = read_adapter(str(reward_run), "here", head=True).tensors
    kept = {key: tensor.clone() for key, tensor in judge.items()}
    assert torch.equal(seen[0].pop(HEAD_WEIGHT_KEY), judge.pop(HEAD_WEIGHT_KEY) * 0.5) and not changed_tensors(
        seen[0], judge
    )
    assert set(outcome.summary["adapter_hashes"]) == {"sft", "reward"} and step_metrics(events)[0]["kl"] == 0.0
    ended = load_file(tmp_path / "run" / "final" / "value" / WEIGHTS)
    assert changed_tensors({key: tensor for key, tensor in ended.items() if key != HEAD_WEIGHT_KEY}, judge), (
        "the copy learns, and the judge stays"
    )
    assert not changed_tensors(read_adapter(str(reward_run), "here", head=True).tensors, kept)


# --- the whole story --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tiny_rlhf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward model orders nine of ten held-out pairs, and PPO improves the gold answers with its score, at a KL
    below the target."""
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    fewer = [
        f"stages.{stage}.evaluate.{setting}"
        for stage in ("sft", "ppo")
        for setting in ("num_prompts=80", "num_samples=2")
    ]
    recipe = load_any("tiny-rlhf", *fewer)
    outcome = run(recipe, out=tmp_path / "run", ui="none", device=CPU)
    stages = {stage["name"]: stage for stage in outcome.summary["stages"]}
    heldout = outcome.summary["heldout"]
    assert stages["reward"]["heldout_pairs"]["accuracy"] >= 0.9
    assert heldout["ppo"] >= heldout["sft"] + 0.1
    assert 0 < stages["ppo"]["last"]["kl"] < recipe.stages[2].ppo.kl_target  # type: ignore[union-attr]
