"""TRL 1.16 as an oracle: its GRPOTrainer's own loss on the same completions, advantages, old and reference log-probs,
adapters in fp32.

The documented differences are made equal: advantages are given (theirs divide by the spread with 1/(n - 1)), and k3 is
compared with their KL without the ratio where the ratio is a sequence's, for theirs is then the sequence's too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_helpers import MAX_NEW_TOKENS, FakeCollector, by_key, error_against
from models import llama_roles, perturb, saved_model, zero_grad
from test_preference_trl import lora, place, tokenizer
from torch import Tensor

from lowrank_tune.algorithms import grpo as grpo_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.grpo import GRPO, group_advantages
from lowrank_tune.batch import RolloutBatch
from lowrank_tune.config import GRPOConfig
from lowrank_tune.model.logprobs import LogProbs
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import add_stats, to_floats

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
REWARDS = [[[1.0, 0.0, 0.0, 0.2], [0.2, 0.9, 0.4, 0.4], [0.0, 0.0, 1.0, 1.0]]]
LOW, HIGH, KL = 0.15, 0.25, 0.3


@pytest.fixture(scope="module")
def policy() -> Roles:
    roles = llama_roles(16)
    perturb(roles, "policy", size=0.05)
    return roles


@pytest.fixture(scope="module")
def trainer(policy: Roles, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainer of TRL with our adapter in fp32; each test sets its loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=4,
        num_generations=4,
        gradient_accumulation_steps=1,
        max_completion_length=MAX_NEW_TOKENS,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        temperature=0.7,
        beta=KL,
        epsilon=LOW,
        epsilon_high=HIGH,
    )
    model = AutoModelForCausalLM.from_pretrained(saved_model(), dtype=torch.float32)
    found = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["t05"] * 4}),
        processing_class=tokenizer(),
        peft_config=lora("CAUSAL_LM"),
    )
    place(found.model, policy.adapter_tensors("policy"))
    found.model.train()
    found.current_gradient_accumulation_steps = 1
    return found


def trl_inputs(part: RolloutBatch) -> dict[str, Tensor]:
    """The same rows as TRL lays them: prompts padded on the left, completions on the right."""
    rows = range(len(part))
    prompts = [part.input_ids[i][part.attention_mask[i] & ~part.completion_mask[i]] for i in rows]
    completions = [part.input_ids[i][part.completion_mask[i]] for i in rows]
    wide, long = max(map(len, prompts)), max(map(len, completions))

    def filled(width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(len(part), width, dtype=dtype)

    found = {
        "prompt_ids": filled(wide, torch.long),
        "prompt_mask": filled(wide, torch.long),
        "completion_ids": filled(long, torch.long),
        "completion_mask": filled(long, torch.long),
        "old_per_token_logps": filled(long, torch.float32),
        "ref_per_token_logps": filled(long, torch.float32),
    }
    for i in rows:
        p, n = len(prompts[i]), len(completions[i])
        found["prompt_ids"][i, wide - p :], found["prompt_mask"][i, wide - p :] = prompts[i], 1
        found["completion_ids"][i, :n], found["completion_mask"][i, :n] = completions[i], 1
        found["old_per_token_logps"][i, :n] = part.old_logps[i][part.completion_mask[i]]
        found["ref_per_token_logps"][i, :n] = part.reference_logps[i][part.completion_mask[i]]
    return found | {"advantages": part.sequence_advantages, "num_items_in_batch": part.completion_mask.sum()}


def set_trl_loss(trainer: Any, kind: str, estimator: str, high: float) -> None:
    """Sets TRL's settings for our loss and estimator."""
    trainer._metrics["train"].clear()
    trainer.loss_type = "grpo" if kind == "gspo" else kind
    trainer.importance_sampling_level = "sequence" if kind == "gspo" else "token"
    trainer.epsilon_high, trainer.args.use_bias_correction_kl = high, estimator == "k3_ratio"


def grpo_over(policy: Roles, kind: str, estimator: str, high: float, **fake: Any) -> GRPO:
    settings = GRPOConfig(loss_type=kind, epsilon=LOW, epsilon_high=high, beta=KL, kl_estimator=estimator)
    return GRPO(AlgorithmContext(policy, fresh=False), settings, FakeCollector(policy, REWARDS, **fake))


def both(
    trainer: Any, policy: Roles, kind: str, estimator: str, high: float = HIGH
) -> tuple[float, float, dict[str, float], Any]:
    """Returns the relative distance of loss and of gradient, our metrics, and the trainer of TRL with its metrics."""
    zero_grad(policy)
    trainer.model.zero_grad()
    set_trl_loss(trainer, kind, estimator, high)
    algorithm = grpo_over(policy, kind, estimator, high, temperature=0.7)
    part = algorithm.collect(0).batch
    part.old_logps = part.sampler_logps + 0.3 * torch.randn(
        part.input_ids.shape, generator=torch.Generator().manual_seed(0)
    )
    theirs = trainer._compute_loss(trainer.model, trl_inputs(part))
    theirs.backward()
    kept = {
        name.replace(".default", ""): p.grad.clone()
        for name, p in trainer.model.named_parameters()
        if p.grad is not None
    }
    part.token_weights = algorithm.token_weights(part)
    loss, stats = 0.0, {}
    for micro in part.split(rows=5):
        for term in algorithm.compute_losses(micro):
            term.loss.backward()
            loss += float(term.loss.detach())
            add_stats(stats, term.stats)
    apart = abs(loss - float(theirs.detach())) / abs(float(theirs.detach()))
    return apart, error_against(by_key(policy, "policy"), kept), to_floats(stats), trainer._metrics["train"]


CASES = [
    ("grpo", "k3_ratio", HIGH),
    ("grpo", "k3", HIGH),
    ("dapo", "k3_ratio", 0.28),
    ("dr_grpo", "k3_ratio", HIGH),
    ("gspo", "k3", 0.05),
    ("cispo", "k3_ratio", 1.1),
    ("cispo", "k3", 5.0),
]


@pytest.mark.parametrize(("kind", "estimator", "high"), CASES)
def test_grpo_equals_trl(trainer: Any, policy: Roles, kind: str, estimator: str, high: float) -> None:
    loss, gradient, stats, logged = both(trainer, policy, kind, estimator, high)
    # k3 alone has e^d of log-probs that are far apart here, and their rounding e^d times
    close = 1e-5 if estimator == "k3" else 2e-6
    assert loss < close and gradient < 3e-5, "two ways through one model in fp32: the gradient's noise is 7e-6"
    assert stats["entropy"] == pytest.approx(logged["entropy"][0], rel=1e-5)
    if kind in ("grpo", "dapo", "dr_grpo"):
        assert stats["clip_ratio"] == pytest.approx(logged["clip_ratio/region_mean"][0]) and stats["clip_ratio"] > 0.05
    if estimator == "k3":
        assert stats["kl"] == pytest.approx(logged["kl"][0], rel=1e-4)


def on_the_same_tensors(
    trainer: Any, policy: Roles, monkeypatch: pytest.MonkeyPatch, kind: str, estimator: str, high: float, seed: int
) -> tuple[float, float]:
    """The same, with log-probs in float64 given to both: no model is in between. Distance of the loss, and of its slope
    by the log-probs."""
    set_trl_loss(trainer, kind, estimator, high)
    algorithm = grpo_over(policy, kind, estimator, high)
    part = algorithm.collect(seed).batch
    stream = torch.Generator().manual_seed(seed)
    logps = torch.where(part.completion_mask, part.sampler_logps.double(), 0.0)
    for name, size in (("old_logps", 0.4), ("reference_logps", 0.9)):
        moved = logps + size * torch.randn(logps.shape, generator=stream)
        setattr(part, name, torch.where(part.completion_mask, moved, 0.0).float().double())
    leaf = logps.requires_grad_()
    algorithm.context = AlgorithmContext(SimpleNamespace(logps=lambda *_: LogProbs(leaf, torch.zeros_like(leaf))), None)  # type: ignore[arg-type]
    part.token_weights = algorithm.token_weights(part)
    (term,) = algorithm.compute_losses(part)
    (mine,) = torch.autograd.grad(term.loss, leaf)
    given = trl_inputs(part)
    rows = torch.nn.utils.rnn.pad_sequence(
        [leaf[i][part.completion_mask[i]] for i in range(len(part))], batch_first=True
    )
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (rows, torch.zeros_like(rows), None)
    )
    loss = trainer._compute_loss(trainer.model, given)
    (theirs,) = torch.autograd.grad(loss, leaf)
    monkeypatch.undo()
    return abs(float((term.loss - loss).detach() / loss.detach())), float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("kind", "estimator", "high"), CASES)
def test_the_same_tensors_give_the_same_loss_and_slope(
    trainer: Any, policy: Roles, monkeypatch: pytest.MonkeyPatch, kind: str, estimator: str, high: float
) -> None:
    for seed in range(6):
        loss, slope = on_the_same_tensors(trainer, policy, monkeypatch, kind, estimator, high, seed)
        assert loss < 1e-6 and slope < 1e-6


def test_a_side_by_side_can_fail(trainer: Any, policy: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the ratio of a sequence for that of a token, without the ratio at the KL, and with one weight for
    another."""
    real = grpo_module.policy_loss
    monkeypatch.setattr(grpo_module, "policy_loss", lambda kind, *rest: real("gspo", *rest))
    assert both(trainer, policy, "grpo", "k3")[1] > 1e-2
    monkeypatch.undo()
    penalty = grpo_module.kl_penalty
    monkeypatch.setattr(grpo_module, "kl_penalty", lambda name, *rest: penalty("k3", *rest))
    assert both(trainer, policy, "grpo", "k3_ratio")[1] > 1e-3
    monkeypatch.undo()
    weigh = GRPO.token_weights

    def of_another(self: GRPO, batch: RolloutBatch) -> Tensor:
        if self.settings.loss_type == "grpo":
            self.settings = self.settings.model_copy(update={"loss_type": "dapo"})
        return weigh(self, batch)

    monkeypatch.setattr(GRPO, "token_weights", of_another)
    assert both(trainer, policy, "grpo", "k3")[1] > 1e-2


def test_advantages_are_trls_but_for_the_spread() -> None:
    """Theirs: (R - mean) / (std with 1/(n - 1) + 1e-4). Without the spread, dr_grpo's, both are one."""
    rewards = np.array(REWARDS[0])
    mean, n = rewards.mean(axis=1, keepdims=True), rewards.shape[1]
    theirs = (rewards - mean) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    ours = group_advantages(torch.tensor(rewards)).double().numpy()
    assert np.allclose(ours, theirs * np.sqrt(n / (n - 1)), rtol=1e-3) and not np.allclose(ours, theirs, rtol=1e-2)
    assert np.allclose(group_advantages(torch.tensor(rewards), scale_by_std=False).numpy(), rewards - mean, atol=1e-7)
